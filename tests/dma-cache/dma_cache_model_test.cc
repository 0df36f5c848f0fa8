// The cache against a naive reference: random holds by several users, ranges and single pages,
// contiguous or not, for reading and writing; releases, unmaps and maps, pages that move, failures
// of mapper and pin at the n-th call. After each step every page's holders, its address both ways,
// what is idle in which order, what is pinned and what is dirty agree.
//
// MVGPU_MODEL_STEPS: operations per seed (default 3000).

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <deque>
#include <map>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "tests/dma-cache/dma_cache_fixture.h"

namespace mvgpu::dma {
namespace {

using namespace testing;

constexpr uint64_t kBlocks = 12;  // mappings of the VMM, each kBlockPages long
constexpr uint64_t kBlockPages = 8;
constexpr uint64_t kPages = kBlocks * kBlockPages;
constexpr size_t kUsers = 3;

long Steps() {
  const char* steps = std::getenv("MVGPU_MODEL_STEPS");
  return steps != nullptr ? std::atol(steps) : 3000;
}

// What a seed's run allows. With idle pages and failures together the reference does not say which
// idle pages went, only that they were idle.
struct Kind {
  unsigned seed;
  uint64_t idle_limit;
  bool faults;
  CountingMapper::Addresses addresses;
};

struct Hold {
  size_t user;
  Direction direction;
  std::vector<uint64_t> pages;  // a range, or single pages in any order
  std::vector<bool> revoked;    // per entry
  DmaMapping handle;            // of a range
  uint64_t epoch = 0;           // of single pages
};

class Model {
 public:
  explicit Model(const Kind& kind) : kind_(kind), random_(kind.seed) {
    auto domain = domain::ApiOnlyDomain::Create({}, std::make_unique<FakePinBackend>(pins_),
                                                nullptr, nullptr);
    EXPECT_THAT(domain, IsOk());
    domain_ = std::move(*domain);
    EXPECT_THAT(container_.attach(domain_.get()), IsOk());
    mapper_.addresses = kind.addresses;
    cache_.emplace(domain_.get(), &mapper_, DmaCache::Options{kind.idle_limit});
    for (size_t i = 0; i < kUsers; ++i) users_.push_back(std::make_unique<Party>(&*cache_));
    domain_->start_dirty_log();
  }
  ~Model() {
    while (!holds_.empty()) Release();
    users_.clear();
    cache_.reset();
    EXPECT_EQ(mapper_.mapped_pages(), 0u);
    EXPECT_THAT(container_.detach(domain_.get()), IsOk());
    EXPECT_TRUE(pins_->pages.empty());
  }

  void Step() {
    switch (random_() % 16) {
      case 0:
      case 1:
        MapBlock();
        break;
      case 2:
        if (random_() % 2 == 0) UnmapBlock();
        break;
      case 3:
        Move();
        break;
      case 4:
      case 5:
      case 6:
      case 7:
        UseRange();
        break;
      case 8:
      case 9:
        UsePages();
        break;
      default:
        if (holds_.size() > random_() % 24) Release();
        break;
    }
    Compare();
  }

 private:
  bool IsMapped(uint64_t page) { return mapped_[page / kBlockPages]; }
  uint64_t BackingOf(uint64_t page) { return file_page_[page / kBlockPages] + page % kBlockPages; }
  bool IsHeld(uint64_t page) const {
    return std::any_of(holds_.begin(), holds_.end(), [page](const Hold& hold) {
      for (size_t i = 0; i < hold.pages.size(); ++i) {
        if (hold.pages[i] == page && !hold.revoked[i]) return true;
      }
      return false;
    });
  }
  bool IsIdle(uint64_t page) const {
    return std::find(idle_.begin(), idle_.end(), page) != idle_.end();
  }

  void MapBlock() {
    const uint64_t block = random_() % kBlocks;
    if (mapped_[block]) return;
    // Half of the blocks continue their neighbour in the file, so that runs cross mappings; the
    // others often show pages that another block shows too.
    const uint64_t file_page = random_() % 2 == 0 ? block * kBlockPages : random_() % kPages;
    ASSERT_THAT(container_.map(ram_.map_request(BytesIn(block * kBlockPages), BytesIn(file_page),
                                                BytesIn(kBlockPages))),
                IsOk());
    mapped_[block] = true;
    file_page_[block] = file_page;
  }

  void UnmapBlock() {
    const uint64_t block = random_() % kBlocks;
    const auto told = Told({block * kBlockPages, kBlockPages});
    ASSERT_THAT(container_.unmap(Iova(BytesIn(block * kBlockPages)), BytesIn(kBlockPages)), IsOk());
    mapped_[block] = false;
    Take({block * kBlockPages, kBlockPages});
    for (size_t u = 0; u < kUsers; ++u) ASSERT_EQ(users_[u]->told.size(), told[u]) << u;
  }

