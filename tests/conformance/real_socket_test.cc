// The whole way: a socket file, an accept loop as the backend has it, one client after another.

#include <poll.h>
#include <sys/un.h>

#include <atomic>
#include <thread>

#include "tests/conformance/server_fixture.h"
#include "vmm-glue/vfio_user/listener.h"

namespace mvgpu::testing {
namespace {

class RealSocketTest : public ::testing::Test {
 protected:
  RealSocketTest() : fds_before_(OpenFds()) {}

  void SetUp() override {
    char directory[] = "/tmp/mvgpu-XXXXXX";
    ASSERT_NE(mkdtemp(directory), nullptr);
    directory_ = directory;
    auto listener = glue::vfio_user::Listener::Create(directory_ + "/vgpu.sock");
    ASSERT_THAT(listener, IsOk());
    listener_ = std::move(*listener);
    thread_ = std::thread([this] { ServeClients(); });
  }
  void TearDown() override {
    stop_ = true;
    thread_.join();
    listener_.reset();
    std::filesystem::remove_all(directory_);
    EXPECT_EQ(OpenFds(), fds_before_);
  }

  static bool IsReadable(int fd) {
    pollfd poll_fd{fd, POLLIN, 0};
    return poll(&poll_fd, 1, 10) > 0;
  }
  void ServeClients() {
    while (!stop_) {
      if (!IsReadable(listener_->fd())) continue;
      auto client = listener_->accept();
      if (!client || !client->is_valid()) continue;
      auto server = glue::vfio_user::Server::Create(std::move(*client), &device_, &log_);
      while (!stop_) {
        if (!IsReadable((*server)->fd())) continue;
        const auto is_connected = (*server)->service();
        if (!is_connected || !*is_connected) break;
      }
      server->reset();
      ++clients_served_;
    }
  }
  VfioUserClient ConnectClient() {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    listener_->path().copy(address.sun_path, sizeof(address.sun_path) - 1);
    UniqueFd fd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    EXPECT_EQ(connect(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
    return VfioUserClient(std::move(fd));
  }
  static Reply Wait(VfioUserClient& client) {
    for (int i = 0; i < 1000; ++i) {
      if (auto reply = client.receive()) return *reply;
      IsReadable(client.fd());
    }
    ADD_FAILURE() << "no reply";
    return {};
  }

  const size_t fds_before_;
  std::string directory_;
  FakeVfioDevice device_;
  RecordingLog log_;
  std::unique_ptr<glue::vfio_user::Listener> listener_;
  std::atomic<bool> stop_ = false;
  std::atomic<int> clients_served_ = 0;
  std::thread thread_;
};

TEST_F(RealSocketTest, ServesOneClientAfterAnother) {
  for (int i = 0; i < 3; ++i) {
    VfioUserClient client = ConnectClient();
    client.command(kVersion, Bytes{}.U16(0).U16(1));
    EXPECT_EQ(Wait(client).flags, kTypeReply);
    client.command(kGetInfo, Bytes{}.U32(16).Fill(12));
    EXPECT_THAT(Wait(client), IsReplyOfSize(32));
  }
}

TEST_F(RealSocketTest, ClientThatBreaksTheProtocolMakesRoomForTheNext) {
  VfioUserClient rude = ConnectClient();
  rude.send(MessageOf(1, kVersion, 0x7fffffff, 0, {}));
  EXPECT_THAT(Wait(rude), IsErrorReply(EINVAL));
  VfioUserClient next = ConnectClient();
  next.command(kVersion, Bytes{}.U16(0).U16(1));
  EXPECT_EQ(Wait(next).flags, kTypeReply);
  EXPECT_TRUE(rude.is_closed());
}

TEST_F(RealSocketTest, ClientThatIsKilledLeavesNothingBehind) {
  {
    VfioUserClient client = ConnectClient();
    client.command(kVersion, Bytes{}.U16(0).U16(1));
    Wait(client);
    client.command(kDmaMap, Bytes{}.U32(32).U32(3).U64(0).U64(0x1000).U64(0x1000));
    EXPECT_THAT(Wait(client), IsReplyOfSize(16));
    EXPECT_EQ(device_.container.totals().mappings, 1u);
    client.send(Bytes{}.U16(1));
  }
  for (int i = 0; i < 1000 && clients_served_ == 0; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  EXPECT_EQ(clients_served_, 1);
  EXPECT_EQ(device_.container.totals().mappings, 0u);
}

}  // namespace
}  // namespace mvgpu::testing
