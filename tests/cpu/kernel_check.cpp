// Checks the CPU kernels without torch: compiled and run by test_kernels.py, also with sanitizers and for other machines.
//
//   kernel_check [<instruction set or storage type>...]      (all available ones if none is named)
//
// For each storage type, convolution, product (forward, gradient to input, gradient to weight) and instruction set:
// - with small whole numbers, whose sums are exact, the result under strict precision is exactly the plain sum in double,
//   rounded once;
// - with normal numbers the error stays within the bound for sums in the compute type, or within Winograd's where that is
//   taken; strict precision changes the bits there and nowhere else;
// - any memory layouts, any number of threads and a sample alone give the same bits, and so does another vector width with
//   the same instructions, and weights that were packed before;
// - every element of the result is written (it holds NaN before) and nothing between its elements is.
// Prints one line per instruction set; the first failure is described on stderr and ends the program with status 1.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "isa.h"
#include "precision.h"

using namespace cvfast;

namespace {

// ---- storage types, converted here without the kernels' code ----

int size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }
const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::f32: return "f32";
    case DType::f64: return "f64";
    case DType::bf16: return "bf16";
    default: return "f16";
  }
}

// The nearest number (ties to even) with `digits` binary digits and exponents from `least`; infinite beyond `largest`.
double round_to(double value, int digits, int least, double largest) {
  if (value == 0 || !std::isfinite(value)) return value;
  const double unit = std::ldexp(1.0, std::max(std::ilogb(value), least) - digits + 1);
  const double rounded = std::nearbyint(value / unit) * unit;
  return std::fabs(rounded) > largest ? std::copysign(std::numeric_limits<double>::infinity(), value) : rounded;
}

double round_to(double value, DType dtype) {
  switch (dtype) {
    case DType::f64: return value;
    case DType::f32: return static_cast<float>(value);
    case DType::bf16: return round_to(value, 8, -126, 3.3895313892515355e38);
    default: return round_to(value, 11, -14, 65504);
  }
}

double read(const char* at, DType dtype) {
  if (dtype == DType::f64) {
    double v;
    std::memcpy(&v, at, 8);
    return v;
  }
  if (dtype == DType::f32) {
    float v;
    std::memcpy(&v, at, 4);
    return v;
  }
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  const int exponent_bits = dtype == DType::bf16 ? 8 : 5, fraction_bits = 15 - exponent_bits;
  const int exponent = bits >> fraction_bits & ((1 << exponent_bits) - 1), fraction = bits & ((1 << fraction_bits) - 1);
  const int bias = (1 << (exponent_bits - 1)) - 1;
  double v = exponent == 0 ? std::ldexp(fraction, 1 - bias - fraction_bits)
                           : std::ldexp(fraction + (1 << fraction_bits), exponent - bias - fraction_bits);
  if (exponent == (1 << exponent_bits) - 1) v = fraction ? std::nan("") : std::numeric_limits<double>::infinity();
  return bits & 0x8000 ? -v : v;
}

// `value` must be a number of the storage type, or NaN.
void write(char* at, DType dtype, double value) {
  if (dtype == DType::f64) {
    std::memcpy(at, &value, 8);
  } else if (dtype == DType::f32) {
    const float v = static_cast<float>(value);
    std::memcpy(at, &v, 4);
  } else {
    const int exponent_bits = dtype == DType::bf16 ? 8 : 5, fraction_bits = 15 - exponent_bits;
    const int bias = (1 << (exponent_bits - 1)) - 1, top = (1 << exponent_bits) - 1;
    int bits = 0;
    if (std::isnan(value)) {
      bits = top << fraction_bits | 1 << (fraction_bits - 1);
    } else if (std::isinf(value)) {
      bits = top << fraction_bits;
    } else if (value != 0) {
      const int exponent = std::max(std::ilogb(value), 1 - bias);
      const int significand = static_cast<int>(std::ldexp(std::fabs(value), fraction_bits - exponent));
      bits = significand + ((exponent + bias - 1) << fraction_bits);
    }
    const uint16_t v = static_cast<uint16_t>(bits | (std::signbit(value) ? 0x8000 : 0));
    std::memcpy(at, &v, 2);
  }
}

// ---- tensors ----

enum class Layout { contiguous, channels_last, spaced };  // spaced: no dimension has stride 1, in an order of its own

struct Array {  // logical values [N, C, H, W]
  int64_t size[4];
  std::vector<double> value;
  explicit Array(const int64_t (&s)[4]) : size{s[0], s[1], s[2], s[3]}, value(s[0] * s[1] * s[2] * s[3]) {}
  double& at(int64_t n, int64_t c, int64_t h, int64_t w) {
    return value[((n * size[1] + c) * size[2] + h) * size[3] + w];
  }
};

std::vector<char> encode(const std::vector<double>& values, DType dtype) {
  std::vector<char> packed(values.size() * size_of(dtype));
  for (size_t i = 0; i < values.size(); ++i) write(&packed[i * size_of(dtype)], dtype, values[i]);
  return packed;
}

struct Stored {
  DType dtype;
  int64_t size[4], stride[4];
  std::vector<char> bytes;  // exactly as long as the tensor reaches, so that AddressSanitizer sees a step too far

