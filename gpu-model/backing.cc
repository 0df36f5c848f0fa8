#include "gpu-model/backing.h"

#include <fmt/format.h>

#include <algorithm>
#include <optional>
#include <utility>

namespace mvgpu::gpu {

Result<Backing> Backing::Create(std::span<const BackingEntry> entries, dma::DmaUser* user,
                                const domain::ApiOnlyDomain* domain) {
  if (entries.empty()) return Fail(ErrorCode::kInvalid, "a backing needs at least one entry");
  Backing backing(user, domain);
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
    MVGPU_ASSIGN_OR_RETURN(extent.hold, backing.Map(extent, extent.iova));
  }
  return backing;
}

Result<dma::DmaMapping> Backing::Map(Extent& extent, IovaRange part) {
  auto mapping = user_->map(part, dma::Direction::kToDevice);
  if (mapping || mapping.error().code() != ErrorCode::kNotReachable) return mapping;
  MVGPU_RETURN_IF_ERROR(domain_->check_copy(part, domain::Access::kRead));
  extent.is_copied = true;
  extent.hold.reset();
  ++unheld_extents_;
  return dma::DmaMapping();
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
  MVGPU_RETURN_IF_ERROR(
      for_each_piece(block, 0, [&uses, this](size_t index, IovaRange piece, uint64_t) {
        if (extents_[index].is_copied) return Result<void>();
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
    MVGPU_ASSIGN_OR_RETURN(use.mapping, Map(extent, use.iova));
  }
  return uses;
}

// Goes on after kPending, so that everything is asked for at once.
Result<uint64_t> Backing::CopyUnheld(const LineBlock& block, std::span<std::byte> destination,
                                     uint64_t destination_stride) const {
  uint64_t copied = 0;
  if (unheld_extents_ == 0) return copied;
  Result<void> outcome;
  MVGPU_RETURN_IF_ERROR(for_each_piece(
      block, destination_stride, [&](size_t index, IovaRange piece, uint64_t to) -> Result<void> {
        if (!extents_[index].is_copied) return {};
        copied += piece.size();
        auto read = domain_->read(piece.start(), destination.subspan(to, piece.size()));
        if (read || read.error().code() != ErrorCode::kPending) return read;
        outcome = std::move(read);
        return {};
      }));
  MVGPU_RETURN_IF_ERROR(outcome);
  return copied;
}

Result<uint64_t> Backing::copy(const LineBlock& block, std::span<std::byte> destination,
                               uint64_t destination_stride) {
  if (block.offset > size_) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("offset {} lies behind the backing of {} bytes", block.offset, size_));
  }
  uint64_t copied = 0;
  std::vector<Use> uses;
  size_t unheld = 0;
  do {
    // First what may be pending: nothing is mapped for a copy that is asked for again.
    unheld = unheld_extents_;
    MVGPU_ASSIGN_OR_RETURN(copied, CopyUnheld(block, destination, destination_stride));
    MVGPU_ASSIGN_OR_RETURN(uses, map_for(block));
  } while (unheld_extents_ != unheld);  // memory has come back without its file
  auto use = uses.begin();
  MVGPU_RETURN_IF_ERROR(for_each_piece(
      block, destination_stride, [&](size_t index, IovaRange piece, uint64_t to) -> Result<void> {
        if (extents_[index].is_copied) return {};
        while (use->extent != index) ++use;
        copied += piece.size();
        return use->mapping.read(piece.start(), destination.subspan(to, piece.size()));
      }));
  return copied;
}

}  // namespace mvgpu::gpu
