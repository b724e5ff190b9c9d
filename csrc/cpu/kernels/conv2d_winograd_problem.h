// A convolution as Winograd's algorithms see it: images cut into tiles, and the phases of its source and of its taps.
#pragma once
#include "conv2d_implicit_gemm.h"
#include "conv2d_winograd_transform.h"

namespace cvfast {
namespace {

constexpr int64_t winograd_depth = 128;  // most channels of a block
// A product's chain of multiply-adds; their sums are added up. With two taps short ones take half of the error away.
template <int Taps>
constexpr int64_t winograd_chain = Taps == 2 ? 16 : winograd_depth;
constexpr bool many_registers = tile_rows == 12;
constexpr int64_t winograd_width = tile_cols<float>;  // output channels of a panel
constexpr int64_t winograd_most_phases = 4;            // of the source, 2 on each axis
// Up to so many tiles it pays to make U anew, in registers, for every four of them; with many registers up to twice as many,
// for every eight of them, with its first half kept.
constexpr int64_t winograd_fewest_tiles = 8;
template <int Taps>
constexpr int64_t winograd_few_tiles = many_registers && Taps == 3 ? 2 * winograd_fewest_tiles : winograd_fewest_tiles;
constexpr int64_t line_floats = 16;  // a cache line more between points: their addresses fall into different cache sets

// Image, first pixel of the result, lines and pixels. With dilation: of the image made of its pixels (part_y, part_x) +
// dilation * (i, j).
struct WinogradTile {
  int64_t n, y, x, lines, pixels;
  int64_t part_y = 0, part_x = 0;
};

// An axis of the result, cut into tiles of 4 pixels and, at its end, short ones of 3. The first three results of a tile don't
// need the product at infinity, its last point: short tiles leave it out.
struct TileAxis {
  int64_t tiles, short_tiles;

  int64_t whole_tiles() const { return tiles - short_tiles; }
  int64_t first_pixel(int64_t tile) const { return winograd_outputs * tile - max<int64_t>(0, tile - whole_tiles()); }
  int64_t pixels(int64_t tile) const { return tile < whole_tiles() ? winograd_outputs : winograd_outputs - 1; }
};


struct TileRun {
  int64_t begin, end;
};

// The tiles of images, class by class, so that those that need a point are neighbours: short in x alone, whole, short in y
// alone, short in both.
class TileGrid {
 public:
  TileGrid() = default;
  TileGrid(int64_t images, TileAxis y, TileAxis x) : y_(y), x_(x) {
    for (int i = 0; i < classes; ++i) {
      const bool short_y = i > 1, short_x = i == 0 || i == 3;
      class_[i] = {short_y ? y.short_tiles : y.whole_tiles(), short_x ? x.short_tiles : x.whole_tiles(),
                   short_y ? y.whole_tiles() : 0, short_x ? x.whole_tiles() : 0};
      begin_[i + 1] = begin_[i] + images * class_[i].tiles_y * class_[i].tiles_x;
    }
  }
  int64_t tiles() const { return begin_[classes]; }
  // Whether all begin at even lines and pixels.
  bool even() const { return max(y_.short_tiles, x_.short_tiles) <= 1; }
  // Those of `count` tiles from `first` on that need the last point in y or x, or both, counted from `first`.
  TileRun needing(bool last_y, bool last_x, int64_t first, int64_t count) const {
    const int64_t from = begin_[last_x ? 1 : 0], to = begin_[last_y ? 2 : last_x ? 3 : classes];
    const int64_t begin = min(max<int64_t>(from - first, 0), count);
    return {begin, max(begin, min(to - first, count))};
  }
  WinogradTile tile_at(int64_t index) const {
    const int i = class_of(index);
    const Class& c = class_[i];
    index -= begin_[i];
    const int64_t line = index / c.tiles_x, image = line / c.tiles_y;
    const int64_t tile_y = c.first_y + line - image * c.tiles_y, tile_x = c.first_x + index - line * c.tiles_x;
    return {image, y_.first_pixel(tile_y), x_.first_pixel(tile_x), y_.pixels(tile_y), x_.pixels(tile_x)};
  }
  // Tiles from this one on that are side by side.
  int64_t tiles_beside(int64_t index) const {
    const int i = class_of(index);
    return class_[i].tiles_x - (index - begin_[i]) % class_[i].tiles_x;
  }

 private:
  static constexpr int classes = 4;
  struct Class {
    int64_t tiles_y, tiles_x, first_y, first_x;  // on each axis
  };

  int class_of(int64_t index) const {
    int i = 0;
    while (i + 1 < classes && index >= begin_[i + 1]) ++i;
    return i;
  }

