#include "tests/dma-cache/vulkan/lavapipe_dma_device.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <utility>

#include "apionly-domain/base/check.h"
#include "dma-cache/vulkan/imported_buffer.h"
#include "dma-cache/vulkan/vulkan_device.h"
#include "dma-cache/vulkan/vulkan_mapper.h"
#include "tests/dma-cache/vulkan/word_copier.h"

namespace mvgpu::testing {

namespace {

// Mesa's device keeps memory of its own until the end of the process: LeakSanitizer finds it again
// only while the library is loaded.
void* const kept_loaded = dlopen("libvulkan_lvp.so", RTLD_LAZY | RTLD_NODELETE);

class LavapipeDmaDevice final : public DmaDevice {
 public:
  static Result<std::unique_ptr<DmaDevice>> Create(const DeviceSurroundings& vm) {
    MVGPU_ASSIGN_OR_RETURN(const auto choice, dma::DeviceChoice::Parse("llvmpipe"));
    MVGPU_ASSIGN_OR_RETURN(auto loader, dma::VulkanLoader::Open({}));
    MVGPU_ASSIGN_OR_RETURN(auto device, dma::VulkanDevice::Create(std::move(loader), choice));
    std::unique_ptr<LavapipeDmaDevice> made(new LavapipeDmaDevice(std::move(device), vm));
    MVGPU_RETURN_IF_ERROR(made->OpenWindow());
    return made;
  }

  dma::Mapper& mapper() override { return mapper_; }
  bool read(DmaAddr address, std::span<std::byte> bytes) override {
    MVGPU_CHECK(bytes.size() <= kPageSize && bytes.size() % 4 == 0);
    std::memset(window_memory_.get(), 0xa5, kPageSize);
    copier_.run(address, window_->address(), static_cast<uint32_t>(bytes.size() / 4), /*key=*/0);
    std::memcpy(bytes.data(), window_memory_.get(), bytes.size());
    return true;
  }

 private:
  LavapipeDmaDevice(std::unique_ptr<dma::VulkanDevice> device, const DeviceSurroundings& vm)
      : device_(std::move(device)),
        copier_(device_.get()),
        mapper_(device_->target(), {.mapping_at = [container = vm.container](Iova iova) {
                  return container->mapping_at(iova);
                }}) {}

  // Where the shader puts what it read.
  Result<void> OpenWindow() {
    const uint64_t alignment = device_->target().limits.alignment;
    const uint64_t size = std::max(alignment, kPageSize);
    window_memory_.reset(std::aligned_alloc(alignment, size));
    const dma::HostAddr first(reinterpret_cast<uint64_t>(window_memory_.get()));
    MVGPU_ASSIGN_OR_RETURN(
        dma::ImportedBuffer window,
        dma::ImportedBuffer::Create(&device_->target(),
                                    dma::HostRange::FromFirstAndLast(first, first + (size - 1)),
                                    &calls_));
    window_.emplace(std::move(window));
    return {};
  }

  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };

  const std::unique_ptr<dma::VulkanDevice> device_;
  WordCopier copier_;
  uint64_t calls_ = 0;
  std::unique_ptr<void, Free> window_memory_;
  std::optional<dma::ImportedBuffer> window_;
  dma::VulkanMapper mapper_;
};

}  // namespace

Result<std::unique_ptr<DmaDevice>> MakeLavapipe(const DeviceSurroundings& vm) {
  return LavapipeDmaDevice::Create(vm);
}

bool IsLavapipeMissing() { return kept_loaded == nullptr; }

}  // namespace mvgpu::testing