  // Some pages are elsewhere all of a sudden; those that are cached are taken, run by run.
  void Move() {
    if (random_() % 4 != 0) return;
    for (int i = 0; i < 6; ++i) mapper_.moved.insert(random_() % kPages);
    std::vector<PageRun> runs;
    for (const uint64_t page : mapper_.moved) {
      if (!IsHeld(page) && !IsIdle(page)) continue;
      if (!runs.empty() && runs.back().end() == page) {
        ++runs.back().count;
      } else {
        runs.push_back({page, 1});
      }
    }
    uint64_t pages = 0;
    std::vector<size_t> told(kUsers, 0);
    for (size_t u = 0; u < kUsers; ++u) told[u] = users_[u]->told.size();
    for (const PageRun& run : runs) {
      pages += run.count;
      for (size_t u = 0; u < kUsers; ++u) told[u] += Told(run)[u] - users_[u]->told.size();
    }
    ASSERT_EQ(cache_->recheck(), pages);
    for (const PageRun& run : runs) Take(run);
    for (size_t u = 0; u < kUsers; ++u) ASSERT_EQ(users_[u]->told.size(), told[u]) << u;
    mapper_.moved.clear();
  }

  // How often each user will have been told, once these pages are revoked.
  std::vector<size_t> Told(PageRun pages) {
    std::vector<size_t> told(kUsers, 0);
    for (const Hold& hold : holds_) {
      for (size_t i = 0; i < hold.pages.size(); ++i) {
        if (pages.contains(hold.pages[i]) && !hold.revoked[i]) told[hold.user] = 1;
      }
    }
    for (size_t u = 0; u < kUsers; ++u) told[u] += users_[u]->told.size();
    return told;
  }

  void Take(PageRun pages) {
    for (Hold& hold : holds_) {
      for (size_t i = 0; i < hold.pages.size(); ++i) {
        if (pages.contains(hold.pages[i])) hold.revoked[i] = true;
      }
    }
    std::erase_if(idle_, [pages](uint64_t page) { return pages.contains(page); });
  }

  bool ArmFault() {
    if (!kind_.faults || random_() % 6 != 0) return false;
    (random_() % 2 == 0 ? mapper_.fail_at_call : pins_->fail_at_call) = 1 + random_() % 3;
    return true;
  }
  // True when it struck. Where idle pages went for it, it was tried again.
  bool DisarmFault(bool armed) {
    const bool struck = armed && mapper_.fail_at_call == 0 && pins_->fail_at_call == 0;
    mapper_.fail_at_call = pins_->fail_at_call = 0;
    return struck;
  }

  Direction AnyDirection() { return static_cast<Direction>(random_() % 3); }

  void UseRange() {
    const uint64_t first = random_() % kPages;
    const PageRun run{first, 1 + random_() % std::min<uint64_t>(20, kPages - first)};
    Hold hold{random_() % kUsers, AnyDirection(), {}, std::vector<bool>(run.count, false), {}, 0};
    for (uint64_t page = run.first; page < run.end(); ++page) hold.pages.push_back(page);
    const bool contiguous = random_() % 3 == 0;
    const bool scattered_before = contiguous && !IsOneStretch(hold.pages);
    const auto range = MakeRange(BytesIn(run.first), BytesIn(run.count));
    const bool whole = std::all_of(hold.pages.begin(), hold.pages.end(),
                                   [this](uint64_t page) { return IsMapped(page); });
    const bool armed = ArmFault();
    DmaUser& user = *users_[hold.user]->operator->();
    auto use =
        contiguous ? user.map_contiguous(range, hold.direction) : user.map(range, hold.direction);
    const bool struck = DisarmFault(armed);
    if (use) {
      ASSERT_TRUE(whole);
      ASSERT_TRUE(!contiguous || use->runs().size() == 1);
      hold.handle = std::move(*use);
      Held(std::move(hold));
      return;
    }
    if (contiguous && whole && !struck) {
      ASSERT_EQ(use.error().code(), ErrorCode::kNotContiguous);
    } else {
      ASSERT_TRUE(!whole || struck || scattered_before) << use.error().message();
    }
    if (!scattered_before) IdleAgain(hold.pages);
  }

  // Whether the cached ones among them have one offset to their device addresses.
  bool IsOneStretch(const std::vector<uint64_t>& pages) {
    std::set<uint64_t> offsets;
    for (const uint64_t page : pages) {
      const auto address = cache_->address_of(Iova(BytesIn(page)));
      if (address) offsets.insert(address->page() - page);
    }
    return offsets.size() <= 1;
  }

