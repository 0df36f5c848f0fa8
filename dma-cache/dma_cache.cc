#include "dma-cache/dma_cache.h"

#include <fmt/format.h>

#include <utility>

#include "apionly-domain/base/check.h"

namespace mvgpu::dma {

DmaCache::DmaCache(domain::ApiOnlyDomain* domain, Mapper* mapper, Options options)
    : domain_(domain), pins_(domain->open_context(this)), mapper_(mapper), options_(options) {}

DmaCache::~DmaCache() {
  MutexLock lock(mutex_);
  MVGPU_CHECK(users_.empty());
  while (idle_.pages() != 0) {
    const PageRun idle = idle_.take_oldest(UINT64_MAX);
    DropLocked({&idle, 1});
  }
  MVGPU_CHECK(counters_.cached_pages == 0);
}

std::unique_ptr<DmaUser> DmaCache::open_user(DmaUser::Owner* owner) {
  std::unique_ptr<DmaUser> user(new DmaUser(this, &table_, domain_, owner));
  MutexLock lock(mutex_);
  users_.push_back(user.get());
  return user;
}

void DmaCache::CloseUser(DmaUser* user) {
  MutexLock revocation(revoke_mutex_);
  MutexLock lock(mutex_);
  MVGPU_CHECK(user->IsEmpty());
  std::erase(users_, user);
  const DmaUser::Figures figures = user->figures();
  counters_.map_calls += figures.map_calls;
  counters_.hit_pages += figures.hit_pages;
}

std::optional<DmaAddr> DmaCache::address_of(Iova iova) const {
  ReaderMutexLock lock(mutex_);
  const Table::Found found = table_.find(iova.page());
  if (found.word == 0 || (found.flags() & Table::kGoing) != 0) return std::nullopt;
  return DmaAddr(BytesIn(found.target()) | iova.offset_in_page());
}

std::vector<Iova> DmaCache::iovas_of(DmaAddr address) const {
  std::vector<Iova> iovas;
  ReaderMutexLock lock(mutex_);
  reverse_.for_each(address.page(), [&](uint64_t page) {
    if ((table_.find(page).flags() & Table::kGoing) != 0) return;
    iovas.emplace_back(BytesIn(page) | address.offset_in_page());
  });
  return iovas;
}

DmaCache::Counters DmaCache::counters() const {
  ReaderMutexLock lock(mutex_);
  Counters counters = counters_;
  for (DmaUser* user : users_) {
    const DmaUser::Figures figures = user->figures();
    counters.map_calls += figures.map_calls;
    counters.hit_pages += figures.hit_pages;
  }
  counters.idle_pages = idle_.pages();
  return counters;
}

Mapper::Figures DmaCache::mapper_figures() const {
  MutexLock lock(mutex_);
  return mapper_->figures();
}

Error DmaCache::NotContiguousError(PageRun pages) {
  const IovaRange range = RangeOf(pages);
  return Error(ErrorCode::kNotContiguous,
               fmt::format("the {} pages of iova {:#x}-{:#x} have no contiguous device address; "
                           "fall back to 4 KiB",
                           pages.count, range.start().value(), range.last().value()));
}

}  // namespace mvgpu::dma
