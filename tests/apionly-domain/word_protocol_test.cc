// All interleavings of rows that hold pages, let them go and die, without end, by the steps of the
// code that does it in the ledger: each load and store of shared memory is one step.

#include "apionly-domain/accounting/word_protocol.h"

#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <optional>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "apionly-domain/accounting/payer_rule.h"

namespace mvgpu::domain {
namespace {

constexpr unsigned kRows = 3;
constexpr unsigned kPages = 16;        // of the word; two octets of payer bytes
constexpr unsigned kPagesPerHalf = 8;  // where the halves stand for two words
constexpr uint8_t kNobody = 0xff;

// What the rows share.
struct Memory {
  std::array<uint16_t, kRows> held = {};
  std::array<uint8_t, kPages> payer_bytes = {};
};

struct Access {
  enum class Kind : uint8_t { kLoadNeighbour, kLoadPayers, kStorePayer, kStorePayers, kStoreMine };
  Kind kind;
  unsigned at = 0;             // row, octet or page
  uint64_t value = 0;          // that is stored
  uint64_t of = ~uint64_t{0};  // kStoreMine: in these bits
};

// Longer than any change.
struct Past {
  uint8_t size = 0;
  std::array<uint64_t, 40> values;

  void push_back(uint64_t value) { values.at(size++) = value; }
};

// Lets the code run as far as it has come, with what it had read until then, and says what it would
// do next. What it does behind that is of no account.
class Replay {
 public:
  Replay(unsigned me, unsigned rows, uint64_t mine, bool has_payers, const Past& past)
      : me_(me), rows_(rows), mine_(mine), has_payers_(has_payers), past_(past) {}

  const std::optional<Access>& next() const { return next_; }

  uint64_t load_mine() const { return mine_; }  // nobody else writes it
  void store_mine(uint64_t bits) {
    if ((bits ^ mine_) != counted_) ADD_FAILURE() << "bits were changed before they were counted";
    Do({Access::Kind::kStoreMine, me_, bits});
  }
  void count_held(uint64_t bits) { counted_ = bits; }
  void count_released(uint64_t bits) { counted_ = bits; }
  bool has_neighbours() const { return true; }
  Replay& sharing() { return *this; }
  unsigned neighbours() const { return rows_ - 1; }
  unsigned row_of(unsigned i) const { return i < me_ ? i : i + 1; }
  uint64_t load_neighbour(unsigned i) { return Do({Access::Kind::kLoadNeighbour, row_of(i)}); }
  bool has_payer_bytes() const { return has_payers_; }
  uint64_t load_payers(unsigned octet) { return Do({Access::Kind::kLoadPayers, octet}); }
  void store_payer(unsigned page, uint8_t payer) { Do({Access::Kind::kStorePayer, page, payer}); }
  void store_payers(unsigned octet, uint64_t bytes) {
    Do({Access::Kind::kStorePayers, octet, bytes});
  }

 private:
  uint64_t Do(Access access) {
    if (at_ < past_.size) return past_.values[at_++];
    if (!next_) next_ = access;
    return 0;
  }

  friend class Halves;

  const unsigned me_;
  const unsigned rows_;
  const uint64_t mine_;
  const bool has_payers_;
  const Past& past_;
  uint64_t counted_ = 0;
  size_t at_ = 0;
  std::optional<Access> next_;
};

// The halves of the word, each as a word of its own, for the steps that take two at once.
class Halves {
 public:
  class Sharing {
   public:
    Sharing(Replay& replay, unsigned half) : replay_(replay), half_(half) {}
    unsigned row_of(unsigned i) const { return replay_.row_of(i); }
    uint64_t load_neighbour(unsigned i) const {
      return replay_.load_neighbour(i) >> half_ * kPagesPerHalf & 0xff;
    }
    bool has_payer_bytes() const { return replay_.has_payer_bytes(); }
    uint64_t load_payers(unsigned octet) const { return replay_.load_payers(octet + half_); }

   private:
    Replay& replay_;
    const unsigned half_;
  };

  explicit Halves(Replay& replay) : replay_(replay) {}
  uint64_t load_mine(unsigned half) const { return replay_.mine_ >> half * kPagesPerHalf & 0xff; }
  void store_mine(unsigned half, uint64_t bits) {
    if (!counted_) ADD_FAILURE() << "bits were changed before they were counted";
    const unsigned shift = half * kPagesPerHalf;
    replay_.Do({Access::Kind::kStoreMine, replay_.me_, bits << shift, uint64_t{0xff} << shift});
  }
  void count_held() { counted_ = true; }
  void count_released() { counted_ = true; }
  bool has_neighbours() const { return true; }
  Sharing sharing(unsigned half) const { return {replay_, half}; }

