#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <span>
#include <vector>

#include "dma-cache/mapper.h"

namespace mvgpu::dma {

// What one Mapper::map() appends: pieces that continue each other, in IOVAs and in device
// addresses, become one; an error takes all of them back. Not thread-safe.
class MappedRunList {
 public:
  // `mapped` must outlive this; what is there already stays as it is.
  explicit MappedRunList(std::vector<MappedRun>* mapped)
      : mapped_(mapped), first_(mapped->size()) {}

  void append(const MappedRun& run) {
    if (mapped_->size() > first_) {
      MappedRun& last = mapped_->back();
      if (last.iova.last() + 1 == run.iova.start() &&
          last.address + last.iova.size() == run.address) {
        last.iova = IovaRange::FromFirstAndLast(last.iova.start(), run.iova.last());
        return;
      }
    }
    mapped_->push_back(run);
  }
  std::span<const MappedRun> appended() const { return std::span(*mapped_).subspan(first_); }
  void take_back() {
    mapped_->erase(std::next(mapped_->begin(), static_cast<ptrdiff_t>(first_)), mapped_->end());
  }

 private:
  std::vector<MappedRun>* const mapped_;
  const size_t first_;
};

}  // namespace mvgpu::dma
