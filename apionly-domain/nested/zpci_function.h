#pragma once

// The DMA side of an s390 PCI function as a hypervisor provides it: the instructions with which a
// guest registers its tables (Modify PCI Function Controls) and says what it changed in them
// (Refresh PCI Translations), condition codes, status and error events included. The hypervisor has
// set the flag "refresh" of the function group, so guests use RPCIT for every change, also where
// nothing was mapped before.
//
// Guests rely on this: RPCIT with "insufficient resources" has done what it could, and a refresh of
// the whole aperture gives back what stale entries hold and maps what was left out.
//
// Sources: Linux arch/s390/include/asm/pci_insn.h, pci_clp.h, drivers/iommu/s390-iommu.c; QEMU
// hw/s390x/s390-pci-inst.c.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include <tl/expected.hpp>

#include "apionly-domain/nested/nested_domain.h"
#include "apionly-domain/nested/zpci_table.h"

namespace mvgpu::domain {

namespace zpci {

enum class Condition : uint8_t { kOk = 0, kError = 1, kBusy = 2, kInvalidHandle = 3 };

enum class Status : uint8_t {  // with Condition::kError
  kNone = 0,
  kFunctionInError = 8,  // because of this instruction; an event says why
  kInsufficientResources = 16,
  kSequence = 24,  // registered already, or not at all
  kInvalidDmaSpace = 28,
  kErrorState = 40,  // since before
};

// PCI event codes, of error events.
enum class EventCode : uint16_t {
  kNoTables = 1,    // no I/O address translation is registered
  kOutOfRange = 2,  // outside of the registered addresses, or not mapped there
  kBadFormat = 3,
  kProtection = 4,     // the translation does not allow it
  kAddressing = 5,     // a table or a frame is not in guest memory
  kInvalidEntry = 7,   // a table entry of value 0
  kInvalidLength = 8,  // of a table, or its offset
  kInvalidType = 9,    // of a table entry, or its origin
};
EventCode EventCodeOf(FaultCode code);

struct ErrorEvent {
  uint32_t handle = 0;
  uint32_t id = 0;
  EventCode code = {};
  uint64_t address = 0;  // that failed
  bool operator==(const ErrorEvent&) const = default;
};

// What an instruction ends with.
struct Outcome {
  enum class Exception : uint8_t { kNone, kOperand, kSpecification };
  Exception exception = Exception::kNone;  // a program interruption; nothing else is set then
  Condition condition = Condition::kOk;
  Status status = Status::kNone;

  // R1 after the instruction: the status stands in bits 31:24.
  uint64_t r1(uint64_t before) const;
  bool operator==(const Outcome&) const = default;
};

// The function information block that MPCIFC reads from guest memory, big-endian; of it, what
// concerns translation.
struct Fib {
  static constexpr size_t kSize = 40;  // bytes of it that are looked at
  uint8_t format = 0;
  uint64_t base = 0;   // PBA: the first address
  uint64_t limit = 0;  // PAL: the last one
  uint64_t iota = 0;
  static Fib Parse(std::span<const std::byte, kSize> bytes);
};

struct RefreshOperands {
  uint64_t r1 = 0;  // handle in the upper half
  unsigned r2_register = 0;
  uint64_t start = 0;   // R2
  uint64_t length = 0;  // R2 + 1, bytes
};

}  // namespace zpci

// Not thread-safe: whoever runs the function's instructions and DMA takes turns. Guest memory may
// be unmapped by the VMM at any time, on any thread.
class ZpciFunction {
 public:
  static constexpr uint32_t kEnabledHandle = uint32_t{1} << 31;
  // As QEMU has them.
  enum class State : uint8_t {
    kReserved,  // not there, ...
    kStandby,   // ... not configured, ...
    kDisabled,  // ... not enabled: the handle is none
    kEnabled,
    kBlocked,  // the error is not reset yet, the block of loads and stores is: DMA works
    kError,    // after an error event: no DMA, no refresh
    kPermanentError,
  };

  class Owner {
   public:
    virtual ~Owner() = default;
    virtual void on_error_event(const zpci::ErrorEvent& event) = 0;
  };
  struct Options {
    std::string name = "zpci";
    uint32_t handle = 0;  // FH, with kEnabledHandle while the function is enabled
    uint32_t id = 0;      // FID
    // What CLP tells the guest: the addresses that may be registered, and the table types (bit 0x80
    // is designation 0, and so on downwards). As QEMU has them.
    uint64_t first_address = 0x1'0000'0000;        // SDMA
    uint64_t last_address = 0x1ff'ffff'ffff'ffff;  // EDMA
    uint8_t designations = 0x40;                   // DTSM: region-third
    // Steps of a refresh for one instruction; with more to do it is "busy", and goes on when the
    // guest tries again.
    uint64_t steps_at_a_time = 1 << 16;
  };
  struct Parts {  // all outlive the function
    ApiOnlyDomain* guest;
    NestedTarget* target;
    MapCredits* credits;
    Owner* owner;
  };

  ZpciFunction(Options options, Parts parts);

  zpci::Outcome modify_controls(uint64_t r1, const zpci::Fib& fib);
  zpci::Outcome refresh(const zpci::RefreshOperands& operands);

  // DMA of the device. When it is not allowed, an event is sent and the function is in error.
  tl::expected<GuestPhys, zpci::EventCode> dma(Iova iova, Access access);

  State state() const { return state_; }
  // By the hypervisor: CLP, hot plug. A function without a handle has no tables registered; one in
  // error has nothing mapped.
  void set_state(State state);
  const NestedDomain* domain() const { return domain_.get(); }  // null: nothing is registered

 private:
  // Instructions of MPCIFC, R1 7:0.
  enum Control : uint8_t {
    kRegister = 4,
    kDeregister = 5,
    kReregister = 6,
    kResetError = 7,
    kResetBlock = 9
  };
  // A refresh that ran out of steps.
  struct Interrupted {
    uint64_t start;
    uint64_t length;
    Iova next;
    bool lacked_credits;  // for some page before `next`
  };

  bool HasHandle() const;
  std::optional<zpci::Outcome> CheckHandle(uint64_t r1) const;
  zpci::Outcome Register(const zpci::Fib& fib);
  zpci::Outcome ResetError();
  zpci::Outcome OutcomeOf(const Refreshed& refreshed, const zpci::RefreshOperands& operands);
  zpci::Outcome FailWith(zpci::EventCode code, uint64_t address);
  void EnterError(zpci::EventCode code, uint64_t address);
  void DropTables();
  void DropMappings();

  const Options options_;
  const Parts parts_;
  const DomainTables tables_;
  const ZpciTable walker_;
  State state_ = State::kEnabled;
  std::unique_ptr<NestedDomain> domain_;
  std::optional<Interrupted> interrupted_;
};

}  // namespace mvgpu::domain
