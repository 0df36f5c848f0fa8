#include "backend/replay/page_account.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <utility>

namespace mvgpu::backend {

namespace {

class WatchedMapper final : public dma::Mapper {
 public:
  WatchedMapper(std::unique_ptr<dma::Mapper> inner, PageAccount* account)
      : inner_(std::move(inner)), account_(account) {}
  std::string_view name() const override { return inner_->name(); }
  Result<void> map(std::span<const domain::PinnedRun> runs, domain::Access access,
                   std::vector<dma::MappedRun>* mapped) override {
    const size_t first = mapped->size();
    MVGPU_RETURN_IF_ERROR(inner_->map(runs, access, mapped));
    for (size_t i = first; i < mapped->size(); ++i)
      account_->on_dma_map((*mapped)[i].iova, (*mapped)[i].address);
    return {};
  }
  void unmap(DmaAddr address, uint64_t size) override {
    account_->on_dma_unmap(address, size);
    inner_->unmap(address, size);
  }
  void flush() override { inner_->flush(); }
  bool is_current(const domain::PinnedRun& run, DmaAddr address) override {
    return inner_->is_current(run, address);
  }
  Figures figures() const override { return inner_->figures(); }

 private:
  const std::unique_ptr<dma::Mapper> inner_;
  PageAccount* const account_;  // outlives this, see PageAccount::Watch()
};

}  // namespace

std::unique_ptr<dma::Mapper> PageAccount::Watch(std::unique_ptr<dma::Mapper> inner) {
  return std::make_unique<WatchedMapper>(std::move(inner), this);
}

PageAccount::Row* PageAccount::Touch(uint64_t iova_page) {
  if (rows_.size() >= kMaxRows && !rows_.contains(iova_page)) {
    is_complete_ = false;
    return nullptr;
  }
  auto [it, is_new] = rows_.try_emplace(iova_page);
  Row& row = it->second;
  if (is_new) {
    const ReplayMemory::Place place = memory_.place_of(Iova(BytesIn(iova_page)));
    row.iova = BytesIn(iova_page);
    row.file = place.file;
    row.file_page = place.page;
    row.first_ns = now_ns_;
  }
  row.last_ns = now_ns_;
  return &row;
}

void PageAccount::on_read(Iova iova, uint64_t size) {
  while (size > 0) {
    const uint64_t part = std::min(size, kPageSize - iova.offset_in_page());
    if (Row* row = Touch(iova.page())) {
      ++row->reads;
      row->bytes_read += part;
    }
    iova = iova + part;
    size -= part;
  }
}

void PageAccount::on_dma_map(IovaRange range, DmaAddr address) {
  for (uint64_t i = 0; i < PagesIn(range.size()) && is_complete_; ++i) {
    Row* row = Touch(range.start().page() + i);
    if (row == nullptr) return;
    ++row->dma_maps;
    held_[address.value() + BytesIn(i)] = {range.start().page() + i, now_ns_};
  }
}

void PageAccount::on_dma_unmap(DmaAddr address, uint64_t size) {
  const auto begin = held_.lower_bound(address.value());
  auto it = begin;
  for (; it != held_.end() && it->first - address.value() < size; ++it) {
    Row& row = rows_.at(it->second.iova_page);
    row.held_ns += now_ns_ - it->second.since_ns;
    row.last_ns = now_ns_;
  }
  held_.erase(begin, it);
}

Result<void> PageAccount::write_csv(const std::string& path) const {
  std::unique_ptr<FILE, int (*)(FILE*)> file(std::fopen(path.c_str(), "we"), std::fclose);
  if (file == nullptr)
    return FailSystem(errno, fmt::format("cannot create the page account {}", path));
  fmt::print(file.get(),
             "iova,file,file_page,reads,bytes_read,dma_maps,held_us,first_us,last_us\n");
  for (const auto& [page, row] : rows_) {
    fmt::print(file.get(), "{:#x},{},{},{},{},{},{},{},{}\n", row.iova, row.file, row.file_page,
               row.reads, row.bytes_read, row.dma_maps, row.held_ns / 1000, row.first_ns / 1000,
               row.last_ns / 1000);
  }
  if (std::fflush(file.get()) != 0 || std::ferror(file.get()) != 0) {
    return FailSystem(errno, fmt::format("writing the page account {}", path));
  }
  return {};
}

}  // namespace mvgpu::backend
