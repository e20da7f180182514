#include "memory.h"

#include <atomic>
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace normkit {

namespace {
std::atomic<size_t> threshold{size_t{6} << 20};
constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
}  // namespace

size_t stream_above() { return threshold.load(std::memory_order_relaxed); }
void set_stream_above(size_t bytes) { threshold.store(bytes, std::memory_order_relaxed); }

void advise(void* memory, size_t bytes) {
#if defined(MADV_HUGEPAGE)
    if (!memory || bytes < 2 * kHugePage) return;
    const uintptr_t start = (reinterpret_cast<uintptr_t>(memory) + kHugePage - 1) / kHugePage * kHugePage;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kHugePage * kHugePage;
    // Advice only: where the kernel declines, everything works as before, with small pages.
    if (end > start) (void)madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#else
    (void)memory;
    (void)bytes;
#endif
}

}  // namespace normkit
