// The domain against a naive reference: random maps, unmaps, pins and releases, compared after each
// step with a map from page to count. MVGPU_MODEL_STEPS sets the number of operations per seed
// (default 20000).

#include <gtest/gtest.h>

#include <cstdlib>
#include <map>
#include <optional>
#include <random>

#include "apionly-domain/api_only_domain.h"
#include "tests/fakes/fake_pin_backend.h"
#include "tests/fakes/guest_ram.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::domain {
namespace {

using testing::FakePinBackend;
using testing::GuestRam;
using testing::IsOk;
using testing::MakeRange;

constexpr uint64_t kIovaPages = 96;
constexpr uint64_t kFilePages = 64;

// A page of the reference: which file page the IOVA page is mapped to, and which mapping it belongs
// to.
struct ModelPage {
  uint64_t file_page;
  uint64_t mapping_first;
};

struct ModelPin {
  PageRun iova;
  PinnedRange handle;
};

class Model : public PinOwner {
 public:
  explicit Model(unsigned seed) : random_(seed) {
    auto domain =
        ApiOnlyDomain::Create({}, std::make_unique<FakePinBackend>(backend_), nullptr, nullptr);
    EXPECT_THAT(domain, IsOk());
    domain_ = std::move(*domain);
    EXPECT_THAT(container_.attach(domain_.get()), IsOk());
    context_ = domain_->open_context(this);
  }
  ~Model() override {
    pins_.clear();
    context_.reset();
    EXPECT_THAT(container_.detach(domain_.get()), IsOk());
    EXPECT_TRUE(backend_->pages.empty());
  }

  std::string_view pin_owner_name() const override { return "model"; }
  void on_revoke(IovaRange range) override {
    std::erase_if(pins_, [&](const ModelPin& pin) {
      return range.overlaps(MakeRange(BytesIn(pin.iova.first), BytesIn(pin.iova.count)));
    });
  }

  void Step() {
    switch (random_() % 8) {
      case 0:
      case 1:
        Map();
        break;
      case 2:
        Unmap();
        break;
      case 3:
      case 4:
      case 5:
        Pin();
        break;
      case 6:
        Release();
        break;
      case 7:
        ReleaseTail();
        break;
    }
    Compare();
  }

 private:
  PageRun RandomRun(uint64_t limit, uint64_t longest) {
    const uint64_t first = random_() % limit;
    return {first, 1 + random_() % std::min(longest, limit - first)};
  }

  void Map() {
    const PageRun iova = RandomRun(kIovaPages, 12);
    const uint64_t file_first = random_() % (kFilePages - 12);
    bool free = true;
    bool identical = pages_.contains(iova.first) && MappingAt(iova.first) == iova &&
                     pages_.at(iova.first).file_page == file_first;
    for (uint64_t p = iova.first; p < iova.end(); ++p) free = free && !pages_.contains(p);
    auto result = container_.map(
        ram_.map_request(BytesIn(iova.first), BytesIn(file_first), BytesIn(iova.count)));
    ASSERT_EQ(result.has_value(), free || identical);
    if (!free) return;
    for (uint64_t i = 0; i < iova.count; ++i) pages_[iova.first + i] = {file_first + i, iova.first};
  }

  PageRun MappingAt(uint64_t page) const {
    const uint64_t first = pages_.at(page).mapping_first;
    uint64_t end = page;
    while (pages_.contains(end) && pages_.at(end).mapping_first == first) ++end;
    return {first, end - first};
  }

  void Unmap() {
    const PageRun range = RandomRun(kIovaPages, 24);
    bool cuts = false;
    uint64_t bytes = 0;
    for (uint64_t p = range.first; p < range.end(); ++p) {
      if (!pages_.contains(p)) continue;
      const PageRun mapping = MappingAt(p);
      cuts = cuts || mapping.first < range.first || mapping.end() > range.end();
      bytes += kPageSize;
    }
    auto result = container_.unmap(Iova(BytesIn(range.first)), BytesIn(range.count));
    ASSERT_EQ(result.has_value(), !cuts);
    if (cuts) return;
    ASSERT_EQ(*result, bytes);
    for (uint64_t p = range.first; p < range.end(); ++p) pages_.erase(p);
  }

  void Pin() {
    const PageRun range = RandomRun(kIovaPages, 16);
    bool whole = true;
    for (uint64_t p = range.first; p < range.end(); ++p) whole = whole && pages_.contains(p);
    auto pin = context_->pin(MakeRange(BytesIn(range.first), BytesIn(range.count)), Access::kRead);
    ASSERT_EQ(pin.has_value(), whole);
    if (!whole) return;
    uint64_t page = range.first;
    for (const PinnedRun& run : pin->runs()) {
      ASSERT_EQ(run.iova.start().page(), page);
      for (uint64_t i = 0; i < run.iova_pages().count; ++i, ++page) {
        ASSERT_EQ(domain_->backing_of(run).pages.first + i, pages_.at(page).file_page);
      }
    }
    ASSERT_EQ(page, range.end());
    pins_.push_back({range, std::move(*pin)});
  }

  void Release() {
    if (pins_.empty()) return;
    const auto which = static_cast<std::ptrdiff_t>(random_() % pins_.size());
    pins_.erase(pins_.begin() + which);
  }

  void ReleaseTail() {
    if (pins_.empty()) return;
    ModelPin& pin = pins_[random_() % pins_.size()];
    if (pin.iova.count < 2) return;
    const uint64_t at = pin.iova.first + 1 + random_() % (pin.iova.count - 1);
    pin.handle.split_off(Iova(BytesIn(at))).reset();
    pin.iova.count = at - pin.iova.first;
  }

  void Compare() {
    std::map<uint64_t, uint64_t> counts;  // file page -> pins
    uint64_t total = 0;
    for (const ModelPin& pin : pins_) {
      for (uint64_t p = pin.iova.first; p < pin.iova.end(); ++p) ++counts[pages_.at(p).file_page];
      total += pin.iova.count;
    }
    const ApiOnlyDomain::Counters counters = domain_->counters();
    ASSERT_EQ(counters.mapped_pages, pages_.size());
    ASSERT_EQ(counters.pinned_pages, total);
    ASSERT_EQ(counters.unique_pages, counts.size());
    ASSERT_EQ(backend_->pages.size(), counts.size());
    for (const auto& [key, pins] : backend_->pages) {
      ASSERT_EQ(pins, 1);
      ASSERT_TRUE(counts.contains(key.second));
    }
  }

  std::mt19937 random_;
  GuestRam ram_{kFilePages * kPageSize};
  std::shared_ptr<FakePinBackend::State> backend_ = std::make_shared<FakePinBackend::State>();
  Container container_;
  std::unique_ptr<ApiOnlyDomain> domain_;
  std::unique_ptr<PinContext> context_;
  std::map<uint64_t, ModelPage> pages_;
  std::vector<ModelPin> pins_;
};

class ApiOnlyDomainModelTest : public ::testing::TestWithParam<unsigned> {};

TEST_P(ApiOnlyDomainModelTest, AgreesWithAMapOfPages) {
  const char* steps = std::getenv("MVGPU_MODEL_STEPS");
  const long count = steps != nullptr ? std::atol(steps) : 20000;
  Model model(GetParam());
  for (long step = 0; step < count; ++step) {
    ASSERT_NO_FATAL_FAILURE(model.Step()) << "seed " << GetParam() << " step " << step;
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, ApiOnlyDomainModelTest, ::testing::Range(1u, 9u));

}  // namespace
}  // namespace mvgpu::domain
