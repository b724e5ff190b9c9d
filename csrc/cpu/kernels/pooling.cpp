// Pooling for one instruction set; see conv2d.cpp. Exports cvfast::<CVFAST_ISA>::pooling and nothing else.
#include "cvfast/pooling.h"

#include "../kernel_table.h"
#include "../scratch.h"
#include "parallel.h"
#include "simd.h"
#include "transpose.h"

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

float* scratch(int64_t floats) { return static_cast<float*>(thread_scratch(ScratchUse::worker, floats * sizeof(float))); }

// A line of results of all channels, which are neighbours in the input: of each column its lines first, then of the window its
// columns.
void pool_channels(const MaxPooling& p, const float* image, int64_t y, float* to) {
  const Inside lines(p, y, p.in_height);
  const int64_t c = p.channels, *stride = p.input.stride;
  const bool in_place = p.output.stride[1] == 1;
  float* const columns = scratch((p.in_width + (in_place ? 0 : p.out_width)) * c);
  float* const results = in_place ? to : columns + p.in_width * c;
  const int64_t step = in_place ? p.output.stride[3] : c;
  const bool dense = stride[3] == c;
  for (int64_t x = 0; x < (dense ? 1 : p.in_width); ++x)
    largest_of(image + lines.begin * stride[2] + x * stride[3], lines.end - lines.begin, stride[2], columns + x * c,
               dense ? p.in_width * c : c);
  for (int64_t x = 0; x < p.out_width; ++x) {
    const Inside inside(p, x, p.in_width);
    largest_of(columns + inside.begin * c, inside.end - inside.begin, c, results + x * step, c);
  }
  if (!in_place) copy_planes<float, float>({results, 1, 0, c}, {to, p.output.stride[1], 0, p.output.stride[3]}, c, 1, p.out_width);
}

// A vector of results of a line that lies in memory with its padding.
FloatVector largest_of_windows(const MaxPooling& p, const float* line) {
  FloatVector most = load_vector(line);
  for (int64_t k = 1; k < p.window; ++k) most = larger(most, load_vector(line + k));
  return most;
}

// The same two columns apart.
FloatVector largest_of_every_second(const MaxPooling& p, const float* line) {
  decltype(FloatVector{} < FloatVector{}) even;
  for (int i = 0; i < L; ++i) even[i] = 2 * i;
  return __builtin_shuffle(largest_of_windows(p, line), largest_of_windows(p, line + L), even);
}

// A line of results of one channel.
void pool_plane(const MaxPooling& p, const float* plane, int64_t y, float* to) {
  const Inside lines(p, y, p.in_height);
  const int64_t *stride = p.input.stride, n = p.in_width, step = p.output.stride[3];
  // The padding is less than anything. Vectors read on behind it.
  const int64_t padded = max(p.padding + n, p.stride * round_up(p.out_width, L) + p.window + L);
  float* const line = scratch(padded);
  float* const columns = line + p.padding;
  for (int64_t x = 0; x < p.padding; ++x) line[x] = -__builtin_inff();
  for (int64_t x = p.padding + n; x < padded; ++x) line[x] = -__builtin_inff();
  const float* first = plane + lines.begin * stride[2];
  if (stride[3] == 1) {
    largest_of(first, lines.end - lines.begin, stride[2], columns, n);
  } else {
    for (int64_t x = 0; x < n; ++x) {
      columns[x] = first[x * stride[3]];
      for (int64_t k = 1; k < lines.end - lines.begin; ++k) columns[x] = larger(columns[x], first[k * stride[2] + x * stride[3]]);
    }
  }
  for (int64_t x = 0; x < p.out_width; x += L) {
    const int64_t some = min(p.out_width - x, L);
    const float* from = line + x * p.stride;
    if (p.stride <= 2 && step == 1) {
      store_first(p.stride == 1 ? largest_of_windows(p, from) : largest_of_every_second(p, from), to + x, some);
    } else {
      for (int64_t i = 0; i < some; ++i) {
        float most = from[i * p.stride];
        for (int64_t k = 1; k < p.window; ++k) most = larger(most, from[i * p.stride + k]);
        to[(x + i) * step] = most;
      }
    }
  }
}

void max_pooling(const MaxPooling& p, const ThreadPool& pool) {
  const bool by_channels = p.input.stride[1] == 1 && p.channels > 1;
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
