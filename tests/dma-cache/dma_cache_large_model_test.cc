// The cache against a naive reference where mappings are large: guest memory in blocks of more than
// 1024 pages, requests of 1, 512, 513 and more than 1024 pages beside batches of single pages,
// pages that the VMM cuts out of the middle of them, idle pages, a limit of pins that is met. Some
// batches come so often that their pages move into the table of recent holds, under handles that
// hold the same pages, and are released in later epochs.
//
// MVGPU_MODEL_STEPS: five times the operations per seed (default 3000).

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <set>
#include <vector>

#include "apionly-domain/assigned/software_iommu.h"
#include "dma-cache/iommu_mapper.h"
#include "tests/dma-cache/cache_reference.h"
#include "tests/dma-cache/dma_cache_fixture.h"

namespace mvgpu::dma {
namespace {

using namespace testing;

// Pages of the VMM's mappings, which lie side by side in guest memory and, as a rule, in the file:
// what is taken away is one of them, in the middle of what is held.
constexpr std::array<uint64_t, 5> kParts = {500, 12, 1, 511, 76};
constexpr uint64_t kBlockPages = 1100;
constexpr uint64_t kBlocks = 3;
constexpr uint64_t kPages = kBlocks * kBlockPages;
// Neither at the start of a granule nor in one chunk of the page table.
constexpr uint64_t kFirst = (uint64_t{1} << 18) - 1500;
constexpr uint64_t kFilePages = kPages + 600;
constexpr size_t kUsers = 3;
// As often as the table of recent holds may look away, twice: after that, what is mapped once more
// was looked at, entered, and found there.
constexpr int kOften = 2 * 64;

long Steps() {
  const char* steps = std::getenv("MVGPU_MODEL_STEPS");
  return (steps != nullptr ? std::atol(steps) : 3000) / 5;
}

enum class Device : uint8_t { kScattered, kTight, kJoined, kHost, kIommu };

struct Kind {
  unsigned seed;
  Device device;
  uint64_t idle_limit;
  uint64_t pin_limit;
};

struct Part {
  uint64_t first;  // page, from kFirst on
  uint64_t count;
  uint64_t file_page;  // where it belongs
};

struct Hold {
  size_t user;
  Direction direction;
  std::vector<uint64_t> pages;  // a range, or single pages in any order
  std::vector<bool> revoked;    // per entry
  DmaMapping handle;            // of a range
  uint64_t epoch = 0;           // of single pages
  bool often = false;           // whose pages were mapped again and again
};

using Reference = CacheReference<kPages, kUsers>;

class Model {
 public:
  explicit Model(const Kind& kind)
      : kind_(kind), random_(kind.seed), reference_(kind.idle_limit, kind.pin_limit) {
    domain::ApiOnlyDomain::Options options;
    options.pin_limit_pages = kind.pin_limit;
    auto domain = domain::ApiOnlyDomain::Create(options, std::make_unique<FakePinBackend>(pins_),
                                                nullptr, nullptr);
    EXPECT_THAT(domain, IsOk());
    domain_ = std::move(*domain);
    EXPECT_THAT(container_.attach(domain_.get()), IsOk());
    for (uint64_t page = 0; page < kFilePages; ++page) ram_.put(BytesIn(page), page);
    if (kind.device == Device::kIommu) {
      auto iommu = std::make_unique<domain::SoftwareIommu>();
      iommu_ = iommu.get();
      space_.emplace(std::move(iommu), domain::AssignedSpace::Options{});
      mapper_ = std::make_unique<IommuMapper>(&*space_);
    } else {
      auto counting = std::make_unique<CountingMapper>();
      counting_ = counting.get();
      counting->addresses = static_cast<CountingMapper::Addresses>(kind.device);
      mapper_ = std::move(counting);
    }
    cache_.emplace(domain_.get(), mapper_.get(), DmaCache::Options{kind.idle_limit});
    for (size_t i = 0; i < kUsers; ++i) users_.push_back(std::make_unique<Party>(&*cache_));
    for (uint64_t block = 0; block < kBlocks; ++block) {
      uint64_t first = block * kBlockPages;
      for (const uint64_t count : kParts) {
        parts_.push_back({first, count, first});
        first += count;
      }
    }
    for (const Part& part : parts_) MapPart(part, part.file_page);
  }
  ~Model() {
    while (!holds_.empty()) Release();
    users_.clear();
    cache_.reset();
    if (counting_ != nullptr) {
      EXPECT_EQ(counting_->mapped_pages(), 0u);
    }
    if (iommu_ != nullptr) {
      EXPECT_EQ(iommu_->counters().mappings, 0u);
    }
    EXPECT_THAT(container_.detach(domain_.get()), IsOk());
    EXPECT_TRUE(pins_->pages.empty());
  }

