#pragma once

// A DMA remapping unit of Intel VT-d in scalable mode, as a guest sees one: it translates requests
// of devices by the guest's tables, remembers what it found until the guest says that it changed
// something, records faults, and tells others who follow the guest's tables (iommu_object.h).
//
//   request --> recent ones --> context cache --> PASID cache --> IOTLB --> target
//                                   |                 |             |
//                               vtd_tables.h     vtd_tables.h   vtd_translator.h      on a miss
//
// The registers themselves are somebody else's: their contents come in through the methods here,
// those of queue() and faults() included. Sources: VT-d specification 4.1; QEMU
// hw/i386/intel_iommu.c for what it leaves open.
//
// What it has not: legacy mode, interrupt remapping, extended accessed flags, memory types.
//
// Page requests. A device's groups come in as to any FaultSink, are written into the page request
// queue (faults/vtd_page_requests.h) whose other end is the guest's driver, and are answered when
// its response comes through the invalidation queue. The object's listeners hear of both.
//
// Bindings. The unit behaves as one in caching mode (CAP.CM): the guest says also when it has put
// an entry where nothing was. So each invalidation of the PASID cache says which entries to look at
// again, and the object hears of each that came, went or changed. This does not depend on whether
// translation is on.

#include <cstddef>
#include <cstdint>
#include <vector>

#include "apionly-domain/faults/page_request.h"
#include "apionly-domain/faults/vtd_page_requests.h"
#include "apionly-domain/nested/guest_tables.h"
#include "apionly-domain/viommu/fault_log.h"
#include "apionly-domain/viommu/invalidation_queue.h"
#include "apionly-domain/viommu/iommu_object.h"
#include "apionly-domain/viommu/masked_event.h"
#include "apionly-domain/viommu/recent_translations.h"
#include "apionly-domain/viommu/vtd_caches.h"
#include "apionly-domain/viommu/vtd_tables.h"
#include "apionly-domain/viommu/vtd_translator.h"

