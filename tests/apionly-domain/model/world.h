#pragma once

// The model check: a container with two api-only domains and one that refuses, and beside them a
// naive model of what must be there. Step() does the same to both, compares the answers (the exact
// error code, not only that there is one), then everything that can be seen from outside.
//
//   operation.h    the steps, made and shrunk by RapidCheck
//   naive_*.h      the model: maps of pages, too simple to be wrong
//   side.h         a domain beside its model
//   world_*.cc     what each step does, and what is compared after it

#include <array>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include <fmt/format.h>

#include "apionly-domain/container.h"
#include "tests/apionly-domain/model/guest_memory.h"
#include "tests/apionly-domain/model/naive_memory.h"
#include "tests/apionly-domain/model/operation.h"
#include "tests/apionly-domain/model/side.h"

namespace mvgpu::domain::model {

class World {
 public:
  static constexpr uint32_t kSides = 2;

  // Empties the files, which outlive the world.
  explicit World(GuestFiles* files);

  void Step(const Operation& operation);
  // Lets go of everything and looks whether nothing is left.
  void Finish();
  // The first difference between the domain and the model; empty: none. Nothing is to be done with
  // a world that has one, not even to destroy it: the domain's own checks may abort the program.
  const std::string& problem() const { return problem_; }

 private:
  // A stretch of IOVA pages that a step is about.
  struct Pages {
    uint64_t first = 0;
    uint64_t count = 1;
    uint64_t end() const { return first + count; }
  };
  using Parts = std::vector<NaiveMapping>;

  // world_mappings.cc
  void Map(const Operation& o);
  void MapOn(const Operation& o);
  void MapAgain(const Operation& o);
  void TryMap(const NaiveMapping& wanted, uint64_t misalign);
  void Unmap(const Operation& o, bool may_split);
  void UnmapSome(const Operation& o);
  void UnmapAll();
  void TryUnmap(Pages pages, bool may_split, uint64_t misalign);
  void Attach(const Operation& o);
  void Detach(const Operation& o);

  // world_revoke.cc
  // Does what makes the domains let go of `parts`, and compares the answer and who was told.
  void Revoke(const Parts& parts, const std::vector<int>& domains,
              const std::function<Result<void>()>& act);
  Verdict VerdictOnRevocation(Side& side, const std::array<bool, kOwners>& must_be_told,
                              const Parts& parts);
  void EndWatches(const Parts& parts, const std::vector<int>& domains);
  void OnRevoke(Side& side, uint32_t owner, IovaRange range);
  void ExpectClosed(Side& side, uint32_t owner);
  void LetGoOfHandles(Side& side, uint32_t owner, bool exactly);
  void LetGoOfLoosePages(Side& side, uint32_t owner);

  // world_pins.cc
  void Pin(const Operation& o);
  void Release(const Operation& o);
  void ReleasePart(const Operation& o);
  void ReopenContext(const Operation& o);
  void TryPin(Side& side, uint32_t context, IovaRange range, Access access);
  void CheckRuns(Side& side, const PinnedRange& pinned, Pages pages);
  // The pages of one file that the run begins with; how many they are.
  uint64_t CheckBacking(Side& side, const PinnedRun& run);
  // Releases it for real, and in the model.
  void LetGoOf(Side& side, Handle& handle);
  uint64_t FreshPages(const Side& side, const std::vector<uint64_t>& pages) const;
  void CountPins(Side& side, uint64_t pages, uint64_t fresh);

  // world_loose_pins.cc
  void PinPages(const Operation& o);
  void UnpinPages(const Operation& o);
  void UnpinTooMany(const Operation& o);
  void TryUnpin(Side& side, uint32_t context, bool for_write, std::span<const Iova> list);
  void TakeOverFigures(Side& side, uint64_t at_most);

  // world_bytes.cc
  void Read(const Operation& o);
  void Write(const Operation& o);
  void Copy(const Operation& o);
  void ReadPinned(const Operation& o);
  // Bytes of guest memory, in parts of one page: visit(Backing, offset in the page, bytes done
  // before, bytes). REQUIRES: all of it is mapped.
  template <typename Visit>
  void ForEachPart(uint64_t iova, uint64_t size, const Visit& visit) const;
  std::byte* TrueBytes(Backing page);
  void CompareBytes(uint64_t iova, std::span<const std::byte> got);
  // What the bytes are after a copy that failed half-way is undefined.
  void TakeOverBytes(uint64_t iova, uint64_t size);
  bool ShowSameFilePage(uint64_t a, uint64_t b, uint64_t size) const;

  // world_dirty.cc
  void ReadDirty(const Operation& o);
  void CompareDirty(Side& side, Pages pages, uint64_t bit_pages, std::span<const uint64_t> bitmap);

  // world_compare.cc
  void Compare(bool thoroughly);
  void CompareContainer();
  void CompareSide(Side& side, bool thoroughly);
  void CompareAddress(Side& side, uint64_t page);
  void CompareHolders(Side& side, Pages pages);
  void CompareWatch(Side& side);
  void SetWatch(const Operation& o);

  // Where the step is: in a mapping, mostly, or anywhere.
  Pages PagesOf(const Operation& o, uint64_t at_most) const;
  Side& side_of(const Operation& o) { return sides_[o.domain % kSides]; }
  std::byte* HostOf(Backing backing) const;  // null: the file is not mapped
  Verdict VerdictOnAccess(const Side& side, Pages pages, Access access, bool remote) const;
  Domain* DomainAt(int index);

  template <typename... Args>
  void Complain(fmt::format_string<Args...> format, Args&&... args) {
    if (problem_.empty()) problem_ = fmt::format(format, std::forward<Args>(args)...);
  }
  template <typename Outcome>
  void ExpectVerdict(const Verdict& expected, const Outcome& outcome, std::string_view what) {
    const Verdict got = outcome.has_value() ? Verdict() : Verdict(outcome.error().code());
    if (got == expected) return;
    Complain("{}: the answer is {}, it should be {}", what,
             got ? outcome.error().message() : "success", expected ? NameOf(*expected) : "success");
  }
  static std::string_view NameOf(ErrorCode code) { return ErrorCodeName(code); }
  void ExpectSame(uint64_t got, uint64_t expected, std::string_view what) {
    if (got != expected) Complain("{} is {}, it should be {}", what, got, expected);
  }

  GuestFiles& files_;
  FakeVmm vmm_;
  Container container_;
  RefusingDomain refusing_;
  std::array<Side, kSides> sides_;

  // The naive model of the container.
  NaiveMemory memory_;
  std::vector<int> domains_;  // attached, in that order; kSides is the refusing one
  Parts going_;               // while an unmap is under way
  NaiveBytes bytes_;

  Pages last_;  // what the step was about
  uint64_t steps_ = 0;
  std::string problem_;
};

}  // namespace mvgpu::domain::model
