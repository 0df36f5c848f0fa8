// How mvgpu-backend is started and how it leaves: options, sockets, signals, exit codes, accounts.
// MVGPU_AUDIT is the path of mvgpu-audit.

#include <fcntl.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <filesystem>

#include <nlohmann/json.hpp>

#include "tests/backend/backend_fixture.h"

namespace mvgpu::testing {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

class BackendCommandLineTest : public BackendTest {
 protected:
  // Runs it to its end; one line on standard error, unless it leaves with 0.
  std::string ExpectRefuses(std::vector<std::string> arguments, int exit_code) {
    ChildProcess process(Command(std::move(arguments)));
    EXPECT_EQ(process.wait(), exit_code);
    const std::string text = process.err();
    EXPECT_EQ(LinesIn(text), 1u) << text;
    EXPECT_THAT(text, ::testing::StartsWith("mvgpu-backend: "));
    EXPECT_EQ(process.out(), "");
    return text;
  }
  UniqueFd ListenOn(const std::string& path) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    path.copy(address.sun_path, sizeof(address.sun_path) - 1);
    UniqueFd fd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    EXPECT_EQ(bind(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
    EXPECT_EQ(listen(fd.get(), 1), 0);
    return fd;
  }
  static std::pair<UniqueFd, UniqueFd> SocketPair() {
    int ends[2] = {-1, -1};
    EXPECT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
    return {UniqueFd(ends[0]), UniqueFd(ends[1])};
  }
};

TEST_F(BackendCommandLineTest, OptionsThatWouldMeanNothingAreRefused) {
  const std::string path = "--socket-path=" + socket_path();
  EXPECT_THAT(ExpectRefuses({path, "--pin-limit=-4K"}, 2), HasSubstr("'-4K' is no size"));
  EXPECT_THAT(ExpectRefuses({path, "--pin-limit=18446744073709551616"}, 2),
              HasSubstr("'18446744073709551616' is no size"));
  EXPECT_THAT(ExpectRefuses({path, "--iommu-group=7"}, 2),
              HasSubstr("--iommu-group=7 means nothing with --dma=none, only with --dma=iommu"));
  EXPECT_THAT(ExpectRefuses({path, "--dma=iommu", "--vulkan-device=x"}, 2),
              HasSubstr("--vulkan-device=x means nothing with --dma=iommu"));
  EXPECT_THAT(ExpectRefuses({path, "--vfio-device=0000:00:05.0"}, 2),
              HasSubstr("--vfio-device=0000:00:05.0 means nothing with --dma=none"));
  EXPECT_THAT(ExpectRefuses({path, "--dma=iommu", "--iommu-group=7", "--pin=mlock"}, 2),
              HasSubstr("--pin means nothing with --iommu-group=7, whose mappings hold the pages"));
  EXPECT_THAT(ExpectRefuses({path, "--dma=iommu", "--vfio-device=0000:00:05.0", "--pin=none"}, 2),
              HasSubstr("--pin means nothing with --vfio-device=0000:00:05.0"));
  EXPECT_THAT(
      ExpectRefuses({path, "--dma=iommu", "--vfio-device=0000:00:05.0", "--iommu-group=7"}, 2),
      HasSubstr("excludes"));
}

// What this machine's kernel says: most have no iommufd, and none has this device.
TEST_F(BackendCommandLineTest, ADeviceThatIommufdCannotHaveIsRefusedWithTheRemedy) {
  const bool has_iommufd = access("/dev/iommu", R_OK | W_OK) == 0;
  const bool is_missing = access("/dev/iommu", F_OK) != 0;
  EXPECT_THAT(
      ExpectRefuses({"--socket-path=" + socket_path(), "--dma=iommu", "--vfio-device=ffff:ff:1f.7"},
                    1),
      HasSubstr(has_iommufd  ? "there is no pci device ffff:ff:1f.7"
                : is_missing ? "CONFIG_IOMMUFD and its module; or use --iommu-group"
                             : "give this user access to the file"));
  EXPECT_THAT(
      ExpectRefuses({"--socket-path=" + socket_path(), "--dma=iommu", "--vfio-device=05:00"}, 1),
      HasSubstr("'05:00' is no pci address"));
}

TEST_F(BackendCommandLineTest, CapabilitiesAreOneJsonObject) {
  ChildProcess process(Command({"--print-capabilities"}));
  EXPECT_EQ(process.wait(), 0);
  const json capabilities = json::parse(process.out(), nullptr, false);
  ASSERT_TRUE(capabilities.is_object()) << process.out();
  EXPECT_EQ(capabilities.at("type"), "gpu");
  EXPECT_EQ(capabilities.at("pin").dump(), "[\"io-uring\",\"mlock\",\"none\"]");
  EXPECT_EQ(capabilities.at("dma").dump(), "[\"iommu\",\"none\",\"physical\",\"vulkan\"]");
  EXPECT_EQ(process.err(), "");
}

TEST_F(BackendCommandLineTest, HelpAndVersionSucceed) {
  ChildProcess help(Command({"--help"}));
  EXPECT_EQ(help.wait(), 0);
  for (const char* option : {"--socket-path", "--fd", "--pin-limit", "--record", "--screenshot",
                             "--once", "--vm-uuid", "Exit codes"}) {
    EXPECT_THAT(help.out(), HasSubstr(option));
  }
  ChildProcess version(Command({"--version"}));
  EXPECT_EQ(version.wait(), 0);
  EXPECT_THAT(version.out(), HasSubstr("."));
}

TEST_F(BackendCommandLineTest, MistakesAreOneLineAndExitCodeTwo) {
  const std::string path = "--socket-path=" + socket_path();
  EXPECT_THAT(ExpectRefuses({}, 2), HasSubstr("--socket-path"));
  EXPECT_THAT(ExpectRefuses({path, "--nonsense"}, 2), HasSubstr("--nonsense"));
  EXPECT_THAT(ExpectRefuses({path, "stray"}, 2), HasSubstr("stray"));
  EXPECT_THAT(ExpectRefuses({path, "--fd=3"}, 2), HasSubstr("--fd"));
  EXPECT_THAT(ExpectRefuses({path, "--pin=glue"}, 2), HasSubstr("glue"));
  EXPECT_THAT(ExpectRefuses({path, "--dma=magic"}, 2), HasSubstr("magic"));
  EXPECT_THAT(ExpectRefuses({path, "--dma=iommu", "--iommu-group=none-such"}, 1),
              HasSubstr("/dev/vfio"));
  EXPECT_THAT(ExpectRefuses({path, "--dma=physical", "--pin=none"}, 1),
              HasSubstr("--pin=io-uring"));
  EXPECT_THAT(ExpectRefuses({path, "--pin-limit=lots"}, 2), HasSubstr("lots"));
  EXPECT_THAT(ExpectRefuses({path, "--pin-limit=99999999999999999999G"}, 2),
              HasSubstr("pin-limit"));
  EXPECT_THAT(ExpectRefuses({path, "--pin-limit=0"}, 2), HasSubstr("less than a page"));
  for (const char* size : {"1", "512", "3K", "4095"}) {
    EXPECT_THAT(ExpectRefuses({path, std::string("--dma-idle=") + size}, 2),
                HasSubstr("less than a page; give 4K or more, or 0 for none"));
  }
  for (const char* size : {"lots", "", "4KK", "1e9", "99999999999999999999G", "16E"}) {
    EXPECT_THAT(ExpectRefuses({path, std::string("--dma-idle=") + size}, 2),
                HasSubstr("--dma-idle"))
        << size;
  }
  EXPECT_THAT(ExpectRefuses({path, "--dma-idle=-4K"}, 2), HasSubstr("'-4K' is no size"));
  EXPECT_THAT(ExpectRefuses({"--fd=-7"}, 2), HasSubstr("--fd"));
  EXPECT_THAT(ExpectRefuses({"--fd=zero"}, 2), HasSubstr("--fd"));
  EXPECT_THAT(ExpectRefuses({path, "--vm-uuid=nobody"}, 2), HasSubstr("nobody"));
  EXPECT_THAT(ExpectRefuses({"--socket-path="}, 2), HasSubstr("--socket-path"));
  EXPECT_FALSE(std::filesystem::exists(socket_path()));
}

TEST_F(BackendCommandLineTest, MapperThatCannotBeMadeIsNoticedAtTheStart) {
  const std::string path = "--socket-path=" + socket_path();
  EXPECT_THAT(ExpectRefuses({path, "--dma=vulkan", "--vulkan-device=/etc/hostname"}, 1),
              HasSubstr("vulkan"));
  EXPECT_FALSE(std::filesystem::exists(socket_path()));
}

TEST_F(BackendCommandLineTest, TraceThatCannotBeMadeIsNoticedAtTheStart) {
  const std::string trace = dir_ / "no/such/dir/t";
  EXPECT_THAT(ExpectRefuses({"--socket-path=" + socket_path(), "--record=" + trace}, 1),
              HasSubstr("cannot create the trace " + trace));
}

TEST_F(BackendCommandLineTest, SocketThatCannotBeUsedIsOneLineAndExitCodeThree) {
  const auto refuses = [this](const std::string& path) {
    return ExpectRefuses({"--socket-path=" + path}, 3);
  };
  EXPECT_THAT(refuses("/tmp/" + std::string(120, 'x')), HasSubstr("107"));
  EXPECT_THAT(refuses(dir_ / "no/such/dir"), HasSubstr("no/such/dir"));
  WriteFile(dir_ / "file", RawOf("precious"));
  EXPECT_THAT(refuses(dir_ / "file"), HasSubstr("not a socket"));
  EXPECT_EQ(ReadFile(dir_ / "file"), RawOf("precious"));
  const UniqueFd listener = ListenOn(dir_ / "taken");
  EXPECT_THAT(refuses(dir_ / "taken"), HasSubstr("taken"));
  EXPECT_TRUE(ConnectTo(dir_ / "taken").is_valid()) << "the other goes on listening";
}

TEST_F(BackendCommandLineTest, DescriptorThatCannotBeUsedIsOneLineAndExitCodeThree) {
  const auto refuses = [this](const UniqueFd& fd) {
    ChildProcess process(
        ChildProcess::Options{.command = Command({"--fd=7"}), .pass_fds = {{fd.get(), 7}}});
    EXPECT_EQ(process.wait(), 3) << process.err();
    EXPECT_EQ(LinesIn(process.err()), 1u) << process.err();
    EXPECT_THAT(process.err(), HasSubstr("descriptor 7"));
  };
  refuses(UniqueFd(open("/dev/null", O_RDWR | O_CLOEXEC)));
  refuses(UniqueFd(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)));
  refuses(UniqueFd(socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0)));
  ExpectRefuses({"--fd=90"}, 3);  // there is none
}

