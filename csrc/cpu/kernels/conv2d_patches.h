// The patches of an image that a convolution looks at, as a matrix that is never stored as a whole:
// one row per pixel of the result (n, y, x), one column per (tap y, tap x, channel).
#pragma once
#include "transpose.h"

namespace cvfast {
namespace {

struct Range {
  int64_t begin, end;
};

// One spatial axis. Tap t of position i reads the source at i * step + offset + t * tap_offset, and the kernel at
// first_tap + t * tap_step.
struct Axis {
  int64_t positions;  // of the result
  int64_t inputs;     // of the source
  int64_t step, offset;
  int64_t taps, tap_offset;
  int64_t first_tap, tap_step;

  // The positions for which tap `tap` lies inside the source.
  Range inside(int64_t tap) const {
    const int64_t first = offset + tap * tap_offset;
    const auto steps = [&](int64_t distance) { return step == 1 ? distance : ceil_div(distance, step); };
    const int64_t begin = first >= 0 ? 0 : steps(-first);
    const int64_t end = first >= inputs ? 0 : steps(inputs - first);
    return {min(begin, positions), min(end, positions)};
  }

  // Where tap `tap` of position `position` reads the source; may lie outside.
  int64_t source(int64_t position, int64_t tap) const { return position * step + offset + tap * tap_offset; }
};

// S is the storage type. Strides in elements.
template <class S>
struct Patches {
  const S* data;
  int64_t batch_stride, channel_stride, y_stride, x_stride;
  int64_t channels;
  Axis y, x;

