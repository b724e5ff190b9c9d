// 2-D convolution (cross-correlation), as torch.nn.functional.conv2d defines it: with N images, G groups,
//   output[n, k, p, q] = bias[k] + sum over c, r, s of
//       input[n, g*C/G + c, p*stride_h - padding_h + r*dilation_h, q*stride_w - padding_w + s*dilation_w]
//       * weight[k, c, r, s],   g = k / (K/G), c in [0, C/G), r in [0, R), s in [0, S); outside the image: zero.
#pragma once
#include "common.h"

namespace cvfast {

struct Conv2dShape {
  int64_t batch;                        // N
  int64_t in_channels, in_height, in_width;     // C, H, W
  int64_t out_channels, out_height, out_width;  // K, P, Q
  int64_t kernel_height, kernel_width;  // R, S
  int64_t stride_h, stride_w;           // >= 1
  int64_t padding_h, padding_w;         // >= 0, zeros on both sides
  int64_t dilation_h, dilation_w;       // >= 1
  int64_t groups;                       // G divides C and K
};

// The three products of a convolution. Each is linear in both operands, and each one's derivative is written with
// the other two, so that these three give derivatives of every order. Every size may be 0. The result's memory is
// uninitialised on entry and fully written on return; it never overlaps an operand. Results are the same bits for
// any number of threads, for a sample alone or in a batch, and for any strides of the tensors.

// What becomes of a result r: activation(r + residual); then, of each 2x2 results, the largest (NaN if one is NaN) or the mean.
enum class Activation : int32_t { none, relu, relu6, leaky_relu, silu, sigmoid, tanh, gelu, gelu_tanh, hardswish, hardsigmoid };
enum class Pooling : int32_t { none, max, average };
struct Epilogue {
  Activation activation;
  double negative_slope;  // of leaky_relu
  const void* residual;   // laid out in memory as the result is; or nullptr
  Pooling pooling;        // not with a residual
};

// output [N, K, P, Q] = conv2d(input [N, C, H, W], weight [K, C/G, R, S]) + bias [K] (contiguous, or nullptr), and the
// epilogue of that. With pooling P and Q are even, a last line or column that is left over left out, and output is
// [N, K, P / 2, Q / 2].
struct Conv2dForward {
  Conv2dShape shape;
  DType dtype;
  ConstTensor4 input, weight;
  const void* bias;
  Tensor4 output;
  Epilogue epilogue = {};
  const void* packed = nullptr;  // what the kernels packed of these weights, or of others: then it is ignored
  bool same_weights = false;     // the caller knows that it was of these, whose elements need not be compared
};

// The form in which a convolution, or the gradient to the input, reads its weights if somebody keeps them: a number that is the
// same for all calls that can share them (0: none pays), and the bytes of it.
struct Conv2dPacking {
  int64_t form, bytes;
};

// grad_input [N, C, H, W] from grad_output [N, K, P, Q] and weight; with + bias [C] (contiguous, or nullptr) it is the
// transposed convolution of grad_output, with its epilogue (no pooling). P and Q may be smaller than what a convolution of
// [H, W] gives: the rest of its output counts as zeros.
struct Conv2dInputGrad {
  Conv2dShape shape;
  DType dtype;
  ConstTensor4 grad_output, weight;
  const void* bias;
  Tensor4 grad_input;
  Epilogue epilogue = {};
  const void* packed = nullptr;  // as Conv2dForward's
};

// grad_weight [K, C/G, R, S] from grad_output and input.
struct Conv2dWeightGrad {
  Conv2dShape shape;
  DType dtype;
  ConstTensor4 grad_output, input;
  Tensor4 grad_weight;
};

// grad_bias [K], contiguous: the sums of grad_output [N, K, P, Q] over all but the channels.
struct Conv2dBiasGrad {
  int64_t batch, channels, height, width;
  DType dtype;
  ConstTensor4 grad_output;
  void* grad_bias;
};

}  // namespace cvfast
