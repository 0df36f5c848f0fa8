#pragma once

// A guest that has its vGPU work in the address space of one of its processes (virt-SVM). Its
// tables, of both stages, its invalidation queue and its pictures are in the VM's memory.

#include <algorithm>
#include <array>
#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "tests/backend/vgpu_fixture.h"

namespace mvgpu::backend {

// Intermediate addresses are kRam - kShift for the first byte of RAM.
class VgpuPasidTest : public VgpuTest {
 protected:
  static constexpr domain::SourceId kSource = 0x3a91;
  static constexpr domain::Pasid kPasid = 0x345;
  static constexpr uint64_t kDomain = 0x42;
  static constexpr uint64_t kGva = 0x7f12'3440'0000;  // where a last table begins
  static constexpr uint64_t kShift = 0x2000'0000;
  static constexpr uint64_t kPages = 3;  // of a picture

  // Tables, by their place in RAM; rings are well below.
  static constexpr uint64_t kRoot = 0x8'0000;
  static constexpr uint64_t kContexts = 0x8'1000;
  static constexpr uint64_t kDirectory = 0x8'2000;
  static constexpr uint64_t kPasids = 0x8'3000;
  static constexpr uint64_t kEntry = kPasids + 5 * 64;
  static constexpr uint64_t kFirst = 0x8'4000;  // four levels, a page each
  static constexpr uint64_t kFirstPd = 0x8'6000;
  static constexpr uint64_t kFirstLeaves = 0x8'7000;
  static constexpr uint64_t kSecond = 0x8'8000;  // likewise
  static constexpr uint64_t kSecondPd = 0x8'a000;
  static constexpr uint64_t kSecondLeaves = 0x8'b000;
  static constexpr uint64_t kQueue = 0x8'c000;
  static constexpr uint64_t kStatus = 0x8'd000;
  static constexpr uint64_t kTablesEnd = 0x8'c000;

  static constexpr std::array<uint64_t, kPages> kPlaces{900, 700, 1500};  // pages of RAM

  std::optional<GuestIommu::Options> iommu() override {
    return GuestIommu::Options{.space = {kSource, kPasid}};
  }
  void SetUp() override {
    VgpuTest::SetUp();
    StartGuest();
    WriteTables();
    UseUnit([](domain::VtdIommu& unit) {
      unit.queue().write_address((testing::GpuGuest::kRam + kQueue) | 1 << 11);
      unit.queue().enable();
      unit.set_root((testing::GpuGuest::kRam + kRoot) | 1 << 10);
      unit.set_translating(true);
    });
    for (uint64_t i = 0; i < kPages; ++i) MapPage(i, kPlaces[i]);
  }

  // In one access, as a processor does.
  void Put(uint64_t offset, uint64_t word) {
    auto* const place = reinterpret_cast<uint64_t*>(guest_->ram().at(offset));
    std::atomic_ref(*place).store(word, std::memory_order_relaxed);
  }
  static constexpr uint64_t Gpa(uint64_t offset) { return testing::GpuGuest::kRam + offset; }
  static constexpr uint64_t Ipa(uint64_t offset) { return Gpa(offset) - kShift; }
  void WriteTables() {
    Put(kRoot + 0x3a8, Gpa(kContexts) | 1);
    Put(kContexts + 0x220, Gpa(kDirectory) | 0x1d);
    Put(kDirectory + (kPasid >> 6) * 8, Gpa(kPasids) | 1);
    Put(kEntry, Gpa(kSecond) | 0xc9);
    Put(kEntry + 8, kDomain);
    Put(kEntry + 16, Ipa(kFirst));
    Put(kFirst + 0xfe * 8, Ipa(kFirst + 0x1000) | 7);
    Put(kFirst + 0x1000 + 0x48 * 8, Ipa(kFirstPd) | 7);
    Put(kFirstPd + 0x1a2 * 8, Ipa(kFirstLeaves) | 7);
    // The first MiBs and the last ones by large pages, those between by small ones.
    Put(kSecond, Gpa(kSecond + 0x1000) | 3);
    Put(kSecond + 0x1000, Gpa(kSecondPd) | 3);
    for (uint64_t i = 0; i < 4; ++i) Put(kSecondPd + (256 + i) * 8, Gpa(i << 21) | 0x83);
    Put(kSecondPd + 257 * 8, Gpa(kSecondLeaves) | 3);
    for (uint64_t i = 0; i < 512; ++i) {
      Put(kSecondLeaves + i * 8, Gpa((1 << 21) + i * kPageSize) | 3);
    }
  }
  // The process's page `i` is this page of RAM.
  void MapPage(uint64_t i, uint64_t place) {
    Put(kFirstLeaves + i * 8, Ipa(place * kPageSize) | 7);
  }
  void UnmapPage(uint64_t i) { Put(kFirstLeaves + i * 8, 0); }

