// mvgpu-replay as people and scripts use it. MVGPU_REPLAY is its path, MVGPU_TRACE that of the
// trace that is built in.

#include <sys/stat.h>
#include <sys/sysinfo.h>

#include <filesystem>
#include <fstream>
#include <sstream>

#include <nlohmann/json.hpp>

#include "tests/backend/child_process.h"
#include "tests/backend/vgpu_fixture.h"

namespace mvgpu::testing {
namespace {

using nlohmann::json;
using ::testing::EndsWith;
using ::testing::HasSubstr;

struct Ran {
  std::optional<int> exit_code;
  std::string out;
  std::string err;
  json report() const { return json::parse(out, nullptr, false); }
};

Ran RunReplay(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), MVGPU_REPLAY);
  ChildProcess process(std::move(arguments));
  const auto code = process.wait();
  return {code, process.out(), process.err()};
}

// Runs it to a failure; returns the one line that it says.
std::string ExpectFails(std::vector<std::string> arguments, int exit_code) {
  const Ran ran = RunReplay(std::move(arguments));
  EXPECT_EQ(ran.exit_code, exit_code) << ran.err;
  EXPECT_EQ(LinesIn(ran.err), 1u) << ran.err;
  EXPECT_THAT(ran.err, ::testing::StartsWith("mvgpu-replay: "));
  EXPECT_EQ(ran.out, "");
  return ran.err;
}

Ran RunAudit(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), MVGPU_AUDIT);
  ChildProcess process(std::move(arguments));
  const auto code = process.wait();
  return {code, process.out(), process.err()};
}

// Accounts of the past: both programs tell them from the file, in the same words.
class AccountsOfATrace : public backend::RecordedVgpuTest {};

TEST_F(AccountsOfATrace, AreTheSameInReplayAndAudit) {
  ASSERT_NO_FATAL_FAILURE(RunSession());
  ASSERT_NO_FATAL_FAILURE(EndSession());
  const Ran replay = RunReplay({"run", trace_path(), "--json"});
  const Ran audit = RunAudit({"show", "--trace=" + trace_path(), "--json"});
  EXPECT_EQ(replay.exit_code, 0) << replay.err;
  EXPECT_EQ(audit.exit_code, 0) << audit.err;
  ASSERT_TRUE(audit.report().is_object()) << audit.out;
  EXPECT_EQ(replay.report()["accounts"], audit.report());
  const json peak = audit.report()["peak"];
  EXPECT_GT(peak["unique_pages"], 0);
  EXPECT_EQ(audit.report()["last"]["mapped_pages"], 0);
  const Ran text = RunAudit({"show", "--trace=" + trace_path()});
  EXPECT_EQ(text.exit_code, 0);
  EXPECT_THAT(text.out, HasSubstr("  vgpu0, pinned by none; the accounts changed "));
  std::istringstream lines(text.out);
  bool has_peak = false;
  for (std::string line; std::getline(lines, line);) {
    if (!line.starts_with("  /")) {  // a path
      EXPECT_LE(line.size(), 100u);
    }
    std::istringstream words(line);
    std::string moment, seconds, mapped, pinned, percent, unique;
    words >> moment >> seconds >> mapped >> pinned >> percent >> unique;
    if (moment != "peak") continue;
    has_peak = true;
    EXPECT_EQ(mapped, peak["mapped_pages"].dump());
    EXPECT_EQ(pinned, peak["pinned_pages"].dump());
    EXPECT_EQ(unique, peak["unique_pages"].dump());
  }
  EXPECT_TRUE(has_peak) << text.out;
}

TEST(AccountsOfOldTraces, AreSaidToBeMissing) {
  const Ran audit = RunAudit({"show", std::string("--trace=") + MVGPU_TRACE});
  EXPECT_EQ(audit.exit_code, 0) << audit.err;
  EXPECT_THAT(audit.out, HasSubstr("no accounts were recorded\n"));
  const json report = RunAudit({"show", "--json", std::string("--trace=") + MVGPU_TRACE}).report();
  EXPECT_EQ(report["changes"], 0);
  EXPECT_TRUE(report["peak"].is_null() && report["last"].is_null());
  EXPECT_EQ(RunReplay({"run", "--json"}).report()["accounts"], report);
}

