// Memory for results that live briefly, as those between the layers of a model without gradients do.
#pragma once
#include <cstdint>

#include "isa.h"

namespace cvfast {

// `bytes` of uninitialised memory aligned to 64 bytes, for whoever gives it back by return_result; nullptr where there is
// none: for small and very large results, and where too many are held. The lowest place that is free is taken, so that a
// model's layers use the same few megabytes in turn: these stay in the cache, and their pages, of 2 MiB where the system has
// such, are touched once. The whole is 64 MiB, kept until the process ends, of which the system gives what was used.
CVFAST_EXPORT void* borrow_result(int64_t bytes);
CVFAST_EXPORT void return_result(void* data);

}  // namespace cvfast
