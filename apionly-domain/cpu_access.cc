// CPU copies of guest memory without a pin.

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <atomic>

#include "apionly-domain/api_only_domain.h"
#include "apionly-domain/memory/guarded_copy.h"

namespace mvgpu::domain {

namespace {

// What goes through our own memory when one side of a copy has no file.
constexpr size_t kBounceBytes = 4096;

}  // namespace

Result<void> ApiOnlyDomain::check(IovaRange range, Access access) const {
  std::optional<PageDirectory::Stop> stop;
  {
    AccessSlots::Section section(slots_);
    stop = directory_.walk(range, static_cast<uint64_t>(access), [](auto) {});
  }
  if (stop) return tl::unexpected<Error>(StopError(range, *stop, access));
  return {};
}

Result<void> ApiOnlyDomain::check_copy(IovaRange range, Access access) const {
  AccessSlots::Section section(slots_);
  MVGPU_RETURN_IF_ERROR(PiecesOf(range, access));
  return {};
}

Result<ApiOnlyDomain::Pieces> ApiOnlyDomain::PiecesOf(IovaRange range, Access access) const {
  Pieces pieces;
  for (IovaRange rest = range;;) {
    const auto stop = directory_.walk(rest, static_cast<uint64_t>(access), [&](auto extent) {
      pieces.push_back({extent.iova, extent.host});
    });
    if (!stop) return pieces;
    const auto remote = options_.remote == nullptr ? std::nullopt : FilelessAt(stop->at);
    if (!remote || !Allows(remote->access, access)) {
      return tl::unexpected<Error>(StopError(range, *stop, access));
    }
    const Iova last = std::min(remote->iova.last(), range.last());
    pieces.push_back({IovaRange::FromFirstAndLast(stop->at, last), nullptr});
    if (last == range.last()) return pieces;
    rest = IovaRange::FromFirstAndLast(last + 1, range.last());
  }
}

Result<void> ApiOnlyDomain::read(Iova iova, std::span<std::byte> destination) const {
  MVGPU_ASSIGN_OR_RETURN(const IovaRange range, CopyRange(iova, destination.size()));
  {
    AccessSlots::Section section(slots_);
    MVGPU_ASSIGN_OR_RETURN(const Pieces pieces, PiecesOf(range, Access::kRead));
    section.begin_copy(range);
    for (const Piece& piece : pieces) {
      const auto to = destination.subspan(piece.iova.start() - iova, piece.iova.size());
      MVGPU_RETURN_IF_ERROR(ReadPiece(piece, to));
    }
  }
  if (observer_ != nullptr) observer_->on_guest_read(iova, destination);
  return {};
}

Result<void> ApiOnlyDomain::write(Iova iova, std::span<const std::byte> source) {
  MVGPU_ASSIGN_OR_RETURN(const IovaRange range, CopyRange(iova, source.size()));
  AccessSlots::Section section(slots_);
  MVGPU_ASSIGN_OR_RETURN(const Pieces pieces, PiecesOf(range, Access::kWrite));
  section.begin_copy(range);
  Result<void> outcome;
  for (const Piece& piece : pieces) {
    if (!outcome) break;
    outcome = WritePiece(piece, source.subspan(piece.iova.start() - iova, piece.iova.size()));
  }
  MarkWritten(range);  // also what a copy wrote before it failed
  return outcome;
}

Result<void> ApiOnlyDomain::copy(Iova to, Iova from, uint64_t size) {
  MVGPU_ASSIGN_OR_RETURN(const IovaRange source, CopyRange(from, size));
  MVGPU_ASSIGN_OR_RETURN(const IovaRange target, CopyRange(to, size));
  if (source.overlaps(target)) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("{}: a copy of {} bytes from iova {:#x} to {:#x} overlaps itself",
                            options_.name, size, from.value(), to.value()));
  }
  AccessSlots::Section section(slots_);
  MVGPU_ASSIGN_OR_RETURN(const Pieces sources, PiecesOf(source, Access::kRead));
  MVGPU_ASSIGN_OR_RETURN(const Pieces targets, PiecesOf(target, Access::kWrite));
  section.begin_copy(source, target);
  Result<void> outcome;
  size_t s = 0;
  size_t t = 0;
  for (uint64_t done = 0; done < size && outcome;) {
    const uint64_t left_in_source = sources[s].iova.last() - (from + done) + 1;
    const uint64_t left_in_target = targets[t].iova.last() - (to + done) + 1;
    const uint64_t step = std::min(left_in_source, left_in_target);
    outcome = CopyPiece(sources[s].slice(from + done, step), targets[t].slice(to + done, step));
    s += step == left_in_source ? 1 : 0;
    t += step == left_in_target ? 1 : 0;
    done += step;
  }
  MarkWritten(target);
  return outcome;
}