TEST(AccountsOfATraceThatIsNone, AreRefusedInOneLine) {
  TempDir dir;
  WriteFile(dir / "noise", RawOf("noise"));
  for (const std::string& path : {dir / "noise", dir / "none", dir.path()}) {
    const Ran audit = RunAudit({"show", "--trace=" + path});
    EXPECT_EQ(audit.exit_code, 4) << path;
    EXPECT_EQ(LinesIn(audit.err), 1u) << audit.err;
    EXPECT_EQ(audit.out, "");
  }
  for (const char* other : {"--metrics", "--vm=x", "--runtime-dir=/"}) {
    EXPECT_EQ(RunAudit({"show", "--trace=x", other}).exit_code, 2) << other;
  }
}

TEST(ReplayOfTheBuiltInTrace, RunsAsRecordedAndWritesPictureAndAccount) {
  TempDir dir;
  const Ran ran =
      RunReplay({"run", "--json", "--screenshot=" + (dir / "p.png"), "--pages=" + (dir / "p.csv")});
  EXPECT_EQ(ran.exit_code, 0) << ran.err;
  EXPECT_EQ(ran.err, "") << "no progress bar where there is no terminal";
  const json report = ran.report();
  ASSERT_TRUE(report.is_object()) << ran.out;
  EXPECT_EQ(report["ok"], true);
  EXPECT_EQ(report["complete"], true);
  EXPECT_EQ(report["differences"], 0);
  EXPECT_EQ(report["described"], json::array());
  EXPECT_EQ(report["all_released"], true);
  EXPECT_GT(report["counters"]["frames"], 0);
  EXPECT_GE(report["frame_hashes"].size(), report["counters"]["frames"].get<size_t>());
  EXPECT_EQ(report["frame_hashes"].back(), report["counters"]["final_picture"]);

  const RawBytes png = ReadFile(dir / "p.png");
  ASSERT_GT(png.size(), 1000u);
  EXPECT_TRUE(std::ranges::equal(std::span(png).first(8), RawOf("\x89PNG\r\n\x1a\n")));

  // Every byte of guest memory in the trace was read from some page.
  const auto records = DecodeTrace(ReadFile(MVGPU_TRACE));
  ASSERT_TRUE(records.has_value());
  uint64_t recorded = 0;
  for (const RawRecord& record : *records) {
    if (record.type == kRawMemory) recorded += record.bytes_after(1).size();
  }
  const RawBytes csv = ReadFile(dir / "p.csv");
  std::istringstream lines({reinterpret_cast<const char*>(csv.data()), csv.size()});
  std::string line;
  std::getline(lines, line);
  EXPECT_EQ(line, "iova,file,file_page,reads,bytes_read,dma_maps,held_us,first_us,last_us");
  uint64_t read = 0;
  size_t rows = 0;
  while (std::getline(lines, line)) {
    std::vector<std::string> fields;
    std::istringstream columns(line);
    for (std::string field; std::getline(columns, field, ',');) fields.push_back(field);
    ASSERT_EQ(fields.size(), 9u) << line;
    read += std::stoull(fields[4]);
    ++rows;
  }
  EXPECT_EQ(read, recorded);
  EXPECT_EQ(rows, report["pages_touched"].get<size_t>());
}

TEST(ReplayOfTheBuiltInTrace, RunsAsRecordedWithEveryMapper) {
  EXPECT_EQ(RunReplay({"run", "--dma=iommu"}).exit_code, 0);
  const Ran physical = RunReplay({"run", "--dma=physical", "--pin=mlock"});
  if (physical.err.find("CAP_SYS_ADMIN") == std::string::npos) {
    EXPECT_EQ(physical.exit_code, 0) << physical.err;
  }
  EXPECT_THAT(ExpectFails({"run", "--dma=physical"}, 3), HasSubstr("--pin=mlock"));
}

