// Gradient to the weights by Winograd's F(4x4, 3x3), for 3x3 kernels with stride 1, and by F(4x4, 2x2), for
// kernels of 3 or 4 taps with stride 2: each phase of the input has taps of its own.
//
// The output is cut into tiles of 4x4 and fewer pixels (tile_grid), the tiles into chunks. A chunk takes three steps:
//   1. input [6x6 patch, channel] -> V and grad_output [4x4 tile, out] -> W, both [block of channels, point, tile, channel];
//   2. for each block of output channels, panel of a phase's input channels and each of the 36 or 25 points:
//      M = W[point]^T * V[point], a sum over the chunk's tiles;
//   3. M -> sums [out, tap, channel], without the scale factors.
// The chunks are cut into slices, so that few channels give work to all threads, too; each slice adds up its chunks in order,
// then the slices are added in order. All cuts depend on the shape alone, and so do an element's bits.
// Numbers that are not finite would spread over the taps: where one shows, the implicit GEMM computes everything again.
#pragma once
#include "conv2d_winograd.h"

namespace cvfast {
namespace {

constexpr int64_t grad_depth = 64;   // tiles of a chain of multiply-adds
constexpr int64_t grad_rows = 64;    // most output channels of a block
constexpr int64_t grad_panels = 2;   // panels of input channels that share a block's rows in the L1 cache

template <class S, int Taps>
struct WinogradWeightGrad {
  static constexpr int points = winograd_inputs<Taps>;  // on each axis

  TiledImages<S, points, points> input;   // V; its blocks are panels
  TiledImages<S, 4, points> grad_output;  // W
  TapRun taps_y[winograd_most_phases], taps_x[winograd_most_phases];  // of each phase of the input
  S* result;
  int64_t out_stride, in_stride, y_stride, x_stride;  // of the result

  int64_t chunk_tiles, chunks, slices;

