// Random sequences of operations in world.h. RapidCheck shrinks one that shows a difference; the
// failure prints a value for RC_PARAMS that leads straight to it, and MVGPU_MODEL_STEPS sets how
// many operations are done.

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <cstdlib>
#include <sstream>
#include <string>
#include <vector>

#include "tests/apionly-domain/hand_over/world.h"
#include "tests/apionly-domain/model/steps.h"

namespace mvgpu::domain::hand_over {
namespace {

constexpr int kLongestCase = 120;  // operations

rc::Gen<uint64_t> AnyOperation() {
  return rc::Gen<uint64_t>([](const rc::Random& random, int) {
    return rc::shrinkable::just(static_cast<uint64_t>(rc::Random(random).next()));
  });
}

std::string ProblemOf(const std::vector<uint64_t>& operations) {
  auto* world = new World();
  for (const uint64_t operation : operations) {
    world->Step(operation);
    if (!world->problem().empty()) return world->problem();  // and leave it as it is
  }
  world->Finish();
  const std::string problem = world->problem();
  if (problem.empty()) delete world;
  return problem;
}

class HandOverModelTest : public ::testing::TestWithParam<unsigned> {};

TEST_P(HandOverModelTest, EachPageThatIsHeldIsLockedOrADevicesAndChargedOnce) {
  rc::detail::TestParams params = rc::detail::configuration().testParams;
  params.maxSize = kLongestCase;
  params.maxSuccess = static_cast<int>(model::StepsFromEnvironment() / 10 / (kLongestCase / 2)) + 1;
  if (std::getenv("RC_PARAMS") == nullptr) params.seed = GetParam();
  rc::detail::TestMetadata metadata;
  metadata.id = ::testing::UnitTest::GetInstance()->current_test_info()->name();
  metadata.description = metadata.id;
  uint64_t operations_done = 0;
  const auto result = rc::detail::checkTestable(
      [&] {
        const auto operations = *rc::gen::container<std::vector<uint64_t>>(AnyOperation());
        const std::string problem = ProblemOf(operations);
        if (!problem.empty()) RC_FAIL(problem);
        operations_done += operations.size();
      },
      metadata, params);
  RecordProperty("operations", std::to_string(operations_done));
  std::ostringstream message;
  rc::detail::printResultMessage(result, message);
  EXPECT_TRUE(result.is<rc::detail::SuccessResult>()) << message.str();
}

INSTANTIATE_TEST_SUITE_P(Seeds, HandOverModelTest, ::testing::Range(1u, 5u));

}  // namespace
}  // namespace mvgpu::domain::hand_over
