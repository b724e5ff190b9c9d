// Copies between matrices of different orientation, a square of vectors at a time.
#pragma once
#include "simd.h"

namespace cvfast {
namespace {

// Exchanges bit `Bit` of the row's and the column's index of a square [lanes, lanes].
template <class T, int Bit>
[[gnu::always_inline]] inline void exchange_index_bits(Vector<T>* rows) {
  constexpr int L = lanes<T>;
  using Index = decltype(Vector<T>{} < Vector<T>{});
  Index low, high;
  for (int j = 0; j < L; ++j) {
    low[j] = j & Bit ? L + (j ^ Bit) : j;
    high[j] = j & Bit ? L + j : j | Bit;
  }
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i)
    if (!(i & Bit)) {
      const Vector<T> a = rows[i], b = rows[i | Bit];
      rows[i] = __builtin_shuffle(a, b, low);
      rows[i | Bit] = __builtin_shuffle(a, b, high);
    }
}

template <class T, int Bit = 1>
[[gnu::always_inline]] inline void transpose_square(Vector<T>* rows) {
  if constexpr (Bit < lanes<T>) {
    exchange_index_bits<T, Bit>(rows);
    transpose_square<T, 2 * Bit>(rows);
  }
}

// to[i, j] = factor * from[j, i] for i < rows, j < cols, with contiguous j in `to` and contiguous i in `from`. At least a
// vector of both.
template <class From, class To>
void copy_transposed(const From* from, int64_t from_stride, To* to, int64_t to_stride, int64_t rows, int64_t cols,
                     Compute<To> factor = 1) {
  using T = Compute<To>;
  constexpr int64_t L = lanes<T>;
  // Squares at the far ends overlap their neighbours, so that there are no tails.
  for (int64_t row = 0; row < rows; row += L)
    for (int64_t col = 0; col < cols; col += L) {
      const int64_t i = min(row, rows - L), j = min(col, cols - L);
      Vector<T> square[L];
#pragma GCC unroll 16
      for (int k = 0; k < L; ++k) square[k] = factor * load_vector(from + i + (j + k) * from_stride);
      transpose_square<T>(square);
#pragma GCC unroll 16
      for (int k = 0; k < L; ++k) store_vector(square[k], to + (i + k) * to_stride + j);
    }
}

// The same with j that are to_step apart in `to`.
template <class From, class To>
void copy_transposed_apart(const From* from, int64_t from_stride, To* to, int64_t to_stride, int64_t to_step, int64_t rows,
                           int64_t cols) {
  using T = Compute<To>;
  constexpr int64_t L = lanes<T>;
  for (int64_t row = 0; row < rows; row += L)
    for (int64_t col = 0; col < cols; col += L) {
      const int64_t i = min(row, rows - L), j = min(col, cols - L);
      T square[L * L];
      copy_transposed(from + i + j * from_stride, from_stride, square, L, L, L);
      for (int64_t k = 0; k < L; ++k) copy_strided(square + k * L, 1, to + (i + k) * to_stride + j * to_step, to_step, L);
    }
}

// The same as the first for cols < lanes, whose vectors in `to` are stored in part.
template <class From, class To>
void copy_to_short_rows(const From* from, int64_t from_stride, To* to, int64_t to_stride, int64_t rows, int64_t cols) {
  using T = Compute<To>;
  constexpr int64_t L = lanes<T>;
  for (int64_t row = 0; row < rows; row += L) {
    const int64_t i = min(row, rows - L);
    Vector<T> square[L];
#pragma GCC unroll 16
    for (int k = 0; k < L; ++k) square[k] = k < cols ? load_vector(from + i + k * from_stride) : Vector<T>{};
    transpose_square<T>(square);
#pragma GCC unroll 16
    for (int k = 0; k < L; ++k) store_first(square[k], to + (i + k) * to_stride, cols);
  }
}

// The same for rows < lanes, whose vectors in `from` are loaded in part.
template <class From, class To>
void copy_from_short_rows(const From* from, int64_t from_stride, To* to, int64_t to_stride, int64_t rows, int64_t cols) {
  using T = Compute<To>;
  constexpr int64_t L = lanes<T>;
  for (int64_t col = 0; col < cols; col += L) {
    const int64_t j = min(col, cols - L);
    Vector<T> square[L];
#pragma GCC unroll 16
    for (int k = 0; k < L; ++k) square[k] = load_first(from + (j + k) * from_stride, rows);
    transpose_square<T>(square);
#pragma GCC unroll 16
    for (int k = 0; k < L; ++k)
      if (k < rows) store_vector(square[k], to + k * to_stride + j);
  }
}

// to[i] = from[2 * i] for i < count.
template <class From, class To>
void copy_every_second(const From* from, To* to, int64_t count) {
  using T = Compute<To>;
  constexpr int L = lanes<T>;
  if (count < L) return copy_strided(from, 2, to, 1, count);
  decltype(Vector<T>{} < Vector<T>{}) even;
  for (int j = 0; j < L; ++j) even[j] = 2 * j < L ? 2 * j : 2 * j + 1;
  for (int64_t i = 0; i < count; i += L) {
    const int64_t first = min(i, count - L);
    const From* at = from + 2 * first;
    // The second vector begins one early, so that it ends with the last element used.
    store_vector(__builtin_shuffle(load_vector(at), load_vector(at + L - 1), even), to + first);
  }
}

// Images [channel, line, pixel] with these strides.
template <class T>
struct Block {
  T* data;
  int64_t channel_stride, line_stride, pixel_stride;
};

// Copies images, converting through the compute type.
template <class From, class To>
void copy_planes(Block<From> from, Block<To> to, int64_t channels, int64_t lines, int64_t pixels) {
  constexpr int64_t L = lanes<Compute<To>>;
  if (from.channel_stride == 1 && to.channel_stride == 1 && from.pixel_stride == channels && to.pixel_stride == channels) {
    from.pixel_stride = to.pixel_stride = 1;  // all channels of a pixel, then those of the next one
    pixels *= channels, channels = 1;
  }
  if (from.line_stride == pixels * from.pixel_stride && to.line_stride == pixels * to.pixel_stride)
    pixels *= lines, lines = 1;  // one long line
  const bool squares = channels >= L && pixels >= L;
  if (squares && from.channel_stride == 1 && to.pixel_stride == 1) {
    for (int64_t line = 0; line < lines; ++line)
      copy_transposed(from.data + line * from.line_stride, from.pixel_stride, to.data + line * to.line_stride,
                      to.channel_stride, channels, pixels);
  } else if (squares && from.pixel_stride == 1 && to.channel_stride == 1) {
    for (int64_t line = 0; line < lines; ++line)
      copy_transposed(from.data + line * from.line_stride, from.channel_stride, to.data + line * to.line_stride,
                      to.pixel_stride, pixels, channels);
  } else if (channels >= L && from.channel_stride == 1 && to.pixel_stride == 1) {
    for (int64_t line = 0; line < lines; ++line)
      copy_to_short_rows(from.data + line * from.line_stride, from.pixel_stride, to.data + line * to.line_stride,
                         to.channel_stride, channels, pixels);
  } else if (channels >= L && from.pixel_stride == 1 && to.channel_stride == 1) {
    for (int64_t line = 0; line < lines; ++line)
      copy_from_short_rows(from.data + line * from.line_stride, from.channel_stride, to.data + line * to.line_stride,
                           to.pixel_stride, pixels, channels);
  } else if (channels > 1 && from.channel_stride == 1 && to.channel_stride == 1) {
    for (int64_t line = 0; line < lines; ++line)
      for (int64_t pixel = 0; pixel < pixels; ++pixel)
        copy_contiguous(from.data + line * from.line_stride + pixel * from.pixel_stride,
                        to.data + line * to.line_stride + pixel * to.pixel_stride, channels);
  } else {
    for (int64_t channel = 0; channel < channels; ++channel)
      for (int64_t line = 0; line < lines; ++line) {
        From* source = from.data + channel * from.channel_stride + line * from.line_stride;
        To* target = to.data + channel * to.channel_stride + line * to.line_stride;
        if (from.pixel_stride == 1 && to.pixel_stride == 1)
          copy_contiguous(source, target, pixels);
        else if (from.pixel_stride == 2 && to.pixel_stride == 1)
          copy_every_second(source, target, pixels);
        else
          copy_strided(source, from.pixel_stride, target, to.pixel_stride, pixels);
      }
  }
}

}  // namespace
}  // namespace cvfast