  Stored(const int64_t (&s)[4], DType d, Layout layout) : dtype(d), size{s[0], s[1], s[2], s[3]}, stride{} {
    static const int order[3][4] = {{3, 2, 1, 0}, {1, 3, 2, 0}, {2, 0, 3, 1}};  // innermost first
    int64_t next = layout == Layout::spaced ? 2 : 1, reach = 0;
    for (int d : order[static_cast<int>(layout)]) {
      stride[d] = next;
      reach += (size[d] - 1) * next;
      next *= std::max<int64_t>(size[d], 1);
    }
    const bool empty = s[0] * s[1] * s[2] * s[3] == 0;
    bytes.resize(empty ? 0 : (reach + 1) * size_of(dtype));
    for (size_t i = 0; i < bytes.size(); i += size_of(dtype)) write(&bytes[i], dtype, std::nan(""));
  }
  int64_t offset(int64_t n, int64_t c, int64_t h, int64_t w) const {
    return (n * stride[0] + c * stride[1] + h * stride[2] + w * stride[3]) * size_of(dtype);
  }
  template <class Body>
  void each(Body body) const {
    int64_t i = 0;
    for (int64_t n = 0; n < size[0]; ++n)
      for (int64_t c = 0; c < size[1]; ++c)
        for (int64_t h = 0; h < size[2]; ++h)
          for (int64_t w = 0; w < size[3]; ++w) body(i++, offset(n, c, h, w));
  }
  void fill(const std::vector<char>& packed) {
    each([&](int64_t i, int64_t at) { std::memcpy(&bytes[at], &packed[i * size_of(dtype)], size_of(dtype)); });
  }
  // The elements in logical order, as bits.
  std::vector<char> packed() const {
    std::vector<char> bits(size[0] * size[1] * size[2] * size[3] * size_of(dtype));
    each([&](int64_t i, int64_t at) { std::memcpy(&bits[i * size_of(dtype)], &bytes[at], size_of(dtype)); });
    return bits;
  }
  // Bytes between the elements, which nobody may write.
  std::vector<char> gaps() const {
    std::vector<char> rest = bytes;
    each([&](int64_t, int64_t at) { std::memset(&rest[at], 0, size_of(dtype)); });
    return rest;
  }
  ConstTensor4 view() const { return {bytes.data(), {stride[0], stride[1], stride[2], stride[3]}}; }
  Tensor4 view() { return {bytes.data(), {stride[0], stride[1], stride[2], stride[3]}}; }
};

// ---- threads ----

void in_one_piece(int64_t n, void (*body)(void*, int64_t, int64_t), void* state) { body(state, 0, n); }

void in_small_pieces_backwards(int64_t n, void (*body)(void*, int64_t, int64_t), void* state) {
  for (int64_t end = n; end > 0; end -= std::min<int64_t>(end, 2)) body(state, std::max<int64_t>(end - 2, 0), end);
}

void on_threads(int64_t n, void (*body)(void*, int64_t, int64_t), void* state) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i; (i = next++) < n;) body(state, i, i + 1);
  };
  std::thread second(work), third(work);
  work();
  second.join();
  third.join();
}

const ThreadPool pools[] = {{1, in_one_piece}, {7, in_small_pieces_backwards}, {3, on_threads}};

// ---- convolutions ----

enum class Product { forward, input_grad, weight_grad };
const char* const product_names[] = {"forward", "input_grad", "weight_grad"};

struct Case {
  int64_t n, c, h, w, k, r, s, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups;

  Conv2dShape shape() const {
    const int64_t p = (h + 2 * padding_h - dilation_h * (r - 1) - 1) / stride_h + 1;
    const int64_t q = (w + 2 * padding_w - dilation_w * (s - 1) - 1) / stride_w + 1;
    return {n, c, h, w, k, std::max<int64_t>(p, 0), std::max<int64_t>(q, 0), r, s, stride_h, stride_w,
            padding_h, padding_w, dilation_h, dilation_w, groups};
  }
  std::string text() const {
    char buffer[200];
    std::snprintf(buffer, sizeof buffer, "n%d c%d %dx%d k%d kernel %dx%d stride %dx%d padding %dx%d dilation %dx%d groups %d",
                  int(n), int(c), int(h), int(w), int(k), int(r), int(s), int(stride_h), int(stride_w), int(padding_h),
                  int(padding_w), int(dilation_h), int(dilation_w), int(groups));
    return buffer;
  }
};

