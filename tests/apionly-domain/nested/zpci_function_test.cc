#include "apionly-domain/nested/zpci_function.h"

#include <array>

#include "tests/apionly-domain/nested/nested_fixture.h"
#include "tests/apionly-domain/nested/zpci_builder.h"

namespace mvgpu::domain {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using testing::IsOk;
using zpci::Condition;
using zpci::ErrorEvent;
using zpci::EventCode;
using zpci::Outcome;
using zpci::Status;
using Exception = Outcome::Exception;
using State = ZpciFunction::State;

constexpr Outcome kOk{};
constexpr Outcome Refused(Status status) { return {Exception::kNone, Condition::kError, status}; }
constexpr Outcome Ends(Condition condition) { return {Exception::kNone, condition, Status::kNone}; }
constexpr Outcome Interrupts(Exception exception) { return {exception, {}, {}}; }

// A function whose guest has its tables registered.
class ZpciFunctionTest : public NestedTest, public ZpciFunction::Owner {
 protected:
  static constexpr uint64_t kHandle = 0x8001'0001'0000'0000;  // as R1 has it
  static constexpr uint64_t kBuffer = 0x1'2345'6000;
  static constexpr uint64_t kBase = 0x1'0000'0000;
  static constexpr uint64_t kLimit = 0x1'ffff'ffff;
  enum Control : uint8_t {
    kRegister = 4,
    kDeregister = 5,
    kReregister = 6,
    kResetError = 7,
    kResetBlock = 9
  };

