#include "gpu-model/edid.h"

#include <gtest/gtest.h>
#include <sys/wait.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <numeric>
#include <string>

#include "tests/fakes/result_matchers.h"
#include "tests/gpu-model/gpu_fixture.h"

namespace mvgpu::gpu {
namespace {

using mvgpu::testing::FailsWith;
using mvgpu::testing::IsOk;

uint8_t At(const EdidBlob& edid, size_t offset) { return static_cast<uint8_t>(edid[offset]); }

// What edid-decode says about the blob; its exit status in `status`.
std::string Decode(const EdidBlob& edid, const char* options, int* status) {
  const std::string path = ::testing::TempDir() + "mvgpu-edid-" + std::to_string(getpid()) + ".bin";
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(edid.data()), static_cast<std::streamsize>(edid.size()));
  FILE* pipe = popen(("edid-decode " + std::string(options) + " " + path + " 2>&1").c_str(), "r");
  std::string text;
  char chunk[4096];
  for (size_t n; (n = fread(chunk, 1, sizeof(chunk), pipe)) > 0;) text.append(chunk, n);
  *status = pclose(pipe);
  std::remove(path.c_str());
  return text;
}

class EdidTest : public ::testing::TestWithParam<std::pair<Size, Size>> {
 protected:
  EdidBlob Make() const {
    return MakeEdid({GetParam().first, GetParam().second, "mvgpu", "head 0"});
  }
};

TEST_P(EdidTest, ConformsToTheStandardsAsEdidDecodeSees) {
  ASSERT_THAT(CheckPreferredMode(GetParam().first, GetParam().second), IsOk());
  int status = 0;
  const std::string report = Decode(Make(), "--check", &status);
  ASSERT_TRUE(WIFEXITED(status));
  ASSERT_NE(WEXITSTATUS(status), 127) << "edid-decode is missing: apt-get install edid-decode";
  EXPECT_EQ(WEXITSTATUS(status), 0) << report;
  EXPECT_NE(report.find("EDID conformity: PASS"), std::string::npos) << report;
  EXPECT_EQ(report.find("Warnings:"), std::string::npos) << report;
}

TEST_P(EdidTest, ThePreferredModeIsTheFirstTiming) {
  int status = 0;
  const std::string report = Decode(Make(), "--preferred-timings --skip-hex-dump", &status);
  const auto& [width, height] = GetParam().first;
  const std::string mode = std::to_string(width) + "x" + std::to_string(height);
  const size_t at = report.find("Preferred Video Timing");
  ASSERT_NE(at, std::string::npos) << report;
  EXPECT_NE(report.find(mode, at), std::string::npos) << report;

  const EdidBlob edid = Make();
  EXPECT_EQ(At(edid, 56) | (At(edid, 58) >> 4) << 8, static_cast<int>(width));
  EXPECT_EQ(At(edid, 59) | (At(edid, 61) >> 4) << 8, static_cast<int>(height));
}

TEST_P(EdidTest, BothBlocksSumToZero) {
  const EdidBlob edid = Make();
  for (const size_t block : {0u, 128u}) {
    uint8_t sum = 0;
    for (size_t i = 0; i < 128; ++i) sum = static_cast<uint8_t>(sum + At(edid, block + i));
    EXPECT_EQ(sum, 0);
  }
  EXPECT_EQ(At(edid, 126), 1);
}

std::string ModeName(const ::testing::TestParamInfo<std::pair<Size, Size>>& test) {
  const auto& [preferred, largest] = test.param;
  return std::to_string(preferred.width) + "x" + std::to_string(preferred.height) + "of" +
         std::to_string(largest.width) + "x" + std::to_string(largest.height);
}

INSTANTIATE_TEST_SUITE_P(Modes, EdidTest,
                         ::testing::Values(std::pair(Size{1280, 800}, Size{4096, 2160}),
                                           std::pair(Size{640, 480}, Size{640, 480}),
                                           std::pair(Size{1024, 768}, Size{1920, 1080}),
                                           std::pair(Size{1366, 768}, Size{4096, 2160}),
                                           std::pair(Size{1000, 701}, Size{4096, 2160}),
                                           std::pair(Size{1080, 1920}, Size{2160, 4096}),
                                           std::pair(Size{3840, 2160}, Size{3840, 2160}),
                                           std::pair(Size{4095, 2160}, Size{5120, 2880})),
                         ModeName);

TEST(EdidModesTest, WellKnownModesUpToTheLargestOneAreThere) {
  int status = 0;
  const std::string all =
      Decode(MakeEdid({{1280, 800}, {4096, 2160}, "mvgpu", "head 0"}), "--skip-hex-dump", &status);
  for (const char* mode : {"640x480", "800x600", "1024x768", "1280x720", "1280x1024", "1920x1080",
                           "1920x1200", "2560x1440", "3840x2160"}) {
    EXPECT_NE(all.find(mode), std::string::npos) << mode;
  }
  const std::string few =
      Decode(MakeEdid({{800, 600}, {1280, 1024}, "mvgpu", "head 0"}), "--skip-hex-dump", &status);
  EXPECT_NE(few.find("1280x1024"), std::string::npos);
  EXPECT_EQ(few.find("1600x900"), std::string::npos);
  EXPECT_EQ(few.find("2560x1440"), std::string::npos);
}

TEST(EdidModesTest, NamesAreShownAndLongOnesCut) {
  int status = 0;
  const std::string text = Decode(MakeEdid({{800, 600}, {1280, 1024}, "mvgpu", "abcdefghijklmnop"}),
                                  "--skip-hex-dump", &status);
  EXPECT_NE(text.find("Display Product Name: 'mvgpu'"), std::string::npos) << text;
  EXPECT_NE(text.find("Serial Number: 'abcdefghijklm'"), std::string::npos) << text;
}

TEST(EdidModesTest, ModesThatATimingCannotSayAreRefused) {
  const Size huge{16384, 16384};
  EXPECT_THAT(CheckPreferredMode({4095, 2160}, huge), IsOk());
  EXPECT_THAT(CheckPreferredMode({4096, 2160}, huge), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(CheckPreferredMode({800, 4096}, huge), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(CheckPreferredMode({4095, 4095}, huge),
              FailsWith(ErrorCode::kInvalid));  // pixel clock
  EXPECT_THAT(CheckPreferredMode({639, 480}, huge), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(CheckPreferredMode({640, 480}, {640, 479}), FailsWith(ErrorCode::kInvalid));
}

class GetEdidTest : public testing::GpuTest {
 protected:
  GetEdidTest() : GpuTest({.scanouts = 2, .preferred_mode = {1024, 768}}) {}

  std::vector<std::byte> Get(uint32_t scanout) {
    std::vector<std::byte> response(24 + 8 + 1024);
    response.resize(*device_->execute_control(
        testing::RequestBytes(testing::kCmdGetEdid).u32({scanout, 0}).bytes(), response));
    return response;
  }
  static uint32_t WordAt(const std::vector<std::byte>& bytes, size_t offset) {
    uint32_t value;
    std::memcpy(&value, bytes.data() + offset, sizeof(value));
    return value;
  }
};

TEST_F(GetEdidTest, TheGuestGetsTheBlobOfItsHead) {
  const auto response = Get(0);
  ASSERT_EQ(response.size(), 24u + 8 + 1024);
  EXPECT_EQ(WordAt(response, 0), testing::kOkEdid);
  EXPECT_EQ(WordAt(response, 24), kEdidSize);
  const EdidBlob expected = MakeEdid({{1024, 768}, config_.largest_mode, "mvgpu", "head 0"});
  EXPECT_TRUE(std::equal(expected.begin(), expected.end(), response.begin() + 32));
  EXPECT_NE(Get(1), response);  // another serial number

  ASSERT_THAT(device_->set_preferred_mode(0, {1600, 900}), IsOk());
  EXPECT_EQ(static_cast<uint8_t>(Get(0)[32 + 56]), 1600 & 0xff);
}

TEST_F(GetEdidTest, UnknownHeadsAreRefused) {
  const auto response = Get(2);
  ASSERT_EQ(response.size(), 24u);
  EXPECT_EQ(WordAt(response, 0), testing::kErrParameter);
}

}  // namespace
}  // namespace mvgpu::gpu
