// Gradient to the bias: the sum of each channel's pixels.
//
// Sixteen chains take the pixels in turn and are added up every chain_pixels of them, in double from there on: the same bits
// whether vectors hold channels of a pixel or pixels of a channel, and for any width of them.
#pragma once
#include "../scratch.h"
#include "conv2d_problem.h"

namespace cvfast {
namespace {

constexpr int64_t sum_chains = 16, chain_pixels = 256;
constexpr int64_t sum_channels = 128;  // of a piece of work

// The chains of some channels of one sample over pixels [begin, end) of it.
template <class T>
using SumChains = T[sum_chains][sum_channels];

template <class S>
void sum_neighbouring_channels(const S* from, const int64_t* stride, int64_t width, Range pixels, int64_t channels,
                               SumChains<Compute<S>>& chains) {
  constexpr int64_t L = lanes<Compute<S>>;
  for (int64_t i = pixels.begin; i < pixels.end; ++i) {
    const S* pixel = from + i / width * stride[2] + i % width * stride[3];
    Compute<S>* chain = chains[i % sum_chains];
    for (int64_t c = 0; c < channels; c += L)
      store_vector(load_vector(chain + c) + load_first(pixel + c, channels - c), chain + c);
  }
}

// Of one channel whose pixels are neighbours, to the last one.
template <class S>
void sum_neighbouring_pixels(const S* from, Range pixels, int64_t channel, SumChains<Compute<S>>& chains) {
  using T = Compute<S>;
  constexpr int64_t L = lanes<T>;
  Vector<T> sum[sum_chains / L] = {};
  for (int64_t i = pixels.begin; i < pixels.end; i += sum_chains)
    for (int64_t j = 0; j < sum_chains / L; ++j) {
      const int64_t left = pixels.end - i - j * L;
      if (left > 0) sum[j] += load_first(from + i + j * L, left);
    }
  for (int64_t j = 0; j < sum_chains; ++j) chains[j][channel] = sum[j / L][j % L];
}

// The sums of `channels` channels of one sample.
template <class S>
void sum_of_pixels(const S* from, const int64_t* stride, int64_t height, int64_t width, int64_t channels, double* sums) {
  using T = Compute<S>;
  const bool pixels_neighbour = stride[3] == 1 && (stride[2] == width || height == 1);
  for (int64_t c = 0; c < channels; ++c) sums[c] = 0;
  for (int64_t begin = 0; begin < height * width; begin += chain_pixels) {
    const Range pixels = {begin, min(begin + chain_pixels, height * width)};
    SumChains<T> chains = {};
    if (stride[1] == 1)
      sum_neighbouring_channels(from, stride, width, pixels, channels, chains);
    else
      for (int64_t c = 0; c < channels; ++c)
        if (pixels_neighbour)
          sum_neighbouring_pixels(from + c * stride[1], pixels, c, chains);
        else
          for (int64_t i = begin; i < pixels.end; ++i)
            chains[i % sum_chains][c] += to_compute(from[c * stride[1] + i / width * stride[2] + i % width * stride[3]]);
    for (int64_t half = sum_chains / 2; half > 0; half /= 2)
      for (int64_t j = 0; j < half; ++j)
        for (int64_t c = 0; c < channels; ++c) chains[j][c] += chains[j + half][c];
    for (int64_t c = 0; c < channels; ++c) sums[c] += chains[0][c];
  }
}

template <class S>
void bias_grad(const Conv2dBiasGrad& p, const ThreadPool& pool) {
  const int64_t blocks = ceil_div(p.channels, sum_channels), *stride = p.grad_output.stride;
  const int64_t bytes = p.batch * p.channels * static_cast<int64_t>(sizeof(double));
  double* sums = static_cast<double*>(thread_scratch(ScratchUse::caller, bytes));  // [sample, channel]
  parallel_for(pool, p.batch * blocks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sample = i / blocks, first = i % blocks * sum_channels;
      sum_of_pixels(static_cast<const S*>(p.grad_output.data) + sample * stride[0] + first * stride[1], stride, p.height,
                    p.width, min(p.channels - first, sum_channels), sums + sample * p.channels + first);
    }
  });
  for (int64_t c = 0; c < p.channels; ++c) {
    double sum = 0;
    for (int64_t sample = 0; sample < p.batch; ++sample) sum += sums[sample * p.channels + c];
    from_compute(static_cast<Compute<S>>(sum), static_cast<S*>(p.grad_bias) + c);
  }
}

}  // namespace
}  // namespace cvfast
