#include "apionly-domain/pin/mapped_files.h"

#include <algorithm>
#include <iterator>

#include "apionly-domain/base/check.h"

namespace mvgpu::domain {

void MappedFiles::add(const Mapping& mapping) {
  last_ = nullptr;  // what is in a B-tree moves
  File& file = files_[mapping.file->host_address(0)];
  file.file = mapping.file.get();
  const PageRun iova = PagesOf(mapping.iova);
  const uint64_t file_page = PagesIn(mapping.file_offset);
  file.views.emplace(iova.first, View{iova, file_page});
  file.mapped.add({file_page, iova.count});
}

void MappedFiles::remove(const Mapping& mapping) {
  last_ = nullptr;
  const auto file = files_.find(mapping.file->host_address(0));
  MVGPU_CHECK(file != files_.end());
  const PageRun gone = PagesOf(mapping.iova);
  auto it = std::prev(file->second.views.upper_bound(gone.first));
  const View view = it->second;
  MVGPU_CHECK(view.iova.contains(gone.first) && gone.end() <= view.iova.end());
  file->second.views.erase(it);
  if (gone.first > view.iova.first) {
    const PageRun before{view.iova.first, gone.first - view.iova.first};
    file->second.views.emplace(before.first, View{before, view.file_page});
  }
  if (gone.end() < view.iova.end()) {
    const PageRun behind{gone.end(), view.iova.end() - gone.end()};
    const uint64_t skipped = behind.first - view.iova.first;
    file->second.views.emplace(behind.first, View{behind, view.file_page + skipped});
  }
  file->second.mapped.remove({PagesIn(mapping.file_offset), gone.count});
  if (file->second.views.empty()) files_.erase(file);
}

FilePages MappedFiles::at(const std::byte* host, uint64_t pages) const {
  const GuestFile* file = FileAt(host).file;
  const uint64_t first = PagesIn(static_cast<uint64_t>(host - file->host_address(0)));
  return {file, {first, std::min(pages, file->pages() - first)}};
}

const MappedFiles::File& MappedFiles::FindFileAt(const std::byte* host) const {
  const auto next = files_.upper_bound(host);
  MVGPU_CHECK(next != files_.begin());
  last_ = &std::prev(next)->second;
  MVGPU_CHECK(last_->contains(host));
  return *last_;
}

std::vector<MappedFiles::View> MappedFiles::aliases(const FilePages& pages) const {
  std::vector<View> found;
  if (!has_aliases(*pages.file)) return found;
  for (const auto& [first, view] : FileAt(pages.file->host_address(0)).views) {
    const uint64_t start = std::max(view.file_page, pages.pages.first);
    const uint64_t end = std::min(view.file_page + view.iova.count, pages.pages.end());
    if (start >= end) continue;
    found.push_back({{view.iova.first + (start - view.file_page), end - start}, start});
  }
  return found;
}

}  // namespace mvgpu::domain
