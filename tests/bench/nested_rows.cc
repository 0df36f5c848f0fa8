// Guest I/O page tables: a refresh of what changed, against a map and an unmap of each page through
// a container, which is how QEMU follows such tables.

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "apionly-domain/nested/nested_domain.h"
#include "apionly-domain/nested/zpci_table.h"
#include "tests/bench/bench_guest.h"
#include "tests/bench/seeds_table.h"

namespace mvgpu::bench {

namespace {

using domain::Access;

constexpr uint64_t kMostPages = 65536;
constexpr Iova kBuffer{uint64_t{1} << 32};  // what the device sees
constexpr uint64_t kIota = 0x10'0804;       // a region-third table at 1 MiB
// Two places that the pages of the buffer are moved between, one after the other.
constexpr std::array<uint64_t, 2> kPlaces{uint64_t{256} << 20, uint64_t{512} << 20};

// The translation table of a device model: one word for each page of the buffer.
class FlatTarget final : public domain::NestedTarget {
 public:
  Result<void> map(IovaRange iova, domain::GuestPhys start, Access access) override {
    const PageRun pages = PagesIn(iova);
    for (uint64_t i = 0; i < pages.count; ++i) {
      words_[pages.first + i] = (start + BytesIn(i)).value() | static_cast<uint64_t>(access);
    }
    return {};
  }
  void unmap(IovaRange iova) override {
    const PageRun pages = PagesIn(iova);
    std::fill_n(words_.begin() + static_cast<ptrdiff_t>(pages.first), pages.count, uint64_t{0});
  }

 private:
  static PageRun PagesIn(IovaRange iova) {
    return {(iova.start() - kBuffer) >> kPageShift, PagesOf(iova).count};
  }
  std::vector<uint64_t> words_ = std::vector<uint64_t>(kMostPages);
};

// Where each page of the buffer stands within a place: all in a row, or anywhere.
std::vector<uint64_t> Order(bool scattered) {
  std::vector<uint64_t> order(kMostPages);
  std::iota(order.begin(), order.end(), uint64_t{0});
  if (scattered) std::shuffle(order.begin(), order.end(), std::mt19937_64(1));
  return order;
}

// A guest with tables for the buffer, and the domain that follows them.
class Follower {
 public:
  Follower(uint64_t memory, bool scattered)
      : order_(Order(scattered)),
        guest_(Layout::OneMapping(memory), domain::MakeNonePinBackend()),
        tables_(&guest_.domain()),
        walker_(&tables_),
        nested_(
            {.root = kIota, .aperture = IovaRange::FromFirstAndLast(kBuffer, LastOf(kMostPages))},
            {&guest_.domain(), &walker_, &target_, &credits_}) {
    Fill(kRegionTable, 2048, 0x20);
    Fill(kSegmentTable, 2048, 0x20);
    Put(kRegionTable + (kBuffer.value() >> 31) * 8, kSegmentTable | 0x7);
    for (uint64_t i = 0; i < kMostPages / 256; ++i) {
      Put(kSegmentTable + i * 8, kPageTables + i * 2048);
    }
    move_to(0, kMostPages);
    MVGPU_CHECK(refresh(kMostPages) == domain::Refreshed::End::kDone);
  }

  static Iova LastOf(uint64_t pages) { return kBuffer + (BytesIn(pages) - 1); }
  // The guest's part: the first pages of the buffer stand in the other place now.
  void move_to(uint64_t round, uint64_t pages) {
    for (uint64_t i = 0; i < pages; ++i) {
      Put(kPageTables + i * 8, kPlaces[round % 2] + BytesIn(order_[i]));
    }
  }
  domain::Refreshed::End refresh(uint64_t pages) {
    return nested_.refresh(IovaRange::FromFirstAndLast(kBuffer, LastOf(pages))).end;
  }
  // The same tables, read and decoded, and that is all.
  void walk(uint64_t pages) {
    for (uint64_t at = 0; at < pages;) {
      const auto stretch = walker_.walk_pages(kIota, (kBuffer + BytesIn(at)).value(), words_);
      MVGPU_CHECK(stretch.pages != 0 && !stretch.fault);
      Keep(words_[0]);
      at += stretch.pages;
    }
  }
  void walk_each(uint64_t pages) {
    for (uint64_t i = 0; i < pages; ++i) {
      Keep(walker_.walk(kIota, (kBuffer + BytesIn(i)).value(), Access::kRead)->out);
    }
  }

