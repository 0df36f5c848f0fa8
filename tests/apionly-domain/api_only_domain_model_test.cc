// The domain against a naive model (model/world.h): RapidCheck makes sequences of operations, and
// shrinks one that shows a difference to the shortest that does.
//
// MVGPU_MODEL_STEPS sets the number of operations per test, about (default 40000; builds with
// sanitizers do less). A failure prints the operations that are left, and a value for RC_PARAMS
// that leads straight to them; RC_PARAMS="seed=N" begins with another seed.

#include <gtest/gtest.h>
#include <rapidcheck.h>
#include <setjmp.h>
#include <signal.h>

#include <chrono>
#include <cstdlib>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "tests/apionly-domain/model/operation.h"
#include "tests/apionly-domain/model/steps.h"
#include "tests/apionly-domain/model/world.h"

namespace mvgpu::domain::model {

// For RapidCheck.
void showValue(const Operation& operation, std::ostream& out) { out << Describe(operation); }

namespace {

constexpr int kLongestCase = 400;              // operations
constexpr int kMeanLength = kLongestCase / 4;  // lengths grow from 0, and lie evenly below

using Clock = std::chrono::steady_clock;
constexpr std::chrono::seconds kLongestShrink{20};  // then the shortest so far is good enough

rc::Gen<Operation> AnyOperation() {
  return rc::Gen<Operation>([](const rc::Random& random, int) {
    return rc::shrinkable::shrinkRecur(
        MakeOperation(rc::Random(random).next()),
        [](const Operation& operation) { return rc::seq::fromContainer(SimplerThan(operation)); });
  });
}

sigjmp_buf after_abort;

// Runs the operations; what is wrong, or nothing. A check of the domain's own that fails ends up
// here too, so that RapidCheck can shrink what led to it.
std::string ProblemOf(GuestFiles* files, const std::vector<Operation>& operations) {
  auto* world = new World(files);
  struct sigaction old = {};
  struct sigaction action = {};
  action.sa_handler = [](int) { siglongjmp(after_abort, 1); };
  sigaction(SIGABRT, &action, &old);
  std::string problem;
  if (sigsetjmp(after_abort, /*savemask=*/1) == 0) {
    for (const Operation& operation : operations) {
      world->Step(operation);
      if (!world->problem().empty()) break;
    }
    if (world->problem().empty()) world->Finish();
    problem = world->problem();
    if (problem.empty()) delete world;  // otherwise left as it is, see World::problem()
  } else {
    problem = "a check of the domain failed, see above";
  }
  sigaction(SIGABRT, &old, nullptr);
  return problem;
}

class ApiOnlyDomainModelTest : public ::testing::TestWithParam<unsigned> {};

TEST_P(ApiOnlyDomainModelTest, AgreesWithMapsOfPages) {
  GuestFiles files;
  rc::detail::TestParams params = rc::detail::configuration().testParams;
  params.maxSize = kLongestCase;
  params.maxSuccess = static_cast<int>(StepsFromEnvironment() / kMeanLength);
  if (std::getenv("RC_PARAMS") == nullptr) params.seed = GetParam();
  rc::detail::TestMetadata metadata;
  metadata.id = ::testing::UnitTest::GetInstance()->current_test_info()->name();
  metadata.description = metadata.id;
  uint64_t operations_done = 0;
  Clock::time_point shrink_until = Clock::time_point::max();
  std::vector<Operation> shortest;  // that failed, so far
  std::string problem;
  const auto result = rc::detail::checkTestable(
      [&] {
        const auto operations = *rc::gen::container<std::vector<Operation>>(AnyOperation());
        if (Clock::now() < shrink_until) {
          const std::string found = ProblemOf(&files, operations);
          if (!found.empty()) {
            if (problem.empty()) shrink_until = Clock::now() + kLongestShrink;
            shortest = operations;
            problem = found;
          }
        }
        if (!problem.empty() && operations == shortest) RC_FAIL(problem);
        operations_done += operations.size();
      },
      metadata, params);
  RecordProperty("operations", std::to_string(operations_done));
  std::cout << operations_done << " operations\n";
  std::ostringstream message;
  rc::detail::printResultMessage(result, message);
  EXPECT_TRUE(result.is<rc::detail::SuccessResult>()) << message.str();
}

INSTANTIATE_TEST_SUITE_P(Seeds, ApiOnlyDomainModelTest, ::testing::Range(1u, 9u));

}  // namespace
}  // namespace mvgpu::domain::model
