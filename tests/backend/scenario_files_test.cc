// The scenarios in tests/traces: each runs as it expects, and none of its expectations is one that
// cannot fail.

#include "tests/backend/scenario_fixture.h"

namespace mvgpu::testing {
namespace {

using backend::PinMode;
using backend::scenario::IsExpected;
using backend::scenario::JoinWords;
using backend::scenario::Outcome;
using backend::scenario::ParseNumber;
using backend::scenario::RunSteps;
using backend::scenario::Step;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(ScenarioFiles, ThereIsOneForEachThread) {
  EXPECT_THAT(ScenarioNames(),
              ElementsAre("api-only", "coiommu", "iopf", "rpcit", "vgpu-svm", "viommu-svm"));
}

class ScenarioFileTest : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    auto steps = Parse(ReadText(path_));
    ASSERT_TRUE(steps) << steps.error().message();
    steps_ = std::move(*steps);
  }
  size_t Expectations() const {
    return static_cast<size_t>(std::count_if(
        steps_.begin(), steps_.end(), [](const Step& step) { return step.expected.has_value(); }));
  }

  const std::string path_ = ScenarioPath(GetParam());
  std::vector<Step> steps_;
};

TEST_P(ScenarioFileTest, ProgramRunsItAsItExpects) {
  const RanReplay text = RunReplay({"run", path_});
  EXPECT_EQ(text.exit_code, 0) << text.out << text.err;
  EXPECT_EQ(text.err, "");
  EXPECT_THAT(text.out, HasSubstr("yes, all of it"));
  EXPECT_THAT(text.out, ::testing::ContainsRegex("left behind +nothing"));
  EXPECT_EQ(LinesIn(text.out), steps_.size() + 4)
      << "a line for each step, one before, three after";

  const RanReplay ran = RunReplay({"run", path_, "--json"});
  EXPECT_EQ(ran.exit_code, 0);
  const auto report = ran.report();
  ASSERT_TRUE(report.is_object()) << ran.out;
  EXPECT_EQ(report["ok"], true);
  EXPECT_EQ(report["all_released"], true);
  EXPECT_EQ(report["failure"], nullptr);
  EXPECT_EQ(report["expectations"], Expectations());
  ASSERT_EQ(report["steps"].size(), steps_.size());
  for (size_t i = 0; i < steps_.size(); ++i) {
    EXPECT_EQ(report["steps"][i]["line"], steps_[i].line);
    EXPECT_EQ(report["steps"][i]["step"], steps_[i].text);
    EXPECT_EQ(report["steps"][i]["ok"], true);
    EXPECT_NE(report["steps"][i]["answer"], "");
  }
  EXPECT_EQ(RunReplay({"run", path_, "--json"}).out, ran.out) << "the same in every run";
}

TEST_P(ScenarioFileTest, ExpectsTheSameWithRealPins) {
  for (const PinMode pin : {PinMode::kMlock, PinMode::kIoUring}) {
    const Outcome outcome = RunSteps(steps_, pin);
    EXPECT_TRUE(outcome.is_good()) << (outcome.failure ? outcome.failure->got : "something left");
  }
}

// Each expectation, made something else: the run ends there. Each word of it would do.
TEST_P(ScenarioFileTest, EveryExpectationCanFail) {
  EXPECT_GT(Expectations(), 20u);
  const Outcome good = RunSteps(steps_, PinMode::kNone);
  ASSERT_TRUE(good.is_good());
  for (size_t i = 0; i < steps_.size(); ++i) {
    if (!steps_[i].expected) continue;
    std::vector<std::string> bad;
    for (size_t word = 0; word < steps_[i].expected->size(); ++word) {
      bad = *steps_[i].expected;
      const auto number = ParseNumber(bad[word]);
      bad[word] = number ? std::to_string(*number + 1) : bad[word] + "x";
      EXPECT_FALSE(IsExpected(bad, good.steps[i].answer)) << steps_[i].text;
    }
    // What comes behind cannot matter any more.
    std::vector<Step> steps(steps_.begin(), steps_.begin() + static_cast<ptrdiff_t>(i) + 1);
    steps[i].expected = bad;
    const Outcome outcome = RunSteps(steps, PinMode::kNone);
    ASSERT_TRUE(outcome.failure) << steps_[i].text;
    EXPECT_EQ(outcome.failure->line, steps_[i].line);
    EXPECT_EQ(outcome.failure->expected, JoinWords(bad));
    EXPECT_THAT(outcome.failure->got, ::testing::StartsWith(good.steps[i].answer));
    EXPECT_TRUE(outcome.left.is_nothing());
  }
}

