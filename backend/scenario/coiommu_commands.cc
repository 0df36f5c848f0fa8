// coIOMMU: a guest's driver that counts its mappings in the tracking table, the device that it
// rings, and the scans that unpin what is not used.

#include <fmt/format.h>

#include <array>
#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "apionly-domain/coiommu/coiommu_device.h"
#include "backend/scenario/commands.h"
#include "backend/scenario/device_iommu.h"

namespace mvgpu::backend::scenario {

namespace {

using domain::CoiommuDevice;
using domain::TrackingTable;
namespace tracked = domain::tracked;

constexpr uint64_t kScanSeconds = 60;  // crosvm's interval
constexpr uint64_t kMostSeconds = 1'000'000;
constexpr uint32_t kMostMaps = 0xffff - 16;  // of a page: the guest has 16 vCPUs at most
constexpr uint16_t kTracked = 0x28;          // 00:05.0

class Coiommu final : public World::Part {
 public:
  static constexpr World::Slot kSlot = World::Slot::kCoiommu;
  static constexpr std::string_view kMaker = "coiommu-device TABLES BATCH LEVELS LIMIT";
  struct Numbers {
    uint64_t tables;  // the root, and all others behind it
    uint64_t batch;
    unsigned levels;
    uint64_t limit;  // pages
  };

  Coiommu(Guest* guest, Numbers numbers)
      : guest_(*guest),
        numbers_(numbers),
        next_table_(numbers.tables + kPageSize),
        iommu_({.maps_each_page = true}),
        target_(&iommu_.space()),
        pins_({.max_pinned_pages = numbers.limit}, {&guest->domain(), &target_}),
        device_({.devices = {kTracked}}, {&guest->domain(), &pins_, requests_}) {
    device_.write(CoiommuDevice::kRoot, numbers.tables);
    device_.write(CoiommuDevice::kLevels, numbers.levels);
    device_.write(CoiommuDevice::kCommand, CoiommuDevice::kActivate);
  }

  domain::CoiommuPins& pins() { return pins_; }
  CoiommuDevice& device() { return device_; }
  DeviceIommu& iommu() { return iommu_; }
  uint64_t maps() const { return maps_; }
  uint64_t notifications() const { return notifications_; }

  // The word of a frame, with all tables on the way.
  Result<std::atomic_ref<uint32_t>> word(uint64_t frame) {
    uint64_t table = numbers_.tables;
    for (unsigned level = numbers_.levels - 1; level > 0; --level) {
      const uint64_t place = table + TrackingTable::IndexOf(frame, level) * sizeof(uint64_t);
      MVGPU_ASSIGN_OR_RETURN(uint64_t entry, guest_.load64(place));
      if (entry == 0) {
        MVGPU_RETURN_IF_ERROR(guest_.at(next_table_, kPageSize));
        entry = next_table_ | 1;
        next_table_ += kPageSize;
        MVGPU_RETURN_IF_ERROR(guest_.store64(place, entry));
      }
      table = entry & ~kPageMask;
    }
    const uint64_t place = table + TrackingTable::IndexOf(frame, 0) * sizeof(uint32_t);
    MVGPU_ASSIGN_OR_RETURN(std::byte* const host, guest_.at(place, sizeof(uint32_t)));
    return std::atomic_ref<uint32_t>(*reinterpret_cast<uint32_t*>(host));
  }