  void UseUnit(const std::function<void(domain::VtdIommu&)>& use) {
    vgpu_->use_iommu([&](GuestIommu& iommu) { use(iommu.unit()); });
  }
  // A descriptor, and one that waits for it. False: the wait was not answered.
  bool Invalidate(uint64_t low, uint64_t high = 0) {
    Put(kStatus, 0);
    const std::array<uint64_t, 8> words{low, high, 0, 0, 0x1'0000'0025, Gpa(kStatus), 0, 0};
    for (size_t i = 0; i < words.size(); ++i) Put(kQueue + tail_ + i * 8, words[i]);
    tail_ = (tail_ + 64) % kPageSize;
    UseUnit([this](domain::VtdIommu& unit) {
      unit.queue().write_tail(tail_);
      unit.run_queue();
    });
    return guest_->ram().get<uint64_t>(kStatus) == 1;
  }
  bool InvalidatePage(uint64_t i) {
    return Invalidate(kPasidWord | kDomain << 16 | 0x36, kGva + i * kPageSize);
  }
  static constexpr uint64_t kPasidWord = uint64_t{kPasid} << 32;

  // The picture of a seed, at the process's pages.
  void Paint(uint32_t seed) { PaintAt(seed, {kPlaces.begin(), kPlaces.end()}); }
  void PaintAt(uint32_t seed, const std::vector<uint64_t>& places) {
    guest_->paint(seed);
    const uint64_t first = testing::GpuGuest::kLowSize;
    std::vector<std::byte> picture(guest_->ram().at(first),
                                   guest_->ram().at(first) + kPages * kPageSize);
    std::fill_n(guest_->ram().at(first), picture.size(), std::byte{0});
    for (uint64_t i = 0; i < kPages; ++i) {
      std::copy_n(picture.begin() + static_cast<ptrdiff_t>(i * kPageSize), kPageSize,
                  guest_->ram().at(places[i] * kPageSize));
    }
  }
  uint32_t AttachProcess(uint32_t id = 1) {
    return guest_->attach(id, {{kGva, testing::GpuGuest::kPictureBytes}});
  }
  void MakePicture() {
    ASSERT_EQ(guest_->create(1), kOk);
    ASSERT_EQ(AttachProcess(), kOk);
    ASSERT_EQ(guest_->set_scanout(1), kOk);
  }
  // What is shown after a transfer.
  uint64_t Shown() {
    EXPECT_EQ(guest_->transfer(1), kOk);
    EXPECT_EQ(guest_->flush(1), kOk);
    return vgpu_->picture().hash(0).value_or(0);
  }
  // What a vGPU without IOMMU shows of the picture of a seed.
  uint64_t ShownByGuestAddress(uint32_t seed) {
    auto parts = Vgpu::MakeParts(config_);
    auto plain = Vgpu::Create(config_, std::move(*parts), nullptr, this);
    testing::GpuGuest guest(plain->get(), [&] { return (*plain)->step(0); });
    EXPECT_THAT(guest.map_low(), testing::IsOk());
    EXPECT_THAT(guest.map_pictures(), testing::IsOk());
    EXPECT_TRUE(guest.boot());
    EXPECT_EQ(guest.create(1), kOk);
    EXPECT_EQ(guest.attach_picture(1), kOk);
    EXPECT_EQ(guest.set_scanout(1), kOk);
    guest.paint(seed);
    EXPECT_EQ(guest.transfer(1), kOk);
    EXPECT_EQ(guest.flush(1), kOk);
    const uint64_t hash = (*plain)->picture().hash(0).value_or(0);
    (*plain)->reset();
    EXPECT_THAT((*plain)->dma_unmap_all(), testing::IsOk());
    return hash;
  }
  uint64_t Pinned() const { return vgpu_->counters().domain.pinned_pages; }
  domain::FaultLog::Words FirstFault() {
    domain::FaultLog::Words words;
    UseUnit([&](domain::VtdIommu& unit) { words = unit.faults().words(0); });
    return words;
  }

  uint64_t tail_ = 0;
};

}  // namespace mvgpu::backend
