#include "backend/trace/trace_writer.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/backend/raw_trace.h"
#include "tests/backend/temp_dir.h"
#include "tests/fakes/guest_ram.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::backend {
namespace {

using testing::FailsWith;
using testing::IsOk;
using testing::RawBytes;
using testing::RawOf;
using testing::RawPayload;
using testing::RawRecord;

class TraceWriterTest : public ::testing::Test {
 protected:
  std::unique_ptr<TraceWriter> Open() {
    auto writer = TraceWriter::Create(path_);
    EXPECT_THAT(writer, IsOk());
    return std::move(*writer);
  }
  // What is in the file, times left out.
  std::vector<RawRecord> Records() {
    auto records = testing::DecodeTrace(testing::ReadFile(path_));
    EXPECT_TRUE(records.has_value());
    if (!records) return {};
    for (RawRecord& record : *records) record.since_ns = 0;
    return *records;
  }
  static RawBytes Noise(size_t size) {
    RawBytes bytes(size);
    uint32_t state = 1;
    for (std::byte& byte : bytes) {
      state = state * 1664525 + 1013904223;
      byte = static_cast<std::byte>(state >> 24);
    }
    return bytes;
  }

  testing::TempDir dir_;
  const std::string path_ = dir_ / "trace";
};

TEST_F(TraceWriterTest, EveryRecordIsInTheFileAsTheFormatSays) {
  const auto range = testing::MakeRange(0x100000, 0x3000);
  const RawBytes bytes = RawOf("guest bytes");
  const SessionObserver::Backing backing{{.device = 1, .inode = 2}, 0x5000, 0x9000, true};
  const SessionObserver::Backing other{{.device = 1, .inode = 3}, 0, 0x1000, true};
  auto writer = Open();
  writer->session("{\"a\":1}");
  writer->on_map(range, domain::Access::kReadWrite, backing);
  writer->on_map(range, domain::Access::kRead, {});
  writer->on_map(range, domain::Access::kWrite, other);
  writer->on_map(range, domain::Access::kWrite, backing);
  writer->on_unmap(Iova(0x100000), 0x3000);
  writer->on_unmap_all();
  writer->on_region_write(7, 0x44, bytes);
  writer->on_region_read(4, 0x2000, bytes);
  writer->on_irqs(2, TraceIrqOp::kTrigger, 1, 2);
  writer->on_reset();
  writer->on_guest_read(Iova(0x100123), bytes);
  writer->on_request(1, bytes);
  writer->on_response(0, bytes);
  writer->on_frame(3, {640, 480}, 0x1122334455667788);
  writer->on_step(1);
  writer->on_accounts({1000, 300, 200, 150, 1 << 20});
  EXPECT_EQ(writer->records(), 17u);
  ASSERT_THAT(writer->finish("{}"), IsOk());
  EXPECT_EQ(writer->records(), 18u);
  EXPECT_EQ(writer->file_bytes(), testing::ReadFile(path_).size());
  EXPECT_EQ(writer->path(), path_);

  const std::vector<RawRecord> expected = {
      {1, 0, RawOf("{\"a\":1}")},
      {2, 0, RawPayload({0x100000, 0x3000, 3, 1, 0x5000, 0x9000})},
      {2, 0, RawPayload({0x100000, 0x3000, 1, 0, 0, 0})},
      {2, 0, RawPayload({0x100000, 0x3000, 2, 2, 0, 0x1000})},
      {2, 0, RawPayload({0x100000, 0x3000, 2, 1, 0x5000, 0x9000})},
      {3, 0, RawPayload({0x100000, 0x3000})},
      {4, 0, {}},
      {5, 0, RawPayload({7, 0x44}, bytes)},
      {6, 0, RawPayload({4, 0x2000}, bytes)},
      {7, 0, RawPayload({2, 3, 1, 2})},
      {8, 0, {}},
      {9, 0, RawPayload({0x100123}, bytes)},
      {11, 0, RawPayload({1}, bytes)},
      {12, 0, RawPayload({0}, bytes)},
      {13, 0, RawPayload({3, 640, 480}, RawOf("\x88\x77\x66\x55\x44\x33\x22\x11"))},
      {10, 0, RawPayload({1})},
      {15, 0, RawPayload({1000, 300, 200, 150, 1 << 20})},
      {14, 0, RawOf("{}")},
  };
  EXPECT_EQ(Records(), expected);
}

TEST_F(TraceWriterTest, LongGuestReadIsCutIntoRecordsOfOneMegabyte) {
  const RawBytes bytes = Noise((2u << 20) + 5);
  auto writer = Open();
  writer->on_guest_read(Iova(0x7000), bytes);
  ASSERT_THAT(writer->finish("{}"), IsOk());
  const auto records = Records();
  ASSERT_EQ(records.size(), 4u);
  RawBytes joined;
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(records[i].type, testing::kRawMemory);
    EXPECT_EQ(records[i].number(0), 0x7000 + (i << 20));
    const RawBytes part = records[i].bytes_after(1);
    EXPECT_EQ(part.size(), i < 2 ? 1u << 20 : 5u);
    joined.insert(joined.end(), part.begin(), part.end());
  }
  EXPECT_TRUE(joined == bytes);
}

