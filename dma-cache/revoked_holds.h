#pragma once

#include <cstdint>
#include <vector>

#include <absl/container/btree_map.h>

#include "apionly-domain/base/address.h"

namespace mvgpu::dma {

// What a user still has handles for although it was revoked: how many such holds each page has,
// and in which epoch the page was last revoked. A hold from before that epoch is one of them and
// owes nothing but its entry here; a hold from that epoch on is a real one. Pages without such
// holds have no entry.
//
// Not thread-safe: guarded by the lock of its user.
class RevokedHolds {
 public:
  // Every page of the run loses `holds` real holds in this epoch. REQUIRES: epochs do not fall.
  void add(PageRun pages, uint64_t holds, uint64_t epoch);

  // Whether a hold of any of the pages, taken in `epoch`, was revoked.
  bool any(PageRun pages, uint64_t epoch) const;
  // Ends holds of these pages that were taken in `epoch`: appends the pages where they are real;
  // forgets the others.
  void release(PageRun pages, uint64_t epoch, std::vector<PageRun>* real);

  bool empty() const { return runs_.empty(); }

 private:
  struct Run {
    uint64_t end;  // page behind the last one
    uint64_t epoch;
    uint64_t holds;
  };
  using Runs = absl::btree_map<uint64_t, Run>;  // by first page; disjoint

  Runs::const_iterator FirstOverlap(PageRun pages) const;
  // Makes `page` the start of a run if it lies inside one.
  void SplitAt(uint64_t page);

  Runs runs_;
};

}  // namespace mvgpu::dma
