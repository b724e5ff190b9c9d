// Winograd's products of few tiles. They take their weights from the taps: to write U and to read it again would cost more than
// the products, and U is four times as large in memory. The second half of the transform, down a column of points, goes through
// registers next to the products. So does the first half for the fewest tiles; for more of them its columns are kept in L1, and
// half as many rows of twice as many tiles fill the registers: they share the second half.
//
// The sums have the bits of those made with U.
#pragma once
#include "conv2d_winograd_weights.h"
#include "gemm_indirect.h"

namespace cvfast {
namespace {

// Sums of one vector of output channels: [point, tile, lane], and what becomes of them.
struct TileSums {
  float* data;
  int64_t point_stride, tile_stride;
  Chain chain;

  TileSums at(int64_t point, int64_t tile) const {
    return {data + point * point_stride + tile * tile_stride, point_stride, tile_stride, chain};
  }
};

// Cache lines of taps asked for per channel and column of points: at least what the columns together take.
template <int Taps>
constexpr int few_tiles_ahead_lines = (Taps * Taps * lanes<float> - 1) / (winograd_inputs<Taps> * line_floats) + 1;

// Memory to ask for, from `next` on, with each channel whose number has none of the bits of `mask`.
struct Ahead {
  const float* next;
  int64_t mask;
};

// The sums of `Rows` points of a column, from row `Row` on, for few tiles: `depth` channels more. `column` makes its elements
// of the lines [channel, line, Step vectors]. Of the last point only the first LastTiles tiles. The first rows bring `ahead`
// near.
template <int Taps, int Step, class Column, int Row, int Rows, int Tiles, int LastTiles>
[[gnu::noinline]] void few_tiles_column(const float* lines, Column column, Ahead ahead, int64_t depth, const float* v,
                                        const TileSums& sums) {
  constexpr int points = winograd_inputs<Taps>;
  constexpr bool one_chain = winograd_chain<Taps> == winograd_depth;
  constexpr int64_t row_stride = points * TiledImages<float, points, points>::few_point_stride;
  constexpr auto needs = [](int tile, int y) { return Row + y < points - 1 || tile < LastTiles; };
  FloatVector total[Rows][Tiles] = {};
  const auto each_sum = [&](auto&& body) {
#pragma GCC unroll 6
    for (int y = 0; y < Rows; ++y)
#pragma GCC unroll 8
      for (int t = 0; t < Tiles; ++t)
        if (needs(t, y)) body(total[y][t], sums.data + points * (Row + y) * sums.point_stride + t * sums.tile_stride);
  };
  if (sums.chain == Chain::resume) each_sum([](FloatVector& sum, const float* kept) { sum = load_vector(kept); });
  for (int64_t k = 0; k < depth;) {
    FloatVector sum[Rows][Tiles] = {};
    if constexpr (one_chain) __builtin_memcpy(sum, total, sizeof sum);
    for (const int64_t end = min(k + winograd_chain<Taps>, depth); k < end; ++k, lines += Taps * Step * lanes<float>) {
      if (Row == 0 && (k & ahead.mask) == 0)
#pragma GCC unroll 2
        for (int i = 0; i < few_tiles_ahead_lines<Taps>; ++i, ahead.next += line_floats) __builtin_prefetch(ahead.next, 0, 2);
      FloatVector g[Taps], u[points];
#pragma GCC unroll 3
      for (int y = 0; y < Taps; ++y) g[y] = column(lines + y * Step * lanes<float>);
      transform_kernel(g, u);
#pragma GCC unroll 6
      for (int y = 0; y < Rows; ++y)
#pragma GCC unroll 8
        for (int t = 0; t < Tiles; ++t)
          if (needs(t, y)) sum[y][t] += v[(Row + y) * row_stride + t * winograd_depth + k] * u[Row + y];
    }
#pragma GCC unroll 6
    for (int y = 0; y < Rows; ++y)
#pragma GCC unroll 8
      for (int t = 0; t < Tiles; ++t) total[y][t] = one_chain ? sum[y][t] : total[y][t] + sum[y][t];
  }
  if (sums.chain == Chain::add) each_sum([](FloatVector& sum, const float* before) { sum = load_vector(before) + sum; });
  each_sum([](FloatVector sum, float* to) { store_vector(sum, to); });
}

template <int Taps, int Step, class Column>
using FewTilesColumn = decltype(&few_tiles_column<Taps, Step, Column, 0, 1, 1, 1>);

// For 1 to Tiles tiles, of which at least the first `last` have the last point.
template <int Taps, int Step, class Column, int Row, int Rows, int Tiles>
FewTilesColumn<Taps, Step, Column> few_tiles_column_for(int64_t tiles, int64_t last) {
  if constexpr (Tiles > 1)
    if (tiles < Tiles) return few_tiles_column_for<Taps, Step, Column, Row, Rows, Tiles - 1>(tiles, last);
  if constexpr (Row + Rows == winograd_inputs<Taps>) {
    if (last == 0) return few_tiles_column<Taps, Step, Column, Row, Rows, Tiles, 0>;
    if constexpr (Tiles <= 4 || Tiles == 8)  // for the others it saves less than it costs to compile
      if (2 * last <= Tiles) return few_tiles_column<Taps, Step, Column, Row, Rows, Tiles, Tiles / 2>;
  }
  return few_tiles_column<Taps, Step, Column, Row, Rows, Tiles, Tiles>;
}

// A column of points of all channels, after the first half of the transform: [channel, line].
template <int Taps, class Column>
void keep_column(const float* taps, Column column, int64_t channels, float* kept) {
#pragma GCC unroll 2
  for (int64_t i = 0; i < Taps * channels; ++i, taps += Taps * lanes<float>, kept += lanes<float>)
    store_vector(column(taps), kept);
}

// The products of a block of channels, of which V is [point, tile, winograd_depth], for the tiles from `first` on.
template <int Taps>
struct FewTiles {
  static constexpr int points = winograd_inputs<Taps>;
  // Rows and tiles at once: their sums stay in registers. With kept columns, where the registers suffice, for more tiles.
  static constexpr int rows = many_registers ? points : points / 2, most_tiles = 4;
  static constexpr int kept_rows = points / 2, kept_most_tiles = 8;
  static constexpr bool keeps_columns = winograd_few_tiles<Taps> > winograd_fewest_tiles;
  // Channels whose taps have room in L1 together with the sums.
  static constexpr int64_t depth = 512 / lanes<float>;
  static constexpr int64_t sums_point_stride = winograd_fewest_tiles * lanes<float>;
  static constexpr int64_t scratch_elements =
      max<int64_t>(points * points * sums_point_stride, winograd_depth * Taps * lanes<float>);

