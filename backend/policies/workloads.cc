#include "backend/policies/workloads.h"

#include <fmt/format.h>

#include <algorithm>
#include <deque>
#include <random>
#include <utility>
#include <vector>

namespace mvgpu::backend {

namespace {

constexpr uint64_t kMillisecond = 1'000'000;
constexpr uint64_t kMiB = uint64_t{1} << 20;
constexpr uint64_t kGiB = uint64_t{1} << 30;

constexpr uint64_t kSegment = 32 << 10;  // bytes
constexpr uint64_t kSocketBuffers = 2048;
constexpr uint64_t kRing = 256;  // buffers that are mapped; there are twice as many
constexpr uint64_t kDiskRequest = 512 << 10;
// Each starts where nothing of the others is.
constexpr uint64_t kSocketStart = 256 * kMiB;
constexpr uint64_t kRingStart = 512 * kMiB;
constexpr uint64_t kDiskStart = kGiB;

constexpr uint64_t kOutPeriod = 1'000 * kMillisecond / 307;
constexpr uint64_t kInPeriod = 10 * kMillisecond;
constexpr uint64_t kDiskPeriod = 700 * kMillisecond;

class Published {
 public:
  explicit Published(const PublishedWorkload& workload)
      : workload_(workload), random_(workload.seed), builder_("published") {}

  Result<DmaTrace> make() {
    for (const IovaRange& range : PcMemory(workload_.memory)) builder_.add_memory(range);
    MVGPU_RETURN_IF_ERROR(
        AddBuffers(kSocketStart, kSocketBuffers, dma::Direction::kToDevice, &socket_));
    std::vector<uint32_t> pool;
    MVGPU_RETURN_IF_ERROR(AddBuffers(kRingStart, 2 * kRing, dma::Direction::kFromDevice, &pool));
    std::shuffle(pool.begin(), pool.end(), random_);
    for (size_t i = 0; i < kRing; ++i) {
      MVGPU_RETURN_IF_ERROR(builder_.map(0, pool[i]));
      ring_.push_back(pool[i]);
    }
    free_.assign(pool.begin() + kRing, pool.end());
    MVGPU_RETURN_IF_ERROR(Flow());
    return std::move(builder_).build();
  }

 private:
  Result<void> AddBuffers(uint64_t start, uint64_t count, dma::Direction direction,
                          std::vector<uint32_t>* buffers) {
    for (uint64_t i = 0; i < count; ++i) {
      const auto range = IovaRange::FromStartAndSize(Iova(start + i * kSegment), kSegment);
      MVGPU_ASSIGN_OR_RETURN(const uint32_t buffer, builder_.add_buffer({&*range, 1}, direction));
      buffers->push_back(buffer);
    }
    return {};
  }

  // Whatever comes next, until the time is over.
  Result<void> Flow() {
    const uint64_t end = workload_.seconds * 1'000 * kMillisecond;
    uint64_t out = kOutPeriod;
    uint64_t in = kInPeriod;
    uint64_t disk = kDiskPeriod;
    while (std::min({out, in, disk}) <= end) {
      if (out <= in && out <= disk) {
        MVGPU_RETURN_IF_ERROR(Once(out, socket_[random_() % socket_.size()]));
        out += kOutPeriod;
      } else if (in <= disk) {
        MVGPU_RETURN_IF_ERROR(Receive(in));
        in += kInPeriod;
      } else {
        MVGPU_RETURN_IF_ERROR(ReadDisk(disk));
        disk += kDiskPeriod;
      }
    }
    return {};
  }
  Result<void> Once(uint64_t now, uint32_t buffer) {
    MVGPU_RETURN_IF_ERROR(builder_.map(now, buffer));
    MVGPU_RETURN_IF_ERROR(builder_.access_all(now, buffer));
    return builder_.unmap(now, buffer);
  }
  // The driver puts another buffer where the filled one was; stacks give the pool's back in no
  // order.
  Result<void> Receive(uint64_t now) {
    const uint32_t filled = ring_.front();
    ring_.pop_front();
    MVGPU_RETURN_IF_ERROR(builder_.access_all(now, filled));
    MVGPU_RETURN_IF_ERROR(builder_.unmap(now, filled));
    const uint32_t next = std::exchange(free_[random_() % free_.size()], filled);
    ring_.push_back(next);
    return builder_.map(now, next);
  }
  Result<void> ReadDisk(uint64_t now) {
    const uint64_t high = kPcHighStart;
    if (disk_at_ + kDiskRequest > std::min(workload_.memory, kPcLowEnd) && disk_at_ < high) {
      disk_at_ = workload_.memory > kPcLowEnd ? high : kDiskStart;
    } else if (disk_at_ + kDiskRequest > workload_.memory + (high - kPcLowEnd)) {
      disk_at_ = kDiskStart;
    }
    const auto range = IovaRange::FromStartAndSize(Iova(disk_at_), kDiskRequest);
    disk_at_ += kDiskRequest;
    MVGPU_ASSIGN_OR_RETURN(const uint32_t buffer,
                           builder_.add_buffer({&*range, 1}, dma::Direction::kFromDevice));
    return Once(now, buffer);
  }

  const PublishedWorkload workload_;
  std::mt19937_64 random_;
  DmaTraceBuilder builder_;
  std::vector<uint32_t> socket_;
  std::deque<uint32_t> ring_;  // mapped, in the order in which the device fills them
  std::vector<uint32_t> free_;
  uint64_t disk_at_ = kDiskStart;
};

}  // namespace

Result<DmaTrace> MakePublishedWorkload(const PublishedWorkload& workload) {
  constexpr uint64_t kMaxSeconds = DmaTraceBuilder::kMaxDurationNs / (1'000 * kMillisecond);
  if (workload.memory < 2 * kGiB || workload.memory > DmaTraceBuilder::kMaxMemoryBytes - kGiB ||
      workload.memory % kPageSize != 0 || workload.seconds > kMaxSeconds) {
    return Fail(
        ErrorCode::kInvalid,
        fmt::format("workload published: memory of {} bytes for {} s; it needs whole pages, "
                    "2 GiB to 1023 GiB, and at most {} s",
                    workload.memory, workload.seconds, kMaxSeconds));
  }
  return Published(workload).make();
}

}  // namespace mvgpu::backend