TEST_F(BackendCommandLineTest, SocketIsForThisUserOnlyAndGoesWithTheBackend) {
  Start();
  struct stat status = {};
  ASSERT_EQ(stat(socket_path().c_str(), &status), 0);
  EXPECT_TRUE(S_ISSOCK(status.st_mode));
  EXPECT_EQ(status.st_mode & 0777, 0600u);
  backend_->send_signal(SIGTERM);
  ExpectLeaves(0);
  EXPECT_FALSE(std::filesystem::exists(socket_path()));
}

TEST_F(BackendCommandLineTest, SocketOfABackendThatWasKilledIsReplaced) {
  Start();
  backend_->send_signal(SIGKILL);
  EXPECT_EQ(backend_->wait(), -SIGKILL);
  EXPECT_TRUE(std::filesystem::exists(socket_path()));
  Start();
  ExpectServes();
}

TEST_F(BackendCommandLineTest, TermAndIntLeaveAtOnceAndCleanWithAVmConnected) {
  for (const int number : {SIGTERM, SIGINT}) {
    Start();
    auto vm = StartVm();
    EXPECT_TRUE(vm->guest.draw(1, 1));
    backend_->send_signal(number);
    ExpectLeaves(0);
    EXPECT_THAT(backend_->err(), HasSubstr(kNothingLeft));
    EXPECT_TRUE(vm->device.is_hung_up());
    EXPECT_FALSE(std::filesystem::exists(socket_path()));
  }
}

