#include "vmm-glue/vfio_user/dma_requests.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <functional>
#include <future>
#include <optional>
#include <thread>
#include <vector>

#include "tests/fakes/result_matchers.h"

namespace mvgpu::testing {
namespace {

using glue::vfio_user::DmaRequests;
using glue::vfio_user::Header;
using glue::vfio_user::Message;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr uint16_t kDmaRead = 11;
constexpr uint16_t kDmaWrite = 12;
constexpr uint64_t kMemory = 0x10000;  // where the client's memory begins

// The client as it is seen from the requests: it has memory, keeps what it was sent, and answers at
// once unless it is told to do something else.
class Client final : public DmaRequests::Sender {
 public:
  struct Sent {
    Header header;
    uint64_t iova = 0;
    uint64_t count = 0;
    std::vector<std::byte> data;
  };

  Result<void> send_command(const Header& header, std::span<const std::byte> payload) override {
    Sent command{header, 0, 0, {}};
    std::memcpy(&command.iova, payload.data(), 8);
    std::memcpy(&command.count, payload.data() + 8, 8);
    command.data.assign(payload.begin() + 16, payload.end());
    sent.push_back(command);
    if (on_command) return on_command(command);
    answer(command);
    return {};
  }

  // The right answer, less what `change` does to it.
  bool answer(const Sent& command, const std::function<void(Message&)>& change = {}) {
    Message message;
    message.header = {command.header.id, command.header.command, 0, 1, 0};
    message.payload.resize(16);
    std::memcpy(message.payload.data(), &command.iova, 8);
    std::memcpy(message.payload.data() + 8, &command.count, 8);
    const auto at = memory.begin() + static_cast<std::ptrdiff_t>(command.iova - kMemory);
    if (command.header.command == kDmaWrite) {
      std::copy(command.data.begin(), command.data.end(), at);
    } else {
      message.payload.insert(message.payload.end(), at,
                             at + static_cast<std::ptrdiff_t>(command.count));
    }
    if (change) change(message);
    message.header.size = static_cast<uint32_t>(16 + message.payload.size());
    return requests->take_answer(message);
  }

  DmaRequests* requests = nullptr;
  std::vector<std::byte> memory = std::vector<std::byte>(1 << 20);
  std::vector<Sent> sent;
  std::function<Result<void>(const Sent&)> on_command;
};

class DmaRequestsTest : public ::testing::Test {
 protected:
  DmaRequestsTest() {
    client_.requests = &requests_;
    for (size_t i = 0; i < client_.memory.size(); ++i) {
      client_.memory[i] = static_cast<std::byte>(i * 131 + (i >> 12) * 7);
    }
    requests_.open(&client_, 1 << 20);
  }
  ~DmaRequestsTest() override { requests_.close(); }

  Result<void> Read(uint64_t offset, size_t size) {
    bytes_.assign(size, std::byte{0});
    return requests_.read(Iova(kMemory + offset), bytes_);
  }
  Result<void> Write(uint64_t offset, size_t size) {
    return requests_.write(Iova(kMemory + offset), std::vector(size, std::byte{0x5a}));
  }
  void ExpectRead(uint64_t offset) {
    EXPECT_TRUE(std::equal(bytes_.begin(), bytes_.end(),
                           client_.memory.begin() + static_cast<std::ptrdiff_t>(offset)));
  }
  // Answers the next commands so that something is wrong.
  void AnswerWith(std::function<void(Message&)> change) {
    client_.on_command = [this, change](const Client::Sent& command) -> Result<void> {
      taken_ = client_.answer(command, change);
      return {};
    };
  }
  std::vector<uint64_t> SizesSent() const {
    std::vector<uint64_t> sizes;
    for (const auto& command : client_.sent) sizes.push_back(command.count);
    return sizes;
  }

