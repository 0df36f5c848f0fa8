#include "backend/vgpu_config.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "backend/trace/trace_json.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::backend {
namespace {

using nlohmann::json;
using testing::FailsWith;
using testing::IsOk;

VgpuConfig Unusual() {
  VgpuConfig config;
  config.pin_limit_bytes = 12345;
  config.dma_idle_bytes = 54321;
  config.gpu = {.scanouts = 3,
                .preferred_mode = {800, 600},
                .largest_mode = {1920, 1080},
                .host_memory_limit = uint64_t{1} << 40,
                .max_resources = 7,
                .max_backing_entries = 9};
  return config;
}

TEST(VgpuConfigTest, WhatTheGuestCanNoticeTravelsThroughJson) {
  const auto read = VgpuConfig::FromJson(Unusual().to_json());
  ASSERT_THAT(read, IsOk());
  EXPECT_EQ(read->pin_limit_bytes, 12345u);
  EXPECT_EQ(read->dma_idle_bytes, 54321u);
  EXPECT_EQ(read->gpu.scanouts, 3u);
  EXPECT_EQ(read->gpu.preferred_mode, (gpu::Size{800, 600}));
  EXPECT_EQ(read->gpu.largest_mode, (gpu::Size{1920, 1080}));
  EXPECT_EQ(read->gpu.host_memory_limit, uint64_t{1} << 40);
  EXPECT_EQ(read->gpu.max_resources, 7u);
  EXPECT_EQ(read->gpu.max_backing_entries, 9u);
}

TEST(VgpuConfigTest, TheRecordNamesWhatHoldsThePages) {
  const auto named = [](const VgpuConfig& config) {
    return json::parse(config.to_json()).at("pin").get<std::string>();
  };
  VgpuConfig config;
  config.pin = PinMode::kIoUring;
  EXPECT_EQ(named(config), "io-uring");
  config.dma = DmaMode::kIommu;
  EXPECT_EQ(named(config), "io-uring") << "an iommu in software holds nothing";
  config.iommu_group = "7";
  EXPECT_EQ(named(config), "vfio-type1");
  config.iommu_group.clear();
  config.vfio_device = "0000:00:05.0";
  EXPECT_EQ(named(config), "iommufd");
}

TEST(VgpuConfigTest, TracesWithoutAnIdleListHadNone) {
  json old = json::parse(Unusual().to_json());
  old.erase("dma_idle_bytes");
  const auto read = VgpuConfig::FromJson(old.dump());
  ASSERT_THAT(read, IsOk());
  EXPECT_EQ(read->dma_idle_bytes, 0u);
  for (const json& value : {json(-1), json("7"), json(1.5), json(nullptr)}) {
    old["dma_idle_bytes"] = value;
    EXPECT_THAT(VgpuConfig::FromJson(old.dump()), FailsWith(ErrorCode::kCorrupt)) << value;
  }
}

TEST(VgpuConfigTest, PagesMayMoveWhereMlockIsAllThatHoldsWhatADeviceHasTheAddressOf) {
  for (const auto& [dma_name, dma] : DmaModes()) {
    for (const auto& [pin_name, pin] : PinModes()) {
      VgpuConfig config;
      config.dma = dma;
      config.pin = pin;
      EXPECT_EQ(config.pages_may_move(), dma_name == "physical" && pin_name == "mlock")
          << dma_name << " " << pin_name;
    }
  }
}

// A replay must not write into the accounts of the VM that was recorded.
TEST(VgpuConfigTest, VmAndPlaceAreNotTakenFromATrace) {
  VgpuConfig config = Unusual();
  config.vm_uuid = "00112233-4455-6677-8899-aabbccddeeff";
  config.runtime_dir = "/somewhere";
  const auto read = VgpuConfig::FromJson(config.to_json());
  ASSERT_THAT(read, IsOk());
  EXPECT_EQ(read->vm_uuid, "");
  EXPECT_EQ(read->runtime_dir, "");
}

TEST(VgpuConfigTest, EachNumberMustBeThereAndBeOne) {
  const json good = json::parse(Unusual().to_json());
  for (const char* key :
       {"pin_limit_bytes", "scanouts", "preferred_width", "preferred_height", "largest_width",
        "largest_height", "host_memory_limit", "max_resources", "max_backing_entries"}) {
    json missing = good;
    missing.erase(key);
    EXPECT_THAT(VgpuConfig::FromJson(missing.dump()), FailsWith(ErrorCode::kCorrupt)) << key;
    for (const json& value : {json(-1), json("7"), json(1.5), json(nullptr), json(true)}) {
      json bad = good;
      bad[key] = value;
      const auto read = VgpuConfig::FromJson(bad.dump());
      ASSERT_THAT(read, FailsWith(ErrorCode::kCorrupt)) << key << " " << value;
      EXPECT_THAT(read.error().message(), ::testing::HasSubstr(key));
    }
  }
  json large = good;
  large["scanouts"] = uint64_t{1} << 32;
  EXPECT_THAT(VgpuConfig::FromJson(large.dump()), FailsWith(ErrorCode::kCorrupt));
}

TEST(VgpuConfigTest, TextThatIsNoObjectIsRefused) {
  for (const char* text : {"", "{", "[]", "7", "{\"a\":}", "\xff", "{} {}"}) {
    EXPECT_THAT(VgpuConfig::FromJson(text), FailsWith(ErrorCode::kCorrupt)) << text;
  }
}

TEST(TraceJsonTest, FlatObjectsAreReadAndNestedOnesRefused) {
  const auto flat = ParseTraceJson(R"({"a": 1, "b": "x", "c": true, "d": null})");
  ASSERT_TRUE(flat.has_value());
  EXPECT_EQ(flat->at("a"), 1);
  EXPECT_TRUE(ParseTraceJson("{}").has_value());
  for (const char* text :
       {R"({"a": {}})", R"({"a": []})", R"({"a": 1, "b": [1]})", "[1]", "[{}]", "1"}) {
    EXPECT_FALSE(ParseTraceJson(text).has_value()) << text;
  }
}

TEST(TraceJsonTest, DeepNestingDoesNotUseUpTheStack) {
  std::string deep = "{\"a\":";
  deep.append(2'000'000, '[');
  EXPECT_FALSE(ParseTraceJson(deep).has_value());
  deep.append(2'000'000, ']');
  EXPECT_FALSE(ParseTraceJson(deep + "}").has_value());
}

}  // namespace
}  // namespace mvgpu::backend
