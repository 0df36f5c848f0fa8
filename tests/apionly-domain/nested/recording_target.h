#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <map>
#include <utility>
#include <vector>

#include "apionly-domain/api_only_domain.h"
#include "apionly-domain/nested/nested_target.h"

namespace mvgpu::testing {

// What is mapped, page by page, and the calls that made it so. Sees to it that nothing is mapped
// over, that only what is mapped is unmapped, and that whatever the device reaches is pinned.
class RecordingTarget final : public domain::NestedTarget {
 public:
  struct Page {
    uint64_t guest;  // byte address
    domain::Access access;
    bool operator==(const Page&) const = default;
  };
  struct Call {
    bool is_map;
    uint64_t iova;
    uint64_t size;
    bool operator==(const Call&) const = default;
  };

  explicit RecordingTarget(const domain::ApiOnlyDomain* guest) : guest_(*guest) {}

  Result<void> map(IovaRange iova, domain::GuestPhys start, domain::Access access) override {
    calls.push_back({true, iova.start().value(), iova.size()});
    if (fails_at && iova.contains(Iova(*fails_at))) {
      return Fail(ErrorCode::kLimit, "the target is full");
    }
    EXPECT_TRUE(IsPinned(start.value(), iova.size())) << std::hex << start.value() << " is not";
    for (uint64_t done = 0; done < iova.size(); done += kPageSize) {
      const Page page{start.value() + done, access};
      EXPECT_TRUE(pages.try_emplace(iova.start().value() + done, page).second)
          << "mapped over at " << std::hex << iova.start().value() + done;
    }
    return {};
  }
  void unmap(IovaRange iova) override {
    calls.push_back({false, iova.start().value(), iova.size()});
    for (uint64_t done = 0; done < iova.size(); done += kPageSize) {
      const auto it = pages.find(iova.start().value() + done);
      ASSERT_NE(it, pages.end()) << "not mapped: " << std::hex << iova.start().value() + done;
      if (done == 0 || done + kPageSize == iova.size()) {  // asking for each would take long
        EXPECT_TRUE(IsPinned(it->second.guest, kPageSize)) << "was released before it was unmapped";
      }
      pages.erase(it);
    }
  }
  std::vector<Call> take_calls() { return std::exchange(calls, {}); }

  std::map<uint64_t, Page> pages;  // by IOVA, bytes
  std::vector<Call> calls;
  std::optional<uint64_t> fails_at;  // IOVA

 private:
  bool IsPinned(uint64_t guest, uint64_t size) const {
    const auto range = IovaRange::FromFirstAndLast(Iova(guest), Iova(guest + (size - 1)));
    uint64_t pinned = 0;
    for (const auto& holder : guest_.holders(range)) pinned += holder.pages;
    return pinned >= PagesIn(size);
  }

  const domain::ApiOnlyDomain& guest_;
};

}  // namespace mvgpu::testing
