#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

namespace mvgpu {

// Batches of at most 64 things are named by the bits of a word.

// Calls visit(index) for each bit that is set, in ascending order.
template <typename Visit>
void ForEachBit(uint64_t bits, Visit visit) {
  for (; bits != 0; bits &= bits - 1) visit(static_cast<size_t>(std::countr_zero(bits)));
}

// The lowest `count` bits. REQUIRES: count <= 64.
constexpr uint64_t LowestBits(size_t count) {
  return count == 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
}

}  // namespace mvgpu
