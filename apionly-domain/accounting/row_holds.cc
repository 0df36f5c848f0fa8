#include "apionly-domain/accounting/row_holds.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <utility>

#include "apionly-domain/accounting/payer_rule.h"
#include "apionly-domain/accounting/word_protocol.h"

namespace mvgpu::domain {

using ledger_format::kMaxRows;
using ledger_format::kPagesPerHoldChunk;
using ledger_format::kPagesPerPayerChunk;
using ledger_format::kPagesPerWord;
using ledger_format::kWordsPerChunk;
using ledger_format::LoadWord;
using ledger_format::StoreWord;

namespace {

// Each time the layout had changed again, or what was made room for was not there: more often than
// that only in a file that somebody damages.
constexpr int kAttempts = 1000;

// Bits [first, first + count) of a word. REQUIRES: first + count <= 64, count > 0.
uint64_t BitRange(uint64_t first, uint64_t count) { return ~uint64_t{0} >> (64 - count) << first; }

// Release: whoever sees our bits also sees that they were counted, and how their payers are named.
void StoreBits(uint64_t& word, uint64_t bits) {
  std::atomic_ref<uint64_t>(word).store(bits, std::memory_order_release);
}

// The first part of a run that lies in one word of a chunk.
struct Part {
  explicit Part(PageRun pages)
      : in_chunk(pages.first / kPagesPerWord % kWordsPerChunk),
        count(std::min(kPagesPerWord - pages.first % kPagesPerWord, pages.count)),
        bits(BitRange(pages.first % kPagesPerWord, count)) {}

  // CountPages() of some of the bits, quicker for what it mostly is: all of them.
  uint64_t count_of(uint64_t some) const { return some == bits ? count : CountPages(some); }

  const uint64_t in_chunk;
  const uint64_t count;
  const uint64_t bits;
};

// What most changes are about: pages of one word of a chunk, or of two beside each other.
struct ShortRun {
  static bool is_short(PageRun pages) {
    return pages.count - 1 < kPagesPerWord &&
           pages.first % kPagesPerHoldChunk <= kPagesPerHoldChunk - pages.count;
  }
  // REQUIRES: is_short(pages).
  explicit ShortRun(PageRun pages)
      : in_chunk(pages.first / kPagesPerWord % kWordsPerChunk),
        bits(BitRange(0, pages.count) << pages.first % kPagesPerWord),
        // Two shifts: one by 64 would be undefined.
        next_bits(BitRange(0, pages.count) >> 1 >> (~pages.first % kPagesPerWord)) {}

  const uint64_t in_chunk;
  const uint64_t bits;
  const uint64_t next_bits;  // of the word behind; mostly none
};

}  // namespace

// What others have of one word of the mapped ledger, as word_protocol.h wants it.
class RowHolds::Sharing {
 public:
  Sharing(const FileView& view, uint64_t page, uint64_t in_chunk)
      : view_(view), page_(page / kPagesPerWord * kPagesPerWord), in_chunk_(in_chunk) {}

  unsigned neighbours() const { return view_.window.neighbours; }
  unsigned row_of(unsigned i) const { return view_.window.rows[i]; }
  uint64_t load_neighbour(unsigned i) const { return LoadWord(view_.window.words[i][in_chunk_]); }
  bool has_payer_bytes() {
    if (view_.payers.chunks == 0) return false;
    std::byte* chunk = view_.payers.chunk(page_ / kPagesPerPayerChunk);
    payers_ = chunk == nullptr ? nullptr : chunk + page_ % kPagesPerPayerChunk;
    return chunk != nullptr;
  }
  // REQUIRES of these: has_payer_bytes() said so.
  uint64_t load_payers(unsigned octet) const { return LoadWord(octets()[octet]); }
  void store_payers(unsigned octet, uint64_t bytes) { StoreWord(octets()[octet], bytes); }
  void store_payer(unsigned page, uint8_t payer) {
    StoreWord(reinterpret_cast<uint8_t*>(payers_)[page], payer);
  }

