#include "backend/session.h"

#include <fmt/format.h>

#include <utility>

namespace mvgpu::backend {

namespace {

// How long a device may go on with the address of a page that the kernel has moved, at least.
constexpr std::chrono::seconds kRecheckPeriod(1);

}  // namespace

Result<std::unique_ptr<Session>> Session::Create(Options options, UniqueFd socket,
                                                 backend::Log* log) {
  std::unique_ptr<Session> session(new Session(std::move(options), log));
  MVGPU_RETURN_IF_ERROR(session->Start(std::move(socket)));
  return session;
}

Result<void> Session::Start(UniqueFd socket) {
  if (!options_.record_path.empty()) {
    MVGPU_ASSIGN_OR_RETURN(recorder_, TraceWriter::Create(options_.record_path));
    recorder_->session(options_.vgpu.to_json());
  }
  MVGPU_ASSIGN_OR_RETURN(Vgpu::Parts parts, Vgpu::MakeParts(options_.vgpu));
  parts.remote = &dma_requests_;
  MVGPU_ASSIGN_OR_RETURN(vgpu_,
                         Vgpu::Create(options_.vgpu, std::move(parts), recorder_.get(), this));
  device_thread_ = MakeDeviceThread();
  MVGPU_ASSIGN_OR_RETURN(server_,
                         glue::vfio_user::Server::Create(std::move(socket), vgpu_.get(), this,
                                                         {.dma_requests = &dma_requests_}));
  return {};
}

std::unique_ptr<DeviceThread> Session::MakeDeviceThread() {
  DeviceThread::Chore chore;
  if (options_.vgpu.pages_may_move()) {
    chore = {.run = [this] { return vgpu_->recheck(); }, .period = kRecheckPeriod};
  }
  return std::make_unique<DeviceThread>([this](uint16_t queue) { return vgpu_->step(queue); },
                                        std::move(chore));
}

// Where Create() failed half-way there may be no server yet; everything else stands as finish()
// left it.
Session::~Session() {
  dma_requests_.close();  // the device thread may be waiting for an answer
  if (device_thread_ != nullptr) device_thread_->stop();
  server_.reset();
}

bool Session::service() {
  const Result<bool> alive = server_->service();
  if (!alive) log_.warn(fmt::format("the vmm is disconnected: {}", alive.error().message()));
  return alive.has_value() && *alive;
}

void Session::take_screenshot() {
  device_thread_->post([this] { SaveScreenshot(); });
}

void Session::SaveScreenshot() {
  if (options_.screenshot_path.empty()) {
    log_.warn("no screenshot: start with --screenshot=FILE.png");
    return;
  }
  if (auto saved = vgpu_->picture().save_png(options_.screenshot_path); !saved) {
    log_.warn(fmt::format("no screenshot: {}", saved.error().message()));
    return;
  }
  log_.info(fmt::format("screenshot written to {}", options_.screenshot_path));
}

bool Session::finish() {
  dma_requests_.close();  // the device thread may be waiting for an answer
  device_thread_->stop();
  if (!options_.screenshot_path.empty()) SaveScreenshot();
  server_.reset();  // unbinds the interrupts, resets the device, unmaps everything
  if (recorder_ != nullptr) {
    if (auto written = recorder_->finish(vgpu_->session_json()); !written) {
      log_.warn(written.error().message());
    } else {
      log_.info(fmt::format("trace of {} records written to {} ({} bytes)", recorder_->records(),
                            recorder_->path(), recorder_->file_bytes()));
    }
  }
  return Report();
}

bool Session::Report() {
  const Vgpu::Counters now = vgpu_->counters();
  device_thread_.reset();
  vgpu_.reset();  // leaves the ledger: the line below is true for whoever reads the accounts after
                  // it
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  const std::string left =
      fmt::format("{} pages mapped, {} pinned, {} charged, {} cached, {} resources left",
                  now.domain.mapped_pages, now.domain.pinned_pages, now.domain.charged_pages,
                  now.cache.cached_pages, now.gpu.resources);
  const std::string did =
      fmt::format("it ran {} commands and {} frames, and pinned at most {} pages",
                  now.gpu.control_commands + now.gpu.cursor_commands, now.gpu.frames,
                  now.domain.peak_unique_pages);
  log_.info(fmt::format("the vm is gone after {:.1f} s: {}; {}", seconds, left, did));
  return now.all_released();
}

void Session::on_queue_error(uint16_t queue, const Error& error) {
  log_.warn(fmt::format("{}: queue {} stands still until the guest resets the device: {}",
                        options_.vgpu.name, queue, error.message()));
}

void Session::on_queue_waiting(uint16_t queue, const Error& error) {
  log_.warn(fmt::format("{}: queue {} waits until the vmm maps memory again: {}",
                        options_.vgpu.name, queue, error.message()));
}

void Session::on_unsealed_memory(IovaRange range) {
  log_.info(fmt::format(
      "{}: the memory at iova {:#x}-{:#x} is not sealed: if the vmm shrinks its file, "
      "requests that touch it fail; seal it (qemu: memory-backend-memfd,seal=on) to rule that out",
      options_.vgpu.name, range.start().value(), range.last().value()));
}

void Session::on_remote_memory(Iova first) {
  log_.info(fmt::format(
      "{}: the vm's memory at iova {:#x} has no file: the vmm is asked for every access, which is "
      "slow, and nothing there can be pinned; give the vm shared memory (qemu: "
      "memory-backend-memfd,share=on)",
      options_.vgpu.name, first.value()));
}

void Session::on_moved_pages(uint64_t pages) {
  log_.warn(fmt::format(
      "{}: the kernel moved {} pages that mlock held, and the device had their old addresses; they "
      "are taken away from it; use --pin=io-uring, which keeps pages in place",
      options_.vgpu.name, pages));
}

void Session::on_refused(const Error& error) {
  log_.warn(
      fmt::format("{}: a guest command was refused: {}", options_.vgpu.name, error.message()));
}

}  // namespace mvgpu::backend