const Case cases[] = {
    {2, 16, 5, 7, 32, 3,  3, 1, 1, 1, 1, 1, 1, 1},     // whole tiles of channels
    {2, 37, 6, 5, 45, 3, 3, 1, 1, 1, 1, 1, 1, 1},      // tails everywhere, depth over 256
    {1, 40, 5, 5, 33, 5, 3, 2, 1, 2, 0, 1, 2, 1},      // asymmetric kernel, stride, padding, dilation
    {1, 3, 23, 21, 20, 7, 7, 2, 2, 3, 3, 1, 1, 1},     // first layer of a network
    {2, 12, 8, 8, 18, 3, 2, 3, 2, 1, 1, 2, 3, 3},      // groups, dilation against stride
    {2, 20, 10, 9, 20, 3, 3, 1, 1, 1, 1, 1, 1, 20},    // depthwise
    {1, 37, 8, 9, 37, 5, 3, 2, 3, 2, 1, 1, 2, 37},     // depthwise with everything
    {1, 6, 6, 7, 18, 3, 3, 2, 2, 1, 1, 1, 1, 6},       // depthwise, 3 outputs per channel
    {2, 70, 3, 4, 300, 1, 1, 1, 1, 0, 0, 1, 1, 1},     // 1x1, more channels than a block of columns holds
    {1, 33, 17, 17, 35, 1, 1, 2, 2, 0, 0, 1, 1, 1},    // 1x1 with stride: pixels without a tap
    {1, 5, 4, 4, 3, 4, 4, 1, 1, 5, 6, 1, 1, 1},        // padding wider than the kernel
    {1, 2, 20, 17, 110, 3, 3, 1, 1, 0, 0, 1, 1, 1},    // more rows than a block holds
    {1, 2, 9, 9, 4, 2, 2, 7, 5, 0, 0, 1, 1, 1},        // stride wider than the kernel
    {5, 2, 33, 32, 3, 3, 3, 1, 1, 1, 1, 1, 1, 1},      // weight gradient in several slices
    // few channels:
    {1, 3, 15, 17, 64, 7, 7, 2, 2, 3, 3, 1, 1, 1},     // first layer of a network, pixels or channels fill vectors
    {2, 6, 14, 14, 16, 5, 5, 1, 1, 0, 0, 1, 1, 1},     // much padding in the gradient to the input
    {1, 2, 3, 90, 3, 3, 3, 1, 1, 4, 9, 1, 1, 1},       // long lines, padding wider than the kernel
    {2, 12, 5, 23, 12, 3, 3, 1, 1, 1, 1, 1, 1, 3},     // groups of 4
    {1, 2, 300, 1, 3, 270, 1, 1, 1, 2, 0, 1, 1, 1},    // a column
    {1, 2, 2100, 1, 16, 12, 1, 1, 1, 3, 0, 1, 1, 1},   // a column too long to be handled as a line
    {2, 43, 9, 23, 43, 3, 3, 1, 1, 1, 1, 1, 1, 43},    // depthwise: long lines, several blocks of channels
    {1, 21, 15, 14, 21, 5, 5, 2, 2, 2, 2, 1, 1, 21},   // depthwise with a stride
    {2, 9, 14, 7, 9, 7, 7, 1, 1, 3, 3, 1, 1, 9},       // depthwise 7x7
    {4, 9, 33, 32, 9, 3, 3, 1, 1, 1, 1, 1, 1, 9},      // depthwise: weight gradient in several slices
    // Implicit GEMM:
    {1, 36, 16, 18, 96, 1, 1, 1, 1, 0, 0, 1, 1, 1},    // 1x1, results added up in place in either format
    {1, 260, 16, 9, 20, 1, 1, 1, 1, 0, 0, 1, 1, 1},    // the same over two blocks of depth, a tail of channels
    {2, 30, 9, 9, 300, 3, 3, 2, 2, 1, 1, 1, 1, 1},     // few pixels; more channels than a block of columns holds
    {1, 19, 9, 10, 35, 3, 3, 1, 1, 4, 4, 4, 4, 1},     // dilated
    {2, 20, 9, 8, 34, 1, 1, 2, 2, 0, 0, 1, 1, 1},      // 1x1 with a stride: one phase of the input's gradient has taps
    {2, 16, 7, 11, 33, 1, 1, 3, 2, 0, 0, 1, 1, 1},     // the same with another stride on each axis
    {1, 17, 8, 8, 16, 1, 1, 1, 2, 0, 0, 1, 1, 1},      // and with lines that follow each other
    {10, 70, 9, 10, 40, 3, 3, 2, 2, 1, 1, 1, 1, 1},    // edges apart, where taps meet padding
    {5, 20, 4, 4, 140, 4, 4, 1, 1, 0, 0, 1, 1, 1},     // kernel covers the image: a tap per pixel of the input's gradient
    {2, 20, 40, 1, 140, 30, 1, 1, 1, 3, 0, 1, 1, 1},   // kernel longer than the result
    // Winograd:
    {2, 16, 3, 5, 16, 3, 3, 1, 1, 1, 1, 1, 1, 1},      // not yet: too few pixels
    {2, 32, 8, 8, 32, 3, 3, 1, 1, 1, 1, 1, 1, 1},     // whole tiles, whole vectors
    {2, 131, 5, 9, 19, 3, 3, 1, 1, 1, 1, 1, 1, 1},     // two blocks of channels, tails everywhere
    {1, 38, 13, 6, 44, 3, 3, 1, 1, 0, 2, 1, 1, 2},     // groups; no padding above, more than usual aside
    {1, 32, 6, 5, 32, 3, 3, 1, 1, 4, 3, 1, 1, 1},      // padding wider than the kernel
    {2, 19, 16, 16, 35, 3, 3, 1, 1, 4, 4, 4, 4, 1},    // dilated: a tile for each part of the image
    {1, 16, 26, 25, 18, 3, 3, 1, 1, 3, 1, 2, 2, 1},    // parts of different size
    {1, 17, 49, 50, 16, 3, 3, 1, 1, 3, 3, 3, 2, 1},    // parts that some tiles miss
    {1, 33, 4, 31, 34, 3, 3, 1, 1, 1, 1, 1, 1, 1},     // one line of tiles
    {2, 64, 24, 23, 64, 3, 3, 1, 1, 1, 1, 1, 1, 4},    // several chunks of tiles
    {3, 32, 30, 29, 34, 3, 3, 1, 1, 1, 1, 1, 1, 2},    // weight gradient in two slices, one of them of two chunks
    // Winograd on the phases of stride 2:
    {2, 32, 16, 14, 32, 4, 4, 2, 2, 1, 1, 1, 1, 1},    // whole tiles and partial ones
    {1, 131, 17, 16, 19, 4, 4, 2, 2, 2, 0, 1, 1, 1},   // blocks of channels, tails, phases of different size
    {1, 34, 15, 15, 40, 4, 4, 2, 2, 3, 5, 1, 1, 2},    // groups, padding wider than the kernel
    {1, 33, 32, 31, 34, 3, 3, 2, 2, 1, 1, 1, 1, 1},    // phases with one tap on an axis
    {1, 36, 31, 32, 18, 3, 4, 2, 2, 0, 1, 1, 1, 1},    // the same on one axis only; the first phase has one tap
    {1, 64, 16, 46, 64, 4, 4, 2, 2, 1, 1, 1, 1, 4},    // several chunks of tiles
    {2, 20, 12, 12, 18, 4, 4, 2, 2, 1, 1, 1, 1, 1},    // partial tiles that still pay
    {2, 20, 8, 8, 18, 4, 4, 2, 2, 1, 1, 1, 1, 1},      // one tile: the gradient to the input alone
    {9, 20, 7, 8, 144, 4, 4, 2, 2, 1, 1, 1, 1, 1},     // a short tile, two blocks of channels, more than few tiles
    {0, 4, 5, 5, 6, 3, 3, 1, 1, 1, 1, 1, 1, 1},        // nothing: batch, channels, outputs, pixels, kernel
    {2, 0, 5, 5, 6, 3, 3, 1, 1, 1, 1, 1, 1, 1},
    {2, 4, 5, 5, 0, 3, 3, 1, 1, 1, 1, 1, 1, 1},
    {2, 4, 2, 5, 6, 3, 3, 1, 1, 0, 1, 1, 1, 1},
    {2, 4, 0, 5, 6, 3, 3, 1, 1, 2, 1, 1, 1, 1},
};

