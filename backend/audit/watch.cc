#include "backend/audit/watch.h"

#include <fmt/chrono.h>
#include <fmt/format.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <ctime>
#include <sstream>
#include <string>
#include <utility>

#include "backend/audit/console.h"
#include "backend/audit/report.h"

namespace mvgpu::backend {

namespace {

using Clock = std::chrono::steady_clock;

// SIGINT and SIGTERM are held back and waited for, so that no frame is cut and no wait is missed.
class StopSignals {
 public:
  StopSignals() {
    sigemptyset(&signals_);
    sigaddset(&signals_, SIGINT);
    sigaddset(&signals_, SIGTERM);
    sigprocmask(SIG_BLOCK, &signals_, nullptr);
  }
  // True when one of them came.
  bool wait_until(Clock::time_point time) const {
    for (;;) {
      const auto left = std::max(Clock::duration::zero(), time - Clock::now());
      const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(left);
      const struct timespec timeout = {
          seconds.count(),
          std::chrono::duration_cast<std::chrono::nanoseconds>(left - seconds).count()};
      if (sigtimedwait(&signals_, nullptr, &timeout) > 0) return true;
      if (errno != EINTR) return false;  // EAGAIN; EINTR: stopped and continued
    }
  }

 private:
  sigset_t signals_;
};

// A terminal shows one frame in place of the other, cut to its size; anything else gets all of
// them, with an empty line between.
class Screen {
 public:
  int show(const std::string& frame) {
    if (!is_terminal_) return Print(std::exchange(first_, false) ? frame : "\n" + frame);
    // Home; each line clears what is left of the one before; at last what is below.
    return Print("\x1b[H" + Cut(frame) + "\x1b[J");
  }

 private:
  static std::string Cut(const std::string& frame) {
    struct winsize size = {};
    if (ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) != 0 || size.ws_row < 2 || size.ws_col == 0) {
      size = {.ws_row = 24, .ws_col = 80, .ws_xpixel = 0, .ws_ypixel = 0};
    }
    std::istringstream lines(frame);
    std::string text;
    // The last row stays free, or the terminal would scroll.
    int rows = size.ws_row - 1;
    for (std::string line; rows > 0 && std::getline(lines, line); --rows) {
      text += line.substr(0, size.ws_col) + "\x1b[K\n";
    }
    return text;
  }

  const bool is_terminal_ = isatty(STDOUT_FILENO) != 0;
  bool first_ = true;
};

std::string Frame(const AuditReport& report, const AuditReport* before, double interval) {
  std::string text = fmt::format("{:%Y-%m-%d %H:%M:%S} UTC, every {} s\n",
                                 fmt::gmtime(std::time(nullptr)), interval);
  text += RenderText(report, before);
  for (const AuditReport::Unreadable& unreadable : report.unreadable) {
    text += fmt::format("error: {}\n", unreadable.error.message());
  }
  return text;
}

}  // namespace

CLI::App* WatchOptions::add_to(CLI::App& app) {
  CLI::App* const verb =
      app.add_subcommand("watch", "Show the accounts again and again, with what changed");
  verb->footer(
      "Below each domain stands what changed since the look before. On a terminal a look takes "
      "the\nplace of the one before; elsewhere they follow each other. Ends on SIGINT and "
      "SIGTERM.\n\n"
      "Exit codes:\n"
      "  0  ended as asked\n"
      "  2  wrong usage\n"
      "  4  the runtime directory could not be read, or stdout not be written");
  ledgers.add_to(*verb);
  verb->add_option("--interval", interval_seconds, "seconds between looks")
      ->type_name("SECONDS")
      ->capture_default_str();
  verb->add_option("--count", count, "end after so many looks")
      ->check(CLI::Range(int64_t{1}, int64_t{1'000'000'000}))
      ->type_name("N");
  return verb;
}

int Watch(const WatchOptions& options) {
  const double interval = options.interval_seconds;
  if (!(interval >= WatchOptions::kShortest && interval <= WatchOptions::kLongest)) {
    return Complain(kAuditUsage, fmt::format("--interval of {} seconds: give {} to {}", interval,
                                             WatchOptions::kShortest, WatchOptions::kLongest));
  }
  const auto choice = Resolve(options.ledgers);
  if (!choice) return Complain(kAuditUsage, choice.error().message());

  const StopSignals signals;
  const auto period =
      std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(interval));
  Screen screen;
  std::optional<AuditReport> before;
  auto next = Clock::now();
  for (uint64_t looks = 0; !options.count || looks < *options.count; ++looks) {
    if (signals.wait_until(next)) return kAuditOk;
    // What was missed, while stopped say, is not made up for.
    next = std::max(next + period, Clock::now());
    auto report = Audit(choice->runtime_dir, choice->vm_uuid);
    if (!report) return Complain(kAuditUnreadable, report.error().message());
    const int shown = screen.show(Frame(*report, before ? &*before : nullptr, interval));
    if (shown != kAuditOk) return shown;
    before = std::move(*report);
  }
  return kAuditOk;
}

}  // namespace mvgpu::backend
