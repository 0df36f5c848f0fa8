#pragma once

#include "tests/bench/harness.h"

namespace mvgpu::bench {

// What the accounts of a VM cost: --table=accounts. accounts_rows.cc.
void MeasureAccounts(Table* table);

}  // namespace mvgpu::bench
