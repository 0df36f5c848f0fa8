#pragma once

#include "tests/bench/harness.h"
#ifdef MVGPU_HAS_VULKAN
#include "tests/bench/vulkan_rows.h"
#endif

namespace mvgpu::bench {

// What the dma cache costs, against the limits of the machine and the ways others do it.
void MeasureCacheHits(Table* table);    // cache_hit_rows.cc
void MeasureCacheMisses(Table* table);  // cache_miss_rows.cc

// All of them: --table=cache.
inline void MeasureCache(Table* table) {
  MeasureCacheHits(table);
  MeasureCacheMisses(table);
#ifdef MVGPU_HAS_VULKAN
  MeasureVulkan(table);
#endif
}

}  // namespace mvgpu::bench
