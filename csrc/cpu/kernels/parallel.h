// ThreadPool for callables.
#pragma once
#include "cvfast/common.h"

namespace cvfast {
namespace {

// Calls body(begin, end) for ranges that cover [0, n), on the caller's threads.
template <class Body>
void parallel_for(const ThreadPool& pool, int64_t n, Body&& body) {
  if (n == 0) return;
  pool.parallel_for(
      n, [](void* state, int64_t begin, int64_t end) { (*static_cast<Body*>(state))(begin, end); }, &body);
}

}  // namespace
}  // namespace cvfast
