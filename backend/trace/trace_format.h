#pragma once

// The trace of one VM session: everything that reaches the device from outside, so that the same
// code runs again without a VMM, and what came out of it, so that a replay can tell whether it did
// the same.
//
// File: 16 bytes of header, then one zstd stream (RFC 8878) of records up to the end of the file. A
// trace whose writer was killed has no kSummary record and may stop in the middle of a record: what
// is there replays.
//
//   offset  size  header field
//        0     8  magic "MVGPUTRC"
//        8     4  version, little-endian; kTraceVersion
//       12     4  zero
//
// A record: type (1 byte), nanoseconds since the record before it (varint), payload length
// (varint), payload. Integers in payloads are varints (LEB128) unless a size is given; fixed sizes
// are little-endian.
//
// clang-format off
//   type       payload                                                   a replay
//   kSession   JSON object, flat: config of the vGPU, see VgpuConfig     builds the same vGPU
//   kMap       iova, size, access (1 read, 2 write, 3 both), file        maps a sparse memfd
//              (from 1; 0: none), file offset, file size                   of that size; without a
//                                                                          file, memory of its own
//   kUnmap     iova, size                                                unmaps
//   kUnmapAll  -                                                         unmaps
//   kWrite     region, offset, bytes                                     writes the register
//   kRead      region, offset, bytes that were answered                  reads, compares
//   kIrqs      irq, operation (TraceIrqOp), start, count                 does it with own eventfds
//   kReset     -                                                         resets the device
//   kMemory    iova, bytes                                               puts them in guest memory
//   kStep      queue                                                     does one request
//   kRequest   queue, bytes of the request                               compares
//   kResponse  queue, bytes of the response                              compares
//   kFrame     scanout, width, height, hash (8 bytes; FrameHash)         compares
//   kSummary   JSON object, flat: counters at the end of the session     compares
//   kAccounts  pages: mapped, pinned, unique, charged, locked            compares the first three
// clang-format on
//
// A kStep ends the work on one request: the kMemory, kRequest, kResponse and kFrame records since
// the kStep before belong to it. The device reads a word of guest memory once per step, so a replay
// can make guest memory ready, do the step, and then compare what came out. A kAccounts stands
// behind what changed the accounts: a kStep, kMap, kUnmap, kUnmapAll or kReset.
//
// Version 1 had no kAccounts, and is read as well.

#include <cstdint>
#include <string_view>

namespace mvgpu::backend {

inline constexpr std::string_view kTraceMagic = "MVGPUTRC";
inline constexpr uint32_t kTraceVersion = 2;
inline constexpr uint32_t kOldestTraceVersion = 1;
inline constexpr size_t kTraceHeaderSize = 16;

// No record is longer; longer guest reads are several kMemory records.
inline constexpr uint64_t kMaxTracePayload = 4u << 20;
inline constexpr uint64_t kMaxMemoryRecord = 1u << 20;

enum class TraceType : uint8_t {
  kSession = 1,
  kMap = 2,
  kUnmap = 3,
  kUnmapAll = 4,
  kWrite = 5,
  kRead = 6,
  kIrqs = 7,
  kReset = 8,
  kMemory = 9,
  kStep = 10,
  kRequest = 11,
  kResponse = 12,
  kFrame = 13,
  kSummary = 14,
  kAccounts = 15,
};
inline constexpr uint8_t kLastTraceType = 15;

// As reports call it, e.g. "guest_memory".
std::string_view TraceTypeName(TraceType type);

enum class TraceIrqOp : uint8_t {
  kBind = 0,
  kUnbind = 1,
  kDisable = 2,
  kTrigger = 3,
  kMask = 4,
  kUnmask = 5
};

}  // namespace mvgpu::backend