TEST(ReplayOfTheBuiltInTrace, TableIsForPeople) {
  const Ran ran = RunReplay({"run"});
  EXPECT_EQ(ran.exit_code, 0);
  for (const char* words : {"(built-in)", "frames", "guest pages touched", "dma cache",
                            "yes: every answer, frame and count"}) {
    EXPECT_THAT(ran.out, HasSubstr(words));
  }
  EXPECT_THAT(ran.out, ::testing::ContainsRegex("left behind +nothing"));
}

TEST(ReplayOfTheBuiltInTrace, InfoSaysWhatIsInIt) {
  const Ran ran = RunReplay({"info", "--json"});
  EXPECT_EQ(ran.exit_code, 0);
  const json report = ran.report();
  ASSERT_TRUE(report.is_object()) << ran.out;
  EXPECT_EQ(report["complete"], true);
  EXPECT_EQ(report["file_bytes"], std::filesystem::file_size(MVGPU_TRACE));
  EXPECT_EQ(report["session"]["program"], "mvgpu-backend");
  EXPECT_GT(report["summary"]["frames"], 0);
  const auto records = DecodeTrace(ReadFile(MVGPU_TRACE));
  ASSERT_TRUE(records.has_value());
  uint64_t count = 0;
  uint64_t bytes = 0;
  for (const RawRecord& record : *records) {
    if (record.type != kRawMemory) continue;
    ++count;
    bytes += record.payload.size();
  }
  EXPECT_EQ(report["records"]["guest_memory"]["records"], count);
  EXPECT_EQ(report["records"]["guest_memory"]["bytes"], bytes);
  EXPECT_EQ(report["records"]["summary"]["records"], 1);
  const Ran table = RunReplay({"info"});
  EXPECT_EQ(table.exit_code, 0);
  EXPECT_THAT(table.out, HasSubstr("guest_memory"));
  // The same file by its name.
  EXPECT_EQ(RunReplay({"info", "--json", MVGPU_TRACE}).report()["records"], report["records"]);
}

// Traces of a small session of this test's own.
class ReplayCommandLineTest : public backend::RecordedVgpuTest {
 protected:
  void SetUp() override {
    RecordedVgpuTest::SetUp();
    RunSession();
    EndSession();
  }
  std::string Write(const std::string& name, const RawBytes& bytes) {
    WriteFile(dir_ / name, bytes);
    return dir_ / name;
  }
};

// A session in which the cache does everything that it counts, each a different number of times.
// Three pages may be idle.
class CountersOfASession : public backend::RecordedVgpuTest {
 protected:
  static constexpr char kVm[] = "00112233-4455-6677-8899-aabbccddeeff";
  static constexpr uint64_t kOthers = GpuGuest::kPictures + 16 * kPageSize;

