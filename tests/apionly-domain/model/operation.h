#pragma once

// One step of the model check: plain numbers, so that RapidCheck can make them, shrink them and
// print them. What they mean depends on what is mapped and pinned when the step is taken: see
// World.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "apionly-domain/access.h"

namespace mvgpu::domain::model {

enum class What : uint8_t {
  kMap,
  kMapOn,       // where a mapping ends, and goes on in its file
  kMapAgain,    // a mapping that is there already
  kUnmap,       // refuses to cut
  kUnmapSplit,  // cuts
  kUnmapSome,   // from the start of one mapping to the end of another
  kUnmapAll,
  kPin,
  kRelease,
  kReleasePart,  // one side of a handle that is cut in two
  kPinPages,
  kUnpinPages,
  kUnpinTooMany,
  kRead,
  kWrite,
  kCopy,
  kReadPinned,
  kStartDirtyLog,
  kStopDirtyLog,
  kReadDirty,
  kAttach,
  kDetach,
  kChangeOwner,  // how it answers a revocation
  kFailBackend,  // at the n-th call from now on
  kFailRemote,
  kRefuse,  // the domain beside ours refuses the next change
  kReopenContext,
  kWatch,  // keeps a translation and its generation
};
inline constexpr int kWhats = static_cast<int>(What::kWatch) + 1;

std::string_view NameOf(What what);

struct Operation {
  What what = What::kMap;
  uint32_t domain = 0;
  uint32_t context = 0;
  uint32_t place = 0;      // index into kPlaces; where something is mapped already: of the mapping
  uint32_t page = 0;       // pages behind the place
  uint32_t pages = 1;      // size of what is mapped, pinned ...
  uint32_t file = 0;       // index into kFiles; one more is no file
  uint32_t file_page = 0;  // from the file's start, or back from its end (see kFromTheEnd)
  uint32_t access = 3;     // as in Access
  uint32_t extra = 0;      // bytes, n, which handle: whatever else the step needs

  bool operator==(const Operation&) const = default;
};

// File pages from here on count back from the last page of the file.
inline constexpr uint32_t kFromTheEnd = 1u << 30;

// First pages of the stretches of IOVAs where everything happens: where a level of the page
// directory begins and ends, where its flat part ends, and the two ends of the address space.
inline constexpr uint64_t kGranulePages = uint64_t{1} << 9;
inline constexpr uint64_t kChunkPages = uint64_t{1} << 18;
inline constexpr uint64_t kNearPages = uint64_t{1} << 32;
inline constexpr uint64_t kAllPages = uint64_t{1} << 52;
inline constexpr uint64_t kPlaces[] = {0,
                                       kGranulePages - 16,
                                       kChunkPages - 16,
                                       kNearPages - 16,
                                       kNearPages << 8,
                                       kAllPages - kGranulePages - 16,
                                       kAllPages - 40};
inline constexpr uint32_t kPlaceCount = std::size(kPlaces);

// An operation out of 64 random bits.
Operation MakeOperation(uint64_t random);
// Simpler operations that might fail for the same reason, the simplest first.
std::vector<Operation> SimplerThan(const Operation& operation);
std::string Describe(const Operation& operation);

}  // namespace mvgpu::domain::model
