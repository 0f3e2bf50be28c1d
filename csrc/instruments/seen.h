// Memory accesses that AddressSanitizer and ThreadSanitizer do not see by themselves: of assembly, of masked vectors
// and of gathers. A kernel tells of them here. Without an instrument nothing of it is left.
#pragma once

#include <cstddef>
#include <cstdint>

// What the compiler itself calls, before an access of so many bytes.
#if defined(__SANITIZE_ADDRESS__)
extern "C" void __asan_loadN(uintptr_t from, size_t bytes);
extern "C" void __asan_storeN(uintptr_t to, size_t bytes);
#elif defined(__SANITIZE_THREAD__)
extern "C" void __tsan_read_range(void* from, size_t bytes);
extern "C" void __tsan_write_range(void* to, size_t bytes);
#endif

namespace vpfast {

// `rows` rows of `bytes` bytes, `step` bytes apart.
inline void seen_read(const void* from, int64_t rows, int64_t step, int64_t bytes) {
  for (int64_t row = 0; row < rows; ++row) {
    [[maybe_unused]] const char* at = static_cast<const char*>(from) + row * step;
#if defined(__SANITIZE_ADDRESS__)
    __asan_loadN(reinterpret_cast<uintptr_t>(at), bytes);
#elif defined(__SANITIZE_THREAD__)
    __tsan_read_range(const_cast<char*>(at), bytes);
#endif
  }
}

inline void seen_written(void* to, int64_t rows, int64_t step, int64_t bytes) {
  for (int64_t row = 0; row < rows; ++row) {
    [[maybe_unused]] char* at = static_cast<char*>(to) + row * step;
#if defined(__SANITIZE_ADDRESS__)
    __asan_storeN(reinterpret_cast<uintptr_t>(at), bytes);
#elif defined(__SANITIZE_THREAD__)
    __tsan_write_range(at, bytes);
#endif
  }
}

}  // namespace vpfast