struct Operands {
  Array first, second;  // forward: input, weight; input_grad: grad_output, weight; weight_grad: grad_output, input
  std::vector<double> bias;
  int64_t result_size[4];
};

void sizes(const Conv2dShape& s, int64_t (&input)[4], int64_t (&weight)[4], int64_t (&output)[4]) {
  const int64_t i[4] = {s.batch, s.in_channels, s.in_height, s.in_width};
  const int64_t w[4] = {s.out_channels, s.in_channels / s.groups, s.kernel_height, s.kernel_width};
  const int64_t o[4] = {s.batch, s.out_channels, s.out_height, s.out_width};
  std::copy(i, i + 4, input), std::copy(w, w + 4, weight), std::copy(o, o + 4, output);
}

Operands make_operands(const Conv2dShape& s, Product product, const std::function<double()>& number) {
  int64_t input[4], weight[4], output[4];
  sizes(s, input, weight, output);
  Operands o{Array(product == Product::forward ? input : output), Array(product == Product::weight_grad ? input : weight), {}, {}};
  const auto& result = product == Product::forward ? output : product == Product::input_grad ? input : weight;
  std::copy(result, result + 4, o.result_size);
  for (double& v : o.first.value) v = number();
  for (double& v : o.second.value) v = number();
  if (product != Product::weight_grad)
    for (int64_t k = 0; k < result[1]; ++k) o.bias.push_back(number());
  return o;
}

// The product by its definition, in double, and the sum of the terms' magnitudes.
struct Reference {
  Array value, magnitude;
};

Reference reference(const Conv2dShape& s, Product product, const Operands& o) {
  Reference r{Array(o.result_size), Array(o.result_size)};
  if (!o.bias.empty()) {
    const int64_t channels = o.result_size[1], pixels = o.result_size[2] * o.result_size[3];
    for (size_t i = 0; i < r.value.value.size(); ++i) {
      r.value.value[i] = o.bias[i / pixels % channels];
      r.magnitude.value[i] = std::fabs(r.value.value[i]);
    }
  }
  const int64_t in_group = s.in_channels / s.groups, out_group = s.out_channels / s.groups;
  for (int64_t n = 0; n < s.batch; ++n)
    for (int64_t k = 0; k < s.out_channels; ++k)
      for (int64_t p = 0; p < s.out_height; ++p)
        for (int64_t q = 0; q < s.out_width; ++q)
          for (int64_t c = 0; c < in_group; ++c)
            for (int64_t i = 0; i < s.kernel_height; ++i)
              for (int64_t j = 0; j < s.kernel_width; ++j) {
                const int64_t h = p * s.stride_h - s.padding_h + i * s.dilation_h;
                const int64_t w = q * s.stride_w - s.padding_w + j * s.dilation_w;
                if (h < 0 || h >= s.in_height || w < 0 || w >= s.in_width) continue;
                const int64_t channel = k / out_group * in_group + c;
                const int64_t input = ((n * s.in_channels + channel) * s.in_height + h) * s.in_width + w;
                const int64_t weight = ((k * in_group + c) * s.kernel_height + i) * s.kernel_width + j;
                const int64_t output = ((n * s.out_channels + k) * s.out_height + p) * s.out_width + q;
                const double a = o.first.value[product == Product::forward ? input : output];
                const double b = o.second.value[product == Product::weight_grad ? input : weight];
                const int64_t result = product == Product::forward ? output : product == Product::input_grad ? input : weight;
                r.value.value[result] += a * b;
                r.magnitude.value[result] += std::fabs(a * b);
              }
  return r;
}

