#include "backend/replay/player.h"

#include <array>
#include <nlohmann/json.hpp>

#include "tests/backend/vgpu_fixture.h"

namespace mvgpu::backend {
namespace {

using ::testing::AllOf;
using ::testing::Contains;
using ::testing::ElementsAre;
using testing::FailsWith;
using testing::GpuGuest;
using ::testing::HasSubstr;
using testing::IsOk;
using testing::RawBytes;
using testing::RawOf;
using testing::RawPayload;
using testing::RawRecord;

using nlohmann::json;

// A replay of a whole trace, and what is there to look at afterwards.
struct Replay {
  std::unique_ptr<TraceReader> reader;
  std::unique_ptr<Player> player;
  Result<Player::Outcome> outcome;
};

Replay Play(std::span<const std::byte> trace, Player::Options options = {}) {
  Replay replay{nullptr, nullptr, Fail(ErrorCode::kInvalid, "did not start")};
  auto reader = TraceReader::FromBytes(trace, "test trace");
  if (!reader) {
    replay.outcome = tl::unexpected<Error>(reader.error());
    return replay;
  }
  replay.reader = std::move(*reader);
  auto player = Player::Create(replay.reader.get(), options);
  if (!player) {
    replay.outcome = tl::unexpected<Error>(player.error());
    return replay;
  }
  replay.player = std::move(*player);
  replay.outcome = replay.player->play({});
  return replay;
}

class PlayerTest : public RecordedVgpuTest {
 protected:
  void Record() {
    ASSERT_NO_FATAL_FAILURE(RunSession());
    ASSERT_NO_FATAL_FAILURE(EndSession());
    records_ = Records();
  }
  // The n-th record of a type. REQUIRES: it is there.
  RawRecord& Nth(uint64_t type, size_t n) {
    for (RawRecord& record : records_) {
      if (record.type == type && n-- == 0) return record;
    }
    ADD_FAILURE() << "no such record";
    return records_.front();
  }
  size_t CountOf(uint64_t type) const {
    size_t count = 0;
    for (const RawRecord& record : records_) count += record.type == type;
    return count;
  }
  void Erase(const RawRecord& record) {
    records_.erase(records_.begin() + (&record - &records_[0]));
  }
  // Plays the records as they are now.
  Player::Outcome PlayRecords() {
    const Replay replay = Play(testing::EncodeTrace(records_));
    EXPECT_THAT(replay.outcome, IsOk());
    return replay.outcome.value_or(Player::Outcome{});
  }

