// torch's own threads as the kernels' ThreadPool, so that torch.set_num_threads is obeyed and no second pool exists.
#pragma once
#include <torch/csrc/stable/ops.h>

#include "cvfast/common.h"

namespace cvfast {

inline ThreadPool thread_pool() {
  auto parallel_for = [](int64_t n, void (*body)(void*, int64_t, int64_t), void* state) {
    torch::stable::parallel_for(0, n, 1, [=](int64_t begin, int64_t end) { body(state, begin, end); });
  };
  return {static_cast<int32_t>(torch::stable::get_num_threads()), parallel_for};
}

}  // namespace cvfast
