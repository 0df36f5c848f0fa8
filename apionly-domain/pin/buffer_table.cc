#include "apionly-domain/pin/buffer_table.h"

#include <liburing.h>

#include <utility>

#include "apionly-domain/pin/pin_errors.h"

namespace mvgpu::domain {

namespace {

constexpr uint32_t kSlots = 16384;  // IORING_MAX_REG_BUFFERS of the kernel

class IoUringBufferTable final : public BufferTable {
 public:
  explicit IoUringBufferTable(const io_uring& ring) : ring_(ring) {}
  ~IoUringBufferTable() override { io_uring_queue_exit(&ring_); }
  IoUringBufferTable(const IoUringBufferTable&) = delete;
  IoUringBufferTable& operator=(const IoUringBufferTable&) = delete;

  uint32_t slots() const override { return kSlots; }
  int fill(uint32_t slot, std::byte* address, uint64_t size) override {
    return Update(slot, {address, size});
  }
  int empty(uint32_t slot) override { return Update(slot, {nullptr, 0}); }

 private:
  int Update(uint32_t slot, const iovec& buffer) {
    const int updated = io_uring_register_buffers_update_tag(&ring_, slot, &buffer, nullptr, 1);
    return updated < 0 ? -updated : 0;
  }

  io_uring ring_;
};

}  // namespace

Result<std::unique_ptr<BufferTable>> MakeIoUringBufferTable() {
  io_uring ring = {};
  // The smallest ring there is, and one that is not enabled: it holds buffers and takes no
  // requests.
  if (const int result = io_uring_queue_init(1, &ring, IORING_SETUP_R_DISABLED); result < 0)
    return tl::unexpected<Error>(IoUringSetupError(-result));
  std::unique_ptr<BufferTable> table = std::make_unique<IoUringBufferTable>(ring);
  if (const int result = io_uring_register_buffers_sparse(&ring, kSlots); result < 0)
    return tl::unexpected<Error>(IoUringSetupError(-result));
  return table;
}

}  // namespace mvgpu::domain
