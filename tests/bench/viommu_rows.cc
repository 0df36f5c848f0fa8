// A guest's IOMMU with two stages: a translation that is remembered, against one of the domain
// alone; a walk, against the loads that it consists of.

#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "apionly-domain/viommu/vtd_iommu.h"
#include "tests/bench/bench_guest.h"
#include "tests/bench/seeds_table.h"

namespace mvgpu::bench {

namespace {

using domain::Access;

constexpr domain::SourceId kSource = 0x3a91;
constexpr domain::Pasid kPasid = 0x12345;
constexpr uint64_t kRoot = 0x1000 | 1 << 10;  // scalable mode
constexpr uint64_t kFirstRoot = uint64_t{16} << 20;
constexpr uint64_t kSecondRoot = kFirstRoot + kPageSize;

// Guest memory with two stages of tables, four levels each, all in leaves of 4 KiB. Each page has a
// table of its own in both stages' last level, as pages have that lie far apart.
class NestedTables final : private domain::VtdIommu::Owner {
 public:
  NestedTables(uint64_t memory, uint64_t pages)
      : guest_(Layout::OneMapping(memory), domain::MakeNonePinBackend()) {
    Put(0x13a8, 0x2001);        // root table, upper half of bus 0x3a
    Put(0x2220, 0x20'0e1d);     // context entry of 12.1
    Put(0x20'2468, 0x21'0001);  // PASID directory
    const uint64_t entry[] = {kSecondRoot | 0xc9, 0x180'0042, kFirstRoot};
    for (size_t i = 0; i < std::size(entry); ++i) Put(0x21'0140 + i * 8, entry[i]);
    for (uint64_t i = 0; i < pages; ++i) {
      const uint64_t gva = kVirtual + i * (kApart + kPageSize);
      const uint64_t gpa = memory / 2 + i * (kApart + kPageSize);
      Enter(kFirstRoot, gva, gpa, kFirstTable, kFirstLeaf);
      gvas_.push_back(gva);
      gpas_.push_back(Iova(gpa));
      guest_.touch(Iova(gpa), 1);
    }
    const std::vector<uint64_t> first_tables = tables_;
    for (const uint64_t table : first_tables) Enter(kSecondRoot, table, table, kSecond, kSecond);
    Enter(kSecondRoot, kFirstRoot, kFirstRoot, kSecond, kSecond);
    for (const Iova gpa : gpas_) Enter(kSecondRoot, gpa.value(), gpa.value(), kSecond, kSecond);
    iommu_.set_root(kRoot);
    iommu_.set_translating(true);
    std::mt19937_64 random(1);
    std::vector<size_t> order(pages);
    std::iota(order.begin(), order.end(), size_t{0});
    std::shuffle(order.begin(), order.end(), random);
    for (const size_t i : order) {
      shuffled_gvas_.push_back(gvas_[i]);
      shuffled_gpas_.push_back(gpas_[i]);
    }
  }

  size_t pages() const { return gvas_.size(); }
  // Each page once, in the same order in all of these.
  void translate() {
    uint64_t sum = 0;
    for (const uint64_t gva : shuffled_gvas_) {
      const auto target = iommu_.translate(Request(gva));
      MVGPU_CHECK(target.has_value());
      sum += target->address;
    }
    Keep(sum);
  }
  void translate_plainly() {
    uint64_t sum = 0;
    const domain::ApiOnlyDomain::Translator translator(guest_.domain());
    for (const Iova gpa : shuffled_gpas_) {
      const std::byte* host = translator.translate(gpa, Access::kRead);
      MVGPU_CHECK(host != nullptr);
      sum += reinterpret_cast<uint64_t>(host);
    }
    Keep(sum);
  }
  void walk() {
    uint64_t sum = 0;
    for (const uint64_t gva : shuffled_gvas_) {
      const auto target = translator_.walk(entry_, gva, Access::kRead);
      MVGPU_CHECK(target.has_value());
      sum += target->out;
    }
    Keep(sum);
  }
  // What walk() loads, one load after the other. REQUIRES: `loads` is loads_of_walks().
  void load(const std::vector<const uint64_t*>& loads) {
    uint64_t value = 0;
    for (const uint64_t* at : loads) {
      // A zero that the compiler does not know: the next address waits for the value before.
      uint64_t zero = 0;
      asm volatile("" : "+r"(zero));
      value = *reinterpret_cast<const volatile uint64_t*>(reinterpret_cast<const std::byte*>(at) +
                                                          (value & zero));
    }
    Keep(value);
  }
  // Where the words are that walk() reads, in order.
  std::vector<const uint64_t*> loads_of_walks() {
    std::vector<const uint64_t*> loads;
    for (const uint64_t gva : shuffled_gvas_) {
      uint64_t table = kFirstRoot;
      for (int level = 3; level >= 0; --level) {
        const uint64_t at = table + IndexOf(gva, level) * 8;
        AddSecond(at, &loads);
        loads.push_back(Word(at));
        table = *Word(at) & kFrame;
      }
      AddSecond(table, &loads);
    }
    return loads;
  }

 private:
  static constexpr uint64_t kVirtual = uint64_t{0x7f} << 40;
  static constexpr uint64_t kApart = uint64_t{2} << 20;
  static constexpr uint64_t kFirstTable = 0x27;
  static constexpr uint64_t kFirstLeaf = 0x67;
  static constexpr uint64_t kSecond = 0x3;
  static constexpr uint64_t kFrame = 0xf'ffff'ffff'f000;

  void on_fault_event() override {}
  void on_wait_event() override {}
  void on_interrupt_entries_invalid(const domain::InterruptEntryInvalidation&) override {}

  static domain::VtdRequest Request(uint64_t gva) {
    return {.source = kSource, .pasid = kPasid, .address = gva, .wanted = Access::kRead};
  }
  static uint64_t IndexOf(uint64_t address, int level) { return address >> (12 + 9 * level) & 511; }
  uint64_t* Word(uint64_t gpa) { return reinterpret_cast<uint64_t*>(guest_.host(Iova(gpa))); }
  void Put(uint64_t gpa, uint64_t value) { *Word(gpa) = value; }
  void Enter(uint64_t root, uint64_t address, uint64_t frame, uint64_t table_flags,
             uint64_t leaf_flags) {
    uint64_t table = root;
    for (int level = 3; level > 0; --level) {
      const uint64_t at = table + IndexOf(address, level) * 8;
      if (*Word(at) == 0) {
        tables_.push_back(next_table_);
        Put(at, next_table_ | table_flags);
        next_table_ += kPageSize;
      }
      table = *Word(at) & kFrame;
    }
    Put(table + IndexOf(address, 0) * 8, frame | leaf_flags);
  }
  void AddSecond(uint64_t gpa, std::vector<const uint64_t*>* loads) {
    uint64_t table = kSecondRoot;
    for (int level = 3; level >= 0; --level) {
      const uint64_t at = table + IndexOf(gpa, level) * 8;
      loads->push_back(Word(at));
      table = *Word(at) & kFrame;
    }
  }

  Guest guest_;
  domain::IommuObject object_{domain::IommuObject::Limits{}};
  domain::VtdIommu iommu_{{}, {&guest_.domain(), &object_, this}};
  const domain::DomainTables memory_{&guest_.domain()};
  const domain::VtdTables vtd_tables_{{}, &memory_};
  const domain::VtdTranslator translator_{&vtd_tables_};
  domain::vtd::PasidEntry entry_{{kSecondRoot | 0xc9, 0x180'0042, kFirstRoot}};
  uint64_t next_table_ = kSecondRoot + kPageSize;
  std::vector<uint64_t> tables_;
  std::vector<uint64_t> gvas_;
  std::vector<Iova> gpas_;
  std::vector<uint64_t> shuffled_gvas_;
  std::vector<Iova> shuffled_gpas_;
};

Result<Comparison> Warm(const Settings& settings) {
  const uint64_t pages = settings.quick ? 64 : 512;  // half of what the IOTLB has room for
  const auto subject = std::make_shared<NestedTables>(settings.memory, pages);
  const uint64_t rounds = settings.work(4096);
  return Comparison{Timed(pages * rounds,
                          [=](uint64_t) {
                            for (uint64_t i = 0; i < rounds; ++i) subject->translate();
                          }),
                    Timed(pages * rounds, [=](uint64_t) {
                      for (uint64_t i = 0; i < rounds; ++i) subject->translate_plainly();
                    })};
}

Result<Comparison> Cold(const Settings& settings) {
  const auto subject = std::make_shared<NestedTables>(settings.memory, settings.work(8192));
  const auto loads = std::make_shared<std::vector<const uint64_t*>>(subject->loads_of_walks());
  MVGPU_CHECK(loads->size() == 24 * subject->pages());
  return Comparison{Timed(subject->pages(), [=](uint64_t) { subject->walk(); }),
                    Timed(subject->pages(), [=](uint64_t) { subject->load(*loads); })};
}

}  // namespace

void MeasureVirtualIommus(Table* table) {
  const Settings& settings = table->settings();
  table->compare("nested two-stage translation, warm IOTLB", "a plain translate of the domain",
                 Target::AtMost(2), [&] { return Warm(settings); });
  table->compare("nested two-stage walk, cold IOTLB", "its 24 loads, one after the other",
                 Target::AtMost(1.5), [&] { return Cold(settings); });
}

}  // namespace mvgpu::bench
