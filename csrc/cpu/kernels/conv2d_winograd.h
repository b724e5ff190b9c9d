// Forward convolution and gradient to the input by Winograd's F(4x4, 3x3), for 3x3 kernels with stride 1 and dilation 1.
//
// The result is cut into tiles of 4x4 pixels. A chunk of tiles takes three steps, each over vectors of channels in both
// memory formats:
//   1. source [6x6 patch, channel] -> V [block of channels, point, tile, channel];
//   2. for each panel of output channels and each of the 36 points: M [point, tile, out] = V[point] * U[point], where U are
//      the transformed weights;
//   3. M -> result [4x4 pixels, out], plus bias.
// An element of M is one chain of multiply-adds per block of channels, added in order; a tile's bits depend on its patch
// alone. Numbers that are not finite would spread over a tile: such results are computed again by the definition.
#pragma once
#include "../cache_size.h"
#include "../precision.h"
#include "conv2d_implicit_gemm.h"
#include "conv2d_winograd_transform.h"

namespace cvfast {
namespace {

constexpr int64_t winograd_depth = 128;                // most channels of a block
constexpr int64_t winograd_width = tile_cols<float>;  // output channels of a panel
constexpr int64_t line_floats = 16;  // a cache line more between points: their addresses fall into different cache sets

// The tile `index` of all: image and first pixel of the result.
struct WinogradTile {
  int64_t n, y, x;
};

// Images cut into tiles. To each tile belongs a patch of Pixels x Pixels, 0 outside of the image. The transformed patches
// of a chunk of tiles lie as [group, block of channels, point, tile, channel].
template <class S, int Pixels>
struct TiledImages {
  const S* data;
  int64_t stride[4], height, width;
  int64_t offset_y, offset_x;  // from a tile's first pixel to its patch's
  int64_t batch, tiles_y, tiles_x;
  int64_t groups, channels;            // of a group
  int64_t block_width, blocks;         // channels of a block; the last one may have fewer

  // Whole vectors of any width: a block is a chain of multiply-adds, the same with all instruction sets.
  void cut_channels(int64_t most) {
    constexpr int64_t most_lanes = 16;
    blocks = ceil_div(channels, most);
    block_width = round_up(ceil_div(channels, blocks), most_lanes);
  }
  int64_t tiles() const { return batch * tiles_y * tiles_x; }
  WinogradTile tile_at(int64_t index) const {
    const int64_t tile_y = index / tiles_x;
    return {tile_y / tiles_y, tile_y % tiles_y * winograd_outputs, index % tiles_x * winograd_outputs};
  }
  int64_t block_channels(int64_t block) const { return min(channels - block * block_width, block_width); }
  int64_t point_stride(int64_t tiles) const { return tiles * block_width + line_floats; }
  int64_t block_stride(int64_t tiles) const { return winograd_points * point_stride(tiles); }
  int64_t elements(int64_t tiles) const { return groups * blocks * block_stride(tiles); }
};

// What both directions have in common: result pixel (y, x) is the sum over taps (r, s) of source pixel
// (y + offset_y + r, x + offset_x + s) times weight tap (r, s).
template <class S>
struct Winograd {
  Correlation<S> c;  // its taps run backwards for the gradient to the input, and so do the weights' strides here
  TiledImages<S, winograd_inputs> source;
  int64_t height, width;  // of the result
  int64_t panels;         // of a group

