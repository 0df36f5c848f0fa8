#include "dma-cache/iommu_mapper.h"

#include <utility>

namespace mvgpu::dma {

using HostRun = domain::AssignedSpace::HostRun;

namespace {

IovaRange DeviceRange(DmaAddr address, uint64_t size) {
  return IovaRange::FromFirstAndLast(Iova(address.value()), Iova(address.value() + (size - 1)));
}

}  // namespace

Result<void> IommuMapper::map(std::span<const domain::PinnedRun> runs, domain::Access access,
                              std::vector<MappedRun>* mapped) {
  MappedRunList list(mapped);
  Fresh fresh;
  Result<void> done;
  for (const domain::PinnedRun& run : runs) {
    done = MapRun(run, access, &fresh, &list);
    if (!done) break;
  }
  if (done) done = MapFresh(&fresh, access, &list);
  if (!done) {
    for (const MappedRun& run : list.appended()) unmap(run.address, run.iova.size());
    flush();
    list.take_back();
  }
  return done;
}

// Finds the parts of the run that the device sees already; the others gather in `fresh`, together
// with those of the runs before.
Result<void> IommuMapper::MapRun(const domain::PinnedRun& run, domain::Access access, Fresh* fresh,
                                 MappedRunList* list) {
  for (domain::PinnedRun rest = run;;) {
    domain::AssignedDomain::Found found{std::nullopt, rest.iova_pages().count};
    if (assigned_ != nullptr) found = assigned_->use(rest, access);
    const IovaRange part = RangeOf({rest.iova.start().page(), found.pages});
    if (found.address) {
      if (auto done = MapFresh(fresh, access, list); !done) {
        assigned_->give_back(RangeOf({found.address->page(), found.pages}));
        return done;
      }
      shared_pages_ += found.pages;
      list->append({part, DmaAddr(found.address->value())});
    } else {
      if (fresh->runs.empty()) fresh->first = part.start();
      fresh->runs.push_back({rest.host, part.size()});
    }
    if (part.last() == rest.iova.last()) return {};
    rest = rest.slice(IovaRange::FromFirstAndLast(part.last() + 1, rest.iova.last()));
  }
}

Result<void> IommuMapper::MapFresh(Fresh* fresh, domain::Access access, MappedRunList* list) {
  const Fresh now = std::exchange(*fresh, {});
  if (now.runs.empty()) return {};
  auto done = MapInARow(now.first, now.runs, access, list);
  if (done || done.error().code() != ErrorCode::kLimit || now.runs.size() == 1) return done;
  // There may be no row that long.
  Iova first = now.first;
  for (const HostRun& run : now.runs) {
    MVGPU_RETURN_IF_ERROR(MapInARow(first, {&run, 1}, access, list));
    first = first + run.size;
  }
  return {};
}

Result<void> IommuMapper::MapInARow(Iova first, std::span<const HostRun> runs,
                                    domain::Access access, MappedRunList* list) {
  MVGPU_ASSIGN_OR_RETURN(const IovaRange device, space_->map(runs, access));
  own_.add(PagesOf(device));
  list->append({IovaRange::FromFirstAndLast(first, first + (device.size() - 1)),
                DmaAddr(device.start().value())});
  return {};
}

void IommuMapper::unmap(DmaAddr address, uint64_t size) {
  const PageRun pages = PagesOf(DeviceRange(address, size));
  own_.for_each_uncovered(pages, [this](PageRun part) {
    MVGPU_CHECK(assigned_ != nullptr);
    assigned_->give_back(RangeOf(part));
    shared_pages_ -= part.count;
  });
  own_.for_each(pages, [this](PageRun part) { space_->unmap(RangeOf(part)); });
  own_.clear(pages);
}

bool IommuMapper::is_current(const domain::PinnedRun& run, DmaAddr address) {
  return space_->shows(DeviceRange(address, run.iova.size()), run.host);
}

Mapper::Figures IommuMapper::figures() const {
  const domain::AssignedSpace::Counters counters = space_->counters();
  return {{"allocated_pages", own_.unique_pages()},
          {"shared_pages", shared_pages_},
          {"iommu_mappings", counters.mappings},
          {"lost_pages", counters.lost_pages},
          {"cuts", counters.cuts}};
}

}  // namespace mvgpu::dma
