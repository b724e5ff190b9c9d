// Batch normalisation in training for one instruction set; see conv2d.cpp. Exports cvfast::<CVFAST_ISA>::batch_norm and
// nothing else.
#include "../kernel_table.h"
#include "../scratch.h"
#include "parallel.h"
#include "simd.h"

namespace cvfast {
namespace {

constexpr int L = lanes<float>;
// Chains of a sum; the places after which they are added up; the channels that one piece of work takes.
constexpr int64_t chains = 16, chain_places = 1024, channel_block = 128;

// Walks over the places of a sample's channels: pixels, or windows of 2x2 pixels that are pooled. A vector holds channels
// of one place where channels lie side by side, else places of one channel.
template <bool ChannelsLast, bool Windows>
struct Walk {
  const BatchNormProblem& p;
  int64_t sample, first, last;  // channels

  static constexpr int pixels = Windows ? 4 : 1;  // of a place
  static constexpr bool channels_last = ChannelsLast;

  // A vector of places, of which `count` lanes count: where it begins in images of the input's and of the output's size,
  // its channel and, for the first lane, the place in its line.
  struct Place {
    int64_t in, out, channel, place, count;
  };

  int64_t lines() const { return Windows ? p.height / 2 : ceil_div(p.height * p.width, chain_places); }
  int64_t length(int64_t line) const {
    return Windows ? p.width / 2 : min(chain_places, p.height * p.width - line * chain_places);
  }

  template <class Body>
  [[gnu::always_inline]] void over(int64_t line, Body&& body) const {
    const int64_t plane = p.height * p.width, out_plane = Windows ? plane / 4 : plane, count = length(line);
    const int64_t pixel = Windows ? 2 * line * p.width : line * chain_places, step = Windows ? 2 : 1;
    const int64_t out_pixel = Windows ? line * (p.width / 2) : pixel;
    if constexpr (ChannelsLast) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t in = (sample * plane + pixel + step * i) * p.channels;
        const int64_t out = (sample * out_plane + out_pixel + i) * p.channels;
        for (int64_t c = first; c < last; c += L) body(Place{in + c, out + c, c, i, min<int64_t>(L, last - c)});
      }
    } else {
      for (int64_t c = first; c < last; ++c) {
        const int64_t in = (sample * p.channels + c) * plane + pixel, out = (sample * p.channels + c) * out_plane + out_pixel;
        for (int64_t i = 0; i < count; i += L) body(Place{in + step * i, out + i, c, i, min<int64_t>(L, count - i)});
      }
    }
  }

  // What channels have each, table[c], for a place.
  static FloatVector of_channel(const float* table, const Place& at) {
    if constexpr (ChannelsLast) return load_vector(table + at.channel);
    return FloatVector{} + table[at.channel];
  }

  // The place's pixels, in the order of torch's poolings, in an image of the input's size.
  [[gnu::always_inline]] void load(const float* from, const Place& at, FloatVector* to) const {
    from += at.in;
    if constexpr (!Windows) {
      to[0] = load_first(from, at.count);
    } else if constexpr (ChannelsLast) {
      for (int i = 0; i < 4; ++i) to[i] = load_first(from + (i / 2 * p.width + i % 2) * p.channels, at.count);
    } else {
      for (int i = 0; i < 4; i += 2, from += p.width) {
        const FloatVector low = load_first(from, 2 * at.count), high = load_first(from + L, max<int64_t>(0, 2 * at.count - L));
        to[i] = shuffled(low, high, [](int lane) { return 2 * lane; });
        to[i + 1] = shuffled(low, high, [](int lane) { return 2 * lane + 1; });
      }
    }
  }

  [[gnu::always_inline]] void store(const FloatVector* from, float* to, const Place& at) const {
    to += at.in;
    if constexpr (!Windows) {
      store_first(from[0], to, at.count);
    } else if constexpr (ChannelsLast) {
      for (int i = 0; i < 4; ++i) store_first(from[i], to + (i / 2 * p.width + i % 2) * p.channels, at.count);
    } else {
      for (int i = 0; i < 4; i += 2, to += p.width) {
        auto side_by_side = [](int half) { return [half](int lane) { return (half + lane) / 2 + lane % 2 * L; }; };
        store_first(shuffled(from[i], from[i + 1], side_by_side(0)), to, 2 * at.count);
        if (2 * at.count > L) store_first(shuffled(from[i], from[i + 1], side_by_side(L)), to + L, 2 * at.count - L);
      }
    }
  }

