// Large pages of memory, where the system has them on request.
#pragma once
#include <cstdint>

#include "isa.h"

namespace cvfast {

// Asks for pages of 2 MiB for a large buffer that nobody has written yet: touching it for the first time then takes one page
// fault where it took 512. Does nothing for small buffers or where there are no such pages.
CVFAST_EXPORT void prefer_huge_pages(void* data, int64_t bytes);

}  // namespace cvfast