 private:
  Replay& replay_;
  bool counted_ = false;
};

using Payers = std::array<uint8_t, kPages>;  // by page: the row, or kNobody

struct Actor {
  enum class State : uint8_t { kIdle, kHolding, kReleasing, kDead };
  State state = State::kIdle;
  Past past;  // what each step of the change under way returned
  uint16_t mine_before = 0;
  bool disturbed = false;  // another row changed something since the change began
  Payers payers_before = {};
};

struct World {
  Memory memory;
  std::array<Actor, kRows> actors;

  // Two worlds with the same key have the same future.
  std::string key() const {
    std::string key(reinterpret_cast<const char*>(&memory), sizeof memory);
    key.reserve(512);
    for (const Actor& actor : actors) {
      key += static_cast<char>(actor.state);
      if (actor.state == Actor::State::kIdle || actor.state == Actor::State::kDead) continue;
      key.append(reinterpret_cast<const char*>(&actor.mine_before), sizeof actor.mine_before);
      key += static_cast<char>(actor.disturbed);
      key.append(reinterpret_cast<const char*>(actor.payers_before.data()), kPages);
      key += static_cast<char>(actor.past.size);
      key.append(reinterpret_cast<const char*>(actor.past.values.data()),
                 actor.past.size * sizeof(uint64_t));
    }
    return key;
  }
};

struct Case {
  const char* name;
  std::array<uint16_t, kRows> pages;  // that each row holds and lets go of, all at once
  bool has_payers;
  std::array<uint16_t, kRows> held_at_first = {};
  bool by_halves = false;  // two rows, which change the halves at once where that is simple
};

class WordProtocolTest : public ::testing::TestWithParam<Case> {
 protected:
  // By the rule that readers of the ledger use. Fails unless each held page has one payer, which
  // holds it.
  Payers PayersIn(const Memory& memory) {
    const uint8_t rows[kRows] = {0, 1, 2};
    uint64_t held[kRows];
    uint64_t paid[kRows];
    uint8_t bytes[64] = {};
    std::memcpy(bytes, memory.payer_bytes.data(), kPages);
    for (unsigned row = 0; row < kRows; ++row) held[row] = memory.held[row];
    DividePages(rows, held, kRows, GetParam().has_payers ? bytes : nullptr, paid);
    Payers payers;
    for (unsigned page = 0; page < kPages; ++page) {
      payers[page] = kNobody;
      unsigned holders = 0;
      unsigned paying = 0;
      bool payer_holds = true;
      for (unsigned row = 0; row < kRows; ++row) {
        holders += (held[row] >> page & 1) != 0 ? 1 : 0;
        if ((paid[row] >> page & 1) == 0) continue;
        ++paying;
        payers[page] = static_cast<uint8_t>(row);
        payer_holds &= (held[row] >> page & 1) != 0;
      }
      if (paying != (holders == 0 ? 0 : 1) || !payer_holds) {
        ADD_FAILURE() << holders << " rows hold page " << page << " and " << paying << " pay";
      }
    }
    return payers;
  }

  // The next step of a row's change; nullopt when it is done.
  std::optional<Access> NextOf(const Actor& actor, unsigned me) {
    const Case& param = GetParam();
    Replay replay(me, rows(), actor.mine_before, param.has_payers, actor.past);
    const uint64_t pages = param.pages[me];
    Halves halves(replay);
    if (actor.state == Actor::State::kHolding) {
      if (param.by_halves && HoldSimply(halves, me, pages & 0xff, pages >> kPagesPerHalf)) {
        return replay.next();
      }
      (void)HoldWord(replay, me, pages);
    } else {
      if (param.by_halves && ReleaseSimply(halves, pages & 0xff, pages >> kPagesPerHalf)) {
        return replay.next();
      }
      ReleaseWord(replay, pages);
    }
    return replay.next();
  }

  static unsigned rows() { return GetParam().by_halves ? 2 : kRows; }

  static uint64_t Perform(const Access& access, Memory& memory) {
    uint64_t value = 0;
    switch (access.kind) {
      case Access::Kind::kLoadNeighbour:
        return memory.held[access.at];
      case Access::Kind::kLoadPayers:
        if (access.at < kPages / 8) {
          std::memcpy(&value, memory.payer_bytes.data() + access.at * 8, sizeof value);
        }
        return value;
      case Access::Kind::kStorePayer:
        memory.payer_bytes[access.at] = static_cast<uint8_t>(access.value);
        return 0;
      case Access::Kind::kStorePayers:
        std::memcpy(memory.payer_bytes.data() + access.at * 8, &access.value, sizeof access.value);
        return 0;
      case Access::Kind::kStoreMine:
        memory.held[access.at] = static_cast<uint16_t>((memory.held[access.at] & ~access.of) |
                                                       (access.value & access.of));
        return 0;
    }
    return 0;
  }

  static void Disturb(World& world, unsigned by) {
    for (unsigned row = 0; row < kRows; ++row) {
      if (row != by) world.actors[row].disturbed = true;
    }
  }

