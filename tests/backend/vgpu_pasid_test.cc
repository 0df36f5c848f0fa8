// A vGPU whose commands have addresses of a process of the guest: what it reads, what it holds, and
// when it lets go.

#include <random>
#include <thread>

#include "apionly-domain/accounting/ledger_view.h"
#include "tests/backend/vgpu_pasid_fixture.h"
#include "tests/fakes/counting_mapper.h"

namespace mvgpu::backend {
namespace {

using testing::GpuGuest;
using testing::IsOk;

TEST_F(VgpuPasidTest, APictureOfAProcessIsTheSameAsOneInGuestMemory) {
  ASSERT_NO_FATAL_FAILURE(MakePicture());
  EXPECT_EQ(Pinned(), kPages);
  for (const uint32_t seed : {1u, 2u}) {
    Paint(seed);
    EXPECT_EQ(Shown(), ShownByGuestAddress(seed));
  }
  EXPECT_NE(ShownByGuestAddress(1), ShownByGuestAddress(2));
  EXPECT_EQ(guest_->detach(1), kOk);
  EXPECT_EQ(Pinned(), 0u);
}

TEST_F(VgpuPasidTest, APageThatIsRemappedIsNewAfterItsInvalidation) {
  ASSERT_NO_FATAL_FAILURE(MakePicture());
  Paint(1);
  const uint64_t old = Shown();
  PaintAt(2, {kPlaces[0], 1200, kPlaces[2]});
  PaintAt(1, {kPlaces[0], 1600, kPlaces[2]});
  MapPage(1, 1200);
  EXPECT_EQ(Shown(), old) << "the guest has not said so";
  EXPECT_TRUE(InvalidatePage(1));
  EXPECT_EQ(Pinned(), kPages - 1) << "before the guest hears that it is done";
  PaintAt(2, {kPlaces[0], 1200, kPlaces[2]});
  EXPECT_EQ(Shown(), ShownByGuestAddress(2));
  EXPECT_EQ(Pinned(), kPages);
}

TEST_F(VgpuPasidTest, EveryInvalidationThatNamesThePasidHasItsEffect) {
  ASSERT_NO_FATAL_FAILURE(MakePicture());
  Shown();
  const auto is_given_up = [this](uint64_t low, uint64_t high = 0) {
    EXPECT_EQ(Pinned(), kPages);
    EXPECT_TRUE(Invalidate(low, high));
    const uint64_t left = Pinned();
    EXPECT_EQ(guest_->transfer(1), kOk);
    return left;
  };
  EXPECT_EQ(is_given_up(kPasidWord | kDomain << 16 | 0x26), 0u) << "all of the PASID";
  EXPECT_EQ(is_given_up(kPasidWord | kDomain << 16 | 0x36, kGva | 1), 1u) << "two pages";
  EXPECT_EQ(is_given_up(kPasidWord | kDomain << 16 | 0x36, kGva + 0x10000), kPages);
  EXPECT_EQ(is_given_up((kPasidWord + (uint64_t{1} << 32)) | kDomain << 16 | 0x26), kPages);
  EXPECT_EQ(is_given_up(0x12), 0u) << "IOTLB, all";
  EXPECT_EQ(is_given_up(kDomain << 16 | 0x22), 0u) << "IOTLB, domain";
  EXPECT_EQ(is_given_up((kDomain + 1) << 16 | 0x22), kPages);
  EXPECT_EQ(is_given_up(kPasidWord | kDomain << 16 | 0x17), 0u) << "PASID cache";
  EXPECT_EQ(is_given_up(kDomain << 16 | 0x07), 0u) << "PASID cache, domain";
  EXPECT_EQ(is_given_up(0x37), 0u) << "PASID cache, all";
  EXPECT_EQ(is_given_up(kPasidWord | uint64_t{kSource} << 16 | 8, kGva), kPages - 1)
      << "the device's TLB";
  EXPECT_EQ(is_given_up(kPasidWord | uint64_t{kSource + 1} << 16 | 8, kGva), kPages);
  EXPECT_EQ(is_given_up(0x11), kPages) << "the context cache";
}

TEST_F(VgpuPasidTest, AnyPartOfALargePageIsAllOfIt) {
  Put(kFirstPd + 0x1a2 * 8, Ipa(2 << 21) | 0x87);  // two stages of 2 MiB
  ASSERT_EQ(guest_->create(1), kOk);
  ASSERT_EQ(guest_->attach(1, {{kGva + 0x8000, 4096}, {kGva + 0x2000, 4096}}), kOk);
  EXPECT_EQ(Pinned(), 2u);
  EXPECT_TRUE(InvalidatePage(300));
  EXPECT_EQ(Pinned(), 0u);
}

TEST_F(VgpuPasidTest, AFaultIsLoggedAndTheCommandFails) {
  UnmapPage(1);
  ASSERT_EQ(guest_->create(1), kOk);
  EXPECT_EQ(AttachProcess(), gpu::testing::kErrUnspec);
  EXPECT_EQ(Pinned(), 0u);
  EXPECT_EQ(FirstFault().low, kGva + kPageSize);
  EXPECT_EQ(FirstFault().high, uint64_t{1} << 63 | uint64_t{1} << 62 | kPasidWord << 8 |
                                   uint64_t{0x71} << 32 | uint64_t{1} << 31 | kSource);
  ASSERT_EQ(refusals_.size(), 1u);
  EXPECT_NE(refusals_[0].find("pasid 0x345 of device 0x3a91"), std::string::npos) << refusals_[0];
  MapPage(1, kPlaces[1]);
  EXPECT_EQ(AttachProcess(), kOk) << "what is not there is not remembered";
}

TEST_F(VgpuPasidTest, AnUnboundPasidLeavesNothingAndABoundOneIsOtherMemory) {
  ASSERT_NO_FATAL_FAILURE(MakePicture());
  Paint(1);
  EXPECT_EQ(Shown(), ShownByGuestAddress(1));
  Put(kEntry, 0);
  EXPECT_TRUE(Invalidate(kPasidWord | kDomain << 16 | 0x17));
  EXPECT_EQ(Pinned(), 0u);
  EXPECT_EQ(guest_->transfer(1), gpu::testing::kErrUnspec);
  EXPECT_EQ(FirstFault().high >> 32 & 0xff, 0x59u);
  EXPECT_EQ(Pinned(), 0u);
  for (uint64_t i = 0; i < kPages; ++i) MapPage(i, 1000 + 3 * i);
  PaintAt(5, {1000, 1003, 1006});
  Put(kEntry, Gpa(kSecond) | 0xc9);
  EXPECT_TRUE(Invalidate(kPasidWord | kDomain << 16 | 0x17));
  EXPECT_TRUE(Invalidate(kPasidWord | kDomain << 16 | 0x26));
  EXPECT_EQ(Shown(), ShownByGuestAddress(5));
}

TEST_F(VgpuPasidTest, ABindingThatNobodyToldOfIsFollowedAllTheSame) {
  vgpu_->use_iommu([](GuestIommu& iommu) {
    iommu.object().unbind({kSource, kPasid});
    EXPECT_EQ(iommu.object().binding({kSource, kPasid}), nullptr);
  });
  ASSERT_NO_FATAL_FAILURE(MakePicture());
  EXPECT_TRUE(InvalidatePage(0));
  EXPECT_EQ(Pinned(), kPages - 1);
}

TEST_F(VgpuPasidTest, WithoutTranslationAPasidLeadsNowhere) {
  ASSERT_NO_FATAL_FAILURE(MakePicture());
  UseUnit([](domain::VtdIommu& unit) { unit.set_translating(false); });
  EXPECT_EQ(Pinned(), 0u);
  EXPECT_EQ(guest_->transfer(1), gpu::testing::kErrUnspec);
  EXPECT_EQ(FirstFault().high, 0u) << "there is nobody to log it";
  UseUnit([](domain::VtdIommu& unit) { unit.set_translating(true); });
  EXPECT_EQ(guest_->transfer(1), kOk);
}

TEST_F(VgpuPasidTest, AnAddressSpaceSaysThatAnIommuIsThereAlsoInBypass) {
  using Kind = domain::DeviceAddressSpace::Kind;
  EXPECT_EQ(vgpu_->addresses(), Kind::kTranslated);
  UseUnit([](domain::VtdIommu& unit) { unit.set_translating(false); });
  EXPECT_EQ(vgpu_->addresses(), Kind::kBypassed);
  vgpu_->use_iommu([](GuestIommu& iommu) {
    EXPECT_EQ(iommu.addresses().iommu(), &iommu.object());
    EXPECT_EQ(iommu.addresses().translations(), &iommu.space());
  });
  auto parts = Vgpu::MakeParts(config_);
  const auto plain = Vgpu::Create(config_, std::move(*parts), nullptr, this);
  EXPECT_EQ((*plain)->addresses(), Kind::kGuestMemory);
}

TEST_F(VgpuPasidTest, AnotherRootIsAnotherWorld) {
  ASSERT_NO_FATAL_FAILURE(MakePicture());
  UseUnit([](domain::VtdIommu& unit) { unit.set_root(Gpa(kRoot) | 1 << 10); });
  EXPECT_EQ(Pinned(), 0u) << "the unit remembers nothing, nor does the device";
  EXPECT_EQ(guest_->transfer(1), kOk);
  EXPECT_EQ(Pinned(), kPages);
}

TEST_F(VgpuPasidTest, MemoryThatTheVmmTakesIsGoneForTheProcess) {
  ASSERT_NO_FATAL_FAILURE(MakePicture());
  ASSERT_THAT(guest_->unmap_pictures(), IsOk());
  EXPECT_EQ(Pinned(), 0u);
  EXPECT_EQ(guest_->transfer(1), gpu::testing::kErrUnspec);
  ASSERT_THAT(guest_->map_pictures(), IsOk());
  Paint(3);
  EXPECT_EQ(Shown(), ShownByGuestAddress(3));
}

// Tables as a hostile guest has them, changing while they are walked. Rings are left alone: a guest
// that lets accessed flags be set there stops its own queue.
class HostileVgpuPasidTest : public VgpuPasidTest {
 protected:
  HostileVgpuPasidTest() { config_.gpu.max_translated_pages = 4096; }
  void WriteAnyEntry(std::mt19937_64& random) {
    const auto table = [&] { return kRoot + random() % (kTablesEnd - kRoot); };
    const uint64_t flags = random() % 2 != 0 ? 0x7 : 0x87;
    const std::array<uint64_t, 6> words{
        0,
        random(),
        Ipa(table() & ~kPageMask) | flags,
        Gpa(table() & ~kPageMask) | flags,
        Ipa(GpuGuest::kLowSize + random() % GpuGuest::kPicturesSize) | flags,
        Gpa(kFirst) | 0x83};
    Put(table() & ~uint64_t{7}, words[random() % words.size()]);
  }
};

TEST_F(HostileVgpuPasidTest, TablesThatChangeLeaveNothingBehind) {
  std::atomic<bool> is_over{false};
  std::thread guest_cpu([&] {
    std::mt19937_64 random(7);
    while (!is_over) WriteAnyEntry(random);
  });
  std::mt19937_64 random(8);
  EXPECT_EQ(guest_->create(1), kOk);
  for (int round = 0; round < 200; ++round) {
    if (round % 4 == 0) WriteTables();
    for (int i = 0; i < round % 4; ++i) WriteAnyEntry(random);
    const uint64_t start = random() % 8 == 0 ? random() : kGva + random() % 0x1'0000;
    const auto length = static_cast<uint32_t>(random() % 8 == 0 ? random() : random() % 0x1'0000);
    guest_->attach(1, {{kGva, 4096}, {start, length}});
    guest_->transfer(1);
    const std::array<uint64_t, 5> kinds{0x12, 0x37, 0x26, 0x36, 0x11};
    Invalidate(kPasidWord | kDomain << 16 | kinds[random() % kinds.size()], kGva);
    guest_->transfer(1);
    guest_->detach(1);
    EXPECT_EQ(Pinned(), 0u);
  }
  is_over = true;
  guest_cpu.join();
  EXPECT_EQ(guest_->create(2), kOk) << "the device works as before";
}

class NoBindingsVgpuPasidTest : public VgpuPasidTest {
 protected:
  std::optional<GuestIommu::Options> iommu() override {
    return GuestIommu::Options{.space = {kSource, kPasid}, .limits = {.bindings = 0}};
  }
};

TEST_F(NoBindingsVgpuPasidTest, WhatNobodyCouldRevokeIsNotUsed) {
  ASSERT_EQ(guest_->create(1), kOk);
  EXPECT_EQ(AttachProcess(), gpu::testing::kErrOutOfMemory);
  EXPECT_EQ(Pinned(), 0u);
}

// The device's requests without PASID.
class RequestsWithoutPasidTest : public VgpuPasidTest {
 protected:
  std::optional<GuestIommu::Options> iommu() override {
    return GuestIommu::Options{.space = {kSource, std::nullopt}};
  }
};

TEST_F(RequestsWithoutPasidTest, AreOfGuestMemoryInBypassAndOfTheRidPasidOtherwise) {
  UseUnit([](domain::VtdIommu& unit) { unit.set_translating(false); });
  ASSERT_EQ(guest_->create(1), kOk);
  ASSERT_EQ(guest_->attach_picture(1), kOk);
  ASSERT_EQ(guest_->set_scanout(1), kOk);
  guest_->paint(4);
  EXPECT_EQ(Shown(), ShownByGuestAddress(4));
  UseUnit([](domain::VtdIommu& unit) { unit.set_translating(true); });
  EXPECT_EQ(Pinned(), 0u);
  EXPECT_EQ(guest_->transfer(1), gpu::testing::kErrUnspec);
  EXPECT_EQ(guest_->detach(1), kOk);
  Put(kContexts + 0x228, kPasid);
  EXPECT_TRUE(Invalidate(0x11));
  ASSERT_EQ(AttachProcess(), kOk);
  Paint(6);
  EXPECT_EQ(Shown(), ShownByGuestAddress(6));
  EXPECT_TRUE(InvalidatePage(2));
  EXPECT_EQ(Pinned(), kPages - 1);
}

// What the device has when the guest hears that an invalidation is complete.
class OrderVgpuPasidTest : public VgpuPasidTest {
 protected:
  void SetUp() override {
    auto mapper = std::make_unique<testing::CountingMapper>();
    counting_ = mapper.get();
    mapper_ = std::move(mapper);
    VgpuPasidTest::SetUp();
  }
  testing::CountingMapper* counting_ = nullptr;  // the vGPU's
};

TEST_F(OrderVgpuPasidTest, ADeviceHasLetGoBeforeTheWaitIsAnswered) {
  ASSERT_NO_FATAL_FAILURE(MakePicture());
  int unmaps = 0;
  counting_->on_unmap = [&] {
    ++unmaps;
    EXPECT_EQ(guest_->ram().get<uint64_t>(kStatus), 0u);
  };
  EXPECT_TRUE(Invalidate(kPasidWord | kDomain << 16 | 0x26));
  counting_->on_unmap = nullptr;
  EXPECT_EQ(unmaps, static_cast<int>(kPages));
  EXPECT_EQ(counting_->mapped_pages(), 0u);
}

class LedgerVgpuPasidTest : public VgpuPasidTest {
 protected:
  LedgerVgpuPasidTest() {
    config_.vm_uuid = kVm;
    config_.runtime_dir = dir_ / "run";
  }
  static constexpr const char* kVm = "00112233-4455-6677-8899-aabbccddeeff";
  uint64_t Charged() {
    auto dir = domain::RuntimeDir::OpenForReading(config_.runtime_dir);
    auto snapshot = domain::ReadLedger(*dir, kVm);
    EXPECT_THAT(snapshot, IsOk());
    return snapshot ? snapshot->charged_pages() : 0;
  }
  testing::TempDir dir_;
};

TEST_F(LedgerVgpuPasidTest, TheLedgerHasThePagesBehindTheTranslations) {
  ASSERT_NO_FATAL_FAILURE(MakePicture());
  EXPECT_EQ(Charged(), kPages);
  MapPage(1, kPlaces[0]);  // the first page twice
  EXPECT_TRUE(InvalidatePage(1));
  EXPECT_EQ(Charged(), kPages - 1);
  EXPECT_EQ(guest_->transfer(1), kOk);
  EXPECT_EQ(Charged(), kPages - 1);
  MapPage(1, 1234);
  EXPECT_TRUE(InvalidatePage(1));
  EXPECT_EQ(guest_->transfer(1), kOk);
  EXPECT_EQ(Charged(), kPages);
  EXPECT_TRUE(Invalidate(kPasidWord | kDomain << 16 | 0x26));
  EXPECT_EQ(Charged(), 0u);
}

}  // namespace
}  // namespace mvgpu::backend
