#pragma once

// One domain of the model check beside what the naive model says about it.

#include <array>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "apionly-domain/api_only_domain.h"
#include "tests/apionly-domain/model/naive_pins.h"
#include "tests/apionly-domain/model/strict_backend.h"

namespace mvgpu::domain::model {

inline constexpr uint32_t kOwners = 2;
constexpr uint32_t OwnerOf(uint32_t context) { return context == 2 ? 1 : 0; }

// What an owner does when it is told to let go.
enum class Answer : uint8_t {
  kLetGo,         // of everything that touches the range
  kLetGoExactly,  // cuts handles, keeps what lies outside the range
  kLetGoOfSome,   // forgets the pages that it holds without a handle
  kKeep,
};
inline constexpr uint32_t kAnswers = 4;

class ModelOwner final : public PinOwner {
 public:
  std::string_view pin_owner_name() const override { return name; }
  void on_revoke(IovaRange range) override { told(range); }

  std::string name;
  std::function<void(IovaRange)> told;
  Answer answer = Answer::kLetGo;
  uint64_t times_told = 0;
};

struct Handle {
  uint32_t context = 0;
  bool for_write = false;
  How how = How::kHandle;
  uint64_t first = 0;  // IOVA pages
  uint64_t count = 0;
  PinnedRange range;

  uint64_t end() const { return first + count; }
  // Keeps what lies before `page`.
  Handle SplitOff(uint64_t page) {
    Handle tail = {context, for_write,    how,
                   page,    end() - page, range.split_off(Iova(page * kPageSize))};
    count = page - first;
    return tail;
  }
};

// A translation that is kept together with the generation that it had.
struct Watch {
  uint64_t page = 0;
  uint64_t generation = 0;
  std::byte* host = nullptr;
  bool is_gone = false;  // its mapping was removed since
};

struct Side {
  uint64_t pin_limit = UINT64_MAX;  // unique pages
  std::shared_ptr<StrictBackend::State> backend = std::make_shared<StrictBackend::State>();
  std::array<ModelOwner, kOwners> owners;
  std::unique_ptr<ApiOnlyDomain> domain;
  std::array<std::unique_ptr<PinContext>, kContexts> contexts;
  std::vector<Handle> handles;
  std::optional<Watch> watch;

  // The naive model.
  bool attached = false;
  NaivePins pins;
  NaiveDirty dirty;
  uint64_t peak = 0;          // unique pages
  uint64_t pages_pinned = 0;  // ever
  uint64_t first_locks = 0;   // ever
  uint64_t revocations = 0;   // ever
};

// A domain that only counts what it is told, and refuses when it is told to.
class RefusingDomain final : public Domain {
 public:
  std::string_view name() const override { return "refusing"; }
  Result<void> on_map(const Mapping& mapping) override {
    if (std::exchange(refuse_map, false)) return Fail(ErrorCode::kSystem, "map is refused");
    pages += mapping.pages();
    return {};
  }
  void on_map_done(const Mapping& mapping, bool mapped) override {
    if (!mapped) pages -= mapping.pages();
  }
  Result<void> on_unmap(const Unmapping&) override {
    if (std::exchange(refuse_unmap, false)) return Fail(ErrorCode::kSystem, "unmap is refused");
    return {};
  }
  void on_unmap_done(const Unmapping& unmapping, bool unmapped) override {
    for (const Mapping& mapping : unmapping.mappings) pages -= unmapped ? mapping.pages() : 0;
  }

  bool refuse_map = false;
  bool refuse_unmap = false;
  uint64_t pages = 0;
  bool attached = false;
};

}  // namespace mvgpu::domain::model
