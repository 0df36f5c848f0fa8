#include "apionly-domain/memory/guarded_copy.h"

#include <setjmp.h>
#include <signal.h>
#include <ucontext.h>

#include <atomic>
#include <bit>
#include <cstdint>
#include <cstring>
#include <mutex>

namespace mvgpu::domain {

namespace {

// Where this thread's guarded copy goes on when a page turns out to be gone.
thread_local sigjmp_buf* fault_target = nullptr;
struct sigaction previous_sigbus_action;

#ifdef __x86_64__

// Where a load of guest memory goes on when its page is gone, as the kernel has it for its own
// copies from user space: the table costs the loads themselves nothing. Both as distances from
// where they stand, so that the table needs no relocation.
struct Fixup {
  int32_t load;
  int32_t gone;
};
// The section of that name, which LoadWord() fills; its ends come from the linker.
extern "C" [[gnu::visibility("hidden")]] const Fixup __start_mvgpu_fixups[];
extern "C" [[gnu::visibility("hidden")]] const Fixup __stop_mvgpu_fixups[];

int64_t AddressOf(const int32_t& distance) { return std::bit_cast<int64_t>(&distance) + distance; }

bool GoToFixup(void* context) {
  greg_t& instruction = static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP];
  for (const Fixup* fixup = __start_mvgpu_fixups; fixup != __stop_mvgpu_fixups; ++fixup) {
    if (AddressOf(fixup->load) != instruction) continue;
    instruction = AddressOf(fixup->gone);
    return true;
  }
  return false;
}

// One access; false when the page is gone.
[[gnu::always_inline]] inline bool LoadWord(const uint64_t* from, uint64_t* to) {
  uint64_t word;
  asm goto(
      "1: movq %[from], %[word]\n"
      ".pushsection mvgpu_fixups, \"a\"\n"
      ".long 1b - ., %l[gone] - .\n"
      ".popsection"
      : [word] "=r"(word)
      : [from] "m"(*from)
      : "memory"
      : gone);
  *to = word;
  return true;
gone:
  return false;
}

#else

bool GoToFixup(void*) { return false; }

#endif

void OnSigbus(int signal, siginfo_t* info, void* context) {
  if (GoToFixup(context)) return;
  if (fault_target != nullptr) siglongjmp(*fault_target, 1);
  // Not a guarded copy: whoever was there before, or the default, has the word.
  if ((previous_sigbus_action.sa_flags & SA_SIGINFO) != 0) {
    previous_sigbus_action.sa_sigaction(signal, info, context);
  } else if (previous_sigbus_action.sa_handler != SIG_DFL &&
             previous_sigbus_action.sa_handler != SIG_IGN) {
    previous_sigbus_action.sa_handler(signal);
  } else {
    ::signal(SIGBUS, SIG_DFL);
    raise(SIGBUS);
  }
}

}  // namespace

void InstallSigbusHandler() {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction action = {};
    action.sa_sigaction = OnSigbus;
    action.sa_flags = SA_SIGINFO;
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, &previous_sigbus_action);
  });
}

namespace {

// One access for a whole word, so that ring indices and the like are never seen half-written.
template <typename Word>
bool CopyWord(void* destination, const void* source) {
  if ((std::bit_cast<uintptr_t>(destination) | std::bit_cast<uintptr_t>(source)) % sizeof(Word) !=
      0) {
    return false;
  }
  *static_cast<volatile Word*>(destination) = *static_cast<const volatile Word*>(source);
  return true;
}

void CopyBytes(void* destination, const void* source, size_t size) {
  switch (size) {
    case 2:
      if (CopyWord<uint16_t>(destination, source)) return;
      break;
    case 4:
      if (CopyWord<uint32_t>(destination, source)) return;
      break;
    case 8:
      if (CopyWord<uint64_t>(destination, source)) return;
      break;
    default:
      break;
  }
  std::memmove(destination, source, size);
}

// siglongjmp() left the handler for good, and the signal blocked. Done here and not by sigsetjmp(),
// which would have to save the mask with a system call for every copy.
void UnblockSigbus() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGBUS);
  pthread_sigmask(SIG_UNBLOCK, &signals, nullptr);
}

// Not ThreadSanitizer's: that does the exchange in its runtime with a lock held, which a fault
// would leave locked for ever.
__attribute__((no_sanitize("thread"))) void ExchangeWord(uint64_t* word, uint64_t* expected,
                                                         uint64_t desired) {
  // seq_cst: what the guest's own processors do with such a word, they do with locked instructions.
  __atomic_compare_exchange_n(word, expected, desired, /*weak=*/false, __ATOMIC_SEQ_CST,
                              __ATOMIC_SEQ_CST);
}

// access() touches guest memory; false when a page of it was gone.
template <typename Access>
[[gnu::noinline]] bool Guarded(const Access& access) {
  sigjmp_buf target;
  if (sigsetjmp(target, /*savemask=*/0) != 0) {
    fault_target = nullptr;
    UnblockSigbus();
    return false;
  }
  fault_target = &target;
  std::atomic_signal_fence(std::memory_order_seq_cst);  // the access stays between the two stores
  access();
  std::atomic_signal_fence(std::memory_order_seq_cst);
  fault_target = nullptr;
  return true;
}

}  // namespace

bool CopyGuarded(void* to, const void* from, size_t size) {
  return Guarded([=] { CopyBytes(to, from, size); });
}

#ifdef __x86_64__
bool LoadWordsGuarded(std::span<uint64_t> to, const void* from) {
  const auto* words = static_cast<const uint64_t*>(from);
  for (size_t i = 0; i < to.size(); ++i) {
    if (!LoadWord(words + i, &to[i])) return false;
  }
  return true;
}
#else
bool LoadWordsGuarded(std::span<uint64_t> to, const void* from) {
  const auto* words = static_cast<const volatile uint64_t*>(from);
  return Guarded([=] {
    for (size_t i = 0; i < to.size(); ++i) to[i] = words[i];
  });
}
#endif

bool CompareExchangeGuarded(void* word, uint64_t* expected, uint64_t desired) {
  return Guarded([=] { ExchangeWord(static_cast<uint64_t*>(word), expected, desired); });
}

}  // namespace mvgpu::domain
