// Processes are killed at random times in the midst of all that is done to a ledger besides holding
// and releasing (ledger_crash_test.cc has that): joining and leaving, growing it, listing mappings,
// entering another process's device, and handing locks over. A survivor repairs the ledger, and
// nothing but the share of the dead is gone. MVGPU_LEDGER_KILLS sets how many are killed.

#include <fcntl.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <utility>
#include <vector>

#include "apionly-domain/accounting/ledger_lookup.h"
#include "tests/apionly-domain/hand_over/hand_over_fixture.h"

namespace mvgpu::domain {
namespace {

using ::mvgpu::testing::IsOk;
using ::testing::IsEmpty;

constexpr uint64_t kPages = 200000;

// Does one round of what a process does until it is killed; false when something went wrong.
using Round = std::function<bool()>;
using Work = std::function<Round(Ledger&)>;

// Two survivors on pages 50 to 109 of the VM's memory, of which 70 to 79 are shared, and the row
// between theirs for whoever comes.
class LedgerKillTest : public LedgerFixture {
 protected:
  LedgerKillTest() : ledger_(Open()) {
    lower_ = Join(*ledger_, "lower");
    auto gap = Join(*ledger_, "gap");
    higher_ = Join(*ledger_, "higher");
    gap.reset();
    EXPECT_THAT(lower_->hold(kRam, kPages, {50, 30}), IsOk());
    EXPECT_THAT(higher_->hold(kRam, kPages, {70, 40}), IsOk());
  }
  ~LedgerKillTest() override {
    lower_->release(kRam, {50, 30});
    higher_->release(kRam, {70, 40});
    EXPECT_EQ(Look().unique_pages, 0u);
    lower_.reset();
    higher_.reset();
    EXPECT_FALSE(ledger_exists());
  }

  pid_t ForkAtWork(const Work& work) {
    int ready[2];
    EXPECT_EQ(pipe(ready), 0);
    const pid_t child = Fork([&] {
      auto ledger = Ledger::Open({dir_, kVm});
      if (!ledger) return;
      const Round round = work(**ledger);
      if (!round() || write(ready[1], "x", 1) != 1) return;
      while (round()) {
      }
    });
    char byte = 0;
    close(ready[1]);
    EXPECT_EQ(read(ready[0], &byte, 1), 1) << "the child cannot do its work";
    close(ready[0]);
    return child;
  }

  // Kills who does `work`, many times; `check` is for what was peculiar to it.
  void KillAnywhere(
      const Work& work, const std::function<void()>& check = [] {}) {
    const char* option = std::getenv("MVGPU_LEDGER_KILLS");
    const int kills = option != nullptr ? std::atoi(option) : 60;
    std::mt19937 random(static_cast<uint32_t>(kills));
    for (int i = 0; i < kills && !HasFailure(); ++i) {
      SCOPED_TRACE(::testing::Message() << "kill " << i);
      const pid_t child = ForkAtWork(work);
      // Not asleep: that would be too coarse.
      const auto end =
          std::chrono::steady_clock::now() + std::chrono::nanoseconds(random() % 300000);
      while (std::chrono::steady_clock::now() < end) {
      }
      Kill(child);
      const LedgerSnapshot dead = Look();
      ASSERT_THAT(ProblemsOf(dead), IsEmpty());
      if (!dead.in_motion) {
        ASSERT_EQ(dead.charged_pages(), dead.unique_pages);
      }
      Open().reset();  // drops the dead
      check();
      ExpectOnlySurvivors();
    }
    std::printf("%d of %d died in the midst of a change or inside the lock\n",
                static_cast<int>(Look().repairs), kills);
  }
  void ExpectOnlySurvivors() {
    const LedgerSnapshot snapshot = Look();
    EXPECT_THAT(ProblemsOf(snapshot), IsEmpty());
    EXPECT_FALSE(snapshot.in_motion);
    EXPECT_EQ(snapshot.rows.size(), 2u);
    EXPECT_EQ(snapshot.unique_pages, 60u + higher_holds_more_);
    EXPECT_EQ(lower_->counts(), (LedgerRow::Counts{30, 30}));
    EXPECT_EQ(higher_->counts(),
              (LedgerRow::Counts{40 + higher_holds_more_, 30 + higher_holds_more_}));
  }

