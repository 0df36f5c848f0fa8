#include "tests/apionly-domain/hand_over/world.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <map>
#include <optional>
#include <set>

#include "tests/apionly-domain/hand_over/hand_over_fixture.h"

namespace mvgpu::domain::hand_over {

namespace {

using testing::GuestRam;
using testing::PageKeeper;

constexpr uint64_t kRamPages = 32;
// What the VMM maps and unmaps: some RAM at two addresses, and one that continues another.
struct Slot {
  uint64_t iova;
  uint64_t ram;
  uint64_t pages;
};
constexpr std::array<Slot, 5> kSlots = {
    {{100, 0, 8}, {108, 8, 8}, {200, 4, 8}, {300, 16, 12}, {400, 20, 4}}};
constexpr const char* kDeviceNames[] = {"nic", "disk"};

// A ledger in a directory of its own.
struct LedgerPlace : LedgerFixture {
  using LedgerFixture::Look;
  using LedgerFixture::Open;
  void TestBody() override {}
};

// Digits of an operation.
class Choice {
 public:
  explicit Choice(uint64_t bits) : bits_(bits) {}
  uint64_t Below(uint64_t limit) {
    const uint64_t digit = bits_ % limit;
    bits_ /= limit;
    return digit;
  }

 private:
  uint64_t bits_;
};

}  // namespace

class World::Impl {
 public:
  Impl() {
    keeper_.add_view(FileIn(container_, ram_));
    for (auto& vgpu : vgpus_) MVGPU_CHECK(container_.attach(vgpu.get()).has_value());
  }

  void Step(uint64_t operation) {
    Choice choice(operation);
    const uint64_t fail_at = choice.Below(3) != 0 ? 0 : 1 + choice.Below(5);
    const uint64_t fail_more = choice.Below(3);
    keeper_.fail_at_call(fail_at, fail_more);
    const std::string what = Act(choice);
    log_.push_back(fmt::format(
        "{}{}", what,
        keeper_.has_failed() ? fmt::format(" (failing at call {}, +{})", fail_at, fail_more) : ""));
    keeper_.fail_at_call(0);
    Compare();
  }

  void Finish() {
    for (auto& vgpu : vgpus_) vgpu.release_all();
    for (size_t i = 0; i < devices_.size(); ++i) {
      if (is_attached_[i]) Detach(i);
    }
    log_.push_back("finish");
    Compare();
    Expect(container_.unmap_all().has_value(), "the rest is unmapped");
    for (auto& vgpu : vgpus_) {
      Expect(container_.detach(vgpu.get()).has_value(), "a vgpu is detached");
    }
  }

  const std::string& problem() const { return problem_; }

 private:
  std::string Act(Choice& choice) {
    const size_t who = choice.Below(2);
    switch (choice.Below(10)) {
      case 0:
      case 1:
        return MapSlot(choice.Below(kSlots.size()));
      case 2:
        return Unmap(choice,
                     choice.Below(2) == 0 ? Container::Cut::kRefuse : Container::Cut::kSplit);
      case 3:
      case 4:
        return is_attached_[who] ? Detach(who) : Attach(who);
      case 5:
        return Release(who, choice);
      default:
        return Pin(who, choice);
    }
  }

  std::string MapSlot(size_t index) {
    const Slot& slot = kSlots[index];
    const bool fits = std::none_of(mapped_.begin(), mapped_.end(), [&](const auto& page) {
      return page.first >= slot.iova && page.first < slot.iova + slot.pages;
    });
    const bool was_whole = IsWhole(index);
    const bool done =
        container_.map(ram_.map_request(BytesIn(slot.iova), BytesIn(slot.ram), BytesIn(slot.pages)))
            .has_value();
    Expect(done == was_whole || done == fits || keeper_.has_failed(), "map");
    if (done && !was_whole) {
      for (uint64_t i = 0; i < slot.pages; ++i) mapped_[slot.iova + i] = slot.ram + i;
    }
    return fmt::format("map slot {}: {}", index, done);
  }
  // It is there as it was mapped: a map of it is answered with success and changes nothing.
  bool IsWhole(size_t index) const {
    const auto at = container_.mapping_at(Iova(BytesIn(kSlots[index].iova)));
    return at && PagesOf(*at) == PageRun{kSlots[index].iova, kSlots[index].pages};
  }

  std::string Unmap(Choice& choice, Container::Cut cut) {
    const Slot& slot = kSlots[choice.Below(kSlots.size())];
    PageRun pages{slot.iova, slot.pages};
    if (cut == Container::Cut::kSplit) {
      pages.first += choice.Below(slot.pages);
      pages.count = 1 + choice.Below(slot.iova + slot.pages - pages.first);
    }
    vgpus_[0].lets_go = choice.Below(4) != 0;
    const bool done =
        container_.unmap(Iova(BytesIn(pages.first)), BytesIn(pages.count), cut).has_value();
    vgpus_[0].lets_go = true;
    if (done) {
      for (uint64_t page = pages.first; page < pages.end(); ++page) mapped_.erase(page);
    }
    return fmt::format("unmap {:#x}+{}: {}", pages.first, pages.count, done);
  }

  std::string Attach(size_t who) {
    is_attached_[who] = container_.attach(devices_[who].get()).has_value();
    Expect(is_attached_[who] || keeper_.has_failed(), "attach");
    return fmt::format("attach {}: {}", kDeviceNames[who], is_attached_[who]);
  }
  std::string Detach(size_t who) {
    is_attached_[who] = !container_.detach(devices_[who].get()).has_value();
    Expect(!is_attached_[who] || keeper_.has_failed(), "detach");
    return fmt::format("detach {}: {}", kDeviceNames[who], !is_attached_[who]);
  }

