#include "vmm-glue/virtio/split_queue.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <bit>

#include "apionly-domain/base/check.h"

namespace mvgpu::glue {

namespace {

Result<void> CheckArea(const char* name, Iova start, uint64_t size, uint64_t alignment) {
  if (start.value() % alignment == 0 && IovaRange::FromStartAndSize(start, size)) return {};
  return Fail(ErrorCode::kInvalid,
              fmt::format("{} of {} bytes at {:#x} must be aligned to {} and end below 2^64", name,
                          size, start.value(), alignment));
}

}  // namespace

void QueueRequest::Clear() {
  total_size_ = 0;
  readable_size_ = 0;
  writable_size_ = 0;
  readable_segments_.clear();
  writable_segments_.clear();
}

Result<std::unique_ptr<SplitQueue>> SplitQueue::Create(domain::ApiOnlyDomain* domain,
                                                       Options options) {
  const uint16_t size = options.size;
  if (!std::has_single_bit(size) || size > ring::kMaxQueueSize) {
    return Fail(ErrorCode::kInvalid, fmt::format("queue size {} is no power of two up to {}", size,
                                                 ring::kMaxQueueSize));
  }
  MVGPU_RETURN_IF_ERROR(CheckArea("descriptor table", options.descriptors,
                                  sizeof(ring::Descriptor) * size, ring::kDescriptorAlignment));
  MVGPU_RETURN_IF_ERROR(CheckArea("available ring", options.available, ring::AvailableSize(size),
                                  ring::kAvailableAlignment));
  MVGPU_RETURN_IF_ERROR(
      CheckArea("used ring", options.used, ring::UsedSize(size), ring::kUsedAlignment));
  return std::unique_ptr<SplitQueue>(new SplitQueue(domain, options));
}

template <typename T>
Result<T> SplitQueue::Read(Iova iova) const {
  T value;
  MVGPU_RETURN_IF_ERROR(domain_->read(iova, std::as_writable_bytes(std::span(&value, 1))));
  return value;
}

template <typename T>
Result<void> SplitQueue::Write(Iova iova, const T& value) {
  return domain_->write(iova, std::as_bytes(std::span(&value, 1)));
}

Result<bool> SplitQueue::pop(QueueRequest* request) {
  seen_before_pop_ = seen_available_;
  auto popped = TryPop(request);
  // The index is read again with the rest: what a request is made of is read in one go.
  if (!popped && popped.error().code() == ErrorCode::kPending) seen_available_ = seen_before_pop_;
  return popped;
}

void SplitQueue::unpop() {
  --next_available_;
  seen_available_ = seen_before_pop_;
}

Result<bool> SplitQueue::TryPop(QueueRequest* request) {
  MVGPU_ASSIGN_OR_RETURN(const bool available, LookForAvailable());
  if (!available) return false;
  const uint16_t slot = next_available_ & static_cast<uint16_t>(options_.size - 1);
  MVGPU_ASSIGN_OR_RETURN(const uint16_t head,
                         Read<uint16_t>(options_.available + ring::AvailableEntry(slot)));
  if (head >= options_.size) {
    return Fail(ErrorCode::kInvalid, fmt::format("descriptor {} is made available in a queue of {}",
                                                 head, options_.size));
  }
  request->Clear();
  request->head_ = head;
  MVGPU_RETURN_IF_ERROR(WalkChain(request));
  MVGPU_RETURN_IF_ERROR(CopyReadable(request));
  MVGPU_RETURN_IF_ERROR(CheckRoomForResponse(*request));
  ++next_available_;
  return true;
}

Result<bool> SplitQueue::LookForAvailable() {
  if (seen_available_ != next_available_) return true;
  // Before the index is looked at, the driver is told to notify from here on (2.7.10): what it adds
  // before it sees this is found below, what it adds later is announced. Written ahead of each
  // look, one look is enough, and a driver that adds while a request is under way need not notify.
  if (options_.event_idx && available_event_ != next_available_) {
    MVGPU_RETURN_IF_ERROR(
        Write(options_.used + ring::AvailableEvent(options_.size), next_available_));
    available_event_ = next_available_;
  }
  // The store above and the load below are not to be swapped.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  MVGPU_ASSIGN_OR_RETURN(const uint16_t index,
                         Read<uint16_t>(options_.available + ring::kAvailableIndex));
  // The entries are read after the index (2.7.13.3).
  std::atomic_thread_fence(std::memory_order_acquire);
  const uint16_t waiting = static_cast<uint16_t>(index - next_available_);
  if (waiting > options_.size) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("available index jumped from {} to {} in a queue of {}",
                            next_available_, index, options_.size));
  }
  seen_available_ = index;
  return waiting != 0;
}

