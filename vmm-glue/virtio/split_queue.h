#pragma once

// The device's side of a split virtqueue (virtio 1.2, 2.7), over an api-only domain.
//
// - pop() takes the next chain: the readable part is copied out, the writable part remembered.
//
// - respond() writes the response into the writable part.
//
// - push() gives the chain back, and says whether the driver wants to be interrupted.
//
// The rings, the tables and the requests belong to the guest, who may change them at any time:
// every word of them is read once, into a local copy, which is checked and then used. That also
// makes a recording replay to the same end. avail.idx is read once per pop() at most: what it
// announces is remembered.
//
// An error means that the guest broke the rules, or that its memory is not there. The queue is of
// no use then until the driver has reset the device. kPending is none of these: memory without a
// file is on its way, and the same pop() is to come again; until it succeeds the queue stands as
// before.
//
// Not thread-safe.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "apionly-domain/api_only_domain.h"
#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "vmm-glue/virtio/ring_format.h"

namespace mvgpu::glue {

// A chain of descriptors. Kept by the caller and filled again and again: it allocates only to grow.
class QueueRequest {
 public:
  std::span<const std::byte> readable() const { return {data_.data(), readable_size_}; }
  uint32_t writable_size() const { return writable_size_; }

 private:
  friend class SplitQueue;
  void Clear();

  uint16_t head_ = 0;
  uint64_t total_size_ = 0;  // of both parts, the unusable end of the writable one included
  uint32_t readable_size_ = 0;
  uint32_t writable_size_ = 0;
  std::vector<std::byte> data_;
  std::vector<IovaRange> readable_segments_;
  std::vector<IovaRange> writable_segments_;
};

class SplitQueue {
 public:
  struct Options {
    uint16_t size = 0;  // of the ring: a power of two
    Iova descriptors{};
    Iova available{};
    Iova used{};
    bool indirect = false;   // VIRTIO_F_INDIRECT_DESC was negotiated
    bool event_idx = false;  // VIRTIO_F_EVENT_IDX was negotiated
  };
  // A longer request is an error. A longer writable part is used up to here: drivers may offer more
  // space than a response takes.
  static constexpr uint32_t kMaxReadableBytes = 2u << 20;
  static constexpr uint32_t kMaxWritableBytes = 2u << 20;
  // Descriptors in an indirect table. Not the queue's size: Linux puts longer chains there.
  static constexpr uint32_t kMaxIndirectDescriptors = 1024;

  // The domain outlives the queue. Errors: kInvalid (size, alignment, wrap); no guest memory is
  // touched.
  static Result<std::unique_ptr<SplitQueue>> Create(domain::ApiOnlyDomain* domain, Options options);

  // False: there is nothing. The driver will then notify when it adds something. On an error
  // nothing was taken: the same request comes again. kNotMapped or kBusy: the VMM has taken memory
  // of the rings or of the request away, maybe to map it again at once. A request whose response
  // could not be written is not taken either. kPending: see above.
  Result<bool> pop(QueueRequest* request);
  // Undoes the last pop(): the request comes again. REQUIRES: it was not pushed.
  void unpop();
  // REQUIRES: response.size() <= request.writable_size().
  Result<void> respond(const QueueRequest& request, std::span<const std::byte> response);
  // Returns whether the driver must be interrupted; always, where asking it would need a round trip
  // to the VMM, which costs more than the interrupt. `written`: bytes of the response.
  Result<bool> push(const QueueRequest& request, uint32_t written);

 private:
  SplitQueue(domain::ApiOnlyDomain* domain, Options options) : domain_(domain), options_(options) {}

  template <typename T>
  Result<T> Read(Iova iova) const;
  template <typename T>
  Result<void> Write(Iova iova, const T& value);

  Result<bool> TryPop(QueueRequest* request);
  Result<bool> LookForAvailable();
  Result<void> WalkChain(QueueRequest* request);
  Result<void> WalkIndirectTable(const ring::Descriptor& table, QueueRequest* request);
  static Result<void> AddSegment(const ring::Descriptor& descriptor, QueueRequest* request);
  Result<void> CopyReadable(QueueRequest* request) const;
  Result<void> CheckRoomForResponse(const QueueRequest& request) const;
  Result<bool> DriverWantsInterrupt() const;

  domain::ApiOnlyDomain* const domain_;  // outlives this, see Create()
  const Options options_;
  uint16_t next_available_ = 0;              // free-running, like the ring's indices
  uint16_t seen_available_ = 0;              // avail.idx when it was read last
  uint16_t seen_before_pop_ = 0;             // seen_available_ when the last pop() began
  uint16_t used_ = 0;                        // used.idx
  std::optional<uint16_t> available_event_;  // as written last
  std::vector<ring::Descriptor> indirect_;   // copy of the table under way
};

}  // namespace mvgpu::glue
