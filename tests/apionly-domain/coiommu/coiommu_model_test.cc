// Random maps, unmaps, scans and balloons, against a reference without tables and lists.

#include <map>
#include <random>

#include "tests/apionly-domain/coiommu/coiommu_fixture.h"

namespace mvgpu::domain {
namespace {

// What each frame is, by the rules alone.
class Reference {
 public:
  Reference(uint64_t limit, uint32_t busy_rounds, uint32_t old_every)
      : limit_(limit), busy_rounds_(busy_rounds), old_every_(old_every) {}

  bool map(uint64_t frame) {
    Frame& it = frames_[frame];
    it.accessed = true;
    if (!it.pinned && pinned() >= limit_) return false;
    if (!it.pinned) it = {it.count, true, true, 0};
    ++it.count;
    return true;
  }
  void unmap(uint64_t frame) { --frames_[frame].count; }
  uint64_t count(uint64_t frame) { return frames_[frame].count; }
  void scan() {
    ++round_;
    for (auto& [number, frame] : frames_) {
      const bool is_old = frame.busy >= busy_rounds_;
      if (!frame.pinned || (is_old && round_ % old_every_ != 0)) continue;
      if (frame.count == 0 && !frame.accessed) {
        frame.pinned = false;
        continue;
      }
      frame.accessed = false;
      ++frame.busy;
    }
  }
  bool balloon(uint64_t frame) {
    Frame& it = frames_[frame];
    if (!it.pinned) return true;
    it.accessed = false;
    if (it.count != 0) return false;
    it.pinned = false;
    return true;
  }
  uint64_t pinned() const { return pinned_frames().size(); }
  std::set<uint64_t> pinned_frames() const {
    std::set<uint64_t> pinned;
    for (const auto& [number, frame] : frames_) {
      if (frame.pinned) pinned.insert(number);
    }
    return pinned;
  }
  uint32_t word(uint64_t number) const {
    const auto found = frames_.find(number);
    if (found == frames_.end()) return 0;
    const Frame& frame = found->second;
    return static_cast<uint32_t>(frame.count) | (frame.accessed ? 1u << 30 : 0) |
           (frame.pinned ? 1u << 31 : 0);
  }

 private:
  struct Frame {
    uint64_t count = 0;
    bool accessed = false;
    bool pinned = false;
    uint32_t busy = 0;
  };
  const uint64_t limit_;
  const uint32_t busy_rounds_;
  const uint32_t old_every_;
  uint64_t round_ = 0;
  std::map<uint64_t, Frame> frames_;
};

class CoiommuModelTest : public CoiommuTest, public ::testing::WithParamInterface<unsigned> {};

TEST_P(CoiommuModelTest, PinsAreThoseOfTheReference) {
  std::mt19937_64 random(GetParam());
  const uint64_t limit = GetParam() % 2 == 0 ? UINT64_MAX : 40;
  Begin({.max_pinned_pages = limit, .busy_rounds = 3, .old_every = 4});
  Reference reference(limit, 3, 4);
  for (int i = 0; i < 2500; ++i) {
    const uint64_t frame = random() % 150;
    switch (random() % 8) {
      case 0:
        reference.scan();
        pins_of_guest_->scan();
        break;
      case 1:
        ASSERT_EQ(pins_of_guest_->release_for_balloon(frame), reference.balloon(frame));
        break;
      case 2:
      case 3:
      case 4:
        ASSERT_EQ(guest_->map(frame), reference.map(frame)) << "step " << i;
        break;
      default:
        if (reference.count(frame) == 0) break;
        reference.unmap(frame);
        guest_->unmap(frame);
    }
    ASSERT_EQ(Shown(), reference.pinned_frames()) << "step " << i;
    ASSERT_EQ(Word(frame), reference.word(frame)) << "step " << i;
  }
  for (uint64_t frame = 0; frame < 150; ++frame) ASSERT_EQ(Word(frame), reference.word(frame));
  ExpectConsistent();
}

INSTANTIATE_TEST_SUITE_P(Seeds, CoiommuModelTest, ::testing::Range(1u, 7u));

}  // namespace
}  // namespace mvgpu::domain