  CountersOfASession() {
    config_.vm_uuid = kVm;
    config_.runtime_dir = dir_ / "run";
    config_.dma_idle_bytes = 3 * kPageSize + 1000;
  }
  void Transfer(int times) {
    for (int i = 0; i < times; ++i) EXPECT_EQ(guest_->transfer(1), kOk);
  }
  void UseOthers(uint64_t pages) {
    EXPECT_EQ(guest_->attach(2, {{kOthers, static_cast<uint32_t>(BytesIn(pages))}}), kOk);
    EXPECT_EQ(guest_->detach(2), kOk);
  }
  void TakePicturesAway() {
    ASSERT_THAT(guest_->unmap_pictures(), IsOk());
    ASSERT_THAT(guest_->map_pictures(), IsOk());
  }
  void RunCountedSession() {
    StartGuest();
    for (const uint32_t id : {1, 2, 3}) EXPECT_EQ(guest_->create(id), kOk);
    EXPECT_EQ(guest_->attach_picture(1), kOk);  // 3 misses
    Transfer(2);                                // 6 hits
    UseOthers(5);                               // 5 misses; 2 evicted, 3 idle
    UseOthers(5);                               // 3 hits, 2 misses; 2 evicted, 3 idle
    TakePicturesAway();                         // 6 revoked
    Transfer(2);                                // 3 misses, 3 hits: held, then used; 3 hits
    TakePicturesAway();                         // 3 revoked
    Transfer(1);                                // 3 misses, 3 hits
    UseOthers(1);                               // 1 miss; 1 idle
    Transfer(4);                                // 12 hits
    EXPECT_EQ(guest_->attach(3, {{kOthers + 8 * kPageSize, 4096}}), kOk);  // 1 miss
  }
  // The line of the report for people that begins so.
  static std::string LineOf(const Ran& ran, const std::string& begin) {
    std::istringstream lines(ran.out);
    for (std::string line; std::getline(lines, line);) {
      if (line.starts_with("  " + begin)) return line;
    }
    return "";
  }
};

TEST_F(CountersOfASession, AreAllInTheAuditOfTheRunningVgpu) {
  ASSERT_NO_FATAL_FAILURE(RunCountedSession());
  const Ran audit = RunAudit({"show", "--json", "--runtime-dir=" + config_.runtime_dir});
  EXPECT_EQ(audit.exit_code, 0) << audit.err;
  EXPECT_EQ(audit.report()["vms"][0]["domains"][0]["dma_cache"], (json{{"cached_pages", 5},
                                                                       {"cached_bytes", 5 * 4096},
                                                                       {"idle_pages", 1},
                                                                       {"idle_bytes", 4096},
                                                                       {"hit_pages", 30},
                                                                       {"miss_pages", 18},
                                                                       {"map_calls", 16},
                                                                       {"mapper_calls", 7},
                                                                       {"unmapped_pages", 13},
                                                                       {"revocations", 2},
                                                                       {"revoked_pages", 9},
                                                                       {"moved_pages", 0},
                                                                       {"evicted_pages", 4}}));
  EXPECT_EQ(audit.report()["vms"][0]["domains"][0]["charged_pages"], 5) << "idle ones, too";
  const json session = json::parse(vgpu_->session_json());
  EXPECT_EQ(session["dma_miss_pages"], 18);
  EXPECT_EQ(session["dma_unmapped_pages"], 13);
  EndVm();
  const Ran after = RunAudit({"show", "--json", "--runtime-dir=" + config_.runtime_dir});
  const json domain = after.report()["vms"][0]["domains"][0];
  EXPECT_EQ(domain["pinned_pages"], 0);
  EXPECT_EQ(domain["charged_pages"], 0);
  EXPECT_EQ(domain["dma_cache"]["cached_pages"], 0);
  EXPECT_EQ(domain["dma_cache"]["idle_bytes"], 0);
}

