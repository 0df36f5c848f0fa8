#pragma once

#include "tests/bench/harness.h"

namespace mvgpu::bench {

// What following a guest's own tables and requests costs, against the ways it is done elsewhere.
void MeasureNested(Table* table);  // nested_rows.cc
// A guest's IOMMU that walks two stages.
void MeasureVirtualIommus(Table* table);  // viommu_rows.cc
// What a fault of a device costs where memory is mapped on demand.
void MeasureFaults(Table* table);  // fault_rows.cc
// How much is pinned, and how often the guest is interrupted for it.
void MeasurePolicies(Table* table);  // policy_rows.cc

// All of them: --table=seeds.
inline void MeasureSeeds(Table* table) {
  MeasureNested(table);
  MeasureVirtualIommus(table);
  MeasureFaults(table);
  MeasurePolicies(table);
}

}  // namespace mvgpu::bench
