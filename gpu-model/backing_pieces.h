#pragma once

// For the sources of Backing alone.

#include <algorithm>

#include "gpu-model/backing.h"

namespace mvgpu::gpu {

template <typename Visit>
Result<void> Backing::for_each_piece(const LineBlock& block, uint64_t destination_stride,
                                     Visit visit) const {
  if (block.line_bytes == 0 || block.offset >= size_) return {};
  size_t index = extent_at(block.offset);
  for (uint64_t line = 0; line < block.lines; ++line) {
    uint64_t at = block.offset + line * block.stride;
    const uint64_t end = std::min(at + block.line_bytes, size_);
    uint64_t to = line * destination_stride;
    while (at < end) {
      while (at - extents_[index].offset >= extents_[index].iova.size()) ++index;
      const Extent& extent = extents_[index];
      const uint64_t in_extent = at - extent.offset;
      const uint64_t size = std::min(end - at, extent.iova.size() - in_extent);
      const Iova first = extent.iova.start() + in_extent;
      MVGPU_RETURN_IF_ERROR(
          visit(index, IovaRange::FromFirstAndLast(first, first + (size - 1)), to));
      at += size;
      to += size;
    }
  }
  return {};
}

}  // namespace mvgpu::gpu