  TileAxis y_, x_;
  Class class_[classes];
  int64_t begin_[classes + 1] = {};  // tiles of the classes before
};

// The tiles of images with height x width results: as many short ones as it takes to have the fewest pixels beyond the end of
// an axis. Measured: in larger images they save less than it costs that the tiles of a class lie apart.
inline TileGrid tile_grid(int64_t images, int64_t height, int64_t width) {
  constexpr int64_t most_tiles = 16;
  const int64_t tiles_y = ceil_div(height, winograd_outputs), tiles_x = ceil_div(width, winograd_outputs);
  const auto axis = [&](int64_t tiles, int64_t pixels) {
    return TileAxis{tiles, tiles_y * tiles_x <= most_tiles ? min(winograd_outputs * tiles - pixels, tiles) : 0};
  };
  return {images, axis(tiles_y, height), axis(tiles_x, width)};
}

// Images, or those of their pixels that make a phase.
template <class S>
struct PhaseImages {
  const S* data;
  int64_t stride[4], height, width;
  int64_t offset_y, offset_x;  // from a tile's first pixel to its patch's

  // Those that a tile with dilation sees: the pixels with the same remainder modulo the dilation.
  PhaseImages part(const WinogradTile& tile, int64_t dilation_y, int64_t dilation_x) const {
    PhaseImages p = *this;
    const auto cut_axis = [&p](int64_t first, int64_t dilation, int64_t& step, int64_t& size, int64_t& offset) {
      const int64_t place = first + offset, remainder = (place % dilation + dilation) % dilation;
      p.data += remainder * step, step *= dilation;
      size = ceil_div(max<int64_t>(0, size - remainder), dilation), offset = (place - remainder) / dilation;
    };
    cut_axis(tile.part_y, dilation_y, p.stride[2], p.height, p.offset_y);
    cut_axis(tile.part_x, dilation_x, p.stride[3], p.width, p.offset_x);
    return p;
  }
};

// Images cut into tiles. To each tile and phase belongs a patch of Pixels x Pixels, 0 outside of the image. The transformed
// patches, Points x Points each, of a chunk of tiles lie as [group, phase, block of channels, point, tile, channel]; those of
// few tiles at strides that do not depend on the sizes, with room for winograd_few_tiles tiles of winograd_depth channels.
template <class S, int Pixels, int Points>
struct TiledImages {
  PhaseImages<S> phase[winograd_most_phases];
  int64_t phases;
  int64_t batch;
  TileGrid grid;  // with dilation: of all parts of the images
  int64_t groups, channels;             // of a group
  int64_t block_width, channel_blocks;  // channels of a block, the last one may have fewer; blocks of a phase
  int64_t blocks;                       // of all phases
  int64_t dilation_y = 1, dilation_x = 1;
  bool few = false;  // tiles, and fixed strides

  static constexpr int64_t few_point_stride =
      winograd_few_tiles<Points - winograd_outputs + 1> * winograd_depth + line_floats;

  // Whole vectors of any width: a block is a chain of multiply-adds, the same with all instruction sets.
  void cut_channels(int64_t most) {
    constexpr int64_t most_lanes = 16;
    channel_blocks = ceil_div(channels, most);
    block_width = round_up(ceil_div(channels, channel_blocks), most_lanes);
    blocks = phases * channel_blocks;
  }
  bool dilated() const { return dilation_y * dilation_x > 1; }
  int64_t tiles() const { return grid.tiles(); }
  WinogradTile tile_at(int64_t index) const {
    WinogradTile tile = grid.tile_at(index);
    const int64_t part = tile.n / batch;
    if (dilated()) tile.n %= batch, tile.part_y = part / dilation_x, tile.part_x = part % dilation_x;
    return tile;
  }
  // Those of `count` tiles from `first` on that need a point, counted from `first`.
  TileRun needing(int64_t point_y, int64_t point_x, int64_t first, int64_t count) const {
    return grid.needing(point_y == Points - 1, point_x == Points - 1, first, count);
  }
  int64_t first_channel(int64_t block) const { return block % channel_blocks * block_width; }
  int64_t block_channels(int64_t block) const { return min(channels - first_channel(block), block_width); }
  int64_t tile_stride() const { return few ? winograd_depth : block_width; }
  int64_t point_stride(int64_t tiles) const { return few ? few_point_stride : tiles * block_width + line_floats; }
  int64_t block_stride(int64_t tiles) const { return Points * Points * point_stride(tiles); }
  int64_t elements(int64_t tiles) const { return groups * blocks * block_stride(tiles); }
};

// Taps of a kernel on one axis: first, first + step, ...
struct TapRun {
  int64_t count, first, step;
};

// One phase of an axis's source, and the taps that read it: tap j of result pixel i reads the phase's pixel i + offset + j
// (j times the dilation; then there is one phase).
struct AxisPhase {
  int64_t first_pixel, pixels, offset;
  TapRun taps;
};

inline AxisPhase axis_phase(const Axis& a, int64_t phase) {
  const bool backwards = a.tap_offset < 0;  // then a.step is 1
  const int64_t last = a.taps - 1, place = backwards ? a.offset + last * a.tap_offset : a.offset + phase;
  AxisPhase p;
  p.first_pixel = (place % a.step + a.step) % a.step;
  p.pixels = ceil_div(a.inputs - p.first_pixel, a.step);
  p.offset = (place - p.first_pixel) / a.step;
  p.taps = backwards ? TapRun{a.taps, a.first_tap + last * a.tap_step, -a.tap_step}
                     : TapRun{ceil_div(a.taps - phase, a.step), phase, a.step};
  return p;
}

// One phase of the result: the sum over the source's phases of stride-1 correlations with at most Taps x Taps taps.
template <class S, int Taps>
struct Winograd {
  static constexpr int points = winograd_inputs<Taps>;  // on each axis