Result<void> ApiOnlyDomain::CopyPiece(const Piece& from, const Piece& to) {
  const uint64_t size = from.iova.size();
  if (from.host != nullptr && to.host != nullptr) {
    if (CopyGuarded(to.host, from.host, size)) return {};
    return tl::unexpected<Error>(TruncatedError(from.iova.start(), size));
  }
  std::array<std::byte, kBounceBytes> bounce;
  for (uint64_t done = 0; done < size; done += bounce.size()) {
    const auto bytes = std::span(bounce).first(std::min<uint64_t>(bounce.size(), size - done));
    MVGPU_RETURN_IF_ERROR(ReadPiece(from.slice(from.iova.start() + done, bytes.size()), bytes));
    MVGPU_RETURN_IF_ERROR(WritePiece(to.slice(to.iova.start() + done, bytes.size()), bytes));
  }
  return {};
}

Result<void> ApiOnlyDomain::ReadPiece(const Piece& piece, std::span<std::byte> to) const {
  if (piece.host == nullptr) return options_.remote->read(piece.iova.start(), to);
  if (CopyGuarded(to.data(), piece.host, to.size())) return {};
  return tl::unexpected<Error>(TruncatedError(piece.iova.start(), to.size()));
}

Result<void> ApiOnlyDomain::WritePiece(const Piece& piece, std::span<const std::byte> from) {
  if (piece.host == nullptr) return options_.remote->write(piece.iova.start(), from);
  if (CopyGuarded(piece.host, from.data(), from.size())) return {};
  return tl::unexpected<Error>(TruncatedError(piece.iova.start(), from.size()));
}

Result<void> ApiOnlyDomain::read_pinned(const PinnedRun& run, Iova iova,
                                        std::span<std::byte> destination) const {
  MVGPU_DCHECK(run.iova.contains(iova) && destination.size() <= run.iova.last() - iova + 1);
  const Piece piece{run.iova, run.host};
  MVGPU_RETURN_IF_ERROR(ReadPiece(piece.slice(iova, destination.size()), destination));
  if (observer_ != nullptr) observer_->on_guest_read(iova, destination);
  return {};
}

Result<void> ApiOnlyDomain::publish(Iova iova, std::span<const std::byte> source) {
  std::atomic_thread_fence(std::memory_order_release);
  return write(iova, source);
}

void ApiOnlyDomain::MarkWritten(IovaRange range) {
  // Between the copy and the question whether somebody logs: whoever starts the log after a "no"
  // sees what was copied.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (dirty_.is_on()) dirty_.mark(PagesOf(range));
}

Result<IovaRange> ApiOnlyDomain::CopyRange(Iova iova, uint64_t size) const {
  if (const auto range = IovaRange::FromStartAndSize(iova, size)) return *range;
  return Fail(ErrorCode::kInvalid, fmt::format("{}: {} bytes at iova {:#x} are no range below 2^64",
                                               options_.name, size, iova.value()));
}

Error ApiOnlyDomain::TruncatedError(Iova iova, uint64_t size) const {
  return Error(ErrorCode::kTruncated,
               fmt::format("{}: guest memory at iova {:#x}-{:#x} is gone, its file was truncated; "
                           "seal it against shrinking",
                           options_.name, iova.value(), (iova + (size - 1)).value()));
}

std::optional<Mapping> ApiOnlyDomain::FilelessAt(Iova iova) const {
  ReaderMutexLock lock(fileless_mutex_);
  const auto next = fileless_.upper_bound(iova.value());
  if (next == fileless_.begin()) return std::nullopt;
  const Mapping& mapping = std::prev(next)->second;
  return mapping.iova.contains(iova) ? std::optional(mapping) : std::nullopt;
}

Error ApiOnlyDomain::StopError(IovaRange range, PageDirectory::Stop stop, Access access) const {
  const auto fileless = stop.flags == 0 ? FilelessAt(stop.at) : std::nullopt;
  const uint64_t rights = fileless ? static_cast<uint64_t>(fileless->access)
                                   : stop.flags & (PageDirectory::kRead | PageDirectory::kWrite);
  if (rights == 0) {
    return Error(
        ErrorCode::kNotMapped,
        fmt::format("{}: iova {:#x} (of {:#x}-{:#x}) is not mapped by the vmm", options_.name,
                    stop.at.value(), range.start().value(), range.last().value()));
  }
  if ((stop.flags & PageDirectory::kGoing) != 0) {
    return Error(ErrorCode::kBusy,
                 fmt::format("{}: iova {:#x} is being mapped or unmapped by the vmm", options_.name,
                             stop.at.value()));
  }
  if (!Allows(static_cast<Access>(rights), access)) {
    return Error(
        ErrorCode::kPermission,
        fmt::format("{}: {} access to iova {:#x}, which is mapped {}", options_.name,
                    AccessName(access), stop.at.value(), AccessName(static_cast<Access>(rights))));
  }
  return Error(ErrorCode::kNotReachable,
               fmt::format("{}: iova {:#x} is mapped without a file; give the vm shared memory",
                           options_.name, stop.at.value()));
}

}  // namespace mvgpu::domain
