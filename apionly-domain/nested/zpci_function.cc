#include "apionly-domain/nested/zpci_function.h"

#include <cstring>
#include <utility>

namespace mvgpu::domain {

namespace zpci {

EventCode EventCodeOf(FaultCode code) {
  switch (code) {
    case FaultCode::kNullEntry:
      return EventCode::kInvalidEntry;
    case FaultCode::kTableLength:
      return EventCode::kInvalidLength;
    case FaultCode::kTableType:
      return EventCode::kInvalidType;
    case FaultCode::kNoRead:
    case FaultCode::kNoWrite:
      return EventCode::kProtection;
    case FaultCode::kTableAccess:
      return EventCode::kAddressing;
    case FaultCode::kBadRoot:
      return EventCode::kBadFormat;
    default:
      return EventCode::kOutOfRange;
  }
}

uint64_t Outcome::r1(uint64_t before) const {
  constexpr unsigned kStatusShift = 24;
  if (condition != Condition::kError) return before;
  return (before & ~(uint64_t{0xff} << kStatusShift)) | uint64_t{static_cast<uint8_t>(status)}
                                                            << kStatusShift;
}

Fib Fib::Parse(std::span<const std::byte, kSize> bytes) {
  constexpr size_t kBase = 16;
  constexpr size_t kLimit = 24;
  constexpr size_t kIota = 32;
  const auto word_at = [&](size_t offset) {
    uint64_t word = 0;
    std::memcpy(&word, bytes.data() + offset, sizeof(word));
    return __builtin_bswap64(word);
  };
  return {static_cast<uint8_t>(bytes[0]), word_at(kBase), word_at(kLimit), word_at(kIota)};
}

}  // namespace zpci

using zpci::Condition;
using zpci::EventCode;
using zpci::Outcome;
using zpci::Status;

namespace {

Outcome Ends(Condition condition, Status status = Status::kNone) {
  return {Outcome::Exception::kNone, condition, status};
}
Outcome Refused(Status status) { return Ends(Condition::kError, status); }
Outcome Interruption(Outcome::Exception exception) { return {exception, {}, {}}; }

}  // namespace

ZpciFunction::ZpciFunction(Options options, Parts parts)
    : options_(std::move(options)), parts_(parts), tables_(parts.guest), walker_(&tables_) {}

bool ZpciFunction::HasHandle() const {
  return state_ == State::kEnabled || state_ == State::kBlocked || state_ == State::kError;
}

void ZpciFunction::set_state(State state) {
  state_ = state;
  if (!HasHandle()) DropTables();
  if (state_ == State::kError) DropMappings();
}

std::optional<Outcome> ZpciFunction::CheckHandle(uint64_t r1) const {
  const auto handle = static_cast<uint32_t>(r1 >> 32);
  if (handle != options_.handle || (handle & kEnabledHandle) == 0 || !HasHandle()) {
    return Ends(Condition::kInvalidHandle);
  }
  return std::nullopt;
}

Outcome ZpciFunction::modify_controls(uint64_t r1, const zpci::Fib& fib) {
  if (const auto refused = CheckHandle(r1)) return *refused;
  if (fib.format != 0) return Interruption(Outcome::Exception::kOperand);
  const auto control = static_cast<Control>(r1 & 0xff);
  const bool is_translation =
      control == kRegister || control == kDeregister || control == kReregister;
  const auto dma_space = static_cast<uint8_t>(r1 >> 16);
  if (is_translation && dma_space != 0) return Refused(Status::kInvalidDmaSpace);
  if (is_translation && (domain_ != nullptr) != (control != kRegister)) {
    return Refused(Status::kSequence);
  }
  switch (control) {
    case kRegister:
      return Register(fib);
    case kDeregister:
      DropTables();
      return Ends(Condition::kOk);
    case kReregister:
      DropTables();
      return Register(fib);
    case kResetError:
      return ResetError();
    case kResetBlock:
      if (state_ != State::kError) return Refused(Status::kSequence);
      state_ = State::kBlocked;
      return Ends(Condition::kOk);
  }
  return Interruption(Outcome::Exception::kOperand);
}

Outcome ZpciFunction::Register(const zpci::Fib& fib) {
  const uint64_t first = fib.base & ~kPageMask;
  const uint64_t last = fib.limit | kPageMask;
  if (first > last || first < options_.first_address || last > options_.last_address) {
    return Interruption(Outcome::Exception::kOperand);
  }
  // Without T, addresses would be all of guest memory, unchanged: nobody was offered that.
  const auto designation = static_cast<unsigned>(zpci::DesignationOf(fib.iota));
  if ((fib.iota & zpci::kIotaTranslate) == 0 ||
      (options_.designations & (0x80u >> designation)) == 0) {
    return Interruption(Outcome::Exception::kOperand);
  }
  NestedDomain::Options options{.name = options_.name,
                                .root = fib.iota,
                                .aperture = IovaRange::FromFirstAndLast(Iova(first), Iova(last)),
                                .on_fault = NestedDomain::OnFault::kStop};
  domain_ = std::make_unique<NestedDomain>(
      std::move(options),
      NestedDomain::Parts{parts_.guest, &walker_, parts_.target, parts_.credits});
  return Ends(Condition::kOk);
}

void ZpciFunction::DropTables() {
  domain_.reset();
  interrupted_.reset();
}

void ZpciFunction::DropMappings() {
  interrupted_.reset();
  if (domain_ != nullptr) domain_->clear();
}

// The tables that are registered stay; what they say is mapped again, as far as it can be.
Outcome ZpciFunction::ResetError() {
  if (state_ != State::kError && state_ != State::kBlocked) return Refused(Status::kSequence);
  state_ = State::kEnabled;
  if (domain_ != nullptr) domain_->refresh_all(options_.steps_at_a_time);
  return Ends(Condition::kOk);
}

Outcome ZpciFunction::refresh(const zpci::RefreshOperands& operands) {
  if (operands.r2_register % 2 != 0) return Interruption(Outcome::Exception::kSpecification);
  if (const auto refused = CheckHandle(operands.r1)) return *refused;
  if (state_ == State::kError) return Refused(Status::kErrorState);
  if (domain_ == nullptr) return FailWith(EventCode::kNoTables, operands.start);
  if (operands.length == 0) return Ends(Condition::kOk);
  const auto range = IovaRange::FromStartAndSize(Iova(operands.start), operands.length);
  if (!range || !domain_->aperture().contains(*range)) {
    return FailWith(EventCode::kOutOfRange, operands.start);
  }
  const bool goes_on = interrupted_ && interrupted_->start == operands.start &&
                       interrupted_->length == operands.length;
  const Iova start = goes_on ? interrupted_->next : range->start();
  const bool lacked_credits = goes_on && interrupted_->lacked_credits;
  interrupted_.reset();
  Refreshed refreshed =
      domain_->refresh(IovaRange::FromFirstAndLast(start, range->last()), options_.steps_at_a_time);
  refreshed.lacked_credits |= lacked_credits;
  return OutcomeOf(refreshed, operands);
}

Outcome ZpciFunction::OutcomeOf(const Refreshed& refreshed, const zpci::RefreshOperands& operands) {
  switch (refreshed.end) {
    case Refreshed::End::kDone:
      return refreshed.lacked_credits ? Refused(Status::kInsufficientResources)
                                      : Ends(Condition::kOk);
    case Refreshed::End::kStepLimit:
      interrupted_ = {operands.start, operands.length, refreshed.next, refreshed.lacked_credits};
      return Ends(Condition::kBusy);
    case Refreshed::End::kNoCredits:
      return Refused(Status::kInsufficientResources);
    case Refreshed::End::kFault:
      return FailWith(zpci::EventCodeOf(refreshed.fault->code), refreshed.next.value());
    case Refreshed::End::kNotMappable:
      break;
  }
  switch (refreshed.error->code()) {
    case ErrorCode::kBusy:  // the VMM is changing that memory at this moment
      return Ends(Condition::kBusy);
    case ErrorCode::kPermission:
      return FailWith(EventCode::kProtection, refreshed.next.value());
    case ErrorCode::kNotMapped:
    case ErrorCode::kNotReachable:
    case ErrorCode::kTruncated:
      return FailWith(EventCode::kAddressing, refreshed.next.value());
    default:  // limits of the host
      return Refused(Status::kInsufficientResources);
  }
}

Outcome ZpciFunction::FailWith(EventCode code, uint64_t address) {
  EnterError(code, address);
  return Refused(Status::kFunctionInError);
}

// A function in error does no DMA: what is mapped for it goes.
void ZpciFunction::EnterError(EventCode code, uint64_t address) {
  state_ = State::kError;
  DropMappings();
  parts_.owner->on_error_event({options_.handle, options_.id, code, address});
}

tl::expected<GuestPhys, EventCode> ZpciFunction::dma(Iova iova, Access access) {
  if (state_ != State::kEnabled && state_ != State::kBlocked) {
    return tl::unexpected(EventCode::kOutOfRange);
  }
  if (domain_ == nullptr) {
    EnterError(EventCode::kNoTables, iova.value());
    return tl::unexpected(EventCode::kNoTables);
  }
  const auto reached = domain_->translate(iova, access);
  if (reached) return *reached;
  const EventCode code = zpci::EventCodeOf(reached.error());
  EnterError(code, iova.value());
  return tl::unexpected(code);
}

}  // namespace mvgpu::domain
