#include "apionly-domain/faults/faulting_domain.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <utility>

#include "apionly-domain/base/check.h"

namespace mvgpu::domain {

namespace {

// How often a fault makes room before the device is told to try again: others may take it each
// time.
constexpr int kTries = 8;

// Pins are of a block at most, which a context counts page by page: so they may be let go in parts.
constexpr auto kForm = PinCounts::FormFor(FaultingDomain::kBlockPages);

// Calls visit(first, count) for each stretch of set bits.
template <size_t kSize, typename Visit>
void ForEachRun(const std::bitset<kSize>& bits, Visit visit) {
  for (size_t first = bits._Find_first(); first < kSize;) {
    size_t end = first + 1;
    while (end < kSize && bits[end]) ++end;
    visit(first, end - first);
    first = bits._Find_next(end - 1);
  }
}

template <size_t kSize>
std::bitset<kSize> BitsFrom(size_t first, size_t count) {
  return ~std::bitset<kSize>() >> (kSize - count) << first;
}

}  // namespace

class FaultingDomain::BlockHold {
 public:
  BlockHold() = default;
  BlockHold(const FaultingDomain* domain, Block* block) : domain_(domain), block_(block) {}
  BlockHold(BlockHold&& other) noexcept
      : domain_(other.domain_), block_(std::exchange(other.block_, nullptr)) {}
  BlockHold& operator=(BlockHold&&) = delete;
  ~BlockHold() {
    if (block_ == nullptr) return;
    MutexLock lock(domain_->blocks_mutex_);
    if (--block_->users != 0) return;
    bool is_empty = false;
    {
      MutexLock block_lock(block_->mutex);
      is_empty = block_->mapped.none();
    }
    if (is_empty) domain_->blocks_.erase(block_->first_page);
  }
  explicit operator bool() const { return block_ != nullptr; }
  Block* get() const { return block_; }

 private:
  const FaultingDomain* domain_ = nullptr;
  Block* block_ = nullptr;
};

FaultingDomain::BlockHold FaultingDomain::HoldBlock(uint64_t first_page) const {
  MutexLock lock(blocks_mutex_);
  std::unique_ptr<Block>& block = blocks_[first_page];
  if (block == nullptr) block = std::make_unique<Block>(first_page);
  ++block->users;
  return {this, block.get()};
}

FaultingDomain::BlockHold FaultingDomain::HoldNextBlock(uint64_t first_page) const {
  MutexLock lock(blocks_mutex_);
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
  MutexLock lock(mappings_mutex_);
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
  // Before a block is made for it: most that is not mapped is far from what is.
  if (auto place = PlaceOf(page, access); !place && place.error().code() != ErrorCode::kBusy) {
    return tl::unexpected<Error>(std::move(place).error());
  }
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
  const size_t index = page % kBlockPages;
  if (block.mapped[index]) {
    block.used[index] = true;
    if (parts_.target->shows(RangeOf({page, 1}), place->host_of(page))) {
      return Resolved{Outcome::kThere};
    }
    TakeOutLocked(block, Bits().set(index));
  }
  const PageRun window = WindowLocked(block, page, *place);
  auto resolved = MapLocked(block, window, place->access, shortage);
  // What is wrong with a neighbour does not concern the fault.
  const bool has_failed = resolved && !resolved->has_value();
  if (window.count > 1 && (has_failed || (!resolved && shortage->error))) {
    *shortage = {};
    resolved = MapLocked(block, {page, 1}, place->access, shortage);
  }
  if (resolved && resolved->has_value() && resolved->value().outcome == Outcome::kMapped) {
    block.used[index] = true;
  }
  return resolved;
}

std::optional<Result<FaultingDomain::Resolved>> FaultingDomain::MapLocked(Block& block,
                                                                          PageRun pages,
                                                                          Access access,
                                                                          Shortage* shortage) {
  if (!Reserve(pages.count, &shortage->pages)) return std::nullopt;
  auto done = PinAndMapLocked(block, pages, access);
  if (done) return Resolved{Outcome::kMapped, pages.count};
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
    return place.pages.contains(at) && !block.mapped[at % kBlockPages];
  };
  while (first > start && is_free(first - 1)) --first;
  while (end < start + around && is_free(end)) ++end;
  ReaderMutexLock lock(mappings_mutex_);
  const PageRun window{first, end - first};
  return IsGoingLocked(RangeOf(window)) ? PageRun{page, 1} : window;
}

