// A convolution without the outer taps of its kernel that meet nothing but padding wherever it stands, as a 3x3 kernel's do
// on a map of one pixel. An infinite weight there does not count, as in most of torch's kernels.
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

// Zeros for all taps of the gradient to the weights.
template <class S>
void zero_weight_grad(const Conv2dWeightGrad& p, const ThreadPool& pool) {
  const Conv2dShape& s = p.shape;
  const int64_t channels = s.in_channels / s.groups, taps = s.kernel_height * s.kernel_width, *stride = p.grad_weight.stride;
  const bool planes = stride[1] == taps && stride[2] == s.kernel_width && stride[3] == 1;
  const bool pixels = stride[1] == 1 && stride[2] == s.kernel_width * channels && stride[3] == channels;
  parallel_for(pool, s.out_channels, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      S* to = static_cast<S*>(p.grad_weight.data) + k * stride[0];
      if (planes || pixels)
        zero_matrix(Matrix<S>{to, 0, 1}, 1, channels * taps);
      else
        for (int64_t tap = 0; tap < taps; ++tap)
          zero_matrix(Matrix<S>{to + tap / s.kernel_width * stride[2] + tap % s.kernel_width * stride[3], 0, stride[1]}, 1,
                      channels);
    }
  });
}

}  // namespace
}  // namespace cvfast
