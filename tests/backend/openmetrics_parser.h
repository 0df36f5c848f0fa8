#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "apionly-domain/base/error.h"

namespace mvgpu::testing {

struct OpenMetricsSample {
  std::string name;
  std::map<std::string, std::string> labels;
  double value = 0;
};

struct OpenMetricsFamily {
  std::string name;
  std::string type;
  std::string unit;
  std::string help;
  std::vector<OpenMetricsSample> samples;
};

// Reads the text format of OpenMetrics 1.0, gauges and counters without timestamps and exemplars,
// and is as strict as the specification where that says MUST. Errors: kInvalid, with the line.
Result<std::vector<OpenMetricsFamily>> ParseOpenMetrics(std::string_view text);

}  // namespace mvgpu::testing
