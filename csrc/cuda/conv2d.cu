// The three products of a convolution as implicit matrix products: per group, result[rows, columns] =
// sum over depth of left[rows, depth] * right[depth, columns]. No matrix is ever built in memory: each product below
// says where an element of `left` and `right` lies in the tensors. One kernel multiplies them all, tile by tile.
#include <algorithm>
#include <cstdint>

#include "conv2d.h"

namespace cvfast::cuda {
namespace {

// A tile of the result is 64 x 64; a block of 16 x 16 threads computes it, 4 x 4 elements a thread.
constexpr int kTile = 64;
constexpr int kTileDepth = 16;  // of `left` and `right` in shared memory at a time
constexpr int kThreadsPerSide = 16;
constexpr int kThreads = kThreadsPerSide * kThreadsPerSide;
constexpr int kPerThread = kTile / kThreadsPerSide;
// Rounding errors grow with the number of additions in a row: sums of this many products are added to a second sum.
constexpr int64_t kPartialDepth = 256;
constexpr int64_t kMaxBlocks = 2147483647;  // gridDim.x

// One axis of a product that runs over three axes of a tensor, the last fastest: (batch, height, width) or
// (channel, kernel_height, kernel_width).
struct Index3 {
  int64_t outer, y, x;
};

__device__ Index3 split(int64_t linear, int64_t height, int64_t width) {
  const int64_t rest = linear / width;
  return {rest / height, rest % height, linear % width};
}

template <class T>
__device__ T load(const ConstTensor4& tensor, int64_t i0, int64_t i1, int64_t i2, int64_t i3) {
  const int64_t* stride = tensor.stride;
  return static_cast<const T*>(tensor.data)[i0 * stride[0] + i1 * stride[1] + i2 * stride[2] + i3 * stride[3]];
}

template <class T>
__device__ void store(const Tensor4& tensor, int64_t i0, int64_t i1, int64_t i2, int64_t i3, T value) {
  const int64_t* stride = tensor.stride;
  static_cast<T*>(tensor.data)[i0 * stride[0] + i1 * stride[1] + i2 * stride[2] + i3 * stride[3]] = value;
}

// The input's element under `tap` of the kernel at output position (y, x): zero in the padding.
template <class T>
__device__ T load_input(const Conv2dShape& shape, const ConstTensor4& input, int64_t image, int64_t channel,
                        const Index3& tap, int64_t y, int64_t x) {
  const int64_t h = y * shape.stride_h - shape.padding_h + tap.y * shape.dilation_h;
  const int64_t w = x * shape.stride_w - shape.padding_w + tap.x * shape.dilation_w;
  const bool inside = h >= 0 && h < shape.in_height && w >= 0 && w < shape.in_width;
  return inside ? load<T>(input, image, channel, h, w) : T(0);
}

template <class T>
struct Forward {
  using Element = T;
  Conv2dForward conv;

  __host__ __device__ int64_t groups() const { return conv.shape.groups; }
  __host__ __device__ int64_t rows() const { return conv.shape.out_channels / conv.shape.groups; }
  __host__ __device__ int64_t columns() const {
    return conv.shape.batch * conv.shape.out_height * conv.shape.out_width;
  }
  __device__ int64_t depth() const { return channels() * conv.shape.kernel_height * conv.shape.kernel_width; }

  __device__ Index3 position(int64_t column) const {
    return split(column, conv.shape.out_height, conv.shape.out_width);
  }
  __device__ Index3 tap(int64_t k) const { return split(k, conv.shape.kernel_height, conv.shape.kernel_width); }

  __device__ T left(int64_t group, int64_t row, const Index3& tap) const {
    return load<T>(conv.weight, group * rows() + row, tap.outer, tap.y, tap.x);
  }
  __device__ T right(int64_t group, const Index3& tap, const Index3& at) const {
    return load_input<T>(conv.shape, conv.input, at.outer, group * channels() + tap.outer, tap, at.y, at.x);
  }
  __device__ void put(int64_t group, int64_t row, const Index3& at, T value) const {
    const int64_t channel = group * rows() + row;
    if (conv.bias != nullptr) value += static_cast<const T*>(conv.bias)[channel];
    store(conv.output, at.outer, channel, at.y, at.x, value);
  }