TEST_F(CountersOfASession, AreAllInTheReplay) {
  ASSERT_NO_FATAL_FAILURE(RunCountedSession());
  ASSERT_NO_FATAL_FAILURE(EndSession());
  const Ran ran = RunReplay({"run", trace_path(), "--json"});
  EXPECT_EQ(ran.exit_code, 0) << ran.out;
  const json counters = ran.report()["counters"];
  EXPECT_EQ(counters, json::parse(summary_));
  // The driver's end leaves 4 pages idle, 2 go for others; the VMM's takes 3.
  for (const auto& [key, value] : std::map<std::string, uint64_t>{{"dma_hit_pages", 30},
                                                                  {"dma_miss_pages", 18},
                                                                  {"dma_map_calls", 16},
                                                                  {"dma_mapper_calls", 7},
                                                                  {"dma_unmapped_pages", 18},
                                                                  {"dma_revocations", 2},
                                                                  {"dma_revoked_pages", 12},
                                                                  {"dma_evicted_pages", 6},
                                                                  {"dma_peak_cached_pages", 8},
                                                                  {"dma_peak_cached_bytes", 32768},
                                                                  {"dma_peak_idle_pages", 3},
                                                                  {"dma_peak_idle_bytes", 12288}}) {
    EXPECT_EQ(counters[key], value) << key;
  }
  EXPECT_EQ(ran.report()["dma_idle_bytes"], 3 * 4096 + 1000);
  EXPECT_EQ(ran.report()["pins_compared"], true);
  const Ran text = RunReplay({"run", trace_path()});
  EXPECT_THAT(LineOf(text, "dma cache (hits, misses, unmapped)"), EndsWith("  30, 18, 18"));
  EXPECT_THAT(LineOf(text, "dma maps, mapper calls"), EndsWith("  16, 7"));
  EXPECT_THAT(LineOf(text, "cached at most, idle at most"),
              EndsWith("  8 pages (32768 bytes), 3 (12288 bytes)"));
  EXPECT_THAT(LineOf(text, "revoked pages (users told), evicted"), EndsWith(" 12 (2), 6"));
  EXPECT_THAT(LineOf(text, "as recorded"), EndsWith("  yes: every answer, frame and count"));
}

TEST_F(CountersOfASession, FollowTheIdleListThatAReplayIsGiven) {
  ASSERT_NO_FATAL_FAILURE(RunCountedSession());
  ASSERT_NO_FATAL_FAILURE(EndSession());
  const Ran none = RunReplay({"run", trace_path(), "--json", "--dma-idle=0", "--pin=mlock"});
  EXPECT_EQ(none.exit_code, 0) << none.out;
  EXPECT_EQ(none.report()["pins_compared"], false);
  EXPECT_EQ(none.report()["counters"]["dma_peak_idle_pages"], 0);
  EXPECT_EQ(none.report()["counters"]["dma_hit_pages"], 30 - 3);
  EXPECT_EQ(none.report()["counters"]["dma_miss_pages"], 18 + 3);
  const Ran more = RunReplay({"run", trace_path(), "--json", "--dma-idle=20K", "--pin=mlock"});
  EXPECT_EQ(more.exit_code, 0) << more.out;
  EXPECT_EQ(more.report()["counters"]["dma_peak_idle_pages"], 5);
  EXPECT_EQ(more.report()["counters"]["dma_hit_pages"], 30 + 2);
  EXPECT_EQ(more.report()["all_released"], true);
  EXPECT_THAT(LineOf(RunReplay({"run", trace_path(), "--dma-idle=20K"}), "as recorded"),
              EndsWith("  yes: every answer and frame; pins not, as --dma-idle is another"));
  // The same in whole pages is the same list.
  const Ran same = RunReplay({"run", trace_path(), "--json", "--dma-idle=12K"});
  EXPECT_EQ(same.report()["pins_compared"], true);
  EXPECT_EQ(same.report()["counters"], json::parse(summary_));
  // What the guest saw is compared all the same.
  auto records = Records();
  json summary = json::parse(summary_);
  summary["control_commands"] = 1;
  records.back().payload = RawOf(summary.dump());
  WriteFile(dir_ / "other", EncodeTrace(records));
  EXPECT_EQ(RunReplay({"run", dir_ / "other", "--json", "--dma-idle=0"}).report()["differences"],
            1);
}

// Not under LeakSanitizer, which reports what Mesa's CPU device has of its own when it is unloaded.
#if defined(MVGPU_HAS_VULKAN) && !defined(__SANITIZE_ADDRESS__)
TEST_F(ReplayCommandLineTest, TraceRunsTheSameWithAVulkanDevice) {
  const Ran ran =
      RunReplay({"run", trace_path(), "--json", "--dma=vulkan", "--vulkan-device=llvmpipe"});
  EXPECT_EQ(ran.exit_code, 0) << ran.err;
  EXPECT_EQ(ran.report()["counters"], json::parse(summary_));
}
#endif