  std::string Pin(size_t who, Choice& choice) {
    const Slot& slot = kSlots[choice.Below(kSlots.size())];
    PageRun pages{slot.iova + choice.Below(slot.pages), 1 + choice.Below(4)};
    const bool is_mapped = [&] {
      for (uint64_t page = pages.first; page < pages.end(); ++page) {
        if (!mapped_.contains(page)) return false;
      }
      return true;
    }();
    const bool done = vgpus_[who].pin(RangeOf(pages)).has_value();
    Expect(done == is_mapped || keeper_.has_failed(), "pin");
    return fmt::format("vgpu{} pins {}+{}: {}", who, pages.first, pages.count, done);
  }
  std::string Release(size_t who, Choice& choice) {
    if (vgpus_[who].pins() == 0) return "nothing to release";
    const size_t index = choice.Below(vgpus_[who].pins());
    vgpus_[who].release(index);
    return fmt::format("vgpu{} releases pin {}", who, index);
  }

  void Compare() {
    Expect(keeper_.problem().empty(), keeper_.problem());
    const std::array held = {vgpus_[0].held_pages(), vgpus_[1].held_pages()};
    std::array<uint64_t, kRamPages> shown{};
    for (const auto& [iova, page] : mapped_) ++shown[page];
    const auto devices = static_cast<uint64_t>(is_attached_[0]) + is_attached_[1];
    uint64_t lost = 0;
    for (auto& device : devices_) lost += device.space().counters().lost_pages;
    uint64_t held_once = 0;
    for (uint64_t page = 0; page < kRamPages; ++page) {
      const uint64_t mappings = keeper_.mappings_of(page);
      Expect(lost != 0 ? mappings <= shown[page] * devices : mappings == shown[page] * devices,
             fmt::format("page {} is in {} mappings of devices", page, mappings));
      for (size_t who = 0; who < vgpus_.size(); ++who) {
        const bool is_held = held[who].contains(page);
        Expect(keeper_.is_locked(static_cast<int>(who), page) == (is_held && mappings == 0),
               fmt::format("page {}: vgpu{} holds it: {}, locks it: {}, device mappings: {}", page,
                           who, is_held, !(is_held && mappings == 0), mappings));
      }
      if (shown[page] * devices != 0 || held[0].contains(page) || held[1].contains(page)) {
        ++held_once;
      }
    }
    Expect(device_pins_.unique_pages() == keeper_.mapped_pages(), "what sharers were told of");
    CompareLedger(held_once, shown);
  }

  void CompareLedger(uint64_t held_once, const std::array<uint64_t, kRamPages>& shown) {
    const LedgerSnapshot ledger = place_.Look();
    for (const std::string& wrong : ProblemsOf(ledger)) Expect(false, wrong);
    Expect(ledger.unique_pages == held_once && ledger.charged_pages() == held_once,
           fmt::format("{} pages are held, the ledger has {} and charges {}", held_once,
                       ledger.unique_pages, ledger.charged_pages()));
    const auto mapped_once = static_cast<uint64_t>(
        std::count_if(shown.begin(), shown.end(), [](uint64_t count) { return count != 0; }));
    for (const LedgerSnapshot::Row& row : ledger.rows) {
      uint64_t unique = 0;
      uint64_t locked = 0;
      for (size_t i = 0; i < 2; ++i) {
        if (row.name == vgpus_[i]->name()) {
          unique = vgpus_[i].held_pages().size();
          locked = vgpus_[i].locked_pages();
        } else if (row.name == kDeviceNames[i]) {
          unique = is_attached_[i] ? mapped_once : 0;
          locked = devices_[i].space().counters().mapped_pages;
        }
      }
      Expect(row.unique_pages == unique && row.locked_pages == locked,
             fmt::format("{}: {} pages, {} locked; the ledger says {} and {}", row.name, unique,
                         locked, row.unique_pages, row.locked_pages));
    }
  }

  void Expect(bool is_true, std::string_view what) {
    if (is_true || !problem_.empty()) return;
    problem_ = fmt::format("{}\nafter", what);
    for (const std::string& line : log_) problem_ += "\n  " + line;
  }

  LedgerPlace place_;
  GuestRam ram_{kRamPages * kPageSize};
  PageKeeper keeper_;
  DevicePins device_pins_;
  std::unique_ptr<Ledger> ledger_ = place_.Open();
  Container container_;
  std::array<WatchedDomain, 2> vgpus_{WatchedDomain(0, &keeper_, &device_pins_, ledger_.get()),
                                      WatchedDomain(1, &keeper_, &device_pins_, ledger_.get())};
  std::array<WatchedDevice, 2> devices_{
      WatchedDevice(kDeviceNames[0], &keeper_, &device_pins_, ledger_.get()),
      WatchedDevice(kDeviceNames[1], &keeper_, &device_pins_, ledger_.get())};

  // The reference.
  std::map<uint64_t, uint64_t> mapped_;  // IOVA page -> page of RAM
  std::array<bool, 2> is_attached_{};

  std::vector<std::string> log_;
  std::string problem_;
};

World::World() : impl_(std::make_unique<Impl>()) {}
World::~World() = default;

void World::Step(uint64_t operation) {
  impl_->Step(operation);
  problem_ = impl_->problem();
}

void World::Finish() {
  impl_->Finish();
  problem_ = impl_->problem();
}

}  // namespace mvgpu::domain::hand_over
