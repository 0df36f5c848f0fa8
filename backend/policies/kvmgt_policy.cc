#include <memory>
#include <utility>

#include <absl/container/flat_hash_map.h>

#include "apionly-domain/base/check.h"
#include "backend/policies/pinning_policy.h"

namespace mvgpu::backend {

namespace {

// KVMGT (kvmgt.c): an entry {gfn, dma_addr, refcount} for each page; vfio_pin_pages() and
// dma_map_page() one page at a time when it is used first, given up when the last user leaves. The
// guest's table is write-protected, so each change of an entry is a trap; the entries of a buffer
// that is mapped or unmapped at once are counted as one.
class KvmgtPolicy final : public PinningPolicy {
 public:
  explicit KvmgtPolicy(PolicyGuest* guest)
      : guest_(*guest), context_(guest->domain().open_context(guest)) {}
  ~KvmgtPolicy() override {
    while (!entries_.empty()) Drop(entries_.begin());
  }

  Result<void> map(uint32_t, const DmaBuffer& buffer) override {
    ++notifications_;
    for (const PageRun& part : buffer.parts) {
      for (uint64_t page = part.first; page < part.end(); ++page) {
        MVGPU_RETURN_IF_ERROR(MapPage(page));
      }
    }
    return {};
  }
  Result<void> unmap(uint32_t, const DmaBuffer& buffer) override {
    ++notifications_;
    for (const PageRun& part : buffer.parts) {
      for (uint64_t page = part.first; page < part.end(); ++page) {
        const auto found = entries_.find(page);
        MVGPU_CHECK(found != entries_.end());
        if (--found->second.users == 0) Drop(found);
      }
    }
    return {};
  }
  std::byte* reach(Iova page, domain::Access access) override {
    const auto found = entries_.find(page.page());
    if (found == entries_.end()) return nullptr;
    return guest_.iommu().translate(found->second.address.start() + page.offset_in_page(), access);
  }
  uint64_t notifications() const override { return notifications_; }

 private:
  struct Entry {
    domain::PinnedRange pinned;
    IovaRange address;  // the device's
    uint32_t users = 0;
  };
  using Entries = absl::flat_hash_map<uint64_t, Entry>;  // by page

  Result<void> MapPage(uint64_t page) {
    if (const auto found = entries_.find(page); found != entries_.end()) {
      ++found->second.users;
      return {};
    }
    MVGPU_ASSIGN_OR_RETURN(domain::PinnedRange pinned,
                           context_->pin(RangeOf({page, 1}), domain::Access::kReadWrite));
    const domain::AssignedSpace::HostRun run{pinned.runs().front().host, kPageSize};
    MVGPU_ASSIGN_OR_RETURN(const IovaRange address,
                           guest_.space().map({&run, 1}, domain::Access::kReadWrite));
    entries_.emplace(page, Entry{std::move(pinned), address, 1});
    return {};
  }
  void Drop(Entries::iterator entry) {
    guest_.space().unmap(entry->second.address);
    guest_.space().flush();
    entries_.erase(entry);
  }

  PolicyGuest& guest_;  // outlives this: contract of MakePolicy()
  const std::unique_ptr<domain::PinContext> context_;
  Entries entries_;  // with pins of the context
  uint64_t notifications_ = 0;
};

}  // namespace

std::unique_ptr<PinningPolicy> MakeKvmgtPolicy(PolicyGuest* guest) {
  return std::make_unique<KvmgtPolicy>(guest);
}

}  // namespace mvgpu::backend
