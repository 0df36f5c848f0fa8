#include "backend/policies/session_import.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "tests/backend/raw_trace.h"
#include "tests/fakes/guest_ram.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::backend {
namespace {

using ::testing::ElementsAre;
using testing::FailsWith;
using testing::IsOk;
using testing::MakeRange;
using testing::RawBytes;
using testing::RawPayload;
using testing::RawRecord;
using Kind = DmaEvent::Kind;

constexpr uint32_t kOk = 0x1100;
constexpr uint32_t kFailed = 0x1203;

// A record of some session: RAM of 1 MiB at 0, then requests with their answers.
class SessionMaker {
 public:
  SessionMaker() { map(0, 0x10'0000, 1); }

  void map(uint64_t iova, uint64_t size, uint64_t file) {
    records_.push_back({testing::kRawMap, 1000, RawPayload({iova, size, 3, file, 0, size})});
  }
  void request(uint32_t type, std::initializer_list<uint32_t> words, uint32_t answer = kOk,
               uint64_t queue = 0) {
    RawBytes bytes = Header(type);
    for (const uint32_t word : words) Append(bytes, word);
    records_.push_back({testing::kRawRequest, 1000, RawPayload({queue}, bytes)});
    records_.push_back({testing::kRawResponse, 0, RawPayload({queue}, Header(answer))});
  }
  void create(uint32_t id, uint32_t width, uint32_t height) {
    request(0x101, {id, 1, width, height});
  }
  // Addresses and lengths.
  void attach(uint32_t id, std::vector<std::pair<uint64_t, uint32_t>> entries,
              uint32_t answer = kOk) {
    RawBytes bytes = Header(0x106);
    Append(bytes, id);
    Append(bytes, static_cast<uint32_t>(entries.size()));
    for (const auto& [address, length] : entries) {
      Append(bytes, static_cast<uint32_t>(address));
      Append(bytes, static_cast<uint32_t>(address >> 32));
      Append(bytes, length);
      Append(bytes, 0);
    }
    records_.push_back({testing::kRawRequest, 1000, RawPayload({0}, bytes)});
    records_.push_back({testing::kRawResponse, 0, RawPayload({0}, Header(answer))});
  }
  void transfer(uint32_t id, uint32_t width, uint32_t height, uint32_t offset,
                uint32_t answer = kOk) {
    request(0x105, {0, 0, width, height, offset, 0, id, 0}, answer);
  }
  void detach(uint32_t id) { request(0x107, {id, 0}); }
  void unref(uint32_t id) { request(0x102, {id, 0}); }
  void reset() { records_.push_back({testing::kRawReset, 1000, {}}); }
  std::vector<RawRecord>& records() { return records_; }

  Result<DmaTrace> import() const {
    const RawBytes file = testing::EncodeTrace(records_);
    auto reader = TraceReader::FromBytes(file, "session");
    if (!reader) return tl::unexpected<Error>(reader.error());
    return ImportSession(reader->get());
  }

 private:
  static void Append(RawBytes& bytes, uint32_t word) {
    for (int i = 0; i < 4; ++i) bytes.push_back(static_cast<std::byte>(word >> (8 * i)));
  }
  static RawBytes Header(uint32_t type) {
    RawBytes bytes;
    for (const uint32_t word : {type, 0u, 0u, 0u, 0u, 0u}) Append(bytes, word);
    return bytes;
  }

  std::vector<RawRecord> records_;
};

// All of them: kind, buffer, first page of the access, pages of it.
struct Seen {
  Kind kind;
  uint32_t buffer;
  uint64_t first = 0;
  uint64_t count = 0;
  bool operator==(const Seen&) const = default;
};
std::vector<Seen> SeenIn(const DmaTrace& trace) {
  std::vector<Seen> seen;
  for (const DmaEvent& event : trace.events) {
    seen.push_back({event.kind, event.buffer, event.first, event.count});
  }
  return seen;
}

TEST(SessionImportTest, ABackingIsABufferAndATransferAnAccess) {
  SessionMaker session;
  session.map(0x20'0000, 0x10'0000, 0);  // without a file
  session.create(7, 1024, 4);            // lines of a page
  session.attach(7, {{0x8000, 0x2000}, {0x3000, 0x2000}});
  session.transfer(7, 1024, 4, 0);
  session.transfer(7, 1, 2, 0x1ffc);  // the last pixel of the second line, and one a line below
  session.detach(7);
  const auto trace = session.import();
  ASSERT_THAT(trace, IsOk());
  EXPECT_THAT(trace->memory, ElementsAre(MakeRange(0, 0x10'0000)));
  EXPECT_THAT(trace->buffers.at(0).parts, ElementsAre(PageRun{8, 2}, PageRun{3, 2}));
  EXPECT_EQ(trace->buffers.at(0).direction, dma::Direction::kToDevice);
  EXPECT_THAT(SeenIn(*trace), ElementsAre(Seen{Kind::kMap, 0}, Seen{Kind::kAccess, 0, 0, 4},
                                          Seen{Kind::kAccess, 0, 1, 2}, Seen{Kind::kUnmap, 0}));
  EXPECT_EQ(trace->events[0].time_ns, 3000u);  // since the first record
}

TEST(SessionImportTest, PagesOfABackingThatIsNotAligned) {
  SessionMaker session;
  session.create(1, 512, 3);  // 2 KiB a line
  session.attach(1, {{0x8800, 0x800}, {0x2f00, 0x1000}});
  session.transfer(1, 1, 1, 0x7fc);
  session.transfer(1, 1, 1, 0x800);
  session.transfer(1, 1, 1, 0x900);
  const auto trace = session.import();
  ASSERT_THAT(trace, IsOk());
  EXPECT_THAT(trace->buffers.at(0).parts, ElementsAre(PageRun{8, 1}, PageRun{2, 2}));
  EXPECT_THAT(SeenIn(*trace),
              ElementsAre(Seen{Kind::kMap, 0}, Seen{Kind::kAccess, 0, 0, 1},
                          Seen{Kind::kAccess, 0, 1, 1}, Seen{Kind::kAccess, 0, 2, 1}));
}

TEST(SessionImportTest, WhatTheDeviceRefusedDidNotHappen) {
  SessionMaker session;
  session.request(0x101, {1, 1, 16, 16}, kFailed);
  session.create(2, 1024, 1);
  session.attach(2, {{0x8000, 0x1000}}, kFailed);
  session.transfer(2, 1024, 1, 0, kFailed);
  session.request(0x101, {3, 1, 16, 16}, kOk, /*queue=*/1);  // not the control queue
  const auto trace = session.import();
  ASSERT_THAT(trace, IsOk());
  EXPECT_TRUE(trace->events.empty());
}

TEST(SessionImportTest, UnrefAndResetEndBuffers) {
  SessionMaker session;
  for (const uint32_t id : {1, 2, 3}) {
    session.create(id, 1024, 1);
    session.attach(id, {{0x1000 * id, 0x1000}});
  }
  session.unref(1);
  session.reset();
  session.create(1, 1024, 1);
  session.attach(1, {{0x8000, 0x1000}});
  session.create(1, 1024, 1);  // so a register has reset the device
  const auto trace = session.import();
  ASSERT_THAT(trace, IsOk());
  EXPECT_THAT(SeenIn(*trace),
              ElementsAre(Seen{Kind::kMap, 0}, Seen{Kind::kMap, 1}, Seen{Kind::kMap, 2},
                          Seen{Kind::kUnmap, 0}, Seen{Kind::kUnmap, 1}, Seen{Kind::kUnmap, 2},
                          Seen{Kind::kMap, 3}, Seen{Kind::kUnmap, 3}));
}

TEST(SessionImportTest, WhatIsOutsideOfMemoryIsSkipped) {
  SessionMaker session;
  session.map(0x20'0000, 0x10'0000, 0);  // without a file: nothing to pin
  session.create(1, 1024, 1);
  session.attach(1, {{0x20'0000, 0x1000}});
  session.transfer(1, 1024, 1, 0);
  const auto trace = session.import();
  ASSERT_THAT(trace, IsOk());
  EXPECT_TRUE(trace->events.empty());
  EXPECT_EQ(trace->skipped, 2u);
}

TEST(SessionImportTest, AnswersThatCannotBeAreErrors) {
  const auto fails = [](void (*requests)(SessionMaker&)) {
    SessionMaker session;
    session.create(1, 1024, 2);
    requests(session);
    EXPECT_THAT(session.import(), FailsWith(ErrorCode::kCorrupt));
  };
  fails([](SessionMaker& session) { session.attach(9, {{0x8000, 0x1000}}); });
  fails([](SessionMaker& session) { session.unref(9); });
  fails([](SessionMaker& session) { session.request(0x107, {}); });
  fails([](SessionMaker& session) { session.request(0x106, {1, 1000}); });
  fails([](SessionMaker& session) { session.transfer(9, 1, 1, 0); });
  fails([](SessionMaker& session) {
    session.attach(1, {{0x8000, 0x1000}});
    session.transfer(1, 1024, 2, 0);
  });
  fails([](SessionMaker& session) {
    session.attach(1, {{0x8000, 0x1000}});
    session.attach(1, {{0x8000, 0x1000}});
  });
  fails([](SessionMaker& session) { session.map(0x1000, 0, 1); });
  fails([](SessionMaker& session) {
    session.records().push_back({testing::kRawMap, 0, RawPayload({1})});
  });
}

TEST(SessionImportTest, NoiseDoesNoHarm) {
  std::mt19937 random(1);
  SessionMaker session;
  session.create(1, 1024, 2);
  session.attach(1, {{0x8000, 0x1000}, {0x3000, 0x1000}});
  session.transfer(1, 1024, 2, 0);
  session.unref(1);
  unsigned taken = 0;
  for (int i = 0; i < 2000; ++i) {
    SessionMaker noisy = session;
    RawBytes& payload = noisy.records()[random() % noisy.records().size()].payload;
    payload[random() % payload.size()] ^= static_cast<std::byte>(1u << random() % 8);
    if (noisy.import()) ++taken;
  }
  EXPECT_GT(taken, 100u);
  EXPECT_LT(taken, 2000u);
}

TEST(SessionImportTest, ARealSessionHasTheDmaThatItsSummaryCounts) {
  const auto reader = TraceReader::Open(MVGPU_TRACE);
  ASSERT_THAT(reader, IsOk());
  const auto trace = ImportSession(reader->get());
  ASSERT_THAT(trace, IsOk());
  EXPECT_EQ(trace->skipped, 0u);
  uint64_t pages = 0;
  for (const DmaBuffer& buffer : trace->buffers) pages += buffer.pages();
  EXPECT_EQ(pages, 1768u);  // dma_miss_pages of `mvgpu-replay run`
  EXPECT_EQ(trace->memory_pages(), PagesIn(512 << 20));
}

}  // namespace
}  // namespace mvgpu::backend