  void Step() {
    switch (random_() % 16) {
      case 0:
      case 1:
        ExchangePart();
        break;
      case 2:
      case 3:
      case 4:
      case 5:
        UseRange();
        break;
      case 6:
      case 7:
        UsePages();
        break;
      case 8:
      case 9:
        UseOften();
        break;
      default:
        if (holds_.size() > random_() % 20) Release();
        break;
    }
    if (!::testing::Test::HasFatalFailure()) Compare();
  }

  // How often the seed came across what it is for.
  struct Reached {
    int runs_held = 0;  // as runs, not in counters
    int runs_cut = 0;   // of them, in the middle
    int limits = 0;     // requests refused
    int not_contiguous = 0;
    int often = 0;  // batches that are hits of the table of recent holds
    int late = 0;   // releases of such pages in a later epoch
  };
  const Reached& reached() const { return reached_; }
  uint64_t evicted_pages() const { return reference_.evicted_pages(); }

 private:
  static Iova IovaOf(uint64_t page) { return Iova(BytesIn(kFirst + page)); }
  bool IsMapped(uint64_t page) const {
    return reference_.at(page).file_page != Reference::kUnmapped;
  }

  void MapPart(const Part& part, uint64_t file_page) {
    ASSERT_THAT(container_.map(ram_.map_request(IovaOf(part.first).value(), BytesIn(file_page),
                                                BytesIn(part.count))),
                IsOk());
    for (uint64_t i = 0; i < part.count; ++i) {
      reference_.set_file_page(part.first + i, file_page + i);
    }
  }

  // Takes a part away, or brings it: where it belongs, or somewhere else, where others may be too.
  void ExchangePart() {
    const Part& part = parts_[random_() % parts_.size()];
    if (!IsMapped(part.first)) {
      const bool at_home = random_() % 4 != 0;
      MapPart(part, at_home ? part.file_page : random_() % (kFilePages - part.count));
      return;
    }
    if (random_() % 2 == 0) return;
    std::vector<size_t> told(kUsers, 0);
    for (Hold& hold : holds_) {
      const uint64_t longest = domain::PinCounts::kLargestDense;
      const bool as_run = !hold.handle.empty() && hold.pages.size() > longest;
      for (size_t i = 0; i < hold.pages.size(); ++i) {
        if (!PageRun{part.first, part.count}.contains(hold.pages[i]) || hold.revoked[i]) continue;
        hold.revoked[i] = true;
        told[hold.user] = 1;
        if (as_run && i != 0 && hold.pages[i] == part.first && i + part.count < hold.pages.size()) {
          ++reached_.runs_cut;
        }
      }
    }
    for (size_t u = 0; u < kUsers; ++u) told[u] += users_[u]->told.size();
    ASSERT_THAT(container_.unmap(IovaOf(part.first), BytesIn(part.count)), IsOk());
    for (size_t u = 0; u < kUsers; ++u) ASSERT_EQ(users_[u]->told.size(), told[u]) << u;
    for (uint64_t page = part.first; page < part.first + part.count; ++page) {
      reference_.revoke(page);
      reference_.set_file_page(page, Reference::kUnmapped);
    }
  }

  uint64_t AnyCount() {
    constexpr std::array<uint64_t, 8> kCounts = {1, 2, 64, 511, 512, 513, 1024, 1500};
    const uint64_t count = kCounts[random_() % kCounts.size()];
    return random_() % 4 == 0 ? count + random_() % 70 : count;
  }
  Direction AnyDirection() { return static_cast<Direction>(random_() % 3); }

