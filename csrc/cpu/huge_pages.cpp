#include "huge_pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace cvfast {

void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t page = uintptr_t{2} << 20;
  constexpr int64_t least_bytes = 4 * int64_t{page};  // below, malloc keeps the memory and the pages are touched once
  if (bytes < least_bytes) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a wish: a refusal changes nothing
#endif
}

}  // namespace cvfast
