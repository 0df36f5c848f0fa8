#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "apionly-domain/api_only_domain.h"
#include "apionly-domain/container.h"
#include "backend/trace/trace_accounts.h"
#include "backend/trace/trace_format.h"
#include "gpu-model/display/display.h"

namespace mvgpu::backend {

// Sees everything that crosses the boundary of a vGPU during one VM session: what the VMM and the
// guest do to it, the guest bytes it reads, and what comes out. A recorder writes it down, a replay
// compares it.
//
// All calls come with the vGPU's lock held, in the order in which things took effect; only what
// succeeded is reported. Implementations must not call back into the vGPU.
class SessionObserver : public domain::AccessObserver {
 public:
  // The file behind a mapping; all zero where there is none.
  struct Backing {
    domain::FileIdentity identity;
    uint64_t offset = 0;     // bytes
    uint64_t file_size = 0;  // bytes
    bool exists = false;
  };

  virtual void on_map(IovaRange range, domain::Access access, const Backing& backing) = 0;
  virtual void on_unmap(Iova start, uint64_t size) = 0;
  virtual void on_unmap_all() = 0;
  virtual void on_region_write(uint32_t region, uint64_t offset,
                               std::span<const std::byte> data) = 0;
  virtual void on_region_read(uint32_t region, uint64_t offset,
                              std::span<const std::byte> answer) = 0;
  virtual void on_irqs(uint32_t irq, TraceIrqOp operation, uint32_t start, uint32_t count) = 0;
  virtual void on_reset() = 0;
  // Ends the work on one request of the queue: guest reads, request, response and frames came
  // before.
  virtual void on_step(uint16_t queue) = 0;
  virtual void on_request(uint16_t queue, std::span<const std::byte> bytes) = 0;
  virtual void on_response(uint16_t queue, std::span<const std::byte> bytes) = 0;
  virtual void on_frame(uint32_t scanout, gpu::Size size, uint64_t hash) = 0;
  // The accounts after whatever changed them.
  virtual void on_accounts(const AccountFigures& figures) = 0;
};

}  // namespace mvgpu::backend
