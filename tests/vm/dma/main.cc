// dma_proof iommu | physical: a device follows the addresses that the cache returns.
// dma_proof accounts: what the kernel counts, and what the ledger says it does.
// Runs in the test guest, see tests/e2e/dma_test.py.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <string>

#include "apionly-domain/assigned/assigned_domain.h"
#include "apionly-domain/assigned/assigned_space.h"
#include "apionly-domain/assigned/iommufd_container.h"
#include "apionly-domain/assigned/mapping_pin_backend.h"
#include "apionly-domain/assigned/type1_container.h"
#include "dma-cache/iommu_mapper.h"
#include "dma-cache/physical_mapper.h"
#include "tests/fakes/kernel_counters.h"
#include "tests/vm/dma/accounts_proof.h"
#include "tests/vm/dma/dma_proof.h"

namespace mvgpu::testing {
namespace {

// The IOMMU's faults, as the kernel logs them.
class FaultLog {
 public:
  FaultLog() : fd_(open("/dev/kmsg", O_RDONLY | O_NONBLOCK | O_CLOEXEC)) { Read(); }
  // Only what comes from now on counts.
  void forget() {
    Read();
    log_.clear();
  }
  // Whether a fault at this address is logged. The kernel logs only some of them in 5 s, so the
  // device tries to read there until one is.
  bool has_fault_at(DmaAddr address, Facts& facts, EduDevice& edu) {
    const std::string wanted = fmt::format("fault addr {:#x} ", address.value() & ~kPageMask);
    for (int tries = 0; tries < 100; ++tries) {
      Read();
      if (log_.find(wanted) != std::string::npos) return true;
      facts.must("load", edu.load(address, kPageSize));  // takes 100 ms
    }
    return false;
  }
  std::string first_line() const {
    const size_t at = log_.find("DMAR: [DMA");
    return at == std::string::npos ? "none" : log_.substr(at, log_.find('\n', at) - at);
  }

