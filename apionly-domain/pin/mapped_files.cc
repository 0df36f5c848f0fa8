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
  AddView(file, {iova, file_page});
  if (is_indexed_) by_identity_[mapping.file->identity()] = mapping.file->host_address(0);
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
  file->second.by_file_page.erase({view.file_page, view.iova.first});
  if (gone.first > view.iova.first) {
    const PageRun before{view.iova.first, gone.first - view.iova.first};
    AddView(file->second, {before, view.file_page});
  }
  if (gone.end() < view.iova.end()) {
    const PageRun behind{gone.end(), view.iova.end() - gone.end()};
    const uint64_t skipped = behind.first - view.iova.first;
    AddView(file->second, {behind, view.file_page + skipped});
  }
  file->second.mapped.remove({PagesIn(mapping.file_offset), gone.count});
  if (!file->second.views.empty()) return;
  files_.erase(file);
  by_identity_.erase(mapping.file->identity());
}

void MappedFiles::AddView(File& file, const View& view) {
  file.views.emplace(view.iova.first, view);
  if (is_indexed_) file.by_file_page.emplace(view.file_page, view.iova.first);
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

void MappedFiles::AppendPart(const View& view, PageRun pages, std::vector<View>* found) {
  const uint64_t start = std::max(view.file_page, pages.first);
  const uint64_t end = std::min(view.file_page + view.iova.count, pages.end());
  if (start >= end) return;
  found->push_back({{view.iova.first + (start - view.file_page), end - start}, start});
}

std::vector<MappedFiles::View> MappedFiles::aliases(const FilePages& pages) const {
  std::vector<View> found;
  if (!has_aliases(*pages.file)) return found;
  for (const auto& [first, view] : FileAt(pages.file->host_address(0)).views) {
    AppendPart(view, pages.pages, &found);
  }
  return found;
}

std::vector<MappedFiles::View> MappedFiles::views(const FilePages& pages) const {
  MVGPU_CHECK(is_indexed_);
  if (has_aliases(*pages.file)) return aliases(pages);
  // No page twice: of the views that begin before the pages only the last one can reach them.
  const File& file = FileAt(pages.file->host_address(0));
  std::vector<View> found;
  auto it = file.by_file_page.upper_bound({pages.pages.first, UINT64_MAX});
  if (it != file.by_file_page.begin()) --it;
  for (; it != file.by_file_page.end() && it->first < pages.pages.end(); ++it) {
    AppendPart(file.views.at(it->second), pages.pages, &found);
  }
  return found;
}

const GuestFile* MappedFiles::find(const FileIdentity& identity) const {
  MVGPU_CHECK(is_indexed_);
  const auto found = by_identity_.find(identity);
  return found == by_identity_.end() ? nullptr : FileAt(found->second).file;
}

}  // namespace mvgpu::domain
