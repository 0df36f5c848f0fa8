// Kevin Tian's cache: device addresses as dma_map_page() returned them, with and without an IOMMU,
// and a device that is assigned to the VM beside it.

#include <fmt/format.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "apionly-domain/assigned/assigned_domain.h"
#include "backend/scenario/commands.h"
#include "backend/scenario/device_iommu.h"
#include "dma-cache/dma_cache.h"
#include "dma-cache/iommu_mapper.h"

namespace mvgpu::backend::scenario {

namespace {

using dma::DmaMapping;

constexpr size_t kMostCaches = 16;
constexpr size_t kMostUsers = 16;

// A graphics driver's cache, with its users.
class Cache {
 public:
  // `iommu` is null without one; `assigned` may be.
  Cache(Guest* guest, DeviceIommu* iommu, domain::AssignedDomain* assigned)
      : iommu_(iommu),
        mapper_(iommu == nullptr ? dma::MakeNoneMapper()
                                 : std::make_unique<dma::IommuMapper>(&iommu->space(), assigned)),
        cache_(&guest->domain(), mapper_.get()) {}

  Result<void> map(const std::string& name, const std::string& user, IovaRange range,
                   dma::Direction direction) {
    if (mappings_.contains(name)) {
      return Fail(ErrorCode::kOverlap, fmt::format("the mapping '{}' is there: unmap it", name));
    }
    if (users_.size() == kMostUsers && !users_.contains(user)) {
      return Fail(ErrorCode::kLimit, fmt::format("more than {} users of a cache", kMostUsers));
    }
    User& owner = users_[user];
    if (owner.dma == nullptr) owner.dma = cache_.open_user(&owner);
    MVGPU_ASSIGN_OR_RETURN(auto mapping, owner.dma->map(range, direction));
    mappings_.emplace(name, std::move(mapping));
    return {};
  }
  Result<void> unmap(const std::string& name) {
    if (mappings_.erase(name) == 1) return {};
    return tl::unexpected<Error>(Missing(name));
  }
  Result<const DmaMapping*> find(const std::string& name) const {
    const auto found = mappings_.find(name);
    if (found != mappings_.end()) return &found->second;
    return tl::unexpected<Error>(Missing(name));
  }
  // What the device reads at its own address of a byte.
  Result<std::string> bytes(const DmaMapping& mapping, uint64_t offset, uint64_t count) {
    if (!mapping.is_valid()) return std::string("revoked");
    for (const dma::MappedRun& run : mapping.runs()) {
      if (offset >= run.iova.size()) {
        offset -= run.iova.size();
        continue;
      }
      const uint64_t address = run.address.value() + offset;
      if (iommu_ != nullptr) return iommu_->bytes(address, count);
      return DeviceBytes(reinterpret_cast<const std::byte*>(address), address & kPageMask, count);
    }
    return Fail(ErrorCode::kInvalid, "the mapping ends before that byte");
  }
  dma::DmaCache::Counters counters() const { return cache_.counters(); }
  uint64_t told() const {
    uint64_t told = 0;
    for (const auto& [name, user] : users_) told += user.told;
    return told;
  }
  // Pages whose address is the assigned device's.
  uint64_t shared() const {
    for (const auto& [name, value] : cache_.mapper_figures()) {
      if (name == "shared_pages") return value;
    }
    return 0;
  }

 private:
  struct User final : dma::DmaUser::Owner {
    void on_revoke(IovaRange) override { ++told; }
    uint64_t told = 0;
    std::unique_ptr<dma::DmaUser> dma;
  };
  static Error Missing(const std::string& name) {
    return Error(ErrorCode::kNotMapped, fmt::format("there is no mapping '{}'", name));
  }

  DeviceIommu* const iommu_;  // outlives this: the part's
  const std::unique_ptr<dma::Mapper> mapper_;
  dma::DmaCache cache_;
  std::map<std::string, User> users_;
  std::map<std::string, DmaMapping> mappings_;  // given up before their users go
};

class Dma final : public World::Part {
 public:
  static constexpr World::Slot kSlot = World::Slot::kDma;
  static constexpr std::string_view kMaker = "cache NAME none|iommu', or 'assign";

  explicit Dma(Guest* guest) : guest_(*guest) {}
  ~Dma() override {
    caches_.clear();
    static_cast<void>(unassign());
  }

  Result<void> assign() {
    if (assigned_ != nullptr) return Fail(ErrorCode::kOverlap, "a device is assigned already");
    MVGPU_ASSIGN_OR_RETURN(auto made,
                           domain::AssignedDomain::Create({}, &iommu_.space(), &guest_.ledger()));
    MVGPU_RETURN_IF_ERROR(guest_.container().attach(made.get()));
    assigned_ = std::move(made);
    return {};
  }
  Result<void> unassign() {
    if (assigned_ == nullptr) return Fail(ErrorCode::kNotMapped, "no device is assigned");
    MVGPU_RETURN_IF_ERROR(guest_.container().detach(assigned_.get()));
    if (!caches_.empty()) {  // their mappers know it; it stays without mappings
      retired_.push_back(std::move(assigned_));
    }
    assigned_.reset();
    return {};
  }
  Result<void> add_cache(const std::string& name, bool with_iommu) {
    if (caches_.contains(name) || caches_.size() == kMostCaches) {
      return Fail(ErrorCode::kOverlap, fmt::format("no room for a cache '{}'", name));
    }
    caches_.try_emplace(name, &guest_, with_iommu ? &iommu_ : nullptr, assigned_.get());
    return {};
  }
  Result<Cache*> cache(const std::string& name) {
    const auto found = caches_.find(name);
    if (found != caches_.end()) return &found->second;
    return Fail(ErrorCode::kNotMapped, fmt::format("there is no cache '{}'", name));
  }
  DeviceIommu& iommu() { return iommu_; }