// Operands in a storage type, elements in logical order.
struct Encoded {
  std::vector<char> first, second, bias;
  Encoded(const Operands& o, DType dtype)
      : first(encode(o.first.value, dtype)), second(encode(o.second.value, dtype)), bias(encode(o.bias, dtype)) {}
};

struct Layouts {
  Layout first, second, result;
};

std::string context;  // what is being checked, for the message

[[noreturn]] void fail(const std::string& text) {
  std::fprintf(stderr, "FAILED: %s: %s\n", context.c_str(), text.c_str());
  std::exit(1);
}

// Memory for packed weights, aligned to 64 bytes, of just the size.
struct Packed {
  std::vector<char> bytes;
  explicit Packed(int64_t count) : bytes(count > 0 ? count + 64 : 0) {}
  char* data() { return bytes.empty() ? nullptr : &bytes[(64 - reinterpret_cast<uintptr_t>(&bytes[0]) % 64) % 64]; }
};

// kept: with weights that were packed before, if there is a form of them that the product takes.
Stored run(const Conv2dShape& s, Product product, DType dtype, const Operands& o, const Encoded& bits, Layouts layouts,
           const ThreadPool& pool, bool kept = false) {
  Stored first(o.first.size, dtype, layouts.first), second(o.second.size, dtype, layouts.second);
  Stored result(o.result_size, dtype, layouts.result);
  first.fill(bits.first);
  second.fill(bits.second);
  const std::vector<char> gaps = result.gaps();
  const Stored &const_first = first, &const_second = second;
  switch (product) {
    case Product::forward: {
      Conv2dForward call = {s, dtype, const_first.view(), const_second.view(), bits.bias.data(), result.view()};
      Packed packed(kept ? kernels().conv2d_packing(call).bytes : 0);
      if (packed.data()) kernels().conv2d_pack(call, packed.data(), pool);
      call.packed = packed.data();
      kernels().conv2d_forward(call, pool);
      break;
    }
    case Product::input_grad: {
      Conv2dInputGrad call = {s, dtype, const_first.view(), const_second.view(), bits.bias.data(), result.view()};
      Packed packed(kept ? kernels().conv2d_input_grad_packing(call).bytes : 0);
      if (packed.data()) kernels().conv2d_input_grad_pack(call, packed.data(), pool);
      call.packed = packed.data();
      kernels().conv2d_input_grad(call, pool);
      break;
    }
    case Product::weight_grad:
      kernels().conv2d_weight_grad({s, dtype, const_first.view(), const_second.view(), result.view()}, pool);
      break;
  }
  if (result.gaps() != gaps) fail("memory between the result's elements was written");
  return result;
}

constexpr double winograd_error = 2e-6;

double epsilon(DType dtype) { return dtype == DType::f64 ? std::ldexp(1, -53) : std::ldexp(1, -24); }
double half_ulp(DType dtype) { return dtype == DType::bf16 ? std::ldexp(1, -8) : dtype == DType::f16 ? std::ldexp(1, -11) : 0; }

// Does Winograd's F(4x4, 3x3), or F(4x4, 2x2) on the phases of stride 2, compute this product? Then an error spreads over the
// tile.
bool by_winograd(const Conv2dShape& s, Product product, DType dtype) {
  const bool input_grad = product == Product::input_grad, phases = s.stride_h == 2;
  int64_t height = input_grad ? s.in_height : s.out_height, width = input_grad ? s.in_width : s.out_width;
  const bool dilated = s.dilation_h != 1 || s.dilation_w != 1;
  if (dtype == DType::f64 || std::min(s.in_channels, s.out_channels) < 16 * s.groups) return false;
  if (dilated && (phases || (input_grad && std::min(s.out_height, s.out_width) == 1))) return false;
  const int64_t part_tiles =
      (height + 4 * s.dilation_h - 1) / (4 * s.dilation_h) * ((width + 4 * s.dilation_w - 1) / (4 * s.dilation_w));
  if (dilated && 6 * part_tiles * s.dilation_h * s.dilation_w > height * width) return false;
  if (!phases) return s.kernel_height == 3 && s.kernel_width == 3 && s.stride_h == 1 && s.stride_w == 1 && height * width >= 16;
  if (input_grad) height = (height + 1) / 2, width = (width + 1) / 2;
  const int64_t taps = s.kernel_height * s.kernel_width, tiles = (height + 3) / 4 * ((width + 3) / 4);
  const auto fits = [](int64_t kernel, int64_t stride) { return stride == 2 && (kernel == 3 || kernel == 4); };
  if (input_grad && taps < 16 && s.in_channels <= 32 * s.groups) return false;
  const int64_t least_tiles = taps < 16 ? 16 : input_grad ? 1 : 4;
  const bool many = product == Product::weight_grad ? s.batch * tiles >= 16 : tiles >= least_tiles;
  return fits(s.kernel_height, s.stride_h) && fits(s.kernel_width, s.stride_w) && many &&
         3 * (s.kernel_height + 6) * (s.kernel_width + 6) * tiles <= 2 * taps * height * width;
}

