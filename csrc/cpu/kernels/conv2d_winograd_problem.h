// A convolution as Winograd's algorithms see it: images cut into tiles, and the phases of its source and of its taps.
#pragma once
#include "conv2d_implicit_gemm.h"
#include "conv2d_winograd_transform.h"

namespace cvfast {
namespace {

constexpr int64_t winograd_depth = 128;                // most channels of a block
constexpr int64_t winograd_width = tile_cols<float>;  // output channels of a panel
constexpr int64_t winograd_most_phases = 4;            // of the source, 2 on each axis
constexpr int64_t line_floats = 16;  // a cache line more between points: their addresses fall into different cache sets

// Image and first pixel of the result. With dilation: of the image made of its pixels (part_y, part_x) + dilation * (i, j).
struct WinogradTile {
  int64_t n, y, x;
  int64_t part_y = 0, part_x = 0;
};

// Images, or those of their pixels that make a phase.
template <class S>
struct PhaseImages {
  const S* data;
  int64_t stride[4], height, width;
  int64_t offset_y, offset_x;  // from a tile's first pixel to its patch's

  // Those that a tile with dilation sees: the pixels with the same remainder modulo the dilation.
  PhaseImages part(WinogradTile tile, int64_t dilation_y, int64_t dilation_x) const {
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
// patches, Points x Points each, of a chunk of tiles lie as [group, phase, block of channels, point, tile, channel].
template <class S, int Pixels, int Points>
struct TiledImages {
  PhaseImages<S> phase[winograd_most_phases];
  int64_t phases;
  int64_t batch, tiles_y, tiles_x;
  int64_t groups, channels;             // of a group
  int64_t block_width, channel_blocks;  // channels of a block, the last one may have fewer; blocks of a phase
  int64_t blocks;                       // of all phases
  int64_t dilation_y = 1, dilation_x = 1;

  // Whole vectors of any width: a block is a chain of multiply-adds, the same with all instruction sets.
  void cut_channels(int64_t most) {
    constexpr int64_t most_lanes = 16;
    channel_blocks = ceil_div(channels, most);
    block_width = round_up(ceil_div(channels, channel_blocks), most_lanes);
    blocks = phases * channel_blocks;
  }
  bool dilated() const { return dilation_y * dilation_x > 1; }
  int64_t tiles() const { return dilation_y * dilation_x * batch * tiles_y * tiles_x; }
  WinogradTile tile_at(int64_t index) const {
    const int64_t tile_y = index / tiles_x, image = tile_y / tiles_y;
    WinogradTile tile = {image, tile_y % tiles_y * winograd_outputs, index % tiles_x * winograd_outputs};
    if (dilated()) tile.n = image % batch, tile.part_y = image / batch / dilation_x, tile.part_x = image / batch % dilation_x;
    return tile;
  }
  int64_t first_channel(int64_t block) const { return block % channel_blocks * block_width; }
  int64_t block_channels(int64_t block) const { return min(channels - first_channel(block), block_width); }
  int64_t point_stride(int64_t tiles) const { return tiles * block_width + line_floats; }
  int64_t block_stride(int64_t tiles) const { return Points * Points * point_stride(tiles); }
  int64_t elements(int64_t tiles) const { return groups * blocks * block_stride(tiles); }
};

// Taps of a kernel on one axis: first, first + step, ...
struct TapRun {
  int64_t count, first, step;
};

// One phase of an axis's source, and the taps that read it: tap j of result pixel i reads the phase's pixel i + offset + j.
struct AxisPhase {
  int64_t first_pixel, pixels, offset;
  TapRun taps;
};

inline AxisPhase axis_phase(const Axis& a, int64_t phase) {
  const bool backwards = a.tap_offset < 0;  // then a.step is 1
  const int64_t last = a.taps - 1, place = backwards ? a.offset - last : a.offset + phase;
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
  const float* kept_taps;                                              // of all weights, see below; or nullptr

  int64_t height() const { return phase.patches.y.positions; }
  int64_t width() const { return phase.patches.x.positions; }

  // Points whose products are not 0, the first ones.
  static int64_t used_points(TapRun taps) { return points - Taps + taps.count; }

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
  source.tiles_y = ceil_div(w.height(), winograd_outputs), source.tiles_x = ceil_div(w.width(), winograd_outputs);
  source.cut_channels(winograd_depth);
  w.panels = ceil_div(c.out_channels, winograd_width), w.kept_taps = nullptr;
  return w;
}

}  // namespace
}  // namespace cvfast
