// A convolution without the outer taps of its kernel that meet nothing but padding wherever it stands, as a 3x3 kernel's do
// on a map of one pixel. Not where a factor of that padding is NaN or infinite: it makes NaN of zeros.
#pragma once
#include "conv2d_packed.h"
#include "conv2d_problem.h"

namespace cvfast {
namespace {

// From the first to the last tap that meets the source at some position; all where none does or would begin inside.
inline Range live_taps(const Axis& axis, int64_t dilation) {
  const auto meets = [&](int64_t tap) {
    const Range positions = axis.inside(tap);
    return positions.begin < positions.end;
  };
  Range taps = {0, axis.taps};
  while (taps.begin < taps.end && !meets(taps.begin)) ++taps.begin;
  while (taps.begin < taps.end && !meets(taps.end - 1)) --taps.end;
  return taps.begin < taps.end && axis.offset + taps.begin * dilation <= 0 ? taps : Range{0, axis.taps};
}

struct LiveTaps {
  Range y, x;
  bool all;

  explicit LiveTaps(const Conv2dShape& s)
      : y(live_taps(forward_axis(s.in_height, s.out_height, s.kernel_height, s.stride_h, s.padding_h, s.dilation_h),
                    s.dilation_h)),
        x(live_taps(forward_axis(s.in_width, s.out_width, s.kernel_width, s.stride_w, s.padding_w, s.dilation_w),
                    s.dilation_w)),
        all(y.end - y.begin == s.kernel_height && x.end - x.begin == s.kernel_width) {}

  Conv2dForward of(Conv2dForward p) const {
    restrict(p.shape, p.weight, p.dtype);
    return p;
  }
  Conv2dWeightGrad of(Conv2dWeightGrad p) const {
    restrict(p.shape, p.grad_weight, p.dtype);
    return p;
  }

 private:
  template <class Tensor>
  void restrict(Conv2dShape& s, Tensor& kernel, DType dtype) const {
    s.kernel_height = y.end - y.begin, s.kernel_width = x.end - x.begin;
    s.padding_h -= y.begin * s.dilation_h, s.padding_w -= x.begin * s.dilation_w;
    const int64_t elements = y.begin * kernel.stride[2] + x.begin * kernel.stride[3];
    using Byte = __typeof__(bytes_of(kernel.data));
    kernel.data = static_cast<Byte>(kernel.data) + elements * element_bytes(dtype);
  }
  static char* bytes_of(void* data) { return static_cast<char*>(data); }
  static const char* bytes_of(const void* data) { return static_cast<const char*>(data); }
};

// Calls run(data, count, step) for the elements of tensor [i, C, H, W]: all in one run where they lie densely.
template <class S, class Tensor, class Run>
void for_each_run(const Tensor& t, int64_t i, int64_t channels, int64_t height, int64_t width, Run&& run) {
  auto* data = static_cast<S*>(t.data) + i * t.stride[0];
  const int64_t* stride = t.stride;
  const bool planes = stride[1] == height * width && stride[2] == width && stride[3] == 1;
  const bool pixels = stride[1] == 1 && stride[2] == width * channels && stride[3] == channels;
  if (planes || pixels) return run(data, channels * height * width, int64_t{1});
  for (int64_t y = 0; y < height; ++y)
    for (int64_t x = 0; x < width; ++x) run(data + y * stride[2] + x * stride[3], channels, stride[1]);
}

// Whether all elements of a tensor of this size are finite.
template <class S>
bool all_finite(const ConstTensor4& t, int64_t count, int64_t channels, int64_t height, int64_t width, const ThreadPool& pool) {
  using T = Compute<S>;
  constexpr int64_t L = lanes<T>;
  bool finite = true;
  parallel_for(pool, count, [&](int64_t begin, int64_t end) {
    Vector<T> nan = {};
    for (int64_t i = begin; i < end; ++i)
      for_each_run<const S>(t, i, channels, height, width, [&](const S* data, int64_t elements, int64_t step) {
        if (step != 1)
          for (int64_t j = 0; j < elements; ++j) nan[0] += to_compute(data[j * step]) - to_compute(data[j * step]);
        else
          for (int64_t j = 0; j < elements; j += L) {
            const Vector<T> x = elements - j < L ? load_first(data + j, elements - j) : load_vector(data + j);
            nan += x - x;
          }
      });
    for (int64_t j = 0; j < L; ++j)
      if (nan[j] != 0) __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
  });
  return finite;
}

// Whether all weights are finite.
template <class S>
bool weights_finite(const Conv2dForward& p, const ThreadPool& pool) {
  const Conv2dShape& s = p.shape;
  return all_finite<S>(p.weight, s.out_channels, s.in_channels / s.groups, s.kernel_height, s.kernel_width, pool);
}

// The convolution with the taps that count. Kept weights, if they are those of the result, say whether all are finite.
template <class S>
Conv2dForward with_live_taps(const Conv2dForward& whole, const ThreadPool& pool) {
  const LiveTaps taps(whole.shape);
  if (taps.all) return whole;
  const Conv2dForward live = taps.of(whole);
  const auto* packed = static_cast<const PackedHeader*>(whole.packed);
  const PackedHeader* kept = packed ? kept_weights(live, packed->origin.form) : nullptr;
  return (kept ? kept->finite : weights_finite<S>(whole, pool)) ? live : whole;
}

// Likewise the gradient to the weights; the others' are written here.
template <class S>
Conv2dWeightGrad with_live_taps(const Conv2dWeightGrad& whole, const ThreadPool& pool) {
  const LiveTaps taps(whole.shape);
  const Conv2dShape& s = whole.shape;
  if (taps.all || !all_finite<S>(whole.grad_output, s.batch, s.out_channels, s.out_height, s.out_width, pool)) return whole;
  parallel_for(pool, s.out_channels, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      for_each_run<S>(whole.grad_weight, k, s.in_channels / s.groups, s.kernel_height, s.kernel_width,
                      [](S* data, int64_t elements, int64_t step) { zero_matrix(Matrix<S>{data, 0, step}, 1, elements); });
  });
  return taps.of(whole);
}

}  // namespace
}  // namespace cvfast