  std::vector<RawRecord> records_;
};

TEST_F(PlayerTest, ReplayIsTheSessionOnceMore) {
  Record();
  const Replay replay = Play(testing::ReadFile(trace_path()));
  ASSERT_THAT(replay.outcome, IsOk());
  EXPECT_THAT(replay.outcome->described, ElementsAre());
  EXPECT_EQ(replay.outcome->differences, 0u);
  EXPECT_TRUE(replay.outcome->is_complete);
  EXPECT_TRUE(replay.outcome->all_released);
  EXPECT_EQ(json::parse(replay.outcome->counters_json), json::parse(summary_));
  EXPECT_EQ(replay.player->picture().hash(0), vgpu_->picture().hash(0));
  EXPECT_EQ(replay.outcome->records, records_.size());
  EXPECT_EQ(replay.outcome->steps, CountOf(testing::kRawStep));
  // Flushes: three, one after the memory came back, two of the second driver. And each driver's
  // SET_SCANOUT shows something.
  EXPECT_EQ(replay.outcome->frame_hashes.size(), 8u);
  EXPECT_EQ(CountOf(testing::kRawFrame), 8u);
  EXPECT_EQ(json::parse(summary_)["frames"], 6);
  EXPECT_GT(json::parse(summary_)["revocations"], 0);
  EXPECT_GT(json::parse(summary_)["dma_hit_pages"], 0);
}

TEST_F(PlayerTest, PagesArePinnedForRealWhenAsked) {
  Record();
  for (const PinMode pin : {PinMode::kMlock, PinMode::kIoUring}) {
    const Replay replay = Play(testing::ReadFile(trace_path()), {.pin = pin});
    ASSERT_THAT(replay.outcome, IsOk());
    EXPECT_EQ(replay.outcome->differences, 0u);
    EXPECT_TRUE(replay.outcome->all_released);
  }
}

TEST_F(PlayerTest, PinLimitOfTheSessionHoldsInTheReplay) {
  config_.pin_limit_bytes = 3 * kPageSize;
  EndVm();
  has_ended_ = false;
  MakeVgpu();
  StartGuest();
  EXPECT_EQ(guest_->create(1), kOk);
  EXPECT_EQ(guest_->attach(1, {{GpuGuest::kPictures, 0x4000}}), testing::wire::kErrOutOfMemory);
  EndSession();
  const Replay replay = Play(testing::ReadFile(trace_path()));
  ASSERT_THAT(replay.outcome, IsOk());
  EXPECT_EQ(replay.outcome->differences, 0u);
}

TEST_F(PlayerTest, OneByteOfARequestIsNoticed) {
  Record();
  RawRecord& request = Nth(testing::kRawRequest, 2);
  request.payload.back() ^= std::byte{1};
  const auto outcome = PlayRecords();
  EXPECT_EQ(outcome.differences, 1u);
  EXPECT_THAT(outcome.described, ElementsAre(HasSubstr("request instead of request with other")));
}

TEST_F(PlayerTest, OneByteOfAResponseIsNoticed) {
  Record();
  Nth(testing::kRawResponse, 1).payload[1] ^= std::byte{1};
  const auto outcome = PlayRecords();
  EXPECT_EQ(outcome.differences, 1u);
  EXPECT_THAT(outcome.described, ElementsAre(HasSubstr("response instead of response")));
}

TEST_F(PlayerTest, AnotherFrameHashIsNoticed) {
  Record();
  Nth(testing::kRawFrame, 4).payload.back() ^= std::byte{0x80};
  const auto outcome = PlayRecords();
  EXPECT_EQ(outcome.differences, 1u);
  EXPECT_THAT(outcome.described, ElementsAre(HasSubstr("frame instead of frame")));
}

TEST_F(PlayerTest, OnePixelOfTheGuestIsNoticed) {
  Record();
  // The transfer of the last picture: the longest read that comes last.
  RawRecord* last = nullptr;
  for (RawRecord& record : records_) {
    if (record.type == testing::kRawMemory && record.payload.size() > GpuGuest::kPictureBytes) {
      last = &record;
    }
  }
  ASSERT_NE(last, nullptr);
  last->payload[last->payload.size() - 4] ^= std::byte{1};
  const auto outcome = PlayRecords();
  EXPECT_EQ(outcome.differences, 2u);
  EXPECT_THAT(outcome.described,
              ElementsAre(HasSubstr("frame instead of frame"), HasSubstr("final_picture")));
}

TEST_F(PlayerTest, EachNumberOfTheSummaryIsCompared) {
  Record();
  const json summary = json::parse(summary_);
  EXPECT_EQ(summary.size(), 23u);
  for (const auto& [key, value] : summary.items()) {
    json changed = summary;
    changed[key] = value.is_number() ? json(value.get<uint64_t>() + 1) : json("0");
    Nth(testing::kRawSummary, 0).payload = RawOf(changed.dump());
    const auto outcome = PlayRecords();
    EXPECT_EQ(outcome.differences, 1u);
    EXPECT_THAT(outcome.described, ElementsAre(AllOf(HasSubstr(key), HasSubstr("instead of"))));
    EXPECT_TRUE(outcome.is_complete);
  }
}

TEST_F(PlayerTest, RegisterThatReadsDifferentlyIsNoticed) {
  Record();
  Nth(testing::kRawRead, 0).payload.back() ^= std::byte{1};
  const auto outcome = PlayRecords();
  EXPECT_EQ(outcome.differences, 1u);
  EXPECT_THAT(outcome.described, ElementsAre(HasSubstr("region 7 offset 0x6 reads differently")));
}

TEST_F(PlayerTest, MissingStepIsNoticed) {
  Record();
  // The guest looks again after its last request, so that this is more than one step.
  size_t dropped = 0;
  while (true) {
    const auto last = std::find_if(records_.rbegin(), records_.rend(), [](const RawRecord& record) {
      return record.type == testing::kRawStep || record.type == testing::kRawRequest;
    });
    if (last->type == testing::kRawRequest) break;
    Erase(*last);
    ++dropped;
  }
  EXPECT_EQ(dropped, 3u);
  const auto outcome = PlayRecords();
  EXPECT_THAT(outcome.described, Contains(HasSubstr("3 results after the last step")));
  EXPECT_THAT(outcome.described, Contains(HasSubstr("control_commands is")));
  EXPECT_THAT(outcome.described, Contains(HasSubstr("final_picture is")));
  EXPECT_EQ(outcome.frame_hashes.size(), 7u);
}

TEST_F(PlayerTest, ResultsWithoutAStepBehindThemAreNoticed) {
  Record();
  records_.insert(records_.end() - 1, Nth(testing::kRawFrame, 0));
  const auto outcome = PlayRecords();
  EXPECT_EQ(outcome.differences, 1u);
  EXPECT_THAT(outcome.described, ElementsAre(HasSubstr("1 results after the last step")));
}

TEST_F(PlayerTest, MissingUnmapLeavesSomethingBehindAndIsSaid) {
  Record();
  Erase(Nth(testing::kRawUnmapAll, 0));
  const auto outcome = PlayRecords();
  EXPECT_FALSE(outcome.all_released);
}

TEST_F(PlayerTest, ManyDifferencesAreCountedAndTheFirstDescribed) {
  Record();
  for (RawRecord& record : records_) {
    if (record.type == testing::kRawResponse) record.payload.back() ^= std::byte{1};
  }
  const auto outcome = PlayRecords();
  EXPECT_EQ(outcome.differences, CountOf(testing::kRawResponse));
  EXPECT_EQ(outcome.described.size(), Player::kMaxDescribedDifferences);
}

TEST_F(PlayerTest, TraceOfAKilledBackendPlaysAsFarAsItGoes) {
  Record();
  for (size_t keep = 1; keep < records_.size(); ++keep) {
    const Replay replay =
        Play(testing::EncodeTrace({records_.begin(), records_.begin() + static_cast<long>(keep)}));
    ASSERT_THAT(replay.outcome, IsOk()) << keep;
    EXPECT_FALSE(replay.outcome->is_complete);
    EXPECT_EQ(replay.outcome->differences, 0u) << keep;
    EXPECT_TRUE(replay.outcome->all_released) << keep;
  }
}

TEST_F(PlayerTest, FileCutAtAnyByteNeverDoesHarm) {
  Record();
  const RawBytes whole = testing::ReadFile(trace_path());
  for (size_t size = 0; size < whole.size(); size += 1 + size / 200) {
    const Replay replay = Play(std::span(whole).first(size));
    if (!replay.outcome) {
      EXPECT_EQ(replay.outcome.error().code(), ErrorCode::kCorrupt);
    } else {
      EXPECT_TRUE(replay.outcome->all_released);
      EXPECT_EQ(replay.outcome->differences, 0u);
    }
  }
}

TEST_F(PlayerTest, SessionThatWasNotRecordedInOrderIsRefused) {
  Record();
  EXPECT_THAT(Play(testing::EncodeTrace({})).outcome, FailsWith(ErrorCode::kCorrupt));
  EXPECT_THAT(Play(testing::EncodeTrace({records_.begin() + 1, records_.end()})).outcome,
              FailsWith(ErrorCode::kCorrupt));
  EXPECT_THAT(Play(testing::EncodeTrace({{1, 0, RawOf("[]")}})).outcome,
              FailsWith(ErrorCode::kCorrupt));
  records_.insert(records_.begin() + 5, records_[0]);
  EXPECT_THAT(Play(testing::EncodeTrace(records_)).outcome, FailsWith(ErrorCode::kCorrupt));
}

// Records that no recorder writes.
TEST_F(PlayerTest, RecordsThatMakeNoSenseAreAnErrorOrADifference) {
  const RawRecord session{1, 0, RawOf(config_.to_json())};
  const RawRecord map{2, 0, RawPayload({0x10000, 0x4000, 3, 1, 0, 0x4000})};
  EXPECT_THAT(Play(testing::EncodeTrace({session, map})).outcome, IsOk());
  const std::vector<RawRecord> nonsense = {
      {2, 0, {}},
      {2, 0, RawPayload({0x10000, 0x1000, 3, 1, 0})},
      {2, 0, RawPayload({0x10000, 0, 3, 1, 0, 0x4000})},
      {2, 0, RawPayload({0x10000, 0x1000, 0, 1, 0, 0x4000})},
      {2, 0, RawPayload({0x10000, 0x1000, 4, 1, 0, 0x4000})},
      {2, 0, RawPayload({0x10001, 0x1000, 3, 1, 0, 0x4000})},
      {2, 0, RawPayload({0x90000, 0x1000, 3, 2, 0, 0})},
      {2, 0, RawPayload({0x90000, 0x1000, 3, 2, 0, UINT64_MAX})},
      {2, 0, RawPayload({0x90000, 0x5000, 3, 1, 0, 0x4000})},           // beyond the file
      {2, 0, RawPayload({0x90000, 0x1000, 3, 1, UINT64_MAX, 0x4000})},  // wraps
      {2, 0, RawPayload({0x90000, 0x1000, 3, 1, UINT64_MAX - 0xfff, 0x4000})},
      {2, 0, RawPayload({UINT64_MAX - 0xfff, 0x2000, 3, 1, 0, 0x4000})},
      {3, 0, {}},
      {3, 0, RawPayload({0x10000})},
      {3, 0, RawPayload({0x10000, 0x1000})},  // cuts the mapping
      {3, 0, RawPayload({0x10001, 0x1000})},
      {5, 0, RawPayload({7})},
      {5, 0, RawPayload({9, 0}, RawOf("x"))},
      {7, 0, RawPayload({2, 0, 0})},
      {7, 0, RawPayload({2, 6, 0, 1})},
      {7, 0, RawPayload({2, 0, uint64_t{1} << 32, 1})},
      {9, 0, {}},
      {9, 0, RawPayload({0x13fff}, RawOf("over the end"))},
      {9, 0, RawPayload({UINT64_MAX}, RawOf("over the end"))},
      {10, 0, {}},
      {10, 0, RawPayload({65536})},
      {14, 0, RawOf("{\"frames\": [1]}")},
      {14, 0, RawOf("no json")},
  };
  for (size_t i = 0; i < nonsense.size(); ++i) {
    const Replay replay = Play(testing::EncodeTrace({session, map, nonsense[i]}));
    ASSERT_FALSE(replay.outcome.has_value()) << i;
    EXPECT_EQ(replay.outcome.error().message().find('\n'), std::string::npos);
  }
  const std::vector<RawRecord> different = {
      {6, 0, RawPayload({7, UINT64_MAX}, RawOf("x"))}, {6, 0, RawPayload({8, 0}, RawOf("x"))},
      {5, 0, RawPayload({4, 1 << 20}, RawOf("x"))},    {7, 0, RawPayload({7, 0, 0, 1})},
      {7, 0, RawPayload({2, 0, 2, UINT32_MAX})},       {14, 0, RawOf("{\"\\u001b[2J\": 1}")},
  };
  for (size_t i = 0; i < different.size(); ++i) {
    const Replay replay = Play(testing::EncodeTrace({session, different[i]}));
    ASSERT_THAT(replay.outcome, IsOk()) << i;
    EXPECT_EQ(replay.outcome->differences, 1u) << i;
    EXPECT_EQ(replay.outcome->described[0].find('\x1b'), std::string::npos);
  }
}

TEST_F(PlayerTest, ResultsThatNoStepTakesDoNotPileUp) {
  std::vector<RawRecord> records = {{1, 0, RawOf(config_.to_json())}};
  records.insert(records.end(), 64, {12, 0, RawPayload({0})});
  EXPECT_THAT(Play(testing::EncodeTrace(records)).outcome, IsOk());
  records.push_back({12, 0, RawPayload({0})});
  EXPECT_THAT(Play(testing::EncodeTrace(records)).outcome, FailsWith(ErrorCode::kCorrupt));
}

TEST_F(PlayerTest, AccountNamesThePagesThatTheGuestGave) {
  Record();
  const Replay replay = Play(testing::ReadFile(trace_path()));
  ASSERT_THAT(replay.outcome, IsOk());
  EXPECT_TRUE(replay.player->pages().is_complete());
  const auto& rows = replay.player->pages().rows();
  // Every byte that was recorded was read again, and nothing else.
  uint64_t recorded = 0;
  for (const RawRecord& record : records_) {
    if (record.type == testing::kRawMemory) recorded += record.bytes_after(1).size();
  }
  uint64_t read = 0;
  for (const auto& [page, row] : rows) read += row.bytes_read;
  EXPECT_EQ(read, recorded);
  const uint64_t first = GpuGuest::kPictures / kPageSize;
  ASSERT_TRUE(rows.contains(first));
  const PageAccount::Row& row = rows.at(first);
  EXPECT_EQ(row.iova, GpuGuest::kPictures);
  EXPECT_EQ(row.file, 1u);
  EXPECT_EQ(row.file_page, GpuGuest::kLowSize / kPageSize);
  EXPECT_EQ(row.dma_maps, 3u) << "attached twice, and once after the memory came back";
  EXPECT_GE(row.bytes_read, 6 * kPageSize);
  EXPECT_LE(row.first_ns, row.last_ns);
  EXPECT_GT(row.held_ns, 0u);
  EXPECT_EQ(rows.at(first + 16).dma_maps, 1u) << "of the second resource";
  EXPECT_FALSE(rows.contains(first + 100));
}

TEST_F(PlayerTest, AccountsOfTheSessionAreRecordedWhenTheyChange) {
  Record();
  // Mapped, pinned, unique, charged, locked.
  std::vector<std::vector<uint64_t>> seen;
  for (const RawRecord& record : records_) {
    if (record.type != testing::kRawAccounts) continue;
    std::vector<uint64_t> figures;
    for (size_t i = 0; i < 5; ++i) figures.push_back(record.number(i));
    EXPECT_TRUE(seen.empty() || seen.back() != figures) << "nothing had changed";
    seen.push_back(figures);
  }
  ASSERT_GT(seen.size(), 5u);
  EXPECT_THAT(seen.back(), ElementsAre(0, 0, 0, 0, 0)) << "everything was let go";
  const Replay replay = Play(testing::ReadFile(trace_path()));
  ASSERT_THAT(replay.outcome, IsOk());
  const TraceAccounts& accounts = replay.player->recorded_accounts();
  EXPECT_EQ(accounts.changes(), seen.size());
  EXPECT_EQ(accounts.name(), "vgpu0");
  EXPECT_EQ(accounts.pin_backend(), "none");
  ASSERT_TRUE(accounts.peak() && accounts.last());
  EXPECT_EQ(accounts.last()->figures, AccountFigures{});
  EXPECT_EQ(accounts.peak()->figures.unique_pages, replay.outcome->peak_unique_pages);
  EXPECT_GT(accounts.peak()->figures.mapped_pages, accounts.peak()->figures.unique_pages);
  EXPECT_LT(accounts.peak()->time_ns, accounts.last()->time_ns);
  const auto read = TraceAccounts::ReadFrom(trace_path());
  ASSERT_THAT(read, IsOk());
  EXPECT_EQ(ToJson(*read), ToJson(accounts));
}

TEST_F(PlayerTest, AccountsThatCameOutDifferentlyAreNoticed) {
  Record();
  const RawRecord good = Nth(testing::kRawAccounts, 2);
  const auto with = [&](size_t which, uint64_t difference) {
    std::array<uint64_t, 5> figures;
    for (size_t i = 0; i < 5; ++i) figures[i] = good.number(i) + (i == which ? difference : 0);
    Nth(testing::kRawAccounts, 2).payload =
        RawPayload({figures[0], figures[1], figures[2], figures[3], figures[4]});
    return PlayRecords();
  };
  for (const size_t compared : {0, 1, 2}) {
    const Player::Outcome outcome = with(compared, 1);
    EXPECT_EQ(outcome.differences, 1u) << compared;
    EXPECT_THAT(outcome.described, ElementsAre(HasSubstr("pages mapped, ")));
  }
  // Who pays, and what is locked, is a matter of the host.
  for (const size_t other : {3, 4}) EXPECT_EQ(with(other, 1).differences, 0u) << other;
}

TEST_F(PlayerTest, TraceOfTheVersionWithoutAccountsPlays) {
  Record();
  std::erase_if(records_,
                [](const RawRecord& record) { return record.type == testing::kRawAccounts; });
  RawBytes trace = testing::EncodeTrace(records_);
  trace[8] = std::byte{1};
  const Replay replay = Play(trace);
  ASSERT_THAT(replay.outcome, IsOk());
  EXPECT_EQ(replay.outcome->differences, 0u);
  EXPECT_FALSE(replay.player->recorded_accounts().peak());
  for (const std::byte version : {std::byte{0}, std::byte{3}}) {
    trace[8] = version;
    EXPECT_THAT(TraceReader::FromBytes(trace, "test trace"), FailsWith(ErrorCode::kCorrupt));
  }
}

TEST_F(PlayerTest, AccountsRecordThatIsTooShortIsRefused) {
  Record();
  Nth(testing::kRawAccounts, 0).payload = RawPayload({1, 2, 3, 4});
  const Replay replay = Play(testing::EncodeTrace(records_));
  EXPECT_THAT(replay.outcome, FailsWith(ErrorCode::kCorrupt));
  testing::WriteFile(dir_ / "short", testing::EncodeTrace(records_));
  EXPECT_THAT(TraceAccounts::ReadFrom(dir_ / "short"), FailsWith(ErrorCode::kCorrupt));
}

TEST_F(PlayerTest, ChargesAreThoseOfTheLedger) {
  EndVm();
  vgpu_.reset();
  has_ended_ = false;
  config_.vm_uuid = "0a1b2c3d-0000-4000-8000-00000000abcd";
  config_.runtime_dir = dir_ / "run";
  MakeVgpu();
  Record();
  const auto accounts = TraceAccounts::ReadFrom(trace_path());
  ASSERT_THAT(accounts, IsOk());
  EXPECT_EQ(accounts->vm_uuid(), config_.vm_uuid);
  EXPECT_GT(accounts->peak()->figures.charged_pages, 0u);
  EXPECT_EQ(accounts->peak()->figures.charged_pages, accounts->peak()->figures.unique_pages);
  EXPECT_EQ(Play(testing::ReadFile(trace_path())).outcome->differences, 0u);
}

TEST_F(PlayerTest, AccountIsWrittenAsCsv) {
  Record();
  const Replay replay = Play(testing::ReadFile(trace_path()));
  ASSERT_THAT(replay.player->pages().write_csv(dir_ / "pages.csv"), IsOk());
  const RawBytes bytes = testing::ReadFile(dir_ / "pages.csv");
  const std::string text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  EXPECT_EQ(text.find("iova,file,file_page,reads,bytes_read,dma_maps,held_us,first_us,last_us\n"),
            0u);
  EXPECT_EQ(static_cast<size_t>(std::count(text.begin(), text.end(), '\n')),
            replay.player->pages().rows().size() + 1);
  EXPECT_THAT(text, HasSubstr("\n0x40100000,1,256,"));
  EXPECT_THAT(replay.player->pages().write_csv(dir_ / "no/such/place"),
              FailsWith(ErrorCode::kSystem));
  EXPECT_THAT(replay.player->pages().write_csv("/dev/full"), FailsWith(ErrorCode::kSystem));
}

TEST(PageAccountTest, PagesBeyondTheLimitAreLeftOut) {
  const ReplayMemory memory;
  PageAccount account(&memory);
  account.on_dma_map(testing::MakeRange(0, uint64_t{1} << 42), DmaAddr(0));
  EXPECT_EQ(account.rows().size(), PageAccount::kMaxRows);
  EXPECT_FALSE(account.is_complete());
  account.on_read(Iova(uint64_t{1} << 43), 10);
  account.on_read(Iova(0), 10);
  EXPECT_EQ(account.rows().size(), PageAccount::kMaxRows);
  EXPECT_EQ(account.rows().at(0).bytes_read, 10u);
  account.on_dma_unmap(DmaAddr(0), uint64_t{1} << 42);
}

}  // namespace
}  // namespace mvgpu::backend
