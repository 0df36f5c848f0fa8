#pragma once

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <unistd.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string>

#include "apionly-domain/base/address.h"
#include "apionly-domain/base/check.h"
#include "apionly-domain/base/unique_fd.h"

namespace mvgpu::testing {

// A file that looks like /proc/self/pagemap, with the entries that a test wants; all others say
// "not in memory". Its words are put together here from the kernel's documentation, not from ours.
class FakePagemap {
 public:
  FakePagemap() : fd_(memfd_create("pagemap", MFD_CLOEXEC)) { MVGPU_CHECK(fd_.is_valid()); }

  std::string path() const { return fmt::format("/proc/self/fd/{}", fd_.get()); }

  // `pages` pages from `host` on, in frames from `frame` on; frame 0: hidden from this process.
  void set_present(const std::byte* host, uint64_t pages, uint64_t frame) {
    for (uint64_t i = 0; i < pages; ++i) {
      set(host + BytesIn(i), uint64_t{1} << 63 | (frame == 0 ? 0 : frame + i));
    }
  }
  void set_swapped(const std::byte* host) { set(host, uint64_t{1} << 62 | 0x1234); }
  // A page that is being moved reads as swapped out, to a swap "device" with the number of what
  // moves pages (Linux 6, <linux/swap.h>: SWP_MIGRATION_READ) and its frame for a place in it.
  void set_moving(const std::byte* host, uint64_t frame) {
    set(host, uint64_t{1} << 62 | frame << 5 | 0x1d);
  }
  // The caller's stack, in some frame: where code that asks for a page of its own looks.
  void fill_stack(uint64_t frame = 1) {
    std::byte here{};
    const uint64_t page = std::bit_cast<uint64_t>(&here) >> kPageShift;
    for (uint64_t i = page - 256; i < page + 16; ++i) {
      set(std::bit_cast<const std::byte*>(BytesIn(i)), uint64_t{1} << 63 | frame);
    }
  }

 private:
  void set(const std::byte* host, uint64_t word) {
    const auto offset =
        static_cast<off_t>(std::bit_cast<uint64_t>(host) / kPageSize * sizeof(word));
    MVGPU_CHECK(pwrite(fd_.get(), &word, sizeof(word), offset) == sizeof(word));
  }

  UniqueFd fd_;
};

}  // namespace mvgpu::testing