Result<void> FaultingDomain::PinAndMapLocked(Block& block, PageRun pages, Access access) {
  const bool is_timed = parts_.times != nullptr;
  const auto now = [&] { return is_timed ? FaultClock::now() : FaultClock::time_point(); };
  const auto start = now();
  MVGPU_ASSIGN_OR_RETURN(PinnedRange pinned, context_->pin(RangeOf(pages), access));
  const auto pinned_at = now();
  MVGPU_RETURN_IF_ERROR(ShowRuns(pinned.runs(), access));
  MVGPU_CHECK(pinned.keep() == kForm);
  const Bits fresh = BitsFrom<kBlockPages>(pages.first % kBlockPages, pages.count);
  block.mapped |= fresh;
  block.for_write =
      Allows(access, Access::kWrite) ? block.for_write | fresh : block.for_write & ~fresh;
  block.used &= ~fresh;
  if (is_timed) {
    parts_.times->add(FaultStep::kPin, pinned_at - start);
    parts_.times->add(FaultStep::kMap, FaultClock::now() - pinned_at);
  }
  return {};
}

Result<void> FaultingDomain::ShowRuns(std::span<const PinnedRun> runs, Access access) {
  for (size_t i = 0; i < runs.size(); ++i) {
    auto shown = parts_.target->map(runs[i].iova, runs[i].host, access);
    if (shown) continue;
    for (size_t done = 0; done < i; ++done) parts_.target->unmap(runs[done].iova);
    if (i > 0) parts_.target->flush();
    return shown;
  }
  return {};
}

uint64_t FaultingDomain::TakeOutLocked(Block& block, Bits pages) {
  pages &= block.mapped;
  if (pages.none()) return 0;
  ForEachRun(pages, [&](uint64_t index, uint64_t count) {
    parts_.target->unmap(RangeOf({block.first_page + index, count}));
  });
  parts_.target->flush();
  const auto release = [&](const Bits& bits, Access access) {
    ForEachRun(bits, [&](uint64_t index, uint64_t count) {
      context_->release_kept({block.first_page + index, count}, access, kForm);
    });
  };
  release(pages & block.for_write, Access::kReadWrite);
  release(pages & ~block.for_write, Access::kRead);
  block.mapped &= ~pages;
  const uint64_t gone = pages.count();
  pinned_ -= gone;
  return gone;
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
    gone += TakeOutLocked(block, BitsFrom<kBlockPages>(first - block.first_page, count));
  }
  return gone;
}

uint64_t FaultingDomain::SweepLocked(Block& block, uint64_t* index, uint64_t wanted, bool any) {
  Bits going;
  uint64_t found = 0;
  uint64_t at = *index;
  for (; at < kBlockPages && found < wanted; ++at) {
    if (!block.mapped[at]) continue;
    const bool was_accessed = parts_.target->take_accessed(Iova(BytesIn(block.first_page + at)));
    const bool was_used = block.used[at] || was_accessed;
    block.used[at] = false;
    if (was_used && !any) continue;
    going[at] = true;
    ++found;
  }
  *index = at;
  return TakeOutLocked(block, going);
}

uint64_t FaultingDomain::Evict(uint64_t wanted) {
  MutexLock lock(clock_mutex_);
  uint64_t gone = 0;
  // The rest of this lap and the next one may only have found pages that were used.
  for (unsigned laps = 0; gone < wanted && laps < 3;) {
    uint64_t index = hand_ % kBlockPages;
    const BlockHold hold = HoldNextBlock(hand_ - index);
    if (!hold) {
      hand_ = 0;
      ++laps;
      continue;
    }
    Block& block = *hold.get();
    if (block.first_page != hand_ - index) index = 0;
    MutexLock block_lock(block.mutex);
    gone += SweepLocked(block, &index, wanted - gone, /*any=*/laps == 2);
    hand_ = block.first_page + index;
  }
  count_.evicted += gone;
  return gone;
}

uint64_t FaultingDomain::drop_unused() {
  uint64_t gone = 0;
  for (uint64_t from = 0;; from += kBlockPages) {
    const BlockHold hold = HoldNextBlock(from);
    if (!hold) break;
    from = hold.get()->first_page;
    uint64_t index = 0;
    MutexLock lock(hold.get()->mutex);
    gone += SweepLocked(*hold.get(), &index, kBlockPages, /*any=*/false);
  }
  count_.evicted += gone;
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
  return hold.get()->mapped[index];
}

FaultingDomain::Counters FaultingDomain::counters() const {
  Counters counters;
  for (uint64_t from = 0;; from += kBlockPages) {
    const BlockHold hold = HoldNextBlock(from);
    if (!hold) break;
    from = hold.get()->first_page;
    MutexLock lock(hold.get()->mutex);
    counters.mapped_pages += hold.get()->mapped.count();
    ++counters.blocks;
  }
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
