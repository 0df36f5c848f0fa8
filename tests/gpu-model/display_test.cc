#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <png.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "gpu-model/display/fan_out.h"
#include "gpu-model/display/frame_hash.h"
#include "gpu-model/display/png_file.h"
#include "gpu-model/display/screenshot.h"
#include "tests/fakes/result_matchers.h"
#include "tests/gpu-model/gpu_fixture.h"

namespace mvgpu::gpu {
namespace {

using mvgpu::testing::FailsWith;
using mvgpu::testing::IsOk;
using ::testing::HasSubstr;

// A picture with padding behind its lines.
struct Picture {
  Picture(uint32_t width, uint32_t height, uint32_t padding = 0, uint8_t seed = 0)
      : size{width, height}, stride(width * 4 + padding), bytes(size_t{stride} * height) {
    for (size_t i = 0; i < bytes.size(); ++i) {
      bytes[i] = static_cast<std::byte>(i * 7 + (i >> 8) * 13 + seed);
    }
  }
  FrameView view() const { return {size, stride, bytes}; }
  std::byte at(uint32_t x, uint32_t y, uint32_t channel) const {
    return bytes[size_t{y} * stride + x * 4 + channel];
  }
  Size size;
  uint32_t stride;
  std::vector<std::byte> bytes;
};

struct Rgb {
  uint32_t width = 0, height = 0, format = 0;
  std::vector<uint8_t> bytes;
};

Rgb DecodePng(const std::string& path) {
  png_image image{};
  image.version = PNG_IMAGE_VERSION;
  Rgb rgb;
  if (png_image_begin_read_from_file(&image, path.c_str()) == 0) return rgb;
  rgb.width = image.width;
  rgb.height = image.height;
  rgb.format = image.format;  // of the file
  image.format = PNG_FORMAT_RGB;
  rgb.bytes.resize(PNG_IMAGE_SIZE(image));
  if (png_image_finish_read(&image, nullptr, rgb.bytes.data(), 0, nullptr) == 0) rgb.bytes.clear();
  return rgb;
}

void ExpectSame(const Rgb& rgb, const Picture& picture) {
  ASSERT_EQ(rgb.width, picture.size.width);
  ASSERT_EQ(rgb.height, picture.size.height);
  EXPECT_EQ(rgb.format, static_cast<uint32_t>(PNG_FORMAT_RGB));  // 8 bits, no alpha
  ASSERT_EQ(rgb.bytes.size(), size_t{rgb.width} * rgb.height * 3);
  for (uint32_t y = 0; y < rgb.height; ++y) {
    for (uint32_t x = 0; x < rgb.width; ++x) {
      for (uint32_t c = 0; c < 3; ++c) {
        ASSERT_EQ(static_cast<std::byte>(rgb.bytes[(size_t{y} * rgb.width + x) * 3 + c]),
                  picture.at(x, y, 2 - c))
            << x << "," << y;
      }
    }
  }
}

class DisplayTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = ::testing::TempDir() + "mvgpu-display-XXXXXX";
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    folder_ = name;
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  std::string Path(const std::string& name) const { return folder_ + "/" + name; }
  size_t FilesInFolder() const {
    size_t files = 0;
    for ([[maybe_unused]] const auto& file : std::filesystem::directory_iterator(folder_)) ++files;
    return files;
  }

