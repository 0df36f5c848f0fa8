#include "apionly-domain/base/reserved_memory.h"

#include <sys/mman.h>

#include <cstdint>

#include "apionly-domain/base/check.h"

namespace mvgpu {

namespace {

// At `place`, if that is not null, instead of what was there.
void* Map(size_t size, int protection, void* place) {
  const int fixed = place == nullptr ? 0 : MAP_FIXED;
  void* mapped =
      mmap(place, size, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | fixed, -1, 0);
  MVGPU_CHECK(mapped != MAP_FAILED);  // out of address space
  return mapped;
}

// The kernel aligns mappings to pages only: what lies before and behind goes.
void* MapAligned(size_t size) {
  constexpr size_t kHuge = ReservedMemory::kHugePage;
  auto* const mapped = static_cast<std::byte*>(Map(size + kHuge, PROT_READ, nullptr));
  const size_t before = (kHuge - reinterpret_cast<uintptr_t>(mapped) % kHuge) % kHuge;
  if (before != 0) munmap(mapped, before);
  munmap(mapped + before + size, kHuge - before);
  return mapped + before;
}

}  // namespace

ReservedMemory::ReservedMemory(size_t size) : data_(MapAligned(size)), size_(size) {}

ReservedMemory::~ReservedMemory() { munmap(data_, size_); }

void ReservedMemory::open(size_t offset, size_t size) {
  Map(size, PROT_READ | PROT_WRITE, At(offset));
}

void ReservedMemory::close(size_t offset, size_t size) { Map(size, PROT_READ, At(offset)); }

void ReservedMemory::give_back(size_t offset, size_t size) {
  MVGPU_CHECK(madvise(At(offset), size, MADV_DONTNEED) == 0);
}

void ReservedMemory::make_huge(size_t offset, size_t size) {
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, younger than glibc 2.36
  madvise(At(offset), size, kCollapse);
}

}  // namespace mvgpu
