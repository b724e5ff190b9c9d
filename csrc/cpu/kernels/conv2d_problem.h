// Forward convolution and gradient to the input brought to one form, so that each algorithm is written once.
//
// The gradient to the input, on the input pixels with the same remainder modulo the stride ("a phase"), is a convolution
// of the output's gradient with stride 1 and some of the kernel's taps. So both are: for each phase, a matrix product of
// patches with weights. The forward pass has one phase.
#pragma once
#include "conv2d_patches.h"
#include "cvfast/conv2d.h"
#include "gemm.h"

namespace cvfast {
namespace {

// S is the storage type. Channels are those of one group; "in" is the gathered side, "out" the result's.
template <class S>
struct Correlation {
  bool input_grad;
  Conv2dShape shape;
  int64_t batch, groups, in_channels, out_channels;
  const S* source;
  int64_t source_stride[4];
  const S* weight;
  int64_t weight_out_stride, weight_in_stride, weight_y_stride, weight_x_stride, weight_group_stride;
  const S* bias;  // [groups * out_channels] or nullptr
  S* result;
  int64_t result_stride[4];
  const S* residual;  // strides as the result's; or nullptr
  Epilogue epilogue;
  int64_t lines_left_out = 0, pixels_left_out = 0;  // at the result's end, by pooling

  bool pools() const { return epilogue.pooling != Pooling::none; }
  bool finishes() const { return residual || epilogue.activation != Activation::none; }
  // Results are stored narrower than they are computed, and rounded after the epilogue.
  bool rounds_last() const { return sizeof(S) < sizeof(Compute<S>) && finishes(); }
  int64_t phases_y() const { return input_grad ? min(shape.stride_h, shape.in_height) : 1; }
  int64_t phases_x() const { return input_grad ? min(shape.stride_w, shape.in_width) : 1; }
};

// The phase `phase` of a Correlation.
template <class S>
struct Phase {
  Patches<S> patches;  // of group 0
  S* result;           // of group 0, strides below
  int64_t result_batch_stride, result_channel_stride, result_y_stride, result_x_stride;
  int64_t taps_before;  // taps of the phases before it, of all R * S taps