 private:
  uint64_t* octets() const { return reinterpret_cast<uint64_t*>(payers_); }

  const FileView& view_;
  const uint64_t page_;
  const uint64_t in_chunk_;
  std::byte* payers_ = nullptr;
};

// One word of the mapped ledger.
struct RowHolds::Word {
  uint64_t load_mine() const { return LoadWord(*mine); }
  void store_mine(uint64_t bits) { StoreBits(*mine, bits); }
  void count_held(uint64_t bits) {
    row.held_pages_ += part.count_of(bits);
    StoreWord(row.record_.held_pages, row.held_pages_);
  }
  void count_released(uint64_t bits) {
    row.released_pages_ += part.count_of(bits);
    StoreWord(row.record_.released_pages, row.released_pages_);
  }
  bool has_neighbours() const { return view.window.neighbours != 0; }
  Sharing sharing() const { return {view, page, part.in_chunk}; }

  RowHolds& row;
  const FileView& view;
  const uint64_t page;
  const Part& part;
  uint64_t* mine;
};

uint64_t RowHolds::HoldBy(FileView& view, PageRun pages) {
  while (pages.count != 0) {
    if (!view.move_window(pages.first / kPagesPerHoldChunk)) break;
    do {
      const Part part(pages);
      Word word{*this, view, pages.first, part, view.window.mine + part.in_chunk};
      if (!HoldWord(word, id_.index, part.bits)) return pages.first;
      pages = {pages.first + part.count, pages.count - part.count};
    } while (pages.count != 0 && pages.first % kPagesPerHoldChunk != 0);
  }
  return pages.first;
}

uint64_t RowHolds::ReleaseBy(const FileView& view, PageRun pages) {
  for (uint64_t* words = nullptr; pages.count != 0;) {
    if (words == nullptr || pages.first % kPagesPerHoldChunk == 0) {
      words = view.mine.words(pages.first / kPagesPerHoldChunk);
    }
    const Part part(pages);
    if (words != nullptr) {
      Word word{*this, view, pages.first, part, words + part.in_chunk};
      ReleaseWord(word, part.bits);
    }
    pages = {pages.first + part.count, pages.count - part.count};
  }
  return pages.first;
}

// One word or two of the view's window, for a run of so many pages in all.
struct RowHolds::Words {
  uint64_t load_mine(unsigned i) const { return LoadWord(mine[i]); }
  void store_mine(unsigned i, uint64_t bits) { StoreBits(mine[i], bits); }
  void count_held() {
    row.held_pages_ += pages.count;
    StoreWord(row.record_.held_pages, row.held_pages_);
  }
  void count_released() {
    row.released_pages_ += pages.count;
    StoreWord(row.record_.released_pages, row.released_pages_);
  }
  bool has_neighbours() const { return view.window.neighbours != 0; }
  Sharing sharing(unsigned i) const {
    return {view, pages.first + i * kPagesPerWord, in_chunk + i};
  }

