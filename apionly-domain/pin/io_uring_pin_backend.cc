#include "apionly-domain/pin/io_uring_pin_backend.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <optional>
#include <utility>

#include "apionly-domain/pin/pin_errors.h"

namespace mvgpu::domain {

Result<std::unique_ptr<PinBackend>> IoUringPinBackend::Create(MakeTable make_table) {
  std::unique_ptr<IoUringPinBackend> backend(new IoUringPinBackend(std::move(make_table)));
  MVGPU_RETURN_IF_ERROR(backend->AddTable());
  return backend;
}

Result<uint64_t> IoUringPinBackend::Cover(const GuestFile& file, Areas& areas, Areas::iterator next,
                                          PageRun gap) {
  if (!file.is_writable()) {
    return Fail(ErrorCode::kPermission,
                fmt::format("cannot pin file pages {}-{}: io_uring pins for writing and guest "
                            "memory is read-only; use --pin=mlock",
                            gap.first, gap.end() - 1));
  }
  RetryRefused();
  const uint64_t boundary = (gap.first / kMaxBufferPages + 1) * kMaxBufferPages;
  const PageRun run{gap.first, std::min(gap.end(), boundary) - gap.first};
  MVGPU_ASSIGN_OR_RETURN(const Slot slot, TakeSlot());
  if (const int error = Fill(slot, file, run); error != 0)
    return tl::unexpected<Error>(IoUringPinError(error, file, run));
  AddArea(areas, next, run.first, {run.count, run.count, slot});
  return run.count;
}

Result<void> IoUringPinBackend::Reuse(const GuestFile&, Areas::value_type&, PageRun) {
  return {};  // the buffer has had them pinned all the time
}

bool IoUringPinBackend::Cut(const GuestFile& file, Areas& areas, Areas::iterator area,
                            PageRun part) {
  RetryRefused();
  const PageRun whole = RunOf(*area);
  const Slot old_slot = area->second.tag;
  const auto left = Reregister(file, {whole.first, part.first - whole.first});
  if (!left) return false;
  const auto right = Reregister(file, {part.end(), whole.end() - part.end()});
  if (!right) {
    if (*left != kNoSlot) Drop(*left, part.first - whole.first);
    return false;
  }
  SplitArea(areas, area, part, *left, *right);
  Drop(old_slot, whole.count);
  return true;
}

void IoUringPinBackend::Release(const GuestFile&, Areas& areas, Areas::iterator area) {
  RetryRefused();
  const Slot slot = area->second.tag;
  const uint64_t pages = area->second.pages;
  RemoveArea(areas, area);
  Drop(slot, pages);
}

void IoUringPinBackend::ReleaseRefused(const GuestFile&, const Areas&) {
  MVGPU_CHECK(false);  // Release() removes every area
}

Result<void> IoUringPinBackend::AddTable() {
  if (tables_.size() == kMaxTables) {
    return Fail(ErrorCode::kLimit,
                fmt::format("cannot pin more: {} io_uring buffers are in use, the most there can "
                            "be; use --pin=mlock",
                            next_slot_));
  }
  MVGPU_ASSIGN_OR_RETURN(std::unique_ptr<BufferTable> table, make_table_());
  slots_per_table_ = table->slots();
  tables_.push_back(std::move(table));
  return {};
}

Result<IoUringPinBackend::Slot> IoUringPinBackend::TakeSlot() {
  if (!free_slots_.empty()) {
    const Slot slot = free_slots_.back();
    free_slots_.pop_back();
    return slot;
  }
  if (next_slot_ == tables_.size() * slots_per_table_) MVGPU_RETURN_IF_ERROR(AddTable());
  return next_slot_++;
}

int IoUringPinBackend::Fill(Slot slot, const GuestFile& file, PageRun pages) {
  const int error = tables_[slot / slots_per_table_]->fill(
      slot % slots_per_table_, file.host_address(BytesIn(pages.first)), BytesIn(pages.count));
  if (error != 0) free_slots_.push_back(slot);
  return error;
}

int IoUringPinBackend::Empty(Slot slot) {
  const int error = tables_[slot / slots_per_table_]->empty(slot % slots_per_table_);
  if (error == 0) free_slots_.push_back(slot);
  return error;
}

std::optional<IoUringPinBackend::Slot> IoUringPinBackend::Reregister(const GuestFile& file,
                                                                     PageRun pages) {
  if (pages.count == 0) return kNoSlot;
  const auto slot = TakeSlot();
  if (!slot || Fill(*slot, file, pages) != 0) return std::nullopt;
  return *slot;
}

void IoUringPinBackend::Drop(Slot slot, uint64_t pages) {
  if (Empty(slot) == 0) return;
  refused_.push_back({slot, pages});
  refused_pages_ += pages;
}

void IoUringPinBackend::RetryRefused() {
  while (!refused_.empty() && Empty(refused_.back().slot) == 0) {
    refused_pages_ -= refused_.back().pages;
    refused_.pop_back();
  }
}

Result<std::unique_ptr<PinBackend>> MakeIoUringPinBackend() {
  return IoUringPinBackend::Create(MakeIoUringBufferTable);
}

}  // namespace mvgpu::domain
