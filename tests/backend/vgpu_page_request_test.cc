// A vGPU that may ask the guest for pages of a process: commands that wait, and how that ends.

#include "tests/backend/vgpu_pasid_fixture.h"

namespace mvgpu::backend {
namespace {

// A device that asks for pages, and the guest's driver that finds them.
class AskingVgpuPasidTest : public VgpuPasidTest {
 protected:
  static constexpr uint64_t kRequests = 0x8'e000;
  std::optional<GuestIommu::Options> iommu() override {
    return GuestIommu::Options{.space = {kSource, kPasid}, .asks_for_pages = true};
  }
  void SetUp() override {
    VgpuPasidTest::SetUp();
    UseUnit([](domain::VtdIommu& unit) { unit.page_requests().set_address(Gpa(kRequests)); });
  }
  // The driver: what it is asked for, its answer, and `place` for each page.
  bool Wait() override {
    if (StepAll()) return true;
    if (!answers_ || asked_.size() > 10) return false;
    bool any = false;
    UseUnit([&](domain::VtdIommu& unit) {
      auto& queue = unit.page_requests();
      for (; queue.head() != queue.tail(); any = true) {
        asked_.push_back({guest_->ram().get<uint64_t>(kRequests + queue.head()),
                          guest_->ram().get<uint64_t>(kRequests + queue.head() + 8)});
        queue.set_head((queue.head() + 32) % kPageSize);
      }
    });
    if (!any) return false;
    if (during_) during_();
    return Invalidate(kPasidWord | uint64_t{kSource} << 16 | code_ << 12 | 0x19,
                      asked_.back()[1] & 0xffc);
  }

