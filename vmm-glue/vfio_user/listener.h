#pragma once

#include <sys/types.h>

#include <memory>
#include <string>
#include <utility>

#include "apionly-domain/base/error.h"
#include "apionly-domain/base/unique_fd.h"

namespace mvgpu::glue::vfio_user {

// A listening UNIX socket in the file system that only its owner can connect to (mode 0600,
// whatever the umask). A socket file that a dead process left behind is replaced; one with a
// listener behind it, and anything that is not a socket, is left alone. The file goes with the
// listener, unless somebody has put another in its place.
//
// Used by one thread.
class Listener {
 public:
  // Errors: kInvalid (path empty, too long, or not a socket), kBusy (somebody listens there),
  // kSystem.
  static Result<std::unique_ptr<Listener>> Create(std::string path);
  ~Listener();
  Listener(const Listener&) = delete;
  Listener& operator=(const Listener&) = delete;

  const std::string& path() const { return path_; }
  // To be polled for reading.
  int fd() const { return socket_.get(); }

  // The next client; an invalid descriptor when nobody waits. Never blocks.
  Result<UniqueFd> accept();

 private:
  Listener(std::string path, UniqueFd socket, dev_t device, ino_t inode)
      : path_(std::move(path)), socket_(std::move(socket)), device_(device), inode_(inode) {}

  const std::string path_;
  // Keeps the inode of its file alive, so that (device, inode) names no other file meanwhile.
  const UniqueFd socket_;
  const dev_t device_;
  const ino_t inode_;
};

}  // namespace mvgpu::glue::vfio_user