 private:
  __device__ int64_t channels() const { return conv.shape.in_channels / conv.shape.groups; }
};

template <class T>
struct InputGrad {
  using Element = T;
  Conv2dInputGrad conv;

  __host__ __device__ int64_t groups() const { return conv.shape.groups; }
  __host__ __device__ int64_t rows() const { return conv.shape.in_channels / conv.shape.groups; }
  __host__ __device__ int64_t columns() const { return conv.shape.batch * conv.shape.in_height * conv.shape.in_width; }
  __device__ int64_t depth() const { return out_channels() * conv.shape.kernel_height * conv.shape.kernel_width; }

  __device__ Index3 position(int64_t column) const { return split(column, conv.shape.in_height, conv.shape.in_width); }
  __device__ Index3 tap(int64_t k) const { return split(k, conv.shape.kernel_height, conv.shape.kernel_width); }

  __device__ T left(int64_t group, int64_t row, const Index3& tap) const {
    return load<T>(conv.weight, group * out_channels() + tap.outer, row, tap.y, tap.x);
  }
  // The gradient at the output position that saw this input through `tap`: zero where there is none.
  __device__ T right(int64_t group, const Index3& tap, const Index3& at) const {
    const Conv2dShape& shape = conv.shape;
    const int64_t y = at.y + shape.padding_h - tap.y * shape.dilation_h;
    const int64_t x = at.x + shape.padding_w - tap.x * shape.dilation_w;
    if (y < 0 || x < 0 || y % shape.stride_h != 0 || x % shape.stride_w != 0) return T(0);
    const int64_t p = y / shape.stride_h, q = x / shape.stride_w;
    if (p >= shape.out_height || q >= shape.out_width) return T(0);
    return load<T>(conv.grad_output, at.outer, group * out_channels() + tap.outer, p, q);
  }
  __device__ void put(int64_t group, int64_t row, const Index3& at, T value) const {
    const int64_t channel = group * rows() + row;
    if (conv.bias != nullptr) value += static_cast<const T*>(conv.bias)[channel];
    store(conv.grad_input, at.outer, channel, at.y, at.x, value);
  }

 private:
  __device__ int64_t out_channels() const { return conv.shape.out_channels / conv.shape.groups; }
};

template <class T>
struct WeightGrad {
  using Element = T;
  Conv2dWeightGrad conv;

  __host__ __device__ int64_t groups() const { return conv.shape.groups; }
  __host__ __device__ int64_t rows() const { return conv.shape.out_channels / conv.shape.groups; }
  __host__ __device__ int64_t columns() const {
    return conv.shape.in_channels / conv.shape.groups * conv.shape.kernel_height * conv.shape.kernel_width;
  }
  __device__ int64_t depth() const { return conv.shape.batch * conv.shape.out_height * conv.shape.out_width; }

  // Here the taps of the kernel are the columns, and the output's positions the depth.
  __device__ Index3 position(int64_t column) const {
    return split(column, conv.shape.kernel_height, conv.shape.kernel_width);
  }
  __device__ Index3 tap(int64_t k) const { return split(k, conv.shape.out_height, conv.shape.out_width); }

