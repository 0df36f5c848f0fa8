#include <array>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "tests/bench/bench_guest.h"
#include "tests/bench/domain_table.h"
#include "tests/bench/own_memory.h"
#include "tests/bench/page_slices.h"

namespace mvgpu::bench {

namespace {

using domain::Access;

// What hold(context) makes a fresh domain take, in bytes: what it asked malloc for and the pages
// that it touched. Where malloc had to touch pages for it they are counted twice, so this errs
// upwards. let_go(context) ends what is held.
template <typename Hold, typename LetGo>
double BytesFor(const Layout& layout, const Hold& hold, const LetGo& let_go) {
  Guest guest(layout, domain::MakeNonePinBackend());
  const auto context = guest.open_context();
  SettleHeap();
  const OwnMemory before = OwnMemory::Now();
  hold(guest, context.get());
  const OwnMemory after = OwnMemory::Now();
  let_go(guest, context.get());
  return after.malloced - before.malloced + after.touched - before.touched;
}

// Calls visit(batch) for batches of every second page of the guest.
template <typename Visit>
void ForEverySecondPage(const Guest& guest, const Visit& visit) {
  const GuestPages pages = guest.pages();
  std::array<Iova, kBatch> batch;
  for (uint64_t page = 0; page < pages.count();) {
    for (size_t i = 0; i < kBatch; ++i, page += 2) batch[i] = pages.iova(page);
    visit(std::span<const Iova>(batch));
  }
}

double ScatteredBytes(const Layout& layout) {
  uint64_t held = 0;
  const double bytes = BytesFor(
      layout,
      [&held](const Guest& guest, domain::PinContext* context) {
        ForEverySecondPage(guest, [&](std::span<const Iova> batch) {
          std::array<std::byte*, kBatch> host;
          MVGPU_CHECK(context->pin_pages(batch, Access::kReadWrite, host).has_value());
          held += batch.size();
        });
      },
      [](const Guest& guest, domain::PinContext* context) {
        ForEverySecondPage(guest, [context](std::span<const Iova> batch) {
          MVGPU_CHECK(context->unpin_pages(batch, Access::kReadWrite).has_value());
        });
      });
  return bytes / static_cast<double>(held);
}

// One pin for each stretch of IOVAs without a hole; the handles are counted.
double WholeBytes(const Layout& layout, std::span<const IovaRange> stretches) {
  std::vector<std::unique_ptr<domain::PinnedRange>> handles;
  handles.reserve(stretches.size());
  return BytesFor(
      layout,
      [&](const Guest&, domain::PinContext* context) {
        for (const IovaRange& stretch : stretches) {
          auto pin = context->pin(stretch, Access::kReadWrite);
          MVGPU_CHECK(pin.has_value());
          handles.push_back(std::make_unique<domain::PinnedRange>(std::move(*pin)));
        }
      },
      [&](const Guest&, domain::PinContext*) { handles.clear(); });
}

IovaRange Between(uint64_t first, uint64_t end) {
  return IovaRange::FromFirstAndLast(Iova(first), Iova(end - 1));
}

}  // namespace

void MeasureMemory(Table* table) {
  const uint64_t memory = table->settings().memory;
  constexpr char kHow[] = "private memory of the process, before and after";
  table->measure("memory per held page, every second page", "bytes", kHow, Target::AtMost(2.5),
                 [&] { return ScatteredBytes(Layout::EightMappings(memory)); });
  table->measure("memory for all pages, held by one pin", "bytes", kHow, Target::AtMost(256), [&] {
    const std::array all{Between(0, memory)};
    return WholeBytes(Layout::OneMapping(memory), all);
  });
  table->measure("memory for all pages of 8 mappings, held by two pins", "bytes", kHow, {}, [&] {
    const Layout layout = Layout::EightMappings(memory);
    const std::array parts{Between(0, layout.low),
                           Between(layout.low + layout.hole, memory + layout.hole)};
    return WholeBytes(layout, parts);
  });
}

}  // namespace mvgpu::bench
