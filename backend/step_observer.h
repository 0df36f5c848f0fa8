#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "backend/session_observer.h"

namespace mvgpu::backend {

// Keeps what an attempt at a step makes known until it is clear whether the attempt counts: a step
// that has to be tried again is seen once. Everything else goes straight to the observer behind it.
// Not thread-safe; see SessionObserver.
class StepObserver final : public SessionObserver {
 public:
  // `observer` outlives this.
  explicit StepObserver(SessionObserver* observer) : observer_(*observer) {}

  void begin_attempt();
  // The attempt was in vain.
  void drop();
  // The attempt was the step.
  void pass_on();

  void on_guest_read(Iova iova, std::span<const std::byte> bytes) override;
  void on_request(uint16_t queue, std::span<const std::byte> bytes) override;
  void on_response(uint16_t queue, std::span<const std::byte> bytes) override;
  void on_frame(uint32_t scanout, gpu::Size size, uint64_t hash) override;

  void on_map(IovaRange range, domain::Access access, const Backing& backing) override {
    observer_.on_map(range, access, backing);
  }
  void on_unmap(Iova start, uint64_t size) override { observer_.on_unmap(start, size); }
  void on_unmap_all() override { observer_.on_unmap_all(); }
  void on_region_write(uint32_t region, uint64_t offset, std::span<const std::byte> data) override {
    observer_.on_region_write(region, offset, data);
  }
  void on_region_read(uint32_t region, uint64_t offset,
                      std::span<const std::byte> answer) override {
    observer_.on_region_read(region, offset, answer);
  }
  void on_irqs(uint32_t irq, TraceIrqOp operation, uint32_t start, uint32_t count) override {
    observer_.on_irqs(irq, operation, start, count);
  }
  void on_reset() override { observer_.on_reset(); }
  void on_step(uint16_t queue) override { observer_.on_step(queue); }
  void on_accounts(const AccountFigures& figures) override { observer_.on_accounts(figures); }

 private:
  enum class Kind : uint8_t { kGuestRead, kRequest, kResponse, kFrame };
  struct Event {
    Kind kind;
    uint32_t number = 0;  // of the queue or the scanout
    Iova iova{};
    gpu::Size size{};
    uint64_t hash = 0;
    size_t bytes = 0;  // in bytes_, behind those of the event before
  };
  // False: not in an attempt.
  bool Keep(Event event, std::span<const std::byte> bytes);

  SessionObserver& observer_;  // outlives this, see above
  bool is_attempt_ = false;
  std::vector<Event> events_;
  std::vector<std::byte> bytes_;
};

}  // namespace mvgpu::backend
