#include "tests/fakes/virtqueue_driver.h"

#include <cstring>

#include "apionly-domain/base/check.h"

namespace mvgpu::testing {

uint64_t GuestMemory::allocate(uint64_t size, uint64_t alignment) {
  const uint64_t start = (next_ + alignment - 1) & ~(alignment - 1);
  MVGPU_CHECK(start + size <= ram_->size());
  next_ = start + size;
  std::memset(ram_->at(start), 0, size);
  return iova_base_ + start;
}

void GuestMemory::put_bytes(uint64_t iova, std::span<const std::byte> bytes) {
  std::memcpy(ram_->at(iova - iova_base_), bytes.data(), bytes.size());
}

std::vector<std::byte> GuestMemory::get_bytes(uint64_t iova, size_t size) {
  const std::byte* start = ram_->at(iova - iova_base_);
  return {start, start + size};
}

DescriptorChainBuilder& DescriptorChainBuilder::readable(std::span<const std::byte> bytes) {
  const uint64_t address = memory_->allocate(bytes.size());
  memory_->put_bytes(address, bytes);
  return raw(address, static_cast<uint32_t>(bytes.size()), 0);
}

DescriptorChainBuilder& DescriptorChainBuilder::readable(std::string_view text) {
  return readable(std::as_bytes(std::span(text)));
}

DescriptorChainBuilder& DescriptorChainBuilder::writable(uint32_t size) {
  return raw(memory_->allocate(size), size, kVringDescWrite);
}

DescriptorChainBuilder& DescriptorChainBuilder::raw(uint64_t addr, uint32_t len, uint16_t flags) {
  descriptors_.push_back({addr, len, flags, 0});
  return *this;
}

VringDesc DescriptorChainBuilder::as_indirect() const {
  const auto size = static_cast<uint32_t>(16 * descriptors_.size());
  const uint64_t table = memory_->allocate(size);
  for (size_t i = 0; i < descriptors_.size(); ++i) {
    VringDesc descriptor = descriptors_[i];
    if (i + 1 < descriptors_.size()) {
      descriptor.flags |= kVringDescNext;
      descriptor.next = static_cast<uint16_t>(i + 1);
    }
    memory_->put(table + 16 * i, descriptor);
  }
  return {table, size, kVringDescIndirect, 0};
}

VirtqueueDriver::VirtqueueDriver(GuestMemory* memory, uint16_t size)
    : memory_(memory),
      size_(size),
      descriptors_(memory->allocate(16u * size)),
      available_(memory->allocate(6u + 2u * size)),
      used_(memory->allocate(6u + 8u * size)) {
  restart();
}

void VirtqueueDriver::restart() {
  for (uint16_t i = 0; i < size_; ++i) put_descriptor(i, {});
  const std::vector<std::byte> zeroes(6u + 8u * size_);
  memory_->put_bytes(available_, std::span(zeroes).first(6u + 2u * size_));
  memory_->put_bytes(used_, zeroes);
  available_index_ = notified_index_ = used_seen_ = 0;
  free_.clear();
  for (uint16_t i = size_; i > 0; --i) free_.push_back(static_cast<uint16_t>(i - 1));
  chains_.assign(size_, {});
}

uint16_t VirtqueueDriver::add(const DescriptorChainBuilder& chain) {
  const size_t count = chain.descriptors().size();
  MVGPU_CHECK(count > 0 && count <= free_.size());
  std::vector<uint16_t> taken;
  for (size_t i = 0; i < count; ++i) {
    taken.push_back(free_.back());
    free_.pop_back();
  }
  for (size_t i = 0; i < count; ++i) {
    VringDesc descriptor = chain.descriptors()[i];
    if (i + 1 < count) {
      descriptor.flags |= kVringDescNext;
      descriptor.next = taken[i + 1];
    }
    put_descriptor(taken[i], descriptor);
  }
  const uint16_t head = taken[0];
  chains_[head] = std::move(taken);
  make_available(head);
  return head;
}

uint16_t VirtqueueDriver::add_indirect(const DescriptorChainBuilder& chain) {
  const VringDesc table = chain.as_indirect();
  DescriptorChainBuilder single(memory_);
  return add(single.raw(table.addr, table.len, table.flags));
}

std::optional<VringUsedElem> VirtqueueDriver::take_used() {
  if (used_seen_ == used_index()) return std::nullopt;
  const auto element = memory_->get<VringUsedElem>(used_ + 4 + 8u * (used_seen_ % size_));
  ++used_seen_;
  MVGPU_CHECK(element.id < size_);
  for (const uint16_t descriptor : chains_[element.id]) free_.push_back(descriptor);
  chains_[element.id].clear();
  return element;
}

bool VirtqueueDriver::must_notify() {
  // virtio 1.2, 2.7.10.1, after Linux's vring_need_event().
  const uint16_t old = notified_index_;
  notified_index_ = available_index_;
  return static_cast<uint16_t>(available_index_ - available_event() - 1) <
         static_cast<uint16_t>(available_index_ - old);
}

void VirtqueueDriver::put_descriptor(uint16_t index, const VringDesc& descriptor) {
  memory_->put(descriptors_ + 16u * index, descriptor);
}

void VirtqueueDriver::make_available(uint16_t head) {
  memory_->put<uint16_t>(available_ + 4 + 2u * (available_index_ % size_), head);
  set_available_index(static_cast<uint16_t>(available_index_ + 1));
}

void VirtqueueDriver::set_available_index(uint16_t index) {
  available_index_ = index;
  memory_->put<uint16_t>(available_ + 2, index);
}

void VirtqueueDriver::set_no_interrupt(bool on) { memory_->put<uint16_t>(available_, on ? 1 : 0); }

void VirtqueueDriver::set_used_event(uint16_t event) {
  memory_->put<uint16_t>(available_ + 4 + 2u * size_, event);
}

uint16_t VirtqueueDriver::used_index() { return memory_->get<uint16_t>(used_ + 2); }

uint16_t VirtqueueDriver::available_event() {
  return memory_->get<uint16_t>(used_ + 4 + 8u * size_);
}

}  // namespace mvgpu::testing
