#pragma once

namespace mvgpu::bench {

// What this process has of its own. Guest memory is shared and untouched: it is not in here.
struct OwnMemory {
  double malloced = 0;  // bytes that are in use of what malloc gave out
  double touched = 0;   // bytes of private pages that the kernel provided, malloc's included

  static OwnMemory Now();
};

// Gives what was freed back to the kernel, then takes 1 MiB from it that small blocks can come
// from: so what small blocks touch was touched before, and does not count as whole pages.
void SettleHeap();

}  // namespace mvgpu::bench
