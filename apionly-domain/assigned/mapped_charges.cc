#include "apionly-domain/assigned/mapped_charges.h"

#include <vector>

#include "apionly-domain/base/check.h"

namespace mvgpu::domain {

MappedCharges::~MappedCharges() { MVGPU_CHECK(held_.empty()); }

Result<void> MappedCharges::hold(const Mapping& mapping) {
  if (row_ == nullptr) return {};
  const FileIdentity& file = mapping.file->identity();
  const PageRun pages = FilePagesOf(mapping);
  const auto known = held_.find(file);
  const std::vector<PageRun> fresh =
      known == held_.end() ? std::vector<PageRun>{pages} : known->second.uncovered(pages);
  for (size_t i = 0; i < fresh.size(); ++i) {
    if (auto held = row_->hold(file, mapping.file->pages(), fresh[i]); !held) {
      while (i > 0) row_->release(file, fresh[--i]);
      return held;
    }
  }
  held_[file].add(pages);
  row_->list_mapping({mapping.iova, mapping.access, file, mapping.file_offset});
  mapped_pages_ += pages.count;
  Publish();
  return {};
}

void MappedCharges::release(const Mapping& mapping) {
  if (row_ == nullptr) return;
  const auto held = held_.find(mapping.file->identity());
  MVGPU_CHECK(held != held_.end());
  const PageRun pages = FilePagesOf(mapping);
  for (const PageRun& run : held->second.remove(pages)) row_->release(held->first, run);
  if (held->second.empty()) held_.erase(held);
  row_->unlist_mapping(mapping.iova);
  mapped_pages_ -= pages.count;
  Publish();
}

void MappedCharges::set_locked_pages(uint64_t pages) {
  if (row_ != nullptr) row_->set_locked_pages(pages);
}

void MappedCharges::Publish() {
  row_->set_mapped_pages(mapped_pages_);
  row_->set_pinned_pages(mapped_pages_);
}

}  // namespace mvgpu::domain
