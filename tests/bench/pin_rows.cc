#include <array>
#include <utility>

#include "tests/bench/baselines/flat_counters.h"
#include "tests/bench/baselines/hash_counters.h"
#include "tests/bench/baselines/region_tree.h"
#include "tests/bench/bench_guest.h"
#include "tests/bench/domain_table.h"
#include "tests/bench/page_slices.h"

namespace mvgpu::bench {

namespace {

using domain::Access;

constexpr char kFlat[] = "plain ++ and -- on flat 8-byte counters";
constexpr size_t kHotPages = 4096;

// All memory of a guest, held page by page, and random pages of it.
struct Held {
  explicit Held(const Settings& settings)
      : guest(Layout::EightMappings(settings.memory), domain::MakeNonePinBackend()),
        hold(guest),
        flat(guest.iova_pages()),
        tree(guest.layout()),
        cold(guest.pages().random(settings.work(4 << 20), /*seed=*/1), settings.work(512 << 10)),
        hot(HotPages(settings), settings.work(512 << 10)),
        few(guest.pages().random(settings.work(512 << 10), /*seed=*/3), settings.work(16 << 10)) {}

  std::vector<Iova> HotPages(const Settings& settings) const {
    const std::vector<Iova> chosen = guest.pages().random(kHotPages, /*seed=*/2);
    std::vector<Iova> pages;
    uint64_t next = 0;
    for (uint64_t i = 0; i < settings.work(1 << 20); ++i) {
      next = next * 6364136223846793005u + 1442695040888963407u;
      pages.push_back(chosen[next >> 52]);
    }
    return pages;
  }

  Guest guest;
  DenseHold hold;
  FlatCounters flat;
  RegionTree tree;
  PageSlices cold;
  PageSlices hot;
  PageSlices few;  // for what is slow
};

void PinAndRelease(domain::PinContext* context, std::span<const Iova> pages) {
  std::array<std::byte*, kBatch> host;
  const bool done =
      context->pin_pages(pages, Access::kReadWrite, std::span(host).first(pages.size())) &&
      context->unpin_pages(pages, Access::kReadWrite);
  MVGPU_CHECK(done);
  Keep(reinterpret_cast<uint64_t>(host[0]));
}

Side OurBatches(domain::PinContext* context, const PageSlices* pages, size_t size) {
  return Timed(pages->per_round(), [context, pages, size](uint64_t round) {
    pages->for_each_batch(round, size, [context](auto batch) { PinAndRelease(context, batch); });
  });
}

template <typename Counters>
Side CounterBatches(Counters* counters, const PageSlices* pages) {
  return Timed(pages->per_round(), [counters, pages](uint64_t round) {
    pages->for_each_batch(round, kBatch, [counters](auto batch) {
      counters->pin(batch);
      counters->release(batch);
    });
  });
}

Side ModelLookups(RegionTree* tree, const PageSlices* pages) {
  return Timed(pages->per_round(), [tree, pages](uint64_t round) {
    uint64_t sum = 0;
    for (const Iova page : pages->round(round)) sum += tree->map_and_unmap(page, kPageSize);
    Keep(sum);
  });
}

// The same pages, held by a context of which all pins are one for each mapping: no page has a
// counter of its own when a round begins.
Result<Comparison> HeldByRanges(Held* held, const PageSlices* pages) {
  struct Ranges {
    std::unique_ptr<domain::PinContext> context;
    std::vector<domain::PinnedRange> pins;  // of the context: go first
  };
  const auto ranges = std::make_shared<Ranges>();
  ranges->context = held->guest.open_context();
  for (const Placement& part : held->guest.layout().placements) {
    const auto range = IovaRange::FromStartAndSize(Iova(part.iova), part.size);
    MVGPU_ASSIGN_OR_RETURN(auto pin, ranges->context->pin(*range, Access::kReadWrite));
    ranges->pins.push_back(std::move(pin));
  }
  const Side ours = OurBatches(ranges->context.get(), pages, kBatch);
  return Comparison{[ranges, ours](uint64_t round) { return ours(round); },
                    CounterBatches(&held->flat, pages)};
}

}  // namespace

void MeasurePins(Table* table) {
  const Settings& settings = table->settings();
  Lazy<Held> lazy([&] { return std::make_unique<Held>(settings); });

  const auto batches = [&](std::string name, PageSlices Held::*pages, size_t batch, Target target) {
    table->compare(std::move(name), kFlat, target, [&lazy, pages, batch] {
      Held& held = lazy.get();
      return Result<Comparison>({OurBatches(&held.hold.context(), &(held.*pages), batch),
                                 CounterBatches(&held.flat, &(held.*pages))});
    });
  };
  batches("pin + release, batch of 64, all pages", &Held::cold, kBatch, Target::AtMost(0.85));
  batches("pin + release, batch of 64, 4096 hot pages", &Held::hot, kBatch, Target::AtMost(1.4));
  // 2.7: what the real libvfio-user's lookup, which counts nothing, was measured to cost against
  // the same counters. Our model of it, below, is cheaper than that.
  batches("pin + release, batch of 1, all pages", &Held::cold, 1, Target::AtMost(2.7));

  const auto singles = [&](std::string name, PageSlices Held::*pages) {
    table->compare(std::move(name), "libvfio-user's uncounted lookup, 8 regions (model)", {}, [&] {
      Held& held = lazy.get();
      return Result<Comparison>({OurBatches(&held.hold.context(), &(held.*pages), 1),
                                 ModelLookups(&held.tree, &(held.*pages))});
    });
  };
  singles("pin + release, batch of 1, all pages, against a lookup", &Held::cold);
  singles("pin + release, batch of 1, 4096 hot pages, against a lookup", &Held::hot);

  table->compare("pin + release, batch of 64, held by whole mappings", kFlat, {},
                 [&] { return HeldByRanges(&lazy.get(), &lazy.get().few); });
  table->compare("flat_hash_map + mutex, pin + release, all pages", kFlat, {}, [&] {
    Held& held = lazy.get();
    const auto hash = std::make_shared<HashCounters>(held.cold.all());
    const Side ours = CounterBatches(hash.get(), &held.cold);
    return Result<Comparison>({[hash, ours](uint64_t round) { return ours(round); },
                               CounterBatches(&held.flat, &held.cold)});
  });
}

}  // namespace mvgpu::bench
