// The patches of an image that a convolution looks at, as a matrix that is never stored as a whole:
// one row per pixel of the result (n, y, x), one column per (tap y, tap x, channel).
#pragma once
#include "simd.h"

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

// to[i, j] = patches[pixel + i, column + j] for i < pixels, j < columns, in the compute type; zero outside the image.
template <class S>
void gather_patches(const Patches<S>& patches, int64_t pixel, int64_t pixels, int64_t column, int64_t columns,
                    Matrix<Compute<S>> to) {
  using T = Compute<S>;
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
        copy_matrix(Matrix<const S>{source, patches.x.step * patches.x_stride, patches.channel_stride}, part(begin),
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

}  // namespace
}  // namespace cvfast