 private:
  static constexpr uint64_t kRegionTable = 0x10'0000;
  static constexpr uint64_t kSegmentTable = 0x10'4000;
  static constexpr uint64_t kPageTables = 0x20'0000;

  void Put(uint64_t address, uint64_t entry) {
    *reinterpret_cast<volatile uint64_t*>(guest_.host(Iova(address))) = __builtin_bswap64(entry);
  }
  void Fill(uint64_t table, uint64_t entries, uint64_t entry) {
    for (uint64_t i = 0; i < entries; ++i) Put(table + i * 8, entry);
  }

  const std::vector<uint64_t> order_;
  Guest guest_;
  domain::DomainTables tables_;
  domain::ZpciTable walker_;
  FlatTarget target_;
  domain::MapCredits credits_{kMostPages};
  domain::NestedDomain nested_;
  std::array<domain::PageWord, domain::ShadowTable::kChunkPages> words_ = {};
};

// The same by unmapping and mapping each page in a container of the device. Nothing is read, and
// nothing pinned: whatever follows tables in this way comes on top.
class PageByPage {
 public:
  PageByPage(uint64_t memory, bool scattered)
      : order_(Order(scattered)),
        file_(MakeFile(memory)),
        device_(Layout::OneMapping(kPageSize), domain::MakeNonePinBackend(),
                {.max_mappings = 2 * kMostPages}) {
    for (uint64_t i = 0; i < kMostPages; ++i) Map(i, 0);
  }
  void move_to(uint64_t round, uint64_t pages) {
    for (uint64_t i = 0; i < pages; ++i) {
      MVGPU_CHECK(device_.container().unmap(kBuffer + BytesIn(i), kPageSize).has_value());
      Map(i, round);
    }
  }

 private:
  void Map(uint64_t page, uint64_t round) {
    MVGPU_CHECK(device_.container()
                    .map({kBuffer + BytesIn(page), kPageSize, Access::kReadWrite,
                          UniqueFd(dup(file_.get())), kPlaces[round % 2] + BytesIn(order_[page])})
                    .has_value());
  }

  const std::vector<uint64_t> order_;
  UniqueFd file_;
  Guest device_;
};

}  // namespace

void MeasureNested(Table* table) {
  const Settings& settings = table->settings();
  const auto changed = [&](uint64_t pages, bool scattered, Target target) {
    const uint64_t calls = settings.quick ? 2 : 2 * std::max<uint64_t>(4096 / pages, 1);
    const std::string name = fmt::format("refresh, {} changed pages{}", pages,
                                         pages == 1  ? ""
                                         : scattered ? ", scattered"
                                                     : ", contiguous");
    table->compare(name, "unmap + map of each page, container", target, [&] {
      const auto ours = std::make_shared<Follower>(settings.memory, scattered);
      const auto theirs = std::make_shared<PageByPage>(settings.memory, scattered);
      return Result<Comparison>({Timed(calls * pages,
                                       [=](uint64_t) {
                                         for (uint64_t i = 1; i <= calls; ++i) {
                                           ours->move_to(i, pages);
                                           ours->refresh(pages);
                                         }
                                       }),
                                 Timed(calls * pages, [=](uint64_t) {
                                   for (uint64_t i = 1; i <= calls; ++i) {
                                     theirs->move_to(i, pages);
                                   }
                                 })});
    });
  };
  changed(1, false, Target::AtLeast(3));
  changed(256, false, Target::AtLeast(10));
  changed(256, true, {});
  changed(kMostPages, false, Target::AtLeast(20));
  changed(kMostPages, true, {});

  const auto unchanged = [&](std::string against, Target target, void (Follower::*walk)(uint64_t)) {
    const uint64_t calls = settings.quick ? 1 : 20;
    table->compare(fmt::format("refresh, {} pages, none changed", kMostPages), std::move(against),
                   target, [&] {
                     const auto follower = std::make_shared<Follower>(settings.memory, true);
                     return Result<Comparison>({Timed(calls * kMostPages,
                                                      [=](uint64_t) {
                                                        for (uint64_t i = 0; i < calls; ++i)
                                                          follower->refresh(kMostPages);
                                                      }),
                                                Timed(calls * kMostPages, [=](uint64_t) {
                                                  for (uint64_t i = 0; i < calls; ++i)
                                                    ((*follower).*walk)(kMostPages);
                                                })});
                   });
  };
  unchanged("a walk of the same tables", Target::AtMost(2), &Follower::walk);
  unchanged("a walk for each page", {}, &Follower::walk_each);
}

}  // namespace mvgpu::bench
