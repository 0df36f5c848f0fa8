#pragma once

namespace mvgpu::internal {
[[noreturn]] void CheckFailed(const char* file, int line, const char* expression);
}  // namespace mvgpu::internal

// A broken invariant of our own; always on. Never for what a guest, a VMM or a file can cause.
#define MVGPU_CHECK(expression)                       \
  (__builtin_expect(static_cast<bool>(expression), 1) \
       ? static_cast<void>(0)                         \
       : ::mvgpu::internal::CheckFailed(__FILE__, __LINE__, #expression))

// The same, compiled only where MVGPU_DCHECKS is set: cheap programmer errors on hot paths.
#ifdef MVGPU_DCHECKS
#define MVGPU_DCHECK(expression) MVGPU_CHECK(expression)
#else
#define MVGPU_DCHECK(expression) static_cast<void>(0)
#endif
