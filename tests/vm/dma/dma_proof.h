#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <cstdio>
#include <memory>
#include <optional>
#include <string_view>
#include <vector>

#include "apionly-domain/api_only_domain.h"
#include "apionly-domain/container.h"
#include "dma-cache/dma_cache.h"
#include "dma-cache/mapper.h"
#include "tests/fakes/dma_party.h"
#include "tests/fakes/guest_ram.h"
#include "tests/vm/dma/edu_device.h"

namespace mvgpu::testing {

// Facts and checks for whoever reads the guest's console, see tests/vm/init.
class Facts {
 public:
  template <typename T>
  void say(std::string_view key, const T& value) {
    fmt::print("MVGPU-GUEST: {}={}\n", key, value);
    std::fflush(stdout);
  }
  void check(std::string_view what, bool is_true) {
    ++checks_;
    if (!is_true) ++failures_;
    say(is_true ? "ok" : "failed", what);
  }
  // A step without which the others mean nothing: ends the program when it failed.
  template <typename T>
  T must(std::string_view what, Result<T> result) {
    if (!result) {
      say("failed", fmt::format("{}: {}", what, result.error().message()));
      std::exit(1);
    }
    if constexpr (!std::is_void_v<T>) return std::move(*result);
  }
  int exit_code() {
    say("checks", checks_);
    say("failures", failures_);
    return failures_ == 0 && checks_ > 0 ? 0 : 1;
  }

 private:
  int checks_ = 0;
  int failures_ = 0;
};

// What the device is told, for a use of guest memory by it.
struct DeviceUse {
  dma::DmaMapping mapping;
  // The address of an IOVA inside it.
  DmaAddr at(uint64_t iova) const {
    for (const auto& run : mapping.runs()) {
      if (run.iova.contains(Iova(iova))) return run.address + (iova - run.iova.start().value());
    }
    return DmaAddr();
  }
};

// A VM with guest memory at two places, an api-only domain, a cache, and edu as the device that
// does DMA at exactly the addresses that the cache returns.
//
//   kLow    32 pages, in two mappings that continue each other (16 pages each), in a row in RAM
//   kHigh   8 pages, each a mapping of its own, backwards in RAM and a page apart
class DmaProof {
 public:
  static constexpr uint64_t kLow = 0x10000000;
  static constexpr uint64_t kLowHalf = 16 * kPageSize;
  static constexpr uint64_t kHigh = 0x140000000;
  static constexpr uint64_t kHighPages = 8;

  DmaProof(Facts* facts, std::unique_ptr<domain::PinBackend> pins, dma::Mapper* mapper,
           EduDevice* edu);
  ~DmaProof();

  // Bytes arrive, in both directions, in several sizes, at both places.
  void check_copies();
  // One load by the device that crosses a page whose neighbour lies elsewhere in RAM.
  // REQUIRES: the use has it in one run.
  void check_crossing(const DeviceUse& use);

  // Must work; try_use() may fail.
  DeviceUse use(uint64_t iova, uint64_t size);
  Result<DeviceUse> try_use(uint64_t iova, uint64_t size);
  void map_low_half(uint64_t half);
  // The VMM takes [iova, iova + size) away, in which `use` has pages: the cache's user hears of
  // exactly that, `use` is no good any more, and the memory cannot be used.
  void take_away(const DeviceUse& use, uint64_t iova, uint64_t size, std::string_view what);
  domain::Container& container() { return container_; }
  // Of this process, as the domain says.
  uint64_t locked_pages() const { return domain_->counters().locked_pages; }
  uint64_t pinned_pages() const { return domain_->counters().unique_pages; }
  // This guest's own view of a byte at an IOVA.
  std::byte* byte_at(uint64_t iova) { return ram_.at(OffsetOf(iova)); }
  std::vector<std::byte> bytes_at(uint64_t iova, uint64_t size);
  void fill(uint64_t iova, uint64_t size, unsigned seed);
  // All of guest memory, for a comparison later.
  std::vector<std::byte> all_bytes();
  // Whether all of guest memory is as it was, but for the page of `except`, if there is one.
  bool is_unchanged(const std::vector<std::byte>& before,
                    std::optional<uint64_t> except = std::nullopt);

 private:
  static uint64_t OffsetOf(uint64_t iova);
  void CheckCopy(const DeviceUse& from, const DeviceUse& to, uint64_t from_iova, uint64_t to_iova,
                 uint64_t size);

  Facts& facts_;  // these outlive this
  EduDevice& edu_;
  GuestRam ram_{64 * kPageSize};
  domain::Container container_;
  std::unique_ptr<domain::ApiOnlyDomain> domain_;
  std::optional<dma::DmaCache> cache_;
  std::optional<DmaParty> user_;
};

}  // namespace mvgpu::testing