  // A driver maps these frames for its device. False: one cannot be pinned, so none is mapped.
  Result<bool> map(const std::vector<uint64_t>& frames) {
    std::vector<uint64_t> missing;
    for (const uint64_t frame : frames) {
      MVGPU_ASSIGN_OR_RETURN(const auto shared, word(frame));
      MVGPU_RETURN_IF_ERROR(CheckBounds("count of the frame", shared.load() & tracked::kCountMask,
                                        0, kMostMaps - frames.size()));
    }
    maps_ += frames.size();
    for (const uint64_t frame : frames) {
      MVGPU_ASSIGN_OR_RETURN(const auto shared, word(frame));
      shared.fetch_add(1);
      shared.fetch_or(tracked::kAccessed);
      if ((shared.load() & tracked::kPinned) == 0) missing.push_back(frame);
    }
    if (missing.empty()) return true;
    MVGPU_RETURN_IF_ERROR(Ask(missing));
    for (const uint64_t frame : missing) {
      MVGPU_ASSIGN_OR_RETURN(const auto shared, word(frame));
      if ((shared.load() & tracked::kPinned) != 0) continue;
      MVGPU_RETURN_IF_ERROR(unmap(frames));
      return false;
    }
    return true;
  }
  Result<void> unmap(const std::vector<uint64_t>& frames) {
    for (const uint64_t frame : frames) {
      MVGPU_ASSIGN_OR_RETURN(const auto shared, word(frame));
      MVGPU_RETURN_IF_ERROR(
          CheckBounds("count of the frame", shared.load() & tracked::kCountMask, 1, kMostMaps));
      shared.fetch_sub(1);
    }
    return {};
  }
  // As much time goes by. Returns how many scans fell into it.
  uint64_t tick(uint64_t seconds) {
    const uint64_t before = seconds_ / kScanSeconds;
    seconds_ += seconds;
    const uint64_t scans = seconds_ / kScanSeconds - before;
    for (uint64_t i = 0; i < scans; ++i) pins_.scan();
    return scans;
  }

 private:
  // One frame goes as a word, several as a batch in memory.
  Result<void> Ask(const std::vector<uint64_t>& frames) {
    uint64_t request = frames[0] << 16 | kTracked;
    if (frames.size() > 1) {
      MVGPU_RETURN_IF_ERROR(guest_.store64(numbers_.batch, kTracked));
      MVGPU_RETURN_IF_ERROR(guest_.store64(numbers_.batch + 8, frames.size()));
      for (size_t i = 0; i < frames.size(); ++i) {
        MVGPU_RETURN_IF_ERROR(guest_.store64(numbers_.batch + 16 + i * 8, frames[i]));
      }
      request = numbers_.batch | uint64_t{1} << 63;
    }
    ++notifications_;
    std::atomic_ref<uint64_t>(requests_[0]).store(request);
    device_.write(CoiommuDevice::kDoorbells, 1);
    return {};
  }

  Guest& guest_;
  const Numbers numbers_;
  uint64_t next_table_;
  uint64_t seconds_ = 0;
  uint64_t maps_ = 0;
  uint64_t notifications_ = 0;
  std::array<uint64_t, 1> requests_{};
  DeviceIommu iommu_;
  domain::SpaceTarget target_;
  domain::CoiommuPins pins_;
  CoiommuDevice device_;
};

Result<std::string> MakeDevice(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Guest* const guest, world.guest());
  const auto& numbers = arguments.numbers;
  MVGPU_RETURN_IF_ERROR(guest->at(numbers[0], kPageSize));
  MVGPU_RETURN_IF_ERROR(
      CheckBounds("first table's offset in a page", numbers[0] % kPageSize, 0, 0));
  MVGPU_RETURN_IF_ERROR(CheckBounds("levels", numbers[2], 2, TrackingTable::kMostLevels));
  MVGPU_RETURN_IF_ERROR(CheckBounds("batch's offset in a word", numbers[1] % 8, 0, 0));
  MVGPU_RETURN_IF_ERROR(world.add(std::make_unique<Coiommu>(
      guest,
      Coiommu::Numbers{numbers[0], numbers[1], static_cast<unsigned>(numbers[2]), numbers[3]})));
  return std::string("active");
}

Result<std::string> GuestMaps(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Coiommu* const coiommu, world.part<Coiommu>());
  const uint64_t before = coiommu->notifications();
  MVGPU_ASSIGN_OR_RETURN(const bool is_mapped, coiommu->map(arguments.numbers));
  return fmt::format("{} {}", is_mapped ? "mapped" : "refused",
                     coiommu->notifications() == before ? "silently" : "by-notification");
}

