#include "cache_size.h"

#include <unistd.h>

namespace cvfast {

int64_t l2_cache_bytes() {
  static const int64_t bytes = [] {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    const int64_t told = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (told > 0) return told;
#endif
    return int64_t{512} << 10;
  }();
  return bytes;
}

}  // namespace cvfast