  DmaRequests requests_{std::chrono::milliseconds(2)};  // an answer comes at once or never
  Client client_;
  std::vector<std::byte> bytes_;
  bool taken_ = true;
};

TEST_F(DmaRequestsTest, ACommandIsAHeaderAnAddressAndASize) {
  ASSERT_THAT(Read(100, 8), IsOk());
  ExpectRead(100);
  ASSERT_EQ(client_.sent.size(), 1u);
  EXPECT_EQ(client_.sent[0].header.command, kDmaRead);
  EXPECT_EQ(client_.sent[0].header.size, 32u);
  EXPECT_EQ(client_.sent[0].header.flags, 0u);
  EXPECT_EQ(client_.sent[0].iova, kMemory + 100);
  EXPECT_EQ(client_.sent[0].count, 8u);
}

TEST_F(DmaRequestsTest, LongTransfersGoInPiecesThatTheClientCanTake) {
  ASSERT_THAT(Read(0, 150000), IsOk());
  ExpectRead(0);
  EXPECT_THAT(SizesSent(), ElementsAre(65536u, 65536u, 18928u));
  client_.sent.clear();
  requests_.open(&client_, 4096);
  ASSERT_THAT(Write(10, 8202), IsOk());
  EXPECT_THAT(SizesSent(), ElementsAre(4096u, 4096u, 10u));
  EXPECT_EQ(client_.sent[2].iova, kMemory + 10 + 8192);
  EXPECT_TRUE(std::all_of(client_.memory.begin() + 10, client_.memory.begin() + 10 + 8202,
                          [](std::byte byte) { return byte == std::byte{0x5a}; }));
}

TEST_F(DmaRequestsTest, AClientThatTakesNoDataIsNotAsked) {
  requests_.open(&client_, 0);
  EXPECT_THAT(Read(0, 1), FailsWith(ErrorCode::kNotReachable));
  EXPECT_TRUE(client_.sent.empty());
}

TEST_F(DmaRequestsTest, NothingIsWrittenBeforeAReadHasShownTheLayout) {
  ASSERT_THAT(Write(40, 4), IsOk());
  ASSERT_THAT(Write(44, 4), IsOk());
  ASSERT_EQ(client_.sent.size(), 3u) << "one read, two writes";
  EXPECT_EQ(client_.sent[0].header.command, kDmaRead);
  EXPECT_EQ(client_.sent[0].iova, kMemory + 40);
  EXPECT_EQ(client_.sent[1].header.command, kDmaWrite);
}

TEST_F(DmaRequestsTest, AClientWithA32BitCountIsFoundOutAndNeverWrittenTo) {
  AnswerWith([](Message& message) {  // address, 4 bytes of count, data
    message.payload.erase(message.payload.begin() + 12, message.payload.begin() + 16);
  });
  const auto read = Read(64, 4);
  EXPECT_THAT(read, FailsWith(ErrorCode::kNotReachable));
  EXPECT_THAT(read.error().message(), HasSubstr("dma_read of 4 bytes at iova 0x10040"));
  EXPECT_THAT(read.error().message(), HasSubstr("qemu before 11"));
  EXPECT_THAT(Write(64, 4), FailsWith(ErrorCode::kNotReachable));
  for (const auto& command : client_.sent) EXPECT_EQ(command.header.command, kDmaRead);
}

TEST_F(DmaRequestsTest, AnAnswerThatDoesNotRepeatTheQuestionIsRefused) {
  for (const size_t offset : {0u, 8u}) {
    AnswerWith([offset](Message& message) { message.payload[offset] ^= std::byte{1}; });
    EXPECT_THAT(Read(64, 4), FailsWith(ErrorCode::kNotReachable)) << offset;
  }
  AnswerWith([](Message& message) { message.payload.push_back(std::byte{0}); });
  EXPECT_THAT(Read(64, 4), FailsWith(ErrorCode::kNotReachable)) << "too long";
  AnswerWith([](Message& message) { message.payload.resize(7); });
  EXPECT_THAT(Read(64, 4), FailsWith(ErrorCode::kNotReachable)) << "too short for an address";
  EXPECT_TRUE(taken_);
  client_.on_command = nullptr;
  EXPECT_THAT(Read(64, 4), IsOk()) << "and it goes on";
}

TEST_F(DmaRequestsTest, ARefusalNamesAddressSizeAndReason) {
  AnswerWith([](Message& message) {
    message.header.flags = 0x21;
    message.header.error = ENODEV;
    message.payload.clear();
  });
  const auto read = Read(256, 16);
  EXPECT_THAT(read, FailsWith(ErrorCode::kNotReachable));
  EXPECT_THAT(read.error().message(), HasSubstr("dma_read of 16 bytes at iova 0x10100"));
  EXPECT_THAT(read.error().message(), HasSubstr("No such device"));
  EXPECT_THAT(read.error().message(), HasSubstr("bus mastering"));
}

TEST_F(DmaRequestsTest, OnlyTheAnswerToTheCommandUnderWayIsTaken) {
  AnswerWith([](Message& message) { ++message.header.id; });
  EXPECT_THAT(Read(0, 4), FailsWith(ErrorCode::kNotReachable));
  EXPECT_FALSE(taken_) << "another id";
  AnswerWith([](Message& message) { message.header.command = kDmaWrite; });
  EXPECT_THAT(Read(0, 4), FailsWith(ErrorCode::kNotReachable));
  EXPECT_FALSE(taken_) << "another command";
  client_.on_command = [this](const Client::Sent& command) -> Result<void> {
    EXPECT_TRUE(client_.answer(command));
    EXPECT_FALSE(client_.answer(command)) << "a second time";
    return {};
  };
  EXPECT_THAT(Read(0, 4), IsOk());
  EXPECT_FALSE(client_.answer(client_.sent.back())) << "nobody asks";
}

TEST_F(DmaRequestsTest, AnAnswerThatComesTooLateIsTakenAndForgotten) {
  client_.on_command = [](const Client::Sent&) { return Result<void>(); };
  const auto read = Read(0, 4);
  EXPECT_THAT(read, FailsWith(ErrorCode::kNotReachable));
  EXPECT_THAT(read.error().message(), HasSubstr("did not answer a dma_read of 4 bytes"));
  const Client::Sent late = client_.sent.back();
  client_.on_command = [this, &late](const Client::Sent& command) -> Result<void> {
    EXPECT_TRUE(client_.answer(late));
    EXPECT_TRUE(client_.answer(command));
    return {};
  };
  ASSERT_THAT(Read(500, 4), IsOk());
  ExpectRead(500);
  EXPECT_FALSE(client_.answer(late)) << "it was late once";
}

TEST_F(DmaRequestsTest, AClientThatNeverAnswersIsNotAskedForEver) {
  client_.on_command = [](const Client::Sent&) { return Result<void>(); };
  for (size_t i = 0; i < DmaRequests::kMaxLate; ++i) {
    EXPECT_THAT(Read(0, 1), FailsWith(ErrorCode::kNotReachable));
  }
  EXPECT_THAT(Read(0, 1), FailsWith(ErrorCode::kNotReachable));
  EXPECT_EQ(client_.sent.size(), DmaRequests::kMaxLate);
}

TEST_F(DmaRequestsTest, WithoutAClientThereIsNobodyToAsk) {
  DmaRequests requests;
  std::byte byte{};
  EXPECT_THAT(requests.read(Iova(0), std::span(&byte, 1)), FailsWith(ErrorCode::kProtocol));
  requests_.close();
  EXPECT_THAT(Read(0, 1), FailsWith(ErrorCode::kProtocol));
  EXPECT_THAT(Write(0, 1), FailsWith(ErrorCode::kProtocol));
  EXPECT_TRUE(client_.sent.empty());
}

TEST_F(DmaRequestsTest, AConnectionThatCannotSendIsOver) {
  client_.on_command = [](const Client::Sent&) -> Result<void> {
    return Fail(ErrorCode::kProtocol, "the client does not read");
  };
  EXPECT_THAT(Read(0, 1), FailsWith(ErrorCode::kProtocol));
  EXPECT_THAT(Read(0, 1), FailsWith(ErrorCode::kProtocol));
  EXPECT_EQ(client_.sent.size(), 1u);
}

// With a time limit that no test waits for.
class DmaRequestsThreadsTest : public ::testing::Test {
 protected:
  DmaRequests requests_{std::chrono::seconds(60)};
  Client client_;
  std::promise<void> sent_;
  std::promise<void> go_on_;
};

TEST_F(DmaRequestsThreadsTest, TheEndOfTheClientEndsAWait) {
  client_.on_command = [this](const Client::Sent&) {
    sent_.set_value();
    return Result<void>();
  };
  requests_.open(&client_, 1 << 20);
  auto read = std::async(std::launch::async, [this] {
    std::byte byte{};
    return requests_.read(Iova(kMemory), std::span(&byte, 1));
  });
  sent_.get_future().wait();
  requests_.close();
  EXPECT_THAT(read.get(), FailsWith(ErrorCode::kProtocol));
}

TEST_F(DmaRequestsThreadsTest, CloseWaitsForACommandThatIsBeingSent) {
  std::atomic<bool> closed = false;
  bool closed_too_early = false;
  client_.on_command = [&](const Client::Sent&) {
    sent_.set_value();
    go_on_.get_future().wait();
    closed_too_early = closed;
    return Result<void>();
  };
  requests_.open(&client_, 1 << 20);
  auto read = std::async(std::launch::async, [this] {
    std::byte byte{};
    return requests_.read(Iova(kMemory), std::span(&byte, 1));
  });
  sent_.get_future().wait();
  std::thread closer([&] {
    requests_.close();
    closed = true;
  });
  go_on_.set_value();
  closer.join();
  EXPECT_THAT(read.get(), FailsWith(ErrorCode::kProtocol));
  EXPECT_FALSE(closed_too_early);
}

TEST_F(DmaRequestsThreadsTest, ThoseWhoAskAtTheSameTimeGetTheirOwnAnswers) {
  client_.requests = &requests_;
  for (size_t i = 0; i < client_.memory.size(); ++i) {
    client_.memory[i] = static_cast<std::byte>(i >> 12);
  }
  requests_.open(&client_, 4096);
  std::vector<std::future<bool>> askers;
  for (size_t n = 0; n < 4; ++n) {
    askers.push_back(std::async(std::launch::async, [this, n] {
      std::vector<std::byte> page(4096);
      for (size_t i = 0; i < 50; ++i) {
        const auto number = static_cast<uint8_t>(n * 50 + i);
        if (!requests_.read(Iova(kMemory + (uint64_t{number} << 12)), page)) return false;
        if (page != std::vector(4096, std::byte{number})) return false;
      }
      return true;
    }));
  }
  for (auto& asker : askers) EXPECT_TRUE(asker.get());
  requests_.close();
}

}  // namespace
}  // namespace mvgpu::testing
