#pragma once

#include <string>

#include "backend/session.h"

namespace mvgpu::backend {

// Exit codes of mvgpu-backend; part of its contract.
enum class ExitCode : int {
  kOk = 0,       // left on SIGTERM, or after the VM with --once
  kFailure = 1,  // something was left behind, or a system call failed
  kUsage = 2,    // the command line
  kSocket = 3,   // nobody can connect: the path or the descriptor is of no use
};

struct BackendOptions {
  Session::Options session;
  std::string socket_path;  // or
  int socket_fd = -1;       // listening or connected
  bool once = false;
};

// What the command line asks for; or the exit code with which to leave at once (--help, --version,
// --print-capabilities, mistakes), after having printed what there is to say.
tl::expected<BackendOptions, ExitCode> ParseCommandLine(int argc, const char* const* argv);

}  // namespace mvgpu::backend