  // U [group, panel, block of channels, point, channel, out]
  int64_t u_point_stride() const { return source.block_width * winograd_width + line_floats; }
  int64_t u_block_stride() const { return winograd_points * u_point_stride(); }
  int64_t u_panel_stride() const { return source.blocks * u_block_stride(); }
};

template <class S>
Winograd<S> winograd(Correlation<S> c) {
  const Conv2dShape& s = c.shape;
  Winograd<S> w;
  TiledImages<S, winograd_inputs>& source = w.source;
  if (c.input_grad) {
    source.height = s.out_height, source.width = s.out_width, w.height = s.in_height, w.width = s.in_width;
    source.offset_y = s.padding_h - 2, source.offset_x = s.padding_w - 2;
    c.weight += 2 * c.weight_y_stride + 2 * c.weight_x_stride;
    c.weight_y_stride = -c.weight_y_stride, c.weight_x_stride = -c.weight_x_stride;
  } else {
    source.height = s.in_height, source.width = s.in_width, w.height = s.out_height, w.width = s.out_width;
    source.offset_y = -s.padding_h, source.offset_x = -s.padding_w;
  }
  w.c = c;
  source.data = c.source;
  for (int d = 0; d < 4; ++d) source.stride[d] = c.source_stride[d];
  source.batch = c.batch, source.groups = c.groups, source.channels = c.in_channels;
  source.tiles_y = ceil_div(w.height, winograd_outputs), source.tiles_x = ceil_div(w.width, winograd_outputs);
  source.cut_channels(winograd_depth);
  w.panels = ceil_div(c.out_channels, winograd_width);
  return w;
}

// ---- Weights ----

// Reads the nine taps of `count` <= 4 input channels for as many output channels as a vector has lanes.
template <class S>
void load_weights(const Correlation<S>& c, const S* weight, int64_t count, FloatVector (&taps)[4][9]) {
  const int64_t y_stride = c.weight_y_stride, x_stride = c.weight_x_stride;
  const auto tap_offset = [&](int tap) { return tap / 3 * y_stride + tap % 3 * x_stride; };
  if (c.weight_out_stride == 1) {
    for (int64_t i = 0; i < count; ++i)
      for (int tap = 0; tap < 9; ++tap) taps[i][tap] = load_vector(weight + i * c.weight_in_stride + tap_offset(tap));
  } else if (c.weight_in_stride == 1 && count == 4) {
    for (int tap = 0; tap < 9; ++tap) {
      FloatVector column[4];
      load_columns(weight + tap_offset(tap), c.weight_out_stride, column);
      for (int i = 0; i < 4; ++i) taps[i][tap] = column[i];
    }
  } else if (y_stride == 3 * x_stride && x_stride * x_stride == 1) {
    const S* lowest = x_stride < 0 ? weight - 8 : weight;
    constexpr int places[] = {0, 4, 5};  // of four taps, three times: the last ones overlap
    for (int64_t i = 0; i < count; ++i)
      for (int place : places) {
        FloatVector column[4];
        load_columns(lowest + i * c.weight_in_stride + place, c.weight_out_stride, column);
        for (int j = 0; j < 4; ++j) taps[i][x_stride < 0 ? 8 - place - j : place + j] = column[j];
      }
  } else {
    for (int64_t i = 0; i < count; ++i)
      for (int tap = 0; tap < 9; ++tap) {
        float element[lanes<float>];
        copy_strided(weight + i * c.weight_in_stride + tap_offset(tap), c.weight_out_stride, element, 1, lanes<float>);
        taps[i][tap] = load_vector(element);
      }
  }
}

// The same where only the first `outs` output channels exist; the others are 0. Not inlined, as transform_part_of_patch().
template <class S>
[[gnu::noinline]] void load_part_of_weights(const Correlation<S>& c, const S* weight, int64_t count, int64_t outs,
                                            FloatVector (&taps)[4][9]) {
  for (int64_t i = 0; i < count; ++i)
    for (int tap = 0; tap < 9; ++tap) {
      float element[lanes<float>] = {};
      copy_strided(weight + i * c.weight_in_stride + tap / 3 * c.weight_y_stride + tap % 3 * c.weight_x_stride,
                   c.weight_out_stride, element, 1, outs);
      taps[i][tap] = load_vector(element);
    }
}

// G g G^T for one input channel and as many output channels as a vector has lanes.
inline void transform_weights(const FloatVector (&taps)[9], float* u, int64_t point_stride) {
  FloatVector rows[3][6];
#pragma GCC unroll 3
  for (int y = 0; y < 3; ++y) {
    const FloatVector line[3] = {taps[3 * y], taps[3 * y + 1], taps[3 * y + 2]};
    transform_kernel(line, rows[y]);
  }
#pragma GCC unroll 1
  for (int x = 0; x < 6; ++x, u += point_stride) {
    const FloatVector column[3] = {rows[0][x], rows[1][x], rows[2][x]};
    FloatVector point[6];
    transform_kernel(column, point);
#pragma GCC unroll 6
    for (int y = 0; y < 6; ++y) store_vector(point[y], u + 6 * y * point_stride);
  }
}

// U for one panel and one block of channels.
template <class S>
void transform_weights(const Winograd<S>& w, int64_t group, int64_t panel, int64_t block, float* u) {
  const Correlation<S>& c = w.c;
  const int64_t first = panel * winograd_width, outs = min(c.out_channels - first, winograd_width);
  const int64_t channels = w.source.block_channels(block);
  const S* weight = c.weight + group * c.weight_group_stride + first * c.weight_out_stride +
                    block * w.source.block_width * c.weight_in_stride;
  FloatVector taps[4][9];
  for (int64_t channel = 0; channel < channels; channel += 4)
    for (int64_t out = 0; out < winograd_width; out += lanes<float>) {
      const int64_t count = min<int64_t>(channels - channel, 4);
      const S* from = weight + channel * c.weight_in_stride + out * c.weight_out_stride;
      if (out + lanes<float> <= outs)
        load_weights(c, from, count, taps);
      else
        load_part_of_weights(c, from, count, max<int64_t>(outs - out, 0), taps);
      for (int64_t i = 0; i < count; ++i)
        transform_weights(taps[i], u + (channel + i) * winograd_width + out, w.u_point_stride());
    }
}

// Elements of the weights transformed once for all chunks.
template <class S>
int64_t winograd_packed_elements(const Winograd<S>& w) { return w.c.groups * w.panels * w.u_panel_stride(); }

template <class S>
void winograd_pack(const Winograd<S>& w, float* packed, const ThreadPool& pool) {
  const int64_t blocks = w.source.blocks;
  parallel_for(pool, w.c.groups * w.panels * blocks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t panel = i / blocks;
      transform_weights(w, panel / w.panels, panel % w.panels, i % blocks, packed + i * w.u_block_stride());
    }
  });
}

