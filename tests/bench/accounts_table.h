#pragma once

#include "tests/bench/harness.h"

namespace mvgpu::bench {

// What the accounts of a VM cost: --table=accounts. accounts_rows.cc.
void MeasureAccounts(Table* table);
// Of these, the locks that go from a vGPU to an assigned device and back. hand_over_rows.cc.
void MeasureHandOver(Table* table);

}  // namespace mvgpu::bench
