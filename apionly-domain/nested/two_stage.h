#pragma once

// Two stages of translation, one behind the other: the guest's tables, whose addresses are inputs
// of the hypervisor's (VT-d with PGTT 3, SMMUv3 with configuration 7). Each table of stage 1 is
// found through stage 2, and so is the result:
//
//   device address --stage 1--> intermediate address --stage 2--> guest-physical address
//                     |
//                     tables at intermediate addresses --stage 2--> guest memory
//
// What is allowed is what both allow; a span is the smaller of both. A fault of stage 2 says what
// went into stage 2, whether that was a table's address (on_table) or the result of stage 1, and
// what the device used.

#include <cstdint>
#include <span>

#include "apionly-domain/nested/guest_tables.h"
#include "apionly-domain/nested/table_walker.h"

namespace mvgpu::domain {

// Tables of stage 1, read through stage 2. Their accessed and dirty flags need the right to write.
class StageTwoTables final : public GuestTables {
 public:
  // All outlive this. `memory` is where stage 2 leads to.
  StageTwoTables(const TableWalker* stage2, uint64_t stage2_root, const GuestTables* memory)
      : stage2_(*stage2), root_(stage2_root), memory_(*memory) {}

  tl::expected<void, Fault> load(uint64_t address, std::span<uint64_t> words) const override;
  tl::expected<uint64_t, Fault> compare_exchange(uint64_t address, uint64_t expected,
                                                 uint64_t desired) const override;

 private:
  const TableWalker& stage2_;
  const uint64_t root_;
  const GuestTables& memory_;
};

// The root that walks are given is that of stage 1.
class TwoStageWalker final : public TableWalker {
 public:
  // All outlive this. REQUIRES: stage1 reads its tables through StageTwoTables of the same stage 2
  // and root.
  TwoStageWalker(const TableWalker* stage1, const TableWalker* stage2, uint64_t stage2_root)
      : stage1_(*stage1), stage2_(*stage2), stage2_root_(stage2_root) {}

  WalkResult walk(uint64_t root, uint64_t address, Wanted wanted) const override;
  Stretch walk_pages(uint64_t root, uint64_t address, std::span<PageWord> words) const override;

 private:
  // The last answer of stage 2: good for its whole span, for no more rights than were asked for.
  struct Known {
    uint64_t start = 0;
    Leaf leaf;  // span 0: none
    Rights asked = 0;
    bool answers(uint64_t address, Rights rights) const {
      return address - start < leaf.span && (rights & ~asked) == 0;
    }
  };
  // The page that a word of stage 1 leads to; 0 when stage 2 has nothing there.
  tl::expected<PageWord, Fault> Through(PageWord word, Known* known) const;
  WalkResult Allowed(uint64_t address, Rights rights) const;

  const TableWalker& stage1_;
  const TableWalker& stage2_;
  const uint64_t stage2_root_;
};

}  // namespace mvgpu::domain
