// VMs come and go, in good order and without; the backend lives on and keeps nothing.

#include <fcntl.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>

#include "backend/replay/player.h"
#include "dma-cache/physical_mapper.h"
#include "tests/backend/backend_fixture.h"
#include "tests/fakes/event_counter.h"

namespace mvgpu::testing {
namespace {

using ::testing::HasSubstr;

class BackendSessionTest : public BackendTest {};

TEST_F(BackendSessionTest, GuestDrawsAndNothingIsLeftWhenItsVmmLeaves) {
  Start();
  auto vm = StartVm();
  EXPECT_TRUE(vm->guest.draw(1, 3));
  EXPECT_TRUE(vm->guest.move_cursor(3, 4));
  vm.reset();
  ExpectVmGone();
  // create, attach, scanout, three of transfer and flush, cursor
  EXPECT_THAT(backend_->err(), HasSubstr("ran 10 commands and 3 frames, and pinned at most 3"));
  ExpectServes();
}

TEST_F(BackendSessionTest, DeviceIsAVirtioGpu) {
  Start();
  auto vm = ConnectVm();
  ASSERT_TRUE(vm->device.negotiate());
  const auto info = vm->device.transact(kGetInfo, Bytes{}.U32(16).Fill(12));
  ASSERT_TRUE(info.has_value());
  EXPECT_EQ(info->u32(8), 9u) << "regions";
  EXPECT_EQ(info->u32(12), 5u) << "interrupts";
  EXPECT_EQ(vm->device.region_info(7).size, 256u);
  EXPECT_GE(vm->device.irq_info(2).count, 3u);
  EXPECT_EQ(vm->guest.driver().read_config<uint32_t>(0), 0x10501af4u);
}

TEST_F(BackendSessionTest, InterruptsArriveThroughTheVmmsEventfds) {
  Start();
  auto vm = StartVm();
  EventCounter events[3];
  std::vector<UniqueFd> fds;
  for (EventCounter& event : events) fds.push_back(event.duplicate());
  vm->device.bind_irqs(2, 0, std::move(fds));
  EXPECT_EQ(vm->guest.create(1), kOk);
  uint64_t fired = 0;
  while (fired == 0 && vm->wait_briefly()) fired = events[1].take();  // after the answer
  EXPECT_EQ(fired, 1u);
  EXPECT_EQ(events[2].take(), 0u);
}

// The states in which a VMM may be lost. Each leaves a VM that is dropped without a farewell.
using LeaveIn = void (*)(RemoteVm&);
struct LostState {
  const char* name;
  LeaveIn leave;
};
const LostState kLostStates[] = {
    {"connected", [](RemoteVm&) {}},
    {"inside a header",
     [](RemoteVm& vm) { vm.device.client().send(Bytes{}.U16(1).U16(kVersion).U32(20)); }},
    {"after VERSION", [](RemoteVm& vm) { EXPECT_TRUE(vm.device.negotiate()); }},
    {"inside a message",
     [](RemoteVm& vm) {
       EXPECT_TRUE(vm.device.negotiate());
       vm.device.client().send(MessageOf(1, kRegionWrite, 1000, 0, Bytes{}.Fill(100)));
     }},
    {"inside a message with a descriptor",
     [](RemoteVm& vm) {
       EXPECT_TRUE(vm.device.negotiate());
       vm.device.client().send(MessageOf(1, kDmaMap, 48, 0, Bytes{}.U32(32).U32(3)),
                               {vm.guest.ram().fd()});
     }},
    {"with mappings",
     [](RemoteVm& vm) {
       EXPECT_TRUE(vm.device.negotiate());
       EXPECT_THAT(vm.guest.map_low(), IsOk());
       EXPECT_THAT(vm.guest.map_pictures(), IsOk());
     }},
    {"with interrupts bound",
     [](RemoteVm& vm) {
       EXPECT_TRUE(vm.start());
       std::vector<UniqueFd> fds;
       for (int i = 0; i < 3; ++i) fds.emplace_back(eventfd(0, EFD_CLOEXEC));
       vm.device.bind_irqs(2, 0, std::move(fds));
     }},
    {"with a picture that is pinned",
     [](RemoteVm& vm) { EXPECT_TRUE(vm.start() && vm.guest.draw(1, 1)); }},
    {"with a request under way",
     [](RemoteVm& vm) {
       EXPECT_TRUE(vm.start() && vm.guest.draw(1, 1));
       DescriptorChainBuilder chain(&vm.guest.memory());
       chain.readable(wire::RequestBytes(wire::kCmdTransfer)
                          .add(wire::WireRect{0, 0, 64, 48})
                          .add(uint64_t{0})
                          .u32({1, 0})
                          .bytes());
       for (int i = 0; i < 30; ++i) vm.guest.control().add(chain);
       vm.guest.ring_control();
     }},
    {"with commands that nobody waits for",
     [](RemoteVm& vm) {
       EXPECT_TRUE(vm.start());
       for (int i = 0; i < 50; ++i) vm.device.client().command(kGetInfo, Bytes{}.U32(16).Fill(12));
     }},
};

TEST_F(BackendSessionTest, VmmMayBeLostInAnyState) {
  Start();
  ExpectServes();
  const size_t fds = backend_->open_fds();
  for (int i = 0; i < 50; ++i) {
    const LostState& state = kLostStates[static_cast<size_t>(i) % std::size(kLostStates)];
    SCOPED_TRACE(state.name);
    {
      auto vm = ConnectVm();
      state.leave(*vm);
    }
    ASSERT_NO_FATAL_FAILURE(ExpectVmGone());
    EXPECT_EQ(backend_->open_fds(), fds);
  }
  ExpectServes();
  EXPECT_EQ(backend_->open_fds(), fds);
}

TEST_F(BackendSessionTest, KilledVmmIsNoticed) {
  Start();
  int ready[2];
  ASSERT_EQ(pipe(ready), 0);
  const pid_t vmm = fork();
  if (vmm == 0) {
    RemoteVm vm(ConnectTo(socket_path()));
    const char result = vm.start() && vm.guest.draw(1, 1) ? 'y' : 'n';
    if (write(ready[1], &result, 1) != 1) _exit(1);
    pause();
    _exit(0);
  }
  close(ready[1]);
  char result = 0;
  ASSERT_EQ(read(ready[0], &result, 1), 1);
  close(ready[0]);
  EXPECT_EQ(result, 'y');
  kill(vmm, SIGKILL);
  waitpid(vmm, nullptr, 0);
  ExpectVmGone();
  ExpectServes();
}

TEST_F(BackendSessionTest, SecondVmmIsTurnedAwayAndTheFirstGoesOn) {
  Start();
  auto first = StartVm();
  for (int i = 0; i < 3; ++i) {
    auto second = ConnectVm();
    EXPECT_TRUE(second->device.is_hung_up());
  }
  EXPECT_NE(backend_->wait_for_err("a second vmm was turned away"), std::string::npos);
  EXPECT_TRUE(first->guest.draw(1, 1));
  first.reset();
  ExpectVmGone();
  ExpectServes();
}

TEST_F(BackendSessionTest, MalformedMessagesGetTheirErrorsAndTheDeviceGoesOn) {
  Start();
  auto vm = StartVm();
  RemoteDevice& device = vm->device;
  const int ram = vm->guest.ram().fd();
  struct Case {
    const char* what;
    uint16_t command;
    Bytes body;
    std::vector<int> fds;
    uint32_t error;
  };
  const uint64_t free = 0x9000'0000;
  const auto map = [](uint32_t argsz, uint32_t flags, uint64_t offset, uint64_t iova,
                      uint64_t size) {
    return Bytes{}.U32(argsz).U32(flags).U64(offset).U64(iova).U64(size);
  };
  const Case cases[] = {
      {"unknown command", 99, Bytes{}.U32(0), {}, EINVAL},
      {"second VERSION", kVersion, Bytes{}.U16(0).U16(1), {}, EINVAL},
      {"no payload", kGetInfo, {}, {}, EINVAL},
      {"argsz too small", kGetInfo, Bytes{}.U32(15).Fill(12), {}, EINVAL},
      {"region index", kGetRegionInfo, Bytes{}.U32(32).U32(0).U32(9).Fill(20), {}, EINVAL},
      {"irq index", kGetIrqInfo, Bytes{}.U32(16).U32(0).U32(5).U32(0), {}, EINVAL},
      {"irq vectors", kSetIrqs, Bytes{}.U32(20).U32(0x24).U32(2).U32(0).U32(99), {}, EINVAL},
      {"read beyond the region", kRegionRead, Bytes{}.U64(4096).U32(7).U32(4), {}, EINVAL},
      {"read of a region that is not there", kRegionRead, Bytes{}.U64(0).U32(3).U32(4), {}, EINVAL},
      {"write with missing data", kRegionWrite, Bytes{}.U64(0).U32(7).U32(8).U32(0), {}, EINVAL},
      {"too many descriptors", kDmaMap, map(32, 3, 0, free, 4096), std::vector<int>(17, ram),
       EINVAL},
      {"two descriptors", kDmaMap, map(32, 3, 0, free, 4096), {ram, ram}, EINVAL},
      {"map without access", kDmaMap, map(32, 0, 0, free, 4096), {ram}, EINVAL},
      {"map of half a page", kDmaMap, map(32, 3, 0, free, 2048), {ram}, EINVAL},
      {"map of nothing", kDmaMap, map(32, 3, 0, free, 0), {ram}, EINVAL},
      {"map beyond the file", kDmaMap, map(32, 3, 0, free, 9u << 20), {ram}, EINVAL},
      {"map over a map", kDmaMap, map(32, 3, 4096, GpuGuest::kRam, 4096), {ram}, EEXIST},
      {"unmap of a part",
       kDmaUnmap,
       Bytes{}.U32(24).U32(0).U64(GpuGuest::kRam).U64(4096),
       {},
       EINVAL},
      {"unmap with a bitmap", kDmaUnmap, Bytes{}.U32(24).U32(1).U64(free).U64(4096), {}, EINVAL},
      {"feature", kDeviceFeature, Bytes{}.U32(8).U32(1u << 16), {}, EINVAL},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(c.what);
    const auto reply = device.transact(c.command, c.body, c.fds);
    ASSERT_TRUE(reply.has_value());
    EXPECT_EQ(reply->flags, kErrorReply);
    EXPECT_EQ(reply->error, c.error);
    EXPECT_EQ(reply->size, kHeaderSize);
  }
  device.client().send(MessageOf(3, kGetInfo, 8, 0, {}));
  const auto too_small = device.receive();
  ASSERT_TRUE(too_small.has_value());
  EXPECT_EQ(too_small->error, static_cast<uint32_t>(EINVAL)) << "a size below the header's";
  EXPECT_TRUE(vm->guest.draw(1, 2));
  vm.reset();
  ExpectVmGone();
}

TEST_F(BackendSessionTest, VersionThatMakesNoSenseIsRefusedAndTheNextVmmIsServed) {
  Start();
  const Bytes versions[] = {
      Bytes{}.U16(1).U16(0),
      Bytes{}.U16(0),
      Bytes{}.U16(0).U16(1).Text("{nonsense").U8(0),
      Bytes{}.U16(0).U16(1).Text(R"({"capabilities":{"max_msg_fds":"many"}})").U8(0),
  };
  for (const Bytes& version : versions) {
    auto vm = ConnectVm();
    const auto reply = vm->device.transact(kVersion, version);
    ASSERT_TRUE(reply.has_value());
    EXPECT_EQ(reply->error, static_cast<uint32_t>(EINVAL));
    EXPECT_TRUE(vm->device.is_hung_up());
    ExpectVmGone();
  }
  auto vm = ConnectVm();
  const auto reply = vm->device.transact(kGetInfo, Bytes{}.U32(16).Fill(12));
  ASSERT_TRUE(reply.has_value()) << "VERSION comes first";
  EXPECT_EQ(reply->error, static_cast<uint32_t>(EINVAL));
  EXPECT_TRUE(vm->device.is_hung_up());
  ExpectVmGone();
  ExpectServes();
}

TEST_F(BackendSessionTest, GuestThatBreaksItsQueueIsReportedOnceAndRecovers) {
  Start();
  auto vm = StartVm();
  vm->guest.control().set_available_index(1000);
  vm->guest.ring_control();
  EXPECT_NE(backend_->wait_for_err("queue 0 stands still until the guest resets the device"),
            std::string::npos);
  ASSERT_TRUE(vm->guest.boot());
  EXPECT_TRUE(vm->guest.draw(1, 1));
}

TEST_F(BackendSessionTest, PinLimitIsACleanErrorForTheGuest) {
  Start({"--pin-limit=8K"});
  auto vm = StartVm();
  EXPECT_EQ(vm->guest.create(1), kOk);
  EXPECT_EQ(vm->guest.attach_picture(1), wire::kErrOutOfMemory);
  EXPECT_EQ(vm->guest.attach(1, {{GpuGuest::kPictures, 8192}}), kOk);
  EXPECT_NE(backend_->wait_for_err("a guest command was refused"), std::string::npos)
      << backend_->err();
}

// PNG signature, then IHDR with width and height, big-endian.
void ExpectPng(const std::string& path, uint32_t width, uint32_t height) {
  const RawBytes png = ReadFile(path);
  ASSERT_GT(png.size(), 24u);
  EXPECT_TRUE(std::ranges::equal(std::span(png).first(8), RawOf("\x89PNG\r\n\x1a\n")));
  const auto number = [&png](size_t at) {
    uint32_t value = 0;
    for (size_t i = 0; i < 4; ++i) value = value << 8 | static_cast<uint32_t>(png[at + i]);
    return value;
  };
  EXPECT_EQ(number(16), width);
  EXPECT_EQ(number(20), height);
}

TEST_F(BackendSessionTest, ScreenshotIsWrittenOnSignalAndAtTheEnd) {
  const std::string png = dir_ / "screen.png";
  Start({"--screenshot=" + png});
  backend_->send_signal(SIGUSR1);
  EXPECT_NE(backend_->wait_for_err("no screenshot: no vm is connected"), std::string::npos);
  auto vm = StartVm();
  backend_->send_signal(SIGUSR1);
  EXPECT_NE(backend_->wait_for_err("shows nothing"), std::string::npos);
  EXPECT_FALSE(std::filesystem::exists(png));
  EXPECT_TRUE(vm->guest.draw(1, 1));
  backend_->send_signal(SIGUSR1);
  EXPECT_NE(backend_->wait_for_err("screenshot written to " + png), std::string::npos);
  ExpectPng(png, GpuGuest::kWidth, GpuGuest::kHeight);
  std::filesystem::remove(png);
  vm.reset();
  ExpectVmGone();
  ExpectPng(png, GpuGuest::kWidth, GpuGuest::kHeight);
}

TEST_F(BackendSessionTest, SignalWithoutTheOptionIsHarmless) {
  Start();
  auto vm = StartVm();
  backend_->send_signal(SIGUSR1);
  EXPECT_NE(backend_->wait_for_err("start with --screenshot=FILE.png"), std::string::npos);
  EXPECT_TRUE(vm->guest.draw(1, 1));
}

// The VMM gives the guest other pages behind the backend's back: to the device that is as if the
// kernel had moved them.
TEST_F(BackendSessionTest, PagesThatMovedUnderMlockAreTakenFromTheDeviceAndReported) {
  if (const auto mapper = dma::PhysicalMapper::Create(); !mapper) {
    GTEST_SKIP() << mapper.error().message();
  }
  Start({"--dma=physical", "--pin=mlock"});
  auto vm = StartVm();
  EXPECT_TRUE(vm->guest.draw(1, 1));
  ASSERT_EQ(fallocate(vm->guest.ram().fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                      GpuGuest::kLowSize + 4096, 8192),
            0);
  EXPECT_NE(backend_->wait_for_err("vgpu0: the kernel moved 2 pages that mlock held"),
            std::string::npos)
      << backend_->err();
  EXPECT_THAT(backend_->err(), HasSubstr("use --pin=io-uring"));
  vm->guest.paint(9);
  EXPECT_EQ(vm->guest.transfer(1), kOk) << "with the addresses of now";
  vm.reset();
  ExpectVmGone();
}

backend::Player::Outcome Replay(const std::string& path) {
  auto reader = backend::TraceReader::Open(path);
  EXPECT_THAT(reader, IsOk());
  if (!reader) return {};
  auto player = backend::Player::Create(reader->get(), {});
  EXPECT_THAT(player, IsOk());
  if (!player) return {};
  const auto outcome = (*player)->play({});
  EXPECT_THAT(outcome, IsOk());
  return outcome.value_or(backend::Player::Outcome{});
}

TEST_F(BackendSessionTest, RecordedSessionsReplayEqual) {
  const std::string trace = dir_ / "t.mvtrace";
  Start({"--record=" + trace});
  auto vm = StartVm();
  EXPECT_TRUE(vm->guest.draw(1, 5));
  ASSERT_THAT(vm->guest.unmap_pictures(), IsOk());
  EXPECT_NE(vm->guest.transfer(1), kOk);
  ASSERT_THAT(vm->guest.map_pictures(), IsOk());
  vm->guest.paint(50);
  EXPECT_EQ(vm->guest.transfer(1), kOk);
  EXPECT_EQ(vm->guest.flush(1), kOk);
  vm.reset();
  ExpectVmGone();
  struct stat status = {};
  ASSERT_EQ(stat(trace.c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 07777, 0600u);
  const auto first = Replay(trace);
  EXPECT_THAT(first.described, ::testing::IsEmpty());
  EXPECT_TRUE(first.is_complete);
  EXPECT_TRUE(first.all_released);
  EXPECT_EQ(first.frame_hashes.size(), 7u) << "a mode, six flushes";
  // The second VM has a file of its own.
  ExpectServes();
  const auto second = Replay(trace + ".2");
  EXPECT_EQ(second.differences, 0u);
  EXPECT_TRUE(second.is_complete);
  EXPECT_EQ(Replay(trace).records, first.records) << "the first is as it was";
}

TEST_F(BackendSessionTest, TraceOfABackendThatWasKilledReplaysAsFarAsItGoes) {
  const std::string trace = dir_ / "t.mvtrace";
  Start({"--record=" + trace});
  auto vm = StartVm();
  EXPECT_TRUE(vm->guest.draw(1, 60)) << backend_->err();  // more than one flush of the file
  backend_->send_signal(SIGKILL);
  EXPECT_EQ(backend_->wait(), -SIGKILL);
  const auto outcome = Replay(trace);
  EXPECT_FALSE(outcome.is_complete);
  EXPECT_EQ(outcome.differences, 0u);
  EXPECT_TRUE(outcome.all_released);
  EXPECT_GT(outcome.frame_hashes.size(), 0u);
}

TEST_F(BackendSessionTest, TraceThatCannotBeWrittenAnyMoreTurnsTheVmmAway) {
  std::filesystem::create_directory(dir_ / "traces");
  Start({"--record=" + (dir_ / "traces/t")});
  std::filesystem::remove_all(dir_ / "traces");
  auto vm = ConnectVm();
  EXPECT_TRUE(vm->device.is_hung_up());
  EXPECT_NE(backend_->wait_for_err("cannot create the trace"), std::string::npos);
  backend_->send_signal(SIGTERM);
  ExpectLeaves(0);
}

// A VM whose memory has no file.
class RemoteMemorySessionTest : public BackendTest {
 protected:
  std::unique_ptr<RemoteVm> StartVmWithoutFiles() {
    auto vm = ConnectVm();
    vm->guest.set_files(false, false);
    EXPECT_TRUE(vm->start());
    return vm;
  }
  // Makes a request, and waits until the backend asks for memory.
  static Reply FirstQuestion(RemoteVm& vm) {
    DescriptorChainBuilder chain(&vm.guest.memory());
    chain.readable(wire::RequestBytes(wire::kCmdGetDisplayInfo).bytes()).writable(408);
    vm.guest.control().add(chain);
    vm.guest.ring_control();
    std::vector<Reply> asked;
    while (asked.empty() && vm.wait_briefly()) asked = vm.device.take_dma();
    EXPECT_FALSE(asked.empty());
    return asked.empty() ? Reply{} : asked.front();
  }
};

TEST_F(RemoteMemorySessionTest, GuestDrawsAndTheReasonOfTheSlownessIsSaidOnce) {
  const std::string trace = dir_ / "t.mvtrace";
  Start({"--record=" + trace});
  auto vm = StartVmWithoutFiles();
  EXPECT_TRUE(vm->guest.draw(1, 3));
  EXPECT_TRUE(vm->guest.move_cursor(3, 4));
  vm.reset();
  ExpectVmGone();
  EXPECT_THAT(backend_->err(), HasSubstr("pinned at most 0 pages"));
  const std::string err = backend_->err();
  const size_t said = err.find("has no file");
  ASSERT_NE(said, std::string::npos) << err;
  EXPECT_EQ(err.find("has no file", said + 1), std::string::npos);
  EXPECT_THAT(err, HasSubstr("memory-backend-memfd,share=on"));
  const auto outcome = Replay(trace);
  EXPECT_THAT(outcome.described, ::testing::IsEmpty());
  EXPECT_TRUE(outcome.is_complete && outcome.all_released);
  EXPECT_EQ(outcome.frame_hashes.size(), 4u) << "a mode, three flushes";
  ExpectServes();
}

TEST_F(RemoteMemorySessionTest, VmmIsServedWhileItOwesAnAnswer) {
  Start();
  auto vm = StartVmWithoutFiles();
  const Reply question = FirstQuestion(*vm);
  EXPECT_EQ(question.command, kDmaRead);
  for (int i = 0; i < 20; ++i) EXPECT_EQ(vm->guest.driver().status(), 0x0f);
  EXPECT_THAT(vm->guest.unmap_pictures(), IsOk());
  EXPECT_THAT(vm->guest.map_pictures(), IsOk());
  EXPECT_THAT(backend_->err(), ::testing::Not(HasSubstr("stands still")));
}

TEST_F(RemoteMemorySessionTest, VmmMayLeaveWhileItOwesAnAnswer) {
  Start();
  auto vm = StartVmWithoutFiles();
  FirstQuestion(*vm);
  const auto left = std::chrono::steady_clock::now();
  vm.reset();
  ExpectVmGone();
  EXPECT_LT(std::chrono::steady_clock::now() - left, std::chrono::seconds(4));
  EXPECT_THAT(backend_->err(), ::testing::Not(HasSubstr("stands still")));
  ExpectServes();
}

TEST_F(RemoteMemorySessionTest, BackendLeavesWhileItWaitsForAnAnswer) {
  const std::string trace = dir_ / "t.mvtrace";
  Start({"--record=" + trace});
  auto vm = StartVmWithoutFiles();
  FirstQuestion(*vm);
  const auto asked = std::chrono::steady_clock::now();
  backend_->send_signal(SIGTERM);
  ExpectLeaves(0);
  EXPECT_LT(std::chrono::steady_clock::now() - asked, std::chrono::seconds(4));
  EXPECT_THAT(backend_->err(), HasSubstr(kNothingLeft));
  EXPECT_THAT(Replay(trace).described, ::testing::IsEmpty());
}

TEST_F(RemoteMemorySessionTest, RefusalStopsTheQueueAndSaysWhy) {
  Start();
  auto vm = StartVmWithoutFiles();
  vm->device.client().refuse(FirstQuestion(*vm), ENODEV);
  EXPECT_NE(
      backend_->wait_for_err("queue 0 stands still until the guest resets the device: the vmm "
                             "refuses a dma_read of 2 bytes at iova 0x40000"),
      std::string::npos)
      << backend_->err();
  ASSERT_TRUE(vm->guest.boot());
  EXPECT_TRUE(vm->guest.draw(1, 1));
}

TEST_F(RemoteMemorySessionTest, AnswersWithA32BitCountAreFoundOut) {
  Start();
  auto vm = StartVmWithoutFiles();
  const Reply question = FirstQuestion(*vm);
  const Bytes body = Bytes{}.U64(question.u64(0)).U32(question.u32(8)).Fill(question.u64(8));
  vm->device.client().send(MessageOf(
      question.id, kDmaRead, static_cast<uint32_t>(kHeaderSize + body.size()), kTypeReply, body));
  EXPECT_NE(backend_->wait_for_err("as qemu before 11 does"), std::string::npos) << backend_->err();
}

}  // namespace
}  // namespace mvgpu::testing
