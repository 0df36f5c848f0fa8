#include "apionly-domain/accounting/change_gate.h"

#include <atomic>
#include <chrono>
#include <thread>

#include "apionly-domain/accounting/process_info.h"

namespace mvgpu::domain {

using ledger_format::RowRecord;

namespace {

constexpr auto kPatience = std::chrono::milliseconds(100);
constexpr auto kPause = std::chrono::microseconds(50);
constexpr int kQuickLooks = 200;  // changes of single pages take some ns

bool Finished(const RowRecord& row) {
  const std::atomic_ref<uint64_t> changes(const_cast<uint64_t&>(row.changes));
  const uint64_t seen = changes.load();
  const auto is_over = [&] { return seen % 2 == 0 || changes.load() != seen; };
  for (int i = 0; i < kQuickLooks; ++i) {
    if (is_over()) return true;
  }
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  while (!is_over()) {
    if (LivenessOf({row.pid, row.start_time, row.pid_namespace}) == Liveness::kDead) return true;
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(kPause);
  }
  return true;
}

}  // namespace

void StopChanges(LedgerMemory& memory, unsigned file) {
  ledger_format::LedgerHeader& header = memory.header();
  // The number goes first: it is not given out again, whoever dies in between.
  const uint64_t layout = header.next_layout++;
  // Sequentially consistent, before the loads of `changes`: see Change.
  std::atomic_ref<uint64_t>(memory.file(file).layout).store(layout);
}

bool ChangesFinished(LedgerMemory& memory) {
  bool finished = true;
  for (unsigned i = 0; i < ledger_format::kMaxRows; ++i) {
    const RowRecord& row = memory.row(i);
    // A row without a token is being dropped: its process is dead or waits for us.
    if (row.state != ledger_format::kRowActive || ledger_format::LoadWord(row.token) == 0) continue;
    finished = Finished(row) && finished;
  }
  return finished;
}

}  // namespace mvgpu::domain
