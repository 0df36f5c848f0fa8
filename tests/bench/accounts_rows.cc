#include "tests/bench/accounts_table.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <bit>
#include <random>
#include <string>
#include <utility>

#include "apionly-domain/accounting/ledger.h"
#include "apionly-domain/accounting/ledger_view.h"
#include "apionly-domain/base/check.h"
#include "apionly-domain/memory/guest_file.h"
#include "backend/audit/report.h"
#include "backend/audit/verify.h"
#include "tests/bench/baselines/flat_counters.h"
#include "tests/bench/bench_guest.h"
#include "tests/bench/page_slices.h"
#include "tests/bench/temp_ledger.h"

namespace mvgpu::bench {

namespace {

using domain::FileIdentity;
using domain::Ledger;
using domain::LedgerRow;

constexpr FileIdentity kRam{1, 100};
constexpr uint64_t kRun = 64;

// A ledger in a directory of its own, in memory, and domains that join it.
class Accounts {
 public:
  explicit Accounts(uint64_t memory) : pages_(PagesIn(memory)), ledger_(place_.open()) {}

  // Another process's half of it.
  std::unique_ptr<Ledger> Open() const { return place_.open(); }
  std::unique_ptr<LedgerRow> join() const { return Join(*ledger_); }
  static std::unique_ptr<LedgerRow> Join(Ledger& ledger) {
    auto row = ledger.join(domain::DomainKind::kApiOnly, "bench", "none");
    MVGPU_CHECK(row.has_value());
    return std::move(*row);
  }
  void hold(LedgerRow& row, PageRun run) const {
    MVGPU_CHECK(row.hold(kRam, pages_, run).has_value());
  }
  void hold_and_release(LedgerRow& row, PageRun run) const {
    hold(row, run);
    row.release(kRam, run);
  }
  uint64_t pages() const { return pages_; }
  UniqueFd file() const { return UniqueFd(::open(place_.path().c_str(), O_RDONLY | O_CLOEXEC)); }
  const std::string& dir() const { return place_.dir(); }
  double bytes() const {
    struct stat st = {};
    MVGPU_CHECK(stat(place_.path().c_str(), &st) == 0);
    return static_cast<double>(st.st_blocks) * 512;
  }

 private:
  const uint64_t pages_;
  TempLedger place_;
  std::unique_ptr<Ledger> ledger_;  // of the place: goes first
};

// Two rows, of which the lower one pays by default.
struct TwoDomains {
  explicit TwoDomains(uint64_t memory) : accounts(memory), rows{accounts.join(), accounts.join()} {}
  Accounts accounts;
  std::array<std::unique_ptr<LedgerRow>, 2> rows;
};

// One domain holds all memory; the other one takes and lets go of one run after another. No run
// begins at a word of the bitmap.
Comparison SharedRuns(const Settings& settings, size_t sharer) {
  const auto two = std::make_shared<TwoDomains>(settings.memory);
  const std::shared_ptr<void> held(nullptr, [two, sharer](void*) {
    two->rows[1 - sharer]->release(kRam, {0, two->accounts.pages()});
  });
  two->accounts.hold(*two->rows[1 - sharer], {0, two->accounts.pages()});
  const uint64_t count = settings.work(128 << 10);
  const uint64_t runs = std::min<uint64_t>(two->accounts.pages() / kRun - 1, 4096);
  const auto counter = std::make_shared<std::atomic<uint64_t>>();
  return {
      Timed(count,
            [two, held, sharer, count, runs](uint64_t) {
              for (uint64_t i = 0; i < count; ++i) {
                two->accounts.hold_and_release(*two->rows[sharer], {i % runs * kRun + 17, kRun});
              }
            }),
      Timed(count, [counter, count](uint64_t) {
        for (uint64_t i = 0; i < count; ++i) counter->fetch_add(1);
      })};
}

struct RandomPages {
  explicit RandomPages(const Settings& settings)
      : accounts(settings.memory),
        row(accounts.join()),
        slices(GuestPages(accounts.pages(), Layout{}).random(settings.work(2 << 20), 1),
               settings.work(256 << 10)) {}
  void hold_and_release(uint64_t round) const {
    for (const Iova page : slices.round(round)) accounts.hold_and_release(*row, {page.page(), 1});
  }

