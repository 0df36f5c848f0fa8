#pragma once

#include <sys/types.h>

#include <chrono>
#include <cstddef>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "tests/backend/temp_dir.h"

namespace mvgpu::testing {

// A program under test. Killed when this goes, if it still runs.
class ChildProcess {
 public:
  struct Options {
    std::vector<std::string> command;
    std::vector<std::string> environment = {};       // added to ours
    std::vector<std::pair<int, int>> pass_fds = {};  // ours -> its number there
    bool as_activated = false;                       // LISTEN_PID is its own pid, as systemd has it
  };
  static constexpr auto kPatience = std::chrono::seconds(30);

  explicit ChildProcess(const Options& options);
  explicit ChildProcess(std::vector<std::string> command)
      : ChildProcess(Options{.command = std::move(command)}) {}
  ~ChildProcess();
  ChildProcess(const ChildProcess&) = delete;
  ChildProcess& operator=(const ChildProcess&) = delete;

  pid_t pid() const { return pid_; }
  void send_signal(int number) const;
  // The exit code, or minus the signal that ended it. nullopt: it still runs after kPatience.
  std::optional<int> wait();

  std::string out() const;
  std::string err() const;
  // Waits until standard error has `text`, counted from `from` on; where it ends, or npos.
  size_t wait_for_err(const std::string& text, size_t from = 0);
  size_t open_fds() const;

 private:
  bool PollExit();

  TempDir dir_;
  pid_t pid_ = -1;
  std::optional<int> exit_;
};

size_t LinesIn(const std::string& text);

}  // namespace mvgpu::testing