  int64_t columns() const { return y.taps * x.taps * channels; }
};

template <class From, class To>
void copy_along(Matrix<const From> from, Matrix<To> to, int64_t rows, int64_t cols, bool along_rows) {
  if (along_rows) {
    for (int64_t j = 0; j < cols; ++j)
      copy_strided(from.data + j * from.col_stride, from.row_stride, to.data + j * to.col_stride, to.row_stride, rows);
  } else {
    for (int64_t i = 0; i < rows; ++i)
      copy_strided(from.data + i * from.row_stride, from.col_stride, to.data + i * to.row_stride, to.col_stride, cols);
  }
}

// copy_matrix, by vectors also where the contiguous dimension changes and where every second element is read, else along
// near neighbours.
template <class From, class To>
void copy_block(Matrix<const From> from, Matrix<To> to, int64_t rows, int64_t cols) {
  constexpr int64_t L = lanes<Compute<To>>;
  const bool squares = rows >= L && cols >= L;
  if (squares && from.row_stride == 1 && to.col_stride == 1 && from.col_stride != 1) {
    copy_transposed(from.data, from.col_stride, to.data, to.row_stride, rows, cols);
  } else if (squares && from.col_stride == 1 && to.row_stride == 1 && from.row_stride != 1) {
    copy_transposed(from.data, from.row_stride, to.data, to.col_stride, cols, rows);
  } else if (from.row_stride == 2 && to.row_stride == 1) {
    for (int64_t j = 0; j < cols; ++j) copy_every_second(from.data + j * from.col_stride, to.data + j * to.col_stride, rows);
  } else if (from.col_stride == 2 && to.col_stride == 1) {
    for (int64_t i = 0; i < rows; ++i) copy_every_second(from.data + i * from.row_stride, to.data + i * to.row_stride, cols);
  } else if (from.row_stride != 1 && from.col_stride != 1) {
    copy_along(from, to, rows, cols, from.row_stride < from.col_stride);
  } else if (squares && from.col_stride == 1 && to.row_stride != 1 && to.row_stride < to.col_stride) {
    copy_transposed_apart(from.data, from.row_stride, to.data, to.col_stride, to.row_stride, cols, rows);
  } else if (to.row_stride != 1 && to.col_stride != 1) {
    copy_along(from, to, rows, cols, to.row_stride < to.col_stride);
  } else {
    copy_matrix(from, to, rows, cols);
  }
}

// Calls body(n, y, x, count, index) for each run of pixels [first, first + pixels) that lies in one line of the
// result; index counts from `first`.
template <class Body>
void for_each_line(const Axis& y_axis, const Axis& x_axis, int64_t first, int64_t pixels, Body&& body) {
  if (pixels == 0) return;
  int64_t x = first % x_axis.positions;
  int64_t y = first / x_axis.positions % y_axis.positions;
  int64_t n = first / x_axis.positions / y_axis.positions;
  for (int64_t index = 0; index < pixels;) {
    const int64_t count = min(x_axis.positions - x, pixels - index);
    body(n, y, x, count, index);
    index += count;
    x = 0;
    if (++y == y_axis.positions) y = 0, ++n;
  }
}

constexpr int64_t most_gathered_together = 128;  // elements of a patch's line

// Whether pixel by pixel is the faster way to gather patches as rows: of few channels that lie apart, as an image's do, blocks of
// a tap's pixels and channels would be copied element by element. No tap may lie outside the image.
template <class S>
bool gathers_by_pixels(const Patches<S>& patches, Matrix<Compute<S>> to) {
  const auto inside = [](const Axis& a) {
    const Range first = a.inside(0), last = a.inside(a.taps - 1);
    return max(first.begin, last.begin) == 0 && min(first.end, last.end) == a.positions;
  };
  return to.col_stride == 1 && patches.x_stride == 1 && patches.channels < lanes<Compute<S>> &&
         patches.channels * patches.x.taps <= most_gathered_together && inside(patches.y) && inside(patches.x);
}

// gather_patches() then.
template <class S>
void gather_pixels(const Patches<S>& patches, int64_t pixel, int64_t pixels, int64_t column, int64_t columns,
                   Matrix<Compute<S>> to) {
  const int64_t line = patches.channels * patches.x.taps;
  int64_t offset[most_gathered_together];  // of the elements of a patch's line from the first
  for (int64_t i = 0; i < line; ++i)
    offset[i] = i / patches.channels * patches.x.tap_offset * patches.x_stride + i % patches.channels * patches.channel_stride;
  for_each_line(patches.y, patches.x, pixel, pixels, [&](int64_t n, int64_t y, int64_t x, int64_t count, int64_t index) {
    for (int64_t i = 0; i < count; ++i) {
      Compute<S>* row = to.data + (index + i) * to.row_stride;
      for (int64_t at = column, end = column + columns; at < end;) {
        const S* source = patches.data + n * patches.batch_stride + patches.y.source(y, at / line) * patches.y_stride +
                          patches.x.source(x + i, 0) * patches.x_stride;
        const int64_t first = at % line, some = min(line - first, end - at);
        for (int64_t j = 0; j < some; ++j) row[j] = to_compute(source[offset[first + j]]);
        at += some, row += some;
      }
    }
  });
}

// to[i, j] = patches[pixel + i, column + j] for i < pixels, j < columns, in the compute type; zero outside the image.
template <class S>
void gather_patches(const Patches<S>& patches, int64_t pixel, int64_t pixels, int64_t column, int64_t columns,
                    Matrix<Compute<S>> to) {
  using T = Compute<S>;
  if (gathers_by_pixels(patches, to)) return gather_pixels(patches, pixel, pixels, column, columns, to);
  const int64_t first_tap = column / patches.channels;
  int64_t tap_y = first_tap / patches.x.taps, tap_x = first_tap % patches.x.taps, channel = column % patches.channels;
  while (columns > 0) {
    const int64_t channels = min(patches.channels - channel, columns);
    const Range inside_y = patches.y.inside(tap_y), inside_x = patches.x.inside(tap_x);
    for_each_line(patches.y, patches.x, pixel, pixels,
                  [&](int64_t n, int64_t y, int64_t x, int64_t count, int64_t index) {
      const bool line_inside = y >= inside_y.begin && y < inside_y.end;
      const int64_t begin = line_inside ? min(max(inside_x.begin - x, int64_t{0}), count) : count;
      const int64_t stop = line_inside ? max(min(inside_x.end - x, count), begin) : count;
      const auto part = [&](int64_t i) {
        return Matrix<T>{to.data + (index + i) * to.row_stride, to.row_stride, to.col_stride};
      };
      if (begin > 0) zero_matrix(part(0), begin, channels);
      if (stop > begin) {
        const S* source = patches.data + n * patches.batch_stride + channel * patches.channel_stride +
                          patches.y.source(y, tap_y) * patches.y_stride +
                          patches.x.source(x + begin, tap_x) * patches.x_stride;
        copy_block(Matrix<const S>{source, patches.x.step * patches.x_stride, patches.channel_stride}, part(begin),
                    stop - begin, channels);
      }
      if (stop < count) zero_matrix(part(stop), count - stop, channels);
    });
    to.data += channels * to.col_stride;
    columns -= channels;
    channel = 0;
    if (++tap_x == patches.x.taps) tap_x = 0, ++tap_y;
  }
}

// The columns of [start, end) from the first to the last one that lies inside the image for some pixel of
// [pixel, pixel + pixels).
template <class S>
Range columns_inside(const Patches<S>& patches, int64_t pixel, int64_t pixels, int64_t start, int64_t end) {
  const Axis &y = patches.y, &x = patches.x;
  const int64_t last_pixel = pixel + pixels - 1, line = pixel / x.positions, last_line = last_pixel / x.positions;
  const bool one_sample = line / y.positions == last_line / y.positions;
  const Range lines = one_sample ? Range{line % y.positions, last_line % y.positions + 1} : Range{0, y.positions};
  const Range places = line == last_line ? Range{pixel % x.positions, last_pixel % x.positions + 1} : Range{0, x.positions};
  const auto meet = [](Range a, Range b) { return max(a.begin, b.begin) < min(a.end, b.end); };
  const auto outside = [&](int64_t column) {
    const int64_t tap = column / patches.channels;
    return !meet(lines, y.inside(tap / x.taps)) || !meet(places, x.inside(tap % x.taps));
  };
  while (start < end && outside(start)) start = min(end, round_up(start + 1, patches.channels));
  while (start < end && outside(end - 1)) end = max(start, (end - 1) / patches.channels * patches.channels);
  return {start, end};
}

// Patches of one tap that lies inside the image everywhere, for pixels at even distances in memory: the matrix
// [pixel, channel]; else its data is nullptr.
template <class S>
Matrix<const S> evenly_spaced(const Patches<S>& patches, int64_t pixel, int64_t pixels) {
  const Axis &y = patches.y, &x = patches.x;
  const Range inside_y = y.inside(0), inside_x = x.inside(0);
  const bool inside = inside_y.begin == 0 && inside_y.end == y.positions && inside_x.begin == 0 && inside_x.end == x.positions;
  if (y.taps * x.taps != 1 || !inside) return {};
  const int64_t step = x.step * patches.x_stride, line = pixel / x.positions;
  const bool samples_joined = y.positions == 1 && patches.batch_stride == x.positions * step;
  if ((pixel + pixels - 1) / x.positions > line && !samples_joined) return {};
  const S* first = patches.data + line / y.positions * patches.batch_stride +
                   y.source(line % y.positions, 0) * patches.y_stride + x.source(pixel % x.positions, 0) * patches.x_stride;
  return {first, step, patches.channel_stride};
}

}  // namespace
}  // namespace cvfast
