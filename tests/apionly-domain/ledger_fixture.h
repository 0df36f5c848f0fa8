#pragma once

#include <ftw.h>
#include <gmock/gmock.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <functional>
#include <iterator>
#include <memory>
#include <string>
#include <string_view>

#include "apionly-domain/accounting/ledger.h"
#include "apionly-domain/accounting/ledger_view.h"
#include "apionly-domain/accounting/runtime_dir.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::domain {

inline constexpr char kVm[] = "0a1b2c3d-0000-4000-8000-00000000abcd";
inline constexpr FileIdentity kRam{1, 100};
inline constexpr FileIdentity kOtherRam{1, 101};

// A runtime directory of its own, and verbs to look at what lies in it.
class LedgerFixture : public ::testing::Test {
 protected:
  LedgerFixture() {
    // Ledgers live on a tmpfs; a disk has to zero what is allocated.
    std::string pattern = (access("/dev/shm", W_OK) == 0 ? "/dev/shm/" : ::testing::TempDir()) +
                          "mvgpu-ledger-XXXXXX";
    EXPECT_NE(mkdtemp(pattern.data()), nullptr);
    dir_ = pattern;
  }
  ~LedgerFixture() override {
    nftw(
        dir_.c_str(), [](const char* path, const struct stat*, int, FTW*) { return remove(path); },
        8, FTW_DEPTH | FTW_PHYS);
  }

  std::string path() const { return dir_ + "/" + kVm + ".ledger"; }
  bool ledger_exists() const { return access(path().c_str(), F_OK) == 0; }
  ino_t inode() const {
    struct stat st = {};
    return stat(path().c_str(), &st) == 0 ? st.st_ino : 0;
  }

  Result<std::unique_ptr<Ledger>> TryOpen() const { return Ledger::Open({dir_, kVm}); }
  std::unique_ptr<Ledger> Open() const {
    auto ledger = TryOpen();
    EXPECT_THAT(ledger, testing::IsOk());
    return ledger ? std::move(*ledger) : nullptr;
  }
  static std::unique_ptr<LedgerRow> Join(Ledger& ledger, std::string_view name = "domain") {
    auto row = ledger.join(DomainKind::kApiOnly, name, "mlock");
    EXPECT_THAT(row, testing::IsOk());
    return row ? std::move(*row) : nullptr;
  }

  Result<LedgerSnapshot> TryLook() const {
    auto dir = RuntimeDir::OpenForReading(dir_);
    if (!dir) return tl::unexpected<Error>(dir.error());
    return ReadLedger(*dir, kVm);
  }
  LedgerSnapshot Look() const {
    auto snapshot = TryLook();
    EXPECT_THAT(snapshot, testing::IsOk());
    return snapshot ? std::move(*snapshot) : LedgerSnapshot();
  }
  void ExpectInOrder() const { EXPECT_THAT(ProblemsOf(Look()), ::testing::IsEmpty()); }

  std::string ReadBytes() const {
    std::ifstream in(path(), std::ios::binary);
    return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
  }
  void WriteBytes(std::string_view bytes) const {
    unlink(path().c_str());
    std::ofstream(path(), std::ios::binary)
        .write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    EXPECT_EQ(chmod(path().c_str(), 0600), 0);
  }

  // Runs `work` in a child; it is expected to be killed and not to return.
  static pid_t Fork(const std::function<void()>& work) {
    const pid_t child = fork();
    if (child == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);  // a test that fails leaves nobody behind
      work();
      _exit(99);
    }
    return child;
  }
  static void Kill(pid_t child) {
    kill(child, SIGKILL);
    int status = 0;
    EXPECT_EQ(waitpid(child, &status, 0), child);
    EXPECT_TRUE(WIFSIGNALED(status)) << "the child left by itself with " << WEXITSTATUS(status);
  }

  std::string dir_;
};

inline bool operator==(const LedgerRow::Counts& a, const LedgerRow::Counts& b) {
  return a.unique_pages == b.unique_pages && a.charged_pages == b.charged_pages;
}
inline void PrintTo(const LedgerRow::Counts& counts, std::ostream* os) {
  *os << counts.unique_pages << " unique, " << counts.charged_pages << " charged";
}

}  // namespace mvgpu::domain
