#include "backend/policies/shown_pages.h"

#include "apionly-domain/access.h"
#include "apionly-domain/base/check.h"

namespace mvgpu::backend {

Result<void> ShownPages::add(const domain::PinnedRun& run) {
  const PageRun pages = PagesOf(run.iova);
  for (uint64_t page = pages.first; page < pages.end();) {
    uint64_t end = page;
    while (end < pages.end() && users_[end]++ == 0) ++end;
    if (end > page) {
      const PageRun fresh{page, end - page};
      auto shown = space_.map_at(RangeOf(fresh), run.host + BytesIn(page - pages.first),
                                 domain::Access::kReadWrite);
      if (!shown) {
        for (uint64_t at = page; at < end; ++at) users_.erase(at);
        if (end < pages.end()) --users_[end];
        if (page > pages.first) remove({pages.first, page - pages.first});
        return shown;
      }
    }
    page = end + (end < pages.end() ? 1 : 0);
  }
  return {};
}

void ShownPages::remove(PageRun pages) {
  bool is_any_gone = false;
  for (uint64_t page = pages.first; page < pages.end();) {
    uint64_t end = page;
    for (; end < pages.end(); ++end) {
      const auto found = users_.find(end);
      MVGPU_CHECK(found != users_.end());
      if (--found->second != 0) break;
      users_.erase(found);
    }
    if (end > page) {
      space_.unmap(RangeOf({page, end - page}));
      is_any_gone = true;
    }
    page = end + (end < pages.end() ? 1 : 0);
  }
  if (is_any_gone) space_.flush();
}

}  // namespace mvgpu::backend