  std::string folder_;
};

TEST_F(DisplayTest, PngHoldsThePixels) {
  for (const uint32_t padding : {0u, 20u}) {
    const Picture picture(37, 23, padding);
    ASSERT_THAT(WritePng(picture.view(), Path("a.png")), IsOk());
    ASSERT_NO_FATAL_FAILURE(ExpectSame(DecodePng(Path("a.png")), picture));
  }
  EXPECT_EQ(FilesInFolder(), 1u);  // nothing temporary is left
}

TEST_F(DisplayTest, PngErrorsNameThePathAndLeaveTheOldFile) {
  const auto missing = WritePng(Picture(4, 4).view(), Path("no/such/a.png"));
  ASSERT_THAT(missing, FailsWith(ErrorCode::kSystem));
  EXPECT_THAT(missing.error().message(), HasSubstr(Path("no/such/a.png")));
  ASSERT_EQ(mkdir(Path("folder.png").c_str(), 0700), 0);
  const auto folder = WritePng(Picture(4, 4).view(), Path("folder.png"));
  ASSERT_THAT(folder, FailsWith(ErrorCode::kSystem));
  EXPECT_THAT(folder.error().message(), HasSubstr(Path("folder.png")));
  EXPECT_EQ(FilesInFolder(), 1u);
  EXPECT_THAT(WritePng(FrameView{}, Path("b.png")), FailsWith(ErrorCode::kInvalid));
}

TEST_F(DisplayTest, ScreenshotSavesTheNewestFrame) {
  Screenshot screenshot;
  const Picture first(64, 48, 8, 1), second(64, 48, 0, 99);
  screenshot.on_frame(0, first.view(), {0, 0, 64, 48});
  ASSERT_THAT(screenshot.save_png(Path("a.png")), IsOk());
  ASSERT_NO_FATAL_FAILURE(ExpectSame(DecodePng(Path("a.png")), first));
  screenshot.on_frame(0, second.view(), {0, 0, 64, 48});
  ASSERT_THAT(screenshot.save_png(Path("a.png")), IsOk());
  ASSERT_NO_FATAL_FAILURE(ExpectSame(DecodePng(Path("a.png")), second));
}

TEST_F(DisplayTest, ScreenshotTakesTheDamageOnly) {
  Screenshot screenshot;
  Picture shown(64, 48, 8, 1);
  const Picture next(64, 48, 4, 50);
  screenshot.on_frame(0, shown.view(), {0, 0, 64, 48});
  screenshot.on_frame(0, next.view(), {10, 20, 30, 5});
  for (uint32_t y = 20; y < 25; ++y) {
    for (uint32_t x = 10; x < 40; ++x) {
      for (uint32_t c = 0; c < 4; ++c)
        shown.bytes[size_t{y} * shown.stride + x * 4 + c] = next.at(x, y, c);
    }
  }
  ASSERT_THAT(screenshot.save_png(Path("a.png")), IsOk());
  ASSERT_NO_FATAL_FAILURE(ExpectSame(DecodePng(Path("a.png")), shown));
}

TEST_F(DisplayTest, APixelIsWhereItWasShown) {
  Screenshot screenshot;
  const Picture picture(64, 48, 8, 1);
  EXPECT_EQ(screenshot.pixel(0, 0, 0), std::nullopt);
  screenshot.on_frame(0, picture.view(), {0, 0, 64, 48});
  for (const auto& [x, y] : {std::pair{0u, 0u}, {63u, 0u}, {0u, 47u}, {63u, 47u}, {5u, 7u}}) {
    uint32_t pixel = 0;
    for (uint32_t c = 0; c < 4; ++c) pixel |= static_cast<uint32_t>(picture.at(x, y, c)) << 8 * c;
    EXPECT_EQ(screenshot.pixel(0, x, y), pixel) << x << " " << y;
  }
  EXPECT_EQ(screenshot.pixel(0, 64, 0), std::nullopt);
  EXPECT_EQ(screenshot.pixel(0, 0, 48), std::nullopt);
  EXPECT_EQ(screenshot.pixel(1, 0, 0), std::nullopt);
}

TEST_F(DisplayTest, ANewSizeIsTakenAsAWhole) {
  Screenshot screenshot;
  const Picture small(16, 16), large(64, 20);
  screenshot.on_frame(0, large.view(), {0, 0, 64, 20});
  screenshot.on_frame(0, small.view(), {3, 3, 1, 1});
  ASSERT_THAT(screenshot.save_png(Path("a.png")), IsOk());
  ASSERT_NO_FATAL_FAILURE(ExpectSame(DecodePng(Path("a.png")), small));
}

TEST_F(DisplayTest, AScanoutThatNeverShowedAnythingCannotBeSaved) {
  Screenshot screenshot;
  const auto nothing = screenshot.save_png(Path("a.png"));
  ASSERT_THAT(nothing, FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(nothing.error().message(), HasSubstr("scanout 0 shows nothing"));
  EXPECT_EQ(screenshot.hash(0), std::nullopt);
  screenshot.on_frame(1, Picture(16, 16).view(), {0, 0, 16, 16});
  EXPECT_THAT(screenshot.save_png(Path("a.png")), FailsWith(ErrorCode::kInvalid));
  EXPECT_EQ(FilesInFolder(), 0u);
  EXPECT_THAT(screenshot.save_png(Path("a.png"), 1), IsOk());
}

TEST_F(DisplayTest, AScanoutThatWasSwitchedOffKeepsItsLastPicture) {
  Screenshot screenshot;
  const Picture picture(16, 20, 8);
  screenshot.on_frame(0, picture.view(), {0, 0, 16, 20});
  screenshot.on_disabled(0);
  ASSERT_THAT(screenshot.save_png(Path("a.png")), IsOk());
  ASSERT_NO_FATAL_FAILURE(ExpectSame(DecodePng(Path("a.png")), picture));
  EXPECT_EQ(screenshot.hash(0), FrameHash(picture.view()));
}

TEST_F(DisplayTest, SavingWhileFramesArriveGivesWholeFrames) {
  Screenshot screenshot;
  std::vector<Picture> pictures;
  for (const uint8_t value : {uint8_t{10}, uint8_t{200}}) {
    pictures.emplace_back(32, 32);
    std::fill(pictures.back().bytes.begin(), pictures.back().bytes.end(), std::byte{value});
  }
  screenshot.on_frame(0, pictures[0].view(), {0, 0, 32, 32});
  std::atomic<bool> stop = false;
  std::thread device([&] {
    for (size_t i = 0; !stop; ++i) screenshot.on_frame(0, pictures[i % 2].view(), {0, 0, 32, 32});
  });
  for (int i = 0; i < 50; ++i) {
    EXPECT_THAT(screenshot.save_png(Path("a.png")), IsOk());
    const Rgb rgb = DecodePng(Path("a.png"));
    ASSERT_FALSE(rgb.bytes.empty());
    EXPECT_TRUE(std::all_of(rgb.bytes.begin(), rgb.bytes.end(),
                            [&](uint8_t b) { return b == rgb.bytes[0]; }));
  }
  stop = true;
  device.join();
}

TEST_F(DisplayTest, FanOutTellsEveryDisplay) {
  testing::FakeDisplay one, two;
  FanOut both({&one, &two});
  both.on_frame(1, Picture(16, 16).view(), {1, 2, 3, 4});
  both.on_disabled(1);
  for (const auto* display : {&one, &two}) {
    ASSERT_EQ(display->frames.size(), 1u);
    EXPECT_EQ(display->frames[0].scanout, 1u);
    EXPECT_EQ(display->frames[0].damage, (Rect{1, 2, 3, 4}));
    EXPECT_EQ(display->disabled, std::vector<uint32_t>{1});
  }
}

TEST(FrameHashTest, OnlyVisiblePixelsCount) {
  const Picture picture(100, 30, 0);
  const uint64_t hash = FrameHash(picture.view());
  Picture padded(100, 30, 12, 77);
  for (uint32_t y = 0; y < 30; ++y) {
    for (uint32_t x = 0; x < 100; ++x) {
      for (uint32_t c = 0; c < 3; ++c)
        padded.bytes[size_t{y} * padded.stride + x * 4 + c] = picture.at(x, y, c);
    }
  }
  EXPECT_EQ(FrameHash(padded.view()), hash);  // neither padding nor the fourth byte
  padded.bytes[29 * size_t{padded.stride} + 99 * 4 + 2] ^= std::byte{1};  // the last red
  EXPECT_NE(FrameHash(padded.view()), hash);
}

TEST(FrameHashTest, TheSizeCounts) {
  const Picture wide(64, 16);
  FrameView tall = wide.view();
  tall.size = {16, 64};
  tall.stride = 16 * 4;
  EXPECT_NE(FrameHash(wide.view()), FrameHash(tall));
  EXPECT_EQ(FrameHash(FrameView{}), 0u);
}

// Traces hold these numbers: they must never change.
TEST(FrameHashTest, IsXxh3OverSizeAndPixels) {
  const Picture picture(5000, 3, 4);
  std::vector<uint32_t> words = {5000, 3};
  for (uint32_t y = 0; y < 3; ++y) {
    for (uint32_t x = 0; x < 5000; ++x) {
      words.push_back(std::to_integer<uint32_t>(picture.at(x, y, 0)) |
                      std::to_integer<uint32_t>(picture.at(x, y, 1)) << 8 |
                      std::to_integer<uint32_t>(picture.at(x, y, 2)) << 16);
    }
  }
  EXPECT_EQ(FrameHash(picture.view()), XXH3_64bits(words.data(), words.size() * 4));
  EXPECT_EQ(FrameHash(Picture(2, 2).view()), 17319467594477646788u);
}

}  // namespace
}  // namespace mvgpu::gpu
