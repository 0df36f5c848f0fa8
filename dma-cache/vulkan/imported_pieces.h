#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include <absl/container/btree_map.h>

#include "apionly-domain/access.h"
#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "dma-cache/vulkan/imported_buffer.h"

namespace mvgpu::dma {

// Host memory, imported in pieces that are reused.
//
// An import is a handful of Vulkan calls, and drivers allow only some thousand of them at a time.
// So a piece is larger than the page that is asked for: a cell of an aligned grid (2 MiB), cut down
// to the guest memory that is known to be there and to what no other piece has. Cells grow as the
// device's imports run out: 2 MiB for the first half of them, four times that for half of the rest,
// and so on. A device with the least that Vulkan demands (4096) reaches 8 GiB of scattered pages
// with half of its imports, and more than 100 GiB with all.
//
// Invariants
//   - Pieces do not overlap, in host memory or in device addresses.
//   - A piece counts how often its pages are held. It stays as long as it has holds, and goes with
//     collect() after the last one left; until then it may be held anew.
// Not thread-safe.
class ImportedPieces {
 public:
  // Bytes; a power of two, and not less than the device's alignment: rounded up to it.
  static constexpr uint64_t kPieceBytes = 2u << 20;

  struct Figures {
    uint64_t imports = 0;       // since creation, with those that failed
    uint64_t pieces = 0;        // now
    uint64_t bytes = 0;         // now, imported
    uint64_t held = 0;          // now, pages; one that is held twice counts twice
    uint64_t vulkan_calls = 0;  // since creation
  };

  // Imported memory: piece->host is at piece->address().
  class Piece {
   public:
    Piece(HostRange host, ImportedBuffer buffer) : host_(host), buffer_(std::move(buffer)) {}
    const HostRange& host() const { return host_; }
    DmaAddr address() const { return buffer_.address(); }

   private:
    friend class ImportedPieces;
    const HostRange host_;
    const ImportedBuffer buffer_;
    uint64_t held_pages_ = 0;
    bool may_be_unused_ = false;  // stands in unused_
  };

  // `target` outlives the pieces.
  ImportedPieces(const ImportTarget& target, uint64_t piece_bytes);
  // REQUIRES: nothing is held.
  ~ImportedPieces();

  // The piece with this host address; null when it is not imported. No Vulkan call.
  Piece* find(HostAddr host);
  // Imports memory with the beginning of `wanted`, and more of `extent` if that is worth while;
  // nobody holds it yet. REQUIRES: find(wanted.start()) is null, `extent` contains it, `wanted` is
  // whole pages. Errors: kLimit, kNotReachable, kPermission (memory that is not for writing, which
  // drivers refuse), kSystem.
  Result<Piece*> import(HostRange wanted, HostRange extent, domain::Access access);
  // REQUIRES: the pages are in the piece.
  void hold(Piece* piece, uint64_t pages);
  // Ends one hold of each of the pages, which may be in several pieces. REQUIRES: they are held.
  void release(DmaAddr address, uint64_t pages);
  // Takes the pieces that nobody holds away from the device.
  void collect();

  const Figures& figures() const { return figures_; }

 private:
  // How large the next piece may be.
  uint64_t CellBytes() const;
  // What may be imported around an address: of its cell, of `extent`, and of no other piece.
  Result<HostRange> RoomAround(HostAddr host, HostRange extent) const;
  Result<Piece*> Import(HostRange host);
  Result<void> MakeRoomForOne();

  const ImportTarget target_;
  const uint64_t piece_bytes_;
  absl::btree_map<HostAddr, std::unique_ptr<Piece>> by_host_;  // by first byte
  absl::btree_map<DmaAddr, Piece*> by_address_;                // the same
  std::vector<Piece*> unused_;  // each once; those that are held again are skipped
  Figures figures_;
};

}  // namespace mvgpu::dma