 private:
  template <class Lane>
  static FloatVector shuffled(FloatVector a, FloatVector b, Lane lane) {
    decltype(a < b) index;
    for (int i = 0; i < L; ++i) index[i] = lane(i);
    return __builtin_shuffle(a, b, index);
  }
};

// What a vector of places adds to two sums: a, and b * c.
struct Terms {
  FloatVector a, b, c;
};

// Two sums per channel of a block.
template <bool ChannelsLast>
class Sums {
 public:
  template <class Place>
  void add(int64_t first, const Place& at, Terms terms) {
    float* const chain = chain_ + index(at.place % chains, at.channel - first);
    if constexpr (!ChannelsLast)
      if (at.count < L) terms.a = counted(terms.a, at.count), terms.b = counted(terms.b, at.count);
    store_vector(load_vector(chain) + terms.a, chain);
    store_vector(load_vector(chain + size) + terms.b * terms.c, chain + size);
  }

  void end_chains(int64_t channels) {
    for (int sum = 0; sum < 2; ++sum) {
      float* const chain = chain_ + sum * size;
      for (int64_t half = chains / 2; half > 0; half /= 2)
        for (int64_t j = 0; j < half; ++j)
          for (int64_t c = 0; c < channels; ++c) chain[index(j, c)] += chain[index(j + half, c)];
      for (int64_t c = 0; c < channels; ++c) total[sum][c] += chain[index(0, c)];
    }
    __builtin_memset(chain_, 0, sizeof chain_);
  }

  double total[2][channel_block] = {};

 private:
  static constexpr int64_t size = chains * channel_block;
  static int64_t index(int64_t chain, int64_t channel) {
    return ChannelsLast ? chain * channel_block + channel : channel * chains + chain;
  }
  static FloatVector counted(FloatVector v, int64_t count) {
    decltype(v < v) lane;
    for (int i = 0; i < L; ++i) lane[i] = i;
    return lane < static_cast<int>(count) ? v : FloatVector{};
  }
  float chain_[2 * size] = {};
};

// Numbers per channel, in whole vectors.
struct Table {
  float *pivot, *mean, *scale, *bias, *grad_mean, *slope;
  float* direction;  // 1, 0 or -1: whether norm's result rises with x
  double* sums;  // [N][2][C]

  Table(const BatchNormProblem& p) {
    const int64_t padded = round_up(p.channels, chains), sums_bytes = p.batch * 2 * p.channels * sizeof(double);
    char* const all = static_cast<char*>(thread_scratch(ScratchUse::caller, sums_bytes + 7 * padded * sizeof(float)));
    sums = reinterpret_cast<double*>(all);
    float* next = reinterpret_cast<float*>(all + sums_bytes);
    float** const rows[] = {&pivot, &mean, &scale, &bias, &grad_mean, &slope, &direction};
    for (float** row : rows) *row = next, next += padded;
    for (int64_t i = 0; i < 7 * padded; ++i) pivot[i] = 0;
  }

  void known(const BatchNormProblem& p, const float* statistics) {
    for (int64_t c = 0; c < p.channels; ++c) {
      mean[c] = statistics[c];
      scale[c] = statistics[p.channels + c] * (p.weight ? p.weight[c] : 1);
      bias[c] = p.bias ? p.bias[c] : 0;
      direction[c] = static_cast<float>((scale[c] > 0) - (scale[c] < 0));
    }
  }
};

// Calls body(walk) for each sample and block of channels.
template <bool ChannelsLast, bool Windows, class Body>
void for_blocks(const BatchNormProblem& p, const ThreadPool& pool, Body&& body) {
  const int64_t blocks = ceil_div(p.channels, channel_block);
  parallel_for(pool, p.batch * blocks, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit % blocks * channel_block;
      body(Walk<ChannelsLast, Windows>{p, unit / blocks, first, min(first + channel_block, p.channels)});
    }
  });
}

