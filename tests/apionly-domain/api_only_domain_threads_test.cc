// The domain under threads: some pin, release, translate and copy while another maps, unmaps and
// splits. Two files, each full of a byte of its own, take turns behind the same windows of IOVAs,
// so whoever reaches memory of a mapping that has gone sees the wrong byte, or two. A third file is
// scribbled on while it is not mapped.
//
// MVGPU_MODEL_STEPS sets the steps of all threads together, about (default 40000; builds with
// sanitizers do less).

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <iostream>
#include <random>
#include <thread>

#include "apionly-domain/container.h"
#include "tests/apionly-domain/ledger_fixture.h"
#include "tests/apionly-domain/model/party.h"
#include "tests/apionly-domain/model/steps.h"
#include "tests/apionly-domain/model/strict_backend.h"

namespace mvgpu::domain {
namespace {

using model::Hold;
using model::Manner;
using model::Party;
using model::StrictBackend;
using testing::FailsWith;
using testing::GuestRam;
using testing::IsOk;
using testing::MakeRange;

constexpr size_t kWorkers = 4;
constexpr uint64_t kWindowPages = 32;
constexpr uint64_t kWindowBytes = kWindowPages * kPageSize;
// Windows whose files change; all show the same pages of a file, so each page has aliases. One lies
// across a granule of the page directory, one across a chunk, one beyond its flat part.
constexpr std::array<uint64_t, 5> kWindows = {
    0, (uint64_t{1} << 21) - 5 * kPageSize, (uint64_t{1} << 30) - 16 * kPageSize,
    (uint64_t{1} << 30) + 64 * kPageSize, uint64_t{1} << 45};
constexpr uint64_t kScribbledWindow = uint64_t{3} << 30;  // shows the third file, or nothing
constexpr size_t kScribbled = 2;
constexpr std::byte kScribble{0xee};
constexpr uint64_t kSteadyWindow = uint64_t{1} << 32;  // always mapped, two pages for each worker

constexpr std::byte ByteOf(size_t file) { return std::byte(0x11 * (file + 1)); }

void Fill(GuestRam& file, std::byte value) {
  std::fill(file.bytes().begin(), file.bytes().end(), value);
}

class ApiOnlyDomainThreadsTest : public LedgerFixture,
                                 public ::testing::WithParamInterface<unsigned> {
 protected:
  ApiOnlyDomainThreadsTest() {
    for (size_t i = 0; i < files_.size(); ++i) {
      Fill(files_[i], ByteOf(i));
    }
    ledger_ = Open();
    auto domain =
        ApiOnlyDomain::Create({.name = "busy", .unmap_deadline = std::chrono::milliseconds(2)},
                              std::make_unique<StrictBackend>(backend_), ledger_.get(), nullptr);
    EXPECT_THAT(domain, IsOk());
    domain_ = std::move(*domain);
    EXPECT_THAT(container_.attach(domain_.get()), IsOk());
    EXPECT_THAT(container_.map(steady_.map_request(kSteadyWindow, 0, steady_.size())), IsOk());
    for (size_t i = 0; i < kWorkers; ++i) {
      parties_.push_back(std::make_unique<Party>(domain_.get(), "party " + std::to_string(i),
                                                 static_cast<Manner>(i % 3)));
    }
    parties_.push_back(std::make_unique<Party>(domain_.get(), "shared", Manner::kAtOnce));
  }

  // What a thread does, with numbers of its own.
  struct Thread {
    size_t index;
    std::mt19937_64 random;
    uint64_t reads = 0;  // that found something
    uint64_t pins = 0;
    uint64_t below(uint64_t limit) { return random() % limit; }
  };

  static Iova AnyPage(Thread& thread, uint64_t* window) {
    const size_t which = thread.below(kWindows.size() + 1);
    *window = which < kWindows.size() ? kWindows[which] : kScribbledWindow;
    return Iova(*window + BytesIn(thread.below(kWindowPages)));
  }

  // All the same, and the byte of one of the files; that one.
  static std::byte ExpectOneFile(std::span<const std::byte> bytes, const char* what) {
    const bool one = std::all_of(bytes.begin(), bytes.end(),
                                 [&](std::byte byte) { return byte == bytes.front(); });
    const bool known = bytes.front() == ByteOf(0) || bytes.front() == ByteOf(1) ||
                       bytes.front() == ByteOf(kScribbled);
    EXPECT_TRUE(one && known) << what << " found " << std::to_integer<int>(bytes.front()) << " to "
                              << std::to_integer<int>(bytes.back());
    return bytes.front();
  }

  // Errors that a thread may meet while another maps and unmaps.
  static void ExpectAway(const Error& error) {
    EXPECT_TRUE(error.code() == ErrorCode::kNotMapped || error.code() == ErrorCode::kBusy)
        << error.message();
  }

  void Work(Thread& thread) {
    const bool shares = thread.below(4) == 0;
    Party& party = shares ? *parties_.back() : *parties_[thread.index];
    party.CatchUp();
    switch (thread.below(12)) {
      case 0:
      case 1:
        return PinRange(thread, party);
      case 2:
        return PinPages(thread, party);
      case 3:
      case 4:
        return party.ReleaseOne(thread.random());
      case 5:
        return party.ReleasePart(thread.random());
      case 6:
        return Read(thread);
      case 7:
        return Copy(thread);
      case 8:
        return KeepTranslation(thread);
      case 9:
        return LookAtHold(thread, party);
      case 10:
        return CountUp(thread);
      default:
        if (!shares && thread.below(50) == 0) party.Reopen();
        static_cast<void>(domain_->holders(MakeRange(kWindows[0], kWindowBytes)));
        static_cast<void>(domain_->counters());
    }
  }

  void PinRange(Thread& thread, Party& party) {
    uint64_t window = 0;
    const Iova first = AnyPage(thread, &window);
    const uint64_t left = window + kWindowBytes - first.value();
    const auto range = MakeRange(first.value(), BytesIn(1 + thread.below(PagesIn(left))));
    const Access access = thread.below(2) == 0 ? Access::kRead : Access::kReadWrite;
    const uint64_t revocations = party.revocations();
    auto pinned = party.context().pin(range, access);
    if (!pinned) return ExpectAway(pinned.error());
    ++thread.pins;
    std::array<std::byte, 64> bytes;
    const PinnedRun& run = pinned->runs().back();
    EXPECT_THAT(domain_->read_pinned(run, run.iova.start(), bytes), IsOk());
    const std::byte value = ExpectOneFile(bytes, "a pin");
    party.Keep({std::move(*pinned), {}, access, range, value}, revocations);
  }

  void PinPages(Thread& thread, Party& party) {
    uint64_t window = 0;
    AnyPage(thread, &window);
    std::vector<Iova> pages(1 + thread.below(100));
    for (Iova& page : pages) page = Iova(window + BytesIn(thread.below(kWindowPages)));
    std::vector<std::byte*> host(pages.size());
    const uint64_t revocations = party.revocations();
    const auto pinned = party.context().pin_pages(pages, Access::kWrite, host);
    if (!pinned) return ExpectAway(pinned.error());
    ++thread.pins;
    EXPECT_THAT(host, ::testing::Each(::testing::NotNull()));
    party.Keep({{}, pages, Access::kWrite, MakeRange(window, kWindowBytes), std::byte{}},
               revocations);
  }

  // What is held stays what it was.
  void LookAtHold(Thread& thread, Party& party) {
    party.LookAtOne(thread.random(), [&](const Hold& hold) {
      if (hold.handle.empty()) return;
      const PinnedRun& run = hold.handle.runs()[thread.below(hold.handle.runs().size())];
      std::array<std::byte, 16> bytes;
      EXPECT_THAT(domain_->read_pinned(run, run.iova.last() + ~uint64_t{15}, bytes), IsOk());
      EXPECT_EQ(ExpectOneFile(bytes, "a held pin"), hold.value);
      const ApiOnlyDomain::Translator translator(*domain_);
      std::byte* host = translator.translate(run.iova.start(), Access::kRead);
      EXPECT_TRUE(host == nullptr || host == run.host) << "pinned, and translated elsewhere";
    });
  }

  void Read(Thread& thread) {
    uint64_t window = 0;
    const Iova at = AnyPage(thread, &window) + thread.below(kPageSize);
    const uint64_t left = window + kWindowBytes - at.value();
    std::vector<std::byte> bytes(1 + thread.below(std::min<uint64_t>(left, 9000)));
    const auto read = domain_->read(at, bytes);
    if (!read) return ExpectAway(read.error());
    ++thread.reads;
    ExpectOneFile(bytes, "a read");
  }

  // From a window to the thread's own page.
  void Copy(Thread& thread) {
    uint64_t window = 0;
    const Iova from = AnyPage(thread, &window);
    const Iova mine(kSteadyWindow + BytesIn(kWorkers + thread.index));
    const auto copied = domain_->copy(mine, from, kPageSize);
    if (!copied) return ExpectAway(copied.error());
    std::array<std::byte, kPageSize> bytes;
    EXPECT_THAT(domain_->read(mine, bytes), IsOk());
    ExpectOneFile(bytes, "a copy");
  }

  // A translation of the same generation is the same, and shows the same file.
  void KeepTranslation(Thread& thread) {
    uint64_t window = 0;
    const Iova at = AnyPage(thread, &window);
    uint64_t generation = 0;
    std::byte* host = nullptr;
    {
      const ApiOnlyDomain::Translator translator(*domain_);
      generation = translator.generation(at);
      host = translator.translate(at, Access::kRead);
    }
    if (host == nullptr) return;
    std::array<std::byte, 2> seen;
    for (std::byte& byte : seen) {
      if (!domain_->read(at, {&byte, 1})) return;
      std::this_thread::yield();
    }
    const ApiOnlyDomain::Translator translator(*domain_);
    std::byte* again = translator.translate(at, Access::kRead);
    if (translator.generation(at) != generation) return;  // by the time of the lookup or later
    EXPECT_TRUE(again == nullptr || again == host) << "same generation, other translation";
    ExpectOneFile(seen, "two reads in one generation");
  }

  // Each worker alone writes its page of the window that stays.
  void CountUp(Thread& thread) {
    const Iova mine(kSteadyWindow + BytesIn(thread.index));
    uint64_t count = 0;
    EXPECT_THAT(domain_->read(mine, std::as_writable_bytes(std::span(&count, 1))), IsOk());
    EXPECT_EQ(count, counted_[thread.index]);
    ++count;
    EXPECT_THAT(domain_->write(mine, std::as_bytes(std::span(&count, 1))), IsOk());
    counted_[thread.index] = count;
    if (thread.index == 0) LogOneWrite(mine, count);
  }

  // Only one worker touches the log, and its page: what it writes while the log is on is there.
  void LogOneWrite(Iova mine, uint64_t count) {
    if (count % 16 == 0) domain_->start_dirty_log();
    EXPECT_THAT(domain_->write(mine, std::as_bytes(std::span(&count, 1))), IsOk());
    uint64_t bitmap = 0;
    const auto page = MakeRange(mine.value(), kPageSize);
    const auto read = domain_->read_dirty(page, kPageSize, DirtyLog::Read::kClear, {&bitmap, 1});
    if (count < 16) {
      EXPECT_THAT(read, FailsWith(ErrorCode::kInvalid));
    } else {
      EXPECT_EQ(bitmap, 1u);
    }
  }

  // Gives a window another file, in one piece or in two; takes it away as a whole or by halves.
  void ChangeMappings(Thread& thread) {
    if (thread.below(4) == 0) return Scribble();
    const uint64_t window = kWindows[thread.below(kWindows.size())];
    const auto cut = thread.below(3) == 0 ? Container::Cut::kSplit : Container::Cut::kRefuse;
    const uint64_t part =
        cut == Container::Cut::kSplit ? BytesIn(1 + thread.below(kWindowPages - 1)) : kWindowBytes;
    if (part != kWindowBytes) {
      const auto half = container_.unmap(Iova(window), part, cut);
      if (!half) {
        EXPECT_EQ(half.error().code(), ErrorCode::kBusy) << half.error().message();
      }
    }
    const auto unmapped = container_.unmap(Iova(window), kWindowBytes);
    if (!unmapped) {
      EXPECT_EQ(unmapped.error().code(), ErrorCode::kBusy) << unmapped.error().message();
      ++refused_;
      return;
    }
    unmapped_ += *unmapped != 0 ? 1 : 0;
    const GuestRam& file = files_[thread.below(kScribbled)];
    EXPECT_THAT(container_.map(file.map_request(window, 0, part)), IsOk());
    if (part == kWindowBytes) return;
    EXPECT_THAT(container_.map(file.map_request(window + part, part, kWindowBytes - part)), IsOk());
  }

  // Nobody may see what happens to a file while it is not mapped.
  void Scribble() {
    const auto unmapped = container_.unmap(Iova(kScribbledWindow), kWindowBytes);
    if (!unmapped) {
      EXPECT_EQ(unmapped.error().code(), ErrorCode::kBusy) << unmapped.error().message();
      ++refused_;
      return;
    }
    GuestRam& file = files_[kScribbled];
    Fill(file, kScribble);
    std::this_thread::yield();
    Fill(file, ByteOf(kScribbled));
    EXPECT_THAT(container_.map(file.map_request(kScribbledWindow, 0, kWindowBytes)), IsOk());
  }

  void Run() {
    std::atomic<bool> over{false};
    std::vector<Thread> states;
    for (size_t i = 0; i <= kWorkers; ++i) {
      states.push_back({i, std::mt19937_64(GetParam() * 100 + i)});
    }
    std::thread mapper([&] {
      while (!over.load() && !HasFailure()) ChangeMappings(states[kWorkers]);
    });
    std::thread reader([&] {  // nearly always in a copy when the window goes
      std::vector<std::byte> bytes(kWindowBytes);
      while (!over.load() && !HasFailure()) {
        const auto read = domain_->read(Iova(kScribbledWindow), bytes);
        if (read) ExpectOneFile(bytes, "a long read");
      }
    });
    std::vector<std::thread> workers;
    for (size_t i = 0; i < kWorkers; ++i) {
      workers.emplace_back([this, &thread = states[i]] {
        const uint64_t steps = model::StepsFromEnvironment() / kWorkers;
        while (unmapped_ == 0) std::this_thread::yield();
        for (uint64_t step = 0; step < steps && !HasFailure(); ++step) {
          Work(thread);
          if (step % 16 == 0) std::this_thread::yield();  // on one processor too they take turns
        }
      });
    }
    for (std::thread& worker : workers) worker.join();
    over = true;
    mapper.join();
    reader.join();
    for (const Thread& thread : states) {
      reads_ += thread.reads;
      pins_ += thread.pins;
    }
  }

  std::array<GuestRam, 3> files_ = {GuestRam(kWindowBytes), GuestRam(kWindowBytes),
                                    GuestRam(kWindowBytes)};
  GuestRam steady_{2 * kWorkers * kPageSize};
  std::shared_ptr<StrictBackend::State> backend_ = std::make_shared<StrictBackend::State>();
  std::unique_ptr<Ledger> ledger_;
  Container container_;
  std::unique_ptr<ApiOnlyDomain> domain_;
  std::vector<std::unique_ptr<Party>> parties_;  // one for each worker, and a shared one
  std::array<uint64_t, kWorkers> counted_ = {};
  std::atomic<uint64_t> unmapped_{0};
  uint64_t refused_ = 0;
  uint64_t reads_ = 0;
  uint64_t pins_ = 0;
};

TEST_P(ApiOnlyDomainThreadsTest, NobodySeesMemoryThatHasGoneAndNothingIsLeft) {
  Run();
  std::cout << pins_ << " pins, " << reads_ << " reads, " << unmapped_ << " unmaps, " << refused_
            << " refused\n";
  EXPECT_GT(pins_, 0u);
  EXPECT_GT(reads_, 0u);
  EXPECT_EQ(backend_->problem, "");

  for (const auto& party : parties_) party->ReleaseAll();
  const ApiOnlyDomain::Counters counters = domain_->counters();
  EXPECT_EQ(counters.pinned_pages, 0u);
  EXPECT_EQ(counters.unique_pages, 0u);
  EXPECT_EQ(counters.charged_pages, 0u);
  EXPECT_EQ(counters.locked_pages, 0u);
  EXPECT_TRUE(backend_->pages.empty());
  EXPECT_EQ(Look().unique_pages, 0u);
  ExpectInOrder();

  parties_.clear();
  EXPECT_THAT(container_.detach(domain_.get()), IsOk());
  domain_.reset();
  ledger_.reset();
  EXPECT_FALSE(ledger_exists());
}

INSTANTIATE_TEST_SUITE_P(Seeds, ApiOnlyDomainThreadsTest, ::testing::Range(1u, 5u));

}  // namespace
}  // namespace mvgpu::domain
