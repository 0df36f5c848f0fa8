#include "tests/vm/dma/accounts_proof.h"

#include <linux/capability.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>
#include <map>
#include <string>
#include <utility>

#include "apionly-domain/accounting/ledger.h"
#include "apionly-domain/accounting/ledger_view.h"
#include "apionly-domain/accounting/process_info.h"
#include "apionly-domain/accounting/runtime_dir.h"
#include "apionly-domain/assigned/assigned_domain.h"
#include "apionly-domain/assigned/type1_container.h"

namespace mvgpu::testing {

namespace {

using domain::Access;
using domain::LedgerSnapshot;

constexpr char kRuntimeDir[] = "/tmp/mvgpu";
constexpr char kVm[] = "0a1b2c3d-0000-4000-8000-00000000abcd";
constexpr uint64_t kMiB = uint64_t{1} << 20;
constexpr uint64_t kRamSize = 64 * kMiB;
constexpr uint64_t kMapped = 16 * kMiB;
constexpr uint64_t kPinned = kMiB;
constexpr uint64_t kFirst = 0x1000000;    // where the VMM maps the RAM,
constexpr uint64_t kSecond = 0x10000000;  // and maps it again
constexpr uint64_t kPinAt = kFirst + 3 * kMiB;

class Owner final : public domain::PinOwner {
 public:
  std::string_view pin_owner_name() const override { return "vgpu"; }
  void on_revoke(IovaRange) override {}
};

// Without CAP_IPC_LOCK, and with this limit of locked memory, as long as it lives.
class Unprivileged {
 public:
  explicit Unprivileged(uint64_t limit) {
    getrlimit(RLIMIT_MEMLOCK, &before_);
    const struct rlimit now = {limit, before_.rlim_max};
    MVGPU_CHECK(setrlimit(RLIMIT_MEMLOCK, &now) == 0);
    SetIpcLock(false);
  }
  ~Unprivileged() {
    SetIpcLock(true);
    setrlimit(RLIMIT_MEMLOCK, &before_);
  }

 private:
  static void SetIpcLock(bool is_on) {
    __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    __user_cap_data_struct data[2] = {};
    MVGPU_CHECK(syscall(SYS_capget, &header, data) == 0);
    const uint32_t bit = 1u << CAP_IPC_LOCK;
    data[0].effective = is_on ? data[0].effective | bit : data[0].effective & ~bit;
    MVGPU_CHECK(syscall(SYS_capset, &header, data) == 0);
  }
  struct rlimit before_ = {};
};

// One process's part in the VM: its ledger, container and domain, and the device when it has it.
class Party {
 public:
  Party(Facts* facts, GuestRam* ram, std::string name, domain::DevicePins* device_pins)
      : facts_(*facts), ram_(*ram), device_pins_(device_pins) {
    ledger_ = facts_.must("ledger", domain::Ledger::Open({kRuntimeDir, kVm}));
    vgpu_ = facts_.must("domain", domain::ApiOnlyDomain::Create(
                                      {.name = std::move(name), .device_pins = device_pins},
                                      domain::MakeMlockPinBackend(), ledger_.get(), nullptr));
    facts_.must("attach", container_.attach(vgpu_.get()));
    pins_ = vgpu_->open_context(&owner_);
  }
  ~Party() {
    release();
    facts_.must("unmap all", container_.unmap_all());
    if (device_) unplug();
    pins_.reset();
    facts_.must("detach", container_.detach(vgpu_.get()));
  }

  void map(uint64_t iova) {
    facts_.must("map", container_.map(ram_.map_request(iova, 0, kMapped)));
  }
  void unmap(uint64_t iova) { facts_.must("unmap", container_.unmap(Iova(iova), kMapped)); }
  void pin(uint64_t iova) {
    held_ = facts_.must("pin", pins_->pin(MakeRange(iova, kPinned), Access::kReadWrite));
  }
  void release() { held_.reset(); }

  // The device comes to this process, with its group, and leaves with it.
  void plug(const std::string& group) {
    auto iommu = facts_.must("type1", domain::Type1Container::Create(group));
    edu_ = facts_.must("edu", EduDevice::Open(iommu.get(), facts_.must("edu", FindEdu())));
    space_.emplace(std::move(iommu), domain::AssignedSpace::Options{});
    device_ = facts_.must(
        "assigned", domain::AssignedDomain::Create({.name = "edu", .device_pins = device_pins_},
                                                   &*space_, ledger_.get()));
  }
  void attach() { facts_.must("attach the device", container_.attach(device_.get())); }
  Result<void> try_detach() { return container_.detach(device_.get()); }
  void detach() { facts_.must("detach the device", try_detach()); }
  void unplug() {
    device_.reset();
    edu_.reset();
    space_.reset();
  }
  static Result<PciDevice> FindEdu() { return PciDevice::Find("0x1234", "0x11e8"); }

