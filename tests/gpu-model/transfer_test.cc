#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "tests/gpu-model/gpu_fixture.h"

namespace mvgpu::gpu {
namespace {

using namespace testing;  // NOLINT: the fixture of this folder

// Pixels against a naive reference that goes byte by byte.
class TransferTest : public GpuTest {
 protected:
  struct Picture {
    uint32_t width, height;
    std::vector<WireEntry> entries;
    std::vector<std::byte> pixels;
  };

  // The byte at `offset` of the list; false behind its end.
  bool BackingByte(const Picture& picture, uint64_t offset, std::byte* value) {
    for (const WireEntry& entry : picture.entries) {
      if (offset < entry.length) {
        *value = *ram_.at(entry.address - kRam + offset);
        return true;
      }
      offset -= entry.length;
    }
    return false;
  }
  void ReferenceTransfer(Picture& picture, WireRect rect, uint64_t offset) {
    const uint64_t stride = uint64_t{picture.width} * 4;
    for (uint64_t y = 0; y < rect.height; ++y) {
      for (uint64_t i = 0; i < uint64_t{rect.width} * 4; ++i) {
        BackingByte(picture, offset + y * stride + i,
                    &picture.pixels[(rect.y + y) * stride + rect.x * 4 + i]);
      }
    }
  }
  void ExpectShown(const Picture& picture) {
    ASSERT_EQ(SetScanout(0, 1, {0, 0, picture.width, picture.height}), kOk);
    ASSERT_EQ(Flush(1, {0, 0, picture.width, picture.height}), kOk);
    ASSERT_EQ(LastPixels(), picture.pixels);
  }
};

TEST_F(TransferTest, WholePictureIsTheBackingsBytes) {
  MakeBacked(1, 640, 480, 0x1234 * 4);
  ASSERT_EQ(Transfer(1, {0, 0, 640, 480}), kOk);
  ASSERT_EQ(SetScanout(0, 1, {0, 0, 640, 480}), kOk);
  EXPECT_EQ(LastPixels(), RamBytes(0x1234 * 4, 640 * 480 * 4));
  EXPECT_EQ(device_->counters().transferred_bytes, 640u * 480 * 4);
}

TEST_F(TransferTest, WholeLinesBelowTheTopKeepTheirPlace) {
  Picture picture{32, 32, {{kRam, 4096}}, std::vector<std::byte>(4096)};
  MakeBacked(1, 32, 32);
  ASSERT_EQ(Transfer(1, {0, 10, 32, 5}, 10 * 128), kOk);
  ReferenceTransfer(picture, {0, 10, 32, 5}, 10 * 128);
  ExpectShown(picture);
}

TEST_F(TransferTest, WhatLiesBehindAShortBackingIsLeftAlone) {
  Picture picture{32, 32, {{kRam, 1000}}, std::vector<std::byte>(4096)};
  ASSERT_EQ(Create(1, 32, 32), kOk);
  ASSERT_EQ(Attach(1, picture.entries), kOk);
  ASSERT_EQ(Transfer(1, {0, 0, 32, 32}), kOk);
  ReferenceTransfer(picture, {0, 0, 32, 32}, 0);
  ExpectShown(picture);
  EXPECT_EQ(device_->counters().transferred_bytes, 1000u);
  ASSERT_EQ(Transfer(1, {3, 2, 7, 20}, 500), kOk);
  ReferenceTransfer(picture, {3, 2, 7, 20}, 500);
  ExpectShown(picture);
}

TEST_F(TransferTest, OddRectanglesOffsetsAndListsMatchTheReference) {
  for (uint32_t seed = 1; seed <= 60; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937 random(seed);
    const auto pick = [&random](uint32_t from, uint32_t to) {
      return from + static_cast<uint32_t>(random() % (to - from + 1));
    };
    Picture picture{pick(16, 90), pick(16, 90), {}, {}};
    picture.pixels.resize(size_t{picture.width} * picture.height * 4);
    // Entries of odd sizes at odd places; some follow each other, the list may be shorter than the
    // picture.
    uint64_t next = pick(0, 0x10000);
    for (uint32_t i = pick(1, 30); i > 0; --i) {
      if (pick(0, 2) != 0) next = pick(0, kRamSize - 8192);
      const uint32_t length = pick(1, 3000);
      picture.entries.push_back({kRam + next, length});
      next += length;
    }
    ASSERT_EQ(Create(1, picture.width, picture.height), kOk);
    ASSERT_EQ(Attach(1, picture.entries), kOk);
    uint64_t size = 0;
    for (const WireEntry& entry : picture.entries) size += entry.length;
    for (int round = 0; round < 8; ++round) {
      WireRect rect{pick(0, picture.width), pick(0, picture.height), 0, 0};
      if (pick(0, 3) == 0) rect.x = 0;
      rect.width = rect.x == 0 && pick(0, 1) == 0 ? picture.width : pick(0, picture.width - rect.x);
      rect.height = pick(0, picture.height - rect.y);
      const uint64_t offset = pick(0, static_cast<uint32_t>(size));
      ASSERT_EQ(Transfer(1, rect, offset), kOk);
      ReferenceTransfer(picture, rect, offset);
      ASSERT_NO_FATAL_FAILURE(ExpectShown(picture));
    }
    ASSERT_EQ(Unref(1), kOk);
    ASSERT_NO_FATAL_FAILURE(ExpectNothingHeld());
  }
}

}  // namespace
}  // namespace mvgpu::gpu