// ---- Patches ----

enum class Access { channels, line, any };  // which neighbours in memory a vector is made of

inline Access access_of(int64_t channel_stride, int64_t x_stride) {
  return channel_stride == 1 ? Access::channels : x_stride == 1 ? Access::line : Access::any;
}

// Neighbours of a line for as many channels as a vector has lanes.
template <class S, Access access, int Pixels>
void load_line(const S* from, int64_t channel_stride, int64_t x_stride, FloatVector (&d)[Pixels]) {
  if constexpr (access == Access::channels) {
    for (int x = 0; x < Pixels; ++x) d[x] = load_vector(from + x * x_stride);
  } else {
    FloatVector first[4], last[4];
    load_columns(from, channel_stride, first);
    if constexpr (Pixels > 4) load_columns(from + Pixels - 4, channel_stride, last);
    for (int x = 0; x < Pixels; ++x) d[x] = x < 4 ? first[x] : last[x - (Pixels - 4)];
  }
}

// The same where only pixels [begin, end) and the first `channels` channels exist; the others are 0.
template <class S, Access access, int Pixels>
[[gnu::noinline]] void load_part_of_line(const S* from, int64_t channel_stride, int64_t x_stride, int64_t begin, int64_t end,
                                         int64_t channels, FloatVector (&d)[Pixels]) {
  if constexpr (access == Access::channels) {
    for (int x = 0; x < Pixels; ++x)
      d[x] = x >= begin && x < end ? load_first(from + x * x_stride, channels) : FloatVector{};
  } else {
    float line[Pixels][lanes<float>] = {};
    channels = min<int64_t>(channels, lanes<float>);
    for (int64_t channel = 0; channel < channels; ++channel)
      for (int64_t x = begin; x < end; ++x) line[x][channel] = to_compute(from[channel * channel_stride + x * x_stride]);
    for (int x = 0; x < Pixels; ++x) d[x] = load_vector(line[x]);
  }
}

// The second half of a patch's transform: down the columns of its transformed lines. Rolled: few registers and addresses.
template <int Pixels>
void transform_columns(const FloatVector (&lines)[Pixels][winograd_inputs], float* v, int64_t point_stride) {
#pragma GCC unroll 1
  for (int x = 0; x < winograd_inputs; ++x, v += point_stride) {
    FloatVector column[Pixels], point[winograd_inputs];
#pragma GCC unroll 6
    for (int y = 0; y < Pixels; ++y) column[y] = lines[y][x];
    transform_line(column, point);
#pragma GCC unroll 6
    for (int y = 0; y < winograd_inputs; ++y) store_vector(point[y], v + winograd_inputs * y * point_stride);
  }
}

