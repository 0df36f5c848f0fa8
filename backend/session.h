#pragma once

#include <chrono>
#include <memory>
#include <string>

#include "apionly-domain/base/error.h"
#include "apionly-domain/base/unique_fd.h"
#include "backend/device_thread.h"
#include "backend/log.h"
#include "backend/trace/trace_writer.h"
#include "backend/vgpu.h"
#include "backend/vgpu_config.h"
#include "vmm-glue/vfio_user/dma_requests.h"
#include "vmm-glue/vfio_user/server.h"

namespace mvgpu::backend {

// One VMM, from its connection to its end: the vGPU, the server that it talks to, the device thread
// and the recording. Used by the thread that serves the VMM; the device thread is inside.
class Session final : private Vgpu::Owner, private glue::vfio_user::Server::Log {
 public:
  struct Options {
    VgpuConfig vgpu;
    std::string screenshot_path;  // empty: none
    std::string record_path;      // empty: none
  };

  // The log outlives the session. Errors: those of the parts; the VMM is disconnected then.
  static Result<std::unique_ptr<Session>> Create(Options options, UniqueFd socket,
                                                 backend::Log* log);
  ~Session() override;

  int fd() const { return server_->fd(); }
  // Serves what has arrived. False when the VMM has gone or broke the protocol beyond repair.
  bool service();
  // Has the device thread write the screenshot.
  void take_screenshot();
  // The VMM's end: writes the screenshot, releases everything, ends the recording, and says in one
  // line what is left, which is nothing. False when something was.
  bool finish();

 private:
  Session(Options options, backend::Log* log) : options_(std::move(options)), log_(*log) {}
  Result<void> Start(UniqueFd socket);
  std::unique_ptr<DeviceThread> MakeDeviceThread();
  void SaveScreenshot();
  bool Report();

  void on_doorbell(uint16_t queue) override { device_thread_->kick(queue); }
  void on_queue_error(uint16_t queue, const Error& error) override;
  void on_queue_waiting(uint16_t queue, const Error& error) override;
  void on_refused(const Error& error) override;
  void on_unsealed_memory(IovaRange range) override;
  void on_remote_memory(Iova first) override;
  void on_moved_pages(uint64_t pages) override;
  void warn(std::string_view line) override { log_.warn(line); }

  const Options options_;
  backend::Log& log_;  // outlives this, see Create()
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  // In the order of their making: each uses those above it.
  std::unique_ptr<TraceWriter> recorder_;
  glue::vfio_user::DmaRequests dma_requests_;
  std::unique_ptr<Vgpu> vgpu_;
  std::unique_ptr<DeviceThread> device_thread_;
  std::unique_ptr<glue::vfio_user::Server> server_;
};

}  // namespace mvgpu::backend
