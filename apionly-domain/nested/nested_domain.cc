#include "apionly-domain/nested/nested_domain.h"

#include <algorithm>
#include <utility>

#include "apionly-domain/base/check.h"

namespace mvgpu::domain {

namespace {

// How many of the words from the first on are neighbours in guest memory too, with equal rights.
size_t RunLength(std::span<const PageWord> words) {
  size_t length = 1;
  while (length < words.size() && words[length] == words[length - 1] + kPageSize &&
         words[length] > words[0]) {  // no run goes on behind 2^64
    ++length;
  }
  return length;
}

PageRun GuestPagesOf(PageWord word, uint64_t count) { return {FrameOf(word).page(), count}; }

// Pins are of a chunk at most, which a context counts page by page: so they may be let go in parts.
constexpr auto kForm = PinCounts::FormFor(ShadowTable::kChunkPages);

}  // namespace

NestedDomain::NestedDomain(Options options, Parts parts)
    : options_(std::move(options)), parts_(parts), context_(parts.guest->open_context(this)) {
  MVGPU_CHECK(options_.aperture.is_page_aligned());
}

NestedDomain::~NestedDomain() { clear(); }

void NestedDomain::clear() {
  MutexLock refreshing(refresh_mutex_);
  MutexLock lock(mutex_);
  TakeOutLocked(PagesOf(options_.aperture));
}

Refreshed NestedDomain::refresh(IovaRange range, uint64_t max_steps) {
  Refreshed result;
  const auto inside = range.page_expanded().intersection(options_.aperture);
  if (!inside) return result;
  MutexLock refreshing(refresh_mutex_);
  PageRun pages = PagesOf(*inside);
  const uint64_t end = pages.end();
  while (true) {
    Pass pass;
    const bool is_through = RunPass(pages, max_steps, &pass, &result);
    result.lacked_credits = pass.starved.has_value();
    if (!is_through || !pass.starved) return result;
    if (pass.freed == 0 || parts_.credits->available() == 0) {
      result.end = Refreshed::End::kNoCredits;
      result.next = Iova(BytesIn(*pass.starved));
      return result;
    }
    // Credits came back behind the page that lacked one. Ends: a pass that frees nothing is the
    // last, and there are no more steps than allowed.
    pages = {*pass.starved, end - *pass.starved};
  }
}

bool NestedDomain::RunPass(PageRun pages, uint64_t max_steps, Pass* pass, Refreshed* result) {
  while (pages.count > 0) {
    if (result->steps >= max_steps) {
      result->end = Refreshed::End::kStepLimit;
      result->next = Iova(BytesIn(pages.first));
      return false;
    }
    ++result->steps;
    const uint64_t done = RefreshPart(pages, pass, result);
    if (result->end != Refreshed::End::kDone) return false;
    pages = {pages.first + done, pages.count - done};
  }
  return true;
}

uint64_t NestedDomain::RefreshPart(PageRun pages, Pass* pass, Refreshed* result) {
  const uint64_t left_in_chunk = ShadowTable::kChunkPages - ShadowTable::IndexOf(pages.first);
  const auto words = std::span(words_).first(std::min(pages.count, left_in_chunk));
  const Stretch stretch = parts_.walker->walk_pages(options_.root, BytesIn(pages.first), words);
  uint64_t done = std::min(stretch.pages, pages.count);
  MutexLock lock(mutex_);
  const auto take_out = [&](PageRun going) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    const uint64_t freed = TakeOutLocked(going);
    pass->freed += freed;
    result->unmapped_pages += freed;
  };
  if (stretch.is_hole) {
    take_out({pages.first, done});
  } else if (done > 0 && !ApplyLocked(pages.first, words.first(done), pass, result)) {
    return done;
  }
  if (!stretch.fault || done == pages.count) return done;
  const uint64_t faulty = std::min(stretch.fault_pages, pages.count - done);
  take_out({pages.first + done, faulty});
  if (!result->fault) result->fault = stretch.fault;
  if (options_.on_fault == OnFault::kStop) {
    result->end = Refreshed::End::kFault;
    result->next = Iova(BytesIn(pages.first + done));
    return done;
  }
  result->left_out_pages += faulty;
  return done + faulty;
}