// Transforms the patch at `from`, all of whose pixels exist, for as many channels as a vector has lanes.
template <class S, Access access, int Pixels>
void transform_whole_patch(const S* from, const int64_t* stride, float* v, int64_t point_stride) {
  FloatVector lines[Pixels][winograd_inputs];
#pragma GCC unroll 6
  for (int y = 0; y < Pixels; ++y) {
    FloatVector d[Pixels];
    load_line<S, access>(from + y * stride[2], stride[1], stride[3], d);
    transform_line(d, lines[y]);
  }
  transform_columns(lines, v, point_stride);
}

// The same for any patch, whose first pixel is (y, x), and `channels` channels that exist. Neither this nor the gathering of
// a line is inlined: the compiler would move multiplications from one branch to another, away from their additions, and then
// no longer fuse them.
template <class S, Access access, int Pixels>
[[gnu::noinline]] void transform_part_of_patch(const TiledImages<S, Pixels>& images, const S* from, int64_t y, int64_t x,
                                               int64_t channels, float* v, int64_t point_stride) {
  FloatVector lines[Pixels][winograd_inputs];
  const int64_t begin = max<int64_t>(0, -x), end = min<int64_t>(Pixels, images.width - x), *stride = images.stride;
  for (int i = 0; i < Pixels; ++i) {
    FloatVector d[Pixels];
    const bool inside = y + i >= 0 && y + i < images.height;
    load_part_of_line<S, access>(from + i * stride[2], stride[1], stride[3], begin, inside ? end : begin, channels, d);
    transform_line(d, lines[i]);
  }
  transform_columns(lines, v, point_stride);
}

// Transforms the patch of `tile` for the channels [channel, channel + lanes) of all groups, of which `channels` exist.
template <class S, Access access, int Pixels>
void transform_patch(const TiledImages<S, Pixels>& images, WinogradTile tile, int64_t channel, int64_t channels, float* v,
                     int64_t point_stride) {
  const int64_t *stride = images.stride, y = tile.y + images.offset_y, x = tile.x + images.offset_x;
  const S* from = images.data + tile.n * stride[0] + channel * stride[1] + y * stride[2] + x * stride[3];
  if (access != Access::any && channels >= lanes<float> && y >= 0 && y + Pixels <= images.height && x >= 0 &&
      x + Pixels <= images.width)
    transform_whole_patch<S, access, Pixels>(from, stride, v, point_stride);
  else
    transform_part_of_patch<S, access>(images, from, y, x, channels, v, point_stride);
}

// Transforms the patches of tiles [tile, tile + count) of a chunk that begins with tile `first`, for one block of channels;
// `v` is the block's.
template <class S, Access access, int Pixels>
void transform_block(const TiledImages<S, Pixels>& images, int64_t first, int64_t tile, int64_t count, int64_t group,
                     int64_t block, float* v, int64_t point_stride) {
  const int64_t channels = images.block_channels(block);
  const int64_t first_channel = group * images.channels + block * images.block_width;
  const auto one = [&](int64_t t, int64_t channel) {
    transform_patch<S, access>(images, images.tile_at(first + t), first_channel + channel, channels - channel,
                               v + t * images.block_width + channel, point_stride);
  };
  // Along what is contiguous in memory.
  if constexpr (access == Access::channels) {
    for (int64_t t = tile; t < tile + count; ++t)
      for (int64_t channel = 0; channel < channels; channel += lanes<float>) one(t, channel);
  } else {
    for (int64_t channel = 0; channel < channels; channel += lanes<float>)
      for (int64_t t = tile; t < tile + count; ++t) one(t, channel);
  }
}

// Transforms the patches of a chunk of `tiles` tiles from `first` on.
template <class S, int Pixels>
void transform_patches(const TiledImages<S, Pixels>& images, int64_t first, int64_t tiles, float* v, const ThreadPool& pool) {
  constexpr int64_t tile_block = 16;
  const int64_t tile_blocks = ceil_div(tiles, tile_block), blocks = images.groups * images.blocks;
  const Access access = access_of(images.stride[1], images.stride[3]);
  const auto transform = access == Access::channels ? transform_block<S, Access::channels, Pixels>
                         : access == Access::line   ? transform_block<S, Access::line, Pixels>
                                                    : transform_block<S, Access::any, Pixels>;
  parallel_for(pool, blocks * tile_blocks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t tile = i / blocks * tile_block, block = i % blocks;
      transform(images, first, tile, min(tiles - tile, tile_block), block / images.blocks, block % images.blocks,
                v + block * images.block_stride(tiles), images.point_stride(tiles));
    }
  });
}

