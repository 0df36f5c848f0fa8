#include "apionly-domain/coiommu/coiommu_device.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <utility>

namespace mvgpu::domain {

namespace {

constexpr uint64_t kIsBatch = uint64_t{1} << 63;
constexpr uint32_t kFewestLevels = 2;

// As it stands in guest memory.
struct BatchHeader {
  uint16_t device;
  uint16_t unused[3];
  uint64_t frames;
};
static_assert(sizeof(BatchHeader) == 16);

}  // namespace

CoiommuDevice::CoiommuDevice(Options options, Parts parts)
    : options_(std::move(options)), parts_(parts) {}

void CoiommuDevice::write(uint64_t offset, uint64_t value) {
  if (offset >= kDoorbells && offset - kDoorbells < parts_.requests.size()) {
    return ring(offset - kDoorbells);
  }
  bool is_good = false;
  if (offset == kRoot || offset == kLevels) {
    MutexLock lock(mutex_);
    if (offset == kRoot && !root_ && value != 0 && value % kPageSize == 0) {
      root_ = value;
      is_good = true;
    } else if (offset == kLevels && !levels_ && value >= kFewestLevels &&
               value <= TrackingTable::kMostLevels) {
      levels_ = static_cast<uint32_t>(value);
      is_good = true;
    }
  } else if (offset == kCommand && value == kActivate) {
    is_good = Activate();
  } else if (offset == kCommand && value <= kUnpark) {
    if (value == kDeactivate) parts_.pins->deactivate();
    if (value != kDeactivate) parts_.pins->set_parked(value == kPark);
    is_good = true;
  }
  if (is_good) return;
  MutexLock lock(mutex_);
  ++counters_.bad_registers;
}

bool CoiommuDevice::Activate() {
  MutexLock lock(mutex_);
  if (!root_ || !levels_) return false;
  return parts_.pins->activate(TrackingTable(parts_.guest, *root_, *levels_)).has_value();
}

uint64_t CoiommuDevice::read(uint64_t offset) const {
  MutexLock lock(mutex_);
  if (offset == kRoot) return root_.value_or(0);
  if (offset == kLevels) return levels_.value_or(0);
  return 0;
}

std::vector<uint16_t> CoiommuDevice::topology() const {
  std::vector<uint16_t> words{static_cast<uint16_t>(options_.devices.size())};
  words.insert(words.end(), options_.devices.begin(), options_.devices.end());
  return words;
}

void CoiommuDevice::ring(size_t vcpu) {
  const std::atomic_ref<uint64_t> slot(parts_.requests[vcpu]);
  const uint64_t request = slot.load(std::memory_order_acquire);
  const auto pages = Handle(request);
  {
    MutexLock lock(mutex_);
    ++counters_.requests;
    counters_.pages += pages.value_or(0);
    if (!pages) ++counters_.bad_requests;
  }
  // Release: the guest looks into the table after it has seen this.
  slot.store(0, std::memory_order_release);
}

bool CoiommuDevice::IsTracked(uint16_t device) const {
  return std::find(options_.devices.begin(), options_.devices.end(), device) !=
         options_.devices.end();
}

std::optional<uint64_t> CoiommuDevice::Handle(uint64_t request) {
  if ((request & kIsBatch) != 0) return HandleBatch(Iova(request & ~kIsBatch));
  if (!IsTracked(static_cast<uint16_t>(request))) return std::nullopt;
  // What is not pinned does not say PINNED: the guest finds out there.
  static_cast<void>(parts_.pins->pin(request >> 16));
  return 1;
}

std::optional<uint64_t> CoiommuDevice::HandleBatch(Iova batch) {
  BatchHeader header{};
  if (!parts_.guest->read(batch, std::as_writable_bytes(std::span(&header, 1))))
    return std::nullopt;
  if (!IsTracked(header.device) || header.frames > options_.max_batch_pages) return std::nullopt;
  std::array<uint64_t, 512> frames{};
  for (uint64_t done = 0; done < header.frames;) {
    const auto part =
        std::span(frames).first(std::min<uint64_t>(frames.size(), header.frames - done));
    const Iova from = batch + (sizeof(header) + done * sizeof(uint64_t));
    if (!parts_.guest->read(from, std::as_writable_bytes(part))) return std::nullopt;
    for (const uint64_t frame : part) static_cast<void>(parts_.pins->pin(frame));
    done += part.size();
  }
  return header.frames;
}

CoiommuDevice::Counters CoiommuDevice::counters() const {
  MutexLock lock(mutex_);
  return counters_;
}

}  // namespace mvgpu::domain