  RowHolds& row;
  const FileView& view;
  const PageRun pages;
  const uint64_t in_chunk;
  uint64_t* const mine;
};

// The view, if short changes of these pages can be made by what it has in its window.
[[gnu::always_inline]] inline FileView* RowHolds::WindowOn(const FileIdentity& file,
                                                           PageRun pages) {
  FileView* const view = last_view_;
  if (view == nullptr || !(last_file_ == file) || !ShortRun::is_short(pages)) return nullptr;
  const uint64_t chunk = pages.first / kPagesPerHoldChunk;
  if (view->window.chunk != chunk) {
    view->prefetch(pages.first);
    view->move_window(chunk);
    if (view->window.chunk != chunk) return nullptr;
  }
  return is_known(*view) ? view : nullptr;
}

[[gnu::always_inline]] inline bool RowHolds::HoldQuickly(const FileIdentity& file,
                                                         uint64_t file_pages, PageRun pages) {
  const FileView* const view = WindowOn(file, pages);
  if (view == nullptr || view->window.neighbours > 1 || file_pages > view->pages ||
      pages.end() > file_pages) {
    return false;
  }
  const ShortRun run(pages);
  Words words{*this, *view, pages, run.in_chunk, view->window.mine + run.in_chunk};
  const Change change(record_, changes_);
  return view->is_current() && HoldSimply(words, id_.index, run.bits, run.next_bits);
}

[[gnu::always_inline]] inline bool RowHolds::ReleaseQuickly(const FileIdentity& file,
                                                            PageRun pages) {
  const FileView* const view = WindowOn(file, pages);
  if (view == nullptr) return false;
  const ShortRun run(pages);
  Words words{*this, *view, pages, run.in_chunk, view->window.mine + run.in_chunk};
  const Change change(record_, changes_);
  return view->is_current() && ReleaseSimply(words, run.bits, run.next_bits);
}

Result<void> RowHolds::hold(const FileIdentity& file, uint64_t file_pages, PageRun pages) {
  if (HoldQuickly(file, file_pages, pages)) [[likely]]
    return {};
  return HoldRun(file, file_pages, pages);
}

void RowHolds::release(const FileIdentity& file, PageRun pages) {
  if (ReleaseQuickly(file, pages)) [[likely]]
    return;
  ReleaseRun(file, pages);
}

FileView& RowHolds::FindView(const FileIdentity& file) {
  // What was looked up can be looked up again: a guest may use any number of files over time.
  if (views_.size() >= ledger_format::kMaxFiles && !views_.contains(file)) views_.clear();
  std::unique_ptr<FileView>& view = views_[file];
  if (view == nullptr) view = std::make_unique<FileView>();
  last_file_ = file;
  last_view_ = view.get();
  return *view;
}

Result<void> RowHolds::HoldRun(const FileIdentity& file, uint64_t file_pages, PageRun pages) {
  if (file_pages > ledger_format::kMaxPagesPerFile || pages.first > file_pages ||
      pages.count > file_pages - pages.first) {
    return Fail(
        ErrorCode::kInvalid,
        fmt::format("{} pages from page {} of a file of {} pages; at most {} can be accounted",
                    pages.count, pages.first, file_pages, ledger_format::kMaxPagesPerFile));
  }
  FileView& view = view_of(file);
  view.prefetch(pages.first);
  uint64_t next = pages.first;
  if (file_pages <= view.pages && is_known(view)) {
    const Change change(record_, changes_);
    if (view.is_current()) next = HoldBy(view, pages);
  }
  if (next == pages.end()) return {};
  return HoldSlowly(file, file_pages, pages, next);
}

// Makes room and goes on at page `next`.
Result<void> RowHolds::HoldSlowly(const FileIdentity& file, uint64_t file_pages, PageRun pages,
                                  uint64_t next) {
  FileView& view = view_of(file);
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    auto found = store_.make_room(id_, file, file_pages, {next, pages.end() - next});
    if (!found) {
      ReleaseRun(file, {pages.first, next - pages.first});
      return tl::unexpected<Error>(std::move(found).error());
    }
    view = std::move(*found);
    {
      const Change change(record_, changes_);
      if (view.is_current()) next = HoldBy(view, {next, pages.end() - next});
    }
    if (next == pages.end()) return {};
  }
  ReleaseRun(file, {pages.first, next - pages.first});
  return Fail(ErrorCode::kCorrupt, fmt::format("{} is damaged: room for bits of row {} goes away",
                                               store_.path(), id_.index));
}

void RowHolds::ReleaseRun(const FileIdentity& file, PageRun pages) {
  FileView& view = view_of(file);
  uint64_t next = pages.first;
  for (int attempt = 0; next < pages.end() && attempt < kAttempts; ++attempt) {
    if (is_known(view)) {
      const Change change(record_, changes_);
      if (view.is_current()) next = ReleaseBy(view, {next, pages.end() - next});
    }
    if (next == pages.end()) return;
    auto found = store_.look_up(id_, file);
    if (!found) return;  // the row was dropped, and all that it held with it
    view = std::move(*found);
  }
}

}  // namespace mvgpu::domain
