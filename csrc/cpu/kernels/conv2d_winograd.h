// Forward convolution and gradient to the input by Winograd's F(4x4, 3x3), for 3x3 kernels with stride 1, and by F(4x4, 2x2),
// for kernels whose taps are two on each axis within a phase of the stride, as 3x3 and 4x4 with stride 2.
//
// The phases of the forward pass are the source's pixels with the same remainder modulo the stride: the result is the sum of
// stride-1 correlations of them. Those of the gradient to the input are the result's pixels: each is a stride-1 correlation
// by itself.
//
// The result is cut into tiles of 4x4 pixels, smaller ones at the end of an axis (tile_grid). A chunk of tiles takes
// three steps, each over vectors of channels in both memory formats; P is 6 or 5:
//   1. source [PxP patch, channel] -> V [block: phase of the source and channels, point, tile, channel];
//   2. for each panel of output channels and each of the P x P points: M [point, tile, out] = V[point] * U[point], where U
//      are the transformed weights;
//   3. M -> result [4x4 pixels, out], plus bias.
// An element of M is one chain of multiply-adds per block of channels (winograd_chain: with two taps, chains of 16), added in
// order; a tile's bits depend on its patch alone. Numbers that are not finite would spread over a tile: such results are
// computed again by the definition.
#pragma once
#include "../precision.h"
#include "conv2d_winograd_few_tiles.h"
#include "conv2d_winograd_prefetch.h"