  const TileGrid& grid;
  int64_t first, tiles, channels;
  const float* v;
  float* scratch;  // for sums or a kept column

  // Those of the column x for `count` channels from `channel` on, for all tiles that need it.
  template <int Step, int Rows, int Tiles, class Column>
  [[gnu::noinline]] void multiply(int64_t x, const float* lines, Column column, const float* ahead, int64_t channel,
                                  int64_t count, const TileSums& sums) const {
    const TileRun run = needing(0, x, first, tiles);
    const int64_t groups = ceil_div(run.end - run.begin, Tiles);
    for (int64_t group = 0, tile = run.begin, end; group < groups; ++group, tile = end) {
      end = tile + ceil_div(run.end - tile, groups - group);
      const int64_t last = needing(points - 1, x, first + tile, end - tile).end;
      const float* group_v = v + x * TiledImages<float, points, points>::few_point_stride + tile * winograd_depth + channel;
      const Ahead group_ahead = {ahead + group * count / groups * few_tiles_ahead_lines<Taps> * line_floats, groups - 1};
      const auto call = [&](FewTilesColumn<Taps, Step, Column> function) {
        function(lines, column, group_ahead, count, group_v, sums.at(x, tile));
      };
      call(few_tiles_column_for<Taps, Step, Column, 0, Rows, Tiles>(end - tile, last));
      if constexpr (Rows < points)
        call(few_tiles_column_for<Taps, Step, Column, Rows, points - Rows, Tiles>(end - tile, last));
    }
  }

  // Those of one vector of output channels.
  void products_with_kept_columns(const float* taps, const TileSums& m) const {
    const float* behind = taps + channels * Taps * Taps * lanes<float>;
    for_each_column<Taps>([&](int64_t x, auto column) {
      keep_column<Taps>(taps, column, channels, scratch);
      const float* ahead = behind + x * channels * few_tiles_ahead_lines<Taps> * line_floats;
      multiply<1, kept_rows, kept_most_tiles>(x, scratch, OuterColumn{0}, ahead, 0, channels, m);
    });
  }
  void products_of_taps(const float* taps, const TileSums& m) const {
    const bool straight = m.chain == Chain::start;  // no other sums in the way
    TileSums sums = straight ? m : TileSums{scratch, sums_point_stride, lanes<float>, Chain::start};
    for (int64_t channel = 0, count; channel < channels; channel += count, sums.chain = Chain::resume) {
      count = min(channels - channel, depth);
      const float *here = taps + channel * Taps * Taps * lanes<float>, *behind = here + count * Taps * Taps * lanes<float>;
      for_each_column<Taps>([&](int64_t x, auto column) {
        const float* ahead = behind + x * count * few_tiles_ahead_lines<Taps> * line_floats;
        multiply<Taps, rows, most_tiles>(x, here, column, ahead, channel, count, sums);
      });
    }
    if (!straight) add_sums(sums, m);
  }
  void add_sums(const TileSums& sums, const TileSums& m) const {
    for (int64_t point = 0; point < points * points; ++point) {
      const TileRun run = needing(point / points, point % points, first, tiles);
      for (int64_t t = run.begin; t < run.end; ++t) {
        float* to = m.at(point, t).data;
        store_vector(load_vector(to) + load_vector(sums.at(point, t).data), to);
      }
    }
  }

  TileRun needing(int64_t y, int64_t x, int64_t from, int64_t count) const {
    return grid.needing(y == points - 1, x == points - 1, from, count);
  }

  // Into M, with `add` to what is there. What lies behind `taps` is brought near, as it is needed next; the vectors of output
  // channels are taps_stride apart.
  [[gnu::noinline]] void products(const float* taps, int64_t taps_stride, bool add, float* m, int64_t m_stride) const {
    if (!add)
      for (int64_t point = 0; point < points * points; ++point)
        zero_all_but(needing(point / points, point % points, first, tiles), tiles, m + point * m_stride);
    for (int64_t out = 0; out < winograd_width; out += lanes<float>, taps += taps_stride) {
      const TileSums sums = {m + out, m_stride, winograd_width, add ? Chain::add : Chain::start};
      if constexpr (keeps_columns)
        if (tiles > winograd_fewest_tiles) {
          products_with_kept_columns(taps, sums);
          continue;
        }
      products_of_taps(taps, sums);
    }
  }
};

}  // namespace
}  // namespace cvfast