// Winograd's error: relative in the L2 norm over the whole result, and an element's against the largest sum.
void compare_winograd(const Stored& result, const Reference& expected) {
  const double largest = *std::max_element(expected.magnitude.value.begin(), expected.magnitude.value.end());
  double error = 0, norm = 0;
  result.each([&](int64_t i, int64_t at) {
    const double want = expected.value.value[i], rounding = half_ulp(result.dtype) * std::fabs(want) + std::ldexp(1, -25);
    const double beyond = std::fabs(read(&result.bytes[at], result.dtype) - want) - rounding;
    if (!(beyond <= 24 * epsilon(result.dtype) * largest)) fail("element " + std::to_string(i) + " is wrong");
    error += std::pow(std::max(beyond, 0.0), 2);
    norm += want * want;
  });
  if (error > std::pow(winograd_error, 2) * norm) fail("relative error " + std::to_string(1e6 * std::sqrt(error / norm)) + "e-6");
}

void compare(const Stored& result, const Reference& expected, bool exact) {
  result.each([&](int64_t i, int64_t at) {
    const double got = read(&result.bytes[at], result.dtype), want = expected.value.value[i];
    const double rounded = round_to(want, result.dtype);
    // A chain's errors: one rounding for each of at most 256 terms and of the blocks, far fewer in the mean.
    const double bound = 24 * epsilon(result.dtype) * expected.magnitude.value[i] + half_ulp(result.dtype) * std::fabs(want) +
                         std::ldexp(1, -25);
    const bool good = exact ? got == rounded : std::fabs(got - want) <= bound;
    if (!good) {
      char text[160];
      std::snprintf(text, sizeof text, "element %ld is %.17g, expected %.17g (bound %.3g)", long(i), got, exact ? rounded : want, bound);
      fail(text);
    }
  });
}

// A sample of the batch by itself.
Array sample(const Array& from, int64_t n) {
  const int64_t size[4] = {1, from.size[1], from.size[2], from.size[3]};
  Array one(size);
  const int64_t count = one.value.size();
  std::copy_n(from.value.begin() + n * count, count, one.value.begin());
  return one;
}

void check_samples(const Conv2dShape& s, Product product, DType dtype, const Operands& o, const std::vector<char>& batch) {
  Conv2dShape one_shape = s;
  one_shape.batch = 1;
  for (int64_t n = 0; n < s.batch; ++n) {
    Operands one = {sample(o.first, n), o.second, o.bias, {1, o.result_size[1], o.result_size[2], o.result_size[3]}};
    const std::vector<char> bits =
        run(one_shape, product, dtype, one, Encoded(one, dtype), {Layout::channels_last, Layout::contiguous, Layout::channels_last}, pools[0]).packed();
    if (!std::equal(bits.begin(), bits.end(), batch.begin() + n * bits.size())) fail("a sample alone differs from itself in the batch");
  }
}

// A product's operands and what it must give: shared by the instruction sets.
struct Expected {
  Conv2dShape shape;
  Product product;
  DType dtype;
  Operands exact, rough;  // whole numbers, normal ones
  Encoded exact_bits, rough_bits;
  Reference exact_reference, rough_reference;

  Expected(const Case& c, Product p, DType d, std::mt19937&& engine)
      : shape(c.shape()), product(p), dtype(d),
        exact(make_operands(shape, p, [&] { return static_cast<double>(engine() % 7) - 3; })),
        rough(make_operands(shape, p, [&] { return round_to(std::normal_distribution<double>()(engine), d); })),
        exact_bits(exact, d), rough_bits(rough, d),
        exact_reference(reference(shape, p, exact)), rough_reference(reference(shape, p, rough)) {}
};

