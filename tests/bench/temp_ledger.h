#pragma once

#include <unistd.h>

#include <cstdlib>
#include <memory>
#include <string>
#include <utility>

#include "apionly-domain/accounting/ledger.h"
#include "apionly-domain/base/check.h"

namespace mvgpu::bench {

// A place for a VM's ledger, in memory. It is empty when this goes: nobody has it open by then.
class TempLedger {
 public:
  static constexpr char kVm[] = "0a1b2c3d-0000-4000-8000-00000000abcd";

  TempLedger() {
    dir_ = "/dev/shm/mvgpu-bench-XXXXXX";
    MVGPU_CHECK(mkdtemp(dir_.data()) != nullptr);
  }
  ~TempLedger() { rmdir(dir_.c_str()); }
  TempLedger(const TempLedger&) = delete;
  TempLedger& operator=(const TempLedger&) = delete;

  // For one process's domains.
  std::unique_ptr<domain::Ledger> open() const {
    auto ledger = domain::Ledger::Open({dir_, kVm});
    MVGPU_CHECK(ledger.has_value());
    return std::move(*ledger);
  }
  const std::string& dir() const { return dir_; }
  std::string path() const { return dir_ + "/" + kVm + ".ledger"; }

 private:
  std::string dir_;
};

}  // namespace mvgpu::bench