  int64_t pixels(int64_t batch) const { return batch * patches.y.positions * patches.x.positions; }
};

inline Axis forward_axis(int64_t in, int64_t out, int64_t taps, int64_t stride, int64_t padding, int64_t dilation) {
  return {out, in, stride, -padding, taps, dilation, 0, 1};
}

// Position i of phase p is the input's p + i * stride. Tap r reads the output at (p + i * stride + padding - r * dilation) / stride
// where this division is exact.
inline Axis input_grad_axis(int64_t phase, int64_t in, int64_t out, int64_t taps, int64_t stride, int64_t padding,
                            int64_t dilation) {
  int64_t first = 0;
  while (first < taps && (phase + padding - first * dilation) % stride != 0) ++first;
  int64_t tap_step = 1;
  while (tap_step * dilation % stride != 0) ++tap_step;
  const int64_t count = first < taps ? ceil_div(taps - first, tap_step) : 0;
  const int64_t offset = first < taps ? (phase + padding - first * dilation) / stride : 0;
  return {ceil_div(in - phase, stride), out, 1, offset, count, -(tap_step * dilation / stride), first, tap_step};
}

// Taps that the phases before `phase` have on one axis.
inline int64_t taps_before(int64_t phase, int64_t taps, int64_t stride, int64_t padding, int64_t dilation) {
  int64_t count = 0;
  for (int64_t r = 0; r < taps; ++r) {
    const int64_t remainder = (r * dilation - padding) % stride;
    count += (remainder < 0 ? remainder + stride : remainder) < phase;
  }
  return count;
}

// Whether a 1x1 kernel moves pixel by pixel over whole lines that follow each other in memory.
template <class S>
bool lines_follow(const Patches<S>& patches) {
  const Axis &y = patches.y, &x = patches.x;
  return y.taps == 1 && x.taps == 1 && y.step == 1 && x.step == 1 && y.offset == 0 && x.offset == 0 &&
         x.positions == x.inputs && y.positions <= y.inputs && patches.y_stride == x.positions * patches.x_stride;
}

// Makes one long line of them.
template <class S>
void join_lines(Patches<S>& patches) {
  Axis &y = patches.y, &x = patches.x;
  x.positions = x.inputs = y.positions * x.positions;
  y.positions = y.inputs = 1;
}

// `joined`: lines may be joined; else an axis of the phase is an axis of the image.
template <class S>
Phase<S> make_phase(const Correlation<S>& c, int64_t phase_y, int64_t phase_x, bool joined = true) {
  const Conv2dShape& s = c.shape;
  Phase<S> phase;
  phase.patches = {c.source, c.source_stride[0], c.source_stride[1], c.source_stride[2], c.source_stride[3],
                   c.in_channels, {}, {}};
  Axis &y = phase.patches.y, &x = phase.patches.x;
  phase.result_batch_stride = c.result_stride[0];
  phase.result_channel_stride = c.result_stride[1];
  if (c.input_grad) {
    y = input_grad_axis(phase_y, s.in_height, s.out_height, s.kernel_height, s.stride_h, s.padding_h, s.dilation_h);
    x = input_grad_axis(phase_x, s.in_width, s.out_width, s.kernel_width, s.stride_w, s.padding_w, s.dilation_w);
    phase.taps_before =
        taps_before(phase_y, s.kernel_height, s.stride_h, s.padding_h, s.dilation_h) * s.kernel_width +
        y.taps * taps_before(phase_x, s.kernel_width, s.stride_w, s.padding_w, s.dilation_w);
    phase.result = c.result + phase_y * c.result_stride[2] + phase_x * c.result_stride[3];
    phase.result_y_stride = s.stride_h * c.result_stride[2];
    phase.result_x_stride = s.stride_w * c.result_stride[3];
  } else {
    y = forward_axis(s.in_height, s.out_height, s.kernel_height, s.stride_h, s.padding_h, s.dilation_h);
    x = forward_axis(s.in_width, s.out_width, s.kernel_width, s.stride_w, s.padding_w, s.dilation_w);
    phase.taps_before = 0;
    phase.result = c.result;
    phase.result_y_stride = c.result_stride[2];
    phase.result_x_stride = c.result_stride[3];
  }
  if (joined && lines_follow(phase.patches) && phase.result_y_stride == x.positions * phase.result_x_stride)
    join_lines(phase.patches);
  return phase;
}

// Keeps the positions y x x, or those of them that exist.
template <class S>
void restrict_positions(Phase<S>& phase, Range y, Range x) {
  const auto restrict_axis = [](Axis& axis, Range kept) {
    axis.positions = max<int64_t>(0, min(axis.positions, kept.end) - kept.begin);
    axis.offset += kept.begin * axis.step;
  };
  restrict_axis(phase.patches.y, y);
  restrict_axis(phase.patches.x, x);
  phase.result += y.begin * phase.result_y_stride + x.begin * phase.result_x_stride;
}

// Whether the epilogue does no more than keep results within bounds_of(c).
template <class S>
bool epilogue_clamps(const Correlation<S>& c) {
  const Activation a = c.epilogue.activation;
  return !c.residual && !c.pools() && (a == Activation::none || a == Activation::relu || a == Activation::relu6);
}
template <class T>
Bounds<T> bounds_of(Activation activation) {
  Bounds<T> bounds;
  if (activation == Activation::relu || activation == Activation::relu6) bounds.low = 0;
  if (activation == Activation::relu6) bounds.high = 6;
  return bounds;
}
template <class S>
Bounds<Compute<S>> bounds_of(const Correlation<S>& c) { return bounds_of<Compute<S>>(c.epilogue.activation); }

// Results on an axis of a forward pass, before pooling leaves out a last one without a neighbour.
inline int64_t unpooled_size(int64_t in, int64_t taps, int64_t stride, int64_t padding, int64_t dilation) {
  return (in + 2 * padding - dilation * (taps - 1) - 1) / stride + 1;
}
inline int64_t unpooled_height(const Conv2dShape& s) {
  return unpooled_size(s.in_height, s.kernel_height, s.stride_h, s.padding_h, s.dilation_h);
}
inline int64_t unpooled_width(const Conv2dShape& s) {
  return unpooled_size(s.in_width, s.kernel_width, s.stride_w, s.padding_w, s.dilation_w);
}

template <class S>
Correlation<S> correlation(const Conv2dForward& p) {
  const Conv2dShape& s = p.shape;
  const int64_t out = s.out_channels / s.groups, in = s.in_channels / s.groups;
  const int64_t *i = p.input.stride, *w = p.weight.stride, *o = p.output.stride;
  return {false, s, s.batch, s.groups, in, out,
          static_cast<const S*>(p.input.data), {i[0], i[1], i[2], i[3]},
          static_cast<const S*>(p.weight.data), w[0], w[1], w[2], w[3], out * w[0],
          static_cast<const S*>(p.bias),
          static_cast<S*>(p.output.data), {o[0], o[1], o[2], o[3]},
          static_cast<const S*>(p.epilogue.residual), p.epilogue,
          unpooled_height(s) - s.out_height, unpooled_width(s) - s.out_width};
}

// Where the gradient of the output has one line, any stride is right. This one gives every line of the result a phase of
// its own, with at most one tap, instead of sums that are zeros but for one term.
inline int64_t input_grad_stride(int64_t in, int64_t out, int64_t taps, int64_t stride, int64_t padding, int64_t dilation) {
  return out == 1 ? max(in + padding, (taps - 1) * dilation + 1) : stride;
}

inline Conv2dShape input_grad_shape(Conv2dShape s) {
  s.stride_h = input_grad_stride(s.in_height, s.out_height, s.kernel_height, s.stride_h, s.padding_h, s.dilation_h);
  s.stride_w = input_grad_stride(s.in_width, s.out_width, s.kernel_width, s.stride_w, s.padding_w, s.dilation_w);
  return s;
}

template <class S>
Correlation<S> correlation(const Conv2dInputGrad& p) {
  const Conv2dShape s = input_grad_shape(p.shape);
  const int64_t out = s.in_channels / s.groups, in = s.out_channels / s.groups;
  const int64_t *g = p.grad_output.stride, *w = p.weight.stride, *o = p.grad_input.stride;
  return {true, s, s.batch, s.groups, in, out,
          static_cast<const S*>(p.grad_output.data), {g[0], g[1], g[2], g[3]},
          static_cast<const S*>(p.weight.data), w[1], w[0], w[2], w[3], in * w[0],
          static_cast<const S*>(p.bias),
          static_cast<S*>(p.grad_input.data), {o[0], o[1], o[2], o[3]},
          static_cast<const S*>(p.epilogue.residual), p.epilogue};
}

}  // namespace
}  // namespace cvfast