  void UseRange() {
    const uint64_t count = AnyCount();
    const PageRun run{random_() % (kPages - count), count};
    Hold hold{random_() % kUsers, AnyDirection(), {}, std::vector<bool>(count, false), {}, 0};
    for (uint64_t page = run.first; page < run.end(); ++page) hold.pages.push_back(page);
    const bool contiguous = random_() % 3 == 0;
    const bool one_stretch = IsOneStretch(run);
    const bool surely_contiguous = NothingIsCached(run) && (IsOneRun(run) || JoinsRuns());
    const auto range = RangeOf({kFirst + run.first, run.count});
    DmaUser& user = *users_[hold.user]->operator->();
    auto use =
        contiguous ? user.map_contiguous(range, hold.direction) : user.map(range, hold.direction);
    if (contiguous && !one_stretch) {
      ASSERT_THAT(use, FailsWith(ErrorCode::kNotContiguous));
      ++reached_.not_contiguous;
      return;
    }
    const bool for_write = IsForWrite(hold.direction);
    const std::vector<uint64_t> missed = NotHeld(hold.user, hold.pages, for_write);
    std::vector<uint64_t> were_idle;
    std::vector<uint64_t> gaps;
    for (const uint64_t page : missed) {
      if (reference_.at(page).idle != 0) were_idle.push_back(page);
      if (!reference_.at(page).is_cached()) gaps.push_back(page);
    }
    const auto failed = reference_.try_make_cached(missed);
    ASSERT_NO_FATAL_FAILURE(CompareOutcome(use, failed, contiguous && !surely_contiguous));
    if (!use) {
      if (failed) return;
      ++reached_.not_contiguous;  // as the mapper would have it
      for (const uint64_t page : gaps) reference_.drop(page);
      reference_.take_idle_again(were_idle);
      return;
    }
    if (contiguous) {
      ASSERT_EQ(use->runs().size(), 1u);
    }
    if (count > domain::PinCounts::kLargestDense) ++reached_.runs_held;
    for (const uint64_t page : hold.pages) reference_.hold(hold.user, page, for_write);
    hold.handle = std::move(*use);
    holds_.push_back(std::move(hold));
  }

  template <typename T>
  void CompareOutcome(const Result<T>& use, std::optional<ErrorCode> failed, bool may_scatter) {
    if (use) {
      ASSERT_FALSE(failed.has_value()) << ErrorCodeName(*failed);
    } else if (failed) {
      ASSERT_EQ(use.error().code(), *failed) << use.error().message();
      if (*failed == ErrorCode::kLimit) ++reached_.limits;
    } else {
      ASSERT_TRUE(may_scatter) << use.error().message();
      ASSERT_EQ(use.error().code(), ErrorCode::kNotContiguous);
    }
  }

  // In ascending order, each once.
  std::vector<uint64_t> NotHeld(size_t user, const std::vector<uint64_t>& pages, bool for_write) {
    std::set<uint64_t> missed;
    for (const uint64_t page : pages) {
      if (reference_.at(page).holds[user][for_write ? 1 : 0] == 0) missed.insert(page);
    }
    return {missed.begin(), missed.end()};
  }
  // Whether the cached ones among them have one offset to their device addresses.
  bool IsOneStretch(PageRun run) const {
    std::optional<uint64_t> offset;
    for (uint64_t page = run.first; page < run.end(); ++page) {
      if (!reference_.at(page).is_cached()) continue;
      const uint64_t here = cache_->address_of(IovaOf(page))->page() - page;
      if (offset.value_or(here) != here) return false;
      offset = here;
    }
    return true;
  }
  bool NothingIsCached(PageRun run) const {
    for (uint64_t page = run.first; page < run.end(); ++page) {
      if (reference_.at(page).is_cached()) return false;
    }
    return true;
  }
  bool IsOneRun(PageRun run) const {
    for (uint64_t i = 1; i < run.count; ++i) {
      const uint64_t before = reference_.at(run.first + i - 1).file_page;
      if (reference_.at(run.first + i).file_page != before + 1) return false;
    }
    return true;
  }
  bool JoinsRuns() const {
    return kind_.device == Device::kJoined || kind_.device == Device::kIommu;
  }

