#include "apionly-domain/coiommu/coiommu_pins.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <utility>

#include "apionly-domain/base/check.h"

namespace mvgpu::domain {

namespace {

// Who asks for a page waits for so many pages of a scan at most.
constexpr uint64_t kScanStep = 64;

constexpr auto kForm = PinCounts::FormFor(1);

IovaRange RangeOfFrame(uint64_t frame) { return RangeOf({frame, 1}); }

}  // namespace

CoiommuPins::CoiommuPins(Options options, Parts parts)
    : options_(std::move(options)), parts_(parts), context_(parts.guest->open_context(this)) {
  MVGPU_CHECK(options_.old_every > 0);
}

CoiommuPins::~CoiommuPins() { deactivate(); }

Result<void> CoiommuPins::activate(TrackingTable table) {
  MutexLock lock(mutex_);
  if (table_) return Fail(ErrorCode::kBusy, options_.name + ": there is a tracking table already");
  table_ = table;
  return {};
}

void CoiommuPins::deactivate() {
  MutexLock lock(mutex_);
  TakeOutLocked({0, UINT64_MAX});
  table_.reset();
}

void CoiommuPins::set_parked(bool parked) {
  MutexLock lock(mutex_);
  is_parked_ = parked;
}

Result<void> CoiommuPins::pin(uint64_t frame) {
  MutexLock lock(mutex_);
  const auto refused = [&](Result<void> why) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    ++counters_.refused;
    return why;
  };
  if (!table_) return refused(Fail(ErrorCode::kInvalid, options_.name + ": no tracking table"));
  const auto word = table_->find(frame);
  if (!word) return refused(tl::unexpected<Error>(word.error()));
  const bool is_new = !IsPinnedLocked(frame);
  if (is_new) {
    const auto access = PinAndMapLocked(frame);
    if (!access) return refused(tl::unexpected<Error>(access.error()));
    young_.emplace(frame, Page{0, *access});
  }
  // Also where it was pinned: the guest asks, so it does not see the bit.
  const auto marked = table_->change(*word, 0, tracked::kPinned);
  if (!marked) {
    if (is_new) TakeOutLocked({frame, 1});
    return refused(tl::unexpected<Error>(marked.error()));
  }
  ++(is_new ? counters_.pins : counters_.pinned_already);
  counters_.peak_pinned_pages =
      std::max<uint64_t>(counters_.peak_pinned_pages, young_.size() + old_.size());
  return {};
}

Result<Access> CoiommuPins::PinAndMapLocked(uint64_t frame) {
  if (young_.size() + old_.size() >= options_.max_pinned_pages) {
    return Fail(ErrorCode::kLimit, fmt::format("{}: {} pages are pinned, which is the limit",
                                               options_.name, options_.max_pinned_pages));
  }
  Access access = Access::kReadWrite;
  auto pinned = context_->pin(RangeOfFrame(frame), access);
  if (!pinned && pinned.error().code() == ErrorCode::kPermission) {
    access = Access::kRead;
    pinned = context_->pin(RangeOfFrame(frame), access);
  }
  if (!pinned) return tl::unexpected<Error>(std::move(pinned).error());
  MVGPU_RETURN_IF_ERROR(
      parts_.target->map(RangeOfFrame(frame), pinned->runs().front().host, access));
  MVGPU_CHECK(pinned->keep() == kForm);
  return access;
}

uint64_t CoiommuPins::scan() {
  uint64_t round = 0;
  {
    MutexLock lock(mutex_);
    if (is_parked_ || !table_) return 0;
    round = ++counters_.scans;
  }
  uint64_t budget = options_.max_unpins_per_scan;
  uint64_t gone = 0;
  if (round % options_.old_every == 0) gone += ScanPages(/*old=*/true, &budget);
  return gone + ScanPages(/*old=*/false, &budget);
}

uint64_t CoiommuPins::ScanPages(bool old, uint64_t* budget) {
  uint64_t gone = 0;
  for (uint64_t from = 0; from != UINT64_MAX && *budget > 0;) {
    MutexLock lock(mutex_);
    if (is_parked_ || !table_) break;
    gone += ScanSomeLocked(old, &from, budget);
  }
  return gone;
}