 private:
  void Read() {
    std::array<char, 8192> record;
    while (true) {
      const ssize_t size = read(fd_.get(), record.data(), record.size());
      if (size <= 0) return;
      const std::string_view text(record.data(), static_cast<size_t>(size));
      if (text.find("DMAR: [DMA") != std::string_view::npos) log_ += text;
    }
  }
  UniqueFd fd_;
  std::string log_;
};

// The device is told to read and to write where it may not any more.
void CheckOutOfReach(Facts& facts, DmaProof& proof, EduDevice& edu, FaultLog& faults,
                     DmaAddr address, uint64_t iova, std::string_view what) {
  const DeviceUse shelf = proof.use(DmaProof::kHigh, 2 * kPageSize);
  const uint64_t known = DmaProof::kHigh;
  const uint64_t seen = DmaProof::kHigh + kPageSize;
  faults.forget();
  proof.fill(known, kPageSize, 200);
  proof.fill(iova, kPageSize, 100);
  const auto before = proof.all_bytes();
  facts.must("load", edu.load(shelf.at(known), kPageSize));
  facts.must("store", edu.store(address, kPageSize));
  facts.check(fmt::format("{}: a write at device {:#x} changes no byte of the guest", what,
                          address.value()),
              proof.is_unchanged(before));
  facts.must("load", edu.load(address, kPageSize));
  facts.must("store", edu.store(shelf.at(seen), kPageSize));
  facts.check(fmt::format("{}: a read at device {:#x} brings nothing", what, address.value()),
              proof.bytes_at(seen, kPageSize) != proof.bytes_at(iova, kPageSize));
  facts.check(fmt::format("{}: nothing else has changed", what), proof.is_unchanged(before, seen));
  facts.check(fmt::format("{}: the kernel logged the fault at {:#x}", what, address.value()),
              faults.has_fault_at(address, facts, edu));
}

// What the device has in its buffer goes where a new use of the page says; the bytes, and no
// others.
void CheckReached(Facts& facts, DmaProof& proof, EduDevice& edu, const DeviceUse& use,
                  uint64_t iova, unsigned seed, std::string_view what) {
  const DeviceUse shelf = proof.use(DmaProof::kHigh, kPageSize);
  proof.fill(DmaProof::kHigh, kPageSize, seed);
  proof.fill(iova, kPageSize, seed + 1);
  const auto sent = proof.bytes_at(DmaProof::kHigh, kPageSize);
  const auto before = proof.all_bytes();
  facts.must("load", edu.load(shelf.at(DmaProof::kHigh), kPageSize));
  facts.must("store", edu.store(use.at(iova), kPageSize));
  facts.check(fmt::format("{} is reached", what),
              proof.bytes_at(iova, kPageSize) == sent && proof.is_unchanged(before, iova));
}

void CheckRevocation(Facts& facts, DmaProof& proof, EduDevice& edu, FaultLog& faults) {
  const DeviceUse low = proof.use(DmaProof::kLow, 2 * DmaProof::kLowHalf);
  const uint64_t gone = DmaProof::kLow + 5 * kPageSize;
  const uint64_t stays = DmaProof::kLow + DmaProof::kLowHalf + 5 * kPageSize;
  const DmaAddr old_address = low.at(gone);
  proof.take_away(low, DmaProof::kLow, DmaProof::kLowHalf, "revoked");
  CheckOutOfReach(facts, proof, edu, faults, old_address, gone, "revoked");
  facts.say("fault", faults.first_line());
  // The other half of the same mapping of the IOMMU is where it was.
  CheckReached(facts, proof, edu, low, stays, 50, "what was not revoked");
  // The VMM brings the memory back: a new use works, the old address stays dead.
  proof.map_low_half(0);
  const DeviceUse again = proof.use(gone, kPageSize);
  facts.check("memory that came back has another address", again.at(gone) != old_address);
  CheckReached(facts, proof, edu, again, gone, 60, "memory that came back");
  CheckOutOfReach(facts, proof, edu, faults, old_address, gone, "came back elsewhere");
}

void CheckReadOnly(Facts& facts, DmaProof& proof, EduDevice& edu, domain::AssignedSpace& space) {
  const domain::AssignedSpace::HostRun page{proof.byte_at(DmaProof::kLow), kPageSize};
  const IovaRange range = facts.must("read-only", space.map({&page, 1}, domain::Access::kRead));
  const auto before = proof.bytes_at(DmaProof::kLow, kPageSize);
  const DeviceUse shelf = proof.use(DmaProof::kHigh, kPageSize);
  proof.fill(DmaProof::kHigh, kPageSize, 9);
  facts.must("load", edu.load(shelf.at(DmaProof::kHigh), kPageSize));
  facts.must("store", edu.store(DmaAddr(range.start().value()), kPageSize));
  facts.check("a write where only reads are allowed changes nothing",
              proof.bytes_at(DmaProof::kLow, kPageSize) == before);
  space.unmap(range);
  space.flush();
}

// The cache's pages are at the assigned device's own addresses. The VMM takes that memory away all
// the same, and brings it back.
void CheckSharedRevocation(Facts& facts, DmaProof& proof, EduDevice& edu, FaultLog& faults,
                           const domain::AssignedDomain& assigned) {
  const auto check_locked = [&facts](std::string_view step, uint64_t pages) {
    const uint64_t counted = KernelLockedPages();
    facts.check(fmt::format("shared: {}: VmLck is {} of {} pages", step, counted, pages),
                counted == pages);
  };
  constexpr uint64_t kHalf = PagesIn(DmaProof::kLowHalf);
  constexpr uint64_t kMapped = 2 * kHalf + DmaProof::kHighPages;  // for the device
  const uint64_t gone = DmaProof::kLow + 5 * kPageSize;
  check_locked("nothing is used", kMapped);
  DeviceUse low = proof.use(DmaProof::kLow, DmaProof::kLowHalf);
  facts.check("an assigned device's address is the guest's", low.at(gone) == DmaAddr(gone));
  facts.check("the cache uses the assigned device's addresses", assigned.used_pages() == kHalf);
  check_locked("16 are used", kMapped + kHalf);  // locked by the pin, too
  proof.take_away(low, DmaProof::kLow, DmaProof::kLowHalf, "shared");
  facts.check("shared: nobody uses the addresses any more", assigned.used_pages() == 0);
  check_locked("16 are gone", kMapped - kHalf);
  CheckOutOfReach(facts, proof, edu, faults, DmaAddr(gone), gone, "shared");
  low.mapping.reset();
  proof.map_low_half(0);
  const DeviceUse again = proof.use(gone, kPageSize);
  facts.check("shared: memory that came back has the guest's address",
              again.at(gone) == DmaAddr(gone));
  CheckReached(facts, proof, edu, again, gone, 70, "shared: memory that came back");
  check_locked("one is used again", kMapped + 1);
}

// An assigned device sees guest memory where the VMM put it, and the mapper uses these addresses.
void CheckAssignedDomain(Facts& facts, domain::AssignedSpace& space, EduDevice& edu,
                         FaultLog& faults) {
  const auto assigned =
      facts.must("assigned", domain::AssignedDomain::Create({.name = "edu"}, &space, nullptr));
  dma::IommuMapper mapper(&space, assigned.get());
  {
    DmaProof proof(&facts, domain::MakeMlockPinBackend(), &mapper, &edu);
    facts.must("attach", proof.container().attach(assigned.get()));
    {
      const DeviceUse low = proof.use(DmaProof::kLow, DmaProof::kLowHalf);
      proof.check_copies();
    }
    CheckSharedRevocation(facts, proof, edu, faults, *assigned);
    facts.must("detach", proof.container().detach(assigned.get()));
  }
  facts.check("nothing is shared any more", assigned->used_pages() == 0);
}

// As the backend does it: the mappings are what holds the cache's pages. The kernel counts each
// page once, and the domain says the same.
void CheckCountedOnce(Facts& facts, domain::AssignedSpace& space, EduDevice& edu) {
  const auto check = [&facts](std::string_view step, const DmaProof& proof, uint64_t pages) {
    const uint64_t counted = KernelLockedPages();
    facts.check(fmt::format("held by mappings: {}: VmLck is {} of {} pages, the domain says {}",
                            step, counted, pages, proof.locked_pages()),
                counted == pages && proof.locked_pages() == pages);
  };
  dma::IommuMapper mapper(&space);
  DmaProof proof(&facts, domain::MakeMappingPinBackend(&space), &mapper, &edu);
  check("nothing is used", proof, 0);
  {
    const DeviceUse low = proof.use(DmaProof::kLow, 2 * DmaProof::kLowHalf);
    const DeviceUse high = proof.use(DmaProof::kHigh, DmaProof::kHighPages * kPageSize);
    check("40 pages are used", proof, 40);
    proof.check_copies();
    facts.must("unmap", proof.container().unmap(Iova(DmaProof::kLow), DmaProof::kLowHalf));
    check("16 are revoked", proof, 24);
    proof.map_low_half(0);
    const DeviceUse again = proof.use(DmaProof::kLow, 4 * kPageSize);
    check("4 come back", proof, 28);
  }
  check("all are released", proof, 0);
}

// The guest's kernel has none.
void CheckNoIommufd(Facts& facts, const PciDevice& pci) {
  const auto iommufd = domain::IommufdContainer::Create(pci.name);
  facts.say("iommufd", iommufd ? "is there" : iommufd.error().message());
  facts.check(
      "without iommufd the error says what to do",
      iommufd.has_value() || iommufd.error().message().find("--iommu-group") != std::string::npos);
}

int ProveIommu(Facts& facts) {
  const PciDevice pci = facts.must("edu", PciDevice::Find("0x1234", "0x11e8"));
  const std::string group = facts.must("bind", pci.bind_to_vfio());
  auto container = facts.must("type1", domain::Type1Container::Create(group));
  for (const IovaRange& range : container->usable_ranges()) {
    facts.say("usable", fmt::format("{:#x}-{:#x}", range.start().value(), range.last().value()));
  }
  facts.say("page-sizes", fmt::format("{:#x}", container->page_sizes()));
  facts.say("available-mappings", facts.must("available", container->available_mappings()));
  const auto edu = facts.must("edu", EduDevice::Open(container.get(), pci));
  domain::AssignedSpace space(std::move(container), {});
  FaultLog faults;
  {
    dma::IommuMapper mapper(&space);
    DmaProof proof(&facts, domain::MakeMlockPinBackend(), &mapper, edu.get());
    proof.check_copies();
    {
      const DeviceUse high = proof.use(DmaProof::kHigh, DmaProof::kHighPages * kPageSize);
      facts.check("scattered pages are one run", high.mapping.runs().size() == 1);
      facts.say("locked-pages-of-8-pinned-and-mapped", KernelLockedPages());
      proof.check_crossing(high);
    }
    CheckReadOnly(facts, proof, *edu, space);
    CheckRevocation(facts, proof, *edu, faults);
  }
  CheckAssignedDomain(facts, space, *edu, faults);
  CheckCountedOnce(facts, space, *edu);
  CheckNoIommufd(facts, pci);
  facts.check("the iommu has no mappings left", space.counters().mappings == 0);
  facts.check("nothing is locked any more", KernelLockedPages() == 0);
  return facts.exit_code();
}

// Nothing stands between such a device and memory, so an old address is not out of its reach. But
// the user knows, nothing is held for it any more, and other memory is found where it is.
void CheckPhysicalRevocation(Facts& facts, DmaProof& proof, EduDevice& edu) {
  DeviceUse low = proof.use(DmaProof::kLow, 2 * DmaProof::kLowHalf);
  const uint64_t gone = DmaProof::kLow + 5 * kPageSize;
  const uint64_t stays = DmaProof::kLow + DmaProof::kLowHalf + 5 * kPageSize;
  const auto check_pinned = [&](std::string_view step, uint64_t pages) {
    const uint64_t counted = KernelPinnedPages();
    facts.check(fmt::format("physical: {}: VmPin is {} of {} pages, the domain says {}", step,
                            counted, pages, proof.pinned_pages()),
                counted == pages && proof.pinned_pages() == pages);
  };
  const DmaAddr old_address = low.at(gone);
  check_pinned("32 are used", 32);
  proof.take_away(low, DmaProof::kLow, DmaProof::kLowHalf, "physical");
  check_pinned("16 are revoked", 16);
  CheckReached(facts, proof, edu, low, stays, 50, "physical: what was not revoked");
  low.mapping.reset();
  check_pinned("none is used", 0);
  {
    // Other memory at the same IOVA has its own address; what was there before is left alone.
    GuestRam other(DmaProof::kLowHalf);
    other.fill_pattern();
    facts.must("map other memory",
               proof.container().map(other.map_request(DmaProof::kLow, 0, other.size())));
    const DeviceUse use = proof.use(DmaProof::kLow, DmaProof::kLowHalf);
    facts.check("physical: other memory has another address", use.at(gone) != old_address);
    const auto before = proof.all_bytes();
    const auto wanted = proof.bytes_at(stays, kPageSize);  // still in the device's buffer
    facts.must("store", edu.store(use.at(gone), kPageSize));
    facts.check("physical: other memory is reached, and no byte of what was there before",
                std::equal(wanted.begin(), wanted.end(), other.at(5 * kPageSize)) &&
                    proof.is_unchanged(before));
    proof.take_away(use, DmaProof::kLow, DmaProof::kLowHalf, "physical, other memory");
  }
  check_pinned("other memory is revoked", 0);
  proof.map_low_half(0);
  const DeviceUse again = proof.use(DmaProof::kLow, DmaProof::kLowHalf);
  CheckReached(facts, proof, edu, again, gone, 60, "physical: memory that came back");
  check_pinned("16 are used again", 16);
}

int ProvePhysical(Facts& facts) {
  const PciDevice pci = facts.must("edu", PciDevice::Find("0x1234", "0x11e8"));
  const auto edu = facts.must("edu", EduDevice::OpenUnbound(pci));
  const auto mapper = facts.must("mapper", dma::PhysicalMapper::Create());
  {
    auto pins = facts.must("pins", domain::MakeIoUringPinBackend());
    DmaProof proof(&facts, std::move(pins), mapper.get(), edu.get());
    {
      const DeviceUse low = proof.use(DmaProof::kLow, 2 * DmaProof::kLowHalf);
      facts.say("runs-of-32-pages", low.mapping.runs().size());
      facts.say("first-address", fmt::format("{:#x}", low.at(DmaProof::kLow).value()));
      proof.check_copies();
    }
    CheckPhysicalRevocation(facts, proof, *edu);
  }
  facts.check("nothing is pinned any more", KernelPinnedPages() == 0);
  return facts.exit_code();
}

}  // namespace
}  // namespace mvgpu::testing

int main(int argc, char** argv) {
  mvgpu::testing::Facts facts;
  const std::string_view mode = argc == 2 ? argv[1] : "";
  if (mode == "iommu") return mvgpu::testing::ProveIommu(facts);
  if (mode == "physical") return mvgpu::testing::ProvePhysical(facts);
  if (mode == "accounts") return mvgpu::testing::ProveAccounts(facts);
  fmt::print(stderr, "usage: dma_proof iommu | physical | accounts\n");
  return 2;
}
