#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>
#include <span>
#include <vector>

#include "apionly-domain/api_only_domain.h"
#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"

namespace mvgpu::backend {

// Guest memory without a file, as a step of the device sees it. A step holds the lock that the
// VMM's next message needs, so it must not wait for the VMM. Instead it is tried again and again:
//
//   - A read whose bytes are not here fails with kPending, and the attempt ends without effect. The
//     bytes are fetched without the lock and put into the log. The next attempt makes the same
//     reads in the same order and finds them there, and gets further.
//   - A write succeeds and is queued. Writes go out in their order, and before the reads that came
//     after them: guest memory sees a step's accesses in program order.
//
// A read that is not the next one in the log (the guest changed something between two attempts)
// makes the log end there. When memory is mapped or unmapped the log is dropped, when the driver
// resets the device also what is still to be written.
//
// Not thread-safe: everything but Exchange::run() is called under the vGPU's lock.
class StepMemory final : public domain::RemoteMemory {
 public:
  // A picture of 4096 x 4096 and its request. What a step reads is kept until the step is over.
  static constexpr uint64_t kMaxStepBytes = 68u << 20;

  // Reads fail with kPending, kLimit (more than kMaxStepBytes in one step), or with what the VMM
  // answered when the bytes were fetched. A write never fails here.
  Result<void> read(Iova iova, std::span<std::byte> destination) override;
  Result<void> write(Iova iova, std::span<const std::byte> source) override;

  // Reads are looked for from the start of the log.
  void begin_attempt();
  // The step is over, or what was read may not be true any more. What is to be written stays.
  void forget_reads();
  // Nothing is to be written any more, either.
  void forget_everything();

  // The oldest write that is to go out; nullopt when there is none.
  std::optional<IovaRange> next_write() const;
  void drop_writes() { writes_.clear(); }

  // What the VMM is asked in one go: a write, or else the reads of the last attempt.
  class Exchange {
   public:
    // Waits for the VMM. Called without the lock.
    void run(domain::RemoteMemory& vmm);
    // The lowest address that is asked for. REQUIRES: made by take().
    Iova iova() const { return write_ ? write_->iova : reads_.front().iova; }

   private:
    friend class StepMemory;
    struct Access {
      Iova iova;
      std::vector<std::byte> bytes;
      bool is_done = false;
      std::optional<Error> error{};
    };
    std::optional<Access> write_;
    std::vector<Access> reads_;
    uint64_t read_generation_ = 0;  // when it was taken
    uint64_t write_generation_ = 0;
  };
  // Whether the last attempt read bytes that are not here.
  bool is_missing_reads() const { return FirstMissing() < log_.size(); }
  // REQUIRES: there is a write, or is_missing_reads().
  Exchange take();
  // Takes in what came of it. A write that was refused while memory changed is to go out again.
  // Errors: those of any other write that still counts; kProtocol when nobody can be asked any
  // more.
  Result<void> put(Exchange exchange);

 private:
  using Access = Exchange::Access;
  void Append(Access access);
  // Takes the entries of the log from `first` on out of it.
  std::vector<Access> CutLog(size_t first);
  // The first entry of the log that is not done; its size when there is none.
  size_t FirstMissing() const;

  std::vector<Access> log_;  // those that are not done are the last ones
  size_t next_read_ = 0;     // in the log, of the attempt under way
  uint64_t log_bytes_ = 0;   // in the log
  std::deque<Access> writes_;
  uint64_t read_generation_ = 0;   // changes when the log is dropped
  uint64_t write_generation_ = 0;  // changes when the writes are
};

}  // namespace mvgpu::backend