// Checks one product on the active instruction set; returns the bits of its result for normal numbers.
std::vector<char> check(const Expected& e) {
  const auto& [s, product, dtype, exact, rough, exact_bits, rough_bits, exact_reference, rough_reference] = e;
  const Layout C = Layout::contiguous, L = Layout::channels_last, X = Layout::spaced;
  const Layouts layouts[] = {{C, C, C}, {L, L, L}, {L, C, C}, {C, L, L}, {X, X, X}};
  const std::string base = context;
  const bool winograd = by_winograd(s, product, dtype);
  set_strict_precision(true);
  compare(run(s, product, dtype, exact, exact_bits, layouts[0], pools[0]), exact_reference, true);
  const std::vector<char> strict_bits = run(s, product, dtype, rough, rough_bits, layouts[0], pools[0]).packed();
  set_strict_precision(false);
  std::vector<char> bits;
  for (const Layouts& layout : layouts) {
    const int number = static_cast<int>(&layout - layouts);
    context = base + ", layouts " + std::to_string(number);
    const Stored result = run(s, product, dtype, rough, rough_bits, layout, pools[number % 3]);
    if (number == 0) {
      bits = result.packed();
      if (winograd)
        compare_winograd(result, rough_reference);
      else
        compare(result, rough_reference, false);
    }
    if (bits != result.packed()) fail("bits differ from those of contiguous tensors and one thread");
    if (product != Product::weight_grad && number < 2 &&
        bits != run(s, product, dtype, rough, rough_bits, layout, pools[number], true).packed())
      fail("bits differ with packed weights");
  }
  context = base;
  if (!winograd && bits != strict_bits) fail("strict precision changes the bits");
  if (winograd && dtype == DType::f32 && bits == strict_bits) fail("strict precision has no effect");
  if (product != Product::weight_grad) check_samples(s, product, dtype, rough, bits);
  return bits;
}

// Checks one product on each instruction set. Those with fused multiply-add have one and the same chain of operations per
// element, hence the same bits.
void check(const Case& c, Product product, DType dtype, const std::vector<std::string>& isas) {
  const unsigned seed = static_cast<unsigned>(&c - cases) * 3 + static_cast<unsigned>(product);
  const Expected expected(c, product, dtype, std::mt19937(seed));
  std::vector<char> fused;
  for (const std::string& isa : isas) {
    set_isa(isa);
    context = isa + " " + name_of(dtype) + " " + product_names[static_cast<int>(product)] + " " + c.text();
    const std::vector<char> bits = check(expected);
    if (isa == "baseline") continue;
    if (!fused.empty() && bits != fused) fail("bits differ from those of another vector width");
    fused = bits;
  }
}

// Every 16-bit number is read as it is, and stored as the nearest one: by a 1x1 convolution with weight 1, and with the
// numbers between two neighbours through a second channel.
void check_conversions(DType dtype) {
  const int64_t count = 65536;
  const Case identity = {1, 2, 1, count, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1};
  const Conv2dShape s = identity.shape();
  Operands o = make_operands(s, Product::forward, [] { return 0.0; });
  char bits[8] = {};  // a number of any type
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t v = static_cast<uint16_t>(i);
    std::memcpy(bits, &v, 2);
    o.first.at(0, 0, 0, i) = read(bits, dtype);
  }
  o.second.at(0, 0, 0, 0) = 1;
  const double part[] = {0, 0.25, 0.5, 0.75};  // of the distance between neighbours
  for (double fraction : part) {
    o.second.at(0, 1, 0, 0) = fraction;
    for (int64_t i = 0; i < count; ++i) {
      const double v = o.first.at(0, 0, 0, i);
      const double ulp = std::isfinite(v) && v != 0
                             ? std::ldexp(1, std::max(std::ilogb(v), dtype == DType::bf16 ? -126 : -14) - (dtype == DType::bf16 ? 7 : 10))
                             : 0;
      o.first.at(0, 1, 0, i) = dtype == DType::bf16 && std::fabs(v) < std::ldexp(1, -100) ? 0 : std::copysign(ulp, v);
    }
    const Stored result = run(s, Product::forward, dtype, o, Encoded(o, dtype), {Layout::contiguous, Layout::contiguous, Layout::contiguous}, pools[0]);
    result.each([&](int64_t i, int64_t at) {
      const double want = round_to(o.first.at(0, 0, 0, i) + fraction * o.first.at(0, 1, 0, i), dtype);
      const double got = read(&result.bytes[at], dtype);
      if (!(got == want || (std::isnan(got) && std::isnan(want)))) {
        char text[160];
        std::snprintf(text, sizeof text, "number %#x plus %g ulp is stored as %.9g, expected %.9g", int(i), fraction, got, want);
        fail(text);
      }
    });
  }
}

// One bad input pixel reaches exactly the outputs whose taps touch it.
void check_nonfinite_input(DType dtype, double bad, const Case& c) {
  const Conv2dShape s = c.shape();
  std::mt19937 engine(1);
  std::uniform_int_distribution<int> whole(1, 3);
  Operands o = make_operands(s, Product::forward, [&] { return whole(engine); });
  o.first.at(1, 2, 3, 4) = bad;
  for (Layout layout : {Layout::contiguous, Layout::channels_last}) {
    const Stored result = run(s, Product::forward, dtype, o, Encoded(o, dtype), {layout, layout, layout}, pools[0]);
    for (int64_t n = 0; n < s.batch; ++n)
      for (int64_t k = 0; k < s.out_channels; ++k)
        for (int64_t p = 0; p < s.out_height; ++p)
          for (int64_t q = 0; q < s.out_width; ++q) {
            const bool touched = n == 1 && std::abs(p * s.stride_h - 3) <= 1 && std::abs(q * s.stride_w - 4) <= 1;
            const double got = read(&result.bytes[result.offset(n, k, p, q)], dtype);
            const bool good = touched ? (std::isnan(bad) ? std::isnan(got) : got == bad) : std::isfinite(got);
            if (!good) fail("a NaN or infinite input pixel came out wrong");
          }
  }
}