  void UsePages() {
    const size_t count = 1 + random_() % 12;
    Hold hold{random_() % kUsers, AnyDirection(), {}, std::vector<bool>(count, false), {}, 0};
    std::vector<Iova> iovas;
    for (size_t i = 0; i < count; ++i) {
      const bool follows = i > 0 && random_() % 2 == 0 && hold.pages.back() + 1 < kPages;
      hold.pages.push_back(follows ? hold.pages.back() + 1 : random_() % kPages);
      iovas.emplace_back(BytesIn(hold.pages.back()) + i);
    }
    const bool whole = std::all_of(hold.pages.begin(), hold.pages.end(),
                                   [this](uint64_t page) { return IsMapped(page); });
    std::vector<DmaAddr> addresses(count);
    const bool armed = ArmFault();
    const auto epoch = (*users_[hold.user])->map_pages(iovas, hold.direction, addresses);
    const bool struck = DisarmFault(armed);
    if (!epoch) {
      ASSERT_TRUE(!whole || struck) << epoch.error().message();
      std::sort(hold.pages.begin(), hold.pages.end());
      IdleAgain(hold.pages);
      return;
    }
    ASSERT_TRUE(whole);
    for (size_t i = 0; i < count; ++i) {
      ASSERT_EQ(cache_->address_of(iovas[i]), addresses[i]);
      ASSERT_EQ(addresses[i].offset_in_page(), i);
    }
    hold.epoch = *epoch;
    Held(std::move(hold));
  }

  void Held(Hold hold) {
    for (const uint64_t page : hold.pages) std::erase(idle_, page);
    holds_.push_back(std::move(hold));
  }
  // A request that failed found them idle.
  void IdleAgain(const std::vector<uint64_t>& pages) {
    for (const uint64_t page : pages) {
      if (std::erase(idle_, page) != 0) idle_.push_back(page);
    }
  }

  void Release() {
    if (holds_.empty()) return;
    const auto at = holds_.begin() + static_cast<std::ptrdiff_t>(random_() % holds_.size());
    Hold hold = std::move(*at);
    holds_.erase(at);
    if (hold.handle.empty()) {
      std::vector<Iova> iovas;
      for (const uint64_t page : hold.pages) iovas.emplace_back(BytesIn(page));
      ASSERT_THAT((*users_[hold.user])->unmap_pages(iovas, hold.direction, hold.epoch), IsOk());
    } else {
      hold.handle.reset();
    }
    if (kind_.idle_limit == 0) return;
    // In the order of the pages; one that stands there twice goes with the second.
    std::vector<uint64_t> last;
    for (size_t i = 0; i < hold.pages.size(); ++i) {
      if (hold.revoked[i] || IsHeld(hold.pages[i])) continue;
      std::erase(last, hold.pages[i]);
      last.push_back(hold.pages[i]);
    }
    idle_.insert(idle_.end(), last.begin(), last.end());
    while (idle_.size() > kind_.idle_limit) idle_.pop_front();
  }

  void Compare() {
    std::map<uint64_t, bool> cached;  // page -> held for writing
    for (const Hold& hold : holds_) {
      bool valid = true;
      for (size_t i = 0; i < hold.pages.size(); ++i) {
        if (hold.revoked[i]) {
          valid = false;
        } else {
          cached[hold.pages[i]] |= IsForWrite(hold.direction);
        }
      }
      if (!hold.handle.empty()) {
        ASSERT_EQ(hold.handle.is_valid(), valid);
        ASSERT_NO_FATAL_FAILURE(CompareAddresses(hold));
      }
    }
    const size_t held = cached.size();
    ASSERT_NO_FATAL_FAILURE(CompareIdle(cached));
    for (const uint64_t page : idle_) cached.emplace(page, false);
    ASSERT_EQ(cached.size(), held + idle_.size());
    const DmaCache::Counters counters = cache_->counters();
    ASSERT_EQ(counters.idle_pages, idle_.size());
    ASSERT_EQ(counters.cached_pages, cached.size());
    ASSERT_EQ(mapper_.mapped_pages(), cached.size());
    ASSERT_EQ(counters.miss_pages - counters.unmapped_pages, cached.size());
    ASSERT_NO_FATAL_FAILURE(CompareLookups(cached));
    ASSERT_NO_FATAL_FAILURE(CompareDirty(cached));
  }

