#pragma once

// How a row changes its bits in one word of 64 pages, without a lock: the steps, in their order.
// What the stores mean is the rule of ledger_format.h: a page's payer is the row that its payer
// byte names, if that row holds the page; else the lowest row that does.
//
// A row only ever writes its own bits, and the payer byte of a page that it is about to hold. The
// rule gives every state of those bits and bytes one payer for each page that anybody holds, and
// none for the others. So whatever the order in which the stores of several processes arrive, and
// whichever of them never arrives because its process died, each held page is paid for once: there
// is no order to get wrong, and nothing here needs more than relaxed atomics.
//
// What the order is for is that the charge stays where it is:
//   hold     The payer of a page that others hold is named before our bit is set, where our bit
//            alone would change it: because all holders are higher rows, or because a byte of
//            earlier times names us. Naming the one who pays changes nothing; after it our bit
//            changes nothing.
//   release  Clears the bit. If we paid, the others pay from this store on, by the rule. A byte
//            that names us stays, and names nobody until we hold the page again.
//
// Promised is this: a hold moves no charge, and a release moves the charges of the one who lets go
// and no others, unless another row changes the same page at the same time; then the charge may
// end up with any of its holders. tests/apionly-domain/word_protocol_test.cc goes through all
// interleavings of three rows that hold, let go and die.
//
// `Word` is where the steps take effect: the mapped ledger (row_holds.cc), or a test's memory.
//   uint64_t load_mine();  void store_mine(uint64_t bits);
//   void count_held(uint64_t bits);  void count_released(uint64_t bits);  // what will change
//   bool has_neighbours();  Sharing sharing();
// `Sharing` is what others have of it:
//   unsigned neighbours();  unsigned row_of(unsigned i);  // other rows with this word, ascending
//   uint64_t load_neighbour(unsigned i);
//   bool has_payer_bytes();  // where not: none is named
//   uint64_t load_payers(unsigned octet);  // the bytes of pages octet * 8 + 0..7, lowest first
//   void store_payer(unsigned page, uint8_t payer);
//   void store_payers(unsigned octet, uint64_t bytes);

#include <bit>
#include <cstdint>

#include "apionly-domain/accounting/ledger_format.h"

namespace mvgpu::domain {

inline constexpr uint64_t kEachByte = 0x0101010101010101;

// The neighbours of a row in one word, among the pages that it is about to hold.
struct Neighbours {
  unsigned count = 0;
  uint64_t shared = 0;                     // pages that any of them holds
  uint64_t lower = 0;                      // pages that a lower row than ours holds
  uint8_t rows[ledger_format::kMaxRows];   // ascending
  uint64_t held[ledger_format::kMaxRows];  // by neighbour

