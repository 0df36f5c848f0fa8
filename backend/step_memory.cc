#include "backend/step_memory.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>
#include <utility>

#include "apionly-domain/base/check.h"

namespace mvgpu::backend {

void StepMemory::Append(Access access) {
  log_bytes_ += access.bytes.size();
  log_.push_back(std::move(access));
}

std::vector<StepMemory::Access> StepMemory::CutLog(size_t first) {
  const auto begin = log_.begin() + static_cast<std::ptrdiff_t>(first);
  std::vector<Access> cut(std::make_move_iterator(begin), std::make_move_iterator(log_.end()));
  log_.erase(begin, log_.end());
  for (const Access& access : cut) log_bytes_ -= access.bytes.size();
  return cut;
}

size_t StepMemory::FirstMissing() const {
  const auto it = std::ranges::find(log_, false, &Access::is_done);
  return static_cast<size_t>(it - log_.begin());
}

Result<void> StepMemory::read(Iova iova, std::span<std::byte> destination) {
  if (next_read_ < log_.size()) {
    const Access& access = log_[next_read_];
    if (access.iova == iova && access.bytes.size() == destination.size()) {
      ++next_read_;
      if (access.error) return tl::unexpected<Error>(*access.error);
      std::copy(access.bytes.begin(), access.bytes.end(), destination.begin());
      return {};
    }
    CutLog(next_read_);
  }
  if (destination.size() > kMaxStepBytes - log_bytes_) {
    return Fail(ErrorCode::kLimit,
                fmt::format("a request touches more than {} MiB of memory without a file; give the "
                            "vm shared memory",
                            kMaxStepBytes >> 20));
  }
  Append({iova, std::vector<std::byte>(destination.size())});
  ++next_read_;
  return Fail(ErrorCode::kPending, "the vmm has to be asked first");
}

Result<void> StepMemory::write(Iova iova, std::span<const std::byte> source) {
  writes_.push_back({iova, {source.begin(), source.end()}});
  return {};
}

void StepMemory::begin_attempt() {
  next_read_ = 0;
  CutLog(FirstMissing());  // asked for and not fetched: it is asked for again
}

void StepMemory::forget_reads() {
  next_read_ = 0;
  CutLog(0);
  ++read_generation_;
}

void StepMemory::forget_everything() {
  forget_reads();
  writes_.clear();
  ++write_generation_;
}

std::optional<IovaRange> StepMemory::next_write() const {
  if (writes_.empty()) return std::nullopt;
  return IovaRange::FromStartAndSize(writes_.front().iova, writes_.front().bytes.size());
}

StepMemory::Exchange StepMemory::take() {
  Exchange exchange;
  exchange.read_generation_ = read_generation_;
  exchange.write_generation_ = write_generation_;
  if (!writes_.empty()) {
    exchange.write_ = std::move(writes_.front());
    writes_.pop_front();
    return exchange;
  }
  exchange.reads_ = CutLog(FirstMissing());
  MVGPU_CHECK(!exchange.reads_.empty());
  return exchange;
}

void StepMemory::Exchange::run(domain::RemoteMemory& vmm) {
  const auto finish = [](Access& access, Result<void> result) {
    access.is_done = true;
    if (!result) access.error = std::move(result).error();
    return !access.error.has_value();
  };
  if (write_) finish(*write_, vmm.write(write_->iova, write_->bytes));
  for (Access& read : reads_) {
    if (!finish(read, vmm.read(read.iova, read.bytes))) return;
  }
}

Result<void> StepMemory::put(Exchange exchange) {
  const bool memory_changed = exchange.read_generation_ != read_generation_;
  if (exchange.write_ && exchange.write_->error) {
    const Error& error = *exchange.write_->error;
    if (error.code() == ErrorCode::kProtocol) return tl::unexpected<Error>(error);
    if (exchange.write_generation_ != write_generation_) return {};
    if (!memory_changed) return tl::unexpected<Error>(error);
    writes_.push_front({exchange.write_->iova, std::move(exchange.write_->bytes)});
  }
  for (Access& read : exchange.reads_) {
    if (read.error && read.error->code() == ErrorCode::kProtocol) {
      return tl::unexpected<Error>(*read.error);
    }
    if (read.is_done && !memory_changed) Append(std::move(read));
  }
  return {};
}

}  // namespace mvgpu::backend
