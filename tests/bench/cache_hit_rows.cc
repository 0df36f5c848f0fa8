#include <fmt/format.h>

#include <array>
#include <utility>

#include "tests/bench/baselines/dma_entries.h"
#include "tests/bench/bench_cache.h"
#include "tests/bench/cache_table.h"
#include "tests/bench/two_threads.h"

namespace mvgpu::bench {

namespace {

using Device = CachedGuest::Device;
constexpr auto kDirection = dma::Direction::kBidirectional;
constexpr char kFlat[] = "plain ++ and -- on flat 8-byte entries";
constexpr size_t kHotPages = 4096;

struct Subject {
  Subject(const Settings& settings, Device device)
      : cached(settings, device, kThreads),
        flat(cached.guest().iova_pages()),
        cold(cached.guest().pages().random(settings.work(4 << 20), /*seed=*/1),
             settings.work(512 << 10)),
        hot(HotPages(settings)),
        few(FewPages(settings)),
        halves{Half(settings, 0), Half(settings, 1)} {}

  PageSlices HotPages(const Settings& settings) {
    const std::vector<Iova> chosen = cached.guest().pages().random(kHotPages, /*seed=*/2);
    std::vector<Iova> pages;
    uint64_t next = 0;
    for (uint64_t i = 0; i < settings.work(1 << 20); ++i) {
      next = next * 6364136223846793005u + 1442695040888963407u;
      pages.push_back(chosen[next >> 52]);
    }
    return {std::move(pages), settings.work(512 << 10)};
  }
  PageSlices FewPages(const Settings& settings) {
    return {cached.guest().pages().random(settings.work(512 << 10), /*seed=*/3),
            settings.work(16 << 10)};
  }
  PageSlices Half(const Settings& settings, uint64_t half) {
    const uint64_t count = cached.guest().pages().count() / kThreads;
    std::vector<Iova> chosen = GuestPages(count, Layout{}).random(settings.work(2 << 20), half + 1);
    for (Iova& page : chosen) page = Iova(page.value() + half * BytesIn(count));
    return {std::move(chosen), settings.work(512 << 10)};
  }