  void SetUp() override {
    NestedTest::SetUp();
    StartFunction();
    ASSERT_EQ(Control(kRegister), kOk);
  }
  void TearDown() override {
    function_.reset();
    NestedTest::TearDown();
  }
  void StartFunction(uint64_t steps_at_a_time = 1 << 16) {
    function_.reset();
    function_ = std::make_unique<ZpciFunction>(
        ZpciFunction::Options{.handle = 0x8001'0001, .id = 7, .steps_at_a_time = steps_at_a_time},
        ZpciFunction::Parts{domain_.get(), target_.get(), credits_.get(), this});
  }
  void LimitFunctionCredits(uint64_t pages) {
    function_.reset();
    LimitCredits(pages);
    StartFunction();
    ASSERT_EQ(Control(kRegister), kOk);
  }
  void on_error_event(const ErrorEvent& event) override { events_.push_back(event); }

  Outcome Control(enum Control control,
                  zpci::Fib fib = {0, kBase, kLimit, testing::ZpciBuilder::kIota}) {
    return function_->modify_controls(kHandle | control, fib);
  }
  Outcome Rpcit(uint64_t start, uint64_t length) {
    return function_->refresh({kHandle, 2, start, length});
  }
  Outcome RefreshAll() { return Rpcit(kBase, kLimit - kBase + 1); }

  testing::ZpciBuilder guest_{&ram_};
  std::unique_ptr<ZpciFunction> function_;
  std::vector<ErrorEvent> events_;
};

TEST_F(ZpciFunctionTest, ARefreshMapsWhatTheTablesSay) {
  guest_.map(kBuffer, 0xabc'd000);
  EXPECT_EQ(Rpcit(kBuffer, 0x3000), kOk);
  EXPECT_EQ(function_->dma(Iova(kBuffer + 0x789), Access::kReadWrite), GuestPhys(0xabc'd789));
  EXPECT_THAT(events_, IsEmpty());
}

TEST_F(ZpciFunctionTest, VectorNoCreditsSetsStatus16) {
  LimitFunctionCredits(1);
  guest_.map(kBuffer, kFrames);
  guest_.map(kBuffer + 0x1000, kFrames + 0x1000);
  const Outcome outcome = Rpcit(kBuffer, 0x3000);
  EXPECT_EQ(outcome, Refused(Status::kInsufficientResources));
  EXPECT_EQ(outcome.r1(0x8001'0001'0000'0000), 0x8001'0001'1000'0000);
  EXPECT_EQ(function_->state(), State::kEnabled);
}

TEST_F(ZpciFunctionTest, VectorWalkErrorSetsStatus8AndSendsAnEvent) {
  guest_.put(guest_.page_entry(kBuffer), 0);
  const Outcome outcome = Rpcit(kBuffer, 0x3000);
  EXPECT_EQ(outcome, Refused(Status::kFunctionInError));
  EXPECT_EQ(outcome.r1(0x8001'0001'0000'0000), 0x8001'0001'0800'0000);
  EXPECT_EQ(function_->state(), State::kError);
  EXPECT_THAT(events_, ElementsAre(ErrorEvent{0x8001'0001, 7, EventCode::kInvalidEntry, kBuffer}));
}

TEST_F(ZpciFunctionTest, EachKindOfWrongEntryHasItsEvent) {
  guest_.map(kBuffer, kFrames);
  const uint64_t region = guest_.region_entry(kBuffer);
  const uint64_t good = guest_.get(region);
  struct Case {
    uint64_t entry;
    EventCode code;
  };
  for (const Case c :
       {Case{0, EventCode::kInvalidEntry}, Case{0x11'0006, EventCode::kInvalidLength},
        Case{0x11'000b, EventCode::kInvalidType},
        Case{0x7fff'ffff'ffff'c007, EventCode::kAddressing}}) {
    guest_.put(region, c.entry);
    events_.clear();
    EXPECT_EQ(Rpcit(kBuffer, 0x1000), Refused(Status::kFunctionInError));
    EXPECT_THAT(events_, ElementsAre(ErrorEvent{0x8001'0001, 7, c.code, kBuffer}));
    EXPECT_EQ(Control(kResetError), kOk);
  }
  guest_.put(region, good);
  EXPECT_EQ(Rpcit(kBuffer, 0x1000), kOk);
}

TEST_F(ZpciFunctionTest, AFunctionInErrorDoesNothingUntilItIsReset) {
  guest_.map(kBuffer, kFrames);
  EXPECT_EQ(Rpcit(kBuffer, 0x1000), kOk);
  EXPECT_EQ(function_->dma(Iova(kBuffer + 0x1000), Access::kRead),
            tl::unexpected(EventCode::kOutOfRange));
  EXPECT_EQ(function_->state(), State::kError);
  EXPECT_EQ(Rpcit(kBuffer, 0x1000), Refused(Status::kErrorState));
  EXPECT_FALSE(function_->dma(Iova(kBuffer), Access::kRead));
  EXPECT_EQ(PinnedPages(), 0);
  EXPECT_EQ(events_.size(), 1);
  EXPECT_EQ(Control(kResetError), kOk);
  EXPECT_TRUE(function_->dma(Iova(kBuffer), Access::kRead));
  EXPECT_EQ(Control(kResetError), Refused(Status::kSequence));
}

TEST_F(ZpciFunctionTest, AWriteToAProtectedPageIsAnError) {
  guest_.map(kBuffer, kFrames, /*read_only=*/true);
  EXPECT_EQ(Rpcit(kBuffer, 0x1000), kOk);
  EXPECT_TRUE(function_->dma(Iova(kBuffer), Access::kRead));
  EXPECT_FALSE(function_->dma(Iova(kBuffer), Access::kWrite));
  EXPECT_THAT(events_, ElementsAre(ErrorEvent{0x8001'0001, 7, EventCode::kProtection, kBuffer}));
}

TEST_F(ZpciFunctionTest, AFrameOutsideOfGuestMemoryIsAnAddressingError) {
  guest_.map(kBuffer, uint64_t{1} << 40);
  EXPECT_EQ(Rpcit(kBuffer, 0x1000), Refused(Status::kFunctionInError));
  EXPECT_THAT(events_, ElementsAre(ErrorEvent{0x8001'0001, 7, EventCode::kAddressing, kBuffer}));
}

// What Linux does: it frees, refreshes everything, and tries again.
TEST_F(ZpciFunctionTest, ARefreshOfEverythingGivesBackWhatStaleEntriesHold) {
  LimitFunctionCredits(4);
  for (uint64_t i = 0; i < 4; ++i) guest_.map(kBuffer + i * 0x1000, kFrames + i * 0x1000);
  EXPECT_EQ(Rpcit(kBuffer, 0x4000), kOk);
  for (uint64_t i = 0; i < 4; ++i) guest_.unmap(kBuffer + i * 0x1000);  // not refreshed: lazily
  const uint64_t other = kBuffer + 0x10'0000;
  guest_.map(other, kFrames + 0x9000);
  EXPECT_EQ(Rpcit(other, 0x1000), Refused(Status::kInsufficientResources));
  EXPECT_EQ(RefreshAll(), kOk);
  EXPECT_TRUE(function_->dma(Iova(other), Access::kWrite));
  EXPECT_EQ(credits_->available(), 3);
}

TEST_F(ZpciFunctionTest, ALongRefreshIsBusyAndGoesOnWhenItIsTriedAgain) {
  StartFunction(/*steps_at_a_time=*/4);
  ASSERT_EQ(Control(kRegister), kOk);
  for (uint64_t i = 0; i < 10; ++i) guest_.map(kBuffer + (i << 20), kFrames + i * 0x1000);
  EXPECT_EQ(Rpcit(kBuffer, 10 << 20), Ends(Condition::kBusy));
  EXPECT_EQ(Rpcit(kBuffer, 10 << 20), Ends(Condition::kBusy));
  EXPECT_EQ(Rpcit(kBuffer, 10 << 20), kOk);
  EXPECT_EQ(PinnedPages(), 10);
}

TEST_F(ZpciFunctionTest, ALongRefreshWithoutCreditsEndsToo) {
  function_.reset();
  LimitCredits(2);
  StartFunction(/*steps_at_a_time=*/4);
  ASSERT_EQ(Control(kRegister), kOk);
  for (uint64_t i = 0; i < 10; ++i) guest_.map(kBuffer + (i << 20), kFrames + i * 0x1000);
  EXPECT_EQ(Rpcit(kBuffer, 10 << 20), Ends(Condition::kBusy));
  EXPECT_EQ(Rpcit(kBuffer, 10 << 20), Ends(Condition::kBusy));
  EXPECT_EQ(Rpcit(kBuffer, 10 << 20), Refused(Status::kInsufficientResources));
}

TEST_F(ZpciFunctionTest, ARefreshOutsideOfTheApertureIsAnError) {
  for (const auto& [start, length] : {std::pair{kBase - 0x1000, uint64_t{0x1000}},
                                      {kLimit + 1, uint64_t{0x1000}},
                                      {kLimit - 0xfff, uint64_t{0x2000}},
                                      {uint64_t{0xffff'ffff'ffff'f000}, uint64_t{0x2000}}}) {
    events_.clear();
    EXPECT_EQ(Rpcit(start, length), Refused(Status::kFunctionInError)) << std::hex << start;
    EXPECT_THAT(events_, ElementsAre(ErrorEvent{0x8001'0001, 7, EventCode::kOutOfRange, start}));
    EXPECT_EQ(Control(kResetError), kOk);
  }
  EXPECT_EQ(Rpcit(kBase, 0), kOk);
}

TEST_F(ZpciFunctionTest, ARefreshWithoutTablesIsAnError) {
  EXPECT_EQ(Control(kDeregister), kOk);
  EXPECT_EQ(Rpcit(kBuffer, 0x1000), Refused(Status::kFunctionInError));
  EXPECT_THAT(events_, ElementsAre(ErrorEvent{0x8001'0001, 7, EventCode::kNoTables, kBuffer}));
}

TEST_F(ZpciFunctionTest, AnOddRegisterPairIsASpecificationException) {
  EXPECT_EQ(function_->refresh({kHandle, 3, kBuffer, 0x1000}),
            Interrupts(Exception::kSpecification));
}

TEST_F(ZpciFunctionTest, UnknownAndDisabledHandlesAreRefused) {
  const Outcome unknown = Ends(Condition::kInvalidHandle);
  EXPECT_EQ(function_->refresh({0x8001'0002'0000'0000, 2, kBuffer, 0x1000}), unknown);
  EXPECT_EQ(function_->refresh({0x0001'0001'0000'0000, 2, kBuffer, 0x1000}), unknown);
}

// A function without a handle: no instruction finds it, no DMA comes from it, nothing is held.
TEST_F(ZpciFunctionTest, AFunctionThatIsNotEnabledHasNothing) {
  for (const State state :
       {State::kReserved, State::kStandby, State::kDisabled, State::kPermanentError}) {
    guest_.map(kBuffer, kFrames);
    EXPECT_EQ(Rpcit(kBuffer, 0x1000), kOk);
    EXPECT_EQ(PinnedPages(), 1);
    function_->set_state(state);
    EXPECT_EQ(PinnedPages(), 0);
    EXPECT_TRUE(target_->pages.empty());
    const Outcome unknown = Ends(Condition::kInvalidHandle);
    EXPECT_EQ(Rpcit(kBuffer, 0x1000), unknown);
    for (const enum Control control :
         {kRegister, kDeregister, kReregister, kResetError, kResetBlock}) {
      EXPECT_EQ(Control(control), unknown);
    }
    EXPECT_FALSE(function_->dma(Iova(kBuffer), Access::kRead));
    EXPECT_EQ(function_->state(), state);
    EXPECT_THAT(events_, IsEmpty());
    function_->set_state(State::kEnabled);
    EXPECT_EQ(Control(kDeregister), Refused(Status::kSequence)) << "its tables have gone";
    EXPECT_EQ(Control(kRegister), kOk);
    EXPECT_EQ(PinnedPages(), 0);
  }
}

TEST_F(ZpciFunctionTest, AFunctionPutIntoErrorHasNothingMappedAndKeepsItsTables) {
  guest_.map(kBuffer, kFrames);
  EXPECT_EQ(Rpcit(kBuffer, 0x1000), kOk);
  function_->set_state(State::kError);
  EXPECT_EQ(PinnedPages(), 0);
  EXPECT_EQ(Rpcit(kBuffer, 0x1000), Refused(Status::kErrorState));
  EXPECT_FALSE(function_->dma(Iova(kBuffer), Access::kRead));
  EXPECT_THAT(events_, IsEmpty()) << "an error is told once, by who found it";
  EXPECT_EQ(PinnedPages(), 0);
  EXPECT_EQ(Control(kResetError), kOk);
  EXPECT_EQ(PinnedPages(), 1);
}

// In error, instructions that register tables work; nothing is mapped before the error is reset.
TEST_F(ZpciFunctionTest, AFunctionInErrorMayHaveOtherTables) {
  guest_.map(kBuffer, kFrames);
  function_->set_state(State::kError);
  EXPECT_EQ(Control(kRegister), Refused(Status::kSequence));
  EXPECT_EQ(Control(kReregister), kOk);
  EXPECT_EQ(Control(kDeregister), kOk);
  EXPECT_EQ(Control(kRegister), kOk);
  EXPECT_EQ(function_->state(), State::kError);
  EXPECT_EQ(Rpcit(kBuffer, 0x1000), Refused(Status::kErrorState));
  EXPECT_EQ(PinnedPages(), 0);
  EXPECT_EQ(Control(kResetError), kOk);
  EXPECT_EQ(PinnedPages(), 1);
}

// What Linux does after an error: the block of loads and stores first, then the error. Between the
// two, translation works as in an enabled function.
TEST_F(ZpciFunctionTest, ABlockedFunctionIsRefreshedAndMayFailAgain) {
  guest_.map(kBuffer, kFrames);
  EXPECT_EQ(Control(kResetBlock), Refused(Status::kSequence)) << "there is no error";
  function_->set_state(State::kError);
  EXPECT_EQ(Control(kResetBlock), kOk);
  EXPECT_EQ(function_->state(), State::kBlocked);
  EXPECT_EQ(Control(kResetBlock), Refused(Status::kSequence));
  EXPECT_EQ(PinnedPages(), 0);
  EXPECT_EQ(Rpcit(kBuffer, 0x1000), kOk);
  EXPECT_EQ(PinnedPages(), 1);
  EXPECT_TRUE(function_->dma(Iova(kBuffer), Access::kWrite));
  EXPECT_EQ(function_->state(), State::kBlocked) << "only the reset of the error ends it";
  guest_.put(guest_.page_entry(kBuffer), 0);
  EXPECT_EQ(Rpcit(kBuffer, 0x1000), Refused(Status::kFunctionInError));
  EXPECT_EQ(function_->state(), State::kError);
  EXPECT_EQ(events_.size(), 1);
  EXPECT_EQ(PinnedPages(), 0);
  guest_.map(kBuffer, kFrames);
  EXPECT_EQ(Control(kResetBlock), kOk);
  EXPECT_EQ(Control(kResetError), kOk);
  EXPECT_EQ(function_->state(), State::kEnabled);
  EXPECT_EQ(PinnedPages(), 1);
}

TEST_F(ZpciFunctionTest, ABlockedFunctionWithoutTablesOrOutsideOfThemIsInErrorAgain) {
  const auto block = [&] {
    function_->set_state(State::kError);
    ASSERT_EQ(Control(kResetBlock), kOk);
  };
  block();
  EXPECT_EQ(Rpcit(kBase - 0x1000, 0x1000), Refused(Status::kFunctionInError));
  block();
  EXPECT_FALSE(function_->dma(Iova(kBuffer), Access::kRead));
  EXPECT_EQ(function_->state(), State::kError);
  block();
  EXPECT_EQ(Control(kDeregister), kOk);
  EXPECT_EQ(Rpcit(kBuffer, 0x1000), Refused(Status::kFunctionInError));
  std::vector<EventCode> codes;
  for (const ErrorEvent& event : events_) codes.push_back(event.code);
  EXPECT_THAT(codes,
              ElementsAre(EventCode::kOutOfRange, EventCode::kOutOfRange, EventCode::kNoTables));
}

// A refresh that is under way does not go on where an error has taken its pages.
TEST_F(ZpciFunctionTest, AnInterruptedRefreshBeginsAnewAfterAnError) {
  StartFunction(/*steps_at_a_time=*/4);
  ASSERT_EQ(Control(kRegister), kOk);
  for (uint64_t i = 0; i < 6; ++i) guest_.map(kBuffer + (i << 20), kFrames + i * 0x1000);
  EXPECT_EQ(Rpcit(kBuffer, 6 << 20), Ends(Condition::kBusy));
  function_->set_state(State::kError);
  ASSERT_EQ(Control(kResetBlock), kOk);
  EXPECT_EQ(Rpcit(kBuffer, 6 << 20), Ends(Condition::kBusy));
  EXPECT_EQ(Rpcit(kBuffer, 6 << 20), kOk);
  EXPECT_EQ(PinnedPages(), 6);
}

TEST_F(ZpciFunctionTest, TablesAreRegisteredOnceAndDeregisteredOnce) {
  EXPECT_EQ(Control(kRegister), Refused(Status::kSequence));
  EXPECT_EQ(Control(kDeregister), kOk);
  EXPECT_EQ(Control(kDeregister), Refused(Status::kSequence));
  EXPECT_EQ(Control(kReregister), Refused(Status::kSequence));
  EXPECT_EQ(Control(kRegister), kOk);
}

TEST_F(ZpciFunctionTest, DeregisteringReleasesEverything) {
  guest_.map(kBuffer, kFrames);
  EXPECT_EQ(Rpcit(kBuffer, 0x1000), kOk);
  EXPECT_EQ(Control(kDeregister), kOk);
  EXPECT_EQ(PinnedPages(), 0);
  EXPECT_TRUE(target_->pages.empty());
}

TEST_F(ZpciFunctionTest, ReregisteringFollowsTheNewTables) {
  guest_.map(kBuffer, kFrames);
  EXPECT_EQ(Rpcit(kBuffer, 0x1000), kOk);
  const uint64_t root = guest_.AllocateUpper();
  EXPECT_EQ(Control(kReregister, {0, kBase, kLimit, root | 0x804}), kOk);
  EXPECT_EQ(PinnedPages(), 0);
  EXPECT_EQ(RefreshAll(), kOk);
  EXPECT_EQ(PinnedPages(), 0);
}

TEST_F(ZpciFunctionTest, WrongRegistrationsAreRefused) {
  EXPECT_EQ(Control(kDeregister), kOk);
  constexpr uint64_t kIota = testing::ZpciBuilder::kIota;
  const Outcome operand = Interrupts(Exception::kOperand);
  EXPECT_EQ(Control(kRegister, {0, kBase + 0x2000, kBase, kIota}), operand);
  EXPECT_EQ(Control(kRegister, {0, kBase - 1, kLimit, kIota}), operand);
  EXPECT_EQ(Control(kRegister, {0, kBase, 0x200'0000'0000'0000, kIota}), operand);
  EXPECT_EQ(Control(kRegister, {0, kBase, kLimit, kIota & ~uint64_t{0x800}}), operand);
  EXPECT_EQ(Control(kRegister, {0, kBase, kLimit, 0x10'0808}), operand);  // not offered: RS
  EXPECT_EQ(Control(kRegister, {1, kBase, kLimit, kIota}), operand);
  const zpci::Fib good{0, kBase, kLimit, kIota};
  EXPECT_EQ(function_->modify_controls(kHandle | 0x1'0000 | kRegister, good),
            Refused(Status::kInvalidDmaSpace));
  EXPECT_EQ(Control(kRegister, good), kOk);
}

TEST_F(ZpciFunctionTest, TheApertureIsRoundedToPages) {
  EXPECT_EQ(Control(kReregister, {0, kBase + 0x123, kBase + 0x2345, testing::ZpciBuilder::kIota}),
            kOk);
  EXPECT_EQ(function_->domain()->aperture(), RangeAt(kBase, 0x3000));
}

TEST_F(ZpciFunctionTest, TheInformationBlockIsBigEndian) {
  std::array<std::byte, zpci::Fib::kSize> bytes = {};
  bytes[0] = std::byte{1};
  bytes[19] = std::byte{0x01};  // PBA 0x1'0000'0000
  bytes[31] = std::byte{0xff};  // PAL 0xff
  bytes[38] = std::byte{0x08};  // IOTA 0x804
  bytes[39] = std::byte{0x04};
  const zpci::Fib fib = zpci::Fib::Parse(bytes);
  EXPECT_EQ(fib.format, 1);
  EXPECT_EQ(fib.base, 0x1'0000'0000);
  EXPECT_EQ(fib.limit, 0xff);
  EXPECT_EQ(fib.iota, 0x804);
}

TEST_F(ZpciFunctionTest, MemoryThatTheVmmTakesAwayIsOutOfReach) {
  guest_.map(kBuffer, kFrames);
  EXPECT_EQ(Rpcit(kBuffer, 0x1000), kOk);
  EXPECT_THAT(container_.unmap(Iova(kFrames), kFramesSize), IsOk());
  EXPECT_FALSE(function_->dma(Iova(kBuffer), Access::kRead));
}

}  // namespace
}  // namespace mvgpu::domain