// Two sums per channel of what terms(walk, place) gives; into table.sums, per sample, then its first sample's place.
template <bool ChannelsLast, bool Windows, class Terms>
void sum_up(const BatchNormProblem& p, const Table& table, const ThreadPool& pool, Terms&& terms) {
  for_blocks<ChannelsLast, Windows>(p, pool, [&](const auto& walk) {
    Sums<ChannelsLast> sums;
    int64_t places = 0;
    for (int64_t line = 0; line < walk.lines(); ++line) {
      walk.over(line, [&](const auto& at) {
        sums.add(walk.first, at, terms(walk, at));
      });
      places += walk.length(line);
      if (places >= chain_places || line == walk.lines() - 1) sums.end_chains(walk.last - walk.first), places = 0;
    }
    for (int sum = 0; sum < 2; ++sum)
      for (int64_t c = walk.first; c < walk.last; ++c)
        table.sums[(walk.sample * 2 + sum) * p.channels + c] = sums.total[sum][c - walk.first];
  });
  for (int64_t n = 1; n < p.batch; ++n)
    for (int64_t i = 0; i < 2 * p.channels; ++i) table.sums[i] += table.sums[n * 2 * p.channels + i];
}

// The pixel of a place that gives the maximum of norm's results, which rise or fall with x: the first such one.
template <class W>
[[gnu::always_inline]] inline FloatVector winner(const FloatVector* x, FloatVector direction) {
  FloatVector found = x[0], most = x[0] * direction;
  for (int i = 1; i < W::pixels; ++i) {
    const FloatVector next = x[i] * direction;
    found = next > most ? x[i] : found;
    most = next > most ? next : most;
  }
  return found;
}

// norm(x)
template <class W>
[[gnu::always_inline]] inline FloatVector normalised(const Table& table, const typename W::Place& at, FloatVector x) {
  return (x - W::of_channel(table.mean, at)) * W::of_channel(table.scale, at) + W::of_channel(table.bias, at);
}

template <bool ChannelsLast>
void measure(const BatchNormForward& args, Table& table, const ThreadPool& pool) {
  const BatchNormProblem& p = args.problem;
  const int64_t plane = p.height * p.width;
  for (int64_t c = 0; c < p.channels; ++c) table.pivot[c] = p.input[ChannelsLast ? c : c * plane];
  sum_up<ChannelsLast, false>(p, table, pool, [&](const auto& walk, const auto& at) {
    const FloatVector d = load_first(p.input + at.in, at.count) - walk.of_channel(table.pivot, at);  // small beside the mean where that is large
    return Terms{d, d, d};
  });
  const double count = static_cast<double>(p.batch * plane);
  for (int64_t c = 0; c < p.channels; ++c) {
    const double mean = table.sums[c] / count, squares = table.sums[p.channels + c] - table.sums[c] * mean;
    args.statistics[c] = static_cast<float>(table.pivot[c] + mean);
    args.statistics[p.channels + c] = static_cast<float>(1 / __builtin_sqrt(max(squares, 0.0) / count + args.eps));
    args.statistics[2 * p.channels + c] = static_cast<float>(squares / (count - 1));
  }
}

template <bool ChannelsLast, bool Windows>
void forward(const BatchNormForward& args, const ThreadPool& pool) {
  const BatchNormProblem& p = args.problem;
  Table table(p);
  measure<ChannelsLast>(args, table, pool);
  table.known(p, args.statistics);
  const FloatVector slope = FloatVector{} + p.negative_slope;
  for_blocks<ChannelsLast, Windows>(p, pool, [&](const auto& walk) {
    using W = Walk<ChannelsLast, Windows>;
    for (int64_t line = 0; line < walk.lines(); ++line)
      walk.over(line, [&](const auto& at) {
        FloatVector x[W::pixels];
        walk.load(p.input, at, x);
        FloatVector y = normalised<W>(table, at, winner<W>(x, W::of_channel(table.direction, at)));
        if (p.residual) y += load_first(p.residual + at.in, at.count);
        store_first(y > 0 ? y : slope * y, args.output + at.out, at.count);
      });
  });
}