 private:
  Guest& guest_;
  DeviceIommu iommu_;
  std::unique_ptr<domain::AssignedDomain> assigned_;
  std::vector<std::unique_ptr<domain::AssignedDomain>> retired_;
  std::map<std::string, Cache> caches_;
};

Result<Dma*> DmaOf(World& world) {
  MVGPU_ASSIGN_OR_RETURN(Guest* const guest, world.guest());
  if (!world.has<Dma>()) MVGPU_RETURN_IF_ERROR(world.add(std::make_unique<Dma>(guest)));
  return world.part<Dma>();
}

Result<std::string> Assign(World& world, const Arguments&) {
  MVGPU_ASSIGN_OR_RETURN(Dma* const dma, DmaOf(world));
  MVGPU_RETURN_IF_ERROR(dma->assign());
  return std::string("attached");
}

Result<std::string> Unassign(World& world, const Arguments&) {
  MVGPU_ASSIGN_OR_RETURN(Dma* const dma, DmaOf(world));
  MVGPU_RETURN_IF_ERROR(dma->unassign());
  return std::string("detached");
}

Result<std::string> AssignedBytes(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Dma* const dma, DmaOf(world));
  return dma->iommu().bytes(arguments.numbers[0], arguments.numbers[1]);
}

Result<std::string> MakeCache(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Dma* const dma, DmaOf(world));
  MVGPU_RETURN_IF_ERROR(dma->add_cache(arguments.words[0], arguments.words[1] == "iommu"));
  return std::string("empty");
}

// The cache is the first word of every command below.
Result<Cache*> CacheOf(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Dma* const dma, world.part<Dma>());
  return dma->cache(arguments.words[0]);
}

Result<std::string> DmaMap(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Cache* const cache, CacheOf(world, arguments));
  MVGPU_ASSIGN_OR_RETURN(const IovaRange range,
                         RangeFrom(arguments.numbers[0], arguments.numbers[1]));
  const std::string& way = arguments.words[3];
  const auto direction = way == "to-device"     ? dma::Direction::kToDevice
                         : way == "from-device" ? dma::Direction::kFromDevice
                                                : dma::Direction::kBidirectional;
  const auto before = cache->counters();
  MVGPU_RETURN_IF_ERROR(cache->map(arguments.words[2], arguments.words[1], range, direction));
  const auto after = cache->counters();
  return fmt::format("{} hits {} misses", after.hit_pages - before.hit_pages,
                     after.miss_pages - before.miss_pages);
}

Result<std::string> DmaUnmap(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Cache* const cache, CacheOf(world, arguments));
  MVGPU_RETURN_IF_ERROR(cache->unmap(arguments.words[1]));
  return std::string("done");
}

Result<std::string> DmaBytes(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Cache* const cache, CacheOf(world, arguments));
  MVGPU_ASSIGN_OR_RETURN(const DmaMapping* const mapping, cache->find(arguments.words[1]));
  return cache->bytes(*mapping, arguments.numbers[0], arguments.numbers[1]);
}

Result<std::string> DmaRuns(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Cache* const cache, CacheOf(world, arguments));
  MVGPU_ASSIGN_OR_RETURN(const DmaMapping* const mapping, cache->find(arguments.words[1]));
  return fmt::format("{}", mapping->runs().size());
}

Result<std::string> AreSame(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Cache* const cache, CacheOf(world, arguments));
  MVGPU_ASSIGN_OR_RETURN(const DmaMapping* const one, cache->find(arguments.words[1]));
  MVGPU_ASSIGN_OR_RETURN(const DmaMapping* const other, cache->find(arguments.words[2]));
  const bool same = one->runs()[0].address == other->runs()[0].address;
  return std::string(same ? "yes" : "no");
}

// Only of an IOMMU: without one it is another address in every run.
Result<std::string> DeviceAddress(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Cache* const cache, CacheOf(world, arguments));
  MVGPU_ASSIGN_OR_RETURN(const DmaMapping* const mapping, cache->find(arguments.words[1]));
  return fmt::format("{:#x}", mapping->runs()[0].address.value());
}

Result<std::string> Figure(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Cache* const cache, CacheOf(world, arguments));
  const std::string& which = arguments.words[1];
  const auto counters = cache->counters();
  if (which == "mapper-calls") return fmt::format("{}", counters.mapper_calls);
  if (which == "unmapped") return fmt::format("{}", counters.unmapped_pages);
  if (which == "hits") return fmt::format("{}", counters.hit_pages);
  if (which == "misses") return fmt::format("{}", counters.miss_pages);
  if (which == "cached") return fmt::format("{}", counters.cached_pages);
  if (which == "revoked") return fmt::format("{}", counters.revoked_pages);
  if (which == "shared") return fmt::format("{}", cache->shared());
  return fmt::format("{}", cache->told());
}

constexpr Command kCommands[] = {
    {"assign", Assign},
    {"unassign", Unassign},
    {"assigned-bytes IOVA COUNT", AssignedBytes},
    {"cache NAME none|iommu", MakeCache},
    {"dma-map NAME NAME NAME IOVA SIZE to-device|from-device|both", DmaMap},
    {"dma-unmap NAME NAME", DmaUnmap},
    {"dma-bytes NAME NAME OFFSET COUNT", DmaBytes},
    {"dma-runs NAME NAME", DmaRuns},
    {"dma-same NAME NAME NAME", AreSame},
    {"dma-address NAME NAME", DeviceAddress},
    {"dma NAME mapper-calls|unmapped|hits|misses|cached|revoked|shared|told", Figure},
};

}  // namespace

std::span<const Command> DmaCommands() { return kCommands; }

}  // namespace mvgpu::backend::scenario
