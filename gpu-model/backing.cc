#include "gpu-model/backing.h"

#include <fmt/format.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "gpu-model/backing_pieces.h"

namespace mvgpu::gpu {

Result<Backing> Backing::Create(std::span<const BackingEntry> entries, const Memory& memory) {
  if (entries.empty()) return Fail(ErrorCode::kInvalid, "a backing needs at least one entry");
  Backing backing(memory);
  backing.entries_ = entries.size();
  for (const BackingEntry& entry : entries) MVGPU_RETURN_IF_ERROR(backing.Append(entry));
  if (memory.space != nullptr) {
    uint64_t pages = 0;
    for (Extent& extent : backing.extents_) {
      extent.is_translated = false;
      pages += PagesOf(extent.iova).count;
    }
    backing.untranslated_extents_ = backing.extents_.size();
    MVGPU_ASSIGN_OR_RETURN(backing.charge_, PageCharge::Create(pages, memory.translated));
    MVGPU_RETURN_IF_ERROR(backing.TranslateFor({0, backing.size_, backing.size_, 1}));
  }
  for (Extent& extent : backing.extents_) {
    MVGPU_ASSIGN_OR_RETURN(extent.hold, backing.Map(extent, extent.iova));
  }
  return backing;
}

Result<void> Backing::Append(const BackingEntry& entry) {
  const auto range = IovaRange::FromStartAndSize(entry.address, entry.length);
  if (!range) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("backing entry of {} bytes at iova {:#x} is empty or wraps",
                            entry.length, entry.address.value()));
  }
  // Lengths have 32 bits and a request has less than 2^32 of them: the sum cannot wrap.
  const uint64_t offset = std::exchange(size_, size_ + range->size());
  if (!extents_.empty()) {
    IovaRange& before = extents_.back().iova;
    if (before.last() < range->start() && range->start() - before.last() == 1) {
      before = IovaRange::FromFirstAndLast(before.start(), range->last());
      return {};
    }
  }
  extents_.push_back({.offset = offset, .iova = *range, .from = range->start()});
  return {};
}

Result<dma::DmaMapping> Backing::Map(Extent& extent, IovaRange part) {
  auto mapping = memory_.user->map(part, dma::Direction::kToDevice);
  if (mapping || mapping.error().code() != ErrorCode::kNotReachable) return mapping;
  MVGPU_RETURN_IF_ERROR(memory_.domain->check_copy(part, domain::Access::kRead));
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
      auto hold = memory_.user->map(extent.iova, dma::Direction::kToDevice);
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
        auto read = memory_.domain->read(piece.start(), destination.subspan(to, piece.size()));
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
  MVGPU_RETURN_IF_ERROR(TranslateFor(block));
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