// ---- Products ----

// m [rows, width] (+)= v [rows, depth] * u [depth, width], rows cut evenly into tiles of registers.
inline void point_product(int64_t rows, int64_t depth, Matrix<const float> v, const float* u, float* m, bool add) {
  for (int64_t row = 0; row < rows;) {
    const int64_t count = ceil_div(rows - row, ceil_div(rows - row, tile_rows));
    tile_product_rows<float>(count, Matrix<const float>{v.data + row * v.row_stride, v.row_stride, v.col_stride}, u,
                             winograd_width, depth, m + row * winograd_width, winograd_width, add);
    row += count;
  }
}

// ---- Result ----

// By its definition: the pixel (y, x) of image n and output channel `out` of a group.
template <class S>
float exact_pixel(const Winograd<S>& w, int64_t group, int64_t n, int64_t y, int64_t x, int64_t out) {
  const Correlation<S>& c = w.c;
  float sum = 0;
  for (int64_t r = 0; r < 3; ++r)
    for (int64_t s = 0; s < 3; ++s) {
      const int64_t source_y = y + w.source.offset_y + r, source_x = x + w.source.offset_x + s;
      const bool inside =
          source_y >= 0 && source_y < w.source.height && source_x >= 0 && source_x < w.source.width;
      const S* weight = c.weight + group * c.weight_group_stride + out * c.weight_out_stride + r * c.weight_y_stride +
                        s * c.weight_x_stride;
      const S* source = c.source + n * c.source_stride[0] + group * c.in_channels * c.source_stride[1] +
                        source_y * c.source_stride[2] + source_x * c.source_stride[3];
      for (int64_t i = 0; i < c.in_channels; ++i)
        sum += (inside ? to_compute(source[i * c.source_stride[1]]) : 0.0f) * to_compute(weight[i * c.weight_in_stride]);
    }
  return c.bias ? sum + to_compute(c.bias[group * c.out_channels + out]) : sum;
}

template <class S>
void store_exactly(const Winograd<S>& w, int64_t group, WinogradTile tile, int64_t out) {
  const int64_t* stride = w.c.result_stride;
  S* to = w.c.result + tile.n * stride[0] + (group * w.c.out_channels + out) * stride[1];
  for (int64_t y = tile.y; y < min(tile.y + winograd_outputs, w.height); ++y)
    for (int64_t x = tile.x; x < min(tile.x + winograd_outputs, w.width); ++x)
      from_compute(exact_pixel(w, group, tile.n, y, x, out), to + y * stride[2] + x * stride[3]);
}

// Four neighbours of a line for as many channels as a vector has lanes.
template <class S, Access access>
void store_line(FloatVector (&o)[4], S* to, int64_t channel_stride, int64_t x_stride) {
  if constexpr (access == Access::channels)
    for (int x = 0; x < 4; ++x) store_vector(o[x], to + x * x_stride);
  else
    store_columns(o, to, channel_stride);
}

template <class S, Access access>
void store_part_of_line(const FloatVector (&o)[4], S* to, int64_t channel_stride, int64_t x_stride, int64_t pixels,
                        int64_t channels) {
  for (int64_t x = 0; x < pixels; ++x) {
    if constexpr (access == Access::channels) {
      store_first(o[x], to + x * x_stride, channels);
    } else {
      float element[lanes<float>];
      store_vector(o[x], element);
      for (int64_t channel = 0; channel < channels; ++channel)
        from_compute(element[channel], to + channel * channel_stride + x * x_stride);
    }
  }
}

