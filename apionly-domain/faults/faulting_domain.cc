#include "apionly-domain/faults/faulting_domain.h"

#include <algorithm>
#include <bit>
#include <utility>

#include <absl/container/inlined_vector.h>

#include "apionly-domain/base/check.h"

namespace mvgpu::domain {

namespace {

// How often a fault makes room before the device is told to try again: others may take it each
// time.
constexpr int kTries = 8;

// Pins are of a block at most, which a context counts page by page: so they may be let go in parts.
constexpr auto kForm = PinCounts::FormFor(FaultingDomain::kBlockPages);
static_assert(kForm == PinCounts::Form::kDense);

}  // namespace

FaultingDomain::BlockHold FaultingDomain::HoldBlock(uint64_t first_page) const {
  SpinLockHold lock(blocks_lock_);
  std::unique_ptr<Block>& block = blocks_[first_page];
  if (block == nullptr) block = MakeBlock(first_page);
  ++block->users;
  return {this, block.get()};
}

std::unique_ptr<FaultingDomain::Block> FaultingDomain::MakeBlock(uint64_t first_page) const {
  if (spare_block_ == nullptr) return std::make_unique<Block>(first_page);
  spare_block_->first_page = first_page;
  return std::move(spare_block_);
}

// Without the block's lock: nobody has it, since nobody uses the block, and nobody can come to use
// it while the lock of blocks is held.
bool FaultingDomain::IsUnused(const Block& block) ABSL_NO_THREAD_SAFETY_ANALYSIS {
  return block.users == 0 && block.mapped.none();
}

void FaultingDomain::LeaveBlock(Block* block) const {
  if (block == last_left_ || !IsUnused(*block)) return;
  if (last_left_ != nullptr && IsUnused(*last_left_)) {
    const auto found = blocks_.find(last_left_->first_page);
    spare_block_ = std::move(found->second);
    blocks_.erase(found);
  }
  last_left_ = block;
}

uint64_t FaultingDomain::CountBlocks() const {
  SpinLockHold lock(blocks_lock_);
  return blocks_.size() - (last_left_ != nullptr && IsUnused(*last_left_) ? 1 : 0);
}

FaultingDomain::BlockHold FaultingDomain::HoldNextBlock(uint64_t first_page) const {
  SpinLockHold lock(blocks_lock_);
  const auto found = blocks_.lower_bound(first_page);
  if (found == blocks_.end()) return {};
  ++found->second->users;
  return {this, found->second.get()};
}

FaultingDomain::FaultingDomain(Options options, Parts parts)
    : options_(std::move(options)), parts_(parts), context_(parts.guest->open_context(this)) {
  MVGPU_CHECK(std::has_single_bit(options_.around_pages) && options_.around_pages <= kBlockPages &&
              options_.max_pinned_pages > 0);
}

FaultingDomain::~FaultingDomain() {
  SpinLockHold lock(mappings_lock_);
  MVGPU_CHECK(mappings_.empty() && going_.empty() && pinned_.load() == 0);
}

Result<FaultingDomain::Resolved> FaultingDomain::fault(Iova iova, Access access) {
  ++count_.faults;
  auto resolved = Resolve(iova, access);
  if (!resolved) {
    ++count_.failures;
  } else if (resolved->outcome == Outcome::kThere) {
    ++count_.already_there;
  } else if (resolved->outcome == Outcome::kRetry) {
    ++count_.retries;
  } else {
    count_.pages_mapped += resolved->pages;
  }
  return resolved;
}

Result<FaultingDomain::Resolved> FaultingDomain::Resolve(Iova iova, Access access) {
  const uint64_t page = iova.page();
  // The counter of its pin lies anywhere; by the time that it is pinned it is there.
  context_->prefetch(iova, Access::kReadWrite);
  const BlockHold hold = HoldBlock(page - page % kBlockPages);
  for (int tries = 0; tries < kTries; ++tries) {
    Shortage shortage;
    if (auto resolved = TryFault(*hold.get(), page, access, &shortage)) return *std::move(resolved);
    if (Evict(shortage.pages) == 0 && shortage.error) {
      return tl::unexpected<Error>(*std::move(shortage.error));
    }
  }
  return Resolved{Outcome::kRetry};
}

std::optional<Result<FaultingDomain::Resolved>> FaultingDomain::TryFault(Block& block,
                                                                         uint64_t page,
                                                                         Access access,
                                                                         Shortage* shortage) {
  MutexLock lock(block.mutex);
  auto place = PlaceOf(page, access);
  if (!place) {
    if (place.error().code() == ErrorCode::kBusy) return Resolved{Outcome::kRetry};
    return tl::unexpected<Error>(std::move(place).error());
  }
  const PageRun one{page % kBlockPages, 1};
  if (block.mapped.test(one.first)) {
    block.used.set(one);
    if (parts_.target->shows(RangeOf({page, 1}), place->host_of(page))) {
      return Resolved{Outcome::kThere};
    }
    TakeOutLocked(block, block.mapped, one);
  }
  for (PageRun pages = WindowLocked(block, page, *place);; pages = {page, 1}) {
    auto resolved = MapLocked(block, pages, *place, shortage);
    if (resolved && resolved->has_value()) {
      if (resolved->value().outcome == Outcome::kMapped) block.used.set(one);
      return resolved;
    }
    // What is wrong with a neighbour does not concern the fault.
    const bool is_refused = resolved || shortage->error;
    if (pages.count == 1 || !is_refused) return resolved;
    *shortage = {};
  }
}

inline std::optional<Result<FaultingDomain::Resolved>> FaultingDomain::MapLocked(
    Block& block, PageRun pages, const Place& place, Shortage* shortage) {
  if (!Reserve(pages.count, &shortage->pages)) return std::nullopt;
  auto done = PinAndMapLocked(block, pages, place);
  if (done) [[likely]]
    return Resolved{Outcome::kMapped, pages.count};
  pinned_ -= pages.count;
  if (done.error().code() == ErrorCode::kBusy) return Resolved{Outcome::kRetry};
  if (done.error().code() != ErrorCode::kLimit) return tl::unexpected<Error>(done.error());
  shortage->pages = 1;
  shortage->error = std::move(done).error();
  return std::nullopt;
}

bool FaultingDomain::Reserve(uint64_t pages, uint64_t* missing) {
  uint64_t pinned = pinned_.load();
  do {
    const uint64_t room = options_.max_pinned_pages - pinned;
    if (pages > room) {
      *missing = pages - room;
      return false;
    }
  } while (!pinned_.compare_exchange_weak(pinned, pinned + pages));
  uint64_t peak = peak_pinned_.load();
  while (peak < pinned + pages && !peak_pinned_.compare_exchange_weak(peak, pinned + pages)) {
  }
  return true;
}

PageRun FaultingDomain::WindowLocked(const Block& block, uint64_t page, const Place& place) const {
  const uint64_t around = options_.around_pages;
  if (around == 1 || around > options_.max_pinned_pages) return {page, 1};
  const uint64_t start = page - page % around;
  uint64_t first = page;
  uint64_t end = page + 1;
  const auto is_free = [&](uint64_t at) ABSL_EXCLUSIVE_LOCKS_REQUIRED(block.mutex) {
    return place.pages.contains(at) && !block.mapped.test(at % kBlockPages);
  };
  while (first > start && is_free(first - 1)) --first;
  while (end < start + around && is_free(end)) ++end;
  const PageRun window{first, end - first};
  if (!place.is_any_going) return window;
  SpinLockHold lock(mappings_lock_);
  return IsGoingLocked(RangeOf(window)) ? PageRun{page, 1} : window;
}

inline Result<void> FaultingDomain::PinAndMapLocked(Block& block, PageRun pages,
                                                    const Place& place) {
  const bool is_timed = parts_.times != nullptr;
  const auto now = [&] { return is_timed ? FaultClock::now() : FaultClock::time_point(); };
  const auto start = now();
  MVGPU_RETURN_IF_ERROR(context_->pin_kept(pages, place.access));
  const auto pinned_at = now();
  // One piece: they are of one mapping.
  auto shown = parts_.target->map(RangeOf(pages), place.host_of(pages.first), place.access);
  if (!shown) {
    context_->release_last({&pages, 1}, place.access, kForm);
    return shown;
  }
  const PageRun fresh{pages.first % kBlockPages, pages.count};
  block.mapped.set(fresh);
  block.young.set(fresh);
  block.for_write.assign(fresh, Allows(place.access, Access::kWrite));
  block.used.clear(fresh);  // by what was there before
  if (is_timed) {
    parts_.times->add(FaultStep::kPin, pinned_at - start);
    parts_.times->add(FaultStep::kMap, FaultClock::now() - pinned_at);
  }
  return {};
}

uint64_t FaultingDomain::TakeOutLocked(Block& block, const PageBits& pages, PageRun within) {
  absl::InlinedVector<PageRun, 4> going;
  pages.for_each_run(within, [&](PageRun run) { going.push_back(run); });
  if (going.empty()) return 0;
  const auto range_of = [&](PageRun run) {
    return RangeOf({block.first_page + run.first, run.count});
  };
  if (going.size() == 1) {
    parts_.target->unmap_and_flush(range_of(going.front()));
  } else {
    for (const PageRun& run : going) parts_.target->unmap(range_of(run));
    parts_.target->flush();
  }
  uint64_t gone = 0;
  for (const PageRun& run : going) {
    block.mapped.clear(run);
    gone += run.count;
  }
  for (const Access access : {Access::kReadWrite, Access::kRead}) {
    ReleaseLocked(block, going, access);
  }
  pinned_ -= gone;
  return gone;
}

// Those of the pages that were mapped for this access, in one go.
inline void FaultingDomain::ReleaseLocked(const Block& block, std::span<const PageRun> going,
                                          Access access) {
  const bool for_write = Allows(access, Access::kWrite);
  absl::InlinedVector<PageRun, 4> released;
  for (const PageRun& run : going) {
    for (uint64_t first = block.for_write.find(run.first, run.end(), for_write);
         first < run.end();) {
      const uint64_t end = block.for_write.find(first, run.end(), !for_write);
      released.push_back({block.first_page + first, end - first});
      first = block.for_write.find(end, run.end(), for_write);
    }
  }
  context_->release_last(released, access, kForm);
}

uint64_t FaultingDomain::TakeOutRange(IovaRange range) {
  const PageRun pages = PagesOf(range);
  uint64_t gone = 0;
  for (uint64_t from = pages.first - pages.first % kBlockPages; from < pages.end();) {
    const BlockHold hold = HoldNextBlock(from);
    if (!hold || hold.get()->first_page >= pages.end()) break;
    Block& block = *hold.get();
    const uint64_t first = std::max(pages.first, block.first_page);
    from = block.first_page + kBlockPages;
    const uint64_t count = std::min(pages.end(), from) - first;
    MutexLock lock(block.mutex);
    gone += TakeOutLocked(block, block.mapped, {first - block.first_page, count});
  }
  return gone;
}

FaultingDomain::Invalidation::Invalidation(FaultingDomain* domain, IovaRange range)
    : domain_(*domain), range_(range.page_expanded()), pages_([this] {
        domain_.BeginGoing(range_);
        return domain_.TakeOutRange(range_);
      }()) {
  domain_.count_.invalidated += pages_;
}

FaultingDomain::Invalidation::~Invalidation() { domain_.EndGoing(range_); }

bool FaultingDomain::is_mapped(Iova iova) const {
  const uint64_t index = iova.page() % kBlockPages;
  const BlockHold hold = HoldNextBlock(iova.page() - index);
  if (!hold || hold.get()->first_page != iova.page() - index) return false;
  MutexLock lock(hold.get()->mutex);
  return hold.get()->mapped.test(index);
}

FaultingDomain::Counters FaultingDomain::counters() const {
  Counters counters;
  for (uint64_t from = 0;; from += kBlockPages) {
    const BlockHold hold = HoldNextBlock(from);
    if (!hold) break;
    Block& block = *hold.get();
    from = block.first_page;
    MutexLock lock(block.mutex);
    block.mapped.for_each_run(block.all(),
                              [&](PageRun run) { counters.mapped_pages += run.count; });
  }
  counters.blocks = CountBlocks();
  counters.pinned_pages = pinned_.load();
  counters.peak_pinned_pages = peak_pinned_.load();
  counters.faults = count_.faults.load();
  counters.pages_mapped = count_.pages_mapped.load();
  counters.already_there = count_.already_there.load();
  counters.retries = count_.retries.load();
  counters.failures = count_.failures.load();
  counters.evicted_pages = count_.evicted.load();
  counters.invalidated_pages = count_.invalidated.load();
  counters.revoked_pages = count_.revoked.load();
  return counters;
}

}  // namespace mvgpu::domain