TEST_F(TraceWriterTest, OnlyTheUserCanReadIt) {
  const mode_t before = umask(0);
  auto writer = Open();
  umask(before);
  struct stat status = {};
  ASSERT_EQ(stat(path_.c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 07777, 0600u);
}

TEST_F(TraceWriterTest, TraceOfBeforeIsReplacedAndClosedToOthers) {
  testing::WriteFile(path_, Noise(100000));
  ASSERT_EQ(chmod(path_.c_str(), 0644), 0);
  ASSERT_THAT(Open()->finish("{}"), IsOk());
  EXPECT_EQ(Records().size(), 1u);
  struct stat status = {};
  ASSERT_EQ(stat(path_.c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 07777, 0600u);
}

TEST_F(TraceWriterTest, WriterThatIsDroppedLeavesAWholeStreamWithoutSummary) {
  Open()->on_reset();
  const auto records = Records();
  ASSERT_EQ(records.size(), 1u);
  EXPECT_EQ(records[0].type, testing::kRawReset);
}

// What a killed backend leaves: everything up to the last flush.
TEST_F(TraceWriterTest, BytesReachTheFileWhileTheSessionGoesOn) {
  auto writer = Open();
  writer->on_guest_read(Iova(0), Noise(1u << 20));
  EXPECT_GT(testing::ReadFile(path_).size(), 1u << 20);
}

TEST_F(TraceWriterTest, PathThatCannotBeMadeIsNamed) {
  const auto writer = TraceWriter::Create(dir_ / "no/such/place");
  ASSERT_THAT(writer, FailsWith(ErrorCode::kSystem));
  EXPECT_THAT(writer.error().message(), ::testing::HasSubstr("no/such/place"));
  EXPECT_THAT(TraceWriter::Create(dir_.path()), FailsWith(ErrorCode::kSystem));
}

TEST_F(TraceWriterTest, FullDiskIsNoticedAtTheStart) {
  EXPECT_THAT(TraceWriter::Create("/dev/full"), FailsWith(ErrorCode::kSystem));
}

// A file size limit stands in for a disk that fills up in the middle.
TEST_F(TraceWriterTest, FullDiskEndsTheRecordingNotTheProcess) {
  rlimit before = {};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  auto writer = Open();
  const auto handler = signal(SIGXFSZ, SIG_IGN);
  const rlimit small = {.rlim_cur = 100'000, .rlim_max = before.rlim_max};
  setrlimit(RLIMIT_FSIZE, &small);
  const RawBytes bytes = Noise(1u << 20);
  for (int i = 0; i < 5; ++i) writer->on_guest_read(Iova(0), bytes);
  const auto finished = writer->finish("{}");
  writer.reset();
  setrlimit(RLIMIT_FSIZE, &before);
  signal(SIGXFSZ, handler);
  ASSERT_THAT(finished, FailsWith(ErrorCode::kSystem));
  EXPECT_THAT(finished.error().message(), ::testing::HasSubstr(path_));
  EXPECT_EQ(testing::ReadFile(path_).size(), 100'000u) << "what fitted is kept";
}

}  // namespace
}  // namespace mvgpu::backend
