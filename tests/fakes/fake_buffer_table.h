#pragma once

#include <cerrno>
#include <cstdint>
#include <map>
#include <memory>
#include <utility>

#include "apionly-domain/base/address.h"
#include "apionly-domain/base/check.h"
#include "apionly-domain/pin/buffer_table.h"

namespace mvgpu::testing {

// Tables of registered buffers that remember what they hold and can be told to fail. The state is
// shared by all tables and outlives them.
class FakeBufferTable final : public domain::BufferTable {
 public:
  struct State {
    std::map<std::pair<int, uint32_t>, std::pair<uint64_t, uint64_t>> buffers;  // first page, count
    int tables = 0;
    uint32_t slots = 16384;  // of each table
    uint64_t calls = 0;
    uint64_t fail_at_call = 0;  // 1 = the next one; 0 = never
    uint64_t max_pages = UINT64_MAX;
    bool refuses_empty = false;

    uint64_t pages() const {
      uint64_t sum = 0;
      for (const auto& [slot, buffer] : buffers) sum += buffer.second;
      return sum;
    }
    bool is_held(const std::byte* address) const {
      const uint64_t page = reinterpret_cast<uintptr_t>(address) / kPageSize;
      for (const auto& [slot, buffer] : buffers)
        if (page >= buffer.first && page - buffer.first < buffer.second) return true;
      return false;
    }
  };
  explicit FakeBufferTable(std::shared_ptr<State> state)
      : state_(std::move(state)), number_(state_->tables++) {}

  uint32_t slots() const override { return state_->slots; }
  int fill(uint32_t slot, std::byte* address, uint64_t size) override {
    MVGPU_CHECK(slot < slots() && !state_->buffers.contains({number_, slot}));
    if (Fails() || state_->pages() + PagesIn(size) > state_->max_pages) return ENOMEM;
    state_->buffers[{number_, slot}] = {reinterpret_cast<uintptr_t>(address) / kPageSize,
                                        PagesIn(size)};
    return 0;
  }
  int empty(uint32_t slot) override {
    MVGPU_CHECK(state_->buffers.contains({number_, slot}));
    if (state_->refuses_empty || Fails()) return ENOMEM;
    state_->buffers.erase({number_, slot});
    return 0;
  }

 private:
  bool Fails() {
    ++state_->calls;
    return state_->fail_at_call != 0 && --state_->fail_at_call == 0;
  }

  std::shared_ptr<State> state_;
  const int number_;
};

}  // namespace mvgpu::testing
