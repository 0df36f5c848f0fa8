#include "backend/replay/replay_memory.h"

#include <fmt/format.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <iterator>
#include <utility>

namespace mvgpu::backend {

Result<UniqueFd> ReplayMemory::MakeFile() {
  UniqueFd fd(memfd_create("replay-guest-memory", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd.is_valid()) return FailSystem(errno, "memfd_create for replayed guest memory");
  return fd;
}

Result<UniqueFd> ReplayMemory::open_file(uint64_t number, uint64_t size) {
  if (size == 0 || size > kMaxFileBytes) {
    return Fail(ErrorCode::kCorrupt,
                fmt::format("guest memory file {} of {} bytes; 1 to {} are possible", number, size,
                            kMaxFileBytes));
  }
  if (!files_.contains(number) && files_.size() >= kMaxFiles) {
    return Fail(ErrorCode::kCorrupt, fmt::format("more than {} guest memory files", kMaxFiles));
  }
  File& file = files_[number];
  if (!file.fd.is_valid()) {
    MVGPU_ASSIGN_OR_RETURN(file.fd, MakeFile());
  }
  if (size > file.size) {
    if (ftruncate(file.fd.get(), static_cast<off_t>(size)) != 0) {
      return FailSystem(errno, fmt::format("making replayed guest memory {} bytes long", size));
    }
    file.size = size;
  }
  UniqueFd duplicate(dup(file.fd.get()));
  if (!duplicate.is_valid()) return FailSystem(errno, "dup of replayed guest memory");
  return duplicate;
}

void ReplayMemory::map(IovaRange range, uint64_t file, uint64_t file_offset) {
  mappings_.insert_or_assign(range.start().value(),
                             Mapping{range, file, file == 0 ? 0 : file_offset, {}});
}

void ReplayMemory::unmap(Iova start, uint64_t size) {
  const auto range = IovaRange::FromStartAndSize(start, size);
  if (!range) return;
  std::erase_if(mappings_, [&](const auto& entry) { return range->contains(entry.second.range); });
}

const ReplayMemory::Mapping* ReplayMemory::find(Iova iova) const {
  auto it = mappings_.upper_bound(iova.value());
  if (it == mappings_.begin()) return nullptr;
  const Mapping& mapping = std::prev(it)->second;
  return mapping.range.contains(iova) ? &mapping : nullptr;
}

ReplayMemory::Mapping* ReplayMemory::find(Iova iova) {
  return const_cast<Mapping*>(std::as_const(*this).find(iova));
}

Result<int> ReplayMemory::FdOf(Mapping& mapping) {
  if (mapping.file != 0) return files_.at(mapping.file).fd.get();
  if (!mapping.own.is_valid()) {
    MVGPU_ASSIGN_OR_RETURN(mapping.own, MakeFile());
  }
  return mapping.own.get();
}

Result<void> ReplayMemory::put(Iova iova, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    Mapping* mapping = find(iova);
    if (mapping == nullptr) {
      return Fail(
          ErrorCode::kCorrupt,
          fmt::format("guest bytes at iova {:#x}, which is not mapped there", iova.value()));
    }
    const uint64_t left = mapping->range.last() - iova + 1;
    const auto piece = bytes.first(std::min<uint64_t>(bytes.size(), left));
    const uint64_t offset = mapping->offset + (iova - mapping->range.start());
    MVGPU_ASSIGN_OR_RETURN(const int fd, FdOf(*mapping));
    const ssize_t written = pwrite(fd, piece.data(), piece.size(), static_cast<off_t>(offset));
    if (written != static_cast<ssize_t>(piece.size())) {
      return FailSystem(written < 0 ? errno : ENOSPC, "writing replayed guest memory");
    }
    bytes = bytes.subspan(piece.size());
    iova = iova + piece.size();
  }
  return {};
}

// One mapping at a time: the domain asks for each on its own. What was never put is zero.
Result<void> ReplayMemory::read(Iova iova, std::span<std::byte> destination) {
  Mapping* mapping = find(iova);
  if (mapping == nullptr || mapping->range.last() - iova < destination.size() - 1) {
    return Fail(ErrorCode::kNotReachable,
                fmt::format("{} guest bytes at iova {:#x} are not mapped in one piece",
                            destination.size(), iova.value()));
  }
  std::ranges::fill(destination, std::byte{0});
  if (!mapping->own.is_valid()) return {};
  const uint64_t offset = mapping->offset + (iova - mapping->range.start());
  if (pread(mapping->own.get(), destination.data(), destination.size(),
            static_cast<off_t>(offset)) < 0) {
    return FailSystem(errno, "reading replayed guest memory");
  }
  return {};
}

ReplayMemory::Place ReplayMemory::place_of(Iova iova) const {
  const Mapping* mapping = find(iova);
  if (mapping == nullptr || mapping->file == 0) return {};
  return {mapping->file, PagesIn(mapping->offset + (iova - mapping->range.start()))};
}

}  // namespace mvgpu::backend
