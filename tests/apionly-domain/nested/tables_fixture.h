#pragma once

#include <span>

#include "tests/apionly-domain/nested/nested_fixture.h"

namespace mvgpu::domain {

// Tables at the addresses that the test wants: windows into guest RAM, with entries as they are on
// little-endian machines.
class TablesTest : public NestedTest {
 protected:
  // The windows lie one behind the other in RAM; the same `slot` at two addresses shows the same
  // memory twice.
  static constexpr uint64_t kWindowSize = 0x1'0000;
  void Window(uint64_t address, uint64_t slot, Access access = Access::kReadWrite) {
    Map(address, 0x8'0000 + slot * kWindowSize, kWindowSize, access);
  }
  void Put(uint64_t address, uint64_t entry) {
    ASSERT_TRUE(domain_->write(Iova(address), std::as_bytes(std::span(&entry, 1))).has_value());
  }
  uint64_t Get(uint64_t address) {
    uint64_t entry = 0;
    EXPECT_TRUE(
        domain_->read(Iova(address), std::as_writable_bytes(std::span(&entry, 1))).has_value());
    return entry;
  }
  static void ExpectLeaf(const WalkResult& result, const Leaf& leaf) {
    ASSERT_TRUE(result.has_value()) << result.error().ToString();
    EXPECT_EQ(result->out, leaf.out) << std::hex << result->out;
    EXPECT_EQ(result->span, leaf.span);
    EXPECT_EQ(result->rights, leaf.rights);
  }
  static void ExpectFault(const WalkResult& result, FaultCode code, uint8_t level) {
    ASSERT_FALSE(result.has_value());
    EXPECT_EQ(result.error().code, code) << result.error().ToString();
    EXPECT_EQ(result.error().level, level);
  }
};

inline constexpr Rights kReadWrite = kMayRead | kMayWrite;
inline constexpr Rights kAllRights = kReadWrite | kMayExecute;
inline constexpr uint64_t kTwoMiB = uint64_t{1} << 21;
inline constexpr uint64_t kOneGiB = uint64_t{1} << 30;

// Changes an entry each time somebody is about to exchange it, as a guest at the wrong moment.
class ChangingTables final : public GuestTables {
 public:
  ChangingTables(const GuestTables* tables, std::function<void(uint64_t)> change)
      : tables_(*tables), change_(std::move(change)) {}
  tl::expected<void, Fault> load(uint64_t address, std::span<uint64_t> words) const override {
    return tables_.load(address, words);
  }
  tl::expected<uint64_t, Fault> compare_exchange(uint64_t address, uint64_t expected,
                                                 uint64_t desired) const override {
    change_(address);
    return tables_.compare_exchange(address, expected, desired);
  }

 private:
  const GuestTables& tables_;
  const std::function<void(uint64_t)> change_;
};

}  // namespace mvgpu::domain