  std::vector<uint64_t> AnyPages(size_t most) {
    const size_t count = 1 + random_() % most;
    std::vector<uint64_t> pages;
    const uint64_t near = random_() % (kPages - 64);  // some lie close to each other, some twice
    while (pages.size() < count) {
      const bool follows = !pages.empty() && random_() % 3 == 0 && pages.back() + 1 < kPages;
      pages.push_back(follows ? pages.back() + 1
                              : (random_() % 2 == 0 ? near + random_() % 64 : random_() % kPages));
    }
    return pages;
  }

  // False where it was refused, as it had to be.
  void MapPages(Hold* hold, bool* held) {
    *held = false;
    const bool for_write = IsForWrite(hold->direction);
    std::vector<Iova> iovas;
    for (const uint64_t page : hold->pages) iovas.push_back(IovaOf(page) + page % kPageSize);
    std::vector<DmaAddr> addresses(iovas.size());
    const auto epoch = (*users_[hold->user])->map_pages(iovas, hold->direction, addresses);
    std::optional<ErrorCode> failed;
    size_t done = 0;
    for (; done < hold->pages.size() && !failed; done += DmaUser::kBatch) {
      const std::vector<uint64_t> batch = BatchOf(*hold, done);
      failed = reference_.try_make_cached(NotHeld(hold->user, batch, for_write));
      if (failed) break;
      for (const uint64_t page : batch) reference_.hold(hold->user, page, for_write);
    }
    ASSERT_NO_FATAL_FAILURE(CompareOutcome(epoch, failed, false));
    if (!epoch) {
      for (size_t first = 0; first < done; first += DmaUser::kBatch) {
        reference_.release(hold->user, BatchOf(*hold, first), for_write);
      }
      return;
    }
    for (size_t i = 0; i < iovas.size(); ++i) {
      ASSERT_EQ(cache_->address_of(iovas[i]), addresses[i]);
    }
    hold->epoch = *epoch;
    *held = true;
  }
  static std::vector<uint64_t> BatchOf(const Hold& hold, size_t first) {
    const auto at = [&](size_t i) {
      return hold.pages.begin() + static_cast<std::ptrdiff_t>(std::min(i, hold.pages.size()));
    };
    return {at(first), at(first + DmaUser::kBatch)};
  }

  void UsePages() {
    Hold hold{random_() % kUsers, AnyDirection(), AnyPages(150), {}, {}, 0};
    hold.revoked.assign(hold.pages.size(), false);
    bool held = false;
    ASSERT_NO_FATAL_FAILURE(MapPages(&hold, &held));
    if (held) holds_.push_back(std::move(hold));
  }

  // The same few pages again and again. Of all these holds some go at once, others stay for later,
  // so that what the table counts is more than one and less than all.
  void UseOften() {
    const size_t user = random_() % kUsers;
    const Direction direction = AnyDirection();
    if (hot_.empty() || random_() % 4 == 0) hot_ = AnyPages(12);
    const int times = random_() % 2 == 0 ? kOften + 4 : 3;
    for (int i = 0; i < times; ++i) {
      Hold hold{user, direction, hot_, std::vector<bool>(hot_.size(), false), {}, 0};
      bool held = false;
      ASSERT_NO_FATAL_FAILURE(MapPages(&hold, &held));
      if (!held) return;
      if (i > kOften) ++reached_.often;
      hold.often = i > kOften;
      if (i == 0 || i + 2 >= times) {
        holds_.push_back(std::move(hold));
      } else {
        ASSERT_NO_FATAL_FAILURE(LetGo(std::move(hold)));
      }
    }
  }