  CachedGuest cached;
  FlatEntries flat;
  PageSlices cold;
  PageSlices hot;
  PageSlices few;  // for what is slow
  std::array<PageSlices, kThreads> halves;
};

void MapAndUnmap(dma::DmaUser* user, std::span<const Iova> pages) {
  std::array<DmaAddr, kBatch> addresses;
  const auto epoch = user->map_pages(pages, kDirection, addresses);
  MVGPU_CHECK(epoch && user->unmap_pages(pages, kDirection, *epoch));
  Keep(addresses[0].value());
}

Side OurBatches(dma::DmaUser* user, const PageSlices* pages) {
  return Timed(pages->per_round(), [user, pages](uint64_t round) {
    pages->for_each_batch(round, kBatch, [user](auto batch) { MapAndUnmap(user, batch); });
  });
}

template <typename Entries>
Side EntryBatches(const std::shared_ptr<Entries>& entries, const PageSlices* pages) {
  return Timed(pages->per_round(), [entries, pages](uint64_t round) {
    pages->for_each_batch(round, kBatch, [&entries](auto batch) {
      std::array<DmaAddr, kBatch> addresses;
      entries->map(batch, addresses);
      entries->unmap(batch, addresses);
      Keep(addresses[0].value());
    });
  });
}

std::shared_ptr<FlatEntries> Shared(FlatEntries* entries) {
  return {entries, [](FlatEntries*) {}};
}

Side OurThreads(Subject* subject, const PageSlices& first, const PageSlices& second, size_t count) {
  return [subject, slices = std::array{&first, &second}, count](uint64_t round) {
    return Together(count, count * slices[0]->per_round(), [&](size_t thread) {
      slices[thread]->for_each_batch(
          round, kBatch, [&](auto batch) { MapAndUnmap(&subject->cached.user(thread), batch); });
    });
  };
}

void MeasureBatches(Table* table, std::string_view device, Lazy<Subject>* lazy) {
  const auto row = [&](std::string_view pages_name, PageSlices Subject::*pages, Target target) {
    table->compare(
        fmt::format("map + unmap, batch of 64, {}, {}", pages_name, device), kFlat, target, [&] {
          Subject& subject = lazy->get();
          return Result<Comparison>({OurBatches(&subject.cached.user(), &(subject.*pages)),
                                     EntryBatches(Shared(&subject.flat), &(subject.*pages))});
        });
  };
  row("all pages", &Subject::cold, Target::AtMost(1.1));
  row("4096 hot pages", &Subject::hot, Target::AtMost(1.4));
  table->compare(
      fmt::format("map + unmap, batch of 64, all pages, {}, lock-free", device),
      "prefetched pairs of atomics on flat 8-byte entries", Target::AtMost(1.15), [&] {
        Subject& subject = lazy->get();
        return Result<Comparison>(
            {OurBatches(&subject.cached.user(), &subject.cold),
             EntryBatches(std::make_shared<AtomicEntries>(subject.cached.guest().iova_pages()),
                          &subject.cold)});
      });
  table->compare(
      fmt::format("two threads, map + unmap, different memory, {}", device),
      "the same by one thread", Target::AtLeast(1.9), [&] {
        Subject& subject = lazy->get();
        const auto& [a, b] = subject.halves;
        return Result<Comparison>({OurThreads(&subject, a, b, 2), OurThreads(&subject, a, b, 1)});
      });
}

// Contiguous pages by one call, against the domain's pin of the same.
Result<Comparison> Contiguous(Subject* subject) {
  struct Held {
    std::unique_ptr<domain::PinContext> context;
    std::vector<domain::PinnedRange> pins;
    std::vector<IovaRange> ranges;
  };
  const auto held = std::make_shared<Held>();
  Guest& guest = subject->cached.guest();
  held->context = guest.open_context();
  constexpr uint64_t kPart = BytesIn(domain::PinCounts::kLargestDense);
  for (uint64_t first = 0; first < BytesIn(guest.pages().count()); first += kPart) {
    const auto part = IovaRange::FromStartAndSize(Iova(first), kPart);
    held->pins.push_back(*held->context->pin(*part, domain::Access::kReadWrite));
  }
  const uint64_t per_round = subject->few.per_round();
  for (const Iova first : guest.random_stretches(per_round * 4, 64, /*seed=*/1)) {
    held->ranges.push_back(*IovaRange::FromStartAndSize(first, BytesIn(64)));
  }
  const auto part = [held, per_round](uint64_t round) {
    return std::span(held->ranges).subspan(round % 4 * per_round, per_round);
  };
  dma::DmaUser* user = &subject->cached.user();
  return Comparison{Timed(per_round,
                          [user, part](uint64_t round) {
                            for (const IovaRange& range : part(round)) {
                              const auto mapping = user->map_contiguous(range, kDirection);
                              MVGPU_CHECK(mapping.has_value());
                              Keep(mapping->runs().front().address.value());
                            }
                          }),
                    Timed(per_round, [held, part](uint64_t round) {
                      for (const IovaRange& range : part(round)) {
                        const auto pin = held->context->pin(range, domain::Access::kReadWrite);
                        MVGPU_CHECK(pin.has_value());
                        Keep(reinterpret_cast<uint64_t>(pin->runs().front().host));
                      }
                    })};
}

// Chains: which page comes next follows from the last answer.
Result<Comparison> ReverseLookups(Subject* subject) {
  const uint64_t pages = subject->cached.guest().pages().count();
  const auto next = std::make_shared<std::vector<uint64_t>>(pages);
  for (uint64_t page = 0; page < pages; ++page) (*next)[page] = page;
  const uint64_t count = subject->few.per_round();
  const auto mix = [pages](uint64_t value) {
    return (value + 1) * 0x9e3779b97f4a7c15u >> 20 & (pages - 1);
  };
  dma::DmaCache* cache = &subject->cached.cache();
  const auto chain = [count, mix](uint64_t round, auto step) {
    uint64_t at = round;
    for (uint64_t i = 0; i < count; ++i) at = mix(step(at) + i);
    Keep(at);
  };
  return Comparison{Timed(count,
                          [cache, chain](uint64_t round) {
                            chain(round, [cache](uint64_t at) {
                              return cache->iovas_of(DmaAddr(BytesIn(at))).front().page();
                            });
                          }),
                    Timed(count, [next, chain](uint64_t round) {
                      chain(round, [&next](uint64_t at) { return (*next)[at]; });
                    })};
}

}  // namespace

void MeasureCacheHits(Table* table) {
  const Settings& settings = table->settings();
  {
    Lazy<Subject> linear([&] { return std::make_unique<Subject>(settings, Device::kLinear); });
    MeasureBatches(table, "linear device addresses", &linear);
    table->compare("map + unmap, 64 contiguous pages", "the domain's pin + release of them",
                   Target::AtMost(2), [&] { return Contiguous(&linear.get()); });
  }
  Lazy<Subject> lazy([&] { return std::make_unique<Subject>(settings, Device::kScattered); });
  MeasureBatches(table, "scattered device addresses", &lazy);
  table->compare("reverse lookup, scattered device addresses", "one dependent random load",
                 Target::AtMost(3), [&] { return ReverseLookups(&lazy.get()); });

  const auto peer = [&](std::string name, auto make) {
    table->compare(std::move(name), kFlat, {}, [&lazy, make] {
      Subject& subject = lazy.get();
      return Result<Comparison>({EntryBatches(make(&subject), &subject.few),
                                 EntryBatches(Shared(&subject.flat), &subject.few)});
    });
  };
  peer("flat_hash_map + mutex, map + unmap, 524288 pages",
       [](Subject* subject) { return std::make_shared<HashEntries>(subject->few.all()); });
  peer("KVMGT's two trees (model), map + unmap, 524288 pages",
       [](Subject* subject) { return std::make_shared<TwoTreeEntries>(subject->few.all()); });
}

}  // namespace mvgpu::bench
