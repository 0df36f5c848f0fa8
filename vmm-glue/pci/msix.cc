#include "vmm-glue/pci/msix.h"

#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "apionly-domain/base/check.h"

namespace mvgpu::glue {

namespace {

// PCI Local Bus 3.0, 6.8.2 and 6.8.2.9.
struct CapabilityLayout {
  uint16_t control;
  uint32_t table;
  uint32_t pba;
} __attribute__((packed));
static_assert(sizeof(CapabilityLayout) == Msix::kCapabilityBodySize);

constexpr uint16_t kControlEnable = 0x8000;
constexpr uint16_t kControlFunctionMask = 0x4000;
constexpr uint16_t kMaxVectors = 2048;

constexpr size_t kTableEntrySize = 16;
constexpr size_t kVectorControl = 12;  // in an entry; bit 0 masks
constexpr std::byte kVectorMasked{1};

}  // namespace

Msix::Msix(uint16_t vectors) : vectors_(vectors), table_(vectors * kTableEntrySize) {
  MVGPU_CHECK(vectors > 0 && vectors <= kMaxVectors && table_.size() <= kPbaOffset);
  reset_table();
}

Msix::CapabilityBody Msix::capability_body(uint8_t bar) const {
  const CapabilityLayout layout{static_cast<uint16_t>(vector_count() - 1), kTableOffset | bar,
                                kPbaOffset | bar};
  CapabilityBody body;
  std::memcpy(body.data(), &layout, sizeof(layout));
  return body;
}

Msix::CapabilityBody Msix::CapabilityWritable() {
  const CapabilityLayout layout{kControlEnable | kControlFunctionMask, 0, 0};
  CapabilityBody body;
  std::memcpy(body.data(), &layout, sizeof(layout));
  return body;
}

void Msix::bind(uint16_t index, UniqueFd eventfd) {
  MVGPU_CHECK(index < vectors_.size());
  Vector& vector = vectors_[index];
  vector.eventfd = std::move(eventfd);
  vector.blocking =
      vector.eventfd.is_valid() && (fcntl(vector.eventfd.get(), F_GETFL) & O_NONBLOCK) == 0;
  if (vector.pending) Fire(vector);
}

void Msix::disable() {
  for (Vector& vector : vectors_) vector = Vector{};
}

void Msix::set_masked(uint16_t index, bool masked) {
  MVGPU_CHECK(index < vectors_.size());
  Vector& vector = vectors_[index];
  vector.masked = masked;
  if (vector.pending) Fire(vector);
}

void Msix::notify(uint16_t index) {
  if (index < vectors_.size()) Fire(vectors_[index]);
}

void Msix::clear_pending() {
  for (Vector& vector : vectors_) vector.pending = false;
}

void Msix::Fire(Vector& vector) {
  vector.pending = vector.masked || !vector.eventfd.is_valid();
  if (vector.pending) return;
  if (vector.blocking) {
    // The flag is shared with the VMM, so it is not ours to change. A counter that is full says the
    // same as one more.
    pollfd ready{vector.eventfd.get(), POLLOUT, 0};
    if (poll(&ready, 1, /*timeout=*/0) != 1 || (ready.revents & POLLOUT) == 0) return;
  }
  const uint64_t one = 1;
  ssize_t written;
  do {
    written = ::write(vector.eventfd.get(), &one, sizeof(one));
  } while (written < 0 && errno == EINTR);
  // EAGAIN: see above. Anything else: the VMM closed its end, and nobody waits for this interrupt.
}

void Msix::read(uint64_t offset, std::span<std::byte> data) const {
  std::fill(data.begin(), data.end(), std::byte{0});
  if (offset >= table_.size()) return;
  const size_t count = std::min<uint64_t>(data.size(), table_.size() - offset);
  std::copy_n(table_.begin() + static_cast<ptrdiff_t>(offset), count, data.begin());
}

void Msix::write(uint64_t offset, std::span<const std::byte> data) {
  if (offset >= table_.size()) return;
  const size_t count = std::min<uint64_t>(data.size(), table_.size() - offset);
  std::copy_n(data.begin(), count, table_.begin() + static_cast<ptrdiff_t>(offset));
}

void Msix::reset_table() {
  std::fill(table_.begin(), table_.end(), std::byte{0});
  for (size_t i = kVectorControl; i < table_.size(); i += kTableEntrySize)
    table_[i] = kVectorMasked;
}

}  // namespace mvgpu::glue
