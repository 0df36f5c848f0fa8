#include <fmt/format.h>

#include <array>
#include <utility>

#include "tests/bench/baselines/flat_counters.h"
#include "tests/bench/bench_guest.h"
#include "tests/bench/domain_table.h"
#include "tests/bench/page_slices.h"
#include "tests/bench/two_threads.h"

namespace mvgpu::bench {

namespace {

using domain::Access;

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
Side AtomicThreads(Subject* subject, std::array<PageSlices, kThreads> Subject::*pages,
                   std::shared_ptr<AtomicCounters<Count>> counters, size_t count) {
  return [subject, pages, counters, count](uint64_t round) {
    const auto& slices = subject->*pages;
    return Together(count, count * slices[0].per_round(), [&](size_t thread) {
      slices[thread].for_each_batch(round, kBatch,
                                    [&](auto batch) { counters->pin_and_release(batch); });
    });
  };
}

template <typename Count>
std::shared_ptr<AtomicCounters<Count>> CountersFor(const Subject& subject) {
  return std::make_shared<AtomicCounters<Count>>(subject.guest.iova_pages());
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

  // How much of a second processor the machine has to give to such work.
  table->compare("one thread, prefetched pairs of 2-byte atomics, different memory",
                 "the same by two threads", {}, [&] {
                   const auto counters = CountersFor<uint16_t>(lazy.get());
                   return Result<Comparison>(
                       {AtomicThreads(&lazy.get(), &Subject::halves, counters, 1),
                        AtomicThreads(&lazy.get(), &Subject::halves, counters, kThreads)});
                 });

  table->compare(
      "two threads, pin + release, same memory", "prefetched pairs of 8-byte atomics",
      Target::AtMost(1.25), [&] {
        return Result<Comparison>({OurThreads(&lazy.get(), &Subject::everywhere, kThreads),
                                   AtomicThreads(&lazy.get(), &Subject::everywhere,
                                                 CountersFor<uint64_t>(lazy.get()), kThreads)});
      });
  table->compare(
      "two threads, pin + release, same memory, small atomics",
      "prefetched pairs of 2-byte atomics", {}, [&] {
        return Result<Comparison>({OurThreads(&lazy.get(), &Subject::everywhere, kThreads),
                                   AtomicThreads(&lazy.get(), &Subject::everywhere,
                                                 CountersFor<uint16_t>(lazy.get()), kThreads)});
      });
}

}  // namespace mvgpu::bench
