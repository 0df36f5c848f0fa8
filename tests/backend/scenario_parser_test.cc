#include <sys/stat.h>

#include <random>
#include <set>

#include "backend/scenario/world.h"
#include "tests/backend/scenario_fixture.h"

namespace mvgpu::testing {
namespace {

using backend::PinMode;
using backend::scenario::AllCommands;
using backend::scenario::Command;
using backend::scenario::IsExpected;
using backend::scenario::Outcome;
using backend::scenario::ParseNumber;
using backend::scenario::RunSteps;
using backend::scenario::Step;
using ::testing::HasSubstr;
using ::testing::StartsWith;

TEST(ScenarioNumber, IsDecimalOrHexadecimalWithUnits) {
  EXPECT_EQ(ParseNumber("0"), 0u);
  EXPECT_EQ(ParseNumber("4096"), 4096u);
  EXPECT_EQ(ParseNumber("0x1aF"), 0x1afu);
  EXPECT_EQ(ParseNumber("4K"), 4096u);
  EXPECT_EQ(ParseNumber("3M"), 3u << 20);
  EXPECT_EQ(ParseNumber("2G"), uint64_t{2} << 30);
  EXPECT_EQ(ParseNumber("18446744073709551615"), UINT64_MAX);
  EXPECT_EQ(ParseNumber("0xffffffffffffffff"), UINT64_MAX);
  EXPECT_EQ(ParseNumber("17179869183G"), UINT64_MAX >> 30 << 30);
}

TEST(ScenarioNumber, AnythingElseIsNone) {
  for (const char* word :
       {"", "-1", "+1", "0x", "x", "K", "4k", "4KK", "0x4K", "1.5", "1e3", "18446744073709551616",
        "0x10000000000000000", "17179869184G", "4 ", "--", "0b1", "０"}) {
    EXPECT_EQ(ParseNumber(word), std::nullopt) << word;
  }
}

TEST(ScenarioAnswer, IsComparedWordByWordAndNumbersByValue) {
  EXPECT_TRUE(IsExpected({"cc", "1", "status", "16"}, "cc 1 status 0x10"));
  EXPECT_TRUE(IsExpected({"4K"}, "4096"));
  EXPECT_FALSE(IsExpected({"cc", "1"}, "cc 1 status 16"));
  EXPECT_FALSE(IsExpected({"cc", "1", "status", "16"}, "cc 1"));
  EXPECT_FALSE(IsExpected({"cc"}, "CC"));
  EXPECT_FALSE(IsExpected({"1"}, "one"));
  EXPECT_FALSE(IsExpected({"1"}, ""));
}

TEST(ScenarioParser, StepsHaveTheirLineAndWords) {
  const auto steps = Parse(Scenario("\n# nothing\n  memory\t1M   # all of it\nexpect pinned = 0"));
  ASSERT_TRUE(steps) << steps.error().message();
  ASSERT_EQ(steps->size(), 2u);
  EXPECT_EQ((*steps)[0].line, 4u);
  EXPECT_EQ((*steps)[0].text, "memory 1M");
  EXPECT_EQ((*steps)[0].command->usage, "memory SIZE");
  EXPECT_THAT((*steps)[0].arguments.numbers, ::testing::ElementsAre(1u << 20));
  EXPECT_FALSE((*steps)[0].expected);
  EXPECT_EQ((*steps)[1].line, 5u);
  EXPECT_EQ((*steps)[1].command->usage, "pinned");
  EXPECT_THAT(*(*steps)[1].expected, ::testing::ElementsAre("0"));
}

TEST(ScenarioParser, ArgumentsComeInTheOrderOfTheUsage) {
  const auto steps = Parse(Scenario("map 0x1000 8K at 1 rw\nwrite64 8 1 2 3\nlisten a to 1 2"));
  ASSERT_TRUE(steps) << steps.error().message();
  EXPECT_THAT((*steps)[0].arguments.numbers, ::testing::ElementsAre(0x1000, 8192, 1));
  EXPECT_THAT((*steps)[0].arguments.words, ::testing::ElementsAre("rw"));
  EXPECT_THAT((*steps)[1].arguments.numbers, ::testing::ElementsAre(8, 1, 2, 3));
  EXPECT_EQ((*steps)[2].command->usage, "listen NAME to RID PASID");
}

TEST(ScenarioParser, WrongLinesAreNamedWithARemedy) {
  const auto wrong = [](const std::string& line) { return ParseError(Scenario("\n" + line)); };
  EXPECT_EQ(wrong("memory"), "s:3: SIZE is missing; write: memory SIZE");
  EXPECT_EQ(wrong("memory 1M 2M"), "s:3: '2M' is too much; write: memory SIZE");
  EXPECT_EQ(wrong("memory lots"),
            "s:3: 'lots' is no number for SIZE: write 4096, 0x1000, 4K; write: memory SIZE");
  EXPECT_EQ(wrong("map 0 4K on 0 rw"),
            "s:3: 'on' instead of at; write: map IOVA SIZE at OFFSET r|w|rw");
  EXPECT_EQ(wrong("map 0 4K at 0 rwx"),
            "s:3: 'rwx' instead of r|w|rw; write: map IOVA SIZE at OFFSET r|w|rw");
  EXPECT_THAT(wrong("release a/b"), HasSubstr("'a/b' is no name"));
  EXPECT_THAT(wrong("release " + std::string(33, 'a')), HasSubstr("32 at most"));
  EXPECT_THAT(wrong("write64 8"), HasSubstr("VALUE is missing"));
  EXPECT_THAT(wrong("mpcifc dance"),
              HasSubstr("write: mpcifc register|reregister PBA PAL IOTA, or: mpcifc deregister, "
                        "or: mpcifc reset-error|reset-block"));
  EXPECT_THAT(wrong("mpcifc register 1 2"), StartsWith("s:3: IOTA is missing"));
  for (const char* line : {"expect", "expect pinned", "expect pinned =", "expect pinned 0"}) {
    EXPECT_EQ(wrong(line), "s:3: no answer is expected; write: expect COMMAND = ANSWER") << line;
  }
  EXPECT_EQ(wrong("expect = 0"), "s:3: a command is missing");
  EXPECT_THAT(wrong("expect expect pinned = 0"), HasSubstr("unknown command 'expect'"));
}

TEST(ScenarioParser, UnknownCommandListsAllThereAre) {
  const std::string error = ParseError(Scenario("dance 1"));
  EXPECT_THAT(error, StartsWith("s:2: unknown command 'dance'; there are: expect, answer-to, "));
  for (const auto commands : AllCommands()) {
    for (const Command& command : commands) {
      EXPECT_THAT(error, HasSubstr(std::string(command.usage.substr(0, command.usage.find(' ')))));
    }
  }
}

// What the grammar relies on.
TEST(ScenarioCommands, UsagesAreDifferentAndWellFormed) {
  std::set<std::string_view> usages;
  for (const auto commands : AllCommands()) {
    EXPECT_FALSE(commands.empty());
    for (const Command& command : commands) {
      EXPECT_TRUE(usages.insert(command.usage).second) << command.usage;
      EXPECT_THAT(std::string(command.usage), ::testing::Not(HasSubstr("  ")));
      EXPECT_FALSE(command.usage.ends_with(' ')) << command.usage;
      EXPECT_NE(command.usage[0], ' ');
      const size_t dots = command.usage.find("...");
      if (dots != std::string_view::npos) {
        EXPECT_EQ(dots + 3, command.usage.size());
      }
    }
  }
}

TEST(ScenarioFile, FirstLineSaysWhatItIs) {
  EXPECT_EQ(ParseError(""), "s:1: nothing is there, not even 'mvgpu scenario 1'");
  for (const char* first : {"mvgpu scenario 2", "mvgpu scenario 1 ", "mvgpu scenario 10",
                            "memory 1M", " mvgpu scenario 1", "# mvgpu scenario 1"}) {
    EXPECT_THAT(ParseError(std::string(first) + "\nmemory 1M\n"),
                ::testing::MatchesRegex("s:1: '.*' is not 'mvgpu scenario 1', which is all that "
                                        "this program knows"));
  }
  EXPECT_TRUE(Parse("mvgpu scenario 1"));
  EXPECT_TRUE(Parse("mvgpu scenario 1\n"));
}

TEST(ScenarioFile, BytesThatAreNoTextAreRefused) {
  EXPECT_EQ(ParseError(Scenario("memory 1M\r\n")),
            "s:2: byte 0x0d at column 10: scenarios are text with plain line ends");
  EXPECT_THAT(ParseError(Scenario(std::string("memory\0 1M", 10))), HasSubstr("s:2: byte 0x00"));
  EXPECT_THAT(ParseError(std::string("\0\0\0\0", 4)), HasSubstr("s:1: byte 0x00"));
  EXPECT_THAT(ParseError(Scenario("memory 1M \x7f")), HasSubstr("0x7f"));
  EXPECT_THAT(ParseError(Scenario("# \x1b[2J")), HasSubstr("0x1b"));
  EXPECT_THAT(ParseError(Scenario("memory ４K")),
              HasSubstr("column 8: only comments may have other than ASCII"));
  EXPECT_TRUE(Parse(Scenario("memory 4K # größer, \xff")));
}

TEST(ScenarioFile, EverySizeIsBounded) {
  EXPECT_EQ(ParseError(Scenario(std::string(10'000'000, 'a'))),
            "s:2: a line of 10000000 bytes, at most 500 are allowed: cut it");
  EXPECT_TRUE(Parse(Scenario("#" + std::string(499, 'a'))));
  EXPECT_THAT(ParseError(Scenario("#" + std::string(500, 'a'))), HasSubstr("501 bytes"));
  std::string words = "write64 0";
  for (int i = 0; i < 62; ++i) words += " 1";
  EXPECT_TRUE(Parse(Scenario(words)));
  EXPECT_EQ(ParseError(Scenario(words + " 1")),
            "s:2: 65 words, at most 64 are allowed: make it two lines");
  std::string lines;
  for (int i = 0; i < 10'000; ++i) lines += "pinned\n";
  EXPECT_TRUE(Parse(Scenario(lines)));
  EXPECT_EQ(ParseError(Scenario(lines + "\n\npinned")),
            "s:10004: more than 10000 commands: make it two scenarios");
}

TEST(ScenarioRun, EndsAtTheFirstStepThatFails) {
  const auto run = [](const std::string& lines) {
    const auto steps = Parse(Scenario(lines));
    EXPECT_TRUE(steps) << steps.error().message();
    return RunSteps(*steps, PinMode::kNone);
  };
  const Outcome early = run("pinned\nmemory 1M");
  ASSERT_TRUE(early.failure);
  EXPECT_EQ(early.failure->line, 2u);
  EXPECT_EQ(early.failure->expected, "no error");
  EXPECT_EQ(early.failure->got,
            "error invalid (there is no guest memory yet: 'memory SIZE' comes first)");
  EXPECT_EQ(early.steps.size(), 1u);
  const Outcome expected = run("expect pinned = error invalid\nmemory 1M\nexpect mappings = 0");
  EXPECT_TRUE(expected.is_good());
  EXPECT_EQ(expected.expectations, 2u);
  const Outcome wrong = run("memory 1M\nexpect pinned = 7\nmap 0 1M at 0 rw");
  ASSERT_TRUE(wrong.failure);
  EXPECT_EQ(wrong.failure->expected, "7");
  EXPECT_EQ(wrong.failure->got, "0");
  EXPECT_FALSE(wrong.is_good());
  EXPECT_EQ(wrong.steps.size(), 2u);
  EXPECT_FALSE(wrong.steps.back().is_good);
  EXPECT_THAT(run("memory 1M\nrpcit 0 1").failure->got,
              HasSubstr("'zpci-function HANDLE ID CREDITS' comes before this"));
}

TEST(ScenarioRun, WhatIsLeftBehindMakesItBad) {
  for (const auto left : {&backend::scenario::World::Left::pinned_pages,
                          &backend::scenario::World::Left::locked_pages,
                          &backend::scenario::World::Left::charged_pages,
                          &backend::scenario::World::Left::mappings}) {
    Outcome outcome;
    EXPECT_TRUE(outcome.is_good());
    outcome.left.*left = 3;
    EXPECT_FALSE(outcome.is_good());
    const auto report = nlohmann::json::parse(backend::scenario::OutcomeAsJson("s", outcome));
    EXPECT_EQ(report["ok"], false);
    EXPECT_EQ(report["all_released"], false);
    ::testing::internal::CaptureStdout();
    backend::scenario::PrintOutcome("s", outcome);
    EXPECT_THAT(::testing::internal::GetCapturedStdout(), HasSubstr("3 "));
  }
}

// What stays when a part of the world does not let go: it is seen, and by whom it was charged.
TEST(ScenarioRun, APinThatOutlivesItsSystemIsSeen) {
  backend::scenario::World world(PinMode::kNone);
  ASSERT_TRUE(world.make_memory(1 << 20));
  auto* const guest = *world.guest();
  ASSERT_TRUE(
      (*Parse(Scenario("map 0 1M at 0 rw")))[0].command->run(world, {{0, 1 << 20, 0}, {"rw"}}));
  class Owner final : public domain::PinOwner {
    std::string_view pin_owner_name() const override { return "stubborn"; }
    void on_revoke(IovaRange) override {}
  } owner;
  const auto context = guest->domain().open_context(&owner);
  auto pinned = context->pin(*IovaRange::FromStartAndSize(Iova(0), 8192), domain::Access::kRead);
  ASSERT_TRUE(pinned);
  const auto left = world.end();
  EXPECT_EQ(left.pinned_pages, 2u);
  EXPECT_EQ(left.charged_pages, 2u);
  EXPECT_EQ(left.mappings, 1u);
  EXPECT_FALSE(left.is_nothing());
  pinned->reset();
  EXPECT_TRUE(world.end().is_nothing());
}

// The program, with files that are no scenarios, or broken ones: one line, exit code 3.
class ScenarioCommandLineTest : public ::testing::Test {
 protected:
  std::string Write(const std::string& text) {
    WriteText(dir_ / "some", text);
    return dir_ / "some";
  }
  std::string ExpectFails(std::vector<std::string> arguments, int exit_code) {
    const RanReplay ran = RunReplay(std::move(arguments));
    EXPECT_EQ(ran.exit_code, exit_code) << ran.err;
    EXPECT_EQ(LinesIn(ran.err), 1u) << ran.err;
    EXPECT_EQ(ran.out, "");
    return ran.err;
  }
  TempDir dir_;
};

TEST_F(ScenarioCommandLineTest, BrokenFilesAreOneLineAndExitCodeThree) {
  EXPECT_EQ(ExpectFails({"run", Write(Scenario("memory 1M\ndance"))}, 3).find("mvgpu-replay: "),
            0u);
  EXPECT_THAT(ExpectFails({"run", Write(Scenario("memory 1M\nmemory"))}, 3),
              HasSubstr(dir_ / "some" + ":3: SIZE is missing"));
  EXPECT_THAT(ExpectFails({"run", Write("mvgpu scenario 9\n")}, 3), HasSubstr("some:1: "));
  EXPECT_THAT(ExpectFails({"run", Write(Scenario(std::string(10'000'000, ' ')))}, 3),
              HasSubstr("more than 1048576 bytes"));
  EXPECT_THAT(ExpectFails({"run", Write("mvgpu scenario")}, 3), HasSubstr("not an mvgpu trace"));
  EXPECT_THAT(ExpectFails({"run", "/dev/zero"}, 3), HasSubstr("not a file"));
  const std::string fifo = dir_ / "fifo";
  ASSERT_EQ(mkfifo(fifo.c_str(), 0600), 0);
  EXPECT_THAT(ExpectFails({"run", fifo}, 3), HasSubstr("not a file"));
}

TEST_F(ScenarioCommandLineTest, OptionsThatAreForTracesAreExitCodeTwo) {
  const std::string path = Write(Scenario("memory 1M"));
  for (const char* option : {"--screenshot=p.png", "--pages=p.csv", "--dma=iommu"}) {
    EXPECT_THAT(ExpectFails({"run", path, option}, 2), HasSubstr("only --json and --pin"));
  }
  EXPECT_EQ(RunReplay({"run", path, "--pin=mlock"}).exit_code, 0);
}

// Files change a little, or a lot: each parses or is refused in one line, and what parses runs to
// an end with nothing left behind.
TEST(ScenarioFuzz, ChangedFilesRunOrAreRefused) {
  std::mt19937 random(20261121);
  const auto below = [&](size_t end) {
    return std::uniform_int_distribution<size_t>(0, end - 1)(random);
  };
  size_t ran = 0;
  for (const std::string& name : ScenarioNames()) {
    const std::string good = ReadText(ScenarioPath(name));
    for (int round = 0; round < 60; ++round) {
      std::string text = good;
      for (size_t changes = 1 + below(3); changes > 0; --changes) {
        const size_t at = 17 + below(text.size() - 17);
        constexpr std::string_view kBytes = "0123456789abcdefx KMG=-rw#\n";
        switch (below(4)) {
          case 0:
            text[at] = kBytes[below(kBytes.size())];
            break;
          case 1:
            text.erase(at, 1 + below(40));
            break;
          case 2:
            text.insert(at, text.substr(17 + below(text.size() - 17), below(60)));
            break;
          default:
            text[at] = static_cast<char>(below(256));
        }
      }
      const auto steps = Parse(text);
      if (!steps) {
        EXPECT_EQ(LinesIn(steps.error().message() + "\n"), 1u);
        continue;
      }
      ++ran;
      EXPECT_TRUE(RunSteps(*steps, PinMode::kNone).left.is_nothing());
    }
  }
  EXPECT_GT(ran, 20u);
}

// Any command after any other, with numbers of every size: refused or done, never the end of the
// program, and nothing is left.
TEST(ScenarioFuzz, CommandsInAnyOrderWithAnyNumbersEndClean) {
  std::mt19937_64 random(6);
  const auto below = [&](size_t end) { return static_cast<size_t>(random() % end); };
  const auto number = [&]() -> std::string {
    constexpr uint64_t kSome[] = {0,
                                  1,
                                  2,
                                  7,
                                  8,
                                  0x1000,
                                  0x1fff,
                                  0x4000,
                                  0x8000,
                                  0x10000,
                                  0x100000,
                                  0x100804,
                                  0x3a91,
                                  0x12345,
                                  0x345,
                                  0x200000,
                                  0x123456000,
                                  1u << 31,
                                  UINT32_MAX,
                                  uint64_t{1} << 48,
                                  uint64_t{1} << 63,
                                  UINT64_MAX - 4095,
                                  UINT64_MAX};
    return std::to_string(below(8) == 0 ? random() >> below(64) : kSome[below(std::size(kSome))]);
  };
  std::vector<std::string_view> usages;
  for (const auto commands : AllCommands()) {
    for (const Command& command : commands) usages.push_back(command.usage);
  }
  constexpr std::string_view kVgpu =
      "vgpu 0x3a91 0x345 with page-requests\nvgpu-map 0 2M at 0 rw\ngpu-boot 0x10000\n"
      "expect gpu-create 1 16 16 = ok\nvtd-root 0x1400\nvtd-queue 0x5000\nvtd-page-queue 0xa000\n";
  for (int round = 0; round < 60; ++round) {
    std::string text =
        "memory 2M\nmap 0 2M at 0 rw\nzpci-function 0x80010001 7 100\nzpci-tables 0x100000\n"
        "expect mpcifc register 0x100000000 0x1ffffffff 0x100804 = cc 0\n"
        "iopf 4 1000 host-ring 0x8000 guest-ring 0x9000\n"
        "coiommu-device 0x180000 0x170000 4 64\ncache a none\ncache b iommu\nassign\n"
        "dma-map a a a 0x1000 8K both\npin a 0x1000 8K rw\n";
    text += round % 2 == 0 ? "vtd-unit 0x3a91\n" : kVgpu;
    text += "listen a all\n";
    for (int step = 0; step < 150; ++step) {
      std::string line;
      std::string_view usage = usages[below(usages.size())];
      while (!usage.empty()) {
        const size_t end = std::min(usage.find(' '), usage.size());
        const std::string_view word = usage.substr(0, end);
        usage.remove_prefix(std::min(end + 1, usage.size()));
        line += line.empty() ? "" : " ";
        if (word == "NAME" || word == "TEXT") {
          line += std::string(1, static_cast<char>('a' + below(2)));
        } else if (word.find('|') != std::string_view::npos) {
          const size_t from = below(word.size());
          const size_t before = word.rfind('|', from);
          const size_t first = before == std::string_view::npos ? 0 : before + 1;
          line += word.substr(first, word.find('|', first) - first);
        } else if (std::isupper(static_cast<unsigned char>(word[0])) != 0) {
          for (size_t count = word.ends_with("...") ? 1 + below(5) : 1; count > 0; --count) {
            line += number() + (count > 1 ? " " : "");
          }
        } else {
          line += word;
        }
      }
      text += "expect " + line + " = *\n";
    }
    auto steps = Parse(Scenario(text));
    ASSERT_TRUE(steps) << steps.error().message();
    backend::scenario::World world(PinMode::kNone);
    for (const Step& step : *steps) {
      const auto done = step.command->run(world, step.arguments);
      if (!step.expected) {
        EXPECT_TRUE(done) << step.text << ": " << done.error().message();
      }
      if (done) {
        EXPECT_EQ(done->find('\n'), std::string::npos);
      }
    }
    EXPECT_TRUE(world.end().is_nothing());
  }
}

}  // namespace
}  // namespace mvgpu::testing