Result<void> SplitQueue::WalkChain(QueueRequest* request) {
  uint16_t index = request->head_;
  for (uint32_t steps = 0; steps < options_.size; ++steps) {
    MVGPU_ASSIGN_OR_RETURN(
        const ring::Descriptor descriptor,
        Read<ring::Descriptor>(options_.descriptors + sizeof(ring::Descriptor) * index));
    if ((descriptor.flags & ring::kDescriptorIndirect) != 0) {
      return WalkIndirectTable(descriptor, request);
    }
    MVGPU_RETURN_IF_ERROR(AddSegment(descriptor, request));
    if ((descriptor.flags & ring::kDescriptorNext) == 0) return {};
    index = descriptor.next;
    if (index >= options_.size) {
      return Fail(ErrorCode::kInvalid,
                  fmt::format("chain {} goes on at descriptor {} in a queue of {}", request->head_,
                              index, options_.size));
    }
  }
  return Fail(ErrorCode::kInvalid,
              fmt::format("chain {} has more than {} descriptors: it is a loop", request->head_,
                          options_.size));
}

// 2.7.5.3: a table ends the chain, and holds no table itself. Its write flag means nothing.
Result<void> SplitQueue::WalkIndirectTable(const ring::Descriptor& table, QueueRequest* request) {
  constexpr uint32_t kEntrySize = sizeof(ring::Descriptor);
  const uint32_t count = table.length / kEntrySize;
  if (!options_.indirect || (table.flags & ring::kDescriptorNext) != 0 || count == 0 ||
      table.length % kEntrySize != 0 || count > kMaxIndirectDescriptors) {
    return Fail(
        ErrorCode::kInvalid,
        fmt::format("indirect table of {} bytes with flags {:#x} in chain {}: it must be the last "
                    "descriptor, with 1 to {} entries of 16 bytes, and have been negotiated ({})",
                    table.length, table.flags, request->head_, kMaxIndirectDescriptors,
                    options_.indirect));
  }
  indirect_.resize(count);
  MVGPU_RETURN_IF_ERROR(
      domain_->read(Iova(table.address), std::as_writable_bytes(std::span(indirect_))));
  uint32_t index = 0;
  for (uint32_t steps = 0; steps < count; ++steps) {
    const ring::Descriptor& descriptor = indirect_[index];
    if ((descriptor.flags & ring::kDescriptorIndirect) != 0) {
      return Fail(ErrorCode::kInvalid,
                  fmt::format("entry {} of the indirect table of chain {} is a table", index,
                              request->head_));
    }
    MVGPU_RETURN_IF_ERROR(AddSegment(descriptor, request));
    if ((descriptor.flags & ring::kDescriptorNext) == 0) return {};
    index = descriptor.next;
    if (index >= count) {
      return Fail(ErrorCode::kInvalid,
                  fmt::format("the indirect table of chain {} goes on at entry {} of {}",
                              request->head_, index, count));
    }
  }
  return Fail(
      ErrorCode::kInvalid,
      fmt::format("the indirect table of chain {} is a loop in {} entries", request->head_, count));
}

