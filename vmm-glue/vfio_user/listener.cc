#include "vmm-glue/vfio_user/listener.h"

#include <fmt/format.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string_view>
#include <utility>

namespace mvgpu::glue::vfio_user {

namespace {

constexpr mode_t kMode = S_IRUSR | S_IWUSR;
constexpr int kBacklog = 1;  // one client at a time

Result<sockaddr_un> AddressOf(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  // An empty path or a leading NUL would mean an abstract socket, which has no mode.
  if (path.empty() || path.find('\0') != std::string::npos) {
    return Fail(ErrorCode::kInvalid, "socket path is empty or contains a NUL, give a file name");
  }
  if (path.size() >= sizeof(address.sun_path)) {
    return Fail(
        ErrorCode::kInvalid,
        fmt::format("socket path {} has {} bytes, at most {} are possible, choose a shorter one",
                    path, path.size(), sizeof(address.sun_path) - 1));
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  return address;
}

Result<UniqueFd> NewSocket() {
  UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd.is_valid()) return FailSystem(errno, "cannot create a unix socket");
  return fd;
}

// Makes room at the path, if what is there is a socket that nobody listens on.
Result<void> RemoveStaleSocket(const std::string& path, const sockaddr_un& address) {
  struct stat found {};
  if (lstat(path.c_str(), &found) != 0) {
    if (errno == ENOENT) return {};
    return FailSystem(errno, fmt::format("cannot look at socket path {}", path));
  }
  if (!S_ISSOCK(found.st_mode)) {
    return Fail(
        ErrorCode::kInvalid,
        fmt::format("{} exists and is not a socket, remove it or choose another path", path));
  }
  MVGPU_ASSIGN_OR_RETURN(const UniqueFd probe, NewSocket());
  const int refused =
      connect(probe.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0
          ? 0
          : errno;
  if (refused == ENOENT) return {};
  if (refused == 0 || refused == EAGAIN || refused == EPROTOTYPE) {
    return Fail(ErrorCode::kBusy,
                fmt::format("another process listens on {}, stop it or choose another path", path));
  }
  if (refused != ECONNREFUSED) {
    return FailSystem(refused, fmt::format("cannot find out who listens on {}", path));
  }
  if (unlink(path.c_str()) != 0 && errno != ENOENT) {
    return FailSystem(errno, fmt::format("cannot remove the old socket {}", path));
  }
  return {};
}

}  // namespace

Result<std::unique_ptr<Listener>> Listener::Create(std::string path) {
  MVGPU_ASSIGN_OR_RETURN(const sockaddr_un address, AddressOf(path));
  MVGPU_RETURN_IF_ERROR(RemoveStaleSocket(path, address));
  MVGPU_ASSIGN_OR_RETURN(UniqueFd socket, NewSocket());
  // Linux gives the file the socket's own mode less the umask, so that it is never open to others,
  // not even for a moment. A umask that takes away from the owner too is made up for afterwards.
  if (fchmod(socket.get(), kMode) != 0) return FailSystem(errno, "cannot set the socket's mode");
  if (bind(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
    return FailSystem(errno, fmt::format("cannot create socket {}", path));
  }
  struct stat created {};
  if (lstat(path.c_str(), &created) != 0) {
    return FailSystem(errno, fmt::format("socket {} has gone at once", path));
  }
  // From here on the destructor removes the file.
  auto listener = std::unique_ptr<Listener>(
      new Listener(std::move(path), std::move(socket), created.st_dev, created.st_ino));
  if ((created.st_mode & ALLPERMS) != kMode && chmod(listener->path().c_str(), kMode) != 0) {
    return FailSystem(errno, fmt::format("cannot set the mode of {}", listener->path()));
  }
  if (listen(listener->fd(), kBacklog) != 0) {
    return FailSystem(errno, fmt::format("cannot listen on {}", listener->path()));
  }
  return listener;
}

Listener::~Listener() {
  struct stat found {};
  if (lstat(path_.c_str(), &found) != 0) return;
  if (found.st_dev == device_ && found.st_ino == inode_) unlink(path_.c_str());
}

Result<UniqueFd> Listener::accept() {
  UniqueFd client(::accept4(fd(), nullptr, nullptr, SOCK_CLOEXEC));
  if (client.is_valid()) return client;
  if (errno == EAGAIN || errno == EINTR || errno == ECONNABORTED) return UniqueFd();
  return FailSystem(errno, fmt::format("cannot accept a client on {}", path_));
}

}  // namespace mvgpu::glue::vfio_user