namespace cvfast {
namespace {

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
template <int Pixels, int Points>
void transform_columns(const FloatVector (&lines)[Pixels][Points], float* v, int64_t point_stride) {
#pragma GCC unroll 1
  for (int x = 0; x < Points; ++x, v += point_stride) {
    FloatVector column[Pixels], point[Points];
#pragma GCC unroll 6
    for (int y = 0; y < Pixels; ++y) column[y] = lines[y][x];
    transform_line(column, point);
#pragma GCC unroll 6
    for (int y = 0; y < Points; ++y) store_vector(point[y], v + Points * y * point_stride);
  }
}

// Transforms the patch at `from`, all of whose pixels exist, for as many channels as a vector has lanes.
template <class S, Access access, int Pixels, int Points>
void transform_whole_patch(const S* from, const int64_t* stride, float* v, int64_t point_stride) {
  FloatVector lines[Pixels][Points];
#pragma GCC unroll 6
  for (int y = 0; y < Pixels; ++y) {
    FloatVector d[Pixels];
    load_line<S, access>(from + y * stride[2], stride[1], stride[3], d);
    transform_line(d, lines[y]);
  }
  transform_columns(lines, v, point_stride);
}

// The same for any patch, whose first pixel is (y, x), of an image that ends at (end_y, end_x), and `channels` channels that
// exist. Neither this nor the gathering of a line is inlined: the compiler would move multiplications from one branch to
// another, away from their additions, and then no longer fuse them.
template <class S, Access access, int Pixels, int Points>
[[gnu::noinline]] void transform_part_of_patch(const int64_t* stride, const S* from, int64_t y, int64_t x, int64_t end_y,
                                               int64_t end_x, int64_t channels, float* v, int64_t point_stride) {
  FloatVector lines[Pixels][Points];
  const int64_t begin = max<int64_t>(0, -x), end = min<int64_t>(Pixels, end_x - x);
  for (int i = 0; i < Pixels; ++i) {
    FloatVector d[Pixels];
    const bool inside = y + i >= 0 && y + i < end_y;
    load_part_of_line<S, access>(from + i * stride[2], stride[1], stride[3], begin, inside ? end : begin, channels, d);
    transform_line(d, lines[i]);
  }
  transform_columns(lines, v, point_stride);
}

// Transforms the patch of `tile` for the channels [channel, channel + lanes) of all groups, of which `channels` exist. Of a
// patch that is the tile itself, a short one's last line or column is 0.
template <class S, Access access, int Pixels, int Points>
void transform_patch(const PhaseImages<S>& images, const WinogradTile& tile, int64_t channel, int64_t channels, float* v,
                     int64_t point_stride) {
  const int64_t *stride = images.stride, y = tile.y + images.offset_y, x = tile.x + images.offset_x;
  const S* from = images.data + tile.n * stride[0] + channel * stride[1] + y * stride[2] + x * stride[3];
  const int64_t end_y = Pixels > winograd_outputs ? images.height : min(images.height, y + tile.lines);
  const int64_t end_x = Pixels > winograd_outputs ? images.width : min(images.width, x + tile.pixels);
  if (access != Access::any && channels >= lanes<float> && y >= 0 && y + Pixels <= end_y && x >= 0 && x + Pixels <= end_x)
    transform_whole_patch<S, access, Pixels, Points>(from, stride, v, point_stride);
  else
    transform_part_of_patch<S, access, Pixels, Points>(stride, from, y, x, end_y, end_x, channels, v, point_stride);
}

// Transforms the patches of tiles [tile, tile + count) of a chunk that begins with tile `first`, for one block; `v` is the
// block's.
template <class S, Access access, int Pixels, int Points>
void transform_block(const TiledImages<S, Pixels, Points>& images, int64_t first, int64_t tile, int64_t count, int64_t group,
                     int64_t block, float* v, int64_t point_stride) {
  const PhaseImages<S>& phase = images.phase[block / images.channel_blocks];
  const int64_t channels = images.block_channels(block);
  const int64_t first_channel = group * images.channels + images.first_channel(block);
  const auto one = [&](int64_t t, int64_t channel) {
    const WinogradTile at = images.tile_at(first + t);
    const auto transform = [&](const PhaseImages<S>& seen) {
      transform_patch<S, access, Pixels, Points>(seen, at, first_channel + channel, channels - channel,
                                                 v + t * images.tile_stride() + channel, point_stride);
    };
    images.dilated() ? transform(phase.part(at, images.dilation_y, images.dilation_x)) : transform(phase);
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
template <class S, int Pixels, int Points>
void transform_patches(const TiledImages<S, Pixels, Points>& images, int64_t first, int64_t tiles, float* v,
                       const ThreadPool& pool) {
  constexpr int64_t tile_block = 16;
  const int64_t tile_blocks = ceil_div(tiles, tile_block), blocks = images.groups * images.blocks;
  const Access access = access_of(images.phase[0].stride[1], images.phase[0].stride[3] * images.dilation_x);
  const auto transform = access == Access::channels ? transform_block<S, Access::channels, Pixels, Points>
                         : access == Access::line   ? transform_block<S, Access::line, Pixels, Points>
                                                    : transform_block<S, Access::any, Pixels, Points>;
  parallel_for(pool, blocks * tile_blocks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t tile = i / blocks * tile_block, block = i % blocks;
      transform(images, first, tile, min(tiles - tile, tile_block), block / images.blocks, block % images.blocks,
                v + block * images.block_stride(tiles), images.point_stride(tiles));
    }
  });
}

// ---- Products ----

// A tile of M: m [Rows, width] (+)= v [Rows, depth] * u [depth, width], the sum of chains of `Chain` multiply-adds. What comes
// next is asked for meanwhile: as many rows of V behind these, and of U `ahead_lines` cache lines per 16 channels from `ahead` on.
template <int Rows, int64_t Chain>
void point_tile(const float* v, int64_t v_stride, const float* u, int64_t depth, const float* ahead, int64_t ahead_lines,
                float* m, bool add) {
  constexpr int vectors = winograd_width / lanes<float>;
  constexpr bool one_chain = Chain == winograd_depth;
  FloatVector total[Rows][vectors] = {};
  for (int64_t begin = 0; begin < depth; begin += Chain) {
    FloatVector sum[Rows][vectors] = {};
    const int64_t end = min(begin + Chain, depth);
    for (int64_t first = begin; first < end; first += line_floats) {
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) __builtin_prefetch(v + (Rows + i) * v_stride);
      for (int64_t line = 0; line < ahead_lines; ++line, ahead += line_floats) __builtin_prefetch(ahead, 0, 2);
      for (int64_t k = min(line_floats, end - first); k > 0; --k, ++v, u += winograd_width) {
        const FloatVector row[vectors] = {load_vector(u), load_vector(u + lanes<float>)};
#pragma GCC unroll 16
        for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
          for (int j = 0; j < vectors; ++j) sum[i][j] += v[i * v_stride] * row[j];
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < vectors; ++j) total[i][j] = one_chain ? sum[i][j] : total[i][j] + sum[i][j];
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < vectors; ++j) {
      float* to = m + i * winograd_width + j * lanes<float>;
      store_vector(add ? load_vector(to) + total[i][j] : total[i][j], to);
    }
}

using PointTile = decltype(&point_tile<1, winograd_depth>);
template <int64_t Chain, int Rows = tile_rows>
PointTile point_tile_of(int64_t rows) {
  if constexpr (Rows > 1)
    if (rows < Rows) return point_tile_of<Chain, Rows - 1>(rows);
  return point_tile<Rows, Chain>;
}

// m [rows, width] (+)= v [rows, depth] * u [depth, width], rows cut evenly into tiles of registers; meanwhile U's next point, at
// `next_u`, comes near. after_tile() is called after each tile.
template <int Taps, class AfterTile>
void point_product(int64_t rows, int64_t depth, const float* v, int64_t v_stride, const float* u, const float* next_u, float* m,
                   bool add, AfterTile&& after_tile) {
  const int64_t tiles = ceil_div(rows, tile_rows), ahead_lines = ceil_div(winograd_width, max<int64_t>(tiles, 1));
  for (int64_t row = 0, tile = 0; row < rows; ++tile) {
    const int64_t count = ceil_div(rows - row, tiles - tile);
    const float* ahead = next_u + tile * ahead_lines * depth;
    point_tile_of<winograd_chain<Taps>>(count)(v + row * v_stride, v_stride, u, depth, ahead, ahead_lines,
                                               m + row * winograd_width, add);
    after_tile();
    row += count;
  }
}

// ---- Result ----

// By its definition: the pixel (y, x) of the phase of image n and output channel `out` of a group.
template <class S>
float exact_pixel(const Correlation<S>& c, const Phase<S>& phase, int64_t group, int64_t n, int64_t y, int64_t x,
                  int64_t out) {
  const Axis &y_axis = phase.patches.y, &x_axis = phase.patches.x;
  float sum = 0;
  for (int64_t r = 0; r < y_axis.taps; ++r)
    for (int64_t s = 0; s < x_axis.taps; ++s) {
      const int64_t source_y = y_axis.source(y, r), source_x = x_axis.source(x, s);
      const bool inside = source_y >= 0 && source_y < y_axis.inputs && source_x >= 0 && source_x < x_axis.inputs;
      const S* weight = c.weight + group * c.weight_group_stride + out * c.weight_out_stride +
                        (y_axis.first_tap + r * y_axis.tap_step) * c.weight_y_stride +
                        (x_axis.first_tap + s * x_axis.tap_step) * c.weight_x_stride;
      const S* source = c.source + n * c.source_stride[0] + group * c.in_channels * c.source_stride[1] +
                        source_y * c.source_stride[2] + source_x * c.source_stride[3];
      for (int64_t i = 0; i < c.in_channels; ++i)
        sum += (inside ? to_compute(source[i * c.source_stride[1]]) : 0.0f) * to_compute(weight[i * c.weight_in_stride]);
    }
  return c.bias ? sum + to_compute(c.bias[group * c.out_channels + out]) : sum;
}

// A tile's lines x pixels results of output channel `out`, into the tile's block.
template <class S, class To>
void store_exactly(const Correlation<S>& c, const Phase<S>& phase, int64_t group, const WinogradTile& tile, int64_t out,
                   int64_t lines, int64_t pixels, Block<To> to) {
  for (int64_t y = 0; y < lines; ++y)
    for (int64_t x = 0; x < pixels; ++x)
      from_compute(exact_pixel(c, phase, group, tile.n, tile.part_y + (tile.y + y) * c.shape.dilation_h,
                               tile.part_x + (tile.x + x) * c.shape.dilation_w, out),
                   to.data + y * to.line_stride + x * to.pixel_stride);
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

// What becomes of a tile's results before they are stored, if anything: the sum with `residual`, laid out as they are, or nullptr,
// within bounds.
template <class To>
struct TileFinish {
  bool some = false;
  const To* residual = nullptr;
  Bounds<float> bounds = {};
};

// Other epilogues follow the stored results.
template <class S>
bool finishes_in_registers(const Correlation<S>& c) { return c.finishes() && !activation_of_runs<float>(c.epilogue.activation); }

// Of the line `offset` elements behind the first.
template <class To, Access access>
[[gnu::always_inline]] inline void finish_line(const TileFinish<To>& finish, int64_t offset, int64_t channel_stride,
                                               int64_t x_stride, bool whole, int64_t pixels, int64_t channels,
                                               FloatVector (&o)[4]) {
  if (finish.residual) {
    FloatVector added[4];
    const To* from = finish.residual + offset;
    whole ? load_line<To, access>(from, channel_stride, x_stride, added)
          : load_part_of_line<To, access>(from, channel_stride, x_stride, 0, pixels, channels, added);
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) o[x] += added[x];
  }
#pragma GCC unroll 4
  for (int x = 0; x < 4; ++x) o[x] = finish.bounds.clamp(o[x]);
}

// A^T m A + bias for one tile, lines x pixels results, and the output channels [out, out + lanes) of a group, of which
// `channels` exist; `to` and `finish` are theirs.
template <class S, int Taps, Access access, class To>
void transform_result(const Winograd<S, Taps>& w, int64_t group, const WinogradTile& tile, int64_t out, int64_t channels,
                      int64_t lines, int64_t pixels, const float* m, int64_t point_stride, const Block<To>& to,
                      const TileFinish<To>& finish) {
  constexpr int points = winograd_inputs<Taps>;
  const int64_t first = group * w.c.out_channels + out;
  channels = min<int64_t>(channels, lanes<float>);
  const FloatVector bias = w.c.bias ? load_first(w.c.bias + first, channels) : FloatVector{};
  FloatVector columns[points][4];
#pragma GCC unroll 1
  for (int x = 0; x < points; ++x, m += point_stride) {
    FloatVector column[points];
#pragma GCC unroll 6
    for (int y = 0; y < points; ++y) column[y] = load_vector(m + points * y * point_stride);
    transform_products(column, columns[x]);
  }
  FloatVector sum = {};
  const bool whole = access != Access::any && channels == lanes<float> && lines == 4 && pixels == 4;
#pragma GCC unroll 4
  for (int y = 0; y < 4; ++y) {
    FloatVector line[points], o[4];
#pragma GCC unroll 6
    for (int x = 0; x < points; ++x) line[x] = columns[x][y];
    transform_products(line, o);
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) o[x] = (result_scale<Taps>[y] * result_scale<Taps>[x]) * o[x] + bias, sum += o[x];
    if (finish.some && y < lines)
      finish_line<To, access>(finish, y * to.line_stride, to.channel_stride, to.pixel_stride, whole, pixels, channels, o);
    if (whole)
      store_line<To, access>(o, to.data + y * to.line_stride, to.channel_stride, to.pixel_stride);
    else if (y < lines)
      store_part_of_line<To, access>(o, to.data + y * to.line_stride, to.channel_stride, to.pixel_stride, pixels, channels);
  }
  const FloatVector zero = sum - sum;  // not 0 where something isn't finite
  for (int64_t i = 0; i < channels; ++i)
    if (zero[i] != 0) {
      const int64_t offset = i * to.channel_stride;
      const Block<To> channel = {to.data + offset, to.channel_stride, to.line_stride, to.pixel_stride};
      store_exactly(w.c, w.phase, group, tile, out + i, lines, pixels, channel);
      if constexpr (sizeof(To) == sizeof(float)) {
        const To* residual = finish.residual ? finish.residual + offset : nullptr;
        const Block<const To> added = {residual, to.channel_stride, to.line_stride, to.pixel_stride};
        if (finish.some) apply_epilogue(w.c.epilogue, channel, added, 1, lines, pixels);
      }
    }
}

// ---- Work ----

// With fewer tiles at a time, reading (or making) the weights would cost more than the products.
constexpr int64_t winograd_least_tiles = 32;
// With so many tiles of its own a thread reads all of U rather than a part of it for everybody's.
constexpr int64_t winograd_least_tiles_alone = 8;
// The transform of the weights takes as long as the products of 36 tiles: with more than these it hardly counts.
constexpr int64_t winograd_most_tiles_to_pack = 1024;
// U has four times the elements of the taps (six of 2x2). Up to so many it is kept, or made for all chunks at once: asked for
// ahead of the products, it comes from memory twice as fast as the transform makes it.
constexpr int64_t winograd_most_u = int64_t{1} << 24;

struct WinogradPlan {
  int64_t chunk_tiles, chunks;
  bool chunk_per_thread;  // else all threads work on one chunk together
  int64_t range_tiles;    // of a chunk, per piece of work
  bool transform_first;   // all weights before the first chunk
};

// The cut depends on the number of threads, an element's bits don't.
template <class S, int Taps>
WinogradPlan winograd_plan(const Winograd<S, Taps>& w, int64_t threads) {
  WinogradPlan p;
  const int64_t tiles = w.source.tiles(), tile_bytes = w.source.elements(1) * static_cast<int64_t>(sizeof(float));
  const int64_t most = max(winograd_least_tiles, l2_cache_bytes() / 2 / tile_bytes);  // the other half: U and M
  // With all of U at hand each thread goes from patches to results alone.
  const bool alone = w.kept_u && tiles >= winograd_least_tiles_alone * threads;
  p.chunk_tiles = ceil_div(tiles, round_up(ceil_div(tiles, most), alone ? threads : 1));
  p.chunks = ceil_div(tiles, p.chunk_tiles);
  p.chunk_per_thread = threads == 1 || alone || p.chunks >= 2 * threads;
  const int64_t ranges = p.chunk_per_thread ? 1 : ceil_div(2 * threads, w.c.groups * w.panels);
  p.range_tiles = min(p.chunk_tiles, max<int64_t>(2 * tile_rows, ceil_div(p.chunk_tiles, ranges)));
  const bool used_again = p.chunks > 1 || p.range_tiles < p.chunk_tiles;
  p.transform_first = used_again && !w.kept_u && winograd_u_elements(w) <= winograd_most_u;
  return p;
}

inline ThreadPool calling_thread() {
  return {1, [](int64_t n, void (*body)(void*, int64_t, int64_t), void* state) { body(state, 0, n); }};
}

// `in_scratch`: room for a tile's results, where they are not stored as they are; or nullptr.
template <class S, int Taps, Access access>
void result_tiles(const Winograd<S, Taps>& w, int64_t group, int64_t first, int64_t tiles, int64_t out, const float* m,
                  int64_t point_stride, float* in_scratch) {
  const int64_t outs = min(w.c.out_channels - out, winograd_width);
  const Phase<S>& phase = w.phase;
  const int64_t unit = w.c.pools() ? 2 : 1;  // pixels per result on each axis
  const int64_t dilation_y = w.source.dilation_y, dilation_x = w.source.dilation_x;
  const auto from_here = [](int64_t size, int64_t first, int64_t step) {  // pixels of a part of the image
    return step == 1 ? size - first : ceil_div(size - first, step);
  };
  for (int64_t t = 0; t < tiles; ++t) {
    const WinogradTile tile = w.source.tile_at(first + t);
    const int64_t y = tile.part_y + dilation_y * tile.y, x = tile.part_x + dilation_x * tile.x;
    const int64_t lines = min(from_here(w.height(), y, dilation_y), tile.lines);
    const int64_t pixels = min(from_here(w.width(), x, dilation_x), tile.pixels);
    if (min(lines, pixels) <= 0) continue;  // parts of an image may be a line or a pixel shorter than others
    const auto transform = [&]<Access to_access, class To>(Block<To> to, TileFinish<To> finish) {
      for (int64_t i = 0; i < outs; i += lanes<float>, to.data += lanes<float> * to.channel_stride) {
        transform_result<S, Taps, to_access>(w, group, tile, out + i, outs - i, lines, pixels, m + t * winograd_width + i,
                                             point_stride, to, finish);
        if (finish.residual) finish.residual += lanes<float> * to.channel_stride;
      }
    };
    S* result = phase.result + tile.n * phase.result_batch_stride +
                (group * w.c.out_channels + out) * phase.result_channel_stride + y / unit * phase.result_y_stride +
                x / unit * phase.result_x_stride;
    const Block<S> to = {result, phase.result_channel_stride, dilation_y * phase.result_y_stride,
                         dilation_x * phase.result_x_stride};
    if (in_scratch) {
      const Block<float> from = {in_scratch, 1, winograd_outputs * winograd_width, winograd_width};
      transform.template operator()<Access::channels>(from, TileFinish<float>{});
      store_results(w.c, from, to, outs, lines, pixels);
    } else if (finishes_in_registers(w.c)) {
      transform.template operator()<access>(to, TileFinish<S>{true, residual_of(w.c, to).data, bounds_of(w.c)});
    } else {
      transform.template operator()<access>(to, TileFinish<S>{});
      finish_with_epilogue(w.c, to, outs, lines, pixels);
    }
  }
}

// M of one block for `tiles` tiles from `first` on: its products, added to those of the blocks before. Those that the phase's
// taps leave 0 and those that a short tile doesn't need are not computed; the first block, alone in the gradient to the input,
// stores zeros instead.
template <class S, int Taps, class AfterTile>
void block_products(const Winograd<S, Taps>& w, int64_t block, int64_t first, int64_t tiles, const float* v, int64_t v_stride,
                    const float* u, float* m, int64_t m_stride, AfterTile&& after_tile) {
  const int64_t phase = block / w.source.channel_blocks;
  const int64_t used_y = w.used_points(w.taps_y[phase]), used_x = w.used_points(w.taps_x[phase]);
  for (int64_t y = 0; y < w.points; ++y)
    for (int64_t x = 0; x < w.points; ++x) {
      const int64_t point = y * w.points + x;
      const TileRun run = y < used_y && x < used_x ? w.source.needing(y, x, first, tiles) : TileRun{0, 0};
      float* to = m + point * m_stride;
      const float* point_u = u + point * w.u_point_stride();
      point_product<Taps>(run.end - run.begin, w.source.block_channels(block),
                          v + point * v_stride + run.begin * w.source.tile_stride(), w.source.tile_stride(), point_u,
                          point_u + w.u_point_stride(), to + run.begin * winograd_width, block > 0, after_tile);
      if (block == 0) zero_all_but(run, tiles, to);
    }
}

// The results of a chunk of `tiles` tiles from `first` on. `all_u` is U, or nullptr: then it is made on the way.
template <class S, int Taps>
void product_step(const Winograd<S, Taps>& w, const WinogradPlan& p, const float* all_u, const float* v, int64_t first,
                  int64_t tiles, const ThreadPool& pool) {
  const auto& source = w.source;
  const int64_t ranges = ceil_div(tiles, p.range_tiles), m_stride = p.range_tiles * winograd_width + line_floats;
  const int64_t m_elements = w.points * w.points * m_stride;
  const Access access = access_of(w.phase.result_channel_stride, source.dilation_x * w.phase.result_x_stride);
  const bool in_scratch = w.c.pools() || w.c.rounds_last() || access == Access::any;
  const bool prefetch = images_are_large<S>(w.c.shape) && !source.dilated();
  const int64_t next_tiles = prefetch && p.chunk_per_thread ? min(source.tiles() - first - tiles, p.chunk_tiles) : 0;
  parallel_for(pool, w.c.groups * w.panels * ranges, [&](int64_t begin, int64_t end) {
    const int64_t calls = w.points * w.points * source.blocks * ceil_div(p.range_tiles, tile_rows);  // per piece of work
    TilePrefetcher<S> next_source = source_prefetcher(w, first + tiles, next_tiles, calls * (end - begin));
    constexpr int64_t tile_elements = (winograd_outputs * winograd_outputs + 1) * winograd_width;
    float* m = scratch<float>(ScratchUse::worker, m_elements + tile_elements + w.u_block_stride() +
                                                      FewTiles<Taps>::scratch_elements);
    float *tile_results = m + m_elements, *own_u = tile_results + tile_elements;
    float* few_tiles_scratch = own_u + w.u_block_stride();
    for (int64_t i = begin; i < end; ++i) {
      const int64_t tile = i % ranges * p.range_tiles, count = min(tiles - tile, p.range_tiles);
      const int64_t panel = i / ranges % w.panels, group = i / ranges / w.panels;
      const int64_t out = panel * winograd_width, outs = min(w.c.out_channels - out, winograd_width);
      TilePrefetcher<S> results =
          result_prefetcher(w, first + tile, prefetch ? count : 0, group * w.c.out_channels + out, outs, calls);
      const auto fetch = [&] { results(), next_source(); };
      for (int64_t block = 0; block < source.blocks; ++block) {
        const float* block_v =
            v + (group * source.blocks + block) * source.block_stride(tiles) + tile * source.tile_stride();
        if (!all_u && source.few && w.has_all_taps(block / source.channel_blocks)) {
          if (!w.kept_taps) gather_taps(w, group, panel, block, own_u);
          const float* taps = w.kept_taps ? w.kept_taps_of(group, panel, block) : own_u;
          FewTiles<Taps>{source.grid, first + tile, count, source.block_channels(block), block_v, few_tiles_scratch}.products(
              taps, w.taps_vector_stride(), block > 0, m, m_stride);
          continue;
        }
        const float* u = all_u + (group * w.panels + panel) * w.u_panel_stride() + block * w.u_block_stride();
        if (!all_u) transform_weights(w, group, panel, block, own_u), u = own_u;
        block_products(w, block, first + tile, count, block_v, source.point_stride(tiles), u, m, m_stride, fetch);
      }
      const auto finish = access == Access::channels ? result_tiles<S, Taps, Access::channels>
                          : access == Access::line   ? result_tiles<S, Taps, Access::line>
                                                     : result_tiles<S, Taps, Access::any>;
      finish(w, group, first + tile, count, out, m, m_stride, in_scratch ? tile_results : nullptr);
    }
  });
}

template <class S, int Taps>
void correlate_by_winograd(const Winograd<S, Taps>& w, const ThreadPool& pool) {
  const WinogradPlan p = winograd_plan(w, pool.threads);
  const int64_t v_elements = round_up(w.source.elements(p.chunk_tiles), line_floats);
  const int64_t slots = p.chunk_per_thread ? pool.threads : 1;
  const int64_t u_elements = p.transform_first ? winograd_u_elements(w) : 0;
  float* v = scratch<float>(ScratchUse::caller, slots * v_elements + u_elements);
  float* own_u = p.transform_first ? v + slots * v_elements : nullptr;
  if (own_u) transform_all_weights(w, own_u, pool);
  const float* all_u = own_u ? own_u : w.kept_u;
  const auto run_chunk = [&](int64_t chunk, float* chunk_v, const ThreadPool& threads) {
    const int64_t first = chunk * p.chunk_tiles, tiles = min(w.source.tiles() - first, p.chunk_tiles);
    transform_patches(w.source, first, tiles, chunk_v, threads);
    product_step(w, p, all_u, chunk_v, first, tiles, threads);
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
inline bool winograd_pays(const Conv2dShape& s, DType dtype, int64_t height, int64_t width) {
  constexpr int64_t least_channels = 16, least_pixels = 16;
  return min(s.in_channels, s.out_channels) >= least_channels * s.groups && height * width >= least_pixels &&
         dtype != DType::f64 && !strict_precision();
}
inline int64_t winograd_tiles(int64_t height, int64_t width) {
  return ceil_div(height, winograd_outputs) * ceil_div(width, winograd_outputs);
}

inline bool winograd_fits(const Conv2dShape& s, DType dtype, int64_t height, int64_t width) {
  return s.kernel_height == 3 && s.kernel_width == 3 && s.stride_h == 1 && s.stride_w == 1 &&
         winograd_pays(s, dtype, height, width);
}
// A dilated convolution is one without dilation on each part of the image, the pixels with the same remainders modulo the
// dilation. At least a third of the products must be saved, with the pixels that partial tiles compute in vain taken into
// account.
inline bool winograd_applies(const Conv2dShape& s, DType dtype, int64_t height, int64_t width) {
  const int64_t parts = s.dilation_h * s.dilation_w;
  const int64_t tiles = parts * winograd_tiles(ceil_div(height, s.dilation_h), ceil_div(width, s.dilation_w));
  return winograd_fits(s, dtype, height, width) && (parts == 1 || 6 * tiles <= height * width);
}
inline bool winograd_applies(const Conv2dForward& p) {
  return winograd_applies(p.shape, p.dtype, p.shape.out_height, p.shape.out_width);
}
inline bool winograd_applies(const Conv2dInputGrad& p) {
  const Conv2dShape& s = p.shape;
  const bool one_stride = s.dilation_h * s.dilation_w == 1 || min(s.out_height, s.out_width) > 1;  // else correlation() has its own
  return one_stride && winograd_applies(s, p.dtype, s.in_height, s.in_width);
}

// Kernels of 3 or 4 taps with stride 2: at most two taps on each axis in a phase. The image of height x width pixels is the
// result's phase. Measured: it pays to save a third of the products, with the pixels that partial tiles compute in vain taken
// into account.
inline bool winograd_on_phases_saves(const Conv2dShape& s, DType dtype, int64_t height, int64_t width) {
  const auto two_taps = [](int64_t taps, int64_t stride) { return stride == 2 && (taps == 3 || taps == 4); };
  const int64_t taps = s.kernel_height * s.kernel_width, tiles = winograd_tiles(height, width);
  const int64_t products = (s.kernel_height + 6) * (s.kernel_width + 6) * tiles;  // 3 points and those of its taps, per phase
  return two_taps(s.kernel_height, s.stride_h) && two_taps(s.kernel_width, s.stride_w) && s.dilation_h == 1 &&
         s.dilation_w == 1 && winograd_pays(s, dtype, height, width) && 3 * products <= 2 * taps * height * width;
}
// From so many tiles on, of 4x4 kernels at least `least_4x4`, the transform of the weights doesn't matter.
inline bool winograd_on_phases_applies(const Conv2dShape& s, DType dtype, int64_t height, int64_t width, int64_t least_4x4) {
  const int64_t least_tiles = s.kernel_height * s.kernel_width < 16 ? 16 : least_4x4;
  return winograd_on_phases_saves(s, dtype, height, width) && winograd_tiles(height, width) >= least_tiles;
}
inline bool winograd_on_phases_applies(const Conv2dForward& p) {
  return winograd_on_phases_applies(p.shape, p.dtype, p.shape.out_height, p.shape.out_width, 4);
}
// The result has four phases: together they have four times as many tiles. Each transforms the source anew: that costs more than
// the products of a kernel of less than 4x4 taps save for 32 channels of the result (measured with AVX2; 8x64x28x28 to 32
// channels, 3x3: 1.25 to 1.5 times as fast without).
inline bool winograd_on_phases_applies(const Conv2dInputGrad& p) {
  const Conv2dShape& s = p.shape;
  const bool few_channels = s.kernel_height * s.kernel_width < 16 && s.in_channels <= 32 * s.groups;
  return !few_channels && min(s.out_height, s.out_width) > 1 &&  // else correlation() takes another stride
         winograd_on_phases_applies(s, p.dtype, ceil_div(s.in_height, 2), ceil_div(s.in_width, 2), 1);
}

template <int Taps>
constexpr PackedForm taps_form = Taps == 3 ? PackedForm::taps3 : PackedForm::taps2;
template <int Taps>
constexpr PackedForm u_form = Taps == 3 ? PackedForm::u3 : PackedForm::u2;

// Calls one(w, number of the phase) for all phases of the result.
template <int Taps, class S, class One>
void for_each_phase(const Correlation<S>& c, One&& one) {
  const int64_t phases_x = c.phases_x();
  for (int64_t phase = 0; phase < c.phases_y() * phases_x; ++phase) {
    Winograd<S, Taps> w = winograd<S, Taps>(c, phase / phases_x, phase % phases_x);
    one(w, phase);
  }
}

template <int Taps, class S, class Problem>
void correlate_by_winograd(const Problem& problem, const ThreadPool& pool) {
  if constexpr (sizeof(Compute<S>) == sizeof(float)) {
    const Correlation<S> c = correlation<S>(problem);
    if (c.batch == 0) return;
    const auto kept = [&problem](PackedForm form) {
      const PackedHeader* weights = kept_weights(problem, form);
      return weights ? static_cast<const float*>(weights->data()) : nullptr;
    };
    const float *kept_taps = kept(taps_form<Taps>), *kept_u = kept(u_form<Taps>);
    for_each_phase<Taps>(c, [&](Winograd<S, Taps>& w, int64_t phase) {
      w.kept_taps = kept_taps ? kept_taps + phase * w.taps_elements() : nullptr;
      w.kept_u = kept_u ? kept_u + phase * winograd_u_elements(w) : nullptr;
      correlate_by_winograd(w, pool);
    });
  }
}

// Whether tiles are of whole pairs of lines and pixels: 2x2 pooling then is theirs.
inline bool winograd_pools(const Conv2dForward& p) {
  return p.shape.dilation_h * p.shape.dilation_w == 1 &&
         tile_grid(p.shape.batch, unpooled_height(p.shape), unpooled_width(p.shape)).even();
}

// Whether all phases' weights are kept as U; `first` is the first one, which has the most tiles.
template <class S, int Taps>
bool winograd_keeps_u(const Winograd<S, Taps>& first) {
  const int64_t phases = first.c.phases_y() * first.c.phases_x();
  return !first.source.few && phases * winograd_u_elements(first) <= winograd_most_u;
}

template <int Taps, class S, class Problem>
Conv2dPacking winograd_packing(const Problem& p) {
  if constexpr (sizeof(Compute<S>) == sizeof(float)) {
    const Correlation<S> c = correlation<S>(p);
    const Winograd<S, Taps> w = winograd<S, Taps>(c, 0, 0);
    const bool u = winograd_keeps_u(w);
    const int64_t elements = c.phases_y() * c.phases_x() * (u ? winograd_u_elements(w) : w.taps_elements());
    if (w.source.tiles() > 0 && w.source.tiles() <= winograd_most_tiles_to_pack)
      return packing(u ? u_form<Taps> : taps_form<Taps>, elements * static_cast<int64_t>(sizeof(float)));
  }
  return {};
}

template <int Taps, class S, class Problem>
void winograd_pack(const Problem& p, PackedHeader& to, const ThreadPool& pool) {
  if constexpr (sizeof(Compute<S>) == sizeof(float)) {
    float* data = static_cast<float*>(to.data());
    const Correlation<S> c = correlation<S>(p);
    const bool u = winograd_keeps_u(winograd<S, Taps>(c, 0, 0));
    for_each_phase<Taps>(c, [&](const Winograd<S, Taps>& w, int64_t phase) {
      u ? transform_all_weights(w, data + phase * winograd_u_elements(w), pool)
        : gather_all_taps(w, data + phase * w.taps_elements(), pool);
    });
  }
}

}  // namespace
}  // namespace cvfast
