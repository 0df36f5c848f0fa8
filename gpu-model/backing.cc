#include "gpu-model/backing.h"

#include <fmt/format.h>

#include <algorithm>
#include <optional>
#include <utility>

namespace mvgpu::gpu {

Result<Backing> Backing::Create(std::span<const BackingEntry> entries, dma::DmaUser* user) {
  if (entries.empty()) return Fail(ErrorCode::kInvalid, "a backing needs at least one entry");
  Backing backing(user);
  backing.entries_ = entries.size();
  for (const BackingEntry& entry : entries) {
    const auto range = IovaRange::FromStartAndSize(entry.address, entry.length);
    if (!range) {
      return Fail(ErrorCode::kInvalid,
                  fmt::format("backing entry of {} bytes at iova {:#x} is empty or wraps",
                              entry.length, entry.address.value()));
    }
    // Lengths have 32 bits and a request has less than 2^32 of them: the sum cannot wrap.
    const uint64_t offset = backing.size_;
    backing.size_ += range->size();
    if (!backing.extents_.empty()) {
      IovaRange& before = backing.extents_.back().iova;
      if (before.last() < range->start() && range->start() - before.last() == 1) {
        before = IovaRange::FromFirstAndLast(before.start(), range->last());
        continue;
      }
    }
    backing.extents_.push_back({offset, *range, {}});
  }
  for (Extent& extent : backing.extents_) {
    MVGPU_ASSIGN_OR_RETURN(extent.hold, user->map(extent.iova, dma::Direction::kToDevice));
  }
  return backing;
}

size_t Backing::extent_at(uint64_t offset) const {
  const auto behind =
      std::upper_bound(extents_.begin(), extents_.end(), offset,
                       [](uint64_t value, const Extent& extent) { return value < extent.offset; });
  return static_cast<size_t>(behind - extents_.begin()) - 1;  // the first extent has offset 0
}

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

Result<std::vector<Backing::Use>> Backing::map_for(const LineBlock& block) {
  std::vector<Use> uses;
  MVGPU_RETURN_IF_ERROR(for_each_piece(block, 0, [&uses](size_t index, IovaRange piece, uint64_t) {
    if (!uses.empty() && uses.back().extent == index) {
      uses.back().iova = IovaRange::FromFirstAndLast(uses.back().iova.start(), piece.last());
    } else {
      uses.push_back({index, piece, {}});
    }
    return Result<void>();
  }));
  for (Use& use : uses) {
    Extent& extent = extents_[use.extent];
    if (!extent.hold.is_valid()) {
      // Revoked since. Some of the extent may still be missing; what counts is the part that is
      // needed now.
      auto hold = user_->map(extent.iova, dma::Direction::kToDevice);
      if (hold) extent.hold = std::move(*hold);
    }
    MVGPU_ASSIGN_OR_RETURN(use.mapping, user_->map(use.iova, dma::Direction::kToDevice));
  }
  return uses;
}

Result<uint64_t> Backing::copy(const LineBlock& block, std::span<std::byte> destination,
                               uint64_t destination_stride) {
  if (block.offset > size_) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("offset {} lies behind the backing of {} bytes", block.offset, size_));
  }
  MVGPU_ASSIGN_OR_RETURN(const std::vector<Use> uses, map_for(block));
  auto use = uses.begin();
  uint64_t copied = 0;
  MVGPU_RETURN_IF_ERROR(for_each_piece(
      block, destination_stride, [&](size_t index, IovaRange piece, uint64_t to) -> Result<void> {
        while (use->extent != index) ++use;
        copied += piece.size();
        return use->mapping.read(piece.start(), destination.subspan(to, piece.size()));
      }));
  return copied;
}

}  // namespace mvgpu::gpu
