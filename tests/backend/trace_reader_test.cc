#include "backend/trace/trace_reader.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <zstd.h>

#include <cstdio>
#include <filesystem>

#include "tests/backend/raw_trace.h"
#include "tests/backend/temp_dir.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::backend {
namespace {

using testing::EncodeStream;
using testing::EncodeTrace;
using testing::FailsWith;
using testing::IsOk;
using testing::RawBytes;
using testing::RawOf;
using testing::RawRecord;

constexpr size_t kHeader = 16;

// What came out of a trace until its end or an error.
struct Outcome {
  std::vector<RawRecord> records;
  std::optional<ErrorCode> error;
  bool cut_short = false;
};

Outcome ReadAll(TraceReader& reader) {
  Outcome outcome;
  while (true) {
    const auto record = reader.next();
    if (!record) {
      outcome.error = record.error().code();
      EXPECT_EQ(record.error().message().find('\n'), std::string::npos);
      return outcome;
    }
    if (!*record) break;
    outcome.records.push_back({static_cast<uint64_t>((*record)->type),
                               (*record)->time_ns,
                               {(*record)->payload.begin(), (*record)->payload.end()}});
  }
  outcome.cut_short = reader.is_cut_short();
  return outcome;
}

Outcome ReadAll(std::span<const std::byte> file) {
  auto reader = TraceReader::FromBytes(file, "test");
  if (!reader) return {{}, reader.error().code(), false};
  return ReadAll(**reader);
}

std::vector<RawRecord> OneOfEachType() {
  std::vector<RawRecord> records;
  for (uint64_t type = 1; type <= 14; ++type) {
    records.push_back({type, type * 1000, RawOf("payload " + std::to_string(type))});
  }
  return records;
}

// The same records as a stream that is flushed after each of them, as a long session is.
RawBytes FlushedTrace(const std::vector<RawRecord>& records) {
  RawBytes file = EncodeTrace({});
  file.resize(kHeader);
  ZSTD_CCtx* context = ZSTD_createCCtx();
  ZSTD_CCtx_setParameter(context, ZSTD_c_checksumFlag, 1);
  RawBytes chunk(1 << 16);
  const auto compress = [&](const RawBytes& bytes, ZSTD_EndDirective mode) {
    ZSTD_inBuffer input{bytes.data(), bytes.size(), 0};
    size_t left = 1;
    while (left != 0) {
      ZSTD_outBuffer output{chunk.data(), chunk.size(), 0};
      left = ZSTD_compressStream2(context, &output, &input, mode);
      file.insert(file.end(), chunk.begin(),
                  chunk.begin() + static_cast<std::ptrdiff_t>(output.pos));
    }
  };
  for (const RawRecord& record : records) {
    compress(testing::EncodeRecords({record}), ZSTD_e_flush);
  }
  compress({}, ZSTD_e_end);
  ZSTD_freeCCtx(context);
  return file;
}

TEST(TraceReaderTest, EveryRecordComesBackWithItsTime) {
  const Outcome outcome = ReadAll(EncodeTrace(OneOfEachType()));
  EXPECT_EQ(outcome.error, std::nullopt);
  EXPECT_FALSE(outcome.cut_short);
  auto expected = OneOfEachType();
  uint64_t time = 0;
  for (RawRecord& record : expected) {
    time += record.since_ns;
    record.since_ns = time - 1000;  // the clock starts with the first record
  }
  EXPECT_EQ(outcome.records, expected);
}

TEST(TraceReaderTest, FileReadsAsItsBytesDo) {
  testing::TempDir dir;
  testing::WriteFile(dir / "trace", EncodeTrace(OneOfEachType()));
  auto reader = TraceReader::Open(dir / "trace");
  ASSERT_THAT(reader, IsOk());
  EXPECT_EQ((*reader)->name(), dir / "trace");
  EXPECT_EQ((*reader)->bytes_total(), std::filesystem::file_size(dir / "trace"));
  EXPECT_EQ(ReadAll(**reader).records, ReadAll(EncodeTrace(OneOfEachType())).records);
  EXPECT_EQ((*reader)->bytes_read(), (*reader)->bytes_total());
}

TEST(TraceReaderTest, EmptyTraceIsATrace) {
  const Outcome outcome = ReadAll(EncodeTrace({}));
  EXPECT_TRUE(outcome.records.empty());
  EXPECT_EQ(outcome.error, std::nullopt);
  EXPECT_FALSE(outcome.cut_short);
}

TEST(TraceReaderTest, TraceCutAnywhereGivesWhatIsThereAndSaysSo) {
  const RawBytes whole = FlushedTrace(OneOfEachType());
  const auto all = ReadAll(whole).records;
  ASSERT_EQ(all.size(), 14u);
  size_t most = 0;
  for (size_t size = 0; size < whole.size(); ++size) {
    SCOPED_TRACE(size);
    const Outcome outcome = ReadAll(std::span(whole).first(size));
    if (size < kHeader) {
      EXPECT_EQ(outcome.error, ErrorCode::kCorrupt);
      continue;
    }
    EXPECT_EQ(outcome.error, std::nullopt);
    EXPECT_TRUE(outcome.cut_short);
    ASSERT_LE(outcome.records.size(), all.size());
    EXPECT_TRUE(std::equal(outcome.records.begin(), outcome.records.end(), all.begin()));
    EXPECT_GE(outcome.records.size(), most) << "more bytes, no fewer records";
    most = outcome.records.size();
  }
  EXPECT_EQ(most, 14u) << "only the end of the stream is missing";
  EXPECT_FALSE(ReadAll(whole).cut_short);
}

TEST(TraceReaderTest, StreamThatEndsInsideARecordIsCutShort) {
  const RawBytes stream = testing::EncodeRecords(OneOfEachType());
  for (size_t size = 0; size < stream.size(); ++size) {
    const Outcome outcome = ReadAll(EncodeStream(std::span(stream).first(size)));
    EXPECT_EQ(outcome.error, std::nullopt) << size;
    size_t whole = 0;
    for (const RawRecord& record : outcome.records) {
      whole += testing::EncodeRecords({{record.type, 1000 * record.type, record.payload}}).size();
    }
    EXPECT_EQ(outcome.cut_short, whole != size) << size;
  }
}

TEST(TraceReaderTest, AnyBitMayFlip) {
  const RawBytes whole = FlushedTrace(OneOfEachType());
  size_t noticed = 0;
  for (size_t bit = 0; bit < whole.size() * 8; ++bit) {
    RawBytes flipped = whole;
    flipped[bit / 8] ^= static_cast<std::byte>(1 << (bit % 8));
    const Outcome outcome = ReadAll(flipped);
    if (outcome.error || outcome.cut_short) ++noticed;
    EXPECT_EQ(outcome.error.value_or(ErrorCode::kCorrupt), ErrorCode::kCorrupt) << bit;
  }
  EXPECT_GT(noticed, whole.size() * 8 * 9 / 10) << "the stream has a checksum";
}

TEST(TraceReaderTest, WhatIsNoTraceIsRefused) {
  const RawBytes good = EncodeTrace(OneOfEachType());
  EXPECT_EQ(ReadAll(good).error, std::nullopt);
  for (size_t i = 0; i < 8; ++i) {
    RawBytes bad = good;
    bad[i] ^= std::byte{0x20};
    EXPECT_EQ(ReadAll(bad).error, ErrorCode::kCorrupt) << "magic, byte " << i;
  }
  for (const size_t i : {8, 9, 10, 11}) {
    RawBytes bad = good;
    bad[i] ^= std::byte{4};
    const auto reader = TraceReader::FromBytes(bad, "test");
    ASSERT_THAT(reader, FailsWith(ErrorCode::kCorrupt)) << "version, byte " << i;
    EXPECT_THAT(reader.error().message(), ::testing::HasSubstr("version"));
  }
  RawBytes garbage = good;
  garbage.resize(kHeader);
  garbage.resize(kHeader + 100, std::byte{0x55});
  EXPECT_EQ(ReadAll(garbage).error, ErrorCode::kCorrupt) << "no zstd stream";
  RawBytes longer = good;
  longer.push_back(std::byte{0});
  longer.insert(longer.end(), 100, std::byte{0x55});
  EXPECT_EQ(ReadAll(longer).error, ErrorCode::kCorrupt) << "something behind the stream";
}

TEST(TraceReaderTest, WhatIsNoFileIsRefusedAtOnce) {
  testing::TempDir dir;
  EXPECT_THAT(TraceReader::Open(dir / "missing"), FailsWith(ErrorCode::kSystem));
  EXPECT_THAT(TraceReader::Open(dir.path()), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(TraceReader::Open("/dev/zero"), FailsWith(ErrorCode::kInvalid));
  ASSERT_EQ(mkfifo((dir / "fifo").c_str(), 0600), 0);
  EXPECT_THAT(TraceReader::Open(dir / "fifo"), FailsWith(ErrorCode::kInvalid)) << "nobody waits";
  testing::WriteFile(dir / "short", RawOf("MVGPUTRC"));
  EXPECT_THAT(TraceReader::Open(dir / "short"), FailsWith(ErrorCode::kCorrupt));
  testing::WriteFile(dir / "empty", {});
  EXPECT_THAT(TraceReader::Open(dir / "empty"), FailsWith(ErrorCode::kCorrupt));
}

TEST(TraceReaderTest, UnknownTypesAreRefused) {
  EXPECT_EQ(ReadAll(EncodeTrace({{14, 0, {}}})).error, std::nullopt);
  for (const uint64_t type :
       {uint64_t{0}, uint64_t{16}, uint64_t{127}, uint64_t{256} + 5, UINT64_MAX}) {
    EXPECT_EQ(ReadAll(EncodeTrace({{type, 0, {}}})).error, ErrorCode::kCorrupt) << type;
  }
}

TEST(TraceReaderTest, LongestRecordIsReadAndALongerOneRefused) {
  EXPECT_EQ(ReadAll(EncodeTrace({{9, 0, RawBytes(4u << 20)}})).records.size(), 1u);
  EXPECT_EQ(ReadAll(EncodeTrace({{9, 0, RawBytes((4u << 20) + 1)}})).error, ErrorCode::kCorrupt);
  // The length alone, without the bytes.
  RawBytes head;
  for (const uint64_t number : {uint64_t{9}, uint64_t{0}, UINT64_MAX}) {
    testing::AppendVarint(head, number);
  }
  EXPECT_EQ(ReadAll(EncodeStream(head)).error, ErrorCode::kCorrupt);
}

TEST(TraceReaderTest, HeadThatIsNoNumberIsRefused) {
  EXPECT_EQ(ReadAll(EncodeStream(RawBytes(64, std::byte{0xff}))).error, ErrorCode::kCorrupt);
}

size_t ResidentBytes() {
  size_t total = 0;
  size_t resident = 0;
  FILE* file = std::fopen("/proc/self/statm", "r");
  EXPECT_EQ(std::fscanf(file, "%zu %zu", &total, &resident), 2);
  std::fclose(file);
  return resident * 4096;
}

// Compresses `record` `count` times as one stream with the given window.
RawBytes RepeatedTrace(const RawRecord& record, int count, int window_log) {
  RawBytes file = EncodeTrace({});
  file.resize(kHeader);
  ZSTD_CCtx* context = ZSTD_createCCtx();
  ZSTD_CCtx_setParameter(context, ZSTD_c_windowLog, window_log);
  const RawBytes bytes = testing::EncodeRecords({record});
  RawBytes chunk(1 << 16);
  for (int i = 0; i <= count; ++i) {
    ZSTD_inBuffer input{bytes.data(), i < count ? bytes.size() : 0, 0};
    size_t left = 1;
    while (left != 0) {
      ZSTD_outBuffer output{chunk.data(), chunk.size(), 0};
      left =
          ZSTD_compressStream2(context, &output, &input, i < count ? ZSTD_e_continue : ZSTD_e_end);
      file.insert(file.end(), chunk.begin(),
                  chunk.begin() + static_cast<std::ptrdiff_t>(output.pos));
      if (i < count && input.pos == input.size) break;
    }
  }
  ZSTD_freeCCtx(context);
  return file;
}

TEST(TraceReaderTest, FileThatUnpacksToAGigabyteNeedsLittleMemory) {
  const RawBytes bomb = RepeatedTrace({9, 0, RawBytes(4u << 20)}, 256, 20);
  ASSERT_LT(bomb.size(), 1u << 20);
  auto reader = TraceReader::FromBytes(bomb, "bomb");
  ASSERT_THAT(reader, IsOk());
  const size_t before = ResidentBytes();
  size_t records = 0;
  size_t most = before;
  while (true) {
    const auto record = (*reader)->next();
    ASSERT_THAT(record, IsOk());
    if (!*record) break;
    ++records;
    most = std::max(most, ResidentBytes());
  }
  EXPECT_EQ(records, 256u);
  EXPECT_LT(most - before, 300u << 20) << "of 1 GiB; with AddressSanitizer's quarantine";
}

TEST(TraceReaderTest, StreamThatAsksForALargeWindowIsRefused) {
  EXPECT_EQ(ReadAll(RepeatedTrace({8, 0, {}}, 3, 27)).records.size(), 3u);
  EXPECT_EQ(ReadAll(RepeatedTrace({8, 0, {}}, 3, 28)).error, ErrorCode::kCorrupt);
}

}  // namespace
}  // namespace mvgpu::backend