  Accounts accounts;
  std::unique_ptr<LedgerRow> row;
  PageSlices slices;
};

template <typename Count>
Side RandomAdds(const RandomPages& pages, uint64_t count) {
  const auto counts = std::make_shared<std::vector<std::atomic<Count>>>(count);
  const PageSlices& slices = pages.slices;
  return Timed(slices.per_round(), [counts, slices, count](uint64_t round) {
    for (const Iova page : slices.round(round)) (*counts)[page.page() % count].fetch_add(1);
  });
}

// A process that takes and lets go of pages of the upper half of memory while it is told to.
class Neighbour {
 public:
  explicit Neighbour(const Accounts& accounts)
      : go_(static_cast<std::atomic<bool>*>(
            mmap(nullptr, kPageSize, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0))) {
    MVGPU_CHECK(go_ != MAP_FAILED);
    child_ = fork();
    MVGPU_CHECK(child_ >= 0);
    if (child_ != 0) return;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    StayOn(1);
    const auto ledger = accounts.Open();
    const auto row = Accounts::Join(*ledger);
    std::minstd_rand random(2);
    const uint64_t half = accounts.pages() / 2;
    while (true) {
      if (!go_->load(std::memory_order_relaxed)) usleep(50);
      while (go_->load(std::memory_order_relaxed)) {
        accounts.hold_and_release(*row, {half + random() % half, 1});
      }
    }
  }
  ~Neighbour() {
    kill(child_, SIGKILL);
    waitpid(child_, nullptr, 0);
    munmap(go_, kPageSize);
  }
  Neighbour(const Neighbour&) = delete;
  Neighbour& operator=(const Neighbour&) = delete;
  void tell(bool go) const { go_->store(go); }

 private:
  std::atomic<bool>* go_;
  pid_t child_ = -1;
};

// Pages of the lower half, with and without a neighbour at work.
Comparison TwoProcesses(const Settings& settings) {
  const auto accounts = std::make_shared<Accounts>(settings.memory);
  const auto neighbour = std::make_shared<Neighbour>(*accounts);
  const std::shared_ptr<LedgerRow> row = accounts->join();
  const uint64_t count = settings.work(512 << 10);
  const auto work = [accounts, row, count](uint64_t round) {
    std::minstd_rand random(static_cast<unsigned>(round + 1));
    for (uint64_t i = 0; i < count; ++i) {
      accounts->hold_and_release(*row, {random() % (accounts->pages() / 2), 1});
    }
  };
  const Side timed = Timed(count, work);
  return {[neighbour, timed](uint64_t round) {
            StayOn(0);
            neighbour->tell(true);
            usleep(1000);
            const double ns = timed(round);
            neighbour->tell(false);
            return ns;
          },
          [timed](uint64_t round) {
            StayOn(0);
            usleep(1000);
            return timed(round);
          }};
}

// What the file grows by when a domain that holds one page goes on to hold all.
double BytesForAll(const Accounts& accounts, LedgerRow& row) {
  accounts.hold(row, {0, 1});
  const double before = accounts.bytes();
  accounts.hold(row, {1, accounts.pages() - 1});
  return accounts.bytes() - before;
}

double BitsForEachOwner(uint64_t memory) {
  const Accounts accounts(memory);
  const auto row = accounts.join();
  const double bytes = BytesForAll(accounts, *row);
  row->release(kRam, {0, accounts.pages()});
  return bytes * 8 / static_cast<double>(accounts.pages());
}

// A lower row that comes later has all payers named.
double BytesForSharing(uint64_t memory) {
  const TwoDomains two(memory);
  BytesForAll(two.accounts, *two.rows[1]);
  const double bytes = BytesForAll(two.accounts, *two.rows[0]);
  for (const auto& row : two.rows) row->release(kRam, {0, two.accounts.pages()});
  const auto pages = static_cast<double>(two.accounts.pages());
  return bytes / pages - 1.0 / 8;
}

// The ledger of a domain that holds a sixteenth of memory, here and there.
struct Scattered {
  explicit Scattered(uint64_t memory) : accounts(memory), row(accounts.join()) {
    auto file_of_ram = domain::GuestFile::Create(MakeFile(memory));
    MVGPU_CHECK(file_of_ram.has_value());
    ram = std::move(*file_of_ram);
    for (uint64_t i = 0; i < accounts.pages() / 16; ++i) {
      pages.push_back(i * 16 + i * 7919 % 16);
      MVGPU_CHECK(row->hold(ram->identity(), ram->pages(), {pages.back(), 1}).has_value());
    }
    struct stat st = {};
    const UniqueFd file = accounts.file();
    MVGPU_CHECK(fstat(file.get(), &st) == 0);
    size = static_cast<size_t>(st.st_size);
    mapped = static_cast<const uint64_t*>(
        mmap(nullptr, size, PROT_READ, MAP_SHARED | MAP_POPULATE, file.get(), 0));
    MVGPU_CHECK(mapped != MAP_FAILED);
  }
  ~Scattered() {
    munmap(const_cast<uint64_t*>(mapped), size);
    for (const uint64_t page : pages) row->release(ram->identity(), {page, 1});
  }

