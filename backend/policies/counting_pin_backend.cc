#include "backend/policies/counting_pin_backend.h"

#include <algorithm>

namespace mvgpu::backend {

void CountingPinBackend::set_time(uint64_t now_ns) {
  figures_.page_ns +=
      static_cast<double>(figures_.pinned_pages) * static_cast<double>(now_ns - now_ns_);
  now_ns_ = now_ns;
}

Result<void> CountingPinBackend::pin(const domain::GuestFile& file, PageRun pages) {
  MVGPU_RETURN_IF_ERROR(inner_->pin(file, pages));
  ++figures_.pin_calls;
  figures_.pages_pinned += pages.count;
  figures_.pinned_pages += pages.count;
  figures_.peak_pages = std::max(figures_.peak_pages, figures_.pinned_pages);
  std::vector<bool>& seen = seen_[file.identity()];
  seen.resize(std::max<size_t>(seen.size(), pages.end()));
  for (uint64_t page = pages.first; page < pages.end(); ++page) {
    if (seen[page]) ++figures_.repinned_pages;
    seen[page] = true;
  }
  return {};
}

void CountingPinBackend::unpin(const domain::GuestFile& file, PageRun pages) {
  inner_->unpin(file, pages);
  ++figures_.unpin_calls;
  figures_.pinned_pages -= pages.count;
}

}  // namespace mvgpu::backend
