#include "backend/vgpu_config.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "backend/trace/trace_json.h"

namespace mvgpu::backend {

namespace {

using nlohmann::json;

// Reads an unsigned number of at most `largest` into `target`. Errors: kCorrupt.
template <typename T>
Result<void> ReadNumber(const json& object, const char* key, uint64_t largest, T& target) {
  const auto it = object.find(key);
  if (it == object.end() || !it->is_number_unsigned() || it->get<uint64_t>() > largest) {
    return Fail(ErrorCode::kCorrupt,
                fmt::format("session record: \"{}\" must be a number from 0 to {}", key, largest));
  }
  target = static_cast<T>(it->get<uint64_t>());
  return {};
}

}  // namespace

const std::map<std::string, PinMode>& PinModes() {
  static const std::map<std::string, PinMode> modes = {
      {"io-uring", PinMode::kIoUring}, {"mlock", PinMode::kMlock}, {"none", PinMode::kNone}};
  return modes;
}

std::string_view PinModeName(PinMode mode) {
  for (const auto& [name, named] : PinModes())
    if (named == mode) return name;
  return "";
}

Result<std::unique_ptr<domain::PinBackend>> MakePinBackend(PinMode mode) {
  switch (mode) {
    case PinMode::kMlock:
      return domain::MakeMlockPinBackend();
    case PinMode::kIoUring:
      return domain::MakeIoUringPinBackend();
    case PinMode::kNone:
      break;
  }
  return domain::MakeNonePinBackend();
}

const std::map<std::string, DmaMode>& DmaModes() {
  static const std::map<std::string, DmaMode> modes = {
      {"iommu", DmaMode::kIommu},
      {"none", DmaMode::kNone},
      {"physical", DmaMode::kPhysical},
      {"vulkan", DmaMode::kVulkan},
  };
  return modes;
}

std::string_view DmaModeName(DmaMode mode) {
  for (const auto& [name, named] : DmaModes())
    if (named == mode) return name;
  return "";
}

std::string_view VgpuConfig::pin_backend() const {
  if (dma == DmaMode::kIommu && !vfio_device.empty()) return "iommufd";
  if (dma == DmaMode::kIommu && !iommu_group.empty()) return "vfio-type1";
  return PinModeName(pin);
}

std::string VgpuConfig::to_json() const {
  json object = {
      {"program", "mvgpu-backend"},
      {"name", name},
      {"vm_uuid", vm_uuid},
      {"pin", pin_backend()},
      {"pin_limit_bytes", pin_limit_bytes},
      {"dma", DmaModeName(dma)},
      {"dma_idle_bytes", dma_idle_bytes},
      {"scanouts", gpu.scanouts},
      {"preferred_width", gpu.preferred_mode.width},
      {"preferred_height", gpu.preferred_mode.height},
      {"largest_width", gpu.largest_mode.width},
      {"largest_height", gpu.largest_mode.height},
      {"host_memory_limit", gpu.host_memory_limit},
      {"max_resources", gpu.max_resources},
      {"max_backing_entries", gpu.max_backing_entries},
  };
  return object.dump(-1, ' ', false, json::error_handler_t::replace);
}

Result<VgpuConfig> VgpuConfig::FromJson(std::string_view text) {
  const auto parsed = ParseTraceJson(text);
  if (!parsed) return Fail(ErrorCode::kCorrupt, "session record is not a flat JSON object");
  const json& object = *parsed;
  VgpuConfig config;
  constexpr uint64_t kAny = UINT64_MAX;
  constexpr uint64_t kWord = UINT32_MAX;
  MVGPU_RETURN_IF_ERROR(ReadNumber(object, "pin_limit_bytes", kAny, config.pin_limit_bytes));
  if (object.contains("dma_idle_bytes")) {  // older traces have none
    MVGPU_RETURN_IF_ERROR(ReadNumber(object, "dma_idle_bytes", kAny, config.dma_idle_bytes));
  }
  MVGPU_RETURN_IF_ERROR(ReadNumber(object, "scanouts", kWord, config.gpu.scanouts));
  MVGPU_RETURN_IF_ERROR(
      ReadNumber(object, "preferred_width", kWord, config.gpu.preferred_mode.width));
  MVGPU_RETURN_IF_ERROR(
      ReadNumber(object, "preferred_height", kWord, config.gpu.preferred_mode.height));
  MVGPU_RETURN_IF_ERROR(ReadNumber(object, "largest_width", kWord, config.gpu.largest_mode.width));
  MVGPU_RETURN_IF_ERROR(
      ReadNumber(object, "largest_height", kWord, config.gpu.largest_mode.height));
  MVGPU_RETURN_IF_ERROR(
      ReadNumber(object, "host_memory_limit", kAny, config.gpu.host_memory_limit));
  MVGPU_RETURN_IF_ERROR(ReadNumber(object, "max_resources", kWord, config.gpu.max_resources));
  MVGPU_RETURN_IF_ERROR(
      ReadNumber(object, "max_backing_entries", kWord, config.gpu.max_backing_entries));
  return config;
}

}  // namespace mvgpu::backend