  Correlation<S> c;
  Phase<S> phase;  // of the result
  TiledImages<S, points, points> source;
  TapRun taps_y[winograd_most_phases], taps_x[winograd_most_phases];  // of each of the source's phases
  int64_t panels;                                                      // of a group
  const float *kept_taps, *kept_u;                                     // of all weights, see below; or nullptr

  int64_t height() const { return phase.patches.y.positions; }
  int64_t width() const { return phase.patches.x.positions; }

  // Points whose products are not 0, the first ones.
  static int64_t used_points(TapRun taps) { return points - Taps + taps.count; }
  bool has_all_taps(int64_t source_phase) const {
    return taps_y[source_phase].count == Taps && taps_x[source_phase].count == Taps;
  }

  // U [group, panel, block, point, channel, out]
  int64_t u_point_stride() const { return source.block_width * winograd_width + line_floats; }
  int64_t u_block_stride() const { return points * points * u_point_stride(); }
  int64_t u_panel_stride() const { return source.blocks * u_block_stride(); }

  // Taps [group, panel, block, vector of the panel's channels, channel, tap, lane]: as the transform of U reads them.
  int64_t taps_vector_stride() const { return source.block_width * Taps * Taps * lanes<float>; }
  int64_t taps_block_stride() const { return winograd_width / lanes<float> * taps_vector_stride(); }
  int64_t taps_elements() const { return c.groups * panels * source.blocks * taps_block_stride(); }
  const float* kept_taps_of(int64_t group, int64_t panel, int64_t block) const {
    return kept_taps + ((group * panels + panel) * source.blocks + block) * taps_block_stride();
  }
};

template <class S, int Taps>
Winograd<S, Taps> winograd(const Correlation<S>& c, int64_t phase_y, int64_t phase_x) {
  Winograd<S, Taps> w;
  w.c = c, w.phase = make_phase(c, phase_y, phase_x, false);
  const Axis &y = w.phase.patches.y, &x = w.phase.patches.x;
  const int64_t* stride = c.source_stride;
  auto& source = w.source;
  source.phases = y.step * x.step;
  for (int64_t i = 0; i < source.phases; ++i) {
    const AxisPhase py = axis_phase(y, i / x.step), px = axis_phase(x, i % x.step);
    source.phase[i] = {c.source + py.first_pixel * stride[2] + px.first_pixel * stride[3],
                       {stride[0], stride[1], y.step * stride[2], x.step * stride[3]},
                       py.pixels, px.pixels, py.offset, px.offset};
    w.taps_y[i] = py.taps, w.taps_x[i] = px.taps;
  }
  source.batch = c.batch, source.groups = c.groups, source.channels = c.in_channels;
  source.dilation_y = c.shape.dilation_h, source.dilation_x = c.shape.dilation_w;
  // Pooled or not, the results are cut in the same way.
  source.grid = tile_grid(source.dilation_y * source.dilation_x * c.batch,
                          ceil_div(w.height() + c.lines_left_out, source.dilation_y),
                          ceil_div(w.width() + c.pixels_left_out, source.dilation_x));
  source.cut_channels(winograd_depth);
  source.few = source.tiles() <= winograd_few_tiles<Taps>;
  w.panels = ceil_div(c.out_channels, winograd_width), w.kept_taps = w.kept_u = nullptr;
  return w;
}

// Zeros in a point of M, [tile, winograd_width], for all of `tiles` tiles but those of a run.
inline void zero_all_but(TileRun run, int64_t tiles, float* m) {
  const auto zero = [m](int64_t begin, int64_t end) {
    zero_matrix(Matrix<float>{m + begin * winograd_width, winograd_width, 1}, end - begin, winograd_width);
  };
  zero(0, run.begin), zero(run.end, tiles);
}

}  // namespace
}  // namespace cvfast
