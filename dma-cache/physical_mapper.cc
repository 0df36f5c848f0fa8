#include "dma-cache/physical_mapper.h"

#include <fmt/format.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>

#include "dma-cache/mapped_run_list.h"

namespace mvgpu::dma {

namespace {

// Entries read with one system call: 4 KiB of them, the pages of 2 MiB.
constexpr size_t kBatch = 512;

tl::unexpected<Error> HiddenError() {
  return Fail(ErrorCode::kPermission,
              "the kernel hides page frame numbers from this process (they read as 0 in "
              "/proc/self/pagemap); run it with CAP_SYS_ADMIN of the host, or use --dma=iommu");
}

Result<DmaAddr> AddressOf(Pagemap::Entry entry, Iova iova) {
  if (!entry.is_present()) {
    return Fail(ErrorCode::kNotReachable,
                fmt::format("the page at iova {:#x} is not in memory ({}), so it has no physical "
                            "address; pins must hold pages there, use --pin=io-uring or "
                            "--pin=mlock",
                            iova.value(), entry.is_swapped() ? "swapped out" : "never touched"));
  }
  if (entry.frame() == 0) return HiddenError();
  return DmaAddr(BytesIn(entry.frame()));
}

}  // namespace

Result<std::unique_ptr<PhysicalMapper>> PhysicalMapper::Create(const std::string& pagemap_path) {
  MVGPU_ASSIGN_OR_RETURN(Pagemap pagemap, Pagemap::Open(pagemap_path));
  // A page that is surely there: the one that this variable is in.
  Pagemap::Entry own;
  MVGPU_RETURN_IF_ERROR(pagemap.read(reinterpret_cast<const std::byte*>(&own), {&own, 1}));
  if (own.is_present() && own.frame() == 0) return HiddenError();
  return std::unique_ptr<PhysicalMapper>(new PhysicalMapper(std::move(pagemap)));
}

template <typename Visit>
Result<void> PhysicalMapper::ForEachEntry(const domain::PinnedRun& run, Visit visit) const {
  std::array<Pagemap::Entry, kBatch> batch;
  const uint64_t pages = run.iova_pages().count;
  for (uint64_t first = 0; first < pages; first += kBatch) {
    const std::span entries =
        std::span(batch).first(static_cast<size_t>(std::min<uint64_t>(kBatch, pages - first)));
    MVGPU_RETURN_IF_ERROR(pagemap_.read(run.host + BytesIn(first), entries));
    for (size_t i = 0; i < entries.size(); ++i) {
      if (entries[i].is_swapped()) {
        MVGPU_ASSIGN_OR_RETURN(entries[i], EntryAfterMigration(run.host + BytesIn(first + i)));
      }
      MVGPU_RETURN_IF_ERROR(visit(first + i, entries[i]));
    }
  }
  return {};
}

// A page that the kernel is moving, or tries in vain to move because it is pinned, reads as swapped
// out (a migration entry) meanwhile; a fault waits for the end of that. Populating is the fault
// that a truncated file can't turn into SIGBUS.
Result<Pagemap::Entry> PhysicalMapper::EntryAfterMigration(std::byte* page) const {
  madvise(page, kPageSize, MADV_POPULATE_READ);
  Pagemap::Entry entry;
  MVGPU_RETURN_IF_ERROR(pagemap_.read(page, {&entry, 1}));
  return entry;
}

Result<void> PhysicalMapper::map(std::span<const domain::PinnedRun> runs, domain::Access,
                                 std::vector<MappedRun>* mapped) {
  MappedRunList list(mapped);
  uint64_t pages = 0;
  for (const domain::PinnedRun& run : runs) {
    auto done = ForEachEntry(run, [&](uint64_t page, Pagemap::Entry entry) -> Result<void> {
      const Iova iova = run.iova.start() + BytesIn(page);
      MVGPU_ASSIGN_OR_RETURN(const DmaAddr address, AddressOf(entry, iova));
      list.append({IovaRange::FromFirstAndLast(iova, iova + kPageMask), address});
      return {};
    });
    if (!done) {
      list.take_back();
      return done;
    }
    pages += run.iova_pages().count;
  }
  mapped_pages_ += pages;
  return {};
}

void PhysicalMapper::unmap(DmaAddr, uint64_t size) { mapped_pages_ -= PagesIn(size); }

bool PhysicalMapper::is_current(const domain::PinnedRun& run, DmaAddr address) {
  uint64_t moved = 0;
  const auto looked = ForEachEntry(run, [&](uint64_t page, Pagemap::Entry entry) -> Result<void> {
    const uint64_t frame = (address + BytesIn(page)).page();
    if (!entry.is_present() || entry.frame() != frame) ++moved;
    return {};
  });
  moved_pages_ += moved;
  return looked && moved == 0;
}

Mapper::Figures PhysicalMapper::figures() const {
  return {{"mapped_pages", mapped_pages_}, {"moved_pages", moved_pages_}};
}

}  // namespace mvgpu::dma
