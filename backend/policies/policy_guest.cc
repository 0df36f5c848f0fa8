#include "backend/policies/policy_guest.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "apionly-domain/base/check.h"

namespace mvgpu::backend {

namespace {

Result<UniqueFd> MakeMemory(uint64_t size) {
  UniqueFd fd(memfd_create("mvgpu-policy", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd.is_valid() || ftruncate(fd.get(), static_cast<off_t>(size)) != 0 ||
      fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK) != 0) {
    return FailSystem(errno, fmt::format("cannot make {} bytes of guest memory", size));
  }
  return fd;
}

Result<UniqueFd> Duplicate(const UniqueFd& fd) {
  UniqueFd copy(fcntl(fd.get(), F_DUPFD_CLOEXEC, 0));
  if (!copy.is_valid()) return FailSystem(errno, "cannot duplicate a descriptor of guest memory");
  return copy;
}

}  // namespace

Result<std::unique_ptr<PolicyGuest>> PolicyGuest::Create(
    const DmaTrace& trace, std::unique_ptr<domain::PinBackend> backend) {
  std::unique_ptr<PolicyGuest> guest(new PolicyGuest(trace));
  MVGPU_RETURN_IF_ERROR(guest->Begin(std::move(backend)));
  return guest;
}

Result<void> PolicyGuest::Begin(std::unique_ptr<domain::PinBackend> backend) {
  auto counting = std::make_unique<CountingPinBackend>(std::move(backend), &figures_);
  backend_ = counting.get();
  MVGPU_ASSIGN_OR_RETURN(domain_, domain::ApiOnlyDomain::Create(
                                      {.name = "policy"}, std::move(counting), nullptr, nullptr));
  MVGPU_RETURN_IF_ERROR(container_.attach(domain_.get()));
  auto iommu = std::make_unique<domain::SoftwareIommu>();
  iommu_ = iommu.get();
  // Identity-mapped guest memory comes from below, so others are handed out from above.
  space_ = std::make_unique<domain::AssignedSpace>(
      std::move(iommu), domain::AssignedSpace::Options{.prefer_below = Iova(0)});
  MVGPU_ASSIGN_OR_RETURN(const UniqueFd file, MakeMemory(BytesIn(trace_.memory_pages())));
  uint64_t offset = 0;
  for (const IovaRange& range : trace_.memory) {
    MVGPU_ASSIGN_OR_RETURN(UniqueFd fd, Duplicate(file));
    MVGPU_RETURN_IF_ERROR(container_.map(
        {range.start(), range.size(), domain::Access::kReadWrite, std::move(fd), offset}));
    offset += range.size();
  }
  return {};
}

PolicyGuest::~PolicyGuest() {
  if (domain_ != nullptr) static_cast<void>(container_.detach(domain_.get()));
  if (extra_ != nullptr) munmap(extra_, extra_size_);
}

IovaRange PolicyGuest::memory_around(Iova iova) const {
  const auto found = std::find_if(trace_.memory.begin(), trace_.memory.end(),
                                  [&](const IovaRange& range) { return range.contains(iova); });
  MVGPU_CHECK(found != trace_.memory.end());
  return *found;
}

Result<PolicyGuest::Extra> PolicyGuest::add_extra(uint64_t size) {
  MVGPU_CHECK(extra_ == nullptr);
  MVGPU_ASSIGN_OR_RETURN(UniqueFd file, MakeMemory(size));
  void* view = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, file.get(), 0);
  if (view == MAP_FAILED) return FailSystem(errno, fmt::format("mmap of {} bytes", size));
  extra_ = static_cast<std::byte*>(view);
  extra_size_ = size;
  const Iova start(std::max<uint64_t>(trace_.memory.back().last().value() + 1, uint64_t{4} << 30));
  MVGPU_RETURN_IF_ERROR(
      container_.map({start, size, domain::Access::kReadWrite, std::move(file), 0}));
  return Extra{start, extra_};
}

}  // namespace mvgpu::backend
