#include "caller_threads.h"

#include <atomic>

namespace cvfast {
namespace {

ThreadPool caller_alone() {
  return {1, [](int64_t n, void (*body)(void*, int64_t, int64_t), void* state) { body(state, 0, n); }};
}

std::atomic<ThreadPool (*)()> pool_of_caller{caller_alone};

}  // namespace

ThreadPool caller_threads() { return pool_of_caller.load(std::memory_order_relaxed)(); }
void set_caller_threads(ThreadPool (*pool)()) { pool_of_caller.store(pool, std::memory_order_relaxed); }

}  // namespace cvfast