  // The device writes to guest memory at a VMM's address.
  bool device_reaches(uint64_t iova) {
    std::byte* const at = ram_.at(iova - kFirst);
    std::fill(at, at + kPageSize, std::byte{0x11});
    std::fill(at + kPageSize, at + 2 * kPageSize, std::byte{0x22});
    facts_.must("load", edu_->load(DmaAddr(iova + kPageSize), kPageSize));
    facts_.must("store", edu_->store(DmaAddr(iova), kPageSize));
    return std::all_of(at, at + kPageSize, [](std::byte byte) { return byte == std::byte{0x22}; });
  }
  domain::ApiOnlyDomain& vgpu() { return *vgpu_; }
  domain::Ledger& ledger() { return *ledger_; }

 private:
  Facts& facts_;  // these outlive this
  GuestRam& ram_;
  domain::DevicePins* const device_pins_;  // may be null
  Owner owner_;
  std::unique_ptr<domain::Ledger> ledger_;
  domain::Container container_;
  std::unique_ptr<domain::ApiOnlyDomain> vgpu_;
  std::unique_ptr<domain::PinContext> pins_;
  domain::PinnedRange held_;
  std::optional<domain::AssignedSpace> space_;
  std::unique_ptr<EduDevice> edu_;
  std::unique_ptr<domain::AssignedDomain> device_;
};

// Looks at the ledger as an auditor does, from outside.
class Auditor {
 public:
  Auditor(Facts* facts, std::string scenario) : facts_(*facts), scenario_(std::move(scenario)) {}

  // What is charged to each row, by name; in MiB, as the figures that are expected.
  struct Expected {
    uint64_t locked;
    uint64_t unique;
    std::map<std::string, double> charged;
  };
  // For each process of the ledger the kernel's figure is the ledger's, to the byte. `locked` is
  // that of all of them together.
  void look(std::string_view step, const Expected& expected) {
    const LedgerSnapshot ledger = Read();
    std::map<uint32_t, uint64_t> by_process;
    std::map<std::string, double> charged;
    for (const LedgerSnapshot::Row& row : ledger.rows) {
      if (row.liveness == domain::Liveness::kDead) continue;
      by_process[row.owner.pid] += BytesIn(row.locked_pages);
      charged[row.name] = static_cast<double>(BytesIn(row.charged_pages)) / kMiB;
    }
    uint64_t all = 0;
    for (const LedgerSnapshot::Row& row : ledger.rows) {
      const auto said = by_process.extract(row.owner.pid);
      if (said.empty()) continue;
      const auto kernel = domain::KernelCountersOf(row.owner);
      const uint64_t counted = kernel ? kernel->vm_lck_kb * 1024 : UINT64_MAX;
      facts_.say("account",
                 fmt::format("{}: {}: process of {}: VmLck {} bytes, the ledger says {}; unique {}",
                             scenario_, step, row.name, counted, said.mapped(),
                             BytesIn(ledger.unique_pages)));
      Check(step, "VmLck is what the ledger says", counted == said.mapped());
      all += counted;
    }
    Check(step, fmt::format("VmLck is {} MiB", expected.locked), all == expected.locked * kMiB);
    Check(step, fmt::format("{} MiB are unique", expected.unique),
          BytesIn(ledger.unique_pages) == expected.unique * kMiB);
    Check(step, "every page is charged once", ledger.charged_pages() == ledger.unique_pages);
    Check(step, "each row pays what is expected of it", charged == expected.charged);
    for (const std::string& problem : domain::ProblemsOf(ledger)) Check(step, problem, false);
  }
  // What type1 counts beyond one count for each page.
  void say_counted_again(std::string_view step) {
    for (const LedgerSnapshot::Row& row : Read().rows) {
      if (row.locked_pages <= row.unique_pages) continue;
      facts_.say("counted-again",
                 fmt::format("{}: {}: {}: {} bytes, of pages at more than one iova", scenario_,
                             step, row.name, BytesIn(row.locked_pages - row.unique_pages)));
    }
  }
  unsigned dead_rows() {
    unsigned dead = 0;
    for (const LedgerSnapshot::Row& row : Read().rows) {
      if (row.liveness == domain::Liveness::kDead) ++dead;
    }
    return dead;
  }
  void Check(std::string_view step, std::string_view what, bool is_true) {
    facts_.check(fmt::format("{}: {}: {}", scenario_, step, what), is_true);
  }