TEST_F(ReplayCommandLineTest, TraceByNameRunsAlsoWithRealPins) {
  for (const char* pin : {"none", "mlock", "io-uring"}) {
    const Ran ran = RunReplay({"run", trace_path(), "--json", std::string("--pin=") + pin});
    EXPECT_EQ(ran.exit_code, 0) << ran.err;
    EXPECT_EQ(ran.report()["counters"], json::parse(summary_));
  }
}

TEST_F(ReplayCommandLineTest, DifferencesAreExitCodeOneAndDescribed) {
  auto records = Records();
  for (RawRecord& record : records) {
    if (record.type == kRawFrame) record.payload.back() ^= std::byte{1};
  }
  const std::string path = Write("other.mvtrace", EncodeTrace(records));
  const Ran table = RunReplay({"run", path});
  EXPECT_EQ(table.exit_code, 1);
  EXPECT_THAT(table.out, HasSubstr("NO: 8 differences"));
  EXPECT_THAT(table.out, HasSubstr("frame instead of frame"));
  const Ran ran = RunReplay({"run", "--json", path});
  EXPECT_EQ(ran.exit_code, 1);
  EXPECT_EQ(ran.report()["ok"], false);
  EXPECT_EQ(ran.report()["differences"], 8);
}

TEST_F(ReplayCommandLineTest, TraceThatEndsEarlyRunsAndIsSaidToBeCutShort) {
  RawBytes bytes = ReadFile(trace_path());
  bytes.resize(bytes.size() - 2);  // of the checksum
  const std::string path = Write("cut.mvtrace", bytes);
  EXPECT_EQ(RunReplay({"run", path}).exit_code, 0);
  const auto records = Records();
  const std::string half =
      Write("half.mvtrace", EncodeTrace({records.begin(), records.begin() + 99}));
  const Ran ran = RunReplay({"run", half});
  EXPECT_EQ(ran.exit_code, 0);
  EXPECT_THAT(ran.out, HasSubstr("cut short"));
  EXPECT_EQ(RunReplay({"info", "--json", half}).report()["complete"], false);
  EXPECT_EQ(RunReplay({"info", "--json", path}).report()["complete"], false);
}

TEST_F(ReplayCommandLineTest, FilesThatAreNoTracesAreOneLineAndExitCodeThree) {
  const std::string text = Write("text", RawOf("this is no trace, but it is long enough"));
  auto records = Records();
  records.erase(records.begin());
  const std::string headless = Write("headless", EncodeTrace(records));
  RawBytes damaged = ReadFile(trace_path());
  for (size_t i = 20; i < damaged.size(); i += 7) damaged[i] ^= std::byte{0x5a};
  const std::string broken = Write("damaged", damaged);
  for (const char* verb : {"run", "info"}) {
    EXPECT_THAT(ExpectFails({verb, dir_ / "missing"}, 3), HasSubstr("missing"));
    EXPECT_THAT(ExpectFails({verb, dir_.path()}, 3), HasSubstr("not a file"));
    EXPECT_THAT(ExpectFails({verb, text}, 3), HasSubstr("not an mvgpu trace"));
    EXPECT_THAT(ExpectFails({verb, broken}, 3), HasSubstr("damaged"));
  }
  EXPECT_THAT(ExpectFails({"run", headless}, 3), HasSubstr("does not begin with a session"));
}

TEST_F(ReplayCommandLineTest, FilesThatCannotBeWrittenAreOneLineAndExitCodeThree) {
  EXPECT_THAT(ExpectFails({"run", trace_path(), "--screenshot=" + (dir_ / "no/p.png")}, 3),
              HasSubstr("no/p.png"));
  EXPECT_THAT(ExpectFails({"run", trace_path(), "--pages=" + (dir_ / "no/p.csv")}, 3),
              HasSubstr("no/p.csv"));
}

