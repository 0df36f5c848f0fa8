#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "dma-cache/dma_cache.h"

namespace mvgpu::testing {

// Somebody with a user of a cache, who remembers what it was told and may act on it.
class DmaParty final : public dma::DmaUser::Owner {
 public:
  explicit DmaParty(dma::DmaCache* cache) : user_(cache->open_user(this)) {}
  dma::DmaUser* operator->() { return user_.get(); }
  void on_revoke(IovaRange range) override {
    told.push_back(range);
    if (when_told) when_told(range);
  }

  std::vector<IovaRange> told;
  std::function<void(IovaRange)> when_told;

 private:
  std::unique_ptr<dma::DmaUser> user_;
};

}  // namespace mvgpu::testing
