#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "tests/bench/bench_cache.h"
#include "tests/bench/cache_table.h"
#include "tests/bench/own_memory.h"

namespace mvgpu::bench {

namespace {

constexpr auto kDirection = dma::Direction::kBidirectional;
constexpr auto kAccess = domain::Access::kReadWrite;

// A cache in which nothing is, and beside it what a miss cannot do without: the same pins and calls
// of the mapper.
struct Empty final : dma::DmaUser::Owner {
  Empty(const Settings& settings, std::unique_ptr<dma::Mapper> with)
      : guest(Layout::OneMapping(settings.memory), domain::MakeNonePinBackend()),
        mapper(std::move(with)),
        cache(&guest.domain(), mapper.get()),
        user(cache.open_user(this)),
        context(guest.open_context()) {}
  void on_revoke(IovaRange) override {}

  // What a batch of misses and their releases cannot do without, in the order in which they do it.
  void pin_and_map(std::span<const PageRun> wanted) {
    mapped.clear();
    auto pin = context->pin_misses(wanted, kAccess);
    MVGPU_CHECK(pin.has_value());
    MVGPU_CHECK(mapper->map_apart(pin->runs(), kAccess, &mapped).has_value());
    for (const dma::MappedRun& run : mapped) mapper->unmap(run.address, run.iova.size());
    mapper->flush();
    context->release_last(wanted, kAccess, pin->keep());
  }

  Guest guest;
  std::unique_ptr<dma::Mapper> mapper;
  dma::DmaCache cache;
  std::unique_ptr<dma::DmaUser> user;
  std::unique_ptr<domain::PinContext> context;
  std::vector<PageRun> runs;
  std::vector<dma::MappedRun> mapped;
};

// The median of the rounds' differences between two sides.
double Beyond(const Settings& settings, const Side& ours, const Side& bare) {
  std::vector<double> differences;
  for (uint64_t round = 0; round <= settings.repetitions; ++round) {
    const double difference = ours(round) - bare(round);
    if (round != 0) differences.push_back(difference);
  }
  std::sort(differences.begin(), differences.end());
  return differences[differences.size() / 2];
}

// What the pins of a batch ask for is in order already.
PageSlices SortedInBatches(const PageSlices& pages) {
  std::vector<Iova> sorted(pages.all().begin(), pages.all().end());
  for (auto first = sorted.begin(); first != sorted.end(); first += kBatch) {
    std::sort(first, first + kBatch);
  }
  return {std::move(sorted), pages.per_round()};
}

Result<double> ScatteredMiss(const Settings& settings) {
  Empty empty(settings, std::make_unique<ScatteringMapper>(PagesIn(settings.memory)));
  const PageSlices pages(empty.guest.pages().random(settings.work(256 << 10), /*seed=*/1),
                         settings.work(64 << 10));
  const PageSlices sorted = SortedInBatches(pages);
  const auto ours = Timed(pages.per_round(), [&](uint64_t round) {
    pages.for_each_batch(round, kBatch, [&](auto batch) {
      std::array<DmaAddr, kBatch> addresses;
      const auto epoch = empty.user->map_pages(batch, kDirection, addresses);
      MVGPU_CHECK(epoch && empty.user->unmap_pages(batch, kDirection, *epoch));
    });
  });
  const auto bare = Timed(pages.per_round(), [&](uint64_t round) {
    sorted.for_each_batch(round, kBatch, [&](auto batch) {
      empty.runs.clear();
      for (const Iova page : batch) {
        empty.context->prefetch(page, kAccess);
        if (empty.runs.empty() || empty.runs.back().first != page.page()) {
          empty.runs.push_back({page.page(), 1});
        }
      }
      empty.pin_and_map(empty.runs);
    });
  });
  return Beyond(settings, ours, bare);
}

Result<double> RunMiss(const Settings& settings) {
  Empty empty(settings, dma::MakeNoneMapper());
  constexpr uint64_t kRun = 512;
  const uint64_t runs = settings.work(16 << 10);
  const uint64_t granules = empty.guest.pages().count() / kRun;
  const auto range_of = [granules](uint64_t round, uint64_t i) {
    const uint64_t granule = (round * 7919 + i * 104729) % granules;
    return *IovaRange::FromStartAndSize(Iova(BytesIn(granule * kRun)), BytesIn(kRun));
  };
  const auto ours = Timed(runs * kRun, [&](uint64_t round) {
    for (uint64_t i = 0; i < runs; ++i) {
      MVGPU_CHECK(empty.user->map_contiguous(range_of(round, i), kDirection).has_value());
    }
  });
  const auto bare = Timed(runs * kRun, [&](uint64_t round) {
    for (uint64_t i = 0; i < runs; ++i) {
      const PageRun run = PagesOf(range_of(round, i));
      empty.pin_and_map({&run, 1});
    }
  });
  return Beyond(settings, ours, bare);
}

// Private memory that the kernel provided for all of the guest's pages in the cache, by page.
template <typename Hold, typename LetGo>
double BytesPerPage(Empty* empty, const Hold& hold, const LetGo& let_go) {
  SettleHeap();
  const double before = OwnMemory::Now().touched;
  hold();
  const double after = OwnMemory::Now().touched;
  let_go();
  return (after - before) / static_cast<double>(empty->guest.pages().count());
}

Result<double> ScatteredBytes(const Settings& settings) {
  Empty empty(settings, std::make_unique<ScatteringMapper>(PagesIn(settings.memory)));
  const auto for_all = [&](auto visit) {
    const GuestPages pages = empty.guest.pages();
    std::array<Iova, kBatch> batch;
    for (uint64_t page = 0; page < pages.count(); page += kBatch) {
      for (size_t i = 0; i < kBatch; ++i) batch[i] = pages.iova(page + i);
      visit(batch);
    }
  };
  return BytesPerPage(
      &empty,
      [&] {
        for_all([&](const auto& batch) {
          std::array<DmaAddr, kBatch> addresses;
          MVGPU_CHECK(empty.user->map_pages(batch, kDirection, addresses).has_value());
        });
      },
      [&] {
        for_all([&](const auto& batch) {
          MVGPU_CHECK(empty.user->unmap_pages(batch, kDirection, 0).has_value());
        });
      });
}

Result<double> LinearBytes(const Settings& settings) {
  Empty empty(settings, dma::MakeNoneMapper());
  dma::DmaMapping all;
  const auto range = *IovaRange::FromStartAndSize(Iova(0), settings.memory);
  return BytesPerPage(
      &empty, [&] { all = *empty.user->map_contiguous(range, kDirection); }, [&] { all.reset(); });
}

}  // namespace

void MeasureCacheMisses(Table* table) {
  const Settings& settings = table->settings();
  constexpr char kBare[] = "map + unmap, less the same pins and mapper calls";
  table->measure("miss, page by page, for each page", "ns", kBare, Target::AtMost(100),
                 [&] { return ScatteredMiss(settings); });
  table->measure("miss, 2 MiB, for each page", "ns", kBare, Target::AtMost(2),
                 [&] { return RunMiss(settings); });
  constexpr char kHow[] = "private memory of the process, before and after";
  table->measure("memory per cached page, scattered device addresses", "bytes", kHow,
                 Target::AtMost(12), [&] { return ScatteredBytes(settings); });
  table->measure("memory per cached page, one run", "bytes", kHow, Target::AtMost(0.1),
                 [&] { return LinearBytes(settings); });
}

}  // namespace mvgpu::bench
