// Pooling for one instruction set; see conv2d.cpp. Exports cvfast::<CVFAST_ISA>::pooling and nothing else.
#include "cvfast/pooling.h"

#include "../kernel_table.h"
#include "../scratch.h"
#include "parallel.h"
#include "simd.h"

namespace cvfast {
namespace {

constexpr int64_t L = lanes<float>;

// The larger of two, NaN if one of them is: a float or a vector.
template <class V>
V larger(V a, V b) {
  const V most = b > a ? b : a;
  return b == b ? most : b;  // a NaN in `a` is no less than anything
}

// Positions of the window of result `at` inside [0, size).
struct Inside {
  int64_t begin, end;
  Inside(const MaxPooling& p, int64_t at, int64_t size)
      : begin(max<int64_t>(0, at * p.stride - p.padding)), end(min(size, at * p.stride - p.padding + p.window)) {}
};

// to[i] = the largest of from[i + k * step], k < count, over n neighbours.
void largest_of(const float* from, int64_t count, int64_t step, float* to, int64_t n) {
  for (int64_t i = 0; i < n; i += L) {
    const int64_t some = min(n - i, L);
    FloatVector most = load_first(from + i, some);
    for (int64_t k = 1; k < count; ++k) most = larger(most, load_first(from + k * step + i, some));
    store_first(most, to + i, some);
  }
}

// A line of results whose channels are neighbours: of each column its lines first, then of the window its columns.
void pool_channels(const MaxPooling& p, const float* image, int64_t y, float* to) {
  const Inside lines(p, y, p.in_height);
  const int64_t c = p.channels, *stride = p.input.stride;
  float* columns = static_cast<float*>(thread_scratch(ScratchUse::worker, p.in_width * c * sizeof(float)));
  const bool dense = stride[3] == c;
  for (int64_t x = 0; x < (dense ? 1 : p.in_width); ++x)
    largest_of(image + lines.begin * stride[2] + x * stride[3], lines.end - lines.begin, stride[2], columns + x * c,
               dense ? p.in_width * c : c);
  for (int64_t x = 0; x < p.out_width; ++x) {
    const Inside inside(p, x, p.in_width);
    largest_of(columns + inside.begin * c, inside.end - inside.begin, c, to + x * p.output.stride[3], c);
  }
}

// A line of results of one channel.
void pool_plane(const MaxPooling& p, const float* plane, int64_t y, float* to) {
  const Inside lines(p, y, p.in_height);
  const int64_t *stride = p.input.stride, n = p.in_width;
  float* columns = static_cast<float*>(thread_scratch(ScratchUse::worker, n * sizeof(float)));
  const float* first = plane + lines.begin * stride[2];
  if (stride[3] == 1) {
    largest_of(first, lines.end - lines.begin, stride[2], columns, n);
  } else {
    for (int64_t x = 0; x < n; ++x) {
      columns[x] = first[x * stride[3]];
      for (int64_t k = 1; k < lines.end - lines.begin; ++k) columns[x] = larger(columns[x], first[k * stride[2] + x * stride[3]]);
    }
  }
  for (int64_t x = 0; x < p.out_width; ++x) {
    const Inside inside(p, x, n);
    float most = columns[inside.begin];
    for (int64_t i = inside.begin + 1; i < inside.end; ++i) most = larger(most, columns[i]);
    to[x * p.output.stride[3]] = most;
  }
}

void max_pooling(const MaxPooling& p, const ThreadPool& pool) {
  const bool by_channels = p.input.stride[1] == 1 && p.output.stride[1] == 1;
  const int64_t planes = by_channels ? 1 : p.channels;
  parallel_for(pool, p.batch * planes * p.out_height, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t y = i % p.out_height, plane = i / p.out_height % planes, sample = i / p.out_height / planes;
      const float* from = static_cast<const float*>(p.input.data) + sample * p.input.stride[0] + plane * p.input.stride[1];
      float* to = static_cast<float*>(p.output.data) + sample * p.output.stride[0] + plane * p.output.stride[1] +
                  y * p.output.stride[2];
      by_channels ? pool_channels(p, from, y, to) : pool_plane(p, from, y, to);
    }
  });
}

// A vector of channels at a time.
void average_pixels(const PixelAverage& p, const ThreadPool& pool) {
  const int64_t blocks = ceil_div(p.channels, L);
  parallel_for(pool, p.batch * blocks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t channel = i % blocks * L, some = min(p.channels - channel, L);
      const float* from = p.input + i / blocks * p.batch_stride + channel * p.channel_stride;
      float sum[L] = {};
      for (int64_t pixel = 0; pixel < p.pixels; ++pixel, from += p.pixel_stride)
        if (p.channel_stride == 1)
          store_as(sum, load_as<FloatVector>(sum) + load_first(from, some));
        else
          for (int64_t j = 0; j < some; ++j) sum[j] += from[j * p.channel_stride];
      store_first(load_as<FloatVector>(sum) / static_cast<float>(p.pixels), p.output + i / blocks * p.channels + channel, some);
    }
  });
}

}  // namespace

namespace CVFAST_ISA {
extern const PoolingKernels pooling;
const PoolingKernels pooling = {max_pooling, average_pixels};
}  // namespace CVFAST_ISA

}  // namespace cvfast
