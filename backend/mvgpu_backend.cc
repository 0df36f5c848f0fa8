// mvgpu-backend: the device process that a VMM connects to. This file is its main loop: sockets and
// signals.

#include <fmt/format.h>
#include <poll.h>
#include <signal.h>
#include <sys/signalfd.h>
#include <sys/socket.h>

#include <array>
#include <memory>
#include <optional>
#include <utility>

#include "apionly-domain/accounting/ledger.h"
#include "backend/backend_options.h"
#include "backend/log.h"
#include "backend/session.h"
#include "vmm-glue/vfio_user/listener.h"

namespace mvgpu::backend {
namespace {

// Signals arrive as reads of this descriptor, between two messages of the VMM, on the main thread.
// Must be made before any thread: they inherit the mask.
Result<UniqueFd> MakeSignalFd() {
  sigset_t signals;
  sigemptyset(&signals);
  for (const int number : {SIGTERM, SIGINT, SIGUSR1}) sigaddset(&signals, number);
  if (pthread_sigmask(SIG_BLOCK, &signals, nullptr) != 0)
    return FailSystem(errno, "pthread_sigmask");
  signal(SIGPIPE, SIG_IGN);
  UniqueFd fd(signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK));
  if (!fd.is_valid()) return FailSystem(errno, "signalfd");
  return fd;
}

// Where VMMs come from: our own listener, a listening descriptor that was passed in, or one
// connection.
class Door {
 public:
  static Result<Door> Open(const BackendOptions& options) {
    Door door;
    if (!options.socket_path.empty()) {
      MVGPU_ASSIGN_OR_RETURN(door.listener_,
                             glue::vfio_user::Listener::Create(options.socket_path));
      return door;
    }
    const auto option = [&options](int name) {
      int value = -1;
      socklen_t size = sizeof(value);
      return getsockopt(options.socket_fd, SOL_SOCKET, name, &value, &size) == 0 ? value : -1;
    };
    const int is_listening = option(SO_ACCEPTCONN);
    if (is_listening < 0) {
      return FailSystem(errno, fmt::format("descriptor {} is not a socket", options.socket_fd));
    }
    if (option(SO_DOMAIN) != AF_UNIX || option(SO_TYPE) != SOCK_STREAM) {
      return Fail(ErrorCode::kInvalid,
                  fmt::format("descriptor {} is not a unix stream socket", options.socket_fd));
    }
    (is_listening != 0 ? door.passed_listener_ : door.connection_).reset(options.socket_fd);
    return door;
  }

  // To be polled for reading; -1 when nobody else can come.
  int fd() const { return listener_ != nullptr ? listener_->fd() : passed_listener_.get(); }
  bool is_single_connection() const { return fd() < 0; }
  UniqueFd take_connection() { return std::move(connection_); }
  Result<UniqueFd> accept() {
    if (listener_ != nullptr) return listener_->accept();
    UniqueFd client(
        accept4(passed_listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!client.is_valid() && errno != EAGAIN && errno != ECONNABORTED)
      return FailSystem(errno, "accept");
    return client;
  }

 private:
  std::unique_ptr<glue::vfio_user::Listener> listener_;
  UniqueFd passed_listener_;
  UniqueFd connection_;
};

class MainLoop {
 public:
  MainLoop(BackendOptions options, Door door, UniqueFd signals, Log* log)
      : options_(std::move(options)),
        door_(std::move(door)),
        signals_(std::move(signals)),
        log_(*log) {}

  ExitCode run() {
    if (door_.is_single_connection()) {
      options_.once = true;
      Begin(door_.take_connection());
      if (session_ == nullptr) return ExitCode::kFailure;
    } else {
      SayWhereToConnect();
    }
    while (!leaving_) PollOnce();
    if (session_ != nullptr) End();
    return exit_code_;
  }

 private:
  void SayWhereToConnect() {
    log_.info(fmt::format("vm {}: waiting for a vmm on {}", options_.session.vgpu.vm_uuid,
                          options_.socket_path.empty()
                              ? fmt::format("descriptor {}", options_.socket_fd)
                              : options_.socket_path));
  }

