#include "tests/backend/child_process.h"

#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <thread>

namespace mvgpu::testing {

namespace {

constexpr auto kPause = std::chrono::milliseconds(2);

std::string TextOf(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// In the child, between fork() and exec().
void Redirect(const std::string& path, int fd) {
  const int file = open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0600);
  dup2(file, fd);
  close(file);
}

}  // namespace

ChildProcess::ChildProcess(const Options& options) {
  pid_ = fork();
  MVGPU_CHECK(pid_ >= 0);
  if (pid_ > 0) return;
  Redirect(dir_ / "out", STDOUT_FILENO);
  Redirect(dir_ / "err", STDERR_FILENO);
  // First out of the way, so that no number is overwritten before it was used.
  std::vector<int> high;
  for (const auto& [ours, theirs] : options.pass_fds) high.push_back(fcntl(ours, F_DUPFD, 100));
  for (size_t i = 0; i < high.size(); ++i) {
    dup2(high[i], options.pass_fds[i].second);
    close(high[i]);
  }
  for (const std::string& variable : options.environment) putenv(strdup(variable.c_str()));
  if (options.as_activated) setenv("LISTEN_PID", std::to_string(getpid()).c_str(), 1);
  std::vector<char*> arguments;
  for (const std::string& argument : options.command) arguments.push_back(strdup(argument.c_str()));
  arguments.push_back(nullptr);
  execv(arguments[0], arguments.data());
  _exit(127);
}

ChildProcess::~ChildProcess() {
  if (PollExit()) return;
  kill(pid_, SIGKILL);
  waitpid(pid_, nullptr, 0);
}

void ChildProcess::send_signal(int number) const {
  if (!exit_) kill(pid_, number);
}

bool ChildProcess::PollExit() {
  int status = 0;
  if (!exit_ && waitpid(pid_, &status, WNOHANG) == pid_) {
    exit_ = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  }
  return exit_.has_value();
}

std::optional<int> ChildProcess::wait() {
  const auto end = std::chrono::steady_clock::now() + kPatience;
  while (!PollExit() && std::chrono::steady_clock::now() < end) std::this_thread::sleep_for(kPause);
  return exit_;
}

std::string ChildProcess::out() const { return TextOf(dir_ / "out"); }
std::string ChildProcess::err() const { return TextOf(dir_ / "err"); }

size_t ChildProcess::wait_for_err(const std::string& text, size_t from) {
  const auto end = std::chrono::steady_clock::now() + kPatience;
  bool has_ended = false;
  while (true) {
    const size_t at = err().find(text, from);
    if (at != std::string::npos) return at + text.size();
    if (has_ended || std::chrono::steady_clock::now() > end) return std::string::npos;
    has_ended = PollExit();  // and one last look
    std::this_thread::sleep_for(kPause);
  }
}

size_t ChildProcess::open_fds() const {
  const std::filesystem::directory_iterator fds("/proc/" + std::to_string(pid_) + "/fd");
  return static_cast<size_t>(std::distance(begin(fds), end(fds)));
}

size_t LinesIn(const std::string& text) {
  return static_cast<size_t>(std::count(text.begin(), text.end(), '\n'));
}

}  // namespace mvgpu::testing
