// Sizes of this machine's caches, by which kernels cut their work.
#pragma once
#include <cstdint>

#ifndef CVFAST_EXPORT
#define CVFAST_EXPORT __attribute__((visibility("default")))
#endif

namespace cvfast {

// Bytes of one core's second-level cache; 512 KiB where the system doesn't tell.
CVFAST_EXPORT int64_t l2_cache_bytes();

}  // namespace cvfast