  Accounts accounts;
  std::unique_ptr<LedgerRow> row;
  std::unique_ptr<domain::GuestFile> ram;  // mapped, or it would be a finding
  std::vector<uint64_t> pages;
  size_t size;
  const uint64_t* mapped;
};

// Against the summing up of all of the mapped file.
template <typename Read>
Comparison AgainstSummingUp(const Settings& settings, Read read) {
  const auto subject = std::make_shared<Scattered>(settings.memory);
  constexpr uint64_t kReads = 20;
  return {Timed(kReads,
                [subject, read](uint64_t) {
                  for (uint64_t i = 0; i < kReads; ++i) read(*subject);
                }),
          Timed(kReads, [subject](uint64_t) {
            for (uint64_t i = 0; i < kReads; ++i) {
              uint64_t sum = i;
              for (size_t word = 0; word < subject->size / 8; ++word) sum += subject->mapped[word];
              Keep(sum);
            }
          })};
}

void ReadScattered(const Scattered& subject) {
  const auto dir = domain::RuntimeDir::OpenForReading(subject.accounts.dir());
  MVGPU_CHECK(dir.has_value());
  const auto snapshot = domain::ReadLedger(*dir, TempLedger::kVm);
  MVGPU_CHECK(snapshot && domain::ProblemsOf(*snapshot).empty() &&
              snapshot->charged_pages() == subject.pages.size());
}

// What `mvgpu-audit verify` does, without starting the program: the ledger's own invariants, the
// owners, what the kernel counts for them and which files they map.
void VerifyScattered(const Scattered& subject) {
  const auto report = backend::Audit(subject.accounts.dir(), TempLedger::kVm);
  MVGPU_CHECK(report && report->vms.size() == 1 &&
              report->vms[0].ledger.charged_pages() == subject.pages.size());
  MVGPU_CHECK(backend::Verify(*report).empty());
}

}  // namespace

void MeasureAccounts(Table* table) {
  const Settings& settings = table->settings();
  table->compare("charge + release, 64 pages that an earlier domain holds", "one atomic add",
                 Target::AtMost(8), [&] { return Result<Comparison>(SharedRuns(settings, 1)); });
  table->compare("charge + release, 64 pages that a later domain holds", "one atomic add",
                 Target::AtMost(8), [&] { return Result<Comparison>(SharedRuns(settings, 0)); });

  Lazy<std::shared_ptr<RandomPages>> random([&] {
    return std::make_unique<std::shared_ptr<RandomPages>>(std::make_shared<RandomPages>(settings));
  });
  const auto random_pages = [&](Side baseline) {
    const auto pages = random.get();
    return Result<Comparison>({Timed(pages->slices.per_round(),
                                     [pages](uint64_t round) { pages->hold_and_release(round); }),
                               std::move(baseline)});
  };
  table->compare(
      "charge + release, one random page", "one atomic add to a byte for each page",
      Target::AtMost(3), [&] {
        return random_pages(RandomAdds<uint8_t>(*random.get(), random.get()->accounts.pages()));
      });
  table->compare(
      "charge + release, one random page, against a bitmap",
      "one atomic add to a byte for each 8 pages", {}, [&] {
        return random_pages(RandomAdds<uint8_t>(*random.get(), random.get()->accounts.pages() / 8));
      });
  table->compare("charge + release, one random page, two processes", "one process alone",
                 Target::AtMost(1.2), [&] { return Result<Comparison>(TwoProcesses(settings)); });
  table->measure("memory per page and owner, after the first page", "bits", "growth of the file",
                 Target::AtMost(1),
                 [&] { return Result<double>(BitsForEachOwner(settings.memory)); });
  table->measure("memory per shared page, beyond its owners' bits", "bytes", "growth of the file",
                 Target::AtMost(2),
                 [&] { return Result<double>(BytesForSharing(settings.memory)); });
  const auto scattered = [&](std::string name, Target target, auto read) {
    table->compare(std::move(name), "summing up the mapped file", target,
                   [&] { return Result<Comparison>(AgainstSummingUp(settings, read)); });
  };
  scattered("verify, every 16th page held here and there", Target::AtMost(10), VerifyScattered);
  scattered("reading alone, every 16th page held here and there", {}, ReadScattered);
  MeasureHandOver(table);
}

}  // namespace mvgpu::bench
