// Pooling of images in float32, without derivatives. Every size is positive.
#pragma once
#include "common.h"

namespace cvfast {

// output[n, c, y, x] = the largest input[n, c, y * stride + i - padding, x * stride + j - padding] for 0 <= i, j < window inside
// the image; NaN if one is. padding <= window / 2, and each window begins before the image's end; it may end behind it.
struct MaxPooling {
  int64_t batch, channels, in_height, in_width, out_height, out_width;
  int64_t window, stride, padding;
  ConstTensor4 input;  // f32 [N, C, H, W], any strides; fastest where channels or columns are neighbours
  Tensor4 output;      // f32 [N, C, P, Q], likewise
};

// output[n, c] = the average of input[n, c, p] over the pixels p, added up in their order.
struct PixelAverage {
  int64_t batch, channels, pixels;
  const float* input;
  int64_t batch_stride, channel_stride, pixel_stride;  // of the input
  float* output;                                       // [N, C]
};

}  // namespace cvfast
