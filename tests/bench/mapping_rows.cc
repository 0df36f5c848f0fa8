#include <fmt/format.h>

#include <utility>

#include "tests/bench/baselines/bare_calls.h"
#include "tests/bench/bench_guest.h"
#include "tests/bench/domain_table.h"

namespace mvgpu::bench {

namespace {

using domain::Access;

constexpr uint64_t kSize = 2 << 20;
constexpr Iova kPlace{uint64_t{1} << 40};       // far from the mappings that are there
constexpr Iova kKnownPlace{uint64_t{1} << 41};  // where the file stands that is known already

// A guest with so many mappings of one page, and the file of which 2 MiB are mapped and unmapped.
struct Subject {
  Subject(uint64_t mappings, bool known)
      : guest(Layout::Pieces(mappings, kPageSize), domain::MakeNonePinBackend(), kLimits),
        file(MakeFile(kSize)) {
    if (known) MVGPU_CHECK(Map(kKnownPlace, kPageSize));
  }
  bool Map(Iova place, uint64_t size) {
    return guest.container()
        .map({place, size, Access::kReadWrite, UniqueFd(dup(file.get())), 0})
        .has_value();
  }
  void MapAndUnmap() {
    MVGPU_CHECK(Map(kPlace, kSize));
    MVGPU_CHECK(guest.container().unmap(kPlace, kSize).has_value());
  }
  // 65535 mappings are the default limit; here they are there before the one that is measured.
  static constexpr domain::Container::Limits kLimits{.max_mappings = 1 << 17};

  Guest guest;
  UniqueFd file;
};

}  // namespace

void MeasureMapping(Table* table) {
  const Settings& settings = table->settings();
  const uint64_t calls = settings.work(2000);
  const auto row = [&](uint64_t mappings, bool known, Target target) {
    const std::string name = fmt::format("map + unmap of 2 MiB, file {}, {} mappings present",
                                         known ? "known" : "new", mappings);
    table->compare(name, "dup + mmap + munmap + close", target, [&] {
      const auto subject = std::make_shared<Subject>(mappings, known);
      return Result<Comparison>({Timed(calls,
                                       [=](uint64_t) {
                                         for (uint64_t i = 0; i < calls; ++i) {
                                           subject->MapAndUnmap();
                                         }
                                       }),
                                 Timed(calls, [=](uint64_t) {
                                   for (uint64_t i = 0; i < calls; ++i) {
                                     MapAndUnmapBare(subject->file.get(), kSize);
                                   }
                                 })});
    });
  };
  for (const uint64_t mappings : {0, 1024, 65535}) row(mappings, false, Target::AtMost(1.25));
  for (const uint64_t mappings : {0, 1024, 65535}) row(mappings, true, Target::AtMost(0.5));
}

}  // namespace mvgpu::bench
