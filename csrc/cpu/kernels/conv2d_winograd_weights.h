// The weights of a convolution, transformed for Winograd's algorithms: U [group, panel, block, point, channel, out].
#pragma once
#include "conv2d_winograd_problem.h"
#include "transpose.h"

namespace cvfast {
namespace {

// The taps of one phase: one of both runs each.
struct PhaseTaps {
  TapRun y, x;
};

// Reads the taps of `count` <= 4 input channels for as many output channels as a vector has lanes. `weight` is the place of
// the kernel's tap (0, 0). Those that the phase lacks are left alone.
template <class S, int Taps>
void load_weights(const Correlation<S>& c, const S* weight, PhaseTaps taps, int64_t count,
                  FloatVector (&loaded)[4][Taps * Taps]) {
  const int64_t y_stride = c.weight_y_stride, x_stride = c.weight_x_stride, kernel_width = c.shape.kernel_width;
  const int64_t kernel_size = c.shape.kernel_height * kernel_width;
  const auto each_tap = [&](auto&& body) {
    for (int64_t y = 0; y < taps.y.count; ++y)
      for (int64_t x = 0; x < taps.x.count; ++x)
        body(Taps * y + x, (taps.y.first + y * taps.y.step) * y_stride + (taps.x.first + x * taps.x.step) * x_stride);
  };
  if (c.weight_out_stride == 1) {
    // For the call after the next, into L2: often channels are a power of 2 apart, then few of the lines fit into L1.
    constexpr int64_t channels_ahead = 8;
    each_tap([&](int64_t tap, int64_t offset) {
      for (int64_t i = 0; i < count; ++i) {
        const S* from = weight + i * c.weight_in_stride + offset;
        __builtin_prefetch(from + channels_ahead * c.weight_in_stride, 0, 2);
        loaded[i][tap] = load_vector(from);
      }
    });
  } else if (c.weight_in_stride == 1 && count == 4) {
    each_tap([&](int64_t tap, int64_t offset) {
      FloatVector column[4];
      load_columns(weight + offset, c.weight_out_stride, column);
      for (int i = 0; i < 4; ++i) loaded[i][tap] = column[i];
    });
  } else if (x_stride == 1 && y_stride == kernel_width && kernel_size >= 4) {
    // Four neighbours at a time, all of the kernel's.
    for (int64_t i = 0; i < count; ++i)
      for (int64_t y = 0; y < taps.y.count; ++y) {
        const int64_t line = (taps.y.first + y * taps.y.step) * kernel_width;
        const int64_t from = min(line + min(taps.x.first, taps.x.first + (taps.x.count - 1) * taps.x.step), kernel_size - 4);
        FloatVector column[4];
        for (int lane = 0; lane < lanes<float>; ++lane)
          __builtin_prefetch(weight + (i + 4) * c.weight_in_stride + from + lane * c.weight_out_stride);
        load_columns(weight + i * c.weight_in_stride + from, c.weight_out_stride, column);
        for (int64_t x = 0; x < taps.x.count; ++x)
          loaded[i][Taps * y + x] = column[line + taps.x.first + x * taps.x.step - from];
      }
  } else {
    each_tap([&](int64_t tap, int64_t offset) {
      for (int64_t i = 0; i < count; ++i) {
        float element[lanes<float>];
        copy_strided(weight + i * c.weight_in_stride + offset, c.weight_out_stride, element, 1, lanes<float>);
        loaded[i][tap] = load_vector(element);
      }
    });
  }
}

// The same where only the first `outs` output channels exist; the others are 0. Not inlined, as transform_part_of_patch().
template <class S, int Taps>
[[gnu::noinline]] void load_part_of_weights(const Correlation<S>& c, const S* weight, PhaseTaps taps, int64_t count,
                                            int64_t outs, FloatVector (&loaded)[4][Taps * Taps]) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t y = 0; y < taps.y.count; ++y)
      for (int64_t x = 0; x < taps.x.count; ++x) {
        float element[lanes<float>] = {};
        copy_strided(weight + i * c.weight_in_stride + (taps.y.first + y * taps.y.step) * c.weight_y_stride +
                         (taps.x.first + x * taps.x.step) * c.weight_x_stride,
                     c.weight_out_stride, element, 1, outs);
        loaded[i][Taps * y + x] = load_vector(element);
      }
}