// The first, the last, and one between: the program ends there, with exit code 1.
TEST_P(ScenarioFileTest, ProgramNamesTheLineOfABrokenExpectation) {
  const TempDir dir;
  const std::string broken = dir / "broken.scenario";
  std::vector<const Step*> expectations;
  for (const Step& step : steps_) {
    if (step.expected) expectations.push_back(&step);
  }
  for (const Step* step :
       {expectations.front(), expectations[expectations.size() / 2], expectations.back()}) {
    std::string text;
    std::ifstream lines(path_);
    uint32_t number = 0;
    for (std::string line; std::getline(lines, line);) {
      text += line + (++number == step->line ? " and-more\n" : "\n");
    }
    WriteText(broken, text);
    const RanReplay ran = RunReplay({"run", broken});
    EXPECT_EQ(ran.exit_code, 1);
    EXPECT_THAT(ran.out, HasSubstr("NO: " + broken + ":" + std::to_string(step->line) +
                                   ": expected " + JoinWords(*step->expected) + " and-more, got "));
    EXPECT_THAT(ran.out, ::testing::ContainsRegex("left behind +nothing"));
    const RanReplay as_json = RunReplay({"run", broken, "--json"});
    EXPECT_EQ(as_json.exit_code, 1);
    EXPECT_EQ(as_json.report()["ok"], false);
    EXPECT_EQ(as_json.report()["failure"]["line"], step->line);
    EXPECT_EQ(as_json.report()["steps"].back()["ok"], false);
    EXPECT_EQ(as_json.report()["all_released"], true);
  }
}

// Whatever is under way when it ends: nothing stays pinned, charged or mapped.
TEST_P(ScenarioFileTest, EndsCleanAfterAnyStep) {
  for (size_t count = 0; count <= steps_.size(); ++count) {
    const std::vector<Step> some(steps_.begin(), steps_.begin() + static_cast<ptrdiff_t>(count));
    const Outcome outcome = RunSteps(some, PinMode::kNone);
    EXPECT_FALSE(outcome.failure);
    EXPECT_EQ(outcome.steps.size(), count);
    EXPECT_TRUE(outcome.left.is_nothing()) << "after " << (count == 0 ? "" : some.back().text);
  }
}

TEST_P(ScenarioFileTest, LeavesNoFileBehind) {
  const TempDir dir;
  EXPECT_EQ(RunReplay({"run", path_}, {"TMPDIR=" + dir.path()}).exit_code, 0);
  EXPECT_TRUE(std::filesystem::is_empty(dir.path()));
  const auto open_fds = [] {
    const std::filesystem::directory_iterator fds("/proc/self/fd");
    return std::distance(begin(fds), end(fds));
  };
  RunSteps(steps_, PinMode::kNone);
  const auto before = open_fds();
  RunSteps(steps_, PinMode::kNone);
  EXPECT_EQ(open_fds(), before);
}

INSTANTIATE_TEST_SUITE_P(All, ScenarioFileTest, ::testing::ValuesIn(ScenarioNames()),
                         [](const auto& scenario) {
                           std::string name = scenario.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

}  // namespace
}  // namespace mvgpu::testing