TEST_F(BackendCommandLineTest, OnceLeavesAfterTheFirstVm) {
  Start({"--once"});
  auto vm = StartVm();
  EXPECT_TRUE(vm->guest.draw(1, 1));
  vm.reset();
  ExpectLeaves(0);
  EXPECT_THAT(backend_->err(), HasSubstr(kNothingLeft));
  EXPECT_FALSE(std::filesystem::exists(socket_path()));
}

TEST_F(BackendCommandLineTest, ConnectedDescriptorIsServedOnce) {
  auto [ours, theirs] = SocketPair();
  backend_ = std::make_unique<ChildProcess>(
      ChildProcess::Options{.command = Command({"--fd=5"}), .pass_fds = {{theirs.get(), 5}}});
  theirs.reset();
  {
    RemoteVm vm(std::move(ours));
    ASSERT_TRUE(vm.start());
    EXPECT_TRUE(vm.guest.draw(1, 1));
  }
  ExpectLeaves(0);
  EXPECT_THAT(backend_->err(), HasSubstr(kNothingLeft));
}

TEST_F(BackendCommandLineTest, ListeningDescriptorIsServedAgainAndAgain) {
  const UniqueFd listener = ListenOn(socket_path());
  backend_ = std::make_unique<ChildProcess>(
      ChildProcess::Options{.command = Command({"--fd=9"}), .pass_fds = {{listener.get(), 9}}});
  ExpectServes();
  ExpectServes();
  backend_->send_signal(SIGTERM);
  ExpectLeaves(0);
  EXPECT_TRUE(std::filesystem::exists(socket_path())) << "it is somebody else's";
}

