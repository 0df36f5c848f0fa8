#pragma once

#include <functional>
#include <memory>
#include <optional>

#include "apionly-domain/base/address.h"
#include "apionly-domain/base/mutex.h"
#include "dma-cache/mapper.h"
#include "dma-cache/vulkan/imported_pieces.h"
#include "dma-cache/vulkan/vulkan_device.h"

namespace mvgpu::dma {

// Maps guest pages for a Vulkan device: the address of a page is a buffer device address, which the
// device's shaders and copies use as it is.
//
// Guest memory is imported in pieces (imported_pieces.h). A page of a piece that is imported costs
// no Vulkan call; a piece is imported with the first of its pages and goes with the last.
//
// What a piece reaches beyond the pages that are mapped
//   - A piece never reaches beyond one mapping of the VMM. When the VMM takes that mapping away
//     its pages are revoked, and the pieces in it go with the flush(), before the host memory goes.
//     Only where the VMM cuts a part out of a mapping, or maps the same memory twice, a piece stays
//     with the pages that are left, and that part with it.
//   - The device could reach the other pages of a piece. Whoever drives it must give it addresses
//     that map() returned, and none else. Pages it is not given are not touched.
//   - Drivers of GPUs hold the memory of a piece as long as it is imported: it can be up to a piece
//     for each page that is pinned (figure import_bytes), beyond what the VM is charged for.
//   - libdrm asks amdgpu to import anonymous memory only (AMDGPU_GEM_USERPTR_ANONONLY): drivers
//     that import through it refuse guest memory, which has a file: kNotReachable.
//   - Vulkan has no import for reading only. A device can write wherever it is given an address, so
//     access for reading only is up to whoever drives it, too. Memory that this process itself
//     cannot write is refused by drivers: kPermission.
//
// Thread-safe. Its lock comes after those of the cache; it asks MappingAt with it held.
class VulkanMapper final : public Mapper {
 public:
  // The VMM's mapping around an address that is pinned; called where something is imported.
  using MappingAt = std::function<std::optional<IovaRange>(Iova)>;
  struct Options {
    uint64_t piece_bytes = ImportedPieces::kPieceBytes;
    MappingAt mapping_at;  // empty: exactly the runs that are mapped are imported
  };

  explicit VulkanMapper(std::unique_ptr<VulkanDevice> device, Options options)
      : VulkanMapper(device->target(), std::move(options)) {
    device_ = std::move(device);
  }
  // For a device that belongs to somebody else, a renderer for instance; it outlives the mapper.
  VulkanMapper(const ImportTarget& target, Options options)
      : mapping_at_(std::move(options.mapping_at)), pieces_(target, options.piece_bytes) {}

  std::string_view name() const override { return "vulkan"; }
  Result<void> map(std::span<const domain::PinnedRun> runs, domain::Access access,
                   std::vector<MappedRun>* mapped) override;
  Result<void> map_apart(std::span<const domain::PinnedRun> runs, domain::Access access,
                         std::vector<MappedRun>* mapped) override {
    return map(runs, access, mapped);
  }
  void unmap(DmaAddr address, uint64_t size) override;
  void flush() override;
  // pieces, import_bytes, mapped_pages: now. imports, vulkan_calls: since creation.
  Figures figures() const override;

 private:
  // Appends to `mapped`, of which the first `before` are not this call's.
  Result<void> MapLocked(const domain::PinnedRun& run, domain::Access access, size_t before,
                         std::vector<MappedRun>* mapped) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // The host memory around the beginning of a run that one mapping covers.
  HostRange ExtentOf(const domain::PinnedRun& run) const;

  std::unique_ptr<VulkanDevice> device_;  // may be null; goes after the pieces
  const MappingAt mapping_at_;
  mutable Mutex mutex_;
  ImportedPieces pieces_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace mvgpu::dma
