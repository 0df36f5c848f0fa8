#pragma once

// What the kernel counts for this process (VmLck), against what the VM's ledger says it does, while
// a vGPU's pins and an assigned device's mappings of the same pages come and go. The device is edu,
// behind a real VFIO type1.

#include "tests/vm/dma/dma_proof.h"

namespace mvgpu::testing {

// Says `account=STEP VmLck=BYTES ledger=BYTES unique=BYTES` for each step, once with locks that are
// handed over (`deduplicated`) and once without (`plain`).
int ProveAccounts(Facts& facts);

}  // namespace mvgpu::testing
