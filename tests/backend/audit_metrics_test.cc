// mvgpu-audit show --metrics.

#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "tests/backend/audit_fixture.h"
#include "tests/backend/openmetrics_parser.h"

namespace mvgpu::domain {
namespace {

using ::mvgpu::testing::FailsWith;
using ::mvgpu::testing::IsOk;
using ::mvgpu::testing::OpenMetricsFamily;
using ::mvgpu::testing::OpenMetricsSample;
using ::mvgpu::testing::ParseOpenMetrics;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

class AuditMetricsTest : public AuditFixture {
 protected:
  using Families = std::map<std::string, OpenMetricsFamily>;

  static Families Parse(const Outcome& outcome) {
    auto parsed = ParseOpenMetrics(outcome.out);
    EXPECT_THAT(parsed, IsOk()) << outcome.out;
    Families families;
    if (!parsed) return families;
    for (OpenMetricsFamily& family : *parsed) families[family.name] = std::move(family);
    return families;
  }
  Families Metrics(const std::string& options = "") const {
    const Outcome outcome = Show("--metrics " + options);
    EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
    return Parse(outcome);
  }
  // The value with these labels; -1 when there is no such sample.
  static double Value(const Families& families, const std::string& name,
                      const std::map<std::string, std::string>& labels = {}) {
    const auto family = families.find(name);
    if (family == families.end()) return -1;
    for (const OpenMetricsSample& sample : family->second.samples) {
      if (sample.labels == labels) return sample.value;
    }
    return -1;
  }
};

TEST_F(AuditMetricsTest, FiguresAreTheLedgersInBytes) {
  auto ledger = Open();
  auto vgpu = Join(*ledger, "vgpu");
  auto nic = ledger->join(DomainKind::kAssignedDevice, "nic", "vfio");
  ASSERT_THAT(nic, IsOk());
  vgpu->set_mapped_pages(40000);
  vgpu->set_pinned_pages(123);
  vgpu->set_locked_pages(112);
  vgpu->set_locked_areas(37, 16382);
  vgpu->set_cache({1760, 8, 70, 2000, 240, 232, 1, 41, 30, 3, 6});
  ASSERT_THAT(vgpu->hold(kRam, 50000, {0, 100}), IsOk());
  ASSERT_THAT((*nic)->hold(kRam, 50000, {50, 1000}), IsOk());
  const Families families = Metrics();
  const std::map<std::string, std::string> of_vgpu = {
      {"vm", kVm}, {"row", "0"}, {"domain", "vgpu"}};
  EXPECT_EQ(Value(families, "mvgpu_domain_mapped_bytes", of_vgpu), 40000 * 4096.);
  EXPECT_EQ(Value(families, "mvgpu_domain_pinned_bytes", of_vgpu), 123 * 4096.);
  EXPECT_EQ(Value(families, "mvgpu_domain_unique_bytes", of_vgpu), 100 * 4096.);
  EXPECT_EQ(Value(families, "mvgpu_domain_charged_bytes", of_vgpu), 100 * 4096.);
  EXPECT_EQ(Value(families, "mvgpu_domain_locked_bytes", of_vgpu), 112 * 4096.);
  EXPECT_EQ(Value(families, "mvgpu_domain_locked_areas", of_vgpu), 37);
  EXPECT_EQ(Value(families, "mvgpu_domain_area_budget", of_vgpu), 16382);
  EXPECT_EQ(Value(families, "mvgpu_dma_cache_bytes", of_vgpu), 1760 * 4096.);
  EXPECT_EQ(Value(families, "mvgpu_dma_cache_idle_bytes", of_vgpu), 8 * 4096.);
  EXPECT_EQ(Value(families, "mvgpu_dma_cache_hit_pages", of_vgpu), 70);
  EXPECT_EQ(Value(families, "mvgpu_dma_cache_miss_pages", of_vgpu), 2000);
  EXPECT_EQ(Value(families, "mvgpu_dma_cache_unmapped_pages", of_vgpu), 240);
  EXPECT_EQ(Value(families, "mvgpu_dma_cache_revoked_pages", of_vgpu), 232);
  EXPECT_EQ(Value(families, "mvgpu_dma_cache_evicted_pages", of_vgpu), 1);
  EXPECT_EQ(Value(families, "mvgpu_dma_cache_map_calls", of_vgpu), 41);
  EXPECT_EQ(Value(families, "mvgpu_dma_cache_mapper_calls", of_vgpu), 30);
  EXPECT_EQ(Value(families, "mvgpu_dma_cache_revocations", of_vgpu), 3);
  EXPECT_EQ(Value(families, "mvgpu_dma_cache_moved_pages", of_vgpu), 6);
  EXPECT_EQ(
      Value(families, "mvgpu_domain_charged_bytes", {{"vm", kVm}, {"row", "1"}, {"domain", "nic"}}),
      950 * 4096.);
  EXPECT_EQ(Value(families, "mvgpu_vm_unique_bytes", {{"vm", kVm}}), 1050 * 4096.);
  EXPECT_EQ(Value(families, "mvgpu_vm_charged_bytes", {{"vm", kVm}}), 1050 * 4096.);
  EXPECT_EQ(Value(families, "mvgpu_ledger_problems", {{"vm", kVm}}), 0);
  EXPECT_EQ(Value(families, "mvgpu_ledgers"), 1);
  EXPECT_EQ(Value(families, "mvgpu_ledgers_unreadable"), 0);
  vgpu->release(kRam, {0, 100});
  (*nic)->release(kRam, {50, 1000});
}

TEST_F(AuditMetricsTest, ADomainSaysWhatItIsAndHowItIs) {
  auto ledger = Open();
  auto row = Join(*ledger, "vgpu");
  const Families families = Metrics();
  const std::string pid = std::to_string(getpid());
  EXPECT_EQ(Value(families, "mvgpu_domain_info",
                  {{"vm", kVm},
                   {"row", "0"},
                   {"domain", "vgpu"},
                   {"kind", "api-only"},
                   {"pin_backend", "mlock"},
                   {"pid", pid}}),
            1);
  const auto state = [&](const std::string& name) {
    return Value(families, "mvgpu_domain_state",
                 {{"vm", kVm}, {"row", "0"}, {"domain", "vgpu"}, {"state", name}});
  };
  EXPECT_EQ(state("alive"), 1);
  EXPECT_EQ(state("dead"), 0);
  EXPECT_EQ(state("unknown"), 0);
  EXPECT_GE(Value(families, "mvgpu_process_locked_bytes", {{"vm", kVm}, {"pid", pid}}), 0);
}

TEST_F(AuditMetricsTest, EveryFamilyHasHelpAndTypeAndItsUnit) {
  const Families families = Metrics();
  EXPECT_EQ(families.size(), 29u);
  for (const auto& [name, family] : families) {
    EXPECT_TRUE(name.starts_with("mvgpu_")) << name;
    EXPECT_THAT(family.help, Not(IsEmpty())) << name;
    EXPECT_THAT(family.type, Not(IsEmpty())) << name;
    EXPECT_EQ(family.unit, name.ends_with("_bytes")   ? "bytes"
                           : name.ends_with("_pages") ? "pages"
                                                      : "")
        << name;
  }
  EXPECT_EQ(families.at("mvgpu_ledger_repairs").type, "counter");
}

TEST_F(AuditMetricsTest, AProcessWithTwoDomainsIsCountedOnce) {
  auto ledger = Open();
  auto one = Join(*ledger, "one");
  auto two = Join(*ledger, "two");
  EXPECT_EQ(Metrics().at("mvgpu_process_locked_bytes").samples.size(), 1u);
}

TEST_F(AuditMetricsTest, NamesOfDomainsCannotBreakTheFormat) {
  auto ledger = Open();
  const std::string name = "a\"} 1\\n\\";
  auto row = Join(*ledger, name);
  ASSERT_THAT(row, ::testing::NotNull());
  const Families families = Metrics();
  EXPECT_EQ(
      Value(families, "mvgpu_domain_mapped_bytes", {{"vm", kVm}, {"row", "0"}, {"domain", name}}),
      0);
}

TEST_F(AuditMetricsTest, AbsurdFiguresOfALedgerDoNotWrapAround) {
  auto ledger = Open();
  auto row = Join(*ledger, "vgpu");
  row->set_mapped_pages(UINT64_MAX);
  EXPECT_GT(Value(Metrics(), "mvgpu_domain_mapped_bytes",
                  {{"vm", kVm}, {"row", "0"}, {"domain", "vgpu"}}),
            7e22);
}

TEST_F(AuditMetricsTest, AnUnreadableLedgerIsCountedAndTheOthersAreShown) {
  auto ledger = Open();
  auto row = Join(*ledger);
  std::ofstream(dir_ + "/" + kOtherVm + ".ledger") << "noise";
  const Outcome outcome = Show("--metrics");
  EXPECT_EQ(outcome.exit_code, 4);
  const Families families = Parse(outcome);
  EXPECT_EQ(Value(families, "mvgpu_ledgers"), 1);
  EXPECT_EQ(Value(families, "mvgpu_ledgers_unreadable"), 1);
}

TEST_F(AuditMetricsTest, MetricsAndJsonExcludeEachOther) {
  ExpectRefused("show --metrics --json", "excludes");
}

// What the checks above are worth.
TEST(OpenMetricsParserTest, TakesWhatIsValid) {
  const auto parsed = ParseOpenMetrics(
      "# TYPE a_bytes gauge\n# UNIT a_bytes bytes\n# HELP a_bytes Text \\\\ here.\n"
      "a_bytes{x=\"1\",y=\"a\\\"b\\\\c\\nd,}\"} 12\na_bytes 1.5e+3\n"
      "# TYPE b counter\nb_total 3\n# EOF\n");
  ASSERT_THAT(parsed, IsOk());
  ASSERT_EQ(parsed->size(), 2u);
  EXPECT_EQ((*parsed)[0].samples[0].labels.at("y"), "a\"b\\c\nd,}");
  EXPECT_EQ((*parsed)[0].samples[1].value, 1500);
}

TEST(OpenMetricsParserTest, RefusesWhatIsNot) {
  const std::string head = "# TYPE a gauge\n";
  for (const std::string& text :
       std::vector<std::string>{"",
                                "# EOF",
                                "a 1\n# EOF\n",
                                head + "a 1\n",
                                head + "a 1\n# EOF\n\n",
                                head + "\n# EOF\n",
                                head + "a  1\n# EOF\n",
                                head + "a one\n# EOF\n",
                                head + "a\n# EOF\n",
                                head + "b 1\n# EOF\n",
                                head + "a 1\na 2\n# EOF\n",
                                head + "a{x=1} 1\n# EOF\n",
                                head + "a{x=\"1} 1\n# EOF\n",
                                head + "a{x=\"\\q\"} 1\n# EOF\n",
                                head + "a{x=\"1\",x=\"2\"} 1\n# EOF\n",
                                head + "a{x=\"1\"y=\"2\"} 1\n# EOF\n",
                                head + "a{x=\"1\",} 1\n# EOF\n",
                                head + "a{1x=\"1\"} 1\n# EOF\n",
                                head + "a{x=\"1\"}1\n# EOF\n",
                                head + "# UNIT a bytes\n# EOF\n",
                                head + head + "# EOF\n",
                                head + "a 1\n# HELP a late\n# EOF\n",
                                head + "a 1\n# TYPE b gauge\nb 1\n# TYPE a gauge\n# EOF\n",
                                std::string("# TYPE a counter\na 1\n# EOF\n"),
                                std::string("# TYPE a counter\na_total -1\n# EOF\n"),
                                std::string("# TYPE a teapot\n# EOF\n"),
                                std::string("#TYPE a gauge\n# EOF\n")}) {
    EXPECT_THAT(ParseOpenMetrics(text), FailsWith(ErrorCode::kInvalid)) << text;
  }
}

}  // namespace
}  // namespace mvgpu::domain
