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
uint64_t BitRange(uint64_t first, uint64_t count) {
  return (count == 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1) << first;
}

// CountPages(), quicker for what it mostly is: one page, or all.
uint64_t CountRun(uint64_t bits) {
  if ((bits & (bits - 1)) == 0) return 1;
  return bits == ~uint64_t{0} ? kPagesPerWord : CountPages(bits);
}

// A part of a run that lies in one word of a chunk.
struct Part {
  explicit Part(PageRun pages)
      : in_chunk(pages.first / kPagesPerWord % kWordsPerChunk),
        count(std::min(kPagesPerWord - pages.first % kPagesPerWord, pages.count)),
        bits(BitRange(pages.first % kPagesPerWord, count)) {}

  const uint64_t in_chunk;
  const uint64_t count;
  const uint64_t bits;
};

}  // namespace

// What others have of one word of the mapped ledger, as word_protocol.h wants it.
class RowHolds::Sharing {
 public:
  Sharing(const FileView& view, uint64_t chunk) : view_(view), chunk_(chunk) {
    if (!view.neighbours.empty()) FindNeighbours();
  }
  void move_to(uint64_t in_chunk) { in_chunk_ = in_chunk; }

  unsigned neighbours() const { return count_; }
  unsigned row_of(unsigned i) const { return rows_[i]; }
  uint64_t load_neighbour(unsigned i) const { return LoadWord(words_[i][in_chunk_]); }
  bool has_payer_bytes() {
    const uint64_t page = (chunk_ * kWordsPerChunk + in_chunk_) * kPagesPerWord;
    std::byte* chunk = view_.payers.chunk(page / kPagesPerPayerChunk);
    payers_ = chunk == nullptr ? nullptr : chunk + page % kPagesPerPayerChunk;
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
  void FindNeighbours() {
    for (const FileView::Neighbour& neighbour : view_.neighbours) {
      words_[count_] = neighbour.segment.words(chunk_);
      rows_[count_] = static_cast<uint8_t>(neighbour.row);
      if (words_[count_] != nullptr) ++count_;
    }
  }

  const FileView& view_;
  const uint64_t chunk_;
  uint64_t in_chunk_ = 0;
  std::byte* payers_ = nullptr;
  unsigned count_ = 0;
  const uint64_t* words_[kMaxRows];  // of those that have this chunk
  uint8_t rows_[kMaxRows];
};

// One word of the mapped ledger.
struct RowHolds::Word {
  uint64_t load_mine() const { return LoadWord(*mine); }
  // Release: whoever sees our bits also sees that they were counted, and how their payers are
  // named.
  void store_mine(uint64_t bits) {
    std::atomic_ref<uint64_t>(*mine).store(bits, std::memory_order_release);
  }
  void count_held(uint64_t bits) {
    row.held_pages_ += CountRun(bits);
    StoreWord(row.record_.held_pages, row.held_pages_);
  }
  void count_released(uint64_t bits) {
    row.released_pages_ += CountRun(bits);
    StoreWord(row.record_.released_pages, row.released_pages_);
  }
  bool has_neighbours() const { return others->neighbours() != 0; }
  Sharing& sharing() const {
    others->move_to(static_cast<uint64_t>(mine - chunk));
    return *others;
  }

  RowHolds& row;
  Sharing* others;  // null: only to release
  uint64_t* chunk;
  uint64_t* mine;
};

[[gnu::always_inline]] inline uint64_t RowHolds::HoldBy(const FileView& view, PageRun pages) {
  while (pages.count != 0) {
    const uint64_t chunk = pages.first / kPagesPerHoldChunk;
    uint64_t* words = view.mine.words(chunk);
    if (words == nullptr) break;
    Sharing sharing(view, chunk);
    const uint64_t in_chunk =
        std::min(pages.count, kPagesPerHoldChunk - pages.first % kPagesPerHoldChunk);
    for (const uint64_t end = pages.first + in_chunk; pages.first != end;) {
      const Part part(pages);
      Word word{*this, &sharing, words, words + part.in_chunk};
      if (!HoldWord(word, id_.index, part.bits)) return pages.first;
      pages = {pages.first + part.count, pages.count - part.count};
    }
  }
  return pages.first;
}

[[gnu::always_inline]] inline uint64_t RowHolds::ReleaseBy(const FileView& view, PageRun pages) {
  for (uint64_t* words = nullptr; pages.count != 0;) {
    if (words == nullptr || pages.first % kPagesPerHoldChunk == 0) {
      words = view.mine.words(pages.first / kPagesPerHoldChunk);
    }
    const Part part(pages);
    if (words != nullptr) {
      Word word{*this, nullptr, words, words + part.in_chunk};
      ReleaseWord(word, part.bits);
    }
    pages = {pages.first + part.count, pages.count - part.count};
  }
  return pages.first;
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

Result<void> RowHolds::hold(const FileIdentity& file, uint64_t file_pages, PageRun pages) {
  if (file_pages > ledger_format::kMaxPagesPerFile || pages.first > file_pages ||
      pages.count > file_pages - pages.first) {
    return Fail(
        ErrorCode::kInvalid,
        fmt::format("{} pages from page {} of a file of {} pages; at most {} can be accounted",
                    pages.count, pages.first, file_pages, ledger_format::kMaxPagesPerFile));
  }
  const FileView& view = view_of(file);
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
      release(file, {pages.first, next - pages.first});
      return tl::unexpected<Error>(std::move(found).error());
    }
    view = std::move(*found);
    {
      const Change change(record_, changes_);
      if (view.is_current()) next = HoldBy(view, {next, pages.end() - next});
    }
    if (next == pages.end()) return {};
  }
  release(file, {pages.first, next - pages.first});
  return Fail(ErrorCode::kCorrupt, fmt::format("{} is damaged: room for bits of row {} goes away",
                                               store_.path(), id_.index));
}

void RowHolds::release(const FileIdentity& file, PageRun pages) {
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
