#include <fmt/format.h>

#include <utility>

#include "tests/bench/baselines/flat_page_table.h"
#include "tests/bench/baselines/region_tree.h"
#include "tests/bench/bench_guest.h"
#include "tests/bench/domain_table.h"
#include "tests/bench/page_slices.h"

namespace mvgpu::bench {

namespace {

using domain::Access;
using Translator = domain::ApiOnlyDomain::Translator;

constexpr char kTableLoad[] = "one random load from a flat page table of the guest";

// A guest and random pages of it. The table to compare with is always that of a whole guest.
struct Subject {
  Subject(Layout layout, const Settings& settings)
      : guest(std::move(layout), domain::MakeNonePinBackend()),
        pages(guest.pages().random(settings.work(4 << 20), /*seed=*/1), settings.work(1 << 20)) {}
  Guest guest;
  PageSlices pages;
};

struct Whole {
  explicit Whole(const Settings& settings)
      : memory(settings.memory),
        subject(Layout::EightMappings(settings.memory), settings),
        table(subject.guest.iova_pages()) {}
  uint64_t memory;
  Subject subject;
  FlatPageTable table;
};

Side IndependentLookups(Subject* subject) {
  return Timed(subject->pages.per_round(), [subject](uint64_t round) {
    uint64_t sum = 0;
    subject->pages.for_each_batch(round, kBatch, [&](std::span<const Iova> batch) {
      const Translator translator(subject->guest.domain());
      for (const Iova page : batch) {
        sum += reinterpret_cast<uint64_t>(translator.translate(page, Access::kRead));
      }
    });
    Keep(sum);
  });
}

Side IndependentLoads(Whole* whole) {
  return Timed(whole->subject.pages.per_round(), [whole](uint64_t round) {
    uint64_t sum = 0;
    for (const Iova page : whole->subject.pages.round(round)) sum += whole->table.translate(page);
    Keep(sum);
  });
}

// The step is part of what the next page is picked from: a chain that depended on the last value
// alone would soon run in a small circle.
Side DependentLookups(Subject* subject, uint64_t steps) {
  return Timed(steps, [subject, steps](uint64_t round) {
    const GuestPages pages = subject->guest.pages();
    uint64_t value = round;
    for (uint64_t step = 0; step < steps;) {
      const Translator translator(subject->guest.domain());
      for (size_t i = 0; i < kBatch; ++i, ++step) {
        const Iova page = pages.pick(value + step);
        value = reinterpret_cast<uint64_t>(translator.translate(page, Access::kRead));
      }
    }
    Keep(value);
  });
}

Side DependentLoads(Whole* whole, uint64_t steps) {
  return Timed(steps, [whole, steps](uint64_t round) {
    const GuestPages pages = whole->subject.guest.pages();
    uint64_t value = round;
    for (uint64_t step = 0; step < steps; ++step) {
      value = whole->table.translate(pages.pick(value + step));
    }
    Keep(value);
  });
}

// Page by page, get and put: what the real one was calibrated with, see RegionTree.
Side ModelLookups(const Layout& layout, Whole* whole) {
  const auto tree = std::make_shared<RegionTree>(layout);
  const GuestPages pages(PagesIn(whole->memory), layout);
  const auto random = std::make_shared<std::vector<Iova>>(
      pages.random(whole->subject.pages.per_round(), /*seed=*/4));
  return Timed(random->size(), [tree, random](uint64_t) {
    uint64_t sum = 0;
    for (const Iova page : *random) sum += tree->map_and_unmap(page, kPageSize);
    Keep(sum);
  });
}

}  // namespace

void MeasureTranslation(Table* table) {
  const Settings& settings = table->settings();
  const uint64_t steps = settings.work(256 << 10) / kBatch * kBatch;
  Lazy<Whole> whole([&] { return std::make_unique<Whole>(settings); });

  const auto both = [&](std::string_view what, const std::function<Subject*()>& subject,
                        Target independent, Target dependent) {
    table->compare(fmt::format("translate, {}, independent", what), kTableLoad, independent, [&] {
      return Result<Comparison>({IndependentLookups(subject()), IndependentLoads(&whole.get())});
    });
    table->compare(fmt::format("translate, {}, dependent", what), kTableLoad, dependent, [&] {
      return Result<Comparison>(
          {DependentLookups(subject(), steps), DependentLoads(&whole.get(), steps)});
    });
  };
  const auto with = [&](std::string_view what, const std::function<Layout()>& layout,
                        Target independent, Target dependent) {
    Lazy<Subject> subject([&] { return std::make_unique<Subject>(layout(), settings); });
    both(
        what, [&] { return &subject.get(); }, independent, dependent);
  };

  both(
      "8 mappings", [&] { return &whole.get().subject; }, Target::AtMost(0.3),
      Target::AtMost(0.07));
  with(
      "1024 mappings", [&] { return Layout::Pieces(1024, settings.memory / 1024); },
      Target::AtMost(0.3), Target::AtMost(0.07));
  with("65535 mappings of 4 KiB", [] { return Layout::Pieces(65535, kPageSize); },
       Target::AtMost(1), {});
  with("65535 mappings of 4 KiB, far apart",
       [&] { return Layout::LonePages(65535, settings.memory); }, {}, {});

  const auto model = [&](std::string_view what, const std::function<Layout()>& layout) {
    table->compare(fmt::format("libvfio-user model, {}", what), kTableLoad, {}, [&] {
      return Result<Comparison>(
          {ModelLookups(layout(), &whole.get()), IndependentLoads(&whole.get())});
    });
  };
  model("1 region", [&] { return Layout::OneMapping(settings.memory); });
  model("8 regions", [&] { return Layout::EightMappings(settings.memory); });
  model("1024 regions", [&] { return Layout::Pieces(1024, settings.memory / 1024); });
}

}  // namespace mvgpu::bench
