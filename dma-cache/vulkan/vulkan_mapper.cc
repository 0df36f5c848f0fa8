#include "dma-cache/vulkan/vulkan_mapper.h"

#include <algorithm>
#include <utility>

namespace mvgpu::dma {

namespace {

HostRange HostOf(const domain::PinnedRun& run) {
  const HostAddr start(reinterpret_cast<uintptr_t>(run.host));
  return HostRange::FromFirstAndLast(start, start + (run.iova.size() - 1));
}

// Appends a run, or lengthens the last one if it goes on there. The first `before` stay as they
// are.
void Append(const MappedRun& run, size_t before, std::vector<MappedRun>* mapped) {
  if (mapped->size() > before) {
    MappedRun& last = mapped->back();
    if (last.iova.last() + 1 == run.iova.start() &&
        last.address + last.iova.size() == run.address) {
      last.iova = IovaRange::FromFirstAndLast(last.iova.start(), run.iova.last());
      return;
    }
  }
  mapped->push_back(run);
}

}  // namespace

Result<void> VulkanMapper::map(std::span<const domain::PinnedRun> runs, domain::Access access,
                               std::vector<MappedRun>* mapped) {
  const size_t before = mapped->size();
  MutexLock lock(mutex_);
  for (const domain::PinnedRun& run : runs) {
    if (auto done = MapLocked(run, access, before, mapped); !done) {
      for (; mapped->size() > before; mapped->pop_back()) {
        pieces_.release(mapped->back().address, PagesIn(mapped->back().iova.size()));
      }
      pieces_.collect();
      return done;
    }
  }
  return {};
}

Result<void> VulkanMapper::MapLocked(const domain::PinnedRun& run, domain::Access access,
                                     size_t before, std::vector<MappedRun>* mapped) {
  domain::PinnedRun rest = run;
  while (true) {
    const HostRange host = HostOf(rest);
    ImportedPieces::Piece* piece = pieces_.find(host.start());
    if (piece == nullptr) {
      MVGPU_ASSIGN_OR_RETURN(piece, pieces_.import(host, ExtentOf(rest), access));
    }
    const uint64_t size = std::min(host.size(), piece->host().last() - host.start() + 1);
    pieces_.hold(piece, PagesIn(size));
    const Iova last = rest.iova.start() + (size - 1);
    Append({IovaRange::FromFirstAndLast(rest.iova.start(), last),
            piece->address() + (host.start() - piece->host().start())},
           before, mapped);
    if (last == rest.iova.last()) return {};
    rest = rest.slice(IovaRange::FromFirstAndLast(last + 1, rest.iova.last()));
  }
}

HostRange VulkanMapper::ExtentOf(const domain::PinnedRun& run) const {
  const HostRange host = HostOf(run);
  const std::optional<IovaRange> mapping =
      mapping_at_ ? mapping_at_(run.iova.start()) : std::nullopt;
  if (!mapping) return host;
  const HostAddr first(host.start().value() - (run.iova.start() - mapping->start()));
  return HostRange::FromFirstAndLast(first, first + (mapping->size() - 1));
}

void VulkanMapper::unmap(DmaAddr address, uint64_t size) {
  MutexLock lock(mutex_);
  pieces_.release(address, PagesIn(size));
}

void VulkanMapper::flush() {
  MutexLock lock(mutex_);
  pieces_.collect();
}

Mapper::Figures VulkanMapper::figures() const {
  ReaderMutexLock lock(mutex_);
  const ImportedPieces::Figures& now = pieces_.figures();
  return {{"pieces", now.pieces},
          {"import_bytes", now.bytes},
          {"mapped_pages", now.held},
          {"imports", now.imports},
          {"vulkan_calls", now.vulkan_calls}};
}

}  // namespace mvgpu::dma
