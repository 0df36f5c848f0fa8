#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "apionly-domain/base/unique_fd.h"
#include "tests/conformance/vfio_user_client.h"
#include "tests/fakes/fake_vfio_device.h"
#include "tests/fakes/result_matchers.h"
#include "vmm-glue/vfio_user/server.h"

namespace mvgpu::testing {

// A success reply of exactly this many bytes, header included.
MATCHER_P(IsReplyOfSize, total_size, "is a success reply of the expected size") {
  return arg.flags == kTypeReply && arg.error == 0 && arg.size == static_cast<uint32_t>(total_size);
}
// Error replies are a header and nothing else.
MATCHER_P(IsErrorReply, sys_errno, "is an error reply with the expected errno") {
  return arg.flags == kErrorReply && arg.error == static_cast<uint32_t>(sys_errno) &&
         arg.size == kHeaderSize;
}

class RecordingLog final : public glue::vfio_user::Server::Log {
 public:
  void warn(std::string_view line) override { lines.emplace_back(line); }
  std::vector<std::string> lines;
};

inline size_t OpenFds() {
  namespace fs = std::filesystem;
  const auto fds = fs::directory_iterator("/proc/self/fd");
  return static_cast<size_t>(std::distance(fs::begin(fds), fs::end(fds)));
}

// A server and a client at the two ends of a socket pair, in one thread: the server works when the
// test lets it. Every test ends with as many open descriptors as it began.
class ServerTest : public ::testing::Test {
 protected:
  enum class State { kServing, kClientLeft, kBroken };

  ServerTest() : fds_before_(OpenFds()) {}

  void SetUp() override { Connect(); }
  void TearDown() override {
    Disconnect();
    sent_fds_.clear();
    device_.eventfds.clear();
    EXPECT_EQ(OpenFds(), fds_before_) << "descriptors leaked";
  }

  // A fresh connection to the same device, not negotiated yet.
  void Connect() {
    Disconnect();
    int ends[2];
    ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
    client_ = std::make_unique<VfioUserClient>(UniqueFd(ends[0]));
    auto server = glue::vfio_user::Server::Create(
        UniqueFd(ends[1]), &device_, &log_,
        {.send_timeout = std::chrono::milliseconds(50), .dma_requests = dma_requests()});
    ASSERT_THAT(server, IsOk());
    server_ = std::move(*server);
    state_ = State::kServing;
  }
  // Where a test has the server ask the client for memory.
  virtual glue::vfio_user::DmaRequests* dma_requests() { return nullptr; }

  void Disconnect() {
    server_.reset();
    client_.reset();
  }

  // Lets the server do what there is to do, as an event loop would.
  State Serve() {
    if (state_ != State::kServing) return state_;
    const auto result = server_->service();
    if (!result) {
      last_error_ = result.error().message();
      state_ = State::kBroken;
      server_.reset();
    } else if (!*result) {
      state_ = State::kClientLeft;
    }
    return state_;
  }

  Reply ReceiveReply() {
    std::optional<Reply> reply = client_->receive();
    if (!reply) {
      ADD_FAILURE() << "no reply came";
      return {};
    }
    return *reply;
  }
  // Sends a command and returns its reply, which must carry the command's id.
  Reply Transact(uint16_t command, const Bytes& body, const std::vector<int>& fds = {}) {
    const uint16_t id = client_->command(command, body, fds);
    Serve();
    Reply reply = ReceiveReply();
    EXPECT_EQ(reply.id, id);
    EXPECT_EQ(reply.command, command);
    return reply;
  }
  // A bare header that lies about what follows.
  Reply TransactHeader(uint16_t command, uint32_t size, uint32_t flags = 0) {
    client_->send(MessageOf(7, command, size, flags, {}));
    Serve();
    return ReceiveReply();
  }
  Reply Negotiate() { return Transact(kVersion, Bytes{}.U16(0).U16(1)); }
  // The connection goes on: the next command is understood and answered.
  void ExpectStillServing() {
    EXPECT_THAT(Transact(kGetInfo, Bytes{}.U32(16).Fill(12)), IsReplyOfSize(32));
    EXPECT_EQ(state_, State::kServing);
  }

  // A counter that the test keeps; closed at the end.
  int NewEventfd(unsigned initial = 0) {
    sent_fds_.emplace_back(eventfd(initial, EFD_CLOEXEC | EFD_NONBLOCK));
    return sent_fds_.back().get();
  }
  static uint64_t Counter(int fd) {
    uint64_t value = 0;
    return read(fd, &value, sizeof(value)) == sizeof(value) ? value : 0;
  }

  const size_t fds_before_;
  FakeVfioDevice device_;
  RecordingLog log_;
  std::unique_ptr<VfioUserClient> client_;
  std::unique_ptr<glue::vfio_user::Server> server_;
  State state_ = State::kServing;
  std::string last_error_;
  std::vector<UniqueFd> sent_fds_;
};

// The same, past the version exchange.
class NegotiatedServerTest : public ServerTest {
 protected:
  void SetUp() override {
    Connect();
    ASSERT_THAT(Negotiate(), IsReplyOfSize(Negotiated()));
    device_.calls.clear();
  }
  static size_t Negotiated() {
    return kHeaderSize + 4 +
           sizeof(R"({"capabilities":{"max_msg_fds":16,"max_data_xfer_size":1048576,)"
                  R"("pgsizes":4096,"max_dma_maps":65535}})");
  }
};

}  // namespace mvgpu::testing