TEST_F(ReplayCommandLineTest, MistakesAreOneLineAndExitCodeTwo) {
  ExpectFails({}, 2);
  ExpectFails({"dance"}, 2);
  ExpectFails({"run", "--nonsense"}, 2);
  ExpectFails({"run", trace_path(), trace_path()}, 2);
  ExpectFails({"run", "--pin=glue"}, 2);
  EXPECT_THAT(ExpectFails({"run", "--dma-idle=4095"}, 2), HasSubstr("less than a page"));
  EXPECT_THAT(ExpectFails({"run", "--dma-idle=-4K"}, 2), HasSubstr("'-4K' is no size"));
  WriteFile(dir_ / "s.scenario", RawOf("mvgpu scenario 1\n"));
  EXPECT_THAT(ExpectFails({"run", dir_ / "s.scenario", "--dma-idle=0"}, 2),
              HasSubstr("takes only --json and --pin"));
  EXPECT_EQ(RunReplay({"--help"}).exit_code, 0);
  EXPECT_EQ(RunReplay({"--version"}).exit_code, 0);
}

// A name that is no UTF-8 must not end the program where the report is JSON.
TEST_F(ReplayCommandLineTest, AnyFileNameWillDo) {
  const std::string path = dir_ / "n\xff\xfe\x80";
  std::filesystem::copy_file(trace_path(), path);
  for (const char* verb : {"run", "info"}) {
    const Ran ran = RunReplay({verb, "--json", path});
    EXPECT_EQ(ran.exit_code, 0) << ran.err;
    EXPECT_TRUE(ran.report().is_object()) << ran.out;
  }
}

TEST_F(ReplayCommandLineTest, NestedJsonInATraceIsRefusedNotPrinted) {
  std::string deep =
      "{\"frames\":" + std::string(1'000'000, '[') + std::string(1'000'000, ']') + "}";
  auto records = Records();
  records.back().payload = RawOf(deep);
  const std::string path = Write("deep.mvtrace", EncodeTrace(records));
  EXPECT_THAT(ExpectFails({"run", path}, 3), HasSubstr("summary"));
  const Ran info = RunReplay({"info", "--json", path});
  EXPECT_EQ(info.exit_code, 0) << info.err;
  EXPECT_EQ(info.report()["summary"], nullptr);
}

// Policies side by side.
TEST(ReplayCompareTest, ShowsThePoliciesThatAreAskedFor) {
  const Ran text = RunReplay({"compare", "--policy=static,mvgpu"});
  EXPECT_EQ(text.exit_code, 0) << text.err;
  EXPECT_THAT(text.out, HasSubstr("\n  static           512.0  100.00%    512.0         0 "));
  EXPECT_THAT(text.out, HasSubstr("\n  mvgpu  "));
  EXPECT_THAT(text.out, ::testing::Not(HasSubstr("coiommu")));
  const Ran all = RunReplay({"compare", MVGPU_TRACE, "--json"});
  EXPECT_EQ(all.exit_code, 0) << all.err;
  const json report = all.report();
  ASSERT_TRUE(report.is_object()) << all.out;
  EXPECT_EQ(report["policies"].size(), 8u);
  for (const json& policy : report["policies"]) EXPECT_EQ(policy["ok"], true) << policy;
}

json CompareFile(const std::string& name) {
  const auto path = std::filesystem::path(MVGPU_TRACE).replace_filename(name);
  const Ran ran = RunReplay({"compare", path, "--json"});
  EXPECT_EQ(ran.exit_code, 0) << ran.err;
  const json report = ran.report();
  EXPECT_TRUE(report.is_object()) << ran.out;
  for (const json& policy : report["policies"]) EXPECT_EQ(policy["ok"], true) << policy;
  return report;
}