Result<void> SplitQueue::AddSegment(const ring::Descriptor& descriptor, QueueRequest* request) {
  const auto segment = IovaRange::FromStartAndSize(Iova(descriptor.address), descriptor.length);
  if (!segment) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("descriptor of {} bytes at {:#x} in chain {} is empty or wraps",
                            descriptor.length, descriptor.address, request->head_));
  }
  request->total_size_ += descriptor.length;  // cannot wrap: below 2^16 + 2^10 lengths below 2^32
  if (request->total_size_ > uint64_t{1} << 32) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("chain {} is longer than 2^32 bytes", request->head_));  // 2.7.5
  }
  if ((descriptor.flags & ring::kDescriptorWrite) != 0) {
    const uint32_t room = kMaxWritableBytes - request->writable_size_;
    const uint32_t usable = std::min(descriptor.length, room);
    if (usable == 0) return {};
    request->writable_segments_.push_back(
        IovaRange::FromFirstAndLast(segment->start(), segment->start() + (usable - 1)));
    request->writable_size_ += usable;
    return {};
  }
  if (!request->writable_segments_.empty()) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("chain {} has a readable descriptor behind a writable one",
                            request->head_));  // 2.7.4.2
  }
  if (descriptor.length > kMaxReadableBytes - request->readable_size_) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("request {} of {} bytes or more exceeds the limit of {}",
                            request->head_, request->total_size_, kMaxReadableBytes));
  }
  request->readable_segments_.push_back(*segment);
  request->readable_size_ += descriptor.length;
  return {};
}

Result<void> SplitQueue::CopyReadable(QueueRequest* request) const {
  if (request->data_.size() < request->readable_size_)
    request->data_.resize(request->readable_size_);
  std::span<std::byte> rest(request->data_);
  Result<void> outcome;
  for (const IovaRange& segment : request->readable_segments_) {
    auto read = domain_->read(segment.start(), rest.first(segment.size()));
    if (!read) {
      if (read.error().code() != ErrorCode::kPending) return read;
      outcome = std::move(read);  // goes on, so that all segments are asked for at once
    }
    rest = rest.subspan(segment.size());
  }
  return outcome;
}

Result<void> SplitQueue::CheckRoomForResponse(const QueueRequest& request) const {
  for (const IovaRange& segment : request.writable_segments_) {
    MVGPU_RETURN_IF_ERROR(domain_->check_copy(segment, domain::Access::kWrite));
  }
  const auto used = IovaRange::FromStartAndSize(options_.used, ring::UsedEntry(options_.size));
  return domain_->check_copy(*used, domain::Access::kWrite);  // in range: checked by Create()
}

Result<void> SplitQueue::respond(const QueueRequest& request, std::span<const std::byte> response) {
  MVGPU_CHECK(response.size() <= request.writable_size());
  for (const IovaRange& segment : request.writable_segments_) {
    if (response.empty()) break;
    const size_t count = std::min<uint64_t>(response.size(), segment.size());
    MVGPU_RETURN_IF_ERROR(domain_->write(segment.start(), response.first(count)));
    response = response.subspan(count);
  }
  return {};
}

Result<bool> SplitQueue::push(const QueueRequest& request, uint32_t written) {
  const uint16_t slot = used_ & static_cast<uint16_t>(options_.size - 1);
  const ring::UsedElement element{request.head_, written};
  MVGPU_RETURN_IF_ERROR(Write(options_.used + ring::UsedEntry(slot), element));
  const uint16_t next = static_cast<uint16_t>(used_ + 1);
  // publish() orders the response and the element before the index (2.7.8.2).
  MVGPU_RETURN_IF_ERROR(
      domain_->publish(options_.used + ring::kUsedIndex, std::as_bytes(std::span(&next, 1))));
  used_ = next;
  return DriverWantsInterrupt();
}

// 2.7.7.2. Every push asks, so with VIRTIO_F_EVENT_IDX the entry just used is the only one that can
// match. What has been pushed cannot be undone, so a word that is not at hand counts as a yes.
Result<bool> SplitQueue::DriverWantsInterrupt() const {
  std::atomic_thread_fence(
      std::memory_order_seq_cst);  // used.idx is out before the driver's wish is read
  const auto word =
      Read<uint16_t>(options_.available +
                     (options_.event_idx ? ring::UsedEvent(options_.size) : ring::kAvailableFlags));
  if (!word && word.error().code() == ErrorCode::kPending) return true;
  if (!word) return tl::unexpected<Error>(word.error());
  if (options_.event_idx) return *word == static_cast<uint16_t>(used_ - 1);
  return (*word & ring::kAvailableNoInterrupt) == 0;
}

}  // namespace mvgpu::glue