  // Sums [slice, group, out, tap of a phase, phase and channel], channels padded to whole panels.
  int64_t tap_stride() const { return input.blocks * winograd_width; }
  int64_t sums_elements() const { return grad_output.groups * grad_output.channels * Taps * Taps * tap_stride(); }
};

template <class S, int Taps>
WinogradWeightGrad<S, Taps> winograd_weight_grad(const Conv2dWeightGrad& p) {
  const Conv2dShape& s = p.shape;
  const int64_t *g = p.grad_output.stride, *r = p.grad_weight.stride;
  const Winograd<S, Taps> f = winograd<S, Taps>(correlation<S>(Conv2dForward{s, p.dtype, p.input, {}, nullptr, {}}), 0, 0);
  WinogradWeightGrad<S, Taps> w;
  w.input = f.source;
  w.input.few = false;  // whatever the tiles, V lies as the loops here read it
  w.input.block_width = winograd_width, w.input.channel_blocks = ceil_div(w.input.channels, winograd_width);
  w.input.blocks = w.input.phases * w.input.channel_blocks;
  for (int i = 0; i < winograd_most_phases; ++i) w.taps_y[i] = f.taps_y[i], w.taps_x[i] = f.taps_x[i];
  w.grad_output = {{{static_cast<const S*>(p.grad_output.data), {g[0], g[1], g[2], g[3]}, s.out_height, s.out_width, 0, 0}},
                   1, s.batch, w.input.grid, s.groups, s.out_channels / s.groups, 0, 0, 0, s.dilation_h, s.dilation_w};
  w.grad_output.cut_channels(grad_rows);
  w.result = static_cast<S*>(p.grad_weight.data);
  w.out_stride = r[0], w.in_stride = r[1], w.y_stride = r[2], w.x_stride = r[3];

  // V and W of a chunk: about 1 MiB.
  constexpr int64_t chunk_elements = int64_t{1} << 18, most_slices = 16, most_sums = int64_t{1} << 20;
  const int64_t tiles = w.input.tiles(), channels = w.input.phases * w.input.channels + w.grad_output.channels;
  w.chunk_tiles = grad_depth * max<int64_t>(1, chunk_elements / (s.groups * w.points * w.points * channels * grad_depth));
  w.chunks = ceil_div(tiles, w.chunk_tiles);
  w.chunk_tiles = ceil_div(tiles, w.chunks);
  const int64_t sums = s.out_channels * Taps * Taps * w.input.phases * w.input.channels;
  w.slices = 1;
  while (2 * w.slices <= min(most_slices, w.chunks) && 2 * w.slices * sums <= most_sums) w.slices *= 2;
  return w;
}

// Stores the taps of one output and as many input channels of a phase as a vector has lanes, of which `channels` exist, after
// their scale factors. (They come last: a multiplication before the sum over chunks might be fused with it or not.) Where
// something isn't finite, `special` isn't 0 afterwards.
template <class S, int Taps>
void store_taps(const WinogradWeightGrad<S, Taps>& w, int64_t phase, FloatVector (&taps)[Taps * Taps], int64_t channels,
                S* to, FloatVector& special) {
  const TapRun run_y = w.taps_y[phase], run_x = w.taps_x[phase];
  const auto each_tap = [&](auto&& body) {
    for (int64_t y = 0; y < run_y.count; ++y)
      for (int64_t x = 0; x < run_x.count; ++x)
        body(taps[Taps * y + x],
             (run_y.first + y * run_y.step) * w.y_stride + (run_x.first + x * run_x.step) * w.x_stride);
  };
  FloatVector sum = {};
  for (int tap = 0; tap < Taps * Taps; ++tap) taps[tap] *= kernel_scale<Taps>[tap / Taps] * kernel_scale<Taps>[tap % Taps];
  each_tap([&](FloatVector tap, int64_t) { sum += tap; });
  sum -= sum;
  for (int64_t i = channels; i < lanes<float>; ++i) sum[i] = 0;
  special += sum;
  if (w.in_stride == 1) {
    each_tap([&](FloatVector tap, int64_t offset) { store_first(tap, to + offset, channels); });
    return;
  }
  if constexpr (Taps == 3)
    if (w.x_stride == 1 && w.y_stride == 3 && channels >= lanes<float>) {
      constexpr int places[] = {0, 4, 5};  // of four taps, three times: the last ones overlap
      for (int first : places) {
        FloatVector columns[4] = {taps[first], taps[first + 1], taps[first + 2], taps[first + 3]};
        store_columns(columns, to + first, w.in_stride);
      }
      return;
    }
  each_tap([&](FloatVector tap, int64_t offset) {
    for (int64_t i = 0; i < min<int64_t>(channels, lanes<float>); ++i)
      from_compute(static_cast<float>(tap[i]), to + i * w.in_stride + offset);
  });
}

// G^T m G, without scale factors, for one output and as many input channels as a vector has lanes.
template <int Taps>
void transform_sums(const float* m, int64_t point_stride, FloatVector (&taps)[Taps * Taps]) {
  constexpr int points = winograd_inputs<Taps>;
  FloatVector rows[points][Taps];
#pragma GCC unroll 1
  for (int y = 0; y < points; ++y, m += points * point_stride) {
    FloatVector line[points];
#pragma GCC unroll 6
    for (int x = 0; x < points; ++x) line[x] = load_vector(m + x * point_stride);
    transform_sums(line, rows[y]);
  }
#pragma GCC unroll 3
  for (int s = 0; s < Taps; ++s) {
    FloatVector column[points], tap[Taps];
#pragma GCC unroll 6
    for (int y = 0; y < points; ++y) column[y] = rows[y][s];
    transform_sums(column, tap);
#pragma GCC unroll 3
    for (int r = 0; r < Taps; ++r) taps[Taps * r + s] = tap[r];
  }
}

// Places in the result and the sums.
template <class S, int Taps>
S* result_at(const WinogradWeightGrad<S, Taps>& w, int64_t group, int64_t out, int64_t channel) {
  return w.result + (group * w.grad_output.channels + out) * w.out_stride + channel * w.in_stride;
}
template <class S, int Taps>
int64_t sum_at(const WinogradWeightGrad<S, Taps>& w, int64_t group, int64_t out, int64_t phase, int64_t channel) {
  return (group * w.grad_output.channels + out) * Taps * Taps * w.tap_stride() +
         phase * w.input.channel_blocks * winograd_width + channel;
}

// m [rows, width] (+)= v [rows, depth] * u [depth, width], rows cut evenly into tiles of registers.
inline void sums_of_point(int64_t rows, int64_t depth, Matrix<const float> v, const float* u, float* m, bool add) {
  for (int64_t row = 0; row < rows;) {
    const int64_t count = ceil_div(rows - row, ceil_div(rows - row, tile_rows));
    tile_product_rows<float>(count, Matrix<const float>{v.data + row * v.row_stride, v.row_stride, v.col_stride}, u,
                             winograd_width, depth, m + row * winograd_width, winograd_width, add);
    row += count;
  }
}

// Adds up the tiles of one chunk for a block of output channels and the panels [panel, end), at most grad_panels: into `sums`
// (`add` to what is there), or into the result if there are none. The chunk are the `tiles` tiles from `first` on.
template <class S, int Taps>
void sum_chunk(const WinogradWeightGrad<S, Taps>& w, int64_t group, int64_t block, int64_t panel, int64_t end, int64_t first,
               int64_t tiles, const float* v, const float* grads, float* sums, bool add, FloatVector& special) {
  using Forward = Winograd<S, Taps>;
  constexpr int points = winograd_inputs<Taps>;
  const auto& input = w.input;
  const int64_t outs = w.grad_output.block_channels(block), width = w.grad_output.block_width;
  const int64_t point_stride = outs * winograd_width + line_floats, panel_stride = points * points * point_stride;
  float* m = scratch<float>(ScratchUse::worker, grad_panels * panel_stride);
  const float* block_grads = grads + (group * w.grad_output.blocks + block) * w.grad_output.block_stride(tiles);
  const float* panel_v = v + group * input.blocks * input.block_stride(tiles);
  // Points that the phase's taps do not need stay 0. A short tile adds nothing to the last ones.
  const auto used = [&](int64_t p, int point) {
    const int64_t phase = p / input.channel_blocks;
    return point / points < Forward::used_points(w.taps_y[phase]) && point % points < Forward::used_points(w.taps_x[phase]);
  };
  for (int point = 0; point < points * points; ++point) {
    const TileRun run = input.needing(point / points, point % points, first, tiles);
    const auto m_of = [&](int64_t p) { return m + (p - panel) * panel_stride + point * point_stride; };
    for (int64_t p = panel; p < end; ++p)
      if (!used(p, point) || run.begin == run.end)
        zero_matrix(Matrix<float>{m_of(p), winograd_width, 1}, outs, winograd_width);
    for (int64_t tile = run.begin; tile < run.end; tile += grad_depth) {
      const float* a = block_grads + point * w.grad_output.point_stride(tiles) + tile * width;
      for (int64_t p = panel; p < end; ++p)
        if (used(p, point))
          sums_of_point(outs, min(run.end - tile, grad_depth), Matrix<const float>{a, 1, width},
                        panel_v + p * input.block_stride(tiles) + point * input.point_stride(tiles) + tile * winograd_width,
                        m_of(p), tile > run.begin);
    }
  }
  for (int64_t i = 0; i < outs; ++i)
    for (int64_t p = panel; p < end; ++p)
      for (int64_t lane = 0; lane < winograd_width; lane += lanes<float>) {
        const int64_t out = block * width + i, phase = p / input.channel_blocks;
        const int64_t channel = p % input.channel_blocks * winograd_width + lane;
        FloatVector taps[Taps * Taps];
        transform_sums<Taps>(m + (p - panel) * panel_stride + i * winograd_width + lane, point_stride, taps);
        if (sums) {
          float* to = sums + sum_at(w, group, out, phase, channel);
          for (int tap = 0; tap < Taps * Taps; ++tap, to += w.tap_stride())
            store_vector(add ? load_vector(to) + taps[tap] : taps[tap], to);
        } else if (channel < input.channels) {
          store_taps(w, phase, taps, input.channels - channel, result_at(w, group, out, channel), special);
        }
      }
}

// Adds up the slices' sums of one output channel into the result.
template <class S, int Taps>
void sum_slices(const WinogradWeightGrad<S, Taps>& w, const float* sums, int64_t group, int64_t out, FloatVector& special) {
  for (int64_t phase = 0; phase < w.input.phases; ++phase)
    for (int64_t channel = 0; channel < w.input.channels; channel += lanes<float>) {
      FloatVector taps[Taps * Taps];
      for (int tap = 0; tap < Taps * Taps; ++tap) {
        const float* from = sums + sum_at(w, group, out, phase, channel) + tap * w.tap_stride();
        taps[tap] = load_vector(from);
        for (int64_t slice = 1; slice < w.slices; ++slice) taps[tap] += load_vector(from + slice * w.sums_elements());
      }
      store_taps(w, phase, taps, w.input.channels - channel, result_at(w, group, out, channel), special);
    }
}

// True if the whole result is finite.
template <class S, int Taps>
bool weight_grad_by_winograd(const WinogradWeightGrad<S, Taps>& w, const ThreadPool& pool) {
  const auto& input = w.input;
  const auto& grad_output = w.grad_output;
  // Each thread has slices of its own where they share evenly; else all threads work on one slice together.
  const bool slice_per_thread = w.slices % pool.threads == 0 || w.slices >= 4 * pool.threads;
  const int64_t slots = slice_per_thread ? pool.threads : 1;
  const int64_t v_elements = input.elements(w.chunk_tiles);
  const int64_t slot_elements = round_up(v_elements + grad_output.elements(w.chunk_tiles), line_floats);
  const bool one_chunk = w.chunks == 1;
  float* transformed =
      scratch<float>(ScratchUse::caller, slots * slot_elements + (one_chunk ? 0 : w.slices * w.sums_elements()));
  float* sums = one_chunk ? nullptr : transformed + slots * slot_elements;
  bool finite = true;
  const auto check = [&](FloatVector special) {
    for (int i = 0; i < lanes<float>; ++i)
      if (special[i] != 0) __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
  };

  const int64_t blocks = grad_output.blocks, pieces = ceil_div(input.blocks, grad_panels);
  const auto run_slice = [&](int64_t slice, float* v, const ThreadPool& threads) {
    const int64_t first_chunk = slice * w.chunks / w.slices, last_chunk = (slice + 1) * w.chunks / w.slices;
    float *grads = v + v_elements, *slice_sums = one_chunk ? nullptr : sums + slice * w.sums_elements();
    for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
      const int64_t first = chunk * w.chunk_tiles, tiles = min(input.tiles() - first, w.chunk_tiles);
      transform_patches(input, first, tiles, v, threads);
      transform_patches(grad_output, first, tiles, grads, threads);
      parallel_for(threads, input.groups * blocks * pieces, [&](int64_t begin, int64_t end) {
        FloatVector special = {};
        for (int64_t i = begin; i < end; ++i) {
          const int64_t panel = i % pieces * grad_panels, block = i / pieces % blocks, group = i / pieces / blocks;
          sum_chunk(w, group, block, panel, min(panel + grad_panels, input.blocks), first, tiles, v, grads, slice_sums,
                    chunk > first_chunk, special);
        }
        check(special);
      });
    }
  };
  if (slice_per_thread) {
    parallel_for(pool, slots, [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot)
        for (int64_t slice = slot * w.slices / slots; slice < (slot + 1) * w.slices / slots; ++slice)
          run_slice(slice, transformed + slot * slot_elements, calling_thread());
    });
  } else {
    for (int64_t slice = 0; slice < w.slices; ++slice) run_slice(slice, transformed, pool);
  }
  if (!one_chunk)
    parallel_for(pool, input.groups * grad_output.channels, [&](int64_t begin, int64_t end) {
      FloatVector special = {};
      for (int64_t i = begin; i < end; ++i) sum_slices(w, sums, i / grad_output.channels, i % grad_output.channels, special);
      check(special);
    });
  return finite;
}

inline bool winograd_applies(const Conv2dWeightGrad& p) {
  return winograd_applies(p.shape, p.dtype, p.shape.out_height, p.shape.out_width);
}
inline bool winograd_on_phases_applies(const Conv2dWeightGrad& p) {
  constexpr int64_t least_tiles = 16;  // measured
  const Conv2dShape& s = p.shape;
  return winograd_on_phases_saves(s, p.dtype, s.out_height, s.out_width) &&
         s.batch * winograd_tiles(s.out_height, s.out_width) >= least_tiles;
}

template <int Taps, class S>
void weight_grad_by_winograd(const Conv2dWeightGrad& problem, const ThreadPool& pool) {
  if constexpr (sizeof(Compute<S>) == sizeof(float)) {
    if (problem.shape.batch == 0 || !weight_grad_by_winograd(winograd_weight_grad<S, Taps>(problem), pool))
      weight_grad_by_gemm<S>(problem, pool);
  }
}

}  // namespace
}  // namespace cvfast
