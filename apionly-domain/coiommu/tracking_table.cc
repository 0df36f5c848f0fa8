#include "apionly-domain/coiommu/tracking_table.h"

#include <fmt/format.h>

#include <span>

namespace mvgpu::domain {

namespace {

constexpr uint64_t kPresent = 1;
constexpr unsigned kTries = 64;
constexpr uint64_t kWordMask = 0xffff'ffff;

// A word is the lower or the upper half of 8 bytes.
Iova PairOf(Iova word) { return Iova(word.value() & ~uint64_t{7}); }
unsigned ShiftOf(Iova word) { return static_cast<unsigned>(word.value() & 4) * 8; }

}  // namespace

Result<Iova> TrackingTable::find(uint64_t frame) const {
  if (frame >> (kLeafBits + kUpperBits * (levels_ - 1)) != 0) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("frame {:#x} is beyond a tracking table of {} levels", frame, levels_));
  }
  uint64_t table = root_;
  for (unsigned level = levels_ - 1; level > 0; --level) {
    uint64_t entry = 0;
    MVGPU_RETURN_IF_ERROR(memory_->load_words(Iova(table + IndexOf(frame, level) * sizeof(entry)),
                                              std::span(&entry, 1)));
    if ((entry & kPresent) == 0) {
      return Fail(
          ErrorCode::kNotMapped,
          fmt::format("the tracking table at {:#x} has no words for frame {:#x}", root_, frame));
    }
    table = entry & ~kPageMask;
  }
  return Iova(table + IndexOf(frame, 0) * sizeof(uint32_t));
}

Result<uint32_t> TrackingTable::load(Iova word) const {
  uint64_t pair = 0;
  MVGPU_RETURN_IF_ERROR(memory_->load_words(PairOf(word), std::span(&pair, 1)));
  return static_cast<uint32_t>(pair >> ShiftOf(word));
}

Result<uint32_t> TrackingTable::compare_exchange(Iova word, uint32_t expected, uint32_t desired) {
  const unsigned shift = ShiftOf(word);
  uint64_t pair = 0;
  MVGPU_RETURN_IF_ERROR(memory_->load_words(PairOf(word), std::span(&pair, 1)));
  for (unsigned tries = 0; tries < kTries; ++tries) {
    const auto there = static_cast<uint32_t>(pair >> shift);
    if (there != expected) return there;
    const uint64_t changed = (pair & ~(kWordMask << shift)) | uint64_t{desired} << shift;
    MVGPU_ASSIGN_OR_RETURN(const uint64_t was,
                           memory_->compare_exchange(PairOf(word), pair, changed));
    if (was == pair) return expected;
    pair = was;
  }
  return Fail(ErrorCode::kBusy,
              fmt::format("the guest changes the words around {:#x} all the time", word.value()));
}

Result<uint32_t> TrackingTable::change(Iova word, uint32_t clear, uint32_t set) {
  MVGPU_ASSIGN_OR_RETURN(uint32_t there, load(word));
  for (unsigned tries = 0; tries < kTries; ++tries) {
    const uint32_t changed = (there & ~clear) | set;
    if (changed == there) return there;
    MVGPU_ASSIGN_OR_RETURN(const uint32_t was, compare_exchange(word, there, changed));
    if (was == there) return was;
    there = was;
  }
  return Fail(ErrorCode::kBusy,
              fmt::format("the guest changes the word at {:#x} all the time", word.value()));
}

}  // namespace mvgpu::domain
