#include <fmt/format.h>

#include <utility>
#include <vector>

#include "tests/bench/baselines/region_tree.h"
#include "tests/bench/bench_guest.h"
#include "tests/bench/domain_table.h"

namespace mvgpu::bench {

namespace {

using domain::Access;

constexpr char kOneCall[] = "libvfio-user's uncounted call for 256 KiB, 8 regions (model)";

struct Held {
  explicit Held(const Settings& settings)
      : guest(Layout::EightMappings(settings.memory), domain::MakeNonePinBackend()),
        hold(guest),
        tree(guest.layout()) {}
  Guest guest;
  DenseHold hold;
  RegionTree tree;
};

// First pages of as many stretches as fit into the memory twice, a part for each round; not aligned
// to anything but pages.
struct Stretches {
  Stretches(const Guest& guest, uint64_t pages, const Settings& settings)
      : length(pages),
        per_round(settings.work(64 << 10)),
        first(guest.random_stretches(per_round * 4, pages, /*seed=*/1)) {}
  std::span<const Iova> round(uint64_t number) const {
    return std::span(first).subspan(number % 4 * per_round, per_round);
  }
  uint64_t length;
  uint64_t per_round;
  std::vector<Iova> first;
};
using SharedStretches = std::shared_ptr<const Stretches>;

Side OurPins(domain::PinContext* context, const SharedStretches& stretches) {
  return Timed(stretches->per_round, [context, stretches](uint64_t round) {
    for (const Iova first : stretches->round(round)) {
      const auto last = first + (BytesIn(stretches->length) - 1);
      const auto pinned =
          context->pin(IovaRange::FromFirstAndLast(first, last), Access::kReadWrite);
      MVGPU_CHECK(pinned.has_value());
      Keep(reinterpret_cast<uint64_t>(pinned->runs().front().host));
    }
  });
}

Side ModelCalls(RegionTree* tree, const SharedStretches& stretches) {
  return Timed(stretches->per_round, [tree, stretches](uint64_t round) {
    uint64_t sum = 0;
    for (const Iova first : stretches->round(round)) {
      sum += tree->map_and_unmap(first, BytesIn(stretches->length));
    }
    Keep(sum);
  });
}

}  // namespace

void MeasureRanges(Table* table) {
  const Settings& settings = table->settings();
  Lazy<Held> lazy([&] { return std::make_unique<Held>(settings); });
  const auto stretches_of = [&](uint64_t pages) {
    return std::make_shared<const Stretches>(lazy.get().guest, pages, settings);
  };
  const auto row = [&](uint64_t pages, Target target) {
    table->compare(fmt::format("pin + release, {} contiguous pages", pages), kOneCall, target, [&] {
      return Result<Comparison>({OurPins(&lazy.get().hold.context(), stretches_of(pages)),
                                 ModelCalls(&lazy.get().tree, stretches_of(64))});
    });
  };
  row(64, Target::AtMost(1.7));
  row(512, Target::AtMost(3));
  row(1, {});
}

}  // namespace mvgpu::bench
