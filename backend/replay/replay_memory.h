#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>

#include "apionly-domain/api_only_domain.h"
#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "apionly-domain/base/unique_fd.h"

namespace mvgpu::backend {

// Guest RAM for a replay: one sparse memfd per file of the trace, and where they are mapped. Bytes
// are put in from the VMM's side of the memory, so a mapping that the device may only read is no
// obstacle. Not thread-safe.
//
// A mapping without a file gets a sparse memfd that only this class knows, and the device reaches
// it as it reached the VMM: by asking.
class ReplayMemory final : public domain::RemoteMemory {
 public:
  // What a hostile trace may make a replay hold.
  static constexpr uint64_t kMaxFiles = 1024;
  static constexpr uint64_t kMaxFileBytes = uint64_t{1} << 42;

  // A descriptor of file `number`, made (or grown) to be `size` bytes long. Errors: kCorrupt,
  // kSystem.
  Result<UniqueFd> open_file(uint64_t number, uint64_t size);
  void map(IovaRange range, uint64_t file, uint64_t file_offset);
  void unmap(Iova start, uint64_t size);
  void unmap_all() { mappings_.clear(); }
  // Errors: kCorrupt (not mapped), kSystem.
  Result<void> put(Iova iova, std::span<const std::byte> bytes);

  // What the VMM would do for memory without a file.
  Result<void> read(Iova iova, std::span<std::byte> destination) override;
  Result<void> write(Iova iova, std::span<const std::byte> source) override {
    return put(iova, source);
  }

  struct Place {
    uint64_t file = 0;  // 0: not mapped
    uint64_t page = 0;
  };
  Place place_of(Iova iova) const;

 private:
  struct File {
    UniqueFd fd;
    uint64_t size = 0;
  };
  struct Mapping {
    IovaRange range;
    uint64_t file;
    uint64_t offset;
    UniqueFd own{};  // without a file of the trace; made when it is needed
  };
  const Mapping* find(Iova iova) const;
  Mapping* find(Iova iova);
  static Result<UniqueFd> MakeFile();
  // The descriptor behind a mapping.
  Result<int> FdOf(Mapping& mapping);

  std::map<uint64_t, File> files_;
  std::map<uint64_t, Mapping> mappings_;  // by first IOVA
};

}  // namespace mvgpu::backend