  std::unique_ptr<Ledger> ledger_;
  std::unique_ptr<LedgerRow> lower_;
  std::unique_ptr<LedgerRow> higher_;
  uint64_t higher_holds_more_ = 0;  // pages that no other survivor holds
};

std::unique_ptr<LedgerRow> Joined(Ledger& ledger) {
  auto row = ledger.join(DomainKind::kApiOnly, "child", "none");
  return row ? std::move(*row) : nullptr;
}

TEST_F(LedgerKillTest, WhoJoinsAndLeaves) {
  KillAnywhere([](Ledger& ledger) {
    return [&ledger] {
      const auto row = Joined(ledger);
      if (row == nullptr || !row->hold(kRam, kPages, {60, 30})) return false;
      row->release(kRam, {60, 30});
      return true;
    };
  });
  EXPECT_GT(Look().repairs, 0u) << "the test did not test";
}

// Segments of bits and of payer bytes are made and made larger.
TEST_F(LedgerKillTest, WhoMakesTheLedgerGrow) {
  KillAnywhere([](Ledger& ledger) {
    return [&ledger, file = static_cast<uint64_t>(getpid()) << 20]() mutable {
      const auto lower = Joined(ledger);
      const auto higher = Joined(ledger);
      if (lower == nullptr || higher == nullptr) return false;
      const FileIdentity grown{2, file++};
      const PageRun ends[] = {{0, 100}, {40000, 100}, {90000, 100}};
      for (const PageRun& end : ends) {
        if (!higher->hold(grown, end.end(), end) || !lower->hold(grown, end.end(), end))
          return false;
      }
      for (const PageRun& end : ends) {
        higher->release(grown, end);
        lower->release(grown, end);
      }
      return true;
    };
  });
  EXPECT_GT(Look().repairs, 0u) << "the test did not test";
}

TEST_F(LedgerKillTest, WhoListsMappings) {
  const auto mapping = [](uint64_t page) {
    return LedgerMapping{RangeOf({page, 16}), Access::kReadWrite, kRam, BytesIn(page)};
  };
  lower_->list_mapping(mapping(0));
  higher_->list_mapping(mapping(100));
  KillAnywhere(
      [&](Ledger& ledger) {
        const std::shared_ptr<LedgerRow> row = Joined(ledger);
        return [row, mapping, page = uint64_t{0}]() mutable {
          if (row == nullptr) return false;
          page = page % 10000 + 16;
          row->list_mapping(mapping(page));
          row->list_mapping(mapping(20000 + page));
          row->unlist_mapping(RangeOf({page + 4, 4}));  // leaves two parts
          row->unlist_mapping(RangeOf({page, 16}));
          row->unlist_mapping(RangeOf({20000 + page, 16}));
          return true;
        };
      },
      [&] {
        const UniqueFd file(open(path().c_str(), O_RDONLY | O_CLOEXEC));
        const auto list = ReadMappings(file.get(), path(), kVm, std::nullopt);
        ASSERT_THAT(list, IsOk());
        ASSERT_EQ(list->entries.size(), 2u) << "those of the dead";
        EXPECT_EQ(list->entries[0].mapping.iova, mapping(0).iova);
        EXPECT_EQ(list->entries[1].mapping.iova, mapping(100).iova);
        EXPECT_FALSE(list->in_motion);
        // Who comes next has the list for itself.
        const auto next = Joined(*ledger_);
        next->list_mapping(mapping(7));
        const auto now = ReadMappings(file.get(), path(), kVm, std::nullopt);
        ASSERT_THAT(now, IsOk());
        EXPECT_EQ(now->entries.size(), 3u);
        next->unlist_mapping(mapping(7).iova);
      });
  lower_->unlist_mapping(mapping(0).iova);
  higher_->unlist_mapping(mapping(100).iova);
}

// The row of another process is there with all that it holds, or not at all.
TEST_F(LedgerKillTest, WhoEntersAnotherProcesssDeviceAndTakesItOut) {
  const pid_t vmm = Fork([] {
    while (true) pause();
  });
  const auto owner = FindProcess(static_cast<uint32_t>(vmm));
  ASSERT_THAT(owner, IsOk());
  const std::vector<Ledger::Enrolment::Holding> holdings = {{kRam, kPages, {60, 30}},
                                                            {kOtherRam, kPages, {0, 40000}}};
  int left = 0;
  KillAnywhere(
      [&](Ledger& ledger) {
        return [&ledger, &owner, &holdings] {
          (void)ledger.withdraw(*owner);  // at first there is none
          return ledger.enroll({*owner, DomainKind::kAssignedDevice, "nic", "type1", holdings})
              .has_value();
        };
      },
      [&] {
        const LedgerSnapshot snapshot = Look();
        ASSERT_THAT(ProblemsOf(snapshot), IsEmpty());
        if (snapshot.rows.size() == 2) return;
        ASSERT_EQ(snapshot.rows.size(), 3u);
        const LedgerSnapshot::Row& row = snapshot.rows[1];
        EXPECT_TRUE(row.is_registered && row.owner == *owner);
        EXPECT_EQ(row.unique_pages, 40030u);
        EXPECT_EQ(row.charged_pages, 40000u) << "the others go on paying for what they share";
        EXPECT_THAT(ledger_->withdraw(*owner), IsOk());
        ++left;
      });
  EXPECT_GT(left, 0) << "the test did not test";
  Kill(vmm);
}

// A vGPU's pages go to an assigned device of the same process and back, and their charges move.
TEST_F(LedgerKillTest, WhoHandsLocksOver) {
  const testing::GuestRam ram(64 * kPageSize);
  const auto file = GuestFile::Create(ram.duplicate());
  ASSERT_THAT(file, IsOk());
  const FileIdentity& identity = (*file)->identity();
  ASSERT_THAT(higher_->hold(identity, 64, {8, 16}), IsOk());
  struct Vm {
    explicit Vm(Ledger& ledger, const testing::GuestRam& ram)
        : vgpu(0, &keeper, &device_pins, &ledger), nic("nic", &keeper, &device_pins, &ledger) {
      keeper.add_view(FileIn(container, ram));
      MVGPU_CHECK(container.attach(vgpu.get()).has_value());
      MVGPU_CHECK(container.map(ram.map_request(0, 0, ram.size())).has_value());
      MVGPU_CHECK(vgpu.pin(RangeOf({4, 16})).has_value());
    }
    testing::PageKeeper keeper;
    DevicePins device_pins;
    Container container;
    WatchedDomain vgpu;
    WatchedDevice nic;
  };
  higher_holds_more_ = 16;
  KillAnywhere([&](Ledger& ledger) {
    const auto vm = std::make_shared<Vm>(ledger, ram);
    return [vm] {
      return vm->container.attach(vm->nic.get()) && vm->vgpu.locked_pages() == 0 &&
             vm->container.detach(vm->nic.get()) && vm->vgpu.locked_pages() == 16 &&
             vm->keeper.problem().empty();
    };
  });
  higher_->release(identity, {8, 16});
}

}  // namespace
}  // namespace mvgpu::domain
