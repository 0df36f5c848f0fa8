#include <gtest/gtest.h>

#include <array>
#include <cstring>

#include "gpu-model/display/frame_hash.h"
#include "tests/gpu-model/gpu_fixture.h"

namespace mvgpu::gpu {
namespace {

using namespace testing;  // NOLINT: the fixture of this folder

class ScanoutCommandsTest : public GpuTest {
 protected:
  ScanoutCommandsTest() : GpuTest({.scanouts = 3, .preferred_mode = {1024, 768}}) {}
};

TEST_F(ScanoutCommandsTest, DisplayInfoGivesTheModeOfEveryHead) {
  std::vector<std::byte> response(24 + 16 * 24);
  ASSERT_EQ(device_->execute_control(RequestBytes(kCmdGetDisplayInfo).bytes(), response), 408u);
  const auto word = [&](size_t offset) {
    uint32_t value;
    std::memcpy(&value, response.data() + offset, 4);
    return value;
  };
  EXPECT_EQ(word(0), kOkDisplayInfo);
  for (uint32_t i = 0; i < 16; ++i) {
    const size_t at = 24 + i * 24;
    EXPECT_EQ(word(at), i < 3 ? i * 1024 : 0u);  // side by side
    EXPECT_EQ(word(at + 4), 0u);
    EXPECT_EQ(word(at + 8), i < 3 ? 1024u : 0u);
    EXPECT_EQ(word(at + 12), i < 3 ? 768u : 0u);
    EXPECT_EQ(word(at + 16), i < 3 ? 1u : 0u);  // enabled
  }
}

TEST_F(ScanoutCommandsTest, ScanoutShowsARectangleOfTheResource) {
  MakeBacked(1, 64, 64);
  ASSERT_EQ(Transfer(1, {0, 0, 64, 64}), kOk);
  ASSERT_EQ(SetScanout(1, 1, {40, 30, 24, 34}), kOk);  // up to the last corner
  ASSERT_EQ(display_.frames.size(), 1u);
  const FakeDisplay::Frame& frame = display_.frames[0];
  EXPECT_EQ(frame.scanout, 1u);
  EXPECT_EQ(frame.size, (Size{24, 34}));
  EXPECT_EQ(frame.damage, (Rect{0, 0, 24, 34}));
  std::vector<std::byte> expected;
  for (uint64_t y = 30; y < 64; ++y) {
    const auto line = RamBytes((y * 64 + 40) * 4, 24 * 4);
    expected.insert(expected.end(), line.begin(), line.end());
  }
  EXPECT_EQ(frame.pixels, expected);
  EXPECT_FALSE(device_->frame(0).has_value());
  ASSERT_TRUE(device_->frame(1).has_value());
  EXPECT_EQ(device_->frame(1)->size, (Size{24, 34}));
  EXPECT_FALSE(device_->frame(3).has_value());
}

TEST_F(ScanoutCommandsTest, SetScanoutChecksInQemusOrder) {
  EXPECT_EQ(SetScanout(3, 0, {}), kErrScanoutId);
  EXPECT_EQ(SetScanout(0xffffffff, 9, {}), kErrScanoutId);
  EXPECT_EQ(SetScanout(0, 9, {}), kErrResourceId);
  ASSERT_EQ(Create(1, 64, 64), kOk);
  EXPECT_EQ(SetScanout(0, 1, {0, 0, 64, 64}), kErrUnspec);  // no backing
  ASSERT_EQ(AttachRam(1, 0, 64 * 64 * 4), kOk);
  EXPECT_EQ(SetScanout(0, 1, {0, 0, 15, 64}), kErrParameter);
  EXPECT_EQ(SetScanout(0, 1, {0, 0, 64, 15}), kErrParameter);
  EXPECT_EQ(SetScanout(0, 1, {0, 0, 16, 16}), kOk);
  EXPECT_TRUE(display_.disabled.empty());
}

TEST_F(ScanoutCommandsTest, ResourceZeroDisables) {
  MakeBacked(1, 64, 64);
  EXPECT_EQ(SetScanout(0, 0, {}), kOk);  // it is off already
  EXPECT_TRUE(display_.disabled.empty());
  ASSERT_EQ(SetScanout(0, 1, {0, 0, 64, 64}), kOk);
  EXPECT_EQ(SetScanout(0, 0, {0, 0, 0, 0}), kOk);
  EXPECT_EQ(display_.disabled, std::vector<uint32_t>{0});
  EXPECT_FALSE(device_->frame(0).has_value());
}

TEST_F(ScanoutCommandsTest, UnrefDisablesEveryScanoutOfTheResource) {
  MakeBacked(1, 64, 64);
  MakeBacked(2, 64, 64, 0x10000);
  ASSERT_EQ(SetScanout(0, 1, {0, 0, 64, 64}), kOk);
  ASSERT_EQ(SetScanout(1, 2, {0, 0, 64, 64}), kOk);
  ASSERT_EQ(SetScanout(2, 1, {0, 0, 32, 32}), kOk);
  ASSERT_EQ(Unref(1), kOk);
  EXPECT_EQ(display_.disabled, (std::vector<uint32_t>{0, 2}));
  EXPECT_TRUE(device_->frame(1).has_value());
  device_->reset();
  EXPECT_EQ(display_.disabled, (std::vector<uint32_t>{0, 2, 1}));
}

TEST_F(ScanoutCommandsTest, DetachKeepsThePicture) {
  MakeBacked(1, 64, 64);
  ASSERT_EQ(Transfer(1, {0, 0, 64, 64}), kOk);
  ASSERT_EQ(SetScanout(0, 1, {0, 0, 64, 64}), kOk);
  ASSERT_EQ(Detach(1), kOk);
  ASSERT_TRUE(device_->frame(0).has_value());
  ASSERT_EQ(Flush(1, {0, 0, 64, 64}), kOk);
  EXPECT_EQ(LastPixels(), RamBytes(0, 64 * 64 * 4));
}

TEST_F(ScanoutCommandsTest, SettingTheSameScanoutAgainShowsNothingNew) {
  MakeBacked(1, 64, 64);
  ASSERT_EQ(SetScanout(0, 1, {0, 0, 64, 64}), kOk);
  ASSERT_EQ(SetScanout(0, 1, {0, 0, 64, 64}), kOk);
  EXPECT_EQ(display_.frames.size(), 1u);
  ASSERT_EQ(SetScanout(0, 1, {0, 1, 64, 63}), kOk);
  EXPECT_EQ(display_.frames.size(), 2u);
}

TEST_F(ScanoutCommandsTest, FlushShowsTheDamageInEachScanoutsOwnCoordinates) {
  MakeBacked(1, 64, 64);
  ASSERT_EQ(SetScanout(0, 1, {0, 0, 32, 64}), kOk);
  ASSERT_EQ(SetScanout(2, 1, {32, 16, 32, 32}), kOk);
  display_.frames.clear();
  ASSERT_EQ(Flush(1, {30, 10, 10, 10}), kOk);
  ASSERT_EQ(display_.frames.size(), 2u);
  EXPECT_EQ(display_.frames[0].scanout, 0u);
  EXPECT_EQ(display_.frames[0].damage, (Rect{30, 10, 2, 10}));
  EXPECT_EQ(display_.frames[1].scanout, 2u);
  EXPECT_EQ(display_.frames[1].damage, (Rect{0, 0, 8, 4}));
  EXPECT_EQ(device_->counters().frames, 2u);
  display_.frames.clear();
  ASSERT_EQ(Flush(1, {32, 0, 32, 16}), kOk);  // just above one, beside the other
  ASSERT_EQ(Flush(1, {5, 5, 0, 5}), kOk);     // empty
  EXPECT_TRUE(display_.frames.empty());
  EXPECT_EQ(Flush(2, {0, 0, 1, 1}), kErrResourceId);
}

TEST_F(ScanoutCommandsTest, FlushOfAResourceThatIsNotShownIsFine) {
  ASSERT_EQ(Create(1, 64, 64), kOk);
  EXPECT_EQ(Flush(1, {0, 0, 64, 64}), kOk);
  EXPECT_TRUE(display_.frames.empty());
}

// Bytes of one pixel in memory, and what is shown of them: blue 0xb1, green 0x9e, red 0x4d.
struct FormatCase {
  uint32_t format;
  std::array<uint8_t, 4> bytes;
};
class FormatTest : public GpuTest, public ::testing::WithParamInterface<FormatCase> {};

TEST_P(FormatTest, EveryFormatIsShownAsBlueGreenRed) {
  for (uint64_t i = 0; i < 64 * 64; ++i) {
    for (uint64_t k = 0; k < 4; ++k) {
      // Each pixel differs, so that pixels out of place show.
      *ram_.at(i * 4 + k) = static_cast<std::byte>(GetParam().bytes[k] + i);
    }
  }
  MakeBacked(1, 64, 64, 0, GetParam().format);
  ASSERT_EQ(Transfer(1, {0, 0, 64, 64}), kOk);
  ASSERT_EQ(SetScanout(0, 1, {8, 3, 50, 40}), kOk);
  const auto expect = [this](uint8_t shift) {
    const auto& pixels = LastPixels();
    ASSERT_EQ(pixels.size(), 50u * 40 * 4);
    for (uint64_t y = 0; y < 40; ++y) {
      for (uint64_t x = 0; x < 50; ++x) {
        const uint64_t i = (y + 3) * 64 + x + 8;
        const std::byte* pixel = &pixels[(y * 50 + x) * 4];
        ASSERT_EQ(pixel[0], static_cast<std::byte>(0xb1 + i + shift)) << x << "," << y;
        ASSERT_EQ(pixel[1], static_cast<std::byte>(0x9e + i + shift)) << x << "," << y;
        ASSERT_EQ(pixel[2], static_cast<std::byte>(0x4d + i + shift)) << x << "," << y;
      }
    }
  };
  ASSERT_NO_FATAL_FAILURE(expect(0));
  // New bytes, shown after transfers and flushes of two halves that do not end at the window.
  for (std::byte& byte : ram_.bytes().first(64 * 64 * 4)) {
    byte = static_cast<std::byte>(static_cast<uint8_t>(byte) + 1);
  }
  for (const WireRect& half : {WireRect{0, 0, 31, 64}, WireRect{31, 0, 33, 64}}) {
    ASSERT_EQ(Transfer(1, half, half.x * 4), kOk);
    ASSERT_EQ(Flush(1, half), kOk);
  }
  ASSERT_NO_FATAL_FAILURE(expect(1));
}

INSTANTIATE_TEST_SUITE_P(All, FormatTest,
                         ::testing::Values(FormatCase{kFormatB8G8R8A8, {0xb1, 0x9e, 0x4d, 0x77}},
                                           FormatCase{kFormatB8G8R8X8, {0xb1, 0x9e, 0x4d, 0x77}},
                                           FormatCase{kFormatA8R8G8B8, {0x77, 0x4d, 0x9e, 0xb1}},
                                           FormatCase{kFormatX8R8G8B8, {0x77, 0x4d, 0x9e, 0xb1}},
                                           FormatCase{kFormatR8G8B8A8, {0x4d, 0x9e, 0xb1, 0x77}},
                                           FormatCase{kFormatX8B8G8R8, {0x77, 0xb1, 0x9e, 0x4d}},
                                           FormatCase{kFormatA8B8G8R8, {0x77, 0xb1, 0x9e, 0x4d}},
                                           FormatCase{kFormatR8G8B8X8, {0x4d, 0x9e, 0xb1, 0x77}}),
                         [](const auto& test) {
                           return "Format" + std::to_string(test.param.format);
                         });

TEST_F(ScanoutCommandsTest, CursorIsTrackedAndStaysOutOfTheFrame) {
  MakeBacked(1, 64, 64);
  ASSERT_EQ(Transfer(1, {0, 0, 64, 64}), kOk);
  ASSERT_EQ(SetScanout(0, 1, {0, 0, 64, 64}), kOk);
  const uint64_t before = FrameHash(*device_->frame(0));
  ASSERT_EQ(Create(2, 64, 64, kFormatB8G8R8A8), kOk);
  Cursor(kCmdUpdateCursor, 0, 10, 20, 2, 3, 4);
  EXPECT_EQ(device_->cursor(0), (CursorState{2, 10, 20, 3, 4}));
  Cursor(kCmdMoveCursor, 0, 11, 21);
  EXPECT_EQ(device_->cursor(0), (CursorState{2, 11, 21, 3, 4}));
  EXPECT_EQ(device_->cursor(1), CursorState{});
  Cursor(kCmdUpdateCursor, 0, 1, 2, 0);
  EXPECT_EQ(device_->cursor(0), (CursorState{0, 1, 2, 0, 0}));
  EXPECT_EQ(device_->counters().cursor_commands, 3u);
  EXPECT_EQ(device_->counters().failed_commands, 0u);
  EXPECT_EQ(FrameHash(*device_->frame(0)), before);
}

TEST_F(ScanoutCommandsTest, BadCursorCommandsChangeNothing) {
  ASSERT_EQ(Create(2, 64, 64), kOk);
  ASSERT_EQ(Create(3, 64, 63), kOk);
  Cursor(kCmdUpdateCursor, 0, 10, 20, 2, 3, 4);
  const CursorState good = device_->cursor(0);
  Cursor(kCmdUpdateCursor, 3, 1, 1, 2);   // no such scanout
  Cursor(kCmdUpdateCursor, 0, 1, 1, 3);   // not 64x64
  Cursor(kCmdUpdateCursor, 0, 1, 1, 99);  // no such resource
  Cursor(kCmdFlush, 0, 1, 1, 2);          // not for this queue
  device_->execute_cursor(RequestBytes(kCmdMoveCursor).u32({0, 1, 1}).bytes());
  device_->execute_cursor({});
  EXPECT_EQ(device_->cursor(0), good);
  EXPECT_EQ(device_->counters().failed_commands, 6u);
  device_->reset();
  EXPECT_EQ(device_->cursor(0), CursorState{});
}

TEST_F(ScanoutCommandsTest, ANewPreferredModeIsAnEventThatTheGuestClears) {
  const auto config = [this] {
    std::array<uint32_t, 4> words;
    device_->read_config(0, std::as_writable_bytes(std::span(words)));
    return words;
  };
  EXPECT_EQ(config(), (std::array<uint32_t, 4>{0, 0, 3, 0}));
  ASSERT_THAT(device_->set_preferred_mode(1, {1600, 900}), mvgpu::testing::IsOk());
  EXPECT_EQ(owner_.events, 1);
  EXPECT_EQ(config(), (std::array<uint32_t, 4>{1, 0, 3, 0}));
  ASSERT_THAT(device_->set_preferred_mode(1, {1600, 900}), mvgpu::testing::IsOk());
  EXPECT_EQ(owner_.events, 1);  // nothing new

  const uint32_t other = 0xfffffffe, event = 1;
  device_->write_config(0, std::as_bytes(std::span(&event, 1)));  // events_read is read-only
  device_->write_config(4, std::as_bytes(std::span(&other, 1)));
  EXPECT_EQ(config()[0], 1u);
  device_->write_config(4, std::as_bytes(std::span(&event, 1)));
  EXPECT_EQ(config()[0], 0u);

  EXPECT_THAT(device_->set_preferred_mode(3, {1600, 900}),
              mvgpu::testing::FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(device_->set_preferred_mode(0, {5000, 900}),
              mvgpu::testing::FailsWith(ErrorCode::kInvalid));
}

TEST_F(ScanoutCommandsTest, ConfigurationReadsBeyondTheEndAreZero) {
  std::array<std::byte, 8> bytes;
  bytes.fill(std::byte{0xee});
  device_->read_config(8, std::span(bytes).first(1));  // low byte of num_scanouts
  EXPECT_EQ(bytes[0], std::byte{3});
  device_->read_config(14, bytes);
  EXPECT_EQ(bytes, (std::array<std::byte, 8>{}));
  bytes.fill(std::byte{0xee});
  device_->read_config(0xfffffff0, bytes);
  EXPECT_EQ(bytes, (std::array<std::byte, 8>{}));
  device_->write_config(0xfffffff0, bytes);
  EXPECT_EQ(device_->features(), 2u);  // VIRTIO_GPU_F_EDID
}

}  // namespace
}  // namespace mvgpu::gpu
