#include "apionly-domain/nested/container_target.h"

#include <fcntl.h>

#include <cerrno>

#include "apionly-domain/base/check.h"

namespace mvgpu::domain {

Result<void> ContainerTarget::map(IovaRange iova, GuestPhys start, Access access) {
  for (uint64_t done = 0; done < iova.size(); done += kPageSize) {
    auto mapped = MapPage(iova.start() + done, start + done, access);
    if (mapped) continue;
    if (done != 0) {
      unmap(IovaRange::FromFirstAndLast(iova.start(), iova.start() + (done - 1)));
    }
    return mapped;
  }
  return {};
}

Result<void> ContainerTarget::MapPage(Iova iova, GuestPhys page, Access access) {
  const Iova guest(page.value());
  std::byte* host = ApiOnlyDomain::Translator(guest_).translate(guest, access);
  // Pinned by who calls; so it is there, or about to be unmapped.
  if (host == nullptr) return Fail(ErrorCode::kBusy, "guest memory is being unmapped by the vmm");
  const auto whole = IovaRange::FromFirstAndLast(guest, guest + kPageMask);
  const FilePages backing = guest_.backing_of({whole, host});
  UniqueFd fd(fcntl(backing.file->fd(), F_DUPFD_CLOEXEC, 0));
  if (!fd.is_valid()) return FailSystem(errno, "dup of a file of guest memory");
  return container_.map({iova, kPageSize, access, std::move(fd), BytesIn(backing.pages.first)});
}

void ContainerTarget::unmap(IovaRange iova) {
  MVGPU_CHECK(container_.unmap(iova.start(), iova.size()).has_value());
}

}  // namespace mvgpu::domain
