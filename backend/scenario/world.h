#pragma once

// What a scenario plays in: a VM's guest memory with its container, its ledger and the api-only
// domain, as a vGPU has them, and beside these one part for each system that the scenario uses.

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "apionly-domain/access.h"
#include "apionly-domain/accounting/ledger.h"
#include "apionly-domain/accounting/ledger_view.h"
#include "apionly-domain/api_only_domain.h"
#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "apionly-domain/base/unique_fd.h"
#include "apionly-domain/container.h"
#include "backend/vgpu_config.h"

namespace mvgpu::backend::scenario {

// A directory of our own (mode 0700), gone with everything in it at the end.
class PrivateDir {
 public:
  // Errors: kSystem.
  static Result<PrivateDir> Create();
  PrivateDir(PrivateDir&& other) noexcept : path_(std::exchange(other.path_, {})) {}
  PrivateDir& operator=(PrivateDir&& other) noexcept {
    std::swap(path_, other.path_);
    return *this;
  }
  ~PrivateDir();

  const std::string& path() const { return path_; }

 private:
  explicit PrivateDir(std::string path) : path_(std::move(path)) {}
  std::string path_;
};

// A VM: RAM as a VMM has it, a memfd with a view of the guest's own, and what is done with it.
class Guest {
 public:
  static constexpr uint64_t kMostMemory = uint64_t{4} << 30;
  // Errors: kInvalid (size), kSystem, those of Ledger::Open(), of the pin back end.
  static Result<std::unique_ptr<Guest>> Create(uint64_t memory_size, PinMode pin);
  // REQUIRES: every part that uses it has gone.
  ~Guest();

  domain::Container& container() { return container_; }
  domain::ApiOnlyDomain& domain() { return *domain_; }
  domain::Ledger& ledger() { return *ledger_; }
  // Where the ledger is, and under which name: for other devices of the same VM.
  const std::string& runtime_dir() const { return dir_.path(); }
  static constexpr std::string_view kUuid = "5ce9a410-0000-4000-8000-000000000001";
  uint64_t memory_size() const { return size_; }
  int memory_fd() const { return fd_.get(); }

  // Places in RAM as the guest itself reaches them. Errors: kInvalid (not all of it is RAM).
  Result<std::byte*> at(uint64_t place, uint64_t size);
  Result<void> store64(uint64_t place, uint64_t value);
  Result<uint64_t> load64(uint64_t place);
  // The accounts as another process sees them.
  Result<domain::LedgerSnapshot> accounts() const;

 private:
  explicit Guest(PrivateDir dir) : dir_(std::move(dir)) {}
  Result<void> MakeMemory(uint64_t size);

  PrivateDir dir_;
  UniqueFd fd_;
  uint64_t size_ = 0;
  std::byte* view_ = nullptr;
  std::unique_ptr<domain::Ledger> ledger_;
  domain::Container container_;
  std::unique_ptr<domain::ApiOnlyDomain> domain_;
};

class World {
 public:
  enum class Slot : uint8_t { kPins, kDma, kZpci, kViommu, kVgpu, kFaults, kCoiommu };
  static constexpr size_t kSlots = 7;
  // What is left when every part has gone and all memory was unmapped. All 0, if nobody lost
  // anything.
  struct Left {
    uint64_t pinned_pages = 0;
    uint64_t locked_pages = 0;
    uint64_t charged_pages = 0;  // over all domains of the VM
    uint64_t mappings = 0;
    bool is_nothing() const {
      return (pinned_pages | locked_pages | charged_pages | mappings) == 0;
    }
  };
  // What a system adds. Its destructor takes back whatever it did to the guest's container. Parts
  // go in the order of their slots.
  class Part {
   public:
    virtual ~Part() = default;
    // Ends what it has beside the guest's container and domain; what could not be taken back.
    // Nothing but the destructor comes after it.
    virtual Left end() { return {}; }
  };

  explicit World(PinMode pin) : pin_(pin) {}
  ~World() { end(); }

  PinMode pin_mode() const { return pin_; }
  // Errors: kInvalid (there is some already), those of Guest::Create().
  Result<void> make_memory(uint64_t size);
  // Error: kInvalid, there is none yet.
  Result<Guest*> guest();

  // A part has: static constexpr Slot kSlot; static constexpr std::string_view kMaker, the command
  // that makes it. Error: kInvalid, it has not been made.
  template <typename P>
  Result<P*> part() {
    Part* const there = parts_[static_cast<size_t>(P::kSlot)].get();
    if (there == nullptr) return tl::unexpected<Error>(MissingPart(P::kMaker));
    return static_cast<P*>(there);
  }
  // Error: kInvalid, there is one.
  template <typename P>
  Result<void> add(std::unique_ptr<P> made) {
    auto& slot = parts_[static_cast<size_t>(P::kSlot)];
    if (slot != nullptr) return tl::unexpected<Error>(PartExists(P::kMaker));
    slot = std::move(made);
    return {};
  }
  template <typename P>
  bool has() const {
    return parts_[static_cast<size_t>(P::kSlot)] != nullptr;
  }

  // The systems go, then the VMM's mappings. Nothing is to be done afterwards.
  Left end();

 private:
  static Error MissingPart(std::string_view maker);
  static Error PartExists(std::string_view maker);

  const PinMode pin_;
  std::unique_ptr<Guest> guest_;
  std::array<std::unique_ptr<Part>, kSlots> parts_;  // use the guest; go before it
};

// Of r, w and rw. REQUIRES: the word is one of them.
domain::Access AccessOfWord(std::string_view word);
std::string_view WordOfAccess(domain::Access access);
// Errors: kInvalid (empty, or wraps).
Result<IovaRange> RangeFrom(uint64_t start, uint64_t size);
// Error: kInvalid, naming the value, unless low <= value <= high.
Result<void> CheckBounds(std::string_view what, uint64_t value, uint64_t low, uint64_t high);
// Bytes as lower-case hexadecimal digits.
std::string HexOf(std::span<const std::byte> bytes);
// What a device sees at an address, where its IOMMU leads to `host`; null: a fault.
Result<std::string> DeviceBytes(const std::byte* host, uint64_t offset_in_page, uint64_t count);

}  // namespace mvgpu::backend::scenario
