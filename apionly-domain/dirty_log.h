#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <span>

#include <absl/container/flat_hash_map.h>

#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "apionly-domain/base/mutex.h"

namespace mvgpu::domain {

// Which pages were written while the log was on, one bit per IOVA page, in pieces that exist only
// where something was written: a mapping that is added later needs no preparation, and marks
// outlive their mapping until they are read.
//
// Thread-safe. Marking costs nothing but a load while the log is off.
class DirtyLog {
 public:
  bool is_on() const { return on_.load(std::memory_order_relaxed); }
  // Starting and stopping forget every mark.
  void start();
  void stop();

  void mark(PageRun pages);

  enum class Read : uint8_t { kKeep, kClear };
  // Sets bit i of the bitmap (bit i % 64 of word i / 64) where any page of
  // [range.start() + i * bit_size, + bit_size) is marked; other bits stay as they are. `bit_size`
  // is in bytes. REQUIRES: CheckBitmap().
  void read(IovaRange range, uint64_t bit_size, Read read, std::span<uint64_t> bitmap);

  // Errors: kInvalid when a bit is no power of two of at least a page, when the range does not
  // consist of whole bits, or when the bitmap has not a bit for each.
  static Result<void> CheckBitmap(IovaRange range, uint64_t bit_size,
                                  std::span<const uint64_t> bitmap);
  // Sets the bits of the pages. REQUIRES: CheckBitmap(); the pages lie in the range.
  static void SetBits(IovaRange range, uint64_t bit_size, PageRun pages,
                      std::span<uint64_t> bitmap);

 private:
  static constexpr unsigned kPieceShift = 15;  // 128 MiB of pages: 4 KiB of bits
  static constexpr uint64_t kPiecePages = uint64_t{1} << kPieceShift;
  struct Piece {
    std::array<std::atomic<uint64_t>, kPiecePages / 64> words{};
  };

  void MarkInPiece(Piece& piece, uint64_t first, uint64_t count);

  std::atomic<bool> on_{false};
  Mutex mutex_;  // shared for marking in a piece that is there
  absl::flat_hash_map<uint64_t, std::unique_ptr<Piece>> pieces_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace mvgpu::domain
