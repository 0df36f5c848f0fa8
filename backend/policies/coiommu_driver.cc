#include "backend/policies/coiommu_driver.h"

#include <algorithm>
#include <utility>

#include "apionly-domain/base/check.h"

namespace mvgpu::backend {

namespace {

using domain::TrackingTable;

constexpr uint64_t kIsBatch = uint64_t{1} << 63;
constexpr uint64_t kPresent = 1;
constexpr unsigned kFrameShift = 16;  // of a request: the device is below
// 64 KiB less what each of 16 CPUs may add at the same time.
constexpr uint32_t kMostMaps = 0xffef;

constexpr uint64_t BatchBytes(uint64_t frames) { return 16 + frames * sizeof(uint64_t); }

}  // namespace

uint64_t CoiommuDriver::MemoryFor(uint64_t pages, unsigned levels) {
  uint64_t tables = 0;
  uint64_t covered = pages;  // by one table of the level
  for (unsigned level = 0; level < levels; ++level) {
    const unsigned bits = level == 0 ? TrackingTable::kLeafBits : TrackingTable::kUpperBits;
    covered = (covered + (uint64_t{1} << bits) - 1) >> bits;
    tables += covered;
  }
  return BytesIn(tables) + ((BatchBytes(kMaxBatch) + kPageMask) & ~kPageMask);
}

CoiommuDriver::CoiommuDriver(Options options)
    : options_(std::move(options)),
      next_table_(kPageSize),
      batch_(options_.memory.size() - ((BatchBytes(kMaxBatch) + kPageMask) & ~kPageMask)) {}

std::atomic_ref<uint64_t> CoiommuDriver::WordAt(uint64_t offset) const {
  return std::atomic_ref<uint64_t>(
      *reinterpret_cast<uint64_t*>(options_.memory.subspan(offset, sizeof(uint64_t)).data()));
}

std::atomic_ref<uint32_t> CoiommuDriver::TrackedWord(uint64_t frame) {
  uint64_t table = 0;
  for (unsigned level = options_.levels - 1; level > 0; --level) {
    const auto entry = WordAt(table + TrackingTable::IndexOf(frame, level) * sizeof(uint64_t));
    uint64_t value = entry.load();
    if (value == 0) {
      MVGPU_CHECK(next_table_ < batch_);
      value = (options_.start.value() + next_table_) | kPresent;
      entry.store(value);
      next_table_ += kPageSize;
    }
    table = (value & ~kPageMask) - options_.start.value();
  }
  const uint64_t offset = table + TrackingTable::IndexOf(frame, 0) * sizeof(uint32_t);
  return std::atomic_ref<uint32_t>(
      *reinterpret_cast<uint32_t*>(options_.memory.subspan(offset, sizeof(uint32_t)).data()));
}

// Counts and marks every frame, and notes those that are not pinned.
bool CoiommuDriver::Count(std::span<const PageRun> frames) {
  missing_.clear();
  for (size_t run = 0; run < frames.size(); ++run) {
    for (uint64_t frame = frames[run].first; frame < frames[run].end(); ++frame) {
      const auto word = TrackedWord(frame);
      uint32_t there = word.load();
      do {
        if ((there & domain::tracked::kCountMask) >= kMostMaps) {
          unmap(frames.first(run));
          const PageRun counted{frames[run].first, frame - frames[run].first};
          unmap({&counted, 1});
          return false;
        }
      } while (!word.compare_exchange_weak(there, (there + 1) | domain::tracked::kAccessed));
      if ((there & domain::tracked::kPinned) == 0) missing_.push_back(frame);
    }
  }
  return true;
}

bool CoiommuDriver::map(std::span<const PageRun> frames) {
  if (!Count(frames)) return false;
  for (size_t done = 0; done < missing_.size(); done += kMaxBatch) {
    Ask(std::span(missing_).subspan(done, std::min(kMaxBatch, missing_.size() - done)));
  }
  const bool is_pinned = std::all_of(missing_.begin(), missing_.end(), [&](uint64_t frame) {
    return (TrackedWord(frame).load() & domain::tracked::kPinned) != 0;
  });
  if (!is_pinned) unmap(frames);
  return is_pinned;
}

void CoiommuDriver::unmap(std::span<const PageRun> frames) {
  for (const PageRun& run : frames) {
    for (uint64_t frame = run.first; frame < run.end(); ++frame) TrackedWord(frame).fetch_sub(1);
  }
}

void CoiommuDriver::Ask(std::span<const uint64_t> frames) {
  ++notifications_;
  if (frames.size() == 1) return options_.ask(frames[0] << kFrameShift | options_.device);
  WordAt(batch_).store(options_.device);
  WordAt(batch_ + sizeof(uint64_t)).store(frames.size());
  for (size_t i = 0; i < frames.size(); ++i) {
    WordAt(batch_ + BatchBytes(i)).store(frames[i], std::memory_order_relaxed);
  }
  options_.ask((options_.start.value() + batch_) | kIsBatch);
}

}  // namespace mvgpu::backend
