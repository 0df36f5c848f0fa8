#include "apionly-domain/viommu/invalidation_queue.h"

#include <array>
#include <span>

namespace mvgpu::domain {

void InvalidationQueue::disable() {
  is_enabled_ = false;
  head_ = 0;
}

std::optional<QueueError> InvalidationQueue::CheckTail() const {
  if (tail_ >= Size()) return QueueError::kTail;
  if (tail_ % (Words() * sizeof(uint64_t)) != 0) return QueueError::kAlignment;
  // The head can be out of place too: after a change of the address while the queue was enabled.
  if (head_ >= Size() || head_ % (Words() * sizeof(uint64_t)) != 0) return QueueError::kUnknown;
  return std::nullopt;
}

void InvalidationQueue::run(uint64_t most) {
  if (is_running_) return;
  is_running_ = true;
  for (uint64_t done = 0; done < most && has_more(); ++done) {
    error_ = CheckTail();
    if (!error_) error_ = DoOne();
    if (error_) {
      owner_.on_queue_error(*error_);
    } else if (is_enabled_) {
      head_ = (head_ + Words() * sizeof(uint64_t)) % Size();
    }
  }
  is_running_ = false;
}

std::optional<QueueError> InvalidationQueue::DoOne() {
  std::array<uint64_t, kMostWords> storage;
  const auto words = std::span(storage).first(Words());
  if (!memory_.load(Base() + head_, words)) return QueueError::kFetch;
  const auto descriptor = DecodeInvalidation(words, rules_);
  if (!descriptor) return descriptor.error();
  if (const auto* wait = std::get_if<InvalidationWait>(&*descriptor)) return Wait(*wait);
  owner_.on_invalidation(*descriptor);
  return std::nullopt;
}

std::optional<QueueError> InvalidationQueue::Wait(const InvalidationWait& wait) {
  if (wait.status_address && !owner_.write_status(*wait.status_address, wait.status)) {
    return QueueError::kUnknown;
  }
  if (wait.interrupts) owner_.on_wait_complete();
  return std::nullopt;
}

}  // namespace mvgpu::domain