TEST_F(BackendCommandLineTest, SystemdMayHandTheSocketOver) {
  const UniqueFd listener = ListenOn(socket_path());
  backend_ = std::make_unique<ChildProcess>(ChildProcess::Options{.command = Command(),
                                                                  .environment = {"LISTEN_FDS=1"},
                                                                  .pass_fds = {{listener.get(), 3}},
                                                                  .as_activated = true});
  ExpectServes();
  backend_->send_signal(SIGTERM);
  ExpectLeaves(0);
  // Meant for another process.
  ChildProcess other(ChildProcess::Options{.command = Command(),
                                           .environment = {"LISTEN_FDS=1", "LISTEN_PID=1"},
                                           .pass_fds = {{listener.get(), 3}}});
  EXPECT_EQ(other.wait(), 2);
}

class BackendAccountsTest : public BackendCommandLineTest {
 protected:
  // The domains of the VM in the accounts.
  json Domains() {
    ChildProcess audit({MVGPU_AUDIT, "show", "--json", "--vm=" + std::string(kVmUuid),
                        "--runtime-dir=" + runtime_dir()});
    const auto code = audit.wait();
    if (code == 3) return json::array();  // no such VM
    EXPECT_EQ(code, 0) << audit.err();
    const json report = json::parse(audit.out(), nullptr, false);
    if (!report.is_object() || report["vms"].size() != 1) {
      ADD_FAILURE() << audit.out();
      return json::array();
    }
    EXPECT_EQ(report["vms"][0]["problems"], json::array());
    return report["vms"][0]["domains"];
  }
  void StartWithAccounts() { Start({"--vm-uuid=" + std::string(kVmUuid), "--name=card0"}); }
};

TEST_F(BackendAccountsTest, AuditSeesTheRunningVm) {
  StartWithAccounts();
  auto vm = StartVm();
  EXPECT_EQ(vm->guest.create(1), kOk);
  EXPECT_EQ(vm->guest.attach_picture(1), kOk);
  const json domains = Domains();
  ASSERT_EQ(domains.size(), 1u);
  EXPECT_EQ(domains[0]["name"], "card0");
  EXPECT_EQ(domains[0]["pid"], backend_->pid());
  EXPECT_EQ(domains[0]["state"], "alive");
  EXPECT_EQ(domains[0]["mapped_pages"], 2048);
  EXPECT_EQ(domains[0]["unique_pages"], 3);
  EXPECT_EQ(domains[0]["charged_pages"], 3);
  vm.reset();
  ExpectVmGone();
  EXPECT_EQ(Domains().size(), 0u);
}

TEST_F(BackendAccountsTest, IdlePagesAreKeptAsLongAsTheVmIsThere) {
  Start({"--vm-uuid=" + std::string(kVmUuid), "--dma-idle=9000"});
  auto vm = StartVm();
  EXPECT_EQ(vm->guest.create(1), kOk);
  EXPECT_EQ(vm->guest.attach_picture(1), kOk);
  EXPECT_EQ(vm->guest.detach(1), kOk);
  const json domains = Domains();
  ASSERT_EQ(domains.size(), 1u);
  EXPECT_EQ(domains[0]["dma_cache"]["idle_pages"], 2) << "whole pages";
  EXPECT_EQ(domains[0]["charged_pages"], 2);
  vm.reset();
  ExpectVmGone();
  EXPECT_EQ(Domains().size(), 0u);
}

TEST_F(BackendAccountsTest, RowOfAKilledBackendIsReclaimedByTheNext) {
  StartWithAccounts();
  auto vm = StartVm();
  EXPECT_TRUE(vm->guest.draw(1, 1));
  backend_->send_signal(SIGKILL);
  EXPECT_EQ(backend_->wait(), -SIGKILL);
  const json dead = Domains();
  ASSERT_EQ(dead.size(), 1u);
  EXPECT_EQ(dead[0]["state"], "dead");
  EXPECT_EQ(dead[0]["unique_pages"], 3);
  StartWithAccounts();
  vm = StartVm();
  EXPECT_TRUE(vm->guest.draw(1, 1));
  const json alive = Domains();
  ASSERT_EQ(alive.size(), 1u);
  EXPECT_EQ(alive[0]["state"], "alive");
  EXPECT_EQ(alive[0]["pid"], backend_->pid());
  vm.reset();
  ExpectVmGone();
}

TEST_F(BackendAccountsTest, AccountsThatCannotBeKeptAreNoticedAtTheStart) {
  WriteFile(runtime_dir(), {});
  const std::string said = ExpectRefuses({"--socket-path=" + socket_path()}, 2);
  EXPECT_THAT(said, HasSubstr(runtime_dir()));
}

}  // namespace
}  // namespace mvgpu::testing
