// The cache against a naive reference: random uses, releases, unmaps and re-maps; after each step
// every page's users, the mapper's pages and the pins agree. MVGPU_MODEL_STEPS: operations per seed
// (default 30000).

#include <gtest/gtest.h>

#include <cstdlib>
#include <map>
#include <random>
#include <vector>

#include "dma-cache/dma_cache.h"
#include "tests/fakes/counting_mapper.h"
#include "tests/fakes/fake_pin_backend.h"
#include "tests/fakes/guest_ram.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::dma {
namespace {

using testing::CountingMapper;
using testing::FakePinBackend;
using testing::GuestRam;
using testing::IsOk;
using testing::MakeRange;

constexpr uint64_t kBlocks = 12;  // mappings of the VMM, each kBlockPages long
constexpr uint64_t kBlockPages = 8;
constexpr uint64_t kPages = kBlocks * kBlockPages;

struct ModelUse {
  PageRun pages;
  std::vector<bool> revoked;  // per page
  DmaMapping handle;
};

class Model {
 public:
  explicit Model(unsigned seed) : random_(seed) {
    auto domain = domain::ApiOnlyDomain::Create({}, std::make_unique<FakePinBackend>(pins_),
                                                nullptr, nullptr);
    EXPECT_THAT(domain, IsOk());
    domain_ = std::move(*domain);
    EXPECT_THAT(container_.attach(domain_.get()), IsOk());
    cache_ = std::make_unique<DmaCache>(domain_.get(), &mapper_);
  }
  ~Model() {
    uses_.clear();
    cache_.reset();
    EXPECT_EQ(mapper_.mapped_pages(), 0u);
    EXPECT_THAT(container_.detach(domain_.get()), IsOk());
    EXPECT_TRUE(pins_->pages.empty());
  }

  void Step() {
    switch (random_() % 8) {
      case 0:
        MapBlock();
        break;
      case 1:
        UnmapBlock();
        break;
      case 2:
      case 3:
      case 4:
        Use();
        break;
      default:
        Release();
        break;
    }
    Compare();
  }

 private:
  void MapBlock() {
    const uint64_t block = random_() % kBlocks;
    if (mapped_[block]) return;
    // Half of the blocks continue their neighbour in the file, so that runs cross mappings.
    const uint64_t file_page = random_() % 2 == 0 ? block * kBlockPages : random_() % kPages;
    ASSERT_THAT(container_.map(ram_.map_request(BytesIn(block * kBlockPages), BytesIn(file_page),
                                                BytesIn(kBlockPages))),
                IsOk());
    mapped_[block] = true;
    file_page_[block] = file_page;
  }

  void UnmapBlock() {
    const uint64_t block = random_() % kBlocks;
    const uint64_t first = block * kBlockPages;
    ASSERT_THAT(container_.unmap(Iova(BytesIn(first)), BytesIn(kBlockPages)), IsOk());
    mapped_[block] = false;
    for (ModelUse& use : uses_) {
      for (uint64_t p = 0; p < use.pages.count; ++p) {
        const uint64_t page = use.pages.first + p;
        if (page >= first && page < first + kBlockPages) use.revoked[p] = true;
      }
    }
  }

  void Use() {
    const uint64_t first = random_() % kPages;
    const PageRun pages{first, 1 + random_() % std::min<uint64_t>(20, kPages - first)};
    bool whole = true;
    for (uint64_t p = pages.first; p < pages.end(); ++p) whole = whole && mapped_[p / kBlockPages];
    const bool fault_armed = random_() % 10 == 0;
    if (fault_armed) mapper_.fail_at_call = 1 + random_() % 2;
    auto use =
        cache_->map(MakeRange(BytesIn(pages.first), BytesIn(pages.count)), Direction::kToDevice);
    const bool fault_hit = fault_armed && mapper_.fail_at_call == 0;
    ASSERT_EQ(use.has_value(), whole && !fault_hit);
    mapper_.fail_at_call = 0;
    if (use) uses_.push_back({pages, std::vector<bool>(pages.count, false), std::move(*use)});
  }

  void Release() {
    if (uses_.empty()) return;
    uses_.erase(uses_.begin() + static_cast<std::ptrdiff_t>(random_() % uses_.size()));
  }

  void Compare() {
    std::map<uint64_t, uint64_t> users;  // IOVA page -> live uses
    std::map<uint64_t, bool> backing;
    for (const ModelUse& use : uses_) {
      bool valid = true;
      for (uint64_t p = 0; p < use.pages.count; ++p) {
        const uint64_t page = use.pages.first + p;
        if (use.revoked[p]) {
          valid = false;
        } else {
          ++users[page];
          backing[file_page_[page / kBlockPages] + page % kBlockPages] = true;
        }
      }
      ASSERT_EQ(use.handle.is_valid(), valid);
      ASSERT_NO_FATAL_FAILURE(CompareAddresses(use));
    }
    ASSERT_EQ(cache_->counters().cached_pages, users.size());
    ASSERT_EQ(mapper_.mapped_pages(), users.size());
    ASSERT_EQ(pins_->pages.size(), backing.size());
    ASSERT_EQ(cache_->counters().miss_pages - cache_->counters().unmapped_pages, users.size());
  }

  void CompareAddresses(const ModelUse& use) {
    for (const DmaRun& run : use.handle.runs()) {
      for (uint64_t i = 0; i < PagesIn(run.iova.size()); ++i) {
        const uint64_t page = run.iova.start().page() + i;
        if (use.revoked[page - use.pages.first]) continue;
        ASSERT_EQ(mapper_.iova_page_at(run.address + BytesIn(i)), page);
      }
    }
  }

  std::mt19937 random_;
  GuestRam ram_{2 * kPages * kPageSize};
  std::shared_ptr<FakePinBackend::State> pins_ = std::make_shared<FakePinBackend::State>();
  domain::Container container_;
  std::unique_ptr<domain::ApiOnlyDomain> domain_;
  CountingMapper mapper_;
  std::unique_ptr<DmaCache> cache_;
  std::map<uint64_t, bool> mapped_;
  std::map<uint64_t, uint64_t> file_page_;
  std::vector<ModelUse> uses_;
};

class DmaCacheModelTest : public ::testing::TestWithParam<unsigned> {};

TEST_P(DmaCacheModelTest, AgreesWithACountPerPage) {
  const char* steps = std::getenv("MVGPU_MODEL_STEPS");
  const long count = steps != nullptr ? std::atol(steps) : 30000;
  Model model(GetParam());
  for (long step = 0; step < count; ++step) {
    ASSERT_NO_FATAL_FAILURE(model.Step()) << "seed " << GetParam() << " step " << step;
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, DmaCacheModelTest, ::testing::Range(1u, 9u));

}  // namespace
}  // namespace mvgpu::dma
