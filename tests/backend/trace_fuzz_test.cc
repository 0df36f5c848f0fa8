// Hostile traces: noise behind a valid header, records that never were a session, and sessions with
// something changed. Whatever the file says, a replay ends, without a crash, and lets go of
// everything. MVGPU_FUZZ_ROUNDS makes it longer, MVGPU_SEED gives another seed.

#include <cstdlib>
#include <filesystem>
#include <random>

#include "backend/replay/player.h"
#include "tests/backend/vgpu_fixture.h"

namespace mvgpu::backend {
namespace {

using testing::RawBytes;
using testing::RawOf;
using testing::RawRecord;

uint64_t FromEnvironment(const char* name, uint64_t otherwise) {
  const char* value = std::getenv(name);
  return value != nullptr ? std::strtoull(value, nullptr, 0) : otherwise;
}

size_t OpenFds() {
  const auto fds = std::filesystem::directory_iterator("/proc/self/fd");
  return static_cast<size_t>(std::distance(begin(fds), end(fds)));
}

class TraceFuzzTest : public RecordedVgpuTest {
 protected:
  void SetUp() override {
    RecordedVgpuTest::SetUp();
    rounds_ = FromEnvironment("MVGPU_FUZZ_ROUNDS", 2000);
    seed_ = FromEnvironment("MVGPU_SEED", 0x74726163);
    printf("seed %llu, %llu rounds\n", static_cast<unsigned long long>(seed_),
           static_cast<unsigned long long>(rounds_));
    random_.seed(seed_);
  }

  uint64_t Below(uint64_t bound) { return random_() % bound; }
  bool OneIn(uint64_t n) { return Below(n) == 0; }
  // Mostly values at which something changes.
  uint64_t Number() {
    static constexpr uint64_t kEdges[] = {0,
                                          1,
                                          2,
                                          3,
                                          4,
                                          7,
                                          8,
                                          0x14,
                                          0xfff,
                                          0x1000,
                                          0x1001,
                                          0x2000,
                                          0x3000,
                                          0x4000'0000,
                                          1 << 20,
                                          7 << 20,
                                          0x40100000,
                                          0x40100fff,
                                          0xffffffff,
                                          1ull << 32,
                                          1ull << 41,
                                          1ull << 42,
                                          (1ull << 42) + 1,
                                          1ull << 63,
                                          UINT64_MAX - 0xfff,
                                          UINT64_MAX};
    if (OneIn(5)) return random_() >> Below(64);
    return kEdges[Below(std::size(kEdges))];
  }
  RawBytes Noise(size_t size) {
    RawBytes bytes(size);
    for (std::byte& byte : bytes) byte = static_cast<std::byte>(random_());
    return bytes;
  }
  RawRecord RandomRecord() {
    RawRecord record{1 + Below(16), Below(1000), {}};
    for (uint64_t i = Below(7); i > 0; --i) testing::AppendVarint(record.payload, Number());
    if (OneIn(2)) {
      const RawBytes noise = Noise(Below(64));
      record.payload.insert(record.payload.end(), noise.begin(), noise.end());
    }
    return record;
  }
  void MutateRecord(RawRecord& record) {
    if (OneIn(20)) record.type = 1 + Below(14);
    if (record.payload.empty()) return;
    switch (Below(5)) {
      case 0:
        record.payload[Below(record.payload.size())] = static_cast<std::byte>(random_());
        break;
      case 1:
        record.payload.resize(Below(record.payload.size()));
        break;
      case 2:
        record.payload[Below(record.payload.size())] ^= static_cast<std::byte>(1 << Below(8));
        break;
      case 3: {  // a 32-bit word, such as those of requests and rings
        const uint64_t value = Number();
        for (size_t i = 0, at = Below(record.payload.size());
             i < 4 && at + i < record.payload.size(); ++i) {
          record.payload[at + i] = static_cast<std::byte>(value >> (8 * i));
        }
        break;
      }
      default:
        record.payload = RandomRecord().payload;
    }
  }
  void Mutate(std::vector<RawRecord>& records) {
    for (uint64_t i = 1 + Below(4); i > 0 && records.size() > 2; --i) {
      const size_t at = OneIn(200) ? 0 : 1 + Below(records.size() - 1);
      const auto place = records.begin() + static_cast<std::ptrdiff_t>(at);
      switch (Below(6)) {
        case 0:
          records.erase(place);
          break;
        case 1: {
          const RawRecord copy = *place;
          records.insert(records.begin() + 1 + static_cast<std::ptrdiff_t>(Below(records.size())),
                         copy);
          break;
        }
        case 2:
          std::swap(*place, records[1 + Below(records.size() - 1)]);
          break;
        case 3:
          records.insert(place + 1, RandomRecord());
          break;
        default:
          MutateRecord(*place);
      }
    }
  }

  // Plays it to whatever end it has. True when it was not refused.
  bool Survives(const RawBytes& trace) {
    const size_t fds = OpenFds();
    bool played = false;
    {
      auto reader = TraceReader::FromBytes(trace, "fuzz");
      if (reader) {
        auto player = Player::Create(reader->get(), {});
        if (player) {
          // Domains, caches and ledgers check that they are empty when they go.
          const auto outcome = (*player)->play({});
          played = outcome.has_value();
        }
      }
    }
    EXPECT_EQ(OpenFds(), fds);
    return played;
  }

  uint64_t rounds_ = 0;
  uint64_t seed_ = 0;
  std::mt19937_64 random_;
};

TEST_F(TraceFuzzTest, NoiseBehindTheHeader) {
  for (uint64_t i = 0; i < rounds_ && !HasFailure(); ++i) {
    RawBytes file = testing::EncodeTrace({});
    if (OneIn(2)) file.resize(16);  // or after a valid, empty stream
    const RawBytes noise = Noise(Below(300));
    file.insert(file.end(), noise.begin(), noise.end());
    Survives(file);
  }
}

TEST_F(TraceFuzzTest, NoiseInsideAStream) {
  for (uint64_t i = 0; i < rounds_ && !HasFailure(); ++i) {
    RawBytes stream = testing::EncodeRecords({{1, 0, RawOf(config_.to_json())}});
    const RawBytes noise = Noise(Below(300));
    stream.insert(stream.end(), noise.begin(), noise.end());
    Survives(testing::EncodeStream(stream));
  }
}

TEST_F(TraceFuzzTest, RecordsThatNeverWereASession) {
  uint64_t played = 0;
  for (uint64_t i = 0; i < rounds_ && !HasFailure(); ++i) {
    std::vector<RawRecord> records = {{1, 0, RawOf(config_.to_json())}};
    for (uint64_t n = Below(12); n > 0; --n) records.push_back(RandomRecord());
    played += Survives(testing::EncodeTrace(records));
  }
  EXPECT_GT(played, rounds_ / 50) << "not everything is refused at once";
}

TEST_F(TraceFuzzTest, SessionsWithSomethingChanged) {
  ASSERT_NO_FATAL_FAILURE(RunSession());
  ASSERT_NO_FATAL_FAILURE(EndSession());
  const auto session = Records();
  ASSERT_TRUE(Survives(testing::EncodeTrace(session)));
  uint64_t played = 0;
  for (uint64_t i = 0; i < rounds_ / 4 && !HasFailure(); ++i) {
    auto records = session;
    Mutate(records);
    played += Survives(testing::EncodeTrace(records));
  }
  EXPECT_GT(played, rounds_ / 40) << "not everything is refused at once";
}

}  // namespace
}  // namespace mvgpu::backend