// G g G^T for one input channel and as many output channels as a vector has lanes.
template <int Taps>
[[gnu::always_inline]] inline void transform_weights(const FloatVector (&taps)[Taps * Taps], float* u, int64_t point_stride) {
  constexpr int points = winograd_inputs<Taps>;
  FloatVector rows[Taps][points];
#pragma GCC unroll 3
  for (int y = 0; y < Taps; ++y) {
    FloatVector line[Taps];
#pragma GCC unroll 3
    for (int x = 0; x < Taps; ++x) line[x] = taps[Taps * y + x];
    transform_kernel(line, rows[y]);
  }
  const auto transform_column = [&](int x) {
    FloatVector column[Taps], point[points];
#pragma GCC unroll 3
    for (int y = 0; y < Taps; ++y) column[y] = rows[y][x];
    transform_kernel(column, point);
#pragma GCC unroll 6
    for (int y = 0; y < points; ++y) store_vector(point[y], u + (points * y + x) * point_stride);
  };
  if constexpr (Taps == 2 || many_registers) {  // all rows fit into registers
#pragma GCC unroll 6
    for (int x = 0; x < points; ++x) transform_column(x);
  } else {
#pragma GCC unroll 1
    for (int x = 0; x < points; ++x) transform_column(x);
  }
}

// The weights of as many input as output channels, a vector of output channels each: of input channel i and tap t (of the
// kernel) at i * channel_step + t * tap_step. Whole lines of memory are read once and transposed as squares.
template <class S, int Taps>
struct WeightSquares {
  static constexpr int64_t L = lanes<float>, kernel_size = Taps * Taps;
  int64_t channel_step, tap_step;  // 0, 0: the layout isn't one of the two below
  FloatVector vector[kernel_size * L];

  explicit WeightSquares(const Correlation<S>& c) : channel_step(0), tap_step(0) {
    if (c.shape.kernel_height != Taps || c.shape.kernel_width != Taps) return;
    if (c.weight_in_stride == 1)
      channel_step = 1, tap_step = L;
    else if (c.weight_in_stride == kernel_size && c.weight_y_stride == Taps && c.weight_x_stride == 1)
      channel_step = kernel_size, tap_step = 1;
  }
  bool able() const { return tap_step != 0; }

  void load(const Correlation<S>& c, const S* weight) {
    for (int64_t square = 0; square < kernel_size; ++square) {
      const int64_t y = square / Taps, x = square % Taps;
      load_square(weight + (tap_step == 1 ? square * L : y * c.weight_y_stride + x * c.weight_x_stride), c.weight_out_stride,
                  vector + square * L);
    }
  }
  void taps(int64_t channel, PhaseTaps phase, FloatVector (&to)[Taps * Taps]) const {
    const FloatVector* from = vector + channel * channel_step;
    for (int64_t y = 0; y < Taps; ++y)
      for (int64_t x = 0; x < Taps; ++x)
        to[Taps * y + x] =
            from[(Taps * (phase.y.first + y * phase.y.step) + phase.x.first + x * phase.x.step) * tap_step];
  }

 private:
  static void load_square(const S* from, int64_t stride, FloatVector* to) {
    FloatVector square[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) square[i] = load_vector(from + i * stride);
    transpose_square<float>(square);
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) to[i] = square[i];
  }
};

