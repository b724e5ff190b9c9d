// Pooling after algorithms that do not pool their results themselves: as many samples at a time as the caches hold.
#pragma once
#include "../cache_size.h"
#include "../scratch.h"
#include "conv2d_epilogue.h"
#include "conv2d_implicit_gemm.h"
#include "parallel.h"

namespace cvfast {
namespace {

// Two lines of results at a time, and as many channels, in a worker's scratch.
constexpr int64_t pooled_elements = 8 << 10;

// `unpooled`: [samples, K, P, Q] in the order of the output's memory; to samples [first, first + samples) of the output.
template <class S>
void pool_samples(const Conv2dForward& problem, const S* unpooled, const int64_t* stride, int64_t first, int64_t samples,
                  const ThreadPool& pool) {
  using T = Compute<S>;
  const Correlation<S> c = correlation<S>(problem);
  const int64_t channels = c.shape.out_channels, lines = c.shape.out_height / 2, pixels = c.shape.out_width;
  const int64_t block = min(channels, max<int64_t>(lanes<T>, pooled_elements / (2 * pixels) / lanes<T> * lanes<T>));
  const bool by_channels = stride[1] == 1;
  const int64_t padded = round_up(block, lanes<T>);
  const Block<T> from = {nullptr, by_channels ? 1 : 2 * pixels, pixels * (by_channels ? padded : 1), by_channels ? padded : 1};
  parallel_for(pool, samples * lines, [&](int64_t begin, int64_t end) {
    T* scratch_lines = scratch<T>(ScratchUse::worker, 2 * pixels * padded + 2 * lanes<T>);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sample = i / lines, line = i % lines;
      for (int64_t channel = 0; channel < channels; channel += block) {
        const int64_t some = min(channels - channel, block);
        const Block<T> two_lines = {scratch_lines, from.channel_stride, from.line_stride, from.pixel_stride};
        copy_planes(Block<const S>{unpooled + sample * stride[0] + channel * stride[1] + 2 * line * stride[2], stride[1],
                                   stride[2], stride[3]},
                    two_lines, some, 2, pixels);
        store_pooled(c, two_lines,
                     Block<S>{c.result + (first + sample) * c.result_stride[0] + channel * c.result_stride[1] +
                                  line * c.result_stride[2],
                              c.result_stride[1], c.result_stride[2], c.result_stride[3]},
                     some, 2, pixels);
      }
    }
  });
}

template <class S>
void forward_then_pool(const Conv2dForward& problem, void (*forward)(const Conv2dForward&, const ThreadPool&),
                       const ThreadPool& pool) {
  const Conv2dShape& s = problem.shape;
  const int64_t channels = s.out_channels, lines = s.out_height, pixels = s.out_width, elements = channels * lines * pixels;
  if (elements * s.batch == 0) return;
  const int64_t held = 4 * pool.threads * l2_cache_bytes() / (elements * static_cast<int64_t>(sizeof(S)));
  const int64_t block = min(s.batch, max<int64_t>(1, held));
  S* unpooled = static_cast<S*>(thread_scratch(ScratchUse::unpooled, block * elements * static_cast<int64_t>(sizeof(S))));
  const bool channels_last = problem.output.stride[1] == 1 && channels > 1;
  const Tensor4 results = channels_last ? Tensor4{unpooled, {elements, 1, pixels * channels, channels}}
                                        : Tensor4{unpooled, {elements, lines * pixels, pixels, 1}};
  for (int64_t first = 0; first < s.batch; first += block) {
    Conv2dForward part = problem;
    part.shape.batch = min(s.batch - first, block);
    part.input.data = static_cast<const S*>(problem.input.data) + first * problem.input.stride[0];
    part.output = results;
    part.epilogue = {};
    forward(part, pool);
    pool_samples(problem, unpooled, results.stride, first, part.shape.batch, pool);
  }
}

}  // namespace
}  // namespace cvfast
