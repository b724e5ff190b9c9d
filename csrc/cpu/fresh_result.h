// What is done to the memory of a result before a kernel writes it.
#pragma once
#include <cstring>

#include "huge_pages.h"
#include "poison.h"

namespace cvfast {

inline void prepare_result(void* data, int64_t bytes) {
  prefer_huge_pages(data, bytes);
  if (results_are_poisoned()) std::memset(data, 0xff, bytes);  // NaN in every dtype
}

}  // namespace cvfast
