#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include <nlohmann/json_fwd.hpp>

#include "apionly-domain/base/error.h"

namespace mvgpu::backend {

class ByteWriter;

// What a vGPU's row in the ledger said at one moment, in pages: a kAccounts record.
struct AccountFigures {
  uint64_t mapped_pages = 0;
  uint64_t pinned_pages = 0;
  uint64_t unique_pages = 0;
  uint64_t charged_pages = 0;  // 0 without a ledger
  uint64_t locked_pages = 0;

  bool operator==(const AccountFigures&) const = default;
  // What is the same wherever the session runs: charges and locks are not.
  bool is_same_session(const AccountFigures& other) const {
    return mapped_pages == other.mapped_pages && pinned_pages == other.pinned_pages &&
           unique_pages == other.unique_pages;
  }
  void write_to(ByteWriter& writer) const;
  // nullopt when there are not as many numbers.
  static std::optional<AccountFigures> FromPayload(std::span<const std::byte> payload);
};

// The accounts of a recorded session: gathered record by record, told the same way by everybody who
// reads the trace.
class TraceAccounts {
 public:
  struct Moment {
    uint64_t time_ns = 0;  // since the first record
    AccountFigures figures;
  };

  // Of a kSession record; what is not there stays empty.
  void on_session(std::string_view session_json);
  void on_figures(uint64_t time_ns, const AccountFigures& figures);

  // Reads all of a trace for its accounts alone. Errors: those of TraceReader, kCorrupt.
  static Result<TraceAccounts> ReadFrom(const std::string& path);

  const std::string& vm_uuid() const { return vm_uuid_; }
  const std::string& name() const { return name_; }
  const std::string& pin_backend() const { return pin_backend_; }
  uint64_t changes() const { return changes_; }
  // The first moment of those with the most unique pages; the last one there is. nullopt: traces of
  // version 1 have no accounts.
  const std::optional<Moment>& peak() const { return peak_; }
  const std::optional<Moment>& last() const { return last_; }

 private:
  std::string vm_uuid_;
  std::string name_;
  std::string pin_backend_;
  uint64_t changes_ = 0;
  std::optional<Moment> peak_;
  std::optional<Moment> last_;
};

// {"vm": uuid, "name": str, "pin_backend": str, "changes": n, "peak": MOMENT or null, "last":
// MOMENT
//  or null}; MOMENT {"seconds": n, "mapped_pages": n, "pinned_pages": n, "unique_pages": n,
//  "charged_pages": n, "locked_pages": n}
nlohmann::json ToJson(const TraceAccounts& accounts);

}  // namespace mvgpu::backend