  void PollOnce() {
    std::array<pollfd, 3> fds = {{{signals_.get(), POLLIN, 0},
                                  {door_.fd(), POLLIN, 0},
                                  {session_ != nullptr ? session_->fd() : -1, POLLIN, 0}}};
    if (poll(fds.data(), fds.size(), -1) < 0 && errno != EINTR) {
      log_.info(Error::System(errno, "poll").message());
      exit_code_ = ExitCode::kFailure;
      leaving_ = true;
      return;
    }
    if (fds[0].revents != 0) TakeSignals();
    if (fds[2].revents != 0 && !session_->service()) End();
    if (fds[1].revents != 0) Admit();
  }

  void TakeSignals() {
    signalfd_siginfo info;
    while (read(signals_.get(), &info, sizeof(info)) == sizeof(info)) {
      if (info.ssi_signo != SIGUSR1) {
        leaving_ = true;
      } else if (session_ != nullptr) {
        session_->take_screenshot();
      } else {
        log_.warn("no screenshot: no vm is connected");
      }
    }
  }

  void Admit() {
    auto client = door_.accept();
    if (!client) {
      log_.warn(client.error().message());
    } else if (client->is_valid() && session_ != nullptr) {
      log_.warn("a second vmm was turned away: one process serves one vm at a time");
    } else if (client->is_valid()) {
      Begin(std::move(*client));
    }
  }

  void Begin(UniqueFd socket) {
    Session::Options options = options_.session;
    // A trace holds one session: the second one of this process gets a file of its own.
    if (++sessions_ > 1 && !options.record_path.empty()) {
      options.record_path += fmt::format(".{}", sessions_);
    }
    auto session = Session::Create(std::move(options), std::move(socket), &log_);
    if (!session) {
      log_.warn(fmt::format("the vmm was turned away: {}", session.error().message()));
      return;
    }
    session_ = std::move(*session);
    log_.info("a vmm has connected");
  }

  void End() {
    if (!session_->finish()) exit_code_ = ExitCode::kFailure;
    session_.reset();
    if (options_.once) leaving_ = true;
    if (!leaving_) SayWhereToConnect();
  }

  BackendOptions options_;
  Door door_;
  const UniqueFd signals_;
  Log& log_;  // outlives this
  std::unique_ptr<Session> session_;
  uint64_t sessions_ = 0;
  bool leaving_ = false;
  ExitCode exit_code_ = ExitCode::kOk;
};

ExitCode Main(int argc, const char* const* argv) {
  auto options = ParseCommandLine(argc, argv);
  if (!options) return options.error();
  Log log("mvgpu-backend");
  auto signals = MakeSignalFd();
  if (!signals) {
    log.info(signals.error().message());
    return ExitCode::kFailure;
  }
  // These are opened here once, so that what cannot be kept is noticed before a VM is there.
  const VgpuConfig& vgpu = options->session.vgpu;
  if (auto ledger = domain::Ledger::Open({vgpu.runtime_dir, vgpu.vm_uuid}); !ledger) {
    log.info(ledger.error().message());
    return ledger.error().code() == ErrorCode::kInvalid ? ExitCode::kUsage : ExitCode::kFailure;
  }
  if (const auto parts = Vgpu::MakeParts(vgpu); !parts) {
    log.info(parts.error().message());
    return ExitCode::kFailure;
  }
  if (const std::string& path = options->session.record_path; !path.empty()) {
    if (auto writable = TraceWriter::CheckPath(path); !writable) {
      log.info(writable.error().message());
      return ExitCode::kFailure;
    }
  }
  auto door = Door::Open(*options);
  if (!door) {
    log.info(door.error().message());
    return ExitCode::kSocket;
  }
  return MainLoop(std::move(*options), std::move(*door), std::move(*signals), &log).run();
}

}  // namespace
}  // namespace mvgpu::backend

int main(int argc, char** argv) { return static_cast<int>(mvgpu::backend::Main(argc, argv)); }
