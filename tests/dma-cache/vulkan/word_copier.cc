#include "tests/dma-cache/vulkan/word_copier.h"

#include "apionly-domain/base/check.h"

namespace mvgpu::testing {

namespace {

#include <copy_words.spv.h>  // kCopyWords, the shader in SPIR-V

struct Job {
  uint64_t source;
  uint64_t target;
  uint32_t count;
  uint32_t key;
};
constexpr uint32_t kGroup = 64;  // as in the shader

}  // namespace

#define MVGPU_VULKAN(device, name) (device).get<PFN_##name>(#name)

WordCopier::WordCopier(const dma::VulkanDevice* device) : device_(*device) {
  CreatePipeline();
  CreateCommands();
}

void WordCopier::CreatePipeline() {
  VkShaderModuleCreateInfo shader = {};
  shader.sType = VK_STRUCTURE_TYPE_SHADER_MODULE_CREATE_INFO;
  shader.codeSize = sizeof(kCopyWords);
  shader.pCode = kCopyWords;
  MVGPU_CHECK(MVGPU_VULKAN(device_, vkCreateShaderModule)(device_.handle(), &shader, nullptr,
                                                          &shader_) == VK_SUCCESS);
  const VkPushConstantRange job = {VK_SHADER_STAGE_COMPUTE_BIT, 0, sizeof(Job)};
  VkPipelineLayoutCreateInfo layout = {};
  layout.sType = VK_STRUCTURE_TYPE_PIPELINE_LAYOUT_CREATE_INFO;
  layout.pushConstantRangeCount = 1;
  layout.pPushConstantRanges = &job;
  MVGPU_CHECK(MVGPU_VULKAN(device_, vkCreatePipelineLayout)(device_.handle(), &layout, nullptr,
                                                            &layout_) == VK_SUCCESS);
  VkComputePipelineCreateInfo pipeline = {};
  pipeline.sType = VK_STRUCTURE_TYPE_COMPUTE_PIPELINE_CREATE_INFO;
  pipeline.stage.sType = VK_STRUCTURE_TYPE_PIPELINE_SHADER_STAGE_CREATE_INFO;
  pipeline.stage.stage = VK_SHADER_STAGE_COMPUTE_BIT;
  pipeline.stage.module = shader_;
  pipeline.stage.pName = "main";
  pipeline.layout = layout_;
  MVGPU_CHECK(MVGPU_VULKAN(device_, vkCreateComputePipelines)(device_.handle(), VK_NULL_HANDLE, 1,
                                                              &pipeline, nullptr,
                                                              &pipeline_) == VK_SUCCESS);
}

void WordCopier::CreateCommands() {
  VkCommandPoolCreateInfo pool = {};
  pool.sType = VK_STRUCTURE_TYPE_COMMAND_POOL_CREATE_INFO;
  pool.flags = VK_COMMAND_POOL_CREATE_RESET_COMMAND_BUFFER_BIT;
  pool.queueFamilyIndex = device_.queue_family();
  MVGPU_CHECK(MVGPU_VULKAN(device_, vkCreateCommandPool)(device_.handle(), &pool, nullptr,
                                                         &pool_) == VK_SUCCESS);
  VkCommandBufferAllocateInfo commands = {};
  commands.sType = VK_STRUCTURE_TYPE_COMMAND_BUFFER_ALLOCATE_INFO;
  commands.commandPool = pool_;
  commands.level = VK_COMMAND_BUFFER_LEVEL_PRIMARY;
  commands.commandBufferCount = 1;
  MVGPU_CHECK(MVGPU_VULKAN(device_, vkAllocateCommandBuffers)(device_.handle(), &commands,
                                                              &commands_) == VK_SUCCESS);
  VkFenceCreateInfo fence = {};
  fence.sType = VK_STRUCTURE_TYPE_FENCE_CREATE_INFO;
  MVGPU_CHECK(MVGPU_VULKAN(device_, vkCreateFence)(device_.handle(), &fence, nullptr, &fence_) ==
              VK_SUCCESS);
}

WordCopier::~WordCopier() {
  const VkDevice handle = device_.handle();
  MVGPU_VULKAN(device_, vkDestroyFence)(handle, fence_, nullptr);
  MVGPU_VULKAN(device_, vkDestroyCommandPool)(handle, pool_, nullptr);
  MVGPU_VULKAN(device_, vkDestroyPipeline)(handle, pipeline_, nullptr);
  MVGPU_VULKAN(device_, vkDestroyPipelineLayout)(handle, layout_, nullptr);
  MVGPU_VULKAN(device_, vkDestroyShaderModule)(handle, shader_, nullptr);
}

void WordCopier::run(DmaAddr source, DmaAddr target, uint32_t words, uint32_t key) {
  const Job job = {source.value(), target.value(), words, key};
  VkCommandBufferBeginInfo begin = {};
  begin.sType = VK_STRUCTURE_TYPE_COMMAND_BUFFER_BEGIN_INFO;
  begin.flags = VK_COMMAND_BUFFER_USAGE_ONE_TIME_SUBMIT_BIT;
  MVGPU_CHECK(MVGPU_VULKAN(device_, vkBeginCommandBuffer)(commands_, &begin) == VK_SUCCESS);
  MVGPU_VULKAN(device_, vkCmdBindPipeline)(commands_, VK_PIPELINE_BIND_POINT_COMPUTE, pipeline_);
  MVGPU_VULKAN(device_, vkCmdPushConstants)
  (commands_, layout_, VK_SHADER_STAGE_COMPUTE_BIT, 0, sizeof(job), &job);
  MVGPU_VULKAN(device_, vkCmdDispatch)(commands_, (words + kGroup - 1) / kGroup, 1, 1);
  // What the shader wrote is for the host to read.
  VkMemoryBarrier barrier = {};
  barrier.sType = VK_STRUCTURE_TYPE_MEMORY_BARRIER;
  barrier.srcAccessMask = VK_ACCESS_SHADER_WRITE_BIT;
  barrier.dstAccessMask = VK_ACCESS_HOST_READ_BIT;
  MVGPU_VULKAN(device_, vkCmdPipelineBarrier)
  (commands_, VK_PIPELINE_STAGE_COMPUTE_SHADER_BIT, VK_PIPELINE_STAGE_HOST_BIT, 0, 1, &barrier, 0,
   nullptr, 0, nullptr);
  MVGPU_CHECK(MVGPU_VULKAN(device_, vkEndCommandBuffer)(commands_) == VK_SUCCESS);
  VkSubmitInfo submit = {};
  submit.sType = VK_STRUCTURE_TYPE_SUBMIT_INFO;
  submit.commandBufferCount = 1;
  submit.pCommandBuffers = &commands_;
  MVGPU_CHECK(MVGPU_VULKAN(device_, vkQueueSubmit)(device_.queue(), 1, &submit, fence_) ==
              VK_SUCCESS);
  MVGPU_CHECK(MVGPU_VULKAN(device_, vkWaitForFences)(device_.handle(), 1, &fence_, VK_TRUE,
                                                     UINT64_MAX) == VK_SUCCESS);
  MVGPU_CHECK(MVGPU_VULKAN(device_, vkResetFences)(device_.handle(), 1, &fence_) == VK_SUCCESS);
}

}  // namespace mvgpu::testing