// *from becomes UINT64_MAX, which is no frame, behind the last one.
uint64_t CoiommuPins::ScanSomeLocked(bool old, uint64_t* from, uint64_t* budget) {
  Pages& pages = old ? old_ : young_;
  std::array<Going, kScanStep> going{};
  uint64_t gone = 0;
  auto it = pages.lower_bound(*from);
  for (uint64_t looks = 0; looks < kScanStep && it != pages.end() && gone < *budget; ++looks) {
    const uint64_t frame = it->first;
    Page& page = it->second;
    if (LookLocked(frame) == Verdict::kUnused) {
      going[gone++] = {frame, page.access};
      it = pages.erase(it);
    } else if (!old && ++page.busy_rounds >= options_.busy_rounds) {
      old_.emplace(frame, page);
      it = pages.erase(it);
    } else {
      ++it;
    }
  }
  *from = it == pages.end() ? UINT64_MAX : it->first;
  *budget -= gone;
  counters_.unpins += gone;
  LetGoLocked(std::span(going).first(gone));
  return gone;
}

// A word that cannot be had now (the guest changes it all the time, or the VMM is about to unmap
// its memory) is one in use; one that is not there is of a part that the guest has freed, which it
// does where nothing is mapped.
CoiommuPins::Verdict CoiommuPins::WithoutWord(const Error& error) {
  return error.code() == ErrorCode::kBusy ? Verdict::kInUse : Verdict::kUnused;
}

CoiommuPins::Verdict CoiommuPins::LookLocked(uint64_t frame) {
  const auto word = table_->find(frame);
  if (!word) return WithoutWord(word.error());
  const auto was = table_->compare_exchange(*word, tracked::kPinned, 0);
  if (!was) return WithoutWord(was.error());
  if (*was == tracked::kPinned || *was == 0) return Verdict::kUnused;
  // PINNED again, if the guest has cleared it: it is, and the guest counts on the page.
  static_cast<void>(table_->change(*word, tracked::kAccessed, tracked::kPinned));
  return Verdict::kInUse;
}

CoiommuPins::Verdict CoiommuPins::ForceLocked(uint64_t frame) {
  const auto word = table_->find(frame);
  if (!word) return WithoutWord(word.error());
  const auto there = table_->load(*word);
  if (!there) return WithoutWord(there.error());
  if ((*there & tracked::kCountMask) == 0) {
    const auto was = table_->compare_exchange(*word, *there, 0);
    if (!was) return WithoutWord(was.error());
    // The guest maps it at this moment, if it is another one.
    if (*was == *there) return Verdict::kUnused;
  }
  static_cast<void>(table_->change(*word, tracked::kAccessed, 0));
  return Verdict::kInUse;
}

bool CoiommuPins::release_for_balloon(uint64_t frame) {
  MutexLock lock(mutex_);
  if (!IsPinnedLocked(frame)) return true;
  if (ForceLocked(frame) == Verdict::kInUse) {
    ++counters_.in_use;
    return false;
  }
  ++counters_.forced;
  TakeOutLocked({frame, 1});
  return true;
}

void CoiommuPins::on_revoke(IovaRange range) {
  MutexLock lock(mutex_);
  counters_.revoked += TakeOutLocked(PagesOf(range));
}

uint64_t CoiommuPins::TakeOutLocked(PageRun frames) {
  std::vector<Going> going;
  for (Pages* pages : {&young_, &old_}) {
    auto it = pages->lower_bound(frames.first);
    while (it != pages->end() && frames.contains(it->first)) {
      going.push_back({it->first, it->second.access});
      it = pages->erase(it);
    }
  }
  for (const Going& page : going) {
    const auto word = table_->find(page.frame);
    if (word) static_cast<void>(table_->change(*word, tracked::kPinned, 0));
  }
  LetGoLocked(going);
  return going.size();
}

void CoiommuPins::LetGoLocked(std::span<const Going> pages) {
  if (pages.empty()) return;
  for (const Going& page : pages) parts_.target->unmap(RangeOfFrame(page.frame));
  parts_.target->flush();
  for (const Going& page : pages) context_->release_kept({page.frame, 1}, page.access, kForm);
}

bool CoiommuPins::is_pinned(uint64_t frame) const {
  MutexLock lock(mutex_);
  return IsPinnedLocked(frame);
}

CoiommuPins::Counters CoiommuPins::counters() const {
  MutexLock lock(mutex_);
  Counters counters = counters_;
  counters.pinned_pages = young_.size() + old_.size();
  counters.old_pages = old_.size();
  return counters;
}

}  // namespace mvgpu::domain