  void Begin(World& world, unsigned me) {
    Actor& actor = world.actors[me];
    actor.state = world.memory.held[me] == 0 ? Actor::State::kHolding : Actor::State::kReleasing;
    actor.past.size = 0;
    actor.mine_before = world.memory.held[me];
    actor.payers_before = PayersIn(world.memory);
    actor.disturbed = false;
    for (unsigned row = 0; row < kRows; ++row) {
      const Actor::State other = world.actors[row].state;
      actor.disturbed |=
          row != me && (other == Actor::State::kHolding || other == Actor::State::kReleasing);
    }
    Disturb(world, me);
    if (!NextOf(actor, me)) actor.state = Actor::State::kIdle;
  }

  void Step(World& world, unsigned me) {
    Actor& actor = world.actors[me];
    const Payers before = PayersIn(world.memory);
    const std::optional<Access> access = NextOf(actor, me);
    ASSERT_TRUE(access.has_value());
    actor.past.push_back(Perform(*access, world.memory));
    Disturb(world, me);
    ExpectPromised(actor, me, *access, before, PayersIn(world.memory));
    if (!NextOf(actor, me)) actor.state = Actor::State::kIdle;
  }

  // What a step may do to the charges: see word_protocol.h.
  void ExpectPromised(const Actor& actor, unsigned me, const Access& access, const Payers& before,
                      const Payers& after) {
    const bool is_hold = actor.state == Actor::State::kHolding;
    for (unsigned page = 0; page < kPages; ++page) {
      if (after[page] == before[page] && after[page] == actor.payers_before[page]) continue;
      // Whatever others do: our bit moves charges to us, or from us.
      if (access.kind == Access::Kind::kStoreMine && after[page] != before[page] &&
          (is_hold ? after[page] : before[page]) != me) {
        ADD_FAILURE() << "the bit of row " << me << " moved a charge between others";
      }
      const uint8_t payer = actor.payers_before[page];
      const bool may_change = actor.disturbed || (is_hold ? payer == kNobody : payer == me);
      if (after[page] != payer && !may_change) {
        ADD_FAILURE() << "the charge of page " << page << " went from row " << int{payer} << " to "
                      << int{after[page]} << " by a change of row " << me;
      }
    }
  }

  // Every world that can come next.
  std::vector<World> After(const World& world) {
    std::vector<World> result;
    for (unsigned me = 0; me < rows(); ++me) {
      const Actor::State state = world.actors[me].state;
      World next = world;
      if (state == Actor::State::kDead) {  // another process drops what it held
        next.memory.held[me] = 0;
        next.actors[me] = Actor();
        Disturb(next, me);
        result.push_back(std::move(next));
        continue;
      }
      if (state == Actor::State::kIdle) {
        Begin(next, me);
      } else {
        Step(next, me);
      }
      result.push_back(std::move(next));
      World without = world;
      without.actors[me] = Actor();
      without.actors[me].state = Actor::State::kDead;
      result.push_back(std::move(without));
    }
    return result;
  }
};

TEST_P(WordProtocolTest, EveryHeldPageIsChargedOnceAfterEachStepOfAnyInterleaving) {
  std::unordered_set<std::string> seen;
  std::vector<World> open(1);
  open.front().memory.held = GetParam().held_at_first;
  seen.insert(open.front().key());
  while (!open.empty() && !HasFailure()) {
    const World world = std::move(open.back());
    open.pop_back();
    PayersIn(world.memory);
    for (World& next : After(world)) {
      if (seen.insert(next.key()).second) open.push_back(std::move(next));
    }
  }
  std::printf("%zu states\n", seen.size());
  RecordProperty("states", static_cast<int>(seen.size()));
  EXPECT_GT(seen.size(), 50u);
}

INSTANTIATE_TEST_SUITE_P(
    Cases, WordProtocolTest,
    ::testing::Values(
        Case{"OnePage", {1, 1, 1}, true}, Case{"OnePageWithoutPayerBytes", {1, 1, 1}, false},
        Case{"EightPagesOfTwoRows", {0xff, 0xff, 0}, true},
        Case{"EightPagesOfWhichOneHasMoreHolders", {0xff, 0, 0}, true, {0, 0x02, 0xff}},
        Case{"RunsThatOverlap", {0x02, 0x03, 0x01}, true},
        Case{"HalvesOfTwoRows", {0x180, 0x180, 0}, true, {}, true},
        Case{"HalfOfTwoRows", {0xff, 0xff, 0}, true, {}, true},
        Case{"HalvesWithoutPayerBytes", {0x180, 0x180, 0}, false, {}, true},
        Case{"HalvesThatOverlap", {0x180, 0x80, 0}, true, {}, true}),
    [](const auto& test) { return std::string(test.param.name); });

}  // namespace
}  // namespace mvgpu::domain
