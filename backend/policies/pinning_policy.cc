#include "backend/policies/pinning_policy.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <sstream>

#include "apionly-domain/base/check.h"

namespace mvgpu::backend {

namespace {

// 0.4 % of memory: with what is in use at a time, less than the 0.5 % that coIOMMU reports.
constexpr uint64_t kIdleShare = 256;
// 2 MiB; less where several of these would fill the idle list.
constexpr uint64_t kAheadPages = 512;
constexpr uint64_t kWindowsInIdleList = 8;

uint64_t IdlePages(const PolicyGuest& guest) { return guest.trace().memory_pages() / kIdleShare; }
uint64_t AheadPages(const PolicyGuest& guest) {
  return std::bit_floor(std::min(kAheadPages, IdlePages(guest) / kWindowsInIdleList));
}

using Make = std::unique_ptr<PinningPolicy> (*)(PolicyGuest*);
constexpr std::array<std::string_view, 8> kNames{
    "static", "map-unmap", "kvmgt", "coiommu", "iopf", "mvgpu", "mvgpu-idle", "mvgpu-ahead"};
constexpr std::array<Make, kNames.size()> kMakers{
    MakeStaticPolicy,
    MakeMapUnmapPolicy,
    MakeKvmgtPolicy,
    MakeCoiommuPolicy,
    MakeIopfPolicy,
    [](PolicyGuest* guest) { return MakeCachePolicy(guest, {}); },
    [](PolicyGuest* guest) {
      return MakeCachePolicy(guest, {IdlePages(*guest), 0});
    },
    [](PolicyGuest* guest) {
      return MakeCachePolicy(guest, {IdlePages(*guest), AheadPages(*guest)});
    },
};

}  // namespace

std::span<const std::string_view> PolicyNames() { return kNames; }

Result<std::vector<std::string>> ParsePolicyNames(const std::string& list) {
  if (list.empty()) return std::vector<std::string>(kNames.begin(), kNames.end());
  std::vector<std::string> names;
  std::istringstream words(list);
  for (std::string name; std::getline(words, name, ',');) {
    if (std::find(kNames.begin(), kNames.end(), name) == kNames.end()) {
      return Fail(ErrorCode::kInvalid, fmt::format("no policy is called '{}', choose of: {}", name,
                                                   fmt::join(kNames, ", ")));
    }
    if (std::find(names.begin(), names.end(), name) != names.end()) {
      return Fail(ErrorCode::kInvalid, fmt::format("policy '{}' is given twice", name));
    }
    names.push_back(name);
  }
  return names;
}

std::unique_ptr<PinningPolicy> MakePolicy(std::string_view name, PolicyGuest* guest) {
  const auto found = std::find(kNames.begin(), kNames.end(), name);
  MVGPU_CHECK(found != kNames.end());
  return kMakers[static_cast<size_t>(found - kNames.begin())](guest);
}

}  // namespace mvgpu::backend
