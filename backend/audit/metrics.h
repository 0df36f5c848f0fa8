#pragma once

#include <string>

#include "backend/audit/report.h"

namespace mvgpu::backend {

// The report as OpenMetrics text (version 1.0), ended with "# EOF". Bytes, not pages.
//
// What the ledgers say carries the labels vm (a UUID), row and domain; what the kernel says of a
// process, vm and pid. Only gauges and counters are used, so that readers of Prometheus' older text
// format (node_exporter's textfile collector) take it as well. Metrics and labels are only ever
// added.
std::string RenderMetrics(const AuditReport& report);

}  // namespace mvgpu::backend