  void Release() {
    if (holds_.empty()) return;
    const auto at = holds_.begin() + static_cast<std::ptrdiff_t>(random_() % holds_.size());
    Hold hold = std::move(*at);
    holds_.erase(at);
    LetGo(std::move(hold));
  }
  void LetGo(Hold hold) {
    const bool for_write = IsForWrite(hold.direction);
    if (!hold.handle.empty()) {
      hold.handle.reset();
      reference_.release(hold.user, RealOnes(hold.pages, hold.revoked), for_write);
      return;
    }
    const bool late =
        std::find(hold.revoked.begin(), hold.revoked.end(), true) != hold.revoked.end();
    if (late && hold.often) ++reached_.late;
    std::vector<Iova> iovas;
    for (const uint64_t page : hold.pages) iovas.push_back(IovaOf(page));
    ASSERT_THAT((*users_[hold.user])->unmap_pages(iovas, hold.direction, hold.epoch), IsOk());
    for (size_t first = 0; first < hold.pages.size(); first += DmaUser::kBatch) {
      const size_t end = std::min(first + DmaUser::kBatch, hold.pages.size());
      std::vector<uint64_t> real;
      for (size_t i = first; i < end; ++i) {
        if (!hold.revoked[i]) real.push_back(hold.pages[i]);
      }
      reference_.release(hold.user, real, for_write);
    }
  }
  static std::vector<uint64_t> RealOnes(const std::vector<uint64_t>& pages,
                                        const std::vector<bool>& revoked) {
    std::vector<uint64_t> real;
    for (size_t i = 0; i < pages.size(); ++i) {
      if (!revoked[i]) real.push_back(pages[i]);
    }
    return real;
  }

  void Compare() {
    for (const Hold& hold : holds_) {
      if (hold.handle.empty()) continue;
      const bool valid =
          std::find(hold.revoked.begin(), hold.revoked.end(), true) == hold.revoked.end();
      ASSERT_EQ(hold.handle.is_valid(), valid);
      ASSERT_NO_FATAL_FAILURE(CompareAddresses(hold));
    }
    const DmaCache::Counters counters = cache_->counters();
    std::map<uint64_t, uint64_t> shown;  // device page -> page
    uint64_t cached = 0;
    for (uint64_t page = 0; page < kPages; ++page) {
      const auto address = cache_->address_of(IovaOf(page));
      ASSERT_EQ(address.has_value(), reference_.at(page).is_cached()) << page;
      if (!address) continue;
      ++cached;
      shown.emplace(address->page(), page);
      ASSERT_NO_FATAL_FAILURE(CompareDevice(page, *address));
    }
    ASSERT_EQ(counters.cached_pages, cached);
    ASSERT_EQ(counters.idle_pages, reference_.idle_pages());
    ASSERT_EQ(counters.miss_pages - counters.unmapped_pages, cached);
    ASSERT_EQ(counters.evicted_pages, reference_.evicted_pages());
    ASSERT_EQ(pins_->pages.size(), reference_.pinned_pages());
    ASSERT_EQ(domain_->counters().unique_pages, reference_.pinned_pages());
    if (counting_ != nullptr) {
      ASSERT_EQ(counting_->mapped_pages(), cached);
    }
    ASSERT_NO_FATAL_FAILURE(CompareReach(shown));
    ASSERT_NO_FATAL_FAILURE(CompareReverse(shown));
  }

  void CompareAddresses(const Hold& hold) {
    uint64_t next = hold.pages.front();
    for (const MappedRun& run : hold.handle.runs()) {
      ASSERT_EQ(run.iova.start(), IovaOf(next));
      const uint64_t count = PagesIn(run.iova.size());
      // Both ends, and some page between them.
      for (const uint64_t i : {uint64_t{0}, random_() % count, count - 1}) {
        if (hold.revoked[next + i - hold.pages.front()]) continue;
        ASSERT_EQ(cache_->address_of(IovaOf(next + i)), run.address + BytesIn(i));
      }
      next += count;
    }
    ASSERT_EQ(next, hold.pages.back() + 1);
  }

  // The device reaches the page's memory, or the mapper gave this address for it.
  void CompareDevice(uint64_t page, DmaAddr address) {
    if (iommu_ == nullptr) {
      if (kind_.device == Device::kHost) return;
      ASSERT_EQ(counting_->iova_page_at(address), kFirst + page);
      return;
    }
    const std::byte* seen = iommu_->translate(Iova(address.value()), domain::Access::kWrite);
    ASSERT_NE(seen, nullptr) << page;
    uint64_t file_page = 0;
    std::memcpy(&file_page, seen, sizeof(file_page));
    ASSERT_EQ(file_page, reference_.at(page).file_page) << page;
  }

