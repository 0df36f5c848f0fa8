#include <fmt/format.h>

#include <array>
#include <utility>
#include <vector>

#include "tests/bench/baselines/bare_calls.h"
#include "tests/bench/bench_guest.h"
#include "tests/bench/domain_table.h"

namespace mvgpu::bench {

namespace {

using domain::Access;
using domain::PinBackend;
using MakeBackend = std::function<Result<std::unique_ptr<PinBackend>>()>;

// Pages that must exist and that nobody pins when a round begins: a stretch in every so many MiB,
// in random order, so that no two are neighbours.
struct Subject {
  Subject(const Settings& settings, std::unique_ptr<PinBackend> backend, uint64_t stretch_pages)
      : guest(Layout::EightMappings(settings.memory), std::move(backend)),
        context(guest.open_context()),
        pages(stretch_pages) {
    const uint64_t count = settings.work(128 << 10) / (stretch_pages + 63);
    const uint64_t distance = guest.pages().count() / count;
    MVGPU_CHECK(distance > 2 * stretch_pages);
    for (uint64_t i = 0; i < count; ++i) {
      first.push_back(guest.pages().iova((i * kStride % count) * distance + i % stretch_pages));
      guest.touch(first.back(), stretch_pages);
      host.push_back(guest.host(first.back()));
    }
  }
  IovaRange range(size_t i) const {
    return IovaRange::FromFirstAndLast(first[i], first[i] + (BytesIn(pages) - 1));
  }
  static constexpr uint64_t kStride = 7919;  // a prime: visits each once

  Guest guest;
  std::unique_ptr<domain::PinContext> context;
  uint64_t pages;
  std::vector<Iova> first;
  std::vector<std::byte*> host;  // of the first pages
};

// The bare calls go to the addresses that the domain has mapped, so that both sides meet the same
// memory areas.
template <typename Bare>
Result<Comparison> AgainstBareCalls(const Settings& settings, const MakeBackend& make,
                                    std::shared_ptr<Bare> bare, uint64_t pages) {
  MVGPU_ASSIGN_OR_RETURN(auto backend, make());
  const auto subject = std::make_shared<Subject>(settings, std::move(backend), pages);
  return Comparison{
      Timed(subject->first.size(),
            [subject](uint64_t) {
              for (size_t i = 0; i < subject->first.size(); ++i) {
                MVGPU_CHECK(
                    subject->context->pin(subject->range(i), Access::kReadWrite).has_value());
              }
            }),
      Timed(subject->first.size(), [subject, bare](uint64_t) {
        for (std::byte* host : subject->host) {
          bare->pin_and_release(host, BytesIn(subject->pages));
        }
      })};
}

// Pins `wanted` pages of which no two are neighbours, until the kernel has no memory areas left or
// all are held. Returns how many are held then.
Result<double> HoldIslands(const MakeBackend& make, uint64_t wanted) {
  MVGPU_ASSIGN_OR_RETURN(auto backend, make());
  Guest guest(Layout::OneMapping(BytesIn(2 * wanted)), std::move(backend));
  const auto context = guest.open_context();
  std::vector<domain::PinnedRange> held;
  for (uint64_t i = 0; i < wanted; ++i) {
    const Iova page = guest.pages().iova(2 * i);
    auto pin = context->pin(IovaRange::FromFirstAndLast(page, page), Access::kReadWrite);
    if (!pin) break;
    held.push_back(std::move(*pin));
  }
  return static_cast<double>(held.size());
}

Result<std::unique_ptr<PinBackend>> MakeMlock() { return domain::MakeMlockPinBackend(); }

}  // namespace

void MeasureFirstPins(Table* table) {
  const Settings& settings = table->settings();
  const auto mlock = [&](std::string name, uint64_t pages, Target target) {
    table->compare(std::move(name), "mlock + munlock", target, [&] {
      return AgainstBareCalls(settings, MakeMlock, std::make_shared<BareMlock>(), pages);
    });
  };
  const auto io_uring = [&](std::string name, uint64_t pages, Target target) {
    table->compare(std::move(name), "the two calls that register a buffer and drop it", target,
                   [&]() -> Result<Comparison> {
                     MVGPU_ASSIGN_OR_RETURN(auto bare, BareBuffers::Create());
                     return AgainstBareCalls(settings, domain::MakeIoUringPinBackend,
                                             std::shared_ptr(std::move(bare)), pages);
                   });
  };
  io_uring("first pin + last release, isolated page, io-uring", 1, Target::AtMost(1.2));
  mlock("first pin + last release, isolated page, mlock", 1, Target::AtMost(1.05));
  io_uring("first pin + last release, 64 contiguous pages, io-uring", 64, Target::AtMost(1.1));
  mlock("first pin + last release, 64 contiguous pages, mlock", 64, Target::AtMost(1.1));

  const uint64_t islands = settings.work(40000);
  const auto hold_islands = [&](std::string name, const MakeBackend& make) {
    table->measure(std::move(name), "pages", fmt::format("{} pinned one by one", islands),
                   Target::AtLeast(static_cast<double>(islands)),
                   [&] { return HoldIslands(make, islands); });
  };
  hold_islands("isolated pages held at a time, io-uring", domain::MakeIoUringPinBackend);
  hold_islands("isolated pages held at a time, mlock", MakeMlock);
}

}  // namespace mvgpu::bench
