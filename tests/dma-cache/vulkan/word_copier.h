#pragma once

#include <cstdint>

#include "dma-cache/vulkan/vulkan_device.h"

namespace mvgpu::testing {

// Runs copy_words.comp on a Vulkan device: reads and writes device addresses, as a renderer would.
// Uses the device's queue.
class WordCopier {
 public:
  // Checked: without it there is no test.
  explicit WordCopier(const dma::VulkanDevice* device);
  ~WordCopier();
  WordCopier(const WordCopier&) = delete;
  WordCopier& operator=(const WordCopier&) = delete;

  // target[i] = source[i] ^ key, `words` times; returns when the device has done it.
  void run(DmaAddr source, DmaAddr target, uint32_t words, uint32_t key);

 private:
  void CreatePipeline();
  void CreateCommands();

  const dma::VulkanDevice& device_;
  VkShaderModule shader_ = VK_NULL_HANDLE;
  VkPipelineLayout layout_ = VK_NULL_HANDLE;
  VkPipeline pipeline_ = VK_NULL_HANDLE;
  VkCommandPool pool_ = VK_NULL_HANDLE;
  VkCommandBuffer commands_ = VK_NULL_HANDLE;
  VkFence fence_ = VK_NULL_HANDLE;
};

}  // namespace mvgpu::testing