// A^T m A + bias for one tile and the output channels [out, out + lanes) of a group, of which `channels` exist.
template <class S, Access access>
void transform_result(const Winograd<S>& w, int64_t group, WinogradTile tile, int64_t out, int64_t channels, const float* m,
                      int64_t point_stride) {
  const int64_t* stride = w.c.result_stride;
  const int64_t first = group * w.c.out_channels + out;
  const int64_t lines = min<int64_t>(w.height - tile.y, 4), pixels = min<int64_t>(w.width - tile.x, 4);
  S* to = w.c.result + tile.n * stride[0] + first * stride[1] + tile.y * stride[2] + tile.x * stride[3];
  channels = min<int64_t>(channels, lanes<float>);
  const FloatVector bias = w.c.bias ? load_first(w.c.bias + first, channels) : FloatVector{};
  FloatVector columns[6][4];
#pragma GCC unroll 1
  for (int x = 0; x < 6; ++x, m += point_stride) {
    FloatVector column[6];
#pragma GCC unroll 6
    for (int y = 0; y < 6; ++y) column[y] = load_vector(m + 6 * y * point_stride);
    transform_products(column, columns[x]);
  }
  FloatVector sum = {};
  const bool whole = access != Access::any && channels == lanes<float> && lines == 4 && pixels == 4;
#pragma GCC unroll 4
  for (int y = 0; y < 4; ++y) {
    const FloatVector line[6] = {columns[0][y], columns[1][y], columns[2][y], columns[3][y], columns[4][y], columns[5][y]};
    FloatVector o[4];
    transform_products(line, o);
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) o[x] = (result_scale[y] * result_scale[x]) * o[x] + bias, sum += o[x];
    if (whole)
      store_line<S, access>(o, to + y * stride[2], stride[1], stride[3]);
    else if (y < lines)
      store_part_of_line<S, access>(o, to + y * stride[2], stride[1], stride[3], pixels, channels);
  }
  const FloatVector zero = sum - sum;  // not 0 where something isn't finite
  for (int64_t i = 0; i < channels; ++i)
    if (zero[i] != 0) store_exactly(w, group, tile, out + i);
}

// ---- Work ----

// With fewer tiles at a time, reading (or making) the weights would cost more than the products.
constexpr int64_t winograd_least_tiles = 64;
// Transformed weights beyond this many elements are not kept for all chunks but made again by each.
constexpr int64_t winograd_most_packed = int64_t{1} << 23;

struct WinogradPlan {
  int64_t chunk_tiles, chunks;
  bool chunk_per_thread;  // else all threads work on one chunk together
  int64_t range_tiles;    // of a chunk, per piece of work
  bool pack;              // all weights before the first chunk
};

// The cut depends on the number of threads, an element's bits don't.
template <class S>
WinogradPlan winograd_plan(const Winograd<S>& w, int64_t threads) {
  WinogradPlan p;
  const int64_t tiles = w.source.tiles(), tile_bytes = w.source.elements(1) * static_cast<int64_t>(sizeof(float));
  const int64_t most = max(winograd_least_tiles, l2_cache_bytes() / tile_bytes);
  p.chunks = ceil_div(tiles, most);
  p.chunk_tiles = ceil_div(tiles, p.chunks);
  p.chunk_per_thread = threads == 1 || p.chunks >= 2 * threads;
  const int64_t ranges = p.chunk_per_thread ? 1 : ceil_div(2 * threads, w.c.groups * w.panels);
  p.range_tiles = min(p.chunk_tiles, max<int64_t>(2 * tile_rows, ceil_div(p.chunk_tiles, ranges)));
  const bool used_again = p.chunks > 1 || p.range_tiles < p.chunk_tiles;
  p.pack = used_again && winograd_packed_elements(w) <= winograd_most_packed;
  return p;
}

inline ThreadPool calling_thread() {
  return {1, [](int64_t n, void (*body)(void*, int64_t, int64_t), void* state) { body(state, 0, n); }};
}

template <class S, Access access>
void result_tiles(const Winograd<S>& w, int64_t group, int64_t first, int64_t tiles, int64_t out, const float* m,
                  int64_t point_stride) {
  const int64_t outs = min(w.c.out_channels - out, winograd_width);
  for (int64_t t = 0; t < tiles; ++t)
    for (int64_t i = 0; i < outs; i += lanes<float>)
      transform_result<S, access>(w, group, w.source.tile_at(first + t), out + i, outs - i, m + t * winograd_width + i,
                                  point_stride);
}