// Calls use(taps, channel, out) for each input channel of one panel and block and each vector of output channels.
template <class S, int Taps, class Use>
void for_each_weight(const Winograd<S, Taps>& w, int64_t group, int64_t panel, int64_t block, Use&& use) {
  const Correlation<S>& c = w.c;
  const int64_t first = panel * winograd_width, outs = min(c.out_channels - first, winograd_width);
  const int64_t channels = w.source.block_channels(block), phase = block / w.source.channel_blocks;
  const PhaseTaps taps = {w.taps_y[phase], w.taps_x[phase]};
  const S* weight = c.weight + group * c.weight_group_stride + first * c.weight_out_stride +
                    w.source.first_channel(block) * c.weight_in_stride;
  FloatVector loaded[4][Taps * Taps] = {};
  int64_t channel = 0;
  if (WeightSquares<S, Taps> squares(c); squares.able() && outs == winograd_width)
    for (; channel + lanes<float> <= channels; channel += lanes<float>)
      for (int64_t out = 0; out < winograd_width; out += lanes<float>) {
        squares.load(c, weight + channel * c.weight_in_stride + out * c.weight_out_stride);
        for (int64_t i = 0; i < lanes<float>; ++i) squares.taps(i, taps, loaded[0]), use(loaded[0], channel + i, out);
      }
  for (; channel < channels; channel += 4)
    for (int64_t out = 0; out < winograd_width; out += lanes<float>) {
      const int64_t count = min<int64_t>(channels - channel, 4);
      const S* from = weight + channel * c.weight_in_stride + out * c.weight_out_stride;
      if (out + lanes<float> <= outs)
        load_weights<S, Taps>(c, from, taps, count, loaded);
      else
        load_part_of_weights<S, Taps>(c, from, taps, count, max<int64_t>(outs - out, 0), loaded);
      for (int64_t i = 0; i < count; ++i) use(loaded[i], channel + i, out);
    }
}

// The taps of one panel and one block.
template <class S, int Taps>
void gather_taps(const Winograd<S, Taps>& w, int64_t group, int64_t panel, int64_t block, float* to) {
  for_each_weight(w, group, panel, block, [&](const FloatVector (&g)[Taps * Taps], int64_t channel, int64_t out) {
    float* vectors = to + out / lanes<float> * w.taps_vector_stride() + channel * Taps * Taps * lanes<float>;
    for (int tap = 0; tap < Taps * Taps; ++tap) store_vector(g[tap], vectors + tap * lanes<float>);
  });
}

template <int Taps>
void load_taps(const float* from, FloatVector (&g)[Taps * Taps]) {
#pragma GCC unroll 9
  for (int tap = 0; tap < Taps * Taps; ++tap) g[tap] = load_vector(from + tap * lanes<float>);
}

// U for one panel and one block.
template <class S, int Taps>
void transform_weights(const Winograd<S, Taps>& w, int64_t group, int64_t panel, int64_t block, float* u) {
  const auto transform = [&](const FloatVector (&g)[Taps * Taps], int64_t channel, int64_t out) {
    transform_weights<Taps>(g, u + channel * winograd_width + out, w.u_point_stride());
  };
  if (!w.kept_taps) return for_each_weight(w, group, panel, block, transform);
  constexpr int64_t channels_ahead = 16;
  for (int64_t out = 0; out < winograd_width; out += lanes<float>) {
    const float* taps = w.kept_taps_of(group, panel, block) + out / lanes<float> * w.taps_vector_stride();
    for (int64_t channel = 0; channel < w.source.block_channels(block); ++channel, taps += Taps * Taps * lanes<float>) {
      FloatVector g[Taps * Taps];
      for (int tap = 0; tap < Taps * Taps; ++tap)
        __builtin_prefetch(taps + (channels_ahead * Taps * Taps + tap) * lanes<float>);
      load_taps<Taps>(taps, g);
      transform(g, channel, out);
    }
  }
}

// Calls one(group, panel, block, place of the three together) for all of them.
template <class S, int Taps, class One>
void for_each_block(const Winograd<S, Taps>& w, const ThreadPool& pool, One&& one) {
  const int64_t blocks = w.source.blocks;
  parallel_for(pool, w.c.groups * w.panels * blocks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) one(i / blocks / w.panels, i / blocks % w.panels, i % blocks, i);
  });
}

// Elements of the weights transformed once for all chunks.
template <class S, int Taps>
int64_t winograd_u_elements(const Winograd<S, Taps>& w) { return w.c.groups * w.panels * w.u_panel_stride(); }

template <class S, int Taps>
void transform_all_weights(const Winograd<S, Taps>& w, float* u, const ThreadPool& pool) {
  for_each_block(w, pool, [&](int64_t group, int64_t panel, int64_t block, int64_t place) {
    transform_weights(w, group, panel, block, u + place * w.u_block_stride());
  });
}

template <class S, int Taps>
void gather_all_taps(const Winograd<S, Taps>& w, float* taps, const ThreadPool& pool) {
  for_each_block(w, pool, [&](int64_t group, int64_t panel, int64_t block, int64_t place) {
    gather_taps(w, group, panel, block, taps + place * w.taps_block_stride());
  });
}

}  // namespace
}  // namespace cvfast
