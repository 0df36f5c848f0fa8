#include "dma-cache/vulkan/device_choice.h"

#include <fmt/format.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <optional>

namespace mvgpu::dma {

namespace {

// Whether the text is like the pattern, in which each h stands for a hexadecimal digit.
bool Fits(std::string_view text, std::string_view pattern) {
  return std::equal(text.begin(), text.end(), pattern.begin(), pattern.end(),
                    [](unsigned char c, char p) {
                      return p == 'h' ? std::isxdigit(c) != 0 : c == static_cast<unsigned char>(p);
                    });
}

std::string Lower(std::string_view text) {
  std::string lower(text);
  std::transform(lower.begin(), lower.end(), lower.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return lower;
}

// A PCI address as VulkanDeviceFacts has it; nullopt where the text is none. Domains have four
// digits, five behind Intel's VMD, eight as nvidia-smi prints them, and may be left out.
std::optional<std::string> PciAddressIn(std::string_view text) {
  constexpr std::string_view kPlace = "hh:hh.h";
  constexpr std::string_view kLongestDomain = "hhhhhhhh:";
  constexpr size_t kShortestDomain = 5;
  if (text.size() < kPlace.size()) return std::nullopt;
  std::string_view domain = text.substr(0, text.size() - kPlace.size());
  const std::string_view place = text.substr(domain.size());
  if (!Fits(place, kPlace)) return std::nullopt;
  if (domain.empty()) return "0000:" + Lower(place);
  if (domain.size() < kShortestDomain || domain.size() > kLongestDomain.size() ||
      !Fits(domain, kLongestDomain.substr(kLongestDomain.size() - domain.size()))) {
    return std::nullopt;
  }
  while (domain.size() > kShortestDomain && domain.front() == '0') domain.remove_prefix(1);
  return Lower(domain) + Lower(place);
}

std::string Describe(const VulkanDeviceFacts& facts) {
  if (facts.uuid.empty()) return facts.name;
  return facts.pci.empty() ? fmt::format("{} (uuid {})", facts.name, facts.uuid)
                           : fmt::format("{} (uuid {}, pci {})", facts.name, facts.uuid, facts.pci);
}

}  // namespace

std::string WhyUnusable(const VulkanDeviceFacts& facts) {
  if (facts.api_major == 1 && facts.api_minor < 2) {
    return fmt::format("speaks vulkan {}.{}, 1.2 is needed", facts.api_major, facts.api_minor);
  }
  if (!facts.has_host_import) return "lacks VK_EXT_external_memory_host";
  if (!facts.has_device_address) return "lacks bufferDeviceAddress";
  if (!facts.imports_buffers) return "imports no host memory into buffers";
  if (!facts.has_coherent_memory) return "has no host-coherent memory";
  if (!facts.has_compute_queue) return "has no queue for compute";
  return "";
}

Result<DeviceChoice> DeviceChoice::Parse(std::string_view text) {
  DeviceChoice choice;
  choice.text_ = std::string(text);
  if (text.empty()) return choice;
  if (text.front() == '/') {
    struct stat status = {};
    if (stat(choice.text_.c_str(), &status) != 0) {
      const int error = errno;
      return Fail(ErrorCode::kInvalid,
                  fmt::format("vulkan device {}: {}; ls /dev/dri shows the render nodes", text,
                              Error::System(error, "stat").message()));
    }
    if (!S_ISCHR(status.st_mode)) {
      return Fail(ErrorCode::kInvalid,
                  fmt::format("vulkan device {}: not a device node; ls /dev/dri shows the render "
                              "nodes",
                              text));
    }
    choice.by_ = By::kRenderNode;
    choice.node_ = {major(status.st_rdev), minor(status.st_rdev)};
  } else if (Fits(text, "hhhhhhhh-hhhh-hhhh-hhhh-hhhhhhhhhhhh")) {
    choice.by_ = By::kUuid;
    choice.text_ = Lower(text);
  } else if (auto pci = PciAddressIn(text)) {
    choice.by_ = By::kPci;
    choice.text_ = *std::move(pci);
  } else {
    choice.by_ = By::kName;
  }
  return choice;
}

bool DeviceChoice::matches(const VulkanDeviceFacts& facts) const {
  switch (by_) {
    case By::kAny:
      return true;
    case By::kUuid:
      return facts.uuid == text_;
    case By::kPci:
      return facts.pci == text_;
    case By::kRenderNode:
      return facts.render_node == node_;
    case By::kName:
      return facts.name.starts_with(text_);
  }
  return false;
}

Result<size_t> DeviceChoice::pick(std::span<const VulkanDeviceFacts> devices) const {
  std::string seen;
  for (size_t i = 0; i < devices.size(); ++i) {
    std::string why = WhyUnusable(devices[i]);
    if (!matches(devices[i])) why = "is not meant";
    if (why.empty()) return i;
    seen += fmt::format("{}{} {}", seen.empty() ? "" : ", ", Describe(devices[i]), why);
  }
  const std::string wanted = by_ == By::kAny ? "" : fmt::format(" '{}'", text_);
  if (devices.empty()) {
    return Fail(ErrorCode::kNotReachable,
                fmt::format("no vulkan device{}: there is none at all; install a driver, e.g. "
                            "mesa-vulkan-drivers, or give access to /dev/dri",
                            wanted));
  }
  return Fail(ErrorCode::kNotReachable,
              fmt::format("no vulkan device{} that maps guest memory: {}; choose one by its uuid, "
                          "pci address, render node or the beginning of its name",
                          wanted, seen));
}

}  // namespace mvgpu::dma