  // Those of `pages` that the row holds; none of a row that is no neighbour.
  uint64_t held_by(unsigned row, uint64_t pages) const {
    for (unsigned i = 0; i < count; ++i) {
      if (rows[i] == row) return held[i] & pages;
    }
    return 0;
  }
};

// The payer byte that a page must have before row `me` holds it too. REQUIRES: a neighbour does.
inline uint8_t PayerToName(const Neighbours& others, unsigned me, uint64_t page, uint8_t named) {
  if (named != 0 && others.held_by(named - 1u, page) != 0) return named;
  for (unsigned i = 0; i < others.count; ++i) {
    if ((others.held[i] & page) == 0) continue;
    if (others.rows[i] > me) return static_cast<uint8_t>(others.rows[i] + 1);
    break;
  }
  return named == me + 1 ? 0 : named;  // a lower row pays by itself
}

// Whether these bytes of an octet are right for all those pages, which neighbours share; they are
// if all name a row that holds the pages, or nobody and a lower row pays by itself.
inline bool AreNamed(const Neighbours& others, uint64_t pages, uint64_t bytes) {
  const auto named = static_cast<uint8_t>(bytes);
  if (bytes != named * kEachByte) return false;
  return (named == 0 ? others.lower & pages : others.held_by(named - 1u, pages)) == pages;
}

template <typename Sharing>
void NamePayersOfOctet(Sharing& word, const Neighbours& others, unsigned me, unsigned octet,
                       uint64_t bytes) {
  const uint64_t octet_pages = uint64_t{0xff} << (octet * 8);
  uint64_t pages = others.shared & octet_pages;
  if (pages == 0 || AreNamed(others, pages, bytes)) return;
  // All pages at once where one row is the lowest holder of each, as it is with pages of a run.
  unsigned lowest = 0;
  while ((others.held[lowest] & pages) == 0) ++lowest;
  if (bytes == 0 && pages == octet_pages && others.rows[lowest] > me &&
      (others.held[lowest] & pages) == pages) {
    return word.store_payers(octet, (others.rows[lowest] + 1u) * kEachByte);
  }
  for (; pages != 0; pages &= pages - 1) {
    const auto page = static_cast<unsigned>(std::countr_zero(pages));
    const auto named = static_cast<uint8_t>(bytes >> (page % 8 * 8));
    const uint8_t right = PayerToName(others, me, uint64_t{1} << page, named);
    if (right != named) word.store_payer(page, right);
  }
}

// False when payer bytes are needed and there are none; nothing has changed then.
template <typename Sharing>
bool NamePayers(Sharing& word, unsigned me, uint64_t fresh) {
  Neighbours others;
  others.count = word.neighbours();
  for (unsigned i = 0; i < others.count; ++i) {
    others.rows[i] = static_cast<uint8_t>(word.row_of(i));
    others.held[i] = word.load_neighbour(i) & fresh;
    others.shared |= others.held[i];
    if (others.rows[i] < me) others.lower |= others.held[i];
  }
  if (others.shared == 0) return true;
  if (!word.has_payer_bytes()) return (others.shared & ~others.lower) == 0;
  const auto first = static_cast<unsigned>(std::countr_zero(others.shared)) / 8;
  const auto last = static_cast<unsigned>(std::bit_width(others.shared) - 1) / 8;
  // Mostly all bytes are alike, and right.
  const uint64_t bytes = word.load_payers(first);
  uint64_t unlike = 0;
  for (unsigned octet = first + 1; octet <= last; ++octet)
    unlike |= bytes ^ word.load_payers(octet);
  if (unlike == 0 && AreNamed(others, others.shared, bytes)) return true;
  NamePayersOfOctet(word, others, me, first, bytes);
  for (unsigned octet = first + 1; octet <= last; ++octet) {
    NamePayersOfOctet(word, others, me, octet, word.load_payers(octet));
  }
  return true;
}

// What NamePayers() mostly finds, quicker: nothing to name, for pages that at most this neighbour
// holds. False when that cannot be said at a glance. REQUIRES: there is one neighbour.
template <typename Sharing>
[[gnu::always_inline]] inline bool PayersAreNamed(Sharing word, unsigned me, uint64_t fresh) {
  const uint64_t shared = word.load_neighbour(0) & fresh;
  if (shared == 0) return true;
  const unsigned payer = word.row_of(0);
  if (!word.has_payer_bytes()) return payer < me;
  // A lower row pays by itself.
  const uint64_t right = payer < me ? 0 : (payer + 1) * kEachByte;
  const auto last = static_cast<unsigned>(std::bit_width(shared) - 1) / 8;
  for (auto octet = static_cast<unsigned>(std::countr_zero(shared)) / 8; octet <= last; ++octet) {
    if (word.load_payers(octet) != right) return false;
  }
  return true;
}

// Row `me` holds the wanted pages; those that it holds already stay as they are. False when payer
// bytes are needed and there are none; nothing has changed then.
template <typename Word>
[[gnu::always_inline]] inline bool HoldWord(Word& word, unsigned me, uint64_t wanted) {
  const uint64_t mine = word.load_mine();
  const uint64_t fresh = wanted & ~mine;
  if (fresh == 0) return true;
  if (word.has_neighbours()) {
    auto&& sharing = word.sharing();
    if (!NamePayers(sharing, me, fresh)) return false;
  }
  word.count_held(fresh);
  word.store_mine(mine | fresh);
  return true;
}

// The same for pages of one word, or of two beside each other, where it takes no more than looking
// at one neighbour; the steps of each word are in the order of HoldWord(), and those of the two
// need none. False otherwise, and nothing has changed.
//
// `Words` has what Word has, of word 0 and 1; no more than one neighbour; and bits are counted
// once, for both.
template <typename Words>
[[gnu::always_inline]] inline bool HoldSimply(Words& words, unsigned me, uint64_t wanted,
                                              uint64_t wanted_next) {
  const uint64_t mine = words.load_mine(0);
  const uint64_t next = wanted_next != 0 ? words.load_mine(1) : 0;
  if ((mine & wanted) != 0 || (next & wanted_next) != 0) return false;
  if (words.has_neighbours()) {
    if (!PayersAreNamed(words.sharing(0), me, wanted)) return false;
    if (wanted_next != 0 && !PayersAreNamed(words.sharing(1), me, wanted_next)) return false;
  }
  words.count_held();
  words.store_mine(0, mine | wanted);
  if (wanted_next != 0) words.store_mine(1, next | wanted_next);
  return true;
}

// Its twin. False, and nothing has changed: the row does not hold all of that.
template <typename Words>
[[gnu::always_inline]] inline bool ReleaseSimply(Words& words, uint64_t unwanted,
                                                 uint64_t unwanted_next) {
  const uint64_t mine = words.load_mine(0);
  const uint64_t next = unwanted_next != 0 ? words.load_mine(1) : 0;
  if ((~mine & unwanted) != 0 || (~next & unwanted_next) != 0) return false;
  words.count_released();
  words.store_mine(0, mine & ~unwanted);
  if (unwanted_next != 0) words.store_mine(1, next & ~unwanted_next);
  return true;
}

// Pages that the row does not hold stay as they are.
template <typename Word>
[[gnu::always_inline]] inline void ReleaseWord(Word& word, uint64_t unwanted) {
  const uint64_t mine = word.load_mine();
  const uint64_t gone = unwanted & mine;
  if (gone == 0) return;
  word.count_released(gone);
  word.store_mine(mine & ~gone);
}

}  // namespace mvgpu::domain
