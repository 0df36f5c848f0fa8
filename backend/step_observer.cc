#include "backend/step_observer.h"

namespace mvgpu::backend {

void StepObserver::begin_attempt() {
  drop();
  is_attempt_ = true;
}

void StepObserver::drop() {
  is_attempt_ = false;
  events_.clear();
  bytes_.clear();
}

void StepObserver::pass_on() {
  std::span<const std::byte> rest(bytes_);
  for (const Event& event : events_) {
    const auto bytes = rest.first(event.bytes);
    rest = rest.subspan(event.bytes);
    switch (event.kind) {
      case Kind::kGuestRead:
        observer_.on_guest_read(event.iova, bytes);
        break;
      case Kind::kRequest:
        observer_.on_request(static_cast<uint16_t>(event.number), bytes);
        break;
      case Kind::kResponse:
        observer_.on_response(static_cast<uint16_t>(event.number), bytes);
        break;
      case Kind::kFrame:
        observer_.on_frame(event.number, event.size, event.hash);
        break;
    }
  }
  drop();
}

bool StepObserver::Keep(Event event, std::span<const std::byte> bytes) {
  if (!is_attempt_) return false;
  event.bytes = bytes.size();
  events_.push_back(event);
  bytes_.insert(bytes_.end(), bytes.begin(), bytes.end());
  return true;
}

void StepObserver::on_guest_read(Iova iova, std::span<const std::byte> bytes) {
  if (!Keep({.kind = Kind::kGuestRead, .iova = iova}, bytes)) observer_.on_guest_read(iova, bytes);
}

void StepObserver::on_request(uint16_t queue, std::span<const std::byte> bytes) {
  if (!Keep({.kind = Kind::kRequest, .number = queue}, bytes)) observer_.on_request(queue, bytes);
}

void StepObserver::on_response(uint16_t queue, std::span<const std::byte> bytes) {
  if (!Keep({.kind = Kind::kResponse, .number = queue}, bytes)) observer_.on_response(queue, bytes);
}

void StepObserver::on_frame(uint32_t scanout, gpu::Size size, uint64_t hash) {
  if (!Keep({.kind = Kind::kFrame, .number = scanout, .size = size, .hash = hash}, {})) {
    observer_.on_frame(scanout, size, hash);
  }
}

}  // namespace mvgpu::backend
