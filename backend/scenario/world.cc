#include "backend/scenario/world.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <system_error>

#include "apionly-domain/memory/guarded_copy.h"

namespace mvgpu::backend::scenario {

namespace {

constexpr uint64_t kMostBytesShown = 32;

}  // namespace

Result<PrivateDir> PrivateDir::Create() {
  const char* const parent = std::getenv("TMPDIR");
  std::string path = fmt::format("{}/mvgpu-scenario-XXXXXX", parent == nullptr ? "/tmp" : parent);
  if (mkdtemp(path.data()) == nullptr) {
    return FailSystem(errno, fmt::format("cannot make a directory {}; see TMPDIR", path));
  }
  return PrivateDir(std::move(path));
}

PrivateDir::~PrivateDir() {
  if (path_.empty()) return;
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

Result<std::unique_ptr<Guest>> Guest::Create(uint64_t memory_size, PinMode pin) {
  MVGPU_ASSIGN_OR_RETURN(PrivateDir dir, PrivateDir::Create());
  std::unique_ptr<Guest> guest(new Guest(std::move(dir)));
  MVGPU_RETURN_IF_ERROR(guest->MakeMemory(memory_size));
  MVGPU_ASSIGN_OR_RETURN(guest->ledger_,
                         domain::Ledger::Open({guest->dir_.path(), std::string(kUuid)}));
  MVGPU_ASSIGN_OR_RETURN(auto backend, MakePinBackend(pin));
  MVGPU_ASSIGN_OR_RETURN(
      guest->domain_,
      domain::ApiOnlyDomain::Create({}, std::move(backend), guest->ledger_.get(), nullptr));
  MVGPU_RETURN_IF_ERROR(guest->container_.attach(guest->domain_.get()));
  return guest;
}

Guest::~Guest() {
  if (domain_ != nullptr) {
    static_cast<void>(container_.unmap_all());
    static_cast<void>(container_.detach(domain_.get()));
    domain_.reset();
  }
  if (view_ != nullptr) munmap(view_, size_);
}

Result<void> Guest::MakeMemory(uint64_t size) {
  if (size == 0 || size > kMostMemory || size % kPageSize != 0) {
    return Fail(
        ErrorCode::kInvalid,
        fmt::format("{} bytes of memory: give whole pages of 4096, at most {}", size, kMostMemory));
  }
  fd_.reset(memfd_create("guest-ram", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd_.is_valid() || ftruncate(fd_.get(), static_cast<off_t>(size)) != 0 ||
      fcntl(fd_.get(), F_ADD_SEALS, F_SEAL_SHRINK) != 0) {
    return FailSystem(errno, fmt::format("cannot make {} bytes of guest memory", size));
  }
  void* const view = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd_.get(), 0);
  if (view == MAP_FAILED) return FailSystem(errno, "cannot map guest memory");
  view_ = static_cast<std::byte*>(view);
  size_ = size;
  return {};
}

Result<std::byte*> Guest::at(uint64_t place, uint64_t size) {
  if (place > size_ || size > size_ - place) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("{} bytes at {:#x} are not in guest memory, which ends at {:#x}", size,
                            place, size_));
  }
  return view_ + place;
}

Result<void> Guest::store64(uint64_t place, uint64_t value) {
  MVGPU_ASSIGN_OR_RETURN(std::byte* const at_place, at(place, sizeof(value)));
  std::memcpy(at_place, &value, sizeof(value));
  return {};
}

Result<uint64_t> Guest::load64(uint64_t place) {
  uint64_t value = 0;
  MVGPU_ASSIGN_OR_RETURN(const std::byte* const at_place, at(place, sizeof(value)));
  std::memcpy(&value, at_place, sizeof(value));
  return value;
}

Result<domain::LedgerSnapshot> Guest::accounts() const {
  MVGPU_ASSIGN_OR_RETURN(const auto dir, domain::RuntimeDir::OpenForReading(dir_.path()));
  return domain::ReadLedger(dir, std::string(kUuid));
}

Result<void> World::make_memory(uint64_t size) {
  if (guest_ != nullptr) return Fail(ErrorCode::kInvalid, "the guest has its memory already");
  MVGPU_ASSIGN_OR_RETURN(guest_, Guest::Create(size, pin_));
  return {};
}

Result<Guest*> World::guest() {
  if (guest_ == nullptr) {
    return Fail(ErrorCode::kInvalid, "there is no guest memory yet: 'memory SIZE' comes first");
  }
  return guest_.get();
}

Error World::MissingPart(std::string_view maker) {
  return Error(ErrorCode::kInvalid, fmt::format("'{}' comes before this", maker));
}

Error World::PartExists(std::string_view maker) {
  return Error(ErrorCode::kInvalid, fmt::format("'{}' may be there once", maker));
}

World::Left World::end() {
  Left left;
  for (auto& part : parts_) {
    if (part != nullptr) {
      const Left of_part = part->end();
      left.pinned_pages += of_part.pinned_pages;
      left.locked_pages += of_part.locked_pages;
      left.mappings += of_part.mappings;
      left.charged_pages += of_part.charged_pages;
    }
    part.reset();
  }
  if (guest_ == nullptr) return left;
  static_cast<void>(guest_->container().unmap_all());
  const auto counters = guest_->domain().counters();
  left.pinned_pages += counters.pinned_pages;
  left.locked_pages += counters.locked_pages;
  left.mappings += guest_->container().totals().mappings;
  const auto accounts = guest_->accounts();
  left.charged_pages += accounts ? accounts->charged_pages() : counters.charged_pages;
  return left;
}

domain::Access AccessOfWord(std::string_view word) {
  if (word == "r") return domain::Access::kRead;
  return word == "w" ? domain::Access::kWrite : domain::Access::kReadWrite;
}

std::string_view WordOfAccess(domain::Access access) {
  constexpr std::array<std::string_view, 4> kWords{"-", "r", "w", "rw"};
  return kWords[static_cast<size_t>(access)];
}

Result<IovaRange> RangeFrom(uint64_t start, uint64_t size) {
  const auto range = IovaRange::FromStartAndSize(Iova(start), size);
  if (range) return *range;
  return Fail(ErrorCode::kInvalid,
              fmt::format("{:#x} bytes from {:#x} on are no range of addresses", size, start));
}

Result<void> CheckBounds(std::string_view what, uint64_t value, uint64_t low, uint64_t high) {
  if (value >= low && value <= high) return {};
  return Fail(ErrorCode::kInvalid,
              fmt::format("{} {:#x} is not between {:#x} and {:#x}", what, value, low, high));
}

std::string HexOf(std::span<const std::byte> bytes) {
  std::string hex;
  for (const std::byte byte : bytes) hex += fmt::format("{:02x}", static_cast<unsigned>(byte));
  return hex;
}

Result<std::string> DeviceBytes(const std::byte* host, uint64_t offset_in_page, uint64_t count) {
  MVGPU_RETURN_IF_ERROR(CheckBounds("number of bytes", count, 1, kMostBytesShown));
  MVGPU_RETURN_IF_ERROR(CheckBounds("last byte in the page", offset_in_page + count, 1, kPageSize));
  if (host == nullptr) return std::string("fault");
  std::array<std::byte, kMostBytesShown> bytes{};
  if (!domain::CopyGuarded(bytes.data(), host, count)) return std::string("gone");
  return HexOf(std::span(bytes).first(count));
}

}  // namespace mvgpu::backend::scenario
