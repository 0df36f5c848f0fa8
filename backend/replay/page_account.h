#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>

#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "backend/replay/replay_memory.h"
#include "dma-cache/mapper.h"

namespace mvgpu::backend {

// What the device did to each guest page, over the time of the trace: bytes it read, how often
// dma_map_page was called for it, and how long it was held. Not thread-safe.
//
// A row per page is for looking at, and a guest can map terabytes with a few requests: pages beyond
// the first kMaxRows are left out, and is_complete() says so.
class PageAccount {
 public:
  static constexpr size_t kMaxRows = 1u << 20;  // 4 GiB of pages that a GPU touched
  struct Row {
    uint64_t iova = 0;  // of the page
    uint64_t file = 0;  // of the trace, from 1
    uint64_t file_page = 0;
    uint64_t reads = 0;  // accesses that touched it
    uint64_t bytes_read = 0;
    uint64_t dma_maps = 0;  // calls of the mapper that covered it
    uint64_t held_ns = 0;   // between dma_map and dma_unmap, summed up
    uint64_t first_ns = 0;  // first and last time it was touched
    uint64_t last_ns = 0;
  };

  // `memory` outlives the account: it knows which file stands behind an address.
  explicit PageAccount(const ReplayMemory* memory) : memory_(*memory) {}

  void set_time(uint64_t time_ns) { now_ns_ = time_ns; }
  void on_read(Iova iova, uint64_t size);
  void on_dma_map(IovaRange range, DmaAddr address);
  void on_dma_unmap(DmaAddr address, uint64_t size);

  const std::map<uint64_t, Row>& rows() const { return rows_; }  // by IOVA page
  bool is_complete() const { return is_complete_; }
  // One line per page, comma-separated, with a header line. Errors: kSystem.
  Result<void> write_csv(const std::string& path) const;

  // A mapper that tells this account and asks `inner`. The account outlives it.
  std::unique_ptr<dma::Mapper> Watch(std::unique_ptr<dma::Mapper> inner);

 private:
  struct Held {
    uint64_t iova_page;
    uint64_t since_ns;
  };
  // Null when there is no room for another page.
  Row* Touch(uint64_t iova_page);

  const ReplayMemory& memory_;
  std::map<uint64_t, Row> rows_;
  std::map<uint64_t, Held> held_;  // by device page address
  uint64_t now_ns_ = 0;
  bool is_complete_ = true;
};

}  // namespace mvgpu::backend