bool NestedDomain::ApplyLocked(uint64_t first, std::span<const PageWord> words, Pass* pass,
                               Refreshed* result) {
  const uint64_t number = ShadowTable::ChunkOf(first);
  const size_t index = ShadowTable::IndexOf(first);
  Chunk* chunk = shadow_.find_chunk(number);
  if (chunk != nullptr && chunk->equals(index, words)) return true;
  if (chunk == nullptr) {
    if (std::all_of(words.begin(), words.end(), [](PageWord word) { return word == 0; })) {
      return true;
    }
    chunk = shadow_.make_chunk(number);
  }
  const uint64_t freed = TakeOutOfChunkLocked(
      number, chunk, {index, words.size()},
      [&](size_t there) { return chunk->words[there] != words[there - index]; });
  pass->freed += freed;
  result->unmapped_pages += freed;
  const bool goes_on = MapMissingLocked(first, words, chunk, pass, result);
  shadow_.drop_if_empty(number);
  return goes_on;
}

bool NestedDomain::MapMissingLocked(uint64_t first, std::span<const PageWord> words, Chunk* chunk,
                                    Pass* pass, Refreshed* result) {
  const auto there = std::span(chunk->words).subspan(ShadowTable::IndexOf(first), words.size());
  for (size_t i = 0; i < words.size();) {
    if (words[i] == 0 || there[i] != 0) {  // they agree, if there is something
      ++i;
      continue;
    }
    size_t length = RunLength(words.subspan(i));
    // Pages of the run that are there already are as they should be.
    length = static_cast<size_t>(std::find_if(there.begin() + static_cast<ptrdiff_t>(i + 1),
                                              there.begin() + static_cast<ptrdiff_t>(i + length),
                                              [](PageWord word) { return word != 0; }) -
                                 (there.begin() + static_cast<ptrdiff_t>(i)));
    const uint64_t granted = parts_.credits->take(length);
    if (granted < length && !pass->starved) pass->starved = first + i + granted;
    std::optional<Error> error;
    const uint64_t mapped = MapRunLocked({first + i, granted}, words[i], chunk, &error);
    result->mapped_pages += mapped;
    if (!error) {
      i += length;
      continue;
    }
    parts_.credits->give_back(granted - mapped);
    if (!result->error) result->error = std::move(error);
    if (options_.on_fault == OnFault::kStop) {
      result->end = Refreshed::End::kNotMappable;
      result->next = Iova(BytesIn(first + i + mapped));
      return false;
    }
    ++result->left_out_pages;
    ++result->steps;  // takes as long as a table: an error is made
    i += mapped + 1;
  }
  return true;
}

uint64_t NestedDomain::MapRunLocked(PageRun iova, PageWord word, Chunk* chunk,
                                    std::optional<Error>* error) {
  if (iova.count == 0) return 0;
  auto all = MapPieceLocked(iova, word, chunk);
  if (all) return iova.count;
  // Something in there cannot be had: everything before it can.
  for (uint64_t i = 0; i < iova.count; ++i) {
    auto one = iova.count == 1 ? std::move(all)
                               : MapPieceLocked({iova.first + i, 1}, word + BytesIn(i), chunk);
    if (one) continue;
    error->emplace(std::move(one).error());
    return i;
  }
  return iova.count;
}

Result<void> NestedDomain::MapPieceLocked(PageRun iova, PageWord word, Chunk* chunk) {
  const Access access = AccessOf(word);
  auto pinned = context_->pin(RangeOf(GuestPagesOf(word, iova.count)), access);
  if (!pinned) return tl::unexpected<Error>(std::move(pinned).error());
  MVGPU_RETURN_IF_ERROR(parts_.target->map(RangeOf(iova), FrameOf(word), access));
  const auto form = pinned->keep();
  MVGPU_DCHECK(form == kForm);
  static_cast<void>(form);
  PageWord* words = chunk->words.data() + ShadowTable::IndexOf(iova.first);
  for (uint64_t i = 0; i < iova.count; ++i) words[i] = word + BytesIn(i);
  chunk->used += static_cast<uint32_t>(iova.count);
  counters_.mapped_pages += iova.count;
  ++counters_.maps;
  return {};
}

