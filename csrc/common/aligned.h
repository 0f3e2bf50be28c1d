// Working memory that starts at a cache line, so that no full-width load of it spans two.
#pragma once

#include <cstddef>
#include <new>
#include <vector>

namespace vpfast {

template <class X>
struct CacheLineAllocator {
  using value_type = X;

  CacheLineAllocator() = default;
  template <class Y>
  CacheLineAllocator(const CacheLineAllocator<Y>&) {}

  X* allocate(size_t count) { return static_cast<X*>(::operator new(count * sizeof(X), std::align_val_t(64))); }
  void deallocate(X* memory, size_t) { ::operator delete(memory, std::align_val_t(64)); }

  friend bool operator==(const CacheLineAllocator&, const CacheLineAllocator&) { return true; }
};

template <class X>
using AlignedVector = std::vector<X, CacheLineAllocator<X>>;

}  // namespace vpfast