// The results of a chunk of `tiles` tiles from `first` on. `packed` is U, or nullptr: then it is made on the way.
template <class S>
void product_step(const Winograd<S>& w, const WinogradPlan& p, const float* packed, const float* v, int64_t first,
                  int64_t tiles, const ThreadPool& pool) {
  const TiledImages<S, winograd_inputs>& source = w.source;
  const int64_t ranges = ceil_div(tiles, p.range_tiles), m_stride = p.range_tiles * winograd_width + line_floats;
  const Access access = access_of(w.c.result_stride[1], w.c.result_stride[3]);
  parallel_for(pool, w.c.groups * w.panels * ranges, [&](int64_t begin, int64_t end) {
    float* m = scratch<float>(ScratchUse::worker, winograd_points * m_stride + w.u_block_stride());
    float* own_u = m + winograd_points * m_stride;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t tile = i % ranges * p.range_tiles, count = min(tiles - tile, p.range_tiles);
      const int64_t panel = i / ranges % w.panels, group = i / ranges / w.panels;
      for (int64_t block = 0; block < source.blocks; ++block) {
        const float* u = packed + (group * w.panels + panel) * w.u_panel_stride() + block * w.u_block_stride();
        if (!packed) transform_weights(w, group, panel, block, own_u), u = own_u;
        const float* block_v =
            v + (group * source.blocks + block) * source.block_stride(tiles) + tile * source.block_width;
        for (int point = 0; point < winograd_points; ++point)
          point_product(count, source.block_channels(block),
                        Matrix<const float>{block_v + point * source.point_stride(tiles), source.block_width, 1},
                        u + point * w.u_point_stride(), m + point * m_stride, block > 0);
      }
      const auto finish = access == Access::channels ? result_tiles<S, Access::channels>
                          : access == Access::line   ? result_tiles<S, Access::line>
                                                     : result_tiles<S, Access::any>;
      finish(w, group, first + tile, count, panel * winograd_width, m, m_stride);
    }
  });
}

// `packed`: what winograd_pack() made, or nullptr.
template <class S>
void correlate_by_winograd(const Winograd<S>& w, const float* packed, const ThreadPool& pool) {
  const WinogradPlan p = winograd_plan(w, pool.threads);
  const int64_t v_elements = round_up(w.source.elements(p.chunk_tiles), line_floats);
  const int64_t slots = p.chunk_per_thread ? pool.threads : 1;
  const int64_t u_elements = packed || !p.pack ? 0 : winograd_packed_elements(w);
  float* v = scratch<float>(ScratchUse::caller, slots * v_elements + u_elements);
  if (u_elements) {
    float* u = v + slots * v_elements;
    winograd_pack(w, u, pool);
    packed = u;
  }
  const auto run_chunk = [&](int64_t chunk, float* chunk_v, const ThreadPool& threads) {
    const int64_t first = chunk * p.chunk_tiles, tiles = min(w.source.tiles() - first, p.chunk_tiles);
    transform_patches(w.source, first, tiles, chunk_v, threads);
    product_step(w, p, packed, chunk_v, first, tiles, threads);
  };
  if (p.chunk_per_thread) {
    parallel_for(pool, slots, [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot)
        for (int64_t chunk = slot * p.chunks / slots; chunk < (slot + 1) * p.chunks / slots; ++chunk)
          run_chunk(chunk, v + slot * v_elements, calling_thread());
    });
  } else {
    for (int64_t chunk = 0; chunk < p.chunks; ++chunk) run_chunk(chunk, v, pool);
  }
}

// Measured: with fewer channels or pixels the implicit GEMM is as fast. The batch must not matter: a sample alone has the
// bits that it has in a batch.
inline bool winograd_applies(const Conv2dShape& s, DType dtype, int64_t height, int64_t width) {
  constexpr int64_t least_channels = 16, least_pixels = 16;
  return s.kernel_height == 3 && s.kernel_width == 3 && s.stride_h == 1 && s.stride_w == 1 && s.dilation_h == 1 &&
         s.dilation_w == 1 && min(s.in_channels, s.out_channels) >= least_channels * s.groups &&
         height * width >= least_pixels && dtype != DType::f64 && !strict_precision();
}
inline bool winograd_applies(const Conv2dForward& p) {
  return winograd_applies(p.shape, p.dtype, p.shape.out_height, p.shape.out_width);
}
inline bool winograd_applies(const Conv2dInputGrad& p) {
  return winograd_applies(p.shape, p.dtype, p.shape.in_height, p.shape.in_width);
}

template <class S, class Problem>
void correlate_by_winograd(const Problem& problem, const ThreadPool& pool) {
  if constexpr (sizeof(Compute<S>) == sizeof(float)) {
    const Winograd<S> w = winograd(correlation<S>(problem));
    if (w.c.batch > 0) correlate_by_winograd(w, nullptr, pool);
  }
}

}  // namespace
}  // namespace cvfast