  bool answers_ = true;
  uint64_t code_ = 0;
  std::vector<std::array<uint64_t, 2>> asked_;
  std::function<void()> during_;
};

TEST_F(AskingVgpuPasidTest, ACommandWaitsForThePagesThatTheGuestFinds) {
  ASSERT_NO_FATAL_FAILURE(MakePicture());
  EXPECT_TRUE(asked_.empty());
  Paint(1);
  EXPECT_EQ(Shown(), ShownByGuestAddress(1));
  UnmapPage(0);
  UnmapPage(2);
  EXPECT_TRUE(Invalidate(kPasidWord | kDomain << 16 | 0x26));
  PaintAt(2, {1300, kPlaces[1], 1302});
  during_ = [this] {
    EXPECT_EQ(Pinned(), 0u) << "a step that waits holds nothing of its own";
    MapPage(0, 1300);
    MapPage(2, 1302);
  };
  const auto commands = vgpu_->counters().gpu.control_commands;
  EXPECT_EQ(guest_->transfer(1), kOk);
  EXPECT_EQ(vgpu_->counters().gpu.control_commands, commands + 1) << "it counts once";
  EXPECT_EQ(guest_->flush(1), kOk);
  EXPECT_EQ(vgpu_->picture().hash(0), ShownByGuestAddress(2));
  EXPECT_EQ(asked_.size(), 2u) << "in one group";
  EXPECT_EQ(asked_[0][0], kPasidWord | uint64_t{kSource} << 16 | 0x101);
  EXPECT_EQ(asked_[0][1] & ~uint64_t{0xff8}, kGva | 1);
  EXPECT_EQ(asked_[1][1] & ~uint64_t{0xff8}, (kGva + 2 * kPageSize) | 5) << "the last one";
  EXPECT_EQ(FirstFault().high, 0u) << "nothing of it is a fault";
}

TEST_F(AskingVgpuPasidTest, AnAttachWaitsToo) {
  UnmapPage(1);
  during_ = [this] {
    EXPECT_EQ(Pinned(), 0u);
    MapPage(1, kPlaces[1]);
  };
  ASSERT_NO_FATAL_FAILURE(MakePicture());
  EXPECT_EQ(asked_.size(), 1u);
  EXPECT_EQ(Pinned(), kPages);
}

TEST_F(AskingVgpuPasidTest, WhatTheGuestDeniesIsAFault) {
  UnmapPage(1);
  ASSERT_EQ(guest_->create(1), kOk);
  for (const uint64_t code : {1u, 0xfu}) {
    code_ = code;
    asked_.clear();
    EXPECT_EQ(AttachProcess(), gpu::testing::kErrUnspec);
    EXPECT_EQ(asked_.size(), 1u);
  }
  EXPECT_EQ(FirstFault().low, kGva + kPageSize);
  EXPECT_EQ(FirstFault().high >> 32 & 0xff, 0x71u);
  code_ = 0;
  during_ = [this] { MapPage(1, kPlaces[1]); };
  EXPECT_EQ(AttachProcess(), kOk) << "the next one may ask again";
}

TEST_F(AskingVgpuPasidTest, AnswersWithoutPagesAreAskedForAgain) {
  UnmapPage(1);
  ASSERT_EQ(guest_->create(1), kOk);
  during_ = [this] {
    if (asked_.size() == 3) MapPage(1, kPlaces[1]);
  };
  EXPECT_EQ(AttachProcess(), kOk);
  EXPECT_EQ(asked_.size(), 3u);
}

TEST_F(AskingVgpuPasidTest, AnAnswerIsADoorbell) {
  UnmapPage(1);
  answers_ = false;
  ASSERT_EQ(guest_->create(1), kOk);
  EXPECT_EQ(AttachProcess(), 0u) << "it waits";
  EXPECT_FALSE(vgpu_->step(0)) << "and asks once";
  MapPage(1, kPlaces[1]);
  doorbells_.clear();
  EXPECT_TRUE(Invalidate(kPasidWord | uint64_t{kSource} << 16 | 0x19, 1 << 3 | 4));
  EXPECT_TRUE(doorbells_.empty()) << "another group's";
  EXPECT_TRUE(Invalidate(kPasidWord | uint64_t{kSource} << 16 | 0x19, 4));
  EXPECT_EQ(doorbells_, std::vector<uint16_t>{0});
  EXPECT_TRUE(vgpu_->step(0));
  EXPECT_EQ(Pinned(), kPages);
}

TEST_F(AskingVgpuPasidTest, AnUnboundPasidAndAResetEndTheWait) {
  UnmapPage(1);
  answers_ = false;
  ASSERT_EQ(guest_->create(1), kOk);
  EXPECT_EQ(AttachProcess(), 0u);
  Put(kEntry, 0);
  EXPECT_TRUE(Invalidate(kPasidWord | kDomain << 16 | 0x17));
  EXPECT_TRUE(vgpu_->step(0)) << "it fails now";
  ASSERT_EQ(refusals_.size(), 1u);
  EXPECT_NE(refusals_[0].find("0x59"), std::string::npos) << refusals_[0];

  WriteTables();
  UnmapPage(1);
  EXPECT_TRUE(Invalidate(kPasidWord | kDomain << 16 | 0x17));
  ASSERT_TRUE(guest_->boot());
  ASSERT_EQ(guest_->create(1), kOk);
  EXPECT_EQ(AttachProcess(), 0u);
  ASSERT_TRUE(guest_->boot());
  ASSERT_EQ(guest_->create(1), kOk);
  answers_ = true;
  asked_.clear();
  UseUnit([](domain::VtdIommu& unit) {
    EXPECT_EQ(unit.page_requests().counters().waiting, 0u);
    unit.page_requests().set_head(unit.page_requests().tail());
  });
  during_ = [this] { MapPage(1, kPlaces[1]); };
  EXPECT_EQ(AttachProcess(), kOk) << "another driver's is a new one";
  EXPECT_EQ(asked_.size(), 1u);
}

TEST_F(AskingVgpuPasidTest, ItIsAFaultWhereTheContextTakesNoPageRequests) {
  UnmapPage(1);
  Put(kContexts + 0x220, Gpa(kDirectory) | 0xd);  // PRE is clear
  EXPECT_TRUE(Invalidate(0x11));
  ASSERT_EQ(guest_->create(1), kOk);
  EXPECT_EQ(AttachProcess(), gpu::testing::kErrUnspec);
  EXPECT_EQ(FirstFault().high >> 32 & 0xff, 0x47u);
  EXPECT_TRUE(asked_.empty());
}

}  // namespace
}  // namespace mvgpu::backend
