#include "dma-cache/vulkan/imported_pieces.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <iterator>
#include <optional>
#include <utility>

namespace mvgpu::dma {

namespace {

// `range` without the parts of units at its ends; nullopt when no whole unit is in it.
std::optional<HostRange> WholeUnits(HostRange range, uint64_t unit) {
  const uint64_t first = (range.start().value() + (unit - 1)) & ~(unit - 1);
  const uint64_t end = (range.last().value() + 1) & ~(unit - 1);
  if (first >= end) return std::nullopt;
  return HostRange::FromFirstAndLast(HostAddr(first), HostAddr(end - 1));
}

// The smallest range of whole units around `range`.
HostRange UnitsAround(HostRange range, uint64_t unit) {
  return HostRange::FromFirstAndLast(HostAddr(range.start().value() & ~(unit - 1)),
                                     HostAddr(range.last().value() | (unit - 1)));
}

}  // namespace

ImportedPieces::ImportedPieces(const ImportTarget& target, uint64_t piece_bytes)
    : target_(target), piece_bytes_(std::max(piece_bytes, target.limits.alignment)) {
  MVGPU_CHECK(std::has_single_bit(piece_bytes_) && std::has_single_bit(target.limits.alignment));
}

ImportedPieces::~ImportedPieces() {
  MVGPU_CHECK(figures_.held == 0);
  collect();
}

ImportedPieces::Piece* ImportedPieces::find(HostAddr host) {
  const auto next = by_host_.upper_bound(host);
  if (next == by_host_.begin()) return nullptr;
  Piece* piece = std::prev(next)->second.get();
  return piece->host().contains(host) ? piece : nullptr;
}

Result<ImportedPieces::Piece*> ImportedPieces::import(HostRange wanted, HostRange extent,
                                                      domain::Access access) {
  MVGPU_RETURN_IF_ERROR(MakeRoomForOne());
  MVGPU_ASSIGN_OR_RETURN(const HostRange room, RoomAround(wanted.start(), extent));
  const auto made = Import(room);
  if (made) return *made;
  // Perhaps it is memory that nobody asked for which cannot be had: a hole in the file, or more
  // than the process may lock.
  const HostRange least = UnitsAround(*wanted.intersection(room), target_.limits.alignment);
  const auto made_less = least == room ? made : Import(least);
  if (made_less) return *made_less;
  const Error& error = made_less.error();
  if (error.code() == ErrorCode::kNotReachable && !Allows(access, domain::Access::kWrite)) {
    return Fail(ErrorCode::kPermission, error.message() + "; the vmm mapped it for reading only");
  }
  return tl::unexpected<Error>(error);
}

Result<ImportedPieces::Piece*> ImportedPieces::Import(HostRange host) {
  ++figures_.imports;
  MVGPU_ASSIGN_OR_RETURN(ImportedBuffer buffer,
                         ImportedBuffer::Create(&target_, host, &figures_.vulkan_calls));
  auto made = std::make_unique<Piece>(host, std::move(buffer));
  Piece* piece = made.get();
  by_host_.emplace(host.start(), std::move(made));
  by_address_.emplace(piece->address(), piece);
  piece->may_be_unused_ = true;  // until somebody holds it
  unused_.push_back(piece);
  ++figures_.pieces;
  figures_.bytes += host.size();
  return piece;
}

Result<void> ImportedPieces::MakeRoomForOne() {
  const uint64_t limit = target_.limits.most_imports;
  if (figures_.pieces >= limit) collect();
  if (figures_.pieces < limit) return {};
  return Fail(ErrorCode::kLimit,
              fmt::format("guest memory is imported in {} pieces, the vulkan device allows {}; let "
                          "the vmm map guest memory in fewer, larger mappings, or let the guest "
                          "use less at a time",
                          figures_.pieces, limit));
}

uint64_t ImportedPieces::CellBytes() const {
  const uint64_t limit = target_.limits.most_imports;
  const uint64_t left = limit - figures_.pieces;  // 1 or more, see MakeRoomForOne()
  const uint64_t largest = std::bit_floor(target_.limits.largest_bytes);
  uint64_t bytes = piece_bytes_;
  for (uint64_t rest = limit / 2; left <= rest && rest > 0 && bytes < largest; rest /= 2) {
    bytes *= 4;
  }
  return std::max(std::min(bytes, largest), target_.limits.alignment);
}

Result<HostRange> ImportedPieces::RoomAround(HostAddr host, HostRange extent) const {
  const HostRange unit = UnitsAround(HostRange::FromFirstAndLast(host, host), CellBytes());
  HostRange room = *unit.intersection(extent);
  const auto next = by_host_.upper_bound(host);
  if (next != by_host_.end() && next->first <= room.last()) {
    room = HostRange::FromFirstAndLast(room.start(), HostAddr(next->first.value() - 1));
  }
  if (next != by_host_.begin()) {
    const HostAddr taken = std::prev(next)->second->host().last();
    if (taken >= room.start()) room = HostRange::FromFirstAndLast(taken + 1, room.last());
  }
  const auto whole = WholeUnits(room, target_.limits.alignment);
  if (whole && whole->contains(host)) return *whole;
  return Fail(ErrorCode::kNotReachable,
              fmt::format("the vulkan device imports memory in units of {} KiB, and the guest's "
                          "mapping ends within one; let the vmm map guest memory in multiples of "
                          "that",
                          target_.limits.alignment >> 10));
}

void ImportedPieces::hold(Piece* piece, uint64_t pages) {
  piece->held_pages_ += pages;
  figures_.held += pages;
}

void ImportedPieces::release(DmaAddr address, uint64_t pages) {
  while (pages > 0) {
    const auto next = by_address_.upper_bound(address);
    MVGPU_CHECK(next != by_address_.begin());
    Piece* piece = std::prev(next)->second;
    const uint64_t offset = address - piece->address();
    MVGPU_CHECK(offset < piece->host().size());
    const uint64_t here = std::min(pages, PagesIn(piece->host().size() - offset));
    MVGPU_CHECK(piece->held_pages_ >= here);
    piece->held_pages_ -= here;
    figures_.held -= here;
    if (piece->held_pages_ == 0 && !std::exchange(piece->may_be_unused_, true)) {
      unused_.push_back(piece);
    }
    address = address + BytesIn(here);
    pages -= here;
  }
}

void ImportedPieces::collect() {
  for (Piece* piece : unused_) {
    piece->may_be_unused_ = false;
    if (piece->held_pages_ != 0) continue;
    --figures_.pieces;
    figures_.bytes -= piece->host().size();
    by_address_.erase(piece->address());
    by_host_.erase(piece->host().start());
  }
  unused_.clear();
}

}  // namespace mvgpu::dma