// What reaches norm's result at a place's winner, and the winner.
struct Arriving {
  FloatVector grad, x;
};

template <class W>
[[gnu::always_inline]] inline Arriving arriving(const BatchNormBackward& args, const Table& table,
                                                const typename W::Place& at, const FloatVector* x) {
  const FloatVector first = winner<W>(x, W::of_channel(table.direction, at));
  const FloatVector y = args.problem.residual ? load_first(args.problem.residual + at.in, at.count)
                                              : normalised<W>(table, at, first);
  const FloatVector grad = load_first(args.grad + at.out, at.count);
  return {y <= 0 ? args.problem.negative_slope * grad : grad, first};  // NaN passes, as in torch
}

template <bool ChannelsLast, bool Windows>
void backward(const BatchNormBackward& args, const ThreadPool& pool) {
  using W = Walk<ChannelsLast, Windows>;
  const BatchNormProblem& p = args.problem;
  Table table(p);
  table.known(p, args.statistics);
  sum_up<ChannelsLast, Windows>(p, table, pool, [&](const W& walk, const auto& at) {
    FloatVector x[W::pixels];
    walk.load(p.input, at, x);
    const Arriving arrived = arriving<W>(args, table, at, x);
    return Terms{arrived.grad, arrived.grad, arrived.x - W::of_channel(table.mean, at)};
  });
  const double count = static_cast<double>(p.batch * p.height * p.width);
  for (int64_t c = 0; c < p.channels; ++c) {
    const double inverse = args.statistics[p.channels + c], dot = table.sums[p.channels + c];
    args.grad_bias[c] = static_cast<float>(table.sums[c]);
    args.grad_weight[c] = static_cast<float>(dot * inverse);
    table.grad_mean[c] = static_cast<float>(table.sums[c] / count);
    table.slope[c] = static_cast<float>(dot / count * inverse * inverse);
  }
  for_blocks<ChannelsLast, Windows>(p, pool, [&](const W& walk) {
    for (int64_t line = 0; line < walk.lines(); ++line)
      walk.over(line, [&](const auto& at) {
        FloatVector x[W::pixels];
        walk.load(p.input, at, x);
        const auto [grad, first] = arriving<W>(args, table, at, x);
        if (args.grad_residual) store_first(grad, args.grad_residual + at.in, at.count);
        const FloatVector mean = W::of_channel(table.mean, at), grad_mean = W::of_channel(table.grad_mean, at);
        const FloatVector slope = W::of_channel(table.slope, at), scale = W::of_channel(table.scale, at);
        FloatVector left = grad;  // of the gradient, for the first pixel that is the winner
        for (int i = 0; i < W::pixels; ++i) {
          FloatVector own = left;
          if constexpr (Windows) {
            own = x[i] == first ? left : FloatVector{};
            left = x[i] == first ? FloatVector{} : left;
          }
          x[i] = (own - grad_mean - (x[i] - mean) * slope) * scale;
        }
        walk.store(x, args.grad_input, at);
      });
  });
}

void run_forward(const BatchNormForward& args, const ThreadPool& pool) {
  const BatchNormProblem& p = args.problem;
  if (p.channels_last)
    p.pooled ? forward<true, true>(args, pool) : forward<true, false>(args, pool);
  else
    p.pooled ? forward<false, true>(args, pool) : forward<false, false>(args, pool);
}

void run_backward(const BatchNormBackward& args, const ThreadPool& pool) {
  const BatchNormProblem& p = args.problem;
  if (p.channels_last)
    p.pooled ? backward<true, true>(args, pool) : backward<true, false>(args, pool);
  else
    p.pooled ? backward<false, true>(args, pool) : backward<false, false>(args, pool);
}

}  // namespace

namespace CVFAST_ISA {
extern const BatchNormKernels batch_norm;
const BatchNormKernels batch_norm = {run_forward, run_backward};
}  // namespace CVFAST_ISA

}  // namespace cvfast
