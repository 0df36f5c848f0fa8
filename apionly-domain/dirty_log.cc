#include "apionly-domain/dirty_log.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>

namespace mvgpu::domain {

namespace {

// Calls visit(word, mask) for each 64-bit word that holds some of the bits [first, first + count).
template <typename Visit>
void ForEachWord(uint64_t first, uint64_t count, Visit visit) {
  while (count != 0) {
    const uint64_t shift = first % 64;
    const uint64_t bits = std::min(count, 64 - shift);
    const uint64_t mask = (bits == 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1) << shift;
    visit(first / 64, mask);
    first += bits;
    count -= bits;
  }
}

}  // namespace

void DirtyLog::start() {
  MutexLock lock(mutex_);
  pieces_.clear();
  on_.store(true, std::memory_order_seq_cst);
}

void DirtyLog::stop() {
  MutexLock lock(mutex_);
  on_.store(false, std::memory_order_relaxed);
  pieces_.clear();
}

void DirtyLog::mark(PageRun pages) {
  while (pages.count != 0) {
    const uint64_t index = pages.first >> kPieceShift;
    const uint64_t offset = pages.first % kPiecePages;
    const uint64_t count = std::min(pages.count, kPiecePages - offset);
    bool done = false;
    {
      ReaderMutexLock lock(mutex_);
      if (const auto piece = pieces_.find(index); piece != pieces_.end()) {
        MarkInPiece(*piece->second, offset, count);
        done = true;
      }
    }
    if (!done) {
      MutexLock lock(mutex_);
      if (!is_on()) return;
      auto& piece = pieces_[index];
      if (piece == nullptr) piece = std::make_unique<Piece>();
      MarkInPiece(*piece, offset, count);
    }
    pages = {pages.first + count, pages.count - count};
  }
}

void DirtyLog::MarkInPiece(Piece& piece, uint64_t first, uint64_t count) {
  ForEachWord(first, count, [&piece](uint64_t word, uint64_t mask) {
    piece.words[word].fetch_or(mask, std::memory_order_release);
  });
}

Result<void> DirtyLog::CheckBitmap(IovaRange range, uint64_t bit_size,
                                   std::span<const uint64_t> bitmap) {
  if (!std::has_single_bit(bit_size) || bit_size < kPageSize) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("a dirty bit of {} bytes is no power of two of at least {}", bit_size,
                            kPageSize));
  }
  if (range.size() == 0 || range.start().value() % bit_size != 0 || range.size() % bit_size != 0) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("iova {:#x}-{:#x} does not consist of whole dirty bits of {} bytes",
                            range.start().value(), range.last().value(), bit_size));
  }
  const uint64_t bits = range.size() / bit_size;
  if (bits > bitmap.size() * 64) {
    return Fail(ErrorCode::kInvalid, fmt::format("{} dirty bits do not fit in a bitmap of {} bytes",
                                                 bits, bitmap.size_bytes()));
  }
  return {};
}

void DirtyLog::SetBits(IovaRange range, uint64_t bit_size, PageRun pages,
                       std::span<uint64_t> bitmap) {
  const uint64_t bit_pages = PagesIn(bit_size);
  const uint64_t first = (pages.first - range.start().page()) / bit_pages;
  const uint64_t last = (pages.end() - 1 - range.start().page()) / bit_pages;
  ForEachWord(first, last - first + 1,
              [bitmap](uint64_t word, uint64_t mask) { bitmap[word] |= mask; });
}

void DirtyLog::read(IovaRange range, uint64_t bit_size, Read read, std::span<uint64_t> bitmap) {
  const PageRun pages = PagesOf(range);
  ReaderMutexLock lock(mutex_);
  for (auto& [index, piece] : pieces_) {
    const uint64_t piece_first = index << kPieceShift;
    const uint64_t first = std::max(pages.first, piece_first);
    const uint64_t end = std::min(pages.end(), piece_first + kPiecePages);
    if (first >= end) continue;
    auto* const words = &piece->words;  // a structured binding cannot be captured
    ForEachWord(first - piece_first, end - first, [&](uint64_t word, uint64_t mask) {
      auto& marks = (*words)[word];
      uint64_t found = read == Read::kClear ? marks.fetch_and(~mask, std::memory_order_acq_rel)
                                            : marks.load(std::memory_order_acquire);
      for (found &= mask; found != 0; found &= found - 1) {
        const uint64_t page =
            piece_first + word * 64 + static_cast<uint64_t>(std::countr_zero(found));
        SetBits(range, bit_size, {page, 1}, bitmap);
      }
    });
  }
}

}  // namespace mvgpu::domain
