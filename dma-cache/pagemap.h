#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>

#include "apionly-domain/base/error.h"
#include "apionly-domain/base/unique_fd.h"

namespace mvgpu::dma {

// Where the pages of this process are: /proc/self/pagemap, one 64-bit word for each virtual page
// (Linux, Documentation/admin-guide/mm/pagemap.rst). Thread-safe.
class Pagemap {
 public:
  class Entry {
   public:
    Entry() = default;
    explicit Entry(uint64_t word) : word_(word) {}
    bool is_present() const { return (word_ >> 63 & 1) != 0; }
    bool is_swapped() const { return (word_ >> 62 & 1) != 0; }
    // The page frame number; 0 where the reader may not know it. REQUIRES: is_present().
    uint64_t frame() const { return word_ & ((uint64_t{1} << 55) - 1); }

   private:
    uint64_t word_ = 0;
  };

  // Errors: kPermission when this process may not open it, kSystem.
  static Result<Pagemap> Open(const std::string& path);

  // The entries of the pages from `host` on, with one system call. Errors: kSystem.
  Result<void> read(const std::byte* host, std::span<Entry> entries) const;

 private:
  Pagemap(UniqueFd fd, std::string path) : fd_(std::move(fd)), path_(std::move(path)) {}

  UniqueFd fd_;
  std::string path_;
};

}  // namespace mvgpu::dma