Result<std::string> GuestUnmaps(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Coiommu* const coiommu, world.part<Coiommu>());
  MVGPU_RETURN_IF_ERROR(coiommu->unmap(arguments.numbers));
  return std::string("unmapped");
}

Result<std::string> Tick(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Coiommu* const coiommu, world.part<Coiommu>());
  MVGPU_RETURN_IF_ERROR(CheckBounds("seconds", arguments.numbers[0], 0, kMostSeconds));
  const uint64_t before = coiommu->pins().counters().unpins;
  const uint64_t scans = coiommu->tick(arguments.numbers[0]);
  return fmt::format("{} scans {} unpinned", scans, coiommu->pins().counters().unpins - before);
}

Result<std::string> Balloon(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Coiommu* const coiommu, world.part<Coiommu>());
  return std::string(coiommu->pins().release_for_balloon(arguments.numbers[0]) ? "given"
                                                                               : "refused");
}

Result<std::string> Park(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Coiommu* const coiommu, world.part<Coiommu>());
  coiommu->device().write(CoiommuDevice::kCommand, arguments.words[0] == "on"
                                                       ? CoiommuDevice::kPark
                                                       : CoiommuDevice::kUnpark);
  return std::string("done");
}

Result<std::string> Word(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Coiommu* const coiommu, world.part<Coiommu>());
  MVGPU_ASSIGN_OR_RETURN(const auto shared, coiommu->word(arguments.numbers[0]));
  return fmt::format("{:#x}", shared.load());
}

Result<std::string> SetWord(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Coiommu* const coiommu, world.part<Coiommu>());
  MVGPU_RETURN_IF_ERROR(CheckBounds("word", arguments.numbers[1], 0, UINT32_MAX));
  MVGPU_ASSIGN_OR_RETURN(const auto shared, coiommu->word(arguments.numbers[0]));
  shared.store(static_cast<uint32_t>(arguments.numbers[1]));
  return std::string("written");
}

Result<std::string> DeviceReads(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Coiommu* const coiommu, world.part<Coiommu>());
  return coiommu->iommu().bytes(arguments.numbers[0], arguments.numbers[1]);
}

Result<std::string> Figure(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Coiommu* const coiommu, world.part<Coiommu>());
  const std::string& which = arguments.words[0];
  const auto counters = coiommu->pins().counters();
  if (which == "pinned") return fmt::format("{}", counters.pinned_pages);
  if (which == "peak") return fmt::format("{}", counters.peak_pinned_pages);
  if (which == "pins") return fmt::format("{}", counters.pins);
  if (which == "scans") return fmt::format("{}", counters.scans);
  if (which == "unpins") return fmt::format("{}", counters.unpins);
  if (which == "forced") return fmt::format("{}", counters.forced);
  if (which == "in-use") return fmt::format("{}", counters.in_use);
  if (which == "maps") return fmt::format("{}", coiommu->maps());
  return fmt::format("{}", coiommu->notifications());
}

constexpr Command kCommands[] = {
    {Coiommu::kMaker, MakeDevice},
    {"coiommu-map FRAME...", GuestMaps},
    {"coiommu-unmap FRAME...", GuestUnmaps},
    {"tick SECONDS", Tick},
    {"coiommu-balloon FRAME", Balloon},
    {"coiommu-park on|off", Park},
    {"coiommu-word FRAME", Word},
    {"coiommu-word FRAME set VALUE", SetWord},
    {"coiommu-bytes IOVA COUNT", DeviceReads},
    {"coiommu pinned|peak|pins|scans|unpins|forced|in-use|maps|notifications", Figure},
};

}  // namespace

std::span<const Command> CoiommuCommands() { return kCommands; }

}  // namespace mvgpu::backend::scenario