uint64_t NestedDomain::TakeOutLocked(PageRun iova) {
  uint64_t taken = 0;
  ShadowTable::Chunks& chunks = shadow_.chunks();
  for (auto it = chunks.lower_bound(ShadowTable::ChunkOf(iova.first)); it != chunks.end();) {
    const uint64_t start = it->first * ShadowTable::kChunkPages;
    if (start >= iova.end()) break;
    const uint64_t first = std::max(iova.first, start);
    const uint64_t end = std::min(iova.end(), start + ShadowTable::kChunkPages);
    taken += TakeOutOfChunkLocked(it->first, it->second.get(), {first - start, end - first},
                                  [](size_t) { return true; });
    it = it->second->used == 0 ? chunks.erase(it) : std::next(it);
  }
  return taken;
}

template <typename Going>
uint64_t NestedDomain::TakeOutOfChunkLocked(uint64_t number, Chunk* chunk, PageRun indexes,
                                            const Going& going) {
  const auto goes = [&](size_t i) { return chunk->words[i] != 0 && going(i); };
  uint64_t taken = 0;
  for (size_t i = indexes.first; i < indexes.end();) {
    if (!goes(i)) {
      ++i;
      continue;
    }
    size_t end = i + 1;
    while (end < indexes.end() && goes(end)) ++end;
    const uint64_t count = end - i;
    parts_.target->unmap(RangeOf({number * ShadowTable::kChunkPages + i, count}));
    const auto words = std::span(chunk->words).subspan(i, count);
    ReleasePinsLocked(words);
    std::fill(words.begin(), words.end(), PageWord{0});
    chunk->used -= static_cast<uint32_t>(count);
    counters_.mapped_pages -= count;
    ++counters_.unmaps;
    taken += count;
    i = end;
  }
  if (taken != 0) parts_.credits->give_back(taken);
  return taken;
}

void NestedDomain::ReleasePinsLocked(std::span<const PageWord> words) {
  while (!words.empty()) {
    const size_t length = RunLength(words);
    context_->release_kept(GuestPagesOf(words.front(), length), AccessOf(words.front()), kForm);
    words = words.subspan(length);
  }
}

tl::expected<GuestPhys, FaultCode> NestedDomain::translate(Iova iova, Access access) const {
  ReaderMutexLock lock(mutex_);
  const PageWord word = shadow_.find(iova.page());
  if (word == 0) return tl::unexpected(FaultCode::kNotPresent);
  const Rights missing = RightsOf(access) & static_cast<Rights>(~RightsOf(AccessOf(word)));
  if ((missing & kMayRead) != 0) return tl::unexpected(FaultCode::kNoRead);
  if ((missing & kMayWrite) != 0) return tl::unexpected(FaultCode::kNoWrite);
  return FrameOf(word) + iova.offset_in_page();
}

NestedDomain::Counters NestedDomain::counters() const {
  ReaderMutexLock lock(mutex_);
  return counters_;
}

// Looks at every word: there is no way from guest memory to IOVAs, which would cost each map() and
// unmap() more than all this costs the VMM that takes memory away.
void NestedDomain::on_revoke(IovaRange guest_memory) {
  MutexLock lock(mutex_);
  ShadowTable::Chunks& chunks = shadow_.chunks();
  for (auto it = chunks.begin(); it != chunks.end();) {
    Chunk* chunk = it->second.get();
    const auto going = [&](size_t i) {
      return guest_memory.contains(Iova(FrameOf(chunk->words[i]).value()));
    };
    counters_.revoked_pages +=
        TakeOutOfChunkLocked(it->first, chunk, {0, ShadowTable::kChunkPages}, going);
    it = chunk->used == 0 ? chunks.erase(it) : std::next(it);
  }
}

}  // namespace mvgpu::domain
