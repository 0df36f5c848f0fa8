#include "tests/bench/bench_guest.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <random>
#include <utility>

#include "apionly-domain/pin/pin_counts.h"

namespace mvgpu::bench {

using domain::Access;

Layout Layout::EightMappings(uint64_t memory) {
  const uint64_t part = memory / 64;
  constexpr std::array<uint64_t, 8> kParts{3, 9, 9, 9, 9, 9, 9, 7};
  Layout layout{{}, 3 * part, part};
  uint64_t iova = 0;
  for (size_t file = 0; file < kParts.size(); ++file) {
    layout.placements.push_back({iova, kParts[file] * part, file, 0});
    iova += kParts[file] * part + (file == 0 ? part : 0);
  }
  return layout;
}

Layout Layout::OneMapping(uint64_t memory) { return {{{0, memory, 0, 0}}}; }

Layout Layout::Pieces(uint64_t count, uint64_t size) {
  // An odd stride visits every slot of a power of two once, and never two neighbours in order.
  constexpr uint64_t kStride = 0x9e37;
  uint64_t slots = 1;
  while (slots < count) slots *= 2;
  Layout layout;
  for (uint64_t i = 0; i < count; ++i) {
    const uint64_t slot = (i * (kStride | 1)) & (slots - 1);
    layout.placements.push_back({i * size, size, 0, slot * size});
  }
  return layout;
}

Layout Layout::LonePages(uint64_t count, uint64_t memory) {
  Layout layout;
  layout.stride = memory / (count + 1) & ~kPageMask;
  for (uint64_t i = 0; i < count; ++i) {
    layout.placements.push_back({i * layout.stride, kPageSize, 0, i * kPageSize});
  }
  return layout;
}

std::vector<Iova> GuestPages::random(size_t count, uint64_t seed) const {
  std::mt19937_64 random(seed);
  std::vector<Iova> found;
  found.reserve(count);
  while (found.size() < count) found.push_back(iova(random() % count_));
  return found;
}

UniqueFd MakeFile(uint64_t size) {
  UniqueFd fd(memfd_create("bench-guest-ram", MFD_CLOEXEC));
  MVGPU_CHECK(fd.is_valid() && ftruncate(fd.get(), static_cast<off_t>(size)) == 0);
  return fd;
}

Guest::Guest(Layout layout, std::unique_ptr<domain::PinBackend> backend,
             domain::Container::Limits limits)
    : layout_(std::move(layout)), container_(limits) {
  auto created = domain::ApiOnlyDomain::Create({}, std::move(backend), nullptr, nullptr);
  MVGPU_CHECK(created.has_value());
  domain_ = std::move(*created);
  MVGPU_CHECK(container_.attach(domain_.get()).has_value());
  std::vector<uint64_t> file_sizes;
  for (const Placement& part : layout_.placements) {
    file_sizes.resize(std::max(file_sizes.size(), part.file + 1));
    file_sizes[part.file] = std::max(file_sizes[part.file], part.offset + part.size);
    memory_ += part.size;
  }
  std::vector<UniqueFd> files;
  for (const uint64_t size : file_sizes) files.push_back(MakeFile(size));
  for (const Placement& part : layout_.placements) {
    auto mapped = container_.map({Iova(part.iova), part.size, Access::kReadWrite,
                                  UniqueFd(dup(files[part.file].get())), part.offset});
    MVGPU_CHECK(mapped.has_value());
  }
}

Guest::~Guest() { MVGPU_CHECK(container_.detach(domain_.get()).has_value()); }

std::byte* Guest::host(Iova iova) const {
  return domain::ApiOnlyDomain::Translator(*domain_).translate(iova, Access::kReadWrite);
}

std::vector<Iova> Guest::random_stretches(size_t count, uint64_t length, uint64_t seed) const {
  std::mt19937_64 random(seed);
  const GuestPages all = pages();
  std::vector<Iova> found;
  found.reserve(count);
  while (found.size() < count) {
    const Iova first = all.iova(random() % all.count());
    const auto part = std::prev(
        std::upper_bound(layout_.placements.begin(), layout_.placements.end(), first,
                         [](Iova iova, const Placement& p) { return iova.value() < p.iova; }));
    if (first.value() + BytesIn(length) <= part->iova + part->size) found.push_back(first);
  }
  return found;
}

void Guest::touch(Iova iova, uint64_t count) {
  constexpr std::array kByte{std::byte{1}};
  for (uint64_t i = 0; i < count; ++i) {
    MVGPU_CHECK(domain_->write(iova + BytesIn(i), kByte).has_value());
  }
}

DenseHold::DenseHold(Guest& guest) : context_(guest.open_context()) {
  constexpr uint64_t kPart = BytesIn(domain::PinCounts::kLargestDense);
  for (const Placement& part : guest.layout().placements) {
    for (uint64_t done = 0; done < part.size; done += kPart) {
      const uint64_t size = std::min(kPart, part.size - done);
      const auto range = IovaRange::FromStartAndSize(Iova(part.iova + done), size);
      auto pinned = context_->pin(*range, Access::kReadWrite);
      MVGPU_CHECK(pinned.has_value());
      held_.push_back(std::move(*pinned));
    }
  }
}

}  // namespace mvgpu::bench
