#pragma once

#include <time.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "apionly-domain/base/error.h"

namespace mvgpu::bench {

// Two ways to do the same work, measured against each other: in one process, one after the other in
// each round, so that whatever else the machine does meets both; the figure of a row is the median
// of the rounds' ratios. Google Benchmark runs one side to its end before the other and takes no
// ratios between sides, so this is a small harness of our own.

struct Settings {
  uint64_t memory = uint64_t{64} << 30;  // bytes of guest memory, none of it touched
  uint64_t repetitions = 9;
  bool quick = false;  // everything so small that the figures say nothing: to see that all runs
  std::string rows;    // only rows with this in their names

  // A number of operations for one side of one round.
  uint64_t work(uint64_t full) const { return quick ? std::max<uint64_t>(full / 64, 64) : full; }
};

// What a row's figure should be.
struct Target {
  enum class Kind : uint8_t { kNone, kAtMost, kAtLeast };
  Kind kind = Kind::kNone;
  double value = 0;

  static Target AtMost(double value) { return {Kind::kAtMost, value}; }
  static Target AtLeast(double value) { return {Kind::kAtLeast, value}; }
};

// One line of the table. `failure` says why there are no figures.
struct Row {
  Row(std::string row_name, std::string row_against, Target row_target)
      : name(std::move(row_name)), against(std::move(row_against)), target(row_target) {}

  std::string name;
  std::string against;  // what the figure is compared with
  std::string unit;     // of the figures: "x" for ratios
  double median = 0;
  double min = 0;
  double max = 0;
  Target target;
  double ours_ns = 0;      // for one unit of work; median. 0: not a matter of time
  double baseline_ns = 0;  // the same
  std::string failure;

  bool meets_target() const;
};

// Does its work for round n and answers how long that took, in ns for each unit of work.
using Side = std::function<double(uint64_t round)>;

inline double NsOf(clockid_t clock) {
  timespec now = {};
  clock_gettime(clock, &now);
  return static_cast<double>(now.tv_sec) * 1e9 + static_cast<double>(now.tv_nsec);
}

// A side that calls work(round), which is `units` units of work. The time is that for which this
// thread had a processor, in the kernel or outside: what else runs on the machine does not count,
// and nothing that is measured so waits for anybody.
template <typename Work>
Side Timed(uint64_t units, Work work) {
  return [units, work = std::move(work)](uint64_t round) {
    const double start = NsOf(CLOCK_THREAD_CPUTIME_ID);
    work(round);
    return (NsOf(CLOCK_THREAD_CPUTIME_ID) - start) / static_cast<double>(units);
  };
}

// The figure is ours / baseline: smaller is better. With a target of the kind kAtLeast it is
// baseline / ours: how many times as fast.
struct Comparison {
  Side ours;
  Side baseline;
};

// Runs rows and collects them. A row's function makes what it needs and is called only for rows
// that are wanted; an error becomes the row's failure.
class Table {
 public:
  using RowDone = std::function<void(const Row&)>;

  // `done` hears of each row as it is finished.
  Table(const Settings& settings, RowDone done) : settings_(settings), done_(std::move(done)) {}

  const Settings& settings() const { return settings_; }
  const std::vector<Row>& rows() const { return rows_; }

  void compare(std::string name, std::string against, Target target,
               const std::function<Result<Comparison>()>& make);
  // One figure that is the same each time, so it is taken once.
  void measure(std::string name, std::string unit, std::string against, Target target,
               const std::function<Result<double>()>& take);

 private:
  bool wants(std::string_view name) const {
    return name.find(settings_.rows) != std::string_view::npos;
  }
  void add(Row row);

  const Settings settings_;
  const RowDone done_;
  std::vector<Row> rows_;
};

// Made when it is first used: rows share what is expensive to make, and a run that leaves those
// rows out does not make it.
template <typename T>
class Lazy {
 public:
  explicit Lazy(std::function<std::unique_ptr<T>()> make) : make_(std::move(make)) {}
  T& get() {
    if (value_ == nullptr) value_ = make_();
    return *value_;
  }

 private:
  const std::function<std::unique_ptr<T>()> make_;
  std::unique_ptr<T> value_;
};

// Keeps the calling thread on one processor of those that there are.
void StayOn(size_t cpu);

// Lets the calling thread run before those of other programs, where this process may ask for that
// (root may). For what can only be measured by the clock on the wall: a round of it takes some
// milliseconds, as long as the scheduler lets somebody else run.
void RunBeforeOthers();

// Makes the compiler believe that a value is used.
inline void Keep(uint64_t value) { asm volatile("" : : "r"(value)); }

}  // namespace mvgpu::bench