  // What went since the last look is out of reach.
  void CompareReach(const std::map<uint64_t, uint64_t>& shown) {
    if (iommu_ == nullptr) return;
    for (const auto& [device, page] : shown_) {
      if (shown.contains(device)) continue;
      ASSERT_EQ(iommu_->translate(Iova(BytesIn(device)), domain::Access::kRead), nullptr) << page;
      ASSERT_TRUE(cache_->iovas_of(DmaAddr(BytesIn(device))).empty());
    }
    shown_ = shown;
  }

  // Some of them each time.
  void CompareReverse(const std::map<uint64_t, uint64_t>& shown) {
    uint64_t next = random_() % 97;
    for (const auto& [device, page] : shown) {
      if (next-- != 0) continue;
      next = 96;
      std::set<uint64_t> found;
      for (const Iova iova : cache_->iovas_of(DmaAddr(BytesIn(device)))) {
        found.insert(iova.page() - kFirst);
        ASSERT_EQ(cache_->address_of(iova), DmaAddr(BytesIn(device)));
      }
      ASSERT_TRUE(found.contains(page));
      if (kind_.device == Device::kHost) continue;
      ASSERT_EQ(found.size(), 1u);
    }
  }

  const Kind kind_;
  std::mt19937 random_;
  GuestRam ram_{kFilePages * kPageSize};
  std::shared_ptr<FakePinBackend::State> pins_ = std::make_shared<FakePinBackend::State>();
  domain::Container container_;
  std::unique_ptr<domain::ApiOnlyDomain> domain_;
  domain::SoftwareIommu* iommu_ = nullptr;  // of space_, where there is one
  std::optional<domain::AssignedSpace> space_;
  std::unique_ptr<Mapper> mapper_;
  CountingMapper* counting_ = nullptr;  // the mapper, where there is no IOMMU
  std::optional<DmaCache> cache_;
  std::vector<std::unique_ptr<Party>> users_;
  std::vector<Part> parts_;
  Reference reference_;
  std::vector<Hold> holds_;
  std::vector<uint64_t> hot_;
  std::map<uint64_t, uint64_t> shown_;  // device page -> page, at the last look
  Reached reached_;
};

class DmaCacheLargeModelTest : public ::testing::TestWithParam<Kind> {};

TEST_P(DmaCacheLargeModelTest, AgreesWithANaiveReference) {
  const auto model = std::make_unique<Model>(GetParam());
  for (long step = 0; step < Steps(); ++step) {
    ASSERT_NO_FATAL_FAILURE(model->Step()) << "seed " << GetParam().seed << " step " << step;
  }
  if (Steps() < 600) return;  // too few to come across everything
  EXPECT_GT(model->reached().runs_held, 0);
  EXPECT_GT(model->reached().often, 0);
  EXPECT_GT(model->reached().late, 0);
  if (GetParam().idle_limit != 0) {
    EXPECT_GT(model->evicted_pages(), 0u);
  }
  if (GetParam().pin_limit < kPages) {
    EXPECT_GT(model->reached().limits, 0);
  }
  EXPECT_GT(model->reached().not_contiguous, 0);
  if (GetParam().pin_limit == UINT64_MAX) {
    EXPECT_GT(model->reached().runs_cut, 0);
  }
}

std::vector<Kind> Kinds() {
  std::vector<Kind> kinds;
  const auto add = [&kinds](Device device, uint64_t idle, uint64_t pins) {
    kinds.push_back({static_cast<unsigned>(kinds.size()) + 1, device, idle, pins});
  };
  add(Device::kScattered, 0, UINT64_MAX);
  add(Device::kTight, 700, 1400);
  add(Device::kJoined, 3, UINT64_MAX);
  add(Device::kHost, 700, 1400);
  add(Device::kIommu, 0, 1400);
  add(Device::kIommu, 700, UINT64_MAX);
  return kinds;
}

INSTANTIATE_TEST_SUITE_P(Seeds, DmaCacheLargeModelTest, ::testing::ValuesIn(Kinds()),
                         [](const auto& kind) { return "Seed" + std::to_string(kind.param.seed); });

}  // namespace
}  // namespace mvgpu::dma
