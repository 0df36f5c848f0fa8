#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <set>
#include <span>
#include <string_view>
#include <vector>

#include "apionly-domain/base/check.h"
#include "dma-cache/mapper.h"

namespace mvgpu::testing {

// Hands out device addresses of its own, checks every unmap against them, and can fail at the n-th
// call.
class CountingMapper final : public dma::Mapper {
 public:
  enum class Addresses : uint8_t {
    kScattered,  // never contiguous by accident
    kTight,      // each run where the last one ended: neighbours, but pieces of their own
    kJoined,     // one piece for all runs of a call, as an IOMMU makes it
    kHost,       // the host's: the same for a page at two IOVAs
  };

  std::string_view name() const override { return "counting"; }

  Result<void> map(std::span<const domain::PinnedRun> runs, domain::Access access,
                   std::vector<dma::MappedRun>* mapped) override {
    ++map_calls;
    if (fail_at_call != 0 && --fail_at_call == 0)
      return Fail(ErrorCode::kLimit, "fake mapper is full");
    if (addresses == Addresses::kJoined) {
      MapPiece(IovaRange::FromFirstAndLast(runs.front().iova.start(), runs.back().iova.last()),
               next_, access, mapped);
      return {};
    }
    for (const domain::PinnedRun& run : runs) {
      const auto host = reinterpret_cast<uint64_t>(run.host);
      MapPiece(run.iova, addresses == Addresses::kHost ? host : next_, access, mapped);
    }
    return {};
  }

  void unmap(DmaAddr address, uint64_t size) override {
    if (on_unmap) on_unmap();
    const uint64_t piece = PageAt(address)->second.piece;
    for (uint64_t i = 0; i < PagesIn(size); ++i) {
      // Of one piece, never twice, never unknown.
      auto it = mapped_.lower_bound(address.value() + BytesIn(i));
      const auto end = mapped_.upper_bound(address.value() + BytesIn(i));
      // Where a page has one address at two IOVAs, nobody can say which of its pieces is meant.
      while (it != end && addresses != Addresses::kHost && it->second.piece != piece) ++it;
      MVGPU_CHECK(it != end);
      mapped_.erase(it);
    }
  }
  void flush() override {
    if (on_flush) on_flush();
  }
  bool is_current(const domain::PinnedRun& run, DmaAddr) override {
    const PageRun pages = run.iova_pages();
    const auto it = moved.lower_bound(pages.first);
    return it == moved.end() || *it >= pages.end();
  }

  // The next piece gets this address.
  void go_on_at(DmaAddr address) { next_ = address.value(); }

  uint64_t mapped_pages() const { return mapped_.size(); }
  std::set<uint64_t> mapped_iova_pages() const {
    std::set<uint64_t> pages;
    for (const auto& [address, page] : mapped_) pages.insert(page.iova_page);
    return pages;
  }
  // The IOVA page behind a device address. REQUIRES: mapped.
  uint64_t iova_page_at(DmaAddr address) const { return PageAt(address)->second.iova_page; }
  domain::Access access_at(DmaAddr address) const { return PageAt(address)->second.access; }

  Addresses addresses = Addresses::kScattered;
  uint64_t map_calls = 0;
  uint64_t fail_at_call = 0;                  // 1 = the next one; 0 = never
  std::map<uint64_t, uint64_t> maps_of_page;  // IOVA page -> times mapped, ever
  std::set<uint64_t> moved;                   // IOVA pages whose addresses are not current
  std::function<void()> on_unmap;
  std::function<void()> on_flush;

 private:
  struct Page {
    uint64_t iova_page;
    uint64_t piece;
    domain::Access access;
  };
  using Pages = std::multimap<uint64_t, Page>;  // by device page address

  void MapPiece(IovaRange iova, uint64_t address, domain::Access access,
                std::vector<dma::MappedRun>* mapped) {
    mapped->push_back({iova, DmaAddr(address)});
    ++pieces_;
    for (uint64_t i = 0; i < PagesIn(iova.size()); ++i) {
      const uint64_t iova_page = iova.start().page() + i;
      ++maps_of_page[iova_page];
      mapped_.emplace(address + BytesIn(i), Page{iova_page, pieces_, access});
    }
    next_ += iova.size() + (addresses == Addresses::kScattered ? 16 * kPageSize : 0);
  }
  Pages::const_iterator PageAt(DmaAddr address) const {
    const auto it = mapped_.find(address.value() & ~kPageMask);
    MVGPU_CHECK(it != mapped_.end());
    return it;
  }

  uint64_t next_ = uint64_t{1} << 40;
  uint64_t pieces_ = 0;
  Pages mapped_;
};

}  // namespace mvgpu::testing