namespace mvgpu::domain {

class ApiOnlyDomain;

// Not thread-safe: whoever runs requests and registers takes turns. Guest memory may be unmapped by
// the VMM at any time, on any thread.
class VtdIommu final : public FaultSink,
                       private InvalidationQueue::Owner,
                       private FaultLog::Owner,
                       private VtdPageRequestQueue::Owner {
 public:
  class Owner {
   public:
    virtual ~Owner() = default;
    virtual void on_page_request_event() {}
    virtual void on_fault_event() = 0;
    virtual void on_wait_event() = 0;  // an invalidation wait with interrupt is done
    virtual void on_interrupt_entries_invalid(const InterruptEntryInvalidation& which) = 0;
  };
  struct Options {
    VtdAbilities abilities = {};
    DescriptorRules rules = {};
    VtdCaches::Sizes caches = {};
    size_t fault_records = 8;  // CAP.NFR + 1
  };
  struct Parts {  // all outlive the unit
    ApiOnlyDomain* guest;
    IommuObject* object;
    Owner* owner;
  };
  struct Counters {
    uint64_t page_hits = 0;  // of the IOTLB or of what is in front of it
    uint64_t walks = 0;
    uint64_t faults = 0;
    uint64_t bindings_refused = 0;  // by the object's limit
  };

  VtdIommu(Options options, Parts parts);

  // A device behind this unit: those whose PASIDs the object hears of.
  void add_device(SourceId source);
  // Looks at the entry of this address space now, as after an invalidation of the PASID cache, for
  // somebody who must not miss what becomes of it. REQUIRES: a device that was added.
  void sync(DeviceSpace space);

  // RTADDR_REG, when GCMD.SRTP takes it over. Nothing is remembered after that (CAP.ESRTPS), by
  // the object's listeners either.
  void set_root(uint64_t rtaddr);
  // GCMD.TE. A change makes void what was translated before it.
  void set_translating(bool translating);

  // IQA, IQH, IQT, GCMD.QIE, IQERCD. After writes: run_queue().
  InvalidationQueue& queue() { return queue_; }
  // Does at most `most` descriptors. Call again, later, while queue().has_more().
  void run_queue(uint64_t most = 256) { queue_.run(most); }
  // FRCD, FSTS, FECTL; but FSTS is written here: with IQE cleared the queue may go on.
  FaultLog& faults() { return faults_; }
  void write_fault_status(uint32_t fsts);
  // ICS.IWC and IECTL.
  bool is_wait_complete() const { return is_wait_complete_; }
  void clear_wait_complete();
  void set_wait_masked(bool masked);

  // Where a request goes. A fault is recorded unless the guest has hidden it, or the device asked
  // and can be told. Without translation, what has no PASID goes where it says, anything else
  // nowhere.
  VtdResult translate(const VtdRequest& request) {
    RecentTranslations::Translation recent;
    if (!recent_.find(request, &recent)) return TranslateAnew(request);
    ++counters_.page_hits;
    return VtdTranslator::TargetOf({recent.address, recent.span, recent.rights});
  }
  // A device asks for the pages of a group (PRI). What is remembered of them is forgotten. Errors:
  // kInvalid (the tables do not take requests of this device, which is recorded; numbers that do
  // not fit), those of VtdPageRequestQueue::submit().
  Result<void> submit(FaultGroup group, FaultSource* source) override;
  // PQA, PQH, PQT, PRS. Its drop() is a reset of a device.
  VtdPageRequestQueue& page_requests() { return page_requests_; }
  // The same translation by the tables as they are, with nothing remembered or recorded.
  VtdResult walk(const VtdRequest& request) const { return translator_.translate(root_, request); }

  const Counters& counters() const { return counters_; }
  VtdCaches::Counters cached() const { return caches_.counters(); }

 private:
  struct Found {
    vtd::ContextEntry context;
    Pasid pasid;
    vtd::PasidEntry entry;
  };

  void on_invalidation(const InvalidationDescriptor& invalidation) override;
  bool write_status(uint64_t address, uint32_t status) override;
  void on_wait_complete() override;
  void on_queue_error(QueueError error) override;
  void on_fault_event() override { parts_.owner->on_fault_event(); }
  void on_page_request_event() override { parts_.owner->on_page_request_event(); }

  VtdResult TranslateAnew(const VtdRequest& request);
  VtdResult Translate(const VtdRequest& request);
  VtdResult Bypass(const VtdRequest& request) const;
  VtdTables::ContextResult ContextOf(SourceId source);
  tl::expected<Found, VtdFault> Find(const VtdRequest& request);
  void Record(const VtdRequest& request, const VtdFault& fault);
  void ForgetPage(const Found& found, Iova page);
  // A page of a group; forgotten if the tables take requests for it.
  tl::expected<void, VtdFault> AdmitPage(DeviceSpace space, const PageRequest& page);
  void TellRequests(DeviceSpace space, const FaultGroup& group);

  void Handle(const ContextInvalidation& invalidation);
  void Handle(const IotlbInvalidation& invalidation);
  void Handle(const DeviceTlbInvalidation& invalidation);
  void Handle(const InterruptEntryInvalidation& invalidation);
  void Handle(const InvalidationWait&) {}  // the queue's
  void Handle(const PasidIotlbInvalidation& invalidation);
  void Handle(const PasidCacheInvalidation& invalidation);
  void Handle(const VtdGroupResponse& response);

  // Makes the object's bindings those of the tables: of one PASID, of a device, of all.
  void SyncPasid(SourceId source, Pasid pasid);
  void SyncDevice(SourceId source);
  void SyncAll();
  // Tells that no translation of any device counts any more.
  void UnmapAll();
  void DropStale(SourceId source, std::optional<Pasid> only);
  bool BindTable(SourceId source, const vtd::ContextEntry& context, Pasid first, uint64_t table);
  bool Bind(DeviceSpace space, Pasid pasid, const vtd::PasidEntry& entry);

  const Parts parts_;
  const DomainTables memory_;
  const VtdTables tables_;
  const VtdTranslator translator_;
  VtdCaches caches_;
  RecentTranslations recent_;  // forgets whenever the caches, or whether to translate, change
  FaultLog faults_;
  InvalidationQueue queue_;
  VtdPageRequestQueue page_requests_;
  std::vector<SourceId> devices_;
  vtd::RootAddress root_;
  bool is_translating_ = false;
  bool is_wait_complete_ = false;
  MaskedEvent wait_event_;
  Counters counters_;
};

}  // namespace mvgpu::domain