  // Where the reference does not know what went, it takes over what is left, if that was idle.
  void CompareIdle(const std::map<uint64_t, bool>& held) {
    if (!kind_.faults || kind_.idle_limit == 0) return;
    std::set<uint64_t> left;
    for (uint64_t page = 0; page < kPages; ++page) {
      const bool cached = cache_->address_of(Iova(BytesIn(page))).has_value();
      if (cached && !held.contains(page)) left.insert(page);
      ASSERT_TRUE(cached || !held.contains(page)) << page;
    }
    ASSERT_LE(left.size(), kind_.idle_limit);
    std::erase_if(idle_, [&left](uint64_t page) { return !left.contains(page); });
    for (const uint64_t page : left) {
      if (!IsIdle(page)) idle_.push_back(page);
    }
  }

  void CompareAddresses(const Hold& hold) {
    uint64_t next = hold.pages.front();
    for (const MappedRun& run : hold.handle.runs()) {
      ASSERT_EQ(run.iova.start().page(), next);
      next += PagesIn(run.iova.size());
      for (uint64_t i = 0; i < PagesIn(run.iova.size()); ++i) {
        const uint64_t page = run.iova.start().page() + i;
        if (hold.revoked[page - hold.pages.front()]) continue;
        ASSERT_EQ(cache_->address_of(Iova(BytesIn(page))), run.address + BytesIn(i));
      }
    }
    ASSERT_EQ(next, hold.pages.back() + 1);
  }

  void CompareLookups(const std::map<uint64_t, bool>& cached) {
    std::set<uint64_t> backing;
    std::map<uint64_t, std::set<uint64_t>> by_address;
    for (uint64_t page = 0; page < kPages; ++page) {
      const auto address = cache_->address_of(Iova(BytesIn(page)));
      ASSERT_EQ(address.has_value(), cached.contains(page)) << page;
      if (!address) continue;
      backing.insert(BackingOf(page));
      by_address[address->value()].insert(page);
      if (kind_.addresses != CountingMapper::Addresses::kHost) {
        ASSERT_EQ(mapper_.iova_page_at(*address), page);
      }
    }
    for (const auto& [address, pages] : by_address) {
      std::set<uint64_t> found;
      for (const Iova iova : cache_->iovas_of(DmaAddr(address))) found.insert(iova.page());
      ASSERT_EQ(found, pages);
    }
    ASSERT_EQ(pins_->pages.size(), backing.size());
  }

  // In the second of two rounds without a change exactly what is held for writing is dirty.
  void CompareDirty(const std::map<uint64_t, bool>& cached) {
    std::array<uint64_t, 2> bits{};
    for (int round = 0; round < 2; ++round) {
      bits = {};
      ASSERT_THAT(domain_->read_dirty(MakeRange(0, BytesIn(kPages)), kPageSize,
                                      domain::DirtyLog::Read::kClear, bits),
                  IsOk());
    }
    for (uint64_t page = 0; page < kPages; ++page) {
      const auto it = cached.find(page);
      const bool written = it != cached.end() && it->second;
      ASSERT_EQ((bits[page / 64] >> page % 64 & 1) != 0, written) << page;
    }
  }