  __device__ T left(int64_t group, int64_t row, const Index3& at) const {
    return load<T>(conv.grad_output, at.outer, group * rows() + row, at.y, at.x);
  }
  __device__ T right(int64_t group, const Index3& at, const Index3& tap) const {
    const int64_t channel = group * (conv.shape.in_channels / conv.shape.groups) + tap.outer;
    return load_input<T>(conv.shape, conv.input, at.outer, channel, tap, at.y, at.x);
  }
  __device__ void put(int64_t group, int64_t row, const Index3& tap, T value) const {
    store(conv.grad_weight, group * rows() + row, tap.outer, tap.y, tap.x, value);
  }
};

__host__ __device__ int64_t ceil_div(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Number of tiles of all groups; the tiles of one column of tiles follow each other, so that they share `right`.
template <class Product>
__host__ __device__ int64_t tile_count(const Product& product) {
  return product.groups() * ceil_div(product.columns(), kTile) * ceil_div(product.rows(), kTile);
}

template <class Product>
__global__ void __launch_bounds__(kThreads, 1) multiply(const __grid_constant__ Product product) {
  using T = typename Product::Element;
  __shared__ T left[kTileDepth][kTile + 1];  // + 1: the threads of a warp store down a column, one bank each
  __shared__ T right[kTileDepth][kTile];

  const int thread = threadIdx.x;
  const int own_row = thread / kThreadsPerSide * kPerThread, own_column = thread % kThreadsPerSide;
  const int64_t row_tiles = ceil_div(product.rows(), kTile), column_tiles = ceil_div(product.columns(), kTile);
  const int64_t tiles = tile_count(product), depth = product.depth();

  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t first_row = tile % row_tiles * kTile;
    const int64_t first_column = tile / row_tiles % column_tiles * kTile;
    const int64_t group = tile / row_tiles / column_tiles;

    // This thread fetches one column of `right`, every fourth element, and one element of each 16th row of `left`.
    const int fetch_column = thread % kTile, fetch_depth = thread / kTile;
    const int left_depth = thread % kTileDepth, left_row = thread / kTileDepth;
    const bool has_column = first_column + fetch_column < product.columns();
    const Index3 position = product.position(has_column ? first_column + fetch_column : 0);

    T sum[kPerThread][kPerThread] = {}, partial[kPerThread][kPerThread] = {};
    for (int64_t k = 0; k < depth; k += kTileDepth) {
      const bool has_depth = k + left_depth < depth;
      const Index3 tap = product.tap(has_depth ? k + left_depth : 0);
#pragma unroll
      for (int i = left_row; i < kTile; i += kThreads / kTileDepth) {
        const bool valid = has_depth && first_row + i < product.rows();
        left[left_depth][i] = valid ? product.left(group, first_row + i, tap) : T(0);
      }
#pragma unroll
      for (int i = fetch_depth; i < kTileDepth; i += kThreads / kTile) {
        const bool valid = has_column && k + i < depth;
        right[i][fetch_column] = valid ? product.right(group, product.tap(k + i), position) : T(0);
      }
      __syncthreads();
#pragma unroll 4
      for (int d = 0; d < kTileDepth; ++d) {
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) {
#pragma unroll
          for (int j = 0; j < kPerThread; ++j) {
            partial[i][j] += left[d][own_row + i] * right[d][own_column + j * kThreadsPerSide];
          }
        }
      }
      __syncthreads();
      if ((k + kTileDepth) % kPartialDepth == 0 || k + kTileDepth >= depth) {
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) {
#pragma unroll
          for (int j = 0; j < kPerThread; ++j) {
            sum[i][j] += partial[i][j];
            partial[i][j] = T(0);
          }
        }
      }
    }

#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      const int64_t column = first_column + own_column + j * kThreadsPerSide;
      if (column >= product.columns()) continue;
      const Index3 at = product.position(column);
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        if (first_row + own_row + i < product.rows()) product.put(group, first_row + own_row + i, at, sum[i][j]);
      }
    }
  }
}

template <class Product>
cudaError_t launch(const Product& product, cudaStream_t stream) {
  const int64_t tiles = tile_count(product);
  if (tiles == 0) return cudaSuccess;
  multiply<<<static_cast<unsigned>(std::min(tiles, kMaxBlocks)), kThreads, 0, stream>>>(product);
  return cudaGetLastError();
}

template <template <class> class Product, class Conv>
cudaError_t launch_as(const Conv& conv, cudaStream_t stream) {
  switch (conv.dtype) {
    case DType::f32: return launch(Product<float>{conv}, stream);
    case DType::f64: return launch(Product<double>{conv}, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t conv2d_forward(const Conv2dForward& conv, cudaStream_t stream) { return launch_as<Forward>(conv, stream); }

cudaError_t conv2d_input_grad(const Conv2dInputGrad& conv, cudaStream_t stream) {
  return launch_as<InputGrad>(conv, stream);
}

cudaError_t conv2d_weight_grad(const Conv2dWeightGrad& conv, cudaStream_t stream) {
  return launch_as<WeightGrad>(conv, stream);
}

}  // namespace cvfast::cuda
