// Random messages, from plain noise to almost right ones. The seed is fixed and printed; another
// one can be given in MVGPU_SEED, and the number of messages in MVGPU_MESSAGES.

#include <array>
#include <cstdlib>
#include <random>

#include "tests/conformance/server_fixture.h"

namespace mvgpu::testing {
namespace {

uint64_t FromEnvironment(const char* name, uint64_t otherwise) {
  const char* value = std::getenv(name);
  return value != nullptr ? std::strtoull(value, nullptr, 0) : otherwise;
}

class GarbageTest : public NegotiatedServerTest {
 protected:
  void SetUp() override {
    seed_ = FromEnvironment("MVGPU_SEED", 0x6d76677075);
    messages_ = FromEnvironment("MVGPU_MESSAGES", 10'000);
    random_.seed(seed_);
    RecordProperty("seed", std::to_string(seed_));
    NegotiatedServerTest::SetUp();
  }
  uint64_t Below(uint64_t bound) { return random_() % bound; }
  bool OneIn(uint64_t n) { return Below(n) == 0; }

  // Mostly values at which something changes.
  uint32_t Word() {
    static constexpr std::array<uint32_t, 22> kEdges = {
        0,  1,    2,    3,    4,     5,     7,      8,          9,          16,         20,
        24, 0x20, 0x21, 0x24, 0x100, 0x800, 0x1000, 0x00100000, 0x7fffffff, 0x80000000, 0xffffffff};
    return OneIn(4) ? static_cast<uint32_t>(random_()) : kEdges[Below(kEdges.size())];
  }
  Bytes Body(size_t size) {
    Bytes body;
    while (body.size() + 4 <= size) body.U32(Word());
    return body.Fill(size - body.size());
  }
  // Sends one message; true when the server has to answer it.
  bool SendRandomMessage() {
    const size_t body_size = OneIn(10) ? Below(5000) : Below(15) * 4;
    const Bytes body = Body(body_size);
    const auto command = static_cast<uint16_t>(OneIn(20) ? random_() : Below(19));
    auto size = static_cast<uint32_t>(kHeaderSize + body.size());
    if (OneIn(50)) size = Word();
    uint32_t flags = OneIn(10) ? Word() : 0;
    const std::vector<int> fds(OneIn(3) ? Below(20) : 0, eventfd_);
    client_->send(MessageOf(1, command, size, flags, body), fds);
    return (flags & kNoReply) == 0 && size == kHeaderSize + body.size();
  }

  uint64_t seed_ = 0;
  uint64_t messages_ = 0;
  std::mt19937_64 random_;
  int eventfd_ = -1;
};

TEST_F(GarbageTest, ServerAnswersOrClosesAndNeverCrashes) {
  SCOPED_TRACE("seed " + std::to_string(seed_));
  printf("seed %llu\n", static_cast<unsigned long long>(seed_));
  eventfd_ = NewEventfd();
  uint64_t answered = 0;
  uint64_t closed = 0;
  for (uint64_t i = 0; i < messages_; ++i) {
    const bool must_answer = SendRandomMessage();
    const State state = Serve();
    device_.calls.clear();
    log_.lines.clear();
    std::optional<Reply> reply = client_->receive();
    if (state == State::kServing && must_answer) {
      ASSERT_TRUE(reply) << "message " << i;
      ++answered;
    }
    while (reply) {
      ASSERT_TRUE(reply->flags == kTypeReply ? reply->error == 0
                                             : reply->flags == kErrorReply && reply->error != 0)
          << "message " << i << ": " << *reply;
      reply = client_->receive();
    }
    // A size that lies leaves both sides out of step: start again, as a client would have to.
    if (state != State::kServing || !must_answer) {
      ++closed;
      Connect();
      ASSERT_EQ(Negotiate().flags, kTypeReply);
    }
  }
  printf("%llu answered, %llu connections\n", static_cast<unsigned long long>(answered),
         static_cast<unsigned long long>(closed + 1));
  EXPECT_GT(answered, messages_ / 2);
  Connect();
  Negotiate();
  ExpectStillServing();
  EXPECT_EQ(device_.container.totals().mappings, 0u);
}

TEST_F(GarbageTest, NoiseWithoutAnyFrameNeverCrashesTheServer) {
  SCOPED_TRACE("seed " + std::to_string(seed_));
  for (uint64_t i = 0; i < messages_ / 10; ++i) {
    if (OneIn(2)) {
      Connect();  // noise instead of the version
    }
    client_->send(Body(Below(400)));
    Serve();
    log_.lines.clear();
    device_.calls.clear();
    if (state_ != State::kServing) {
      Connect();
      Negotiate();
    }
  }
  Connect();
  Negotiate();
  ExpectStillServing();
}

}  // namespace
}  // namespace mvgpu::testing