  const Kind kind_;
  std::mt19937 random_;
  GuestRam ram_{2 * kPages * kPageSize};
  std::shared_ptr<FakePinBackend::State> pins_ = std::make_shared<FakePinBackend::State>();
  domain::Container container_;
  std::unique_ptr<domain::ApiOnlyDomain> domain_;
  CountingMapper mapper_;
  std::optional<DmaCache> cache_;
  std::vector<std::unique_ptr<Party>> users_;
  std::map<uint64_t, bool> mapped_;
  std::map<uint64_t, uint64_t> file_page_;
  std::vector<Hold> holds_;
  std::deque<uint64_t> idle_;  // the oldest first
};

DmaMapping UseOf(Party& party, uint64_t page) {
  auto use = party->map(MakeRange(BytesIn(page), 1), Direction::kToDevice);
  MVGPU_CHECK(use.has_value());
  return std::move(*use);
}

class DmaCacheModelTest : public ::testing::TestWithParam<Kind> {};

TEST_P(DmaCacheModelTest, AgreesWithANaiveReference) {
  Model model(GetParam());
  for (long step = 0; step < Steps(); ++step) {
    ASSERT_NO_FATAL_FAILURE(model.Step()) << "seed " << GetParam().seed << " step " << step;
  }
}

std::vector<Kind> Kinds() {
  using enum CountingMapper::Addresses;
  std::vector<Kind> kinds;
  for (const auto addresses : {kScattered, kTight, kJoined, kHost}) {
    for (const uint64_t idle : {0, 10}) {
      for (const bool faults : {false, true}) {
        kinds.push_back({static_cast<unsigned>(kinds.size()) + 1, idle, faults, addresses});
      }
    }
  }
  return kinds;
}

INSTANTIATE_TEST_SUITE_P(Seeds, DmaCacheModelTest, ::testing::ValuesIn(Kinds()),
                         [](const auto& kind) { return "Seed" + std::to_string(kind.param.seed); });

// Threads with users of their own hold pages of a window whose memory another thread exchanges: the
// two halves of a file, each full of a byte of its own, take turns. What is read through a valid
// mapping must be what its address points at.
class DmaCacheThreadsTest : public ::testing::TestWithParam<uint64_t> {};

TEST_P(DmaCacheThreadsTest, WhoHoldsAnAddressReadsItsMemoryOrIsToldThatItWent) {
  constexpr uint64_t kWindow = 64;  // pages
  constexpr uint64_t kSteady = 256;
  GuestRam ram(3 * kWindow * kPageSize);
  for (uint64_t i = 0; i < ram.size(); ++i) *ram.at(i) = std::byte(1 + i / BytesIn(kWindow));
  domain::Container container;
  auto domain = domain::ApiOnlyDomain::Create({}, domain::MakeNonePinBackend(), nullptr, nullptr);
  ASSERT_THAT(domain, IsOk());
  ASSERT_THAT(container.attach(domain->get()), IsOk());
  const auto map = [&](uint64_t iova, uint64_t part) {
    return container.map(ram.map_request(BytesIn(iova), BytesIn(part * kWindow), BytesIn(kWindow)));
  };
  ASSERT_THAT(map(0, 0), IsOk());
  ASSERT_THAT(map(kSteady, 2), IsOk());
  auto mapper = MakeNoneMapper();
  {
    DmaCache cache(domain->get(), mapper.get(), {GetParam()});
    Party scout(&cache);
    const uint64_t steady_address =
        UseOf(scout, kSteady).runs().front().address.value() - 2 * BytesIn(kWindow);
    std::atomic<bool> stop{false};
    std::atomic<uint64_t> reads{0};
    const auto work = [&](unsigned seed) {
      Party party(&cache);
      std::mt19937 random(seed);
      std::deque<DmaMapping> held;
      for (long step = 0; step < Steps() / 4; ++step) {
        const uint64_t page = random() % (kWindow - 8) + (random() % 4 == 0 ? kSteady : 0);
        const PageRun run{page, 1 + random() % 8};
        auto use = party->map(RangeOf(run), static_cast<Direction>(random() % 3));
        if (use) held.push_back(std::move(*use));
        if (!held.empty()) {
          const DmaMapping& one = held[random() % held.size()];
          const MappedRun& first = one.runs().front();
          std::array<std::byte, 64> bytes;
          if (one.read(first.iova.start(), bytes)) {
            const uint64_t part = (first.address.value() - steady_address) / BytesIn(kWindow);
            const auto expected = std::byte(1 + part);
            ASSERT_TRUE(std::all_of(bytes.begin(), bytes.end(),
                                    [expected](std::byte byte) { return byte == expected; }));
            ++reads;
          }
        }
        if (held.size() > 12 || (!held.empty() && random() % 3 == 0)) held.pop_front();
        std::array<Iova, 5> pages;
        std::array<DmaAddr, 5> addresses;
        for (Iova& iova : pages) iova = Iova(BytesIn(random() % kWindow));
        if (auto epoch = party->map_pages(pages, Direction::kToDevice, addresses)) {
          if (random() % 4 == 0) std::this_thread::yield();
          ASSERT_THAT(party->unmap_pages(pages, Direction::kToDevice, *epoch), IsOk());
        }
      }
    };
    std::thread exchanger([&] {
      for (uint64_t part = 1; !stop; part ^= 1) {
        ASSERT_THAT(container.unmap(Iova(0), BytesIn(kWindow)), IsOk());
        ASSERT_THAT(map(0, part), IsOk());
        cache.recheck();
        std::this_thread::yield();
      }
    });
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < 3; ++i) threads.emplace_back(work, i + 1);
    for (std::thread& thread : threads) thread.join();
    stop = true;
    exchanger.join();
    EXPECT_GT(reads, 0u);
    EXPECT_LE(cache.counters().cached_pages, GetParam());
  }
  ASSERT_EQ((*domain)->counters().unique_pages, 0u);
  ASSERT_THAT(container.detach(domain->get()), IsOk());
}

INSTANTIATE_TEST_SUITE_P(IdlePages, DmaCacheThreadsTest, ::testing::Values(0, 40));

}  // namespace
}  // namespace mvgpu::dma
