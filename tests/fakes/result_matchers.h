#pragma once

#include <gmock/gmock.h>

#include <string>

#include "apionly-domain/base/error.h"

namespace mvgpu {

// Prints an error in a failed expectation.
inline void PrintTo(const Error& error, std::ostream* os) {
  *os << ErrorCodeName(error.code()) << ": " << error.message();
}

namespace testing {

// EXPECT_THAT(Compute(), IsOk());
MATCHER(IsOk, "is a success") {
  if (arg.has_value()) return true;
  *result_listener << "which is the error " << std::string(ErrorCodeName(arg.error().code()))
                   << ": " << arg.error().message();
  return false;
}

// EXPECT_THAT(Compute(), IsOkAndHolds(5));
MATCHER_P(IsOkAndHolds, value, "is a success with the expected value") {
  if (!arg.has_value()) {
    *result_listener << "which is the error " << arg.error().message();
    return false;
  }
  return ::testing::ExplainMatchResult(value, *arg, result_listener);
}

// EXPECT_THAT(Compute(), FailsWith(ErrorCode::kOverlap));
MATCHER_P(FailsWith, code, "fails with the expected code") {
  if (arg.has_value()) {
    *result_listener << "which is a success";
    return false;
  }
  *result_listener << "which is " << std::string(ErrorCodeName(arg.error().code())) << ": "
                   << arg.error().message();
  return arg.error().code() == code;
}

}  // namespace testing
}  // namespace mvgpu
