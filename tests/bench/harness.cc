#include "tests/bench/harness.h"

#include <pthread.h>
#include <sched.h>

#include <thread>

namespace mvgpu::bench {

namespace {

double MedianOf(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

void SetFigures(const std::vector<double>& figures, Row* row) {
  row->median = MedianOf(figures);
  row->min = *std::min_element(figures.begin(), figures.end());
  row->max = *std::max_element(figures.begin(), figures.end());
}

}  // namespace

void StayOn(size_t cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu % std::thread::hardware_concurrency(), &set);
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);
}

void RunBeforeOthers() {
  const sched_param priority = {.sched_priority = 1};
  pthread_setschedparam(pthread_self(), SCHED_FIFO, &priority);
}

bool Row::meets_target() const {
  if (!failure.empty()) return false;
  switch (target.kind) {
    case Target::Kind::kNone:
      return true;
    case Target::Kind::kAtMost:
      return median <= target.value;
    case Target::Kind::kAtLeast:
      return median >= target.value;
  }
  return false;
}

void Table::compare(std::string name, std::string against, Target target,
                    const std::function<Result<Comparison>()>& make) {
  if (!wants(name)) return;
  Row row(std::move(name), std::move(against), target);
  row.unit = "x";
  const Result<Comparison> sides = make();
  if (!sides) {
    row.failure = sides.error().message();
    return add(std::move(row));
  }
  std::vector<double> ours;
  std::vector<double> baseline;
  std::vector<double> ratios;
  // Round 0 warms up. Who comes first alternates, so that what one side leaves in the caches helps
  // and hurts both.
  for (uint64_t round = 0; round <= settings_.repetitions; ++round) {
    const bool ours_first = round % 2 == 0;
    const double first = ours_first ? sides->ours(round) : sides->baseline(round);
    const double second = ours_first ? sides->baseline(round) : sides->ours(round);
    if (round == 0) continue;
    ours.push_back(ours_first ? first : second);
    baseline.push_back(ours_first ? second : first);
    const double ratio = ours.back() / baseline.back();
    ratios.push_back(target.kind == Target::Kind::kAtLeast ? 1 / ratio : ratio);
  }
  SetFigures(ratios, &row);
  row.ours_ns = MedianOf(ours);
  row.baseline_ns = MedianOf(baseline);
  add(std::move(row));
}

void Table::measure(std::string name, std::string unit, std::string against, Target target,
                    const std::function<Result<double>()>& take) {
  if (!wants(name)) return;
  Row row(std::move(name), std::move(against), target);
  row.unit = std::move(unit);
  const Result<double> figure = take();
  if (figure) {
    SetFigures({*figure}, &row);
  } else {
    row.failure = figure.error().message();
  }
  add(std::move(row));
}

void Table::add(Row row) {
  rows_.push_back(std::move(row));
  if (done_) done_(rows_.back());
}

}  // namespace mvgpu::bench
