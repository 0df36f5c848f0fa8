#pragma once

#include <cstddef>

namespace mvgpu {

// Addresses for an array of which only parts are in use, so that where an element lies follows from
// its index alone. All of it reads as zero. It may be written, and then has memory of its own, only
// where it was opened; the rest costs addresses, and no commitment of the kernel's.
//
// Offsets and sizes are in bytes, multiples of the page size. It begins where a huge page could.
// Not thread-safe; but what is in open parts may be read by anybody at any time.
class ReservedMemory {
 public:
  static constexpr size_t kHugePage = size_t{2} << 20;

  explicit ReservedMemory(size_t size);
  ~ReservedMemory();
  ReservedMemory(const ReservedMemory&) = delete;
  ReservedMemory& operator=(const ReservedMemory&) = delete;

  void* data() const { return data_; }

  // Allows writing, there and for the first time since it was closed.
  void open(size_t offset, size_t size);
  // What was open reads as zero again, has no memory, and may not be written.
  void close(size_t offset, size_t size);
  // The same for open parts that stay open.
  void give_back(size_t offset, size_t size);
  // Puts what lies there, and what will, into huge pages, if the kernel can and has some
  // (MADV_COLLAPSE, Linux 6.1); all of it has memory then. It copies what is there. REQUIRES: open,
  // by one call of open(); multiples of kHugePage.
  void make_huge(size_t offset, size_t size);

 private:
  void* At(size_t offset) const { return static_cast<std::byte*>(data_) + offset; }

  void* const data_;
  const size_t size_;
};

}  // namespace mvgpu
