#include "backend/replay/compare_command.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/sysinfo.h>

#include <fstream>
#include <sstream>
#include <string>

#include <nlohmann/json.hpp>

#include "tests/backend/policies/trace_maker.h"
#include "tests/backend/temp_dir.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::backend {
namespace {

using nlohmann::json;
using testing::FailsWith;
using ::testing::HasSubstr;
using testing::IsOk;
using ::testing::StartsWith;
using testing::TraceMaker;

Result<std::unique_ptr<TraceReader>> Builtin() { return TraceReader::Open(MVGPU_TRACE); }

// Figures as large as they come.
std::vector<Compared> LargeRows() {
  PolicyFigures figures;
  figures.pins = {99'999'999, 99'999'999, 99'999'999, 999'999'999, 0, 268'435'456, 0};
  figures.notifications = 999'999'999;
  figures.mean_access_ns = 99'999'990;
  figures.p99_access_ns = 99'999'990;
  return {{"mvgpu-ahead", figures}, {"coiommu", Fail(ErrorCode::kLimit, "no room")}};
}

DmaTrace SmallTrace() {
  TraceMaker maker(64 << 20);
  const uint32_t buffer = maker.buffer({{0x100, 256}});
  maker.use(0, buffer);
  maker.unmap(10 * TraceMaker::kSecond, buffer);
  return maker.make();
}

TEST(CompareTest, TheTableFitsAndSaysWhatFailed) {
  const std::string table = CompareTable(SmallTrace(), LargeRows(), PinMode::kMlock);
  std::istringstream lines(table);
  for (std::string line; std::getline(lines, line);) EXPECT_LE(line.size(), 100u) << line;
  EXPECT_THAT(table, HasSubstr("64 MiB of guest memory, 10.0 s, 1 maps, 1 accesses of the device, "
                               "pinned by mlock"));
  EXPECT_THAT(table, HasSubstr("\n  coiommu     no room\n"));
}

TEST(CompareTest, ARowHasItsFiguresInTheirColumns) {
  const DmaTrace trace = SmallTrace();
  const auto rows = Compare({.policies = "map-unmap"}, trace);
  ASSERT_THAT(rows, IsOk());
  ASSERT_EQ(rows->size(), 1u);
  const std::string table = CompareTable(trace, *rows, PinMode::kNone);
  // 256 pages of 16384 for all of the time: 1 MiB, 1.56 %; told of the map and of the unmap.
  std::istringstream row(table.substr(table.find("map-unmap")));
  std::string name, peak, share, mean, notifications, pins, unpins, repinned;
  row >> name >> peak >> share >> mean >> notifications >> pins >> unpins >> repinned;
  EXPECT_EQ(peak, "1.0");
  EXPECT_EQ(share, "1.56%");
  EXPECT_EQ(mean, "1.0");
  EXPECT_EQ(notifications, "2");
  EXPECT_EQ(pins, "1");
  EXPECT_EQ(unpins, "1");
  EXPECT_EQ(repinned, "0");
}

TEST(CompareTest, JsonSaysTheSame) {
  const DmaTrace trace = SmallTrace();
  const auto rows = Compare({.policies = "map-unmap,static"}, trace);
  ASSERT_THAT(rows, IsOk());
  const json report = json::parse(CompareJson(trace, *rows, PinMode::kNone), nullptr, false);
  ASSERT_TRUE(report.is_object());
  EXPECT_EQ(report["memory_pages"], 16384);
  EXPECT_EQ(report["maps"], 1);
  const json& first = report["policies"][0];
  EXPECT_EQ(first["policy"], "map-unmap");
  EXPECT_EQ(first["ok"], true);
  EXPECT_EQ(first["peak_pinned_pages"], 256);
  EXPECT_EQ(first["peak_share"], 256.0 / 16384);
  EXPECT_EQ(first["mean_pinned_pages"], 256);
  EXPECT_EQ(first["notifications"], 2);
  EXPECT_EQ(report["policies"][1]["peak_pinned_pages"], 16384);
  const json failed = json::parse(CompareJson(trace, LargeRows(), PinMode::kNone), nullptr, false);
  EXPECT_EQ(failed["policies"][1]["ok"], false);
  EXPECT_EQ(failed["policies"][1]["error"]["message"], "no room");
}

TEST(CompareTest, PoliciesRunInTheOrderInWhichTheyAreGiven) {
  const auto rows = Compare({.policies = "iopf,coiommu"}, SmallTrace());
  ASSERT_THAT(rows, IsOk());
  EXPECT_EQ(rows->at(0).policy, "iopf");
  EXPECT_EQ(rows->at(1).policy, "coiommu");
  EXPECT_THAT(Compare({.policies = "best"}, SmallTrace()), FailsWith(ErrorCode::kInvalid));
}

// The page counts of a back end that really locks are those of one that only counts.
TEST(CompareTest, LocksMakeNoDifferenceButInTime) {
  const DmaTrace trace = SmallTrace();
  const auto counted = Compare({.policies = "coiommu,mvgpu-idle"}, trace);
  const auto locked = Compare({.policies = "coiommu,mvgpu-idle", .pin = PinMode::kMlock}, trace);
  ASSERT_THAT(counted, IsOk());
  ASSERT_THAT(locked, IsOk());
  for (size_t i = 0; i < 2; ++i) {
    ASSERT_THAT(counted->at(i).figures, IsOk());
    ASSERT_THAT(locked->at(i).figures, IsOk());
    EXPECT_EQ(locked->at(i).figures->pins.peak_pages, counted->at(i).figures->pins.peak_pages);
    EXPECT_EQ(locked->at(i).figures->pins.pin_calls, counted->at(i).figures->pins.pin_calls);
  }
}

TEST(CompareTest, StaticPinningAsksTheHostFirst) {
  struct sysinfo host {};
  ASSERT_EQ(sysinfo(&host), 0);
  if (uint64_t{host.freeram} * host.mem_unit >> 30 >= 250) GTEST_SKIP() << "too large a host";
  TraceMaker maker(uint64_t{250} << 30);
  const auto rows = Compare({.policies = "static", .pin = PinMode::kMlock}, maker.make());
  ASSERT_THAT(rows, IsOk());
  ASSERT_THAT(rows->at(0).figures, FailsWith(ErrorCode::kLimit));
  EXPECT_THAT(rows->at(0).figures.error().message(), StartsWith("pins 256000 MiB, this host has "));
}

TEST(LoadDmaTest, TellsSessionsFromText) {
  testing::TempDir dir;
  const auto session = LoadDma({.trace = MVGPU_TRACE}, Builtin);
  ASSERT_THAT(session, IsOk());
  EXPECT_FALSE(session->events.empty());
  const auto builtin = LoadDma({}, Builtin);
  ASSERT_THAT(builtin, IsOk());
  EXPECT_EQ(builtin->events.size(), session->events.size());
  EXPECT_THAT(LoadDma({.memory = 1 << 30}, Builtin), FailsWith(ErrorCode::kInvalid));

  const std::string text = dir / "dma.txt";
  std::ofstream(text) << "x-1 [000] d 1.000000: dma_map_phys: d dir=TO_DEVICE dma_addr=0 size=1 "
                         "phys_addr=1000 attrs=\n";
  const auto imported = LoadDma({.trace = text, .memory = 1 << 20}, Builtin);
  ASSERT_THAT(imported, IsOk());
  EXPECT_EQ(imported->memory_pages(), 256u);

  std::ofstream(dir / "short") << "MV";
  EXPECT_THAT(LoadDma({.trace = dir / "short"}, Builtin), FailsWith(ErrorCode::kCorrupt));
  EXPECT_THAT(LoadDma({.trace = dir / "missing"}, Builtin), FailsWith(ErrorCode::kSystem));
  EXPECT_THAT(LoadDma({.trace = dir.path()}, Builtin), FailsWith(ErrorCode::kCorrupt));
  std::ofstream(dir / "broken") << "MVGPUTRC and no more";
  EXPECT_THAT(LoadDma({.trace = dir / "broken"}, Builtin), FailsWith(ErrorCode::kCorrupt));
}

TEST(LoadDmaTest, WaitsForNothingThatNeverEnds) {
  testing::TempDir dir;
  const std::string fifo = dir / "fifo";
  ASSERT_EQ(mkfifo(fifo.c_str(), 0600), 0);
  for (const std::string& path : {fifo, std::string("/dev/urandom"), std::string("/")}) {
    const auto loaded = LoadDma({.trace = path}, Builtin);
    ASSERT_THAT(loaded, FailsWith(ErrorCode::kCorrupt)) << path;
    EXPECT_THAT(loaded.error().message(),
                StartsWith(path + " is not a regular file: write the trace into one"));
  }
}

TEST(LoadDmaTest, MakesWorkloads) {
  const auto published = LoadDma({.workload = "published", .memory = uint64_t{4} << 30}, Builtin);
  ASSERT_THAT(published, IsOk());
  EXPECT_EQ(published->memory_pages(), PagesIn(uint64_t{4} << 30));
  EXPECT_EQ(published->name, "published");
  EXPECT_THAT(LoadDma({.workload = "published", .memory = 4096}, Builtin),
              FailsWith(ErrorCode::kInvalid));
}

}  // namespace
}  // namespace mvgpu::backend
