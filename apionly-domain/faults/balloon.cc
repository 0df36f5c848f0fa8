#include "apionly-domain/faults/balloon.h"

#include <fmt/format.h>

#include <algorithm>

namespace mvgpu::domain {

Result<Balloon::Given> Balloon::inflate(std::span<const uint32_t> frames) {
  if (frames.size() > kMaxFrames) {
    return Fail(ErrorCode::kInvalid, fmt::format("the balloon is asked for {} pages at once, {} "
                                                 "is the most",
                                                 frames.size(), kMaxFrames));
  }
  Given given;
  for (const PageRun& run : RunsToGive(frames, &given)) {
    (Give(run) ? given.pages : given.failed) += run.count;
  }
  return given;
}

std::vector<PageRun> Balloon::RunsToGive(std::span<const uint32_t> frames, Given* given) {
  std::vector<uint32_t> sorted(frames.begin(), frames.end());
  std::sort(sorted.begin(), sorted.end());
  sorted.erase(std::unique(sorted.begin(), sorted.end()), sorted.end());
  std::vector<PageRun> runs;
  for (const uint32_t frame : sorted) {
    if (parts_.cooperative != nullptr && !parts_.cooperative->release_for_balloon(frame)) {
      ++given->in_use;
    } else if (!runs.empty() && runs.back().end() == frame) {
      ++runs.back().count;
    } else {
      runs.push_back({frame, 1});
    }
  }
  return runs;
}

Result<void> Balloon::Give(PageRun run) {
  if (parts_.faulting == nullptr) return parts_.owner->give_back(RangeOf(run));
  const FaultingDomain::Invalidation gone = parts_.faulting->begin_invalidate(RangeOf(run));
  return parts_.owner->give_back(RangeOf(run));
}

}  // namespace mvgpu::domain