 private:
  LedgerSnapshot Read() {
    const auto dir = facts_.must("runtime dir", domain::RuntimeDir::OpenForReading(kRuntimeDir));
    return facts_.must("ledger", domain::ReadLedger(dir, kVm));
  }
  Facts& facts_;
  const std::string scenario_;
};

// Everything in one process. `again` is what a page costs once more that is locked and mapped.
void ProveOneProcess(Facts& facts, GuestRam& ram, const std::string& group, bool deduplicated) {
  const uint64_t again = deduplicated ? 0 : 1;
  domain::DevicePins device_pins;
  Auditor audit(&facts, deduplicated ? "deduplicated" : "plain");
  Party vm(&facts, &ram, "vgpu", deduplicated ? &device_pins : nullptr);
  vm.map(kFirst);
  vm.pin(kPinAt);
  audit.look("1 MiB is pinned", {1, 1, {{"vgpu", 1}}});
  vm.plug(group);
  vm.attach();
  audit.look("a device is assigned", {16 + again, 16, {{"vgpu", 1}, {"edu", 15}}});
  audit.Check("a device is assigned", "it reaches what is pinned", vm.device_reaches(kPinAt));
  vm.map(kSecond);
  audit.look("the same at a second iova", {32 + again, 16, {{"vgpu", 1}, {"edu", 15}}});
  audit.say_counted_again("the same at a second iova");
  vm.unmap(kSecond);
  audit.look("the second iova goes", {16 + again, 16, {{"vgpu", 1}, {"edu", 15}}});
  vm.release();
  audit.look("the pin is released", {16, 16, {{"vgpu", 0}, {"edu", 16}}});
  vm.pin(kPinAt);
  audit.look("1 MiB is pinned again", {16 + again, 16, {{"vgpu", 0}, {"edu", 16}}});
  if (deduplicated) {
    const Unprivileged limited(8 * kMiB);
    const auto refused = vm.try_detach();
    audit.Check("no lock can be had", "the device may not leave",
                !refused && refused.error().code() == ErrorCode::kLimit);
    if (!refused) facts.say("refused", refused.error().message());
    audit.look("no lock can be had", {16, 16, {{"vgpu", 0}, {"edu", 16}}});
  }
  vm.detach();
  audit.look("the device is detached", {1, 1, {{"vgpu", 1}, {"edu", 0}}});
  vm.attach();
  audit.look("the device is back", {16 + again, 16, {{"vgpu", 1}, {"edu", 15}}});
  vm.detach();
  vm.unplug();
  audit.look("the device is unplugged", {1, 1, {{"vgpu", 1}}});
  vm.release();
  audit.look("nothing is held", {0, 0, {{"vgpu", 0}}});
}

// Runs `work` in a child, which is killed when it has said that it is done with it.
void KillWhenReady(Facts& facts, const std::function<void()>& work,
                   const std::function<void()>& look) {
  int ready[2] = {};
  MVGPU_CHECK(pipe(ready) == 0);
  const pid_t child = fork();
  if (child == 0) {
    work();
    const bool said = write(ready[1], "r", 1) == 1;
    while (said) pause();
    _exit(1);
  }
  close(ready[1]);
  char word = 0;
  facts.check("the other process is ready", read(ready[0], &word, 1) == 1);
  close(ready[0]);
  look();
  kill(child, SIGKILL);
  MVGPU_CHECK(waitpid(child, nullptr, 0) == child);
}

// Another process has the device, and pins of its own; it is killed.
void ProveKilled(Facts& facts, GuestRam& ram, const std::string& group) {
  Auditor audit(&facts, "killed");
  domain::DevicePins device_pins;
  Party vm(&facts, &ram, "vgpu", &device_pins);
  vm.map(kFirst);
  vm.pin(kPinAt);
  KillWhenReady(
      facts,
      [&] {
        auto* pins = new domain::DevicePins;
        auto* other = new Party(&facts, &ram, "other", pins);  // for as long as the process lives
        other->map(kFirst);
        other->pin(kPinAt + kPinned / 2);
        other->plug(group);
        other->attach();
      },
      [&] {
        // The kernel counts by process: 1 MiB here and 16 there.
        audit.look("two processes", {17, 16, {{"vgpu", 1}, {"other", 0.5}, {"edu", 14.5}}});
      });
  audit.Check("killed", "its rows are there, and dead", audit.dead_rows() == 2);
  vm.plug(group);  // who joins next drops the rows of the dead
  audit.Check("another joins", "the dead have no rows", audit.dead_rows() == 0);
  audit.look("another joins", {1, 1, {{"vgpu", 1}, {"edu", 0}}});
  vm.attach();
  audit.look("the device is taken over", {16, 16, {{"vgpu", 1}, {"edu", 15}}});
  vm.detach();
  vm.unplug();
  audit.look("and is unplugged", {1, 1, {{"vgpu", 1}}});
}

}  // namespace

int ProveAccounts(Facts& facts) {
  mkdir(kRuntimeDir, 0700);
  MVGPU_CHECK(mount("tmpfs", kRuntimeDir, "tmpfs", 0, "mode=0700") == 0);
  const PciDevice pci = facts.must("edu", Party::FindEdu());
  const std::string group = facts.must("bind", pci.bind_to_vfio());
  GuestRam ram(kRamSize);
  ProveOneProcess(facts, ram, group, /*deduplicated=*/true);
  ProveOneProcess(facts, ram, group, /*deduplicated=*/false);
  ProveKilled(facts, ram, group);
  facts.check(
      "nothing is locked any more",
      domain::KernelCountersOf(facts.must("self", domain::CurrentProcess()))->vm_lck_kb == 0);
  return facts.exit_code();
}

}  // namespace mvgpu::testing
