#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "apionly-domain/faults/page_request.h"
#include "apionly-domain/viommu/iommu_object.h"
#include "backend/guest_iommu.h"
#include "backend/scenario/table_builder.h"
#include "backend/scenario/world.h"

namespace mvgpu::backend::scenario {

// Keeps what it hears until it is asked.
class IommuHearing final : public domain::IommuListener {
 public:
  void on_iommu_event(const domain::IommuEvent& event) override;
  // In words, with "then" between; "nothing".
  std::string take();

 private:
  static constexpr size_t kMost = 64;
  std::vector<std::string> heard_;
};

// The IOMMU that the guest sees, the guest's driver for it, and listeners at the object behind it.
// It stands before a device of which no more is there than the requests that the scenario makes, or
// before a vGPU, which owns it then and says when it may be used.
class Viommu final : public World::Part, private domain::FaultSource {
 public:
  static constexpr World::Slot kSlot = World::Slot::kViommu;
  static constexpr std::string_view kMaker = "vtd-unit RID";
  static constexpr size_t kMostListeners = 16;
  using Doing = std::function<void(GuestIommu&)>;
  // Calls what it is given, once.
  using Access = std::function<void(const Doing&)>;

  // One of its own, over the guest's memory.
  Viommu(Guest* guest, domain::SourceId source);
  // That of somebody who outlives this.
  Viommu(Guest* guest, Access access);
  ~Viommu() override;

  void use(const Doing& doing) { access_(doing); }
  // The same for an answer.
  template <typename Get>
  auto ask(Get&& get) {
    std::invoke_result_t<Get, GuestIommu&> answer{};
    use([&](GuestIommu& iommu) { answer = get(iommu); });
    return answer;
  }

  TableBuilder& tables() { return tables_; }

  // Errors: kOverlap (the name is taken, or there are too many).
  Result<void> listen(const std::string& name, const domain::IommuObject::Filter& filter);
  // Errors: kNotMapped, there is none; of listener() too.
  Result<void> unlisten(const std::string& name);
  Result<IommuHearing*> listener(const std::string& name);

  // The invalidation queue, of one page.
  void begin_queue(uint64_t ring);
  // One descriptor more, which the unit does not know of before run_queue().
  Result<void> post(uint64_t low, uint64_t high);
  // Writes the tail, and gives the unit time for so many descriptors.
  void run_queue(uint64_t most);

  // A page request of a device that is not a vGPU; its answers come later.
  Result<void> request_pages(domain::FaultGroup group);
  std::string take_answers();

 private:
  void Begin();
  void on_answer(const domain::FaultGroup& group, domain::FaultAnswer answer) override;

  Guest& guest_;  // outlives this
  TableBuilder tables_;
  std::vector<std::string> answers_;  // the unit's end answers what waits
  std::unique_ptr<GuestIommu> own_;   // or null
  const Access access_;
  std::map<std::string, IommuHearing> listeners_;
  uint64_t ring_ = 0;
  uint64_t tail_ = 0;
};

}  // namespace mvgpu::backend::scenario