// One bad weight reaches exactly its output channel; an infinite one makes NaN of padding.
void check_nonfinite_weight(DType dtype, double bad, const Case& c) {
  const Conv2dShape s = c.shape();
  std::mt19937 engine(1);
  std::uniform_int_distribution<int> whole(1, 3);
  Operands o = make_operands(s, Product::forward, [&] { return whole(engine); });
  o.second.at(3, 2, 0, 1) = bad;
  for (Layout layout : {Layout::contiguous, Layout::channels_last}) {
    const Stored result = run(s, Product::forward, dtype, o, Encoded(o, dtype), {layout, layout, layout}, pools[0]);
    for (int64_t n = 0; n < s.batch; ++n)
      for (int64_t k = 0; k < s.out_channels; ++k)
        for (int64_t p = 0; p < s.out_height; ++p)
          for (int64_t q = 0; q < s.out_width; ++q) {
            const double got = read(&result.bytes[result.offset(n, k, p, q)], dtype);
            const bool good = k != 3                         ? std::isfinite(got)
                              : std::isnan(bad) || p == 0 ? std::isnan(got)
                                                          : got == bad;
            if (!good) fail("a NaN or infinite weight came out wrong");
          }
  }
}

// Bad numbers among the gradients of one output channel reach its weights alone, and the bits are the exact algorithm's.
void check_nonfinite_grad(DType dtype, double bad, const Case& c) {
  const Conv2dShape s = c.shape();
  std::mt19937 engine(1);
  std::uniform_int_distribution<int> whole(1, 3);
  Operands o = make_operands(s, Product::weight_grad, [&] { return whole(engine); });
  o.first.at(1, 3, 0, 2) = bad;
  for (Layout layout : {Layout::contiguous, Layout::channels_last}) {
    const auto weight_grad = [&] {
      return run(s, Product::weight_grad, dtype, o, Encoded(o, dtype), {layout, layout, layout}, pools[1]);
    };
    const Stored result = weight_grad();
    set_strict_precision(true);
    const std::vector<char> exact = weight_grad().packed();
    set_strict_precision(false);
    if (result.packed() != exact) fail("a NaN or infinite gradient: not the bits of the exact algorithm");
    result.each([&](int64_t i, int64_t at) {
      const bool touched = i / (result.size[1] * result.size[2] * result.size[3]) == 3;
      if (std::isfinite(read(&result.bytes[at], dtype)) == touched) fail("a NaN or infinite gradient came out wrong");
    });
  }
}

void check_nonfinite(DType dtype, double bad) {
  const Case by_gemm = {2, 4, 7, 8, 34, 3, 3, 2, 1, 1, 1, 1, 1, 1}, winograd = {2, 18, 7, 8, 34, 3, 3, 1, 1, 1, 1, 1, 1, 1};
  const Case on_phases = {2, 18, 31, 32, 34, 3, 3, 2, 2, 1, 1, 1, 1, 1};
  for (const Case& c : {by_gemm, winograd, on_phases}) {
    check_nonfinite_input(dtype, bad, c);
    check_nonfinite_weight(dtype, bad, c);
    check_nonfinite_grad(dtype, bad, c);
  }
  const Case mostly_padding = {2, 4, 1, 60, 134, 3, 3, 1, 1, 1, 1, 1, 1, 1};  // two lines of taps never meet the image
  check_nonfinite_weight(dtype, bad, mostly_padding);
}

}  // namespace

// Arguments: instruction sets and dtypes, in any order; all that there are where none is named.
int main(int argc, char** argv) {
  std::vector<std::string> isas;
  std::vector<DType> dtypes;
  for (int i = 1; i < argc; ++i) {
    bool is_dtype = false;
    for (DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16})
      if (argv[i] == std::string(name_of(dtype))) dtypes.push_back(dtype), is_dtype = true;
    if (!is_dtype) isas.push_back(argv[i]);
  }
  if (isas.empty()) isas = available_isas();
  if (dtypes.empty()) dtypes = {DType::f32, DType::f64, DType::bf16, DType::f16};
  for (const std::string& isa : isas) {
    set_isa(isa);
    if (active_isa() != isa || isa != kernels().isa) fail("set_isa(" + isa + ") made " + active_isa() + " active");
    for (DType dtype : dtypes) {
      context = isa + " " + name_of(dtype);
      for (double bad : {std::nan(""), HUGE_VAL, -HUGE_VAL}) check_nonfinite(dtype, bad);
      if (size_of(dtype) == 2) check_conversions(dtype);
    }
  }
  for (DType dtype : dtypes)
    for (const Case& c : cases)
      for (Product product : {Product::forward, Product::input_grad, Product::weight_grad}) check(c, product, dtype, isas);
  const int checks = 3 * static_cast<int>(std::size(cases) * dtypes.size());
  for (const std::string& isa : isas) std::printf("%s: %d convolutions right\n", isa.c_str(), checks);
  return 0;
}