// tests/traces/README.md: what was written into these, line by line.
TEST(ReplayCompareTest, TakesWhatTheKernelPrintsOfIommus) {
  const json maps = CompareFile("iommu-map.txt");
  EXPECT_EQ(maps["memory_pages"], (uint64_t{3} << 30) / 4096);
  EXPECT_EQ(maps["maps"], 5);  // one of them the rest of another
  EXPECT_EQ(maps["accesses"], 4);
  EXPECT_EQ(maps["repeated"], 2);
  EXPECT_EQ(maps["skipped"], 4);
  EXPECT_EQ(maps["skipped_by_name"], (json{{"iommu:add_device_to_group", 1},
                                           {"iommu:attach_device_to_domain", 1},
                                           {"iommu:io_page_fault", 1},
                                           {"iommu:map", 1}}));
  EXPECT_EQ(maps["policies"][1]["policy"], "map-unmap");
  EXPECT_EQ(maps["policies"][1]["peak_pinned_pages"], 192);

  const json requests = CompareFile("page-requests.txt");
  EXPECT_EQ(requests["memory_pages"], 1024);  // of two processes
  EXPECT_EQ(requests["maps"], 4);
  EXPECT_EQ(requests["accesses"], 4);
  EXPECT_EQ(requests["skipped"], 0);
  EXPECT_EQ(requests["policies"][1]["peak_pinned_pages"], 4);
}

TEST(ReplayCompareTest, SaysWhatItLeftOutAndHowToRecord) {
  const auto path = std::filesystem::path(MVGPU_TRACE).replace_filename("iommu-map.txt");
  const Ran text = RunReplay({"compare", path, "--policy=mvgpu"});
  EXPECT_EQ(text.exit_code, 0) << text.err;
  EXPECT_THAT(text.out, HasSubstr("\n  4 records of the trace name no memory that could be played\n"
                                  "           1 iommu:add_device_to_group\n"));
  EXPECT_THAT(text.out,
              HasSubstr("\n  2 records say again what others said, and are taken once\n"));
  EXPECT_THAT(RunReplay({"compare", "--help"}).out,
              HasSubstr("trace-cmd record -e dma -e iommu -e intel_iommu"));
  TempDir dir;
  std::ofstream(dir / "t") << "x-1 [000] d 1.0: map: IOMMU: iova=0x1000 paddr=0x1000 size=0\n";
  EXPECT_THAT(ExpectFails({"compare", dir / "t"}, 3),
              HasSubstr("/t: line 1: a map event with 0 bytes at iova 0x1000"));
}

TEST(ReplayCompareTest, APolicyThatCannotBePlayedIsARowAndAnExitCode) {
  struct sysinfo host {};
  ASSERT_EQ(sysinfo(&host), 0);
  if (uint64_t{host.freeram} * host.mem_unit >> 30 >= 250) GTEST_SKIP() << "too large a host";
  const Ran ran = RunReplay({"compare", "--workload=published", "--memory=250G", "--pin=mlock",
                             "--policy=static", "--json"});
  EXPECT_EQ(ran.exit_code, 1) << ran.err;
  ASSERT_TRUE(ran.report().is_object()) << ran.out;
  EXPECT_EQ(ran.report()["policies"][0]["ok"], false);
}

TEST(ReplayCompareTest, MistakesAreOneLineEach) {
  EXPECT_THAT(ExpectFails({"compare", "--policy=static,best"}, 2),
              HasSubstr("no policy is called 'best', choose of: static, map-unmap"));
  EXPECT_THAT(ExpectFails({"compare", "/nowhere"}, 3), HasSubstr("/nowhere"));
  EXPECT_THAT(ExpectFails({"compare", "/etc/passwd"}, 3), HasSubstr("no dma event"));
  EXPECT_THAT(ExpectFails({"compare", "/dev/zero"}, 3), HasSubstr("not a regular file"));
  ExpectFails({"compare", MVGPU_TRACE, "--memory=8G"}, 2);
  ExpectFails({"compare", MVGPU_TRACE, "--workload=published"}, 2);
  ExpectFails({"compare", "--workload=mine"}, 2);
  ExpectFails({"compare", "--workload=published", "--memory=-1"}, 2);
}

}  // namespace
}  // namespace mvgpu::testing
