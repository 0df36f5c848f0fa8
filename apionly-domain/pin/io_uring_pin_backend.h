#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "apionly-domain/pin/area_pin_backend.h"
#include "apionly-domain/pin/buffer_table.h"

namespace mvgpu::domain {

// Registered buffers of io_uring: long-term pins of the pages themselves (FOLL_LONGTERM), which
// neither move nor split a memory area, for a fifth of what mlock costs.
//
// An area is one buffer in one slot of a table. Runs are cut at multiples of 2 MiB of the file: a
// part of a buffer is unpinned by registering what stays and then dropping the whole, and that
// bounds its cost (and a huge page is in one buffer only, which the kernel's accounting likes).
// Where what stays cannot be registered, for want of a slot or under RLIMIT_MEMLOCK, the buffer
// stays whole until its last page is unpinned; pages of it that are pinned again meanwhile cost no
// system call.
//
// The kernel counts the pages in VmPin of this process, and compares the sum over all processes of
// the user with RLIMIT_MEMLOCK of this one, unless it has CAP_IPC_LOCK when a table is made. It
// counts whole huge pages. unpin() is done when it returns, on Linux 6.4 and later; before, the
// kernel lets go of a dropped buffer up to a second later.
class IoUringPinBackend final : public AreaPinBackend {
 public:
  static constexpr size_t kMaxTables = 64;
  static constexpr uint64_t kMaxBufferPages = PagesIn(2ull << 20);
  using MakeTable = std::function<Result<std::unique_ptr<BufferTable>>()>;

  // Makes the first table at once. Errors: those of `make_table`.
  static Result<std::unique_ptr<PinBackend>> Create(MakeTable make_table);

  std::string_view name() const override { return "io-uring"; }
  uint32_t granule_pages(const GuestFile&) const override { return 1; }
  uint64_t locked_pages() const override { return AreaPinBackend::locked_pages() + refused_pages_; }

 private:
  using Slot = uint32_t;  // over all tables; the tag of an area
  static constexpr Slot kNoSlot = UINT32_MAX;
  struct Refused {
    Slot slot;
    uint64_t pages;
  };

  explicit IoUringPinBackend(MakeTable make_table) : make_table_(std::move(make_table)) {}

  Result<uint64_t> Cover(const GuestFile& file, Areas& areas, Areas::iterator next,
                         PageRun gap) override;
  Result<void> Reuse(const GuestFile& file, Areas::value_type& area, PageRun pages) override;
  bool Cut(const GuestFile& file, Areas& areas, Areas::iterator area, PageRun part) override;
  void Release(const GuestFile& file, Areas& areas, Areas::iterator area) override;
  void ReleaseRefused(const GuestFile& file, const Areas& areas) override;

  Result<void> AddTable();
  // A slot that is empty; makes a table when all are in use. Errors: kLimit, those of make_table.
  Result<Slot> TakeSlot();
  // Both answer 0 or an errno. A slot that could not be filled is given back.
  int Fill(Slot slot, const GuestFile& file, PageRun pages);
  int Empty(Slot slot);
  // A slot for `pages`, filled; kNoSlot for no pages; nullopt when that fails.
  std::optional<Slot> Reregister(const GuestFile& file, PageRun pages);
  // Empties a slot. What the kernel refuses to drop is tried again before the next call.
  void Drop(Slot slot, uint64_t pages);
  void RetryRefused();

  const MakeTable make_table_;
  std::vector<std::unique_ptr<BufferTable>> tables_;  // all of the same size
  uint32_t slots_per_table_ = 0;
  std::vector<Slot> free_slots_;  // used before
  Slot next_slot_ = 0;            // never used, from here on
  std::vector<Refused> refused_;
  uint64_t refused_pages_ = 0;
};

}  // namespace mvgpu::domain
