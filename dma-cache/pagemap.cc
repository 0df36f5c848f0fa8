#include "dma-cache/pagemap.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <bit>
#include <cerrno>
#include <cstring>

#include "apionly-domain/base/address.h"

namespace mvgpu::dma {

static_assert(sizeof(Pagemap::Entry) == sizeof(uint64_t));  // as the kernel writes them

Result<Pagemap> Pagemap::Open(const std::string& path) {
  UniqueFd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd.is_valid() && (errno == EACCES || errno == EPERM)) {
    return Fail(ErrorCode::kPermission,
                fmt::format("this process may not open {} for host physical addresses ({}); run it "
                            "with CAP_SYS_ADMIN of the host, or use --dma=iommu",
                            path, std::strerror(errno)));
  }
  if (!fd.is_valid()) {
    return FailSystem(errno, fmt::format("open of {} for host physical addresses", path));
  }
  return Pagemap(std::move(fd), path);
}

Result<void> Pagemap::read(const std::byte* host, std::span<Entry> entries) const {
  const uint64_t page = std::bit_cast<uint64_t>(host) >> kPageShift;
  const auto offset = static_cast<off_t>(page * sizeof(Entry));
  const ssize_t done = pread(fd_.get(), entries.data(), entries.size_bytes(), offset);
  if (done < 0) {
    return FailSystem(errno, fmt::format("read of {} entries of {}", entries.size(), path_));
  }
  if (static_cast<size_t>(done) != entries.size_bytes()) {
    return FailSystem(EIO, fmt::format("read of {} entries of {} gave {} bytes instead of {}",
                                       entries.size(), path_, done, entries.size_bytes()));
  }
  return {};
}

}  // namespace mvgpu::dma
