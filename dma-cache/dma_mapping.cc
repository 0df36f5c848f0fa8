#include "dma-cache/dma_mapping.h"

#include <fmt/format.h>

#include "dma-cache/dma_user.h"

namespace mvgpu::dma {

DmaMapping& DmaMapping::operator=(DmaMapping&& other) noexcept {
  if (this == &other) return *this;
  reset();
  user_ = other.user_;
  epoch_ = other.epoch_;
  for_write_ = other.for_write_;
  runs_ = std::exchange(other.runs_, {});
  return *this;
}

void DmaMapping::reset() {
  if (runs_.empty()) return;
  user_->Release(pages(), for_write_, epoch_);
  runs_.clear();
}

bool DmaMapping::is_valid() const { return !runs_.empty() && user_->IsValid(pages(), epoch_); }

// The copy goes through the domain, which keeps the memory in place meanwhile; whether that was
// still the memory of this mapping is what the second look says. A revocation is for ever, so a
// mapping that is valid after the copy was valid during it.
Result<void> DmaMapping::read(Iova iova, std::span<std::byte> destination) const {
  if (destination.empty()) return {};
  const auto range = IovaRange::FromStartAndSize(iova, destination.size());
  if (runs_.empty() || !range || !RangeOf(pages()).contains(*range)) {
    return Fail(ErrorCode::kInvalid, fmt::format("read of {} bytes at iova {:#x} leaves its dma "
                                                 "mapping of {} runs",
                                                 destination.size(), iova.value(), runs().size()));
  }
  Result<void> copied;
  if (is_valid()) copied = user_->domain().read(iova, destination);
  if (is_valid()) return copied;
  return Fail(ErrorCode::kRevoked,
              fmt::format("iova {:#x}-{:#x} was unmapped by the vmm while in use",
                          range->start().value(), range->last().value()));
}

}  // namespace mvgpu::dma
