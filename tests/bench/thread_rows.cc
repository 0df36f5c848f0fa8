#include <fmt/format.h>

#include <array>
#include <atomic>
#include <thread>
#include <utility>

#include "tests/bench/baselines/flat_counters.h"
#include "tests/bench/bench_guest.h"
#include "tests/bench/domain_table.h"
#include "tests/bench/page_slices.h"

namespace mvgpu::bench {

namespace {

using domain::Access;

constexpr size_t kThreads = 2;

// Two contexts of one owner, each of which holds all memory page by page, and random pages for
// each thread: of its half of the memory, and of all of it.
struct Subject {
  explicit Subject(const Settings& settings)
      : guest(Layout::EightMappings(settings.memory), domain::MakeNonePinBackend()),
        holds{DenseHold(guest), DenseHold(guest)},
        everywhere{Random(settings, 1), Random(settings, 2)},
        halves{Half(settings, 0), Half(settings, 1)} {}

  PageSlices Random(const Settings& settings, uint64_t seed) const {
    return {guest.pages().random(settings.work(2 << 20), seed), settings.work(512 << 10)};
  }
  PageSlices Half(const Settings& settings, uint64_t half) const {
    const GuestPages pages = guest.pages();
    const GuestPages part(pages.count() / kThreads, Layout{});
    std::vector<Iova> chosen = part.random(settings.work(2 << 20), half + 1);
    for (Iova& page : chosen) page = pages.iova(page.page() + half * part.count());
    return {std::move(chosen), settings.work(512 << 10)};
  }

  Guest guest;
  std::array<DenseHold, kThreads> holds;
  std::array<PageSlices, kThreads> everywhere;
  std::array<PageSlices, kThreads> halves;
};

// Runs work(thread) in `count` threads, each on a processor of its own, at the same time. Returns
// the ns from the start until the last one is done, for each of `units` units of work.
template <typename Work>
double Together(size_t count, uint64_t units, const Work& work) {
  std::atomic<size_t> waiting{0};
  std::array<double, kThreads> start{};
  std::array<double, kThreads> end{};
  std::vector<std::thread> threads;
  for (size_t i = 0; i < count; ++i) {
    threads.emplace_back([&, i] {
      StayOn(i);
      waiting.fetch_add(1);
      while (waiting.load() != count) {
      }
      start[i] = NsOf(CLOCK_MONOTONIC);
      work(i);
      end[i] = NsOf(CLOCK_MONOTONIC);
    });
  }
  for (std::thread& thread : threads) thread.join();
  const double taken =
      *std::max_element(end.begin(), end.begin() + static_cast<ptrdiff_t>(count)) -
      *std::min_element(start.begin(), start.begin() + static_cast<ptrdiff_t>(count));
  return taken / static_cast<double>(units);
}

Side OurThreads(Subject* subject, std::array<PageSlices, kThreads> Subject::*pages, size_t count) {
  return [subject, pages, count](uint64_t round) {
    const auto& slices = subject->*pages;
    return Together(count, count * slices[0].per_round(), [&](size_t thread) {
      domain::PinContext& context = subject->holds[thread].context();
      std::array<std::byte*, kBatch> host;
      slices[thread].for_each_batch(round, kBatch, [&](auto batch) {
        const bool done = context.pin_pages(batch, Access::kReadWrite, host) &&
                          context.unpin_pages(batch, Access::kReadWrite);
        MVGPU_CHECK(done);
      });
    });
  };
}

template <typename Count>
Side AtomicThreads(Subject* subject) {
  const auto counters = std::make_shared<AtomicCounters<Count>>(subject->guest.iova_pages());
  return [subject, counters](uint64_t round) {
    const auto& slices = subject->everywhere;
    return Together(kThreads, kThreads * slices[0].per_round(), [&](size_t thread) {
      slices[thread].for_each_batch(round, kBatch,
                                    [&](auto batch) { counters->pin_and_release(batch); });
    });
  };
}

}  // namespace

// The figures are for all threads together: half the time for each page is twice the work.
void MeasureThreads(Table* table) {
  const Settings& settings = table->settings();
  Lazy<Subject> lazy([&] { return std::make_unique<Subject>(settings); });

  const auto speedup = [&](std::string name, std::array<PageSlices, kThreads> Subject::*pages,
                           Target target) {
    table->compare(std::move(name), "the same by one thread", target, [&] {
      return Result<Comparison>(
          {OurThreads(&lazy.get(), pages, kThreads), OurThreads(&lazy.get(), pages, 1)});
    });
  };
  speedup("two threads, pin + release, different memory", &Subject::halves, Target::AtLeast(1.9));

  table->compare(
      "two threads, pin + release, same memory", "prefetched pairs of 8-byte atomics",
      Target::AtMost(1.25), [&] {
        return Result<Comparison>({OurThreads(&lazy.get(), &Subject::everywhere, kThreads),
                                   AtomicThreads<uint64_t>(&lazy.get())});
      });
  table->compare(
      "two threads, pin + release, same memory, small atomics",
      "prefetched pairs of 2-byte atomics", {}, [&] {
        return Result<Comparison>({OurThreads(&lazy.get(), &Subject::everywhere, kThreads),
                                   AtomicThreads<uint16_t>(&lazy.get())});
      });
}

}  // namespace mvgpu::bench
