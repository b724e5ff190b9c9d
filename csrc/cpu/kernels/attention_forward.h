// Attention forward: online softmax over blocks of keys.
#pragma once
#include "attention_block.h"

namespace cvfast {
namespace {

constexpr int64_t forward_queries = 256, forward_keys = 256;  // of a block

template <class T>
struct ForwardArrays {
  int64_t queries, keys, key_stride, value_stride;
  int64_t *index, *nonfinite;                   // [keys]
  T *key, *value;                               // [keys][key_stride], [keys][value_stride]
  T *query, *sums;                              // panels [D][panel_queries]; [queries][value_stride]
  T *maximum, *denominator;                     // [queries]
  T *scores;                                    // [keys][panel_queries]; before: [panel_queries][key_stride]

  ForwardArrays(Arena& arena, const AttentionShape& shape)
      : queries(query_block<T>(shape.queries, forward_queries)),
        key_stride(padded_row<T>(shape.size)),
        value_stride(padded_row<T>(shape.value_size)) {
    keys = key_block<T>(key_stride + value_stride, forward_keys);
    index = arena.take<int64_t>(keys);
    nonfinite = arena.take<int64_t>(keys);
    key = arena.take<T>(keys * key_stride);
    value = arena.take<T>(keys * value_stride);
    query = arena.take<T>(queries * shape.size);
    sums = arena.take<T>(queries * value_stride);
    maximum = arena.take<T>(queries);
    denominator = arena.take<T>(queries);
    scores = arena.take<T>(max(keys, key_stride) * panel_queries<T>);
    if (value && shape.value_size % tile_cols<T> != 0)  // read with the rest of a tile, then ignored
      zero_matrix(Matrix<T>{value, value_stride, 1}, keys, value_stride);
  }
};

// scores[k, i] for k in [first, last) become weights 2^(score - maximum); the queries' running maximum and sum of weights
// are brought up to date. rescale[i]: the factor that brings earlier weights to the new maximum. Weights are summed
// `sum_step` keys at a time: all of them in one chain would err more than anything else in attention.
template <class T>
void weigh(T* scores, int64_t first, int64_t last, T* maximum, T* denominator, T* rescale) {
  using V = Vector<T>;
  constexpr int width = panel_queries<T>, step = lanes<T>;
  constexpr int64_t sum_step = 16;
  V before[2], top[2], denominators[2], sum[2] = {};
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) top[j] = before[j] = load_as<V>(maximum + j * step);
  for (int64_t k = first; k < last; ++k)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const V score = load_as<V>(scores + k * width + j * step);
      top[j] = score > top[j] ? score : top[j];  // leaves a NaN to the exponential
    }
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) {
    store_as(maximum + j * step, top[j]);
    const V none_seen = top[j] == -infinity<T> ? V{} : top[j];
    const V factor = exp2<T>(before[j] - none_seen);
    store_as(rescale + j * step, factor);
    denominators[j] = load_as<V>(denominator + j * step) * factor;
    top[j] = none_seen;
  }
  while (first < last) {
    V part[2] = {};
    for (const int64_t stop = min(last, first + sum_step); first < stop; ++first)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        T* at = scores + first * width + j * step;
        const V weight = exp2<T>(load_as<V>(at) - top[j]);
        part[j] += weight;
        store_as(at, weight);
      }
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) sum[j] += part[j];
  }
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) store_as(denominator + j * step, denominators[j] + sum[j]);
}

template <class T>
void scale_rows(T* rows, int64_t stride, int64_t count, int64_t size, const T* factor) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t d = 0; d < size; ++d) rows[i * stride + d] *= factor[i];
}

template <class T>
void drop(const PanelDropout<T>& dropout, const KeyBlock& keys, const Seen& s, T* weights, int64_t stride) {
  T factors[panel_queries<T>];
  for (int64_t k = s.first; k < s.last; ++k) {
    dropout.factors(keys.index[k], factors);
    for (int i = 0; i < panel_queries<T>; ++i) weights[k * stride + i] *= factors[i];
  }
}

// One panel with one block of keys.
template <class T>
void attend(const AttentionProblem& p, int64_t b, int64_t h, const ForwardArrays<T>& a, const KeyBlock& keys,
            int64_t nonfinite, Queries block, Queries panel) {
  const Seen s = seen(p.visible, keys, panel);
  if (s.first == s.last) return;
  const int64_t offset = panel.first - block.first, width = panel_queries<T>;
  panel_scores(a.key, a.key_stride, a.query + offset * p.shape.size, p.shape.size, s.first, s.last, a.scores, width);
  finish_scores(p, b, h, keys, s, panel, a.scores, width);
  T rescale[panel_queries<T>];
  T* const sums = a.sums + offset * a.value_stride;
  weigh(a.scores, s.first, s.last, a.maximum + offset, a.denominator + offset, rescale);
  scale_rows(sums, a.value_stride, panel.count, p.shape.value_size, rescale);
  if (p.dropout.probability > 0)
    drop(PanelDropout<T>(p.dropout, b * p.shape.heads + h, panel.first), keys, s, a.scores, width);
  add_weighted_rows(a.scores, width, a.value, a.value_stride, s.first, s.last, a.nonfinite, nonfinite, panel.count,
                    p.shape.value_size, sums, a.value_stride);
}

// Calls body(panel) for the panels of a block.
template <class T, class Body>
void for_panels(Queries block, Body&& body) {
  for (int64_t i = 0; i < block.count; i += panel_queries<T>)
    body(Queries{block.first + i, min(panel_queries<T>, block.count - i)});
}

// Divides the sums by the denominators; a query that saw no key gets 0.
template <class T>
void finish_block(const AttentionForward& args, int64_t b, int64_t h, const ForwardArrays<T>& a, Queries block) {
  const AttentionShape& shape = args.problem.shape;
  T* const log_sum = static_cast<T*>(args.log_sum) + (b * shape.heads + h) * shape.queries + block.first;
  for (int64_t i = 0; i < block.count; ++i) {
    const T denominator = a.denominator[i];
    const T factor = denominator == 0 ? T{} : 1 / denominator;
    T* const row = a.sums + i * a.value_stride;
    for (int64_t d = 0; d < shape.value_size; ++d) row[d] *= factor;
    log_sum[i] = denominator == 0 ? -infinity<T> : static_cast<T>(a.maximum[i] * ln_2 + __builtin_log(denominator));
  }
  write_rows(a.sums, a.value_stride, args.output, args.problem.dtype, b, h, block.first, block.count, shape.value_size);
}

template <class T>
void attend_block(const AttentionForward& args, int64_t b, int64_t h, const ForwardArrays<T>& a, Queries block) {
  const AttentionProblem& p = args.problem;
  const AttentionShape& shape = p.shape;
  const int64_t key_head = h / (shape.heads / shape.key_heads);
  for_panels<T>(block, [&](Queries panel) {
    read_rows(p.query, p.dtype, b, h, panel.first, panel.count, shape.size, a.scores, a.key_stride);
    pack_panel(a.scores, a.key_stride, panel.count, shape.size, static_cast<T>(p.scale * log2_e),
               a.query + (panel.first - block.first) * shape.size);
  });
  for (int64_t i = 0; i < a.queries; ++i) a.maximum[i] = -infinity<T>, a.denominator[i] = T{};
  for (int64_t i = 0; i < block.count * a.value_stride; ++i) a.sums[i] = T{};
  KeyWalk walk(p, b, h, block);
  for (KeyBlock keys = {a.index, 0}; walk.fill(keys, a.keys);) {
    read_keys(p.key, p.dtype, b, key_head, keys, shape.size, a.key, a.key_stride);
    read_keys(p.value, p.dtype, b, key_head, keys, shape.value_size, a.value, a.value_stride);
    const int64_t nonfinite =
        hides_some(p, keys, block) ? find_nonfinite(a.value, a.value_stride, keys.count, shape.value_size, a.nonfinite) : 0;
    for_panels<T>(block, [&](Queries panel) { attend(p, b, h, a, keys, nonfinite, block, panel); });
  }
  finish_block(args, b, h, a, block);
}

template <class T>
void attention_forward(const AttentionForward& args, const ThreadPool& pool) {
  const AttentionShape& shape = args.problem.shape;
  const int64_t per_block = query_block<T>(shape.queries, forward_queries);
  const int64_t blocks = ceil_div(shape.queries, per_block);
  parallel_for(pool, shape.batch * shape.heads * blocks, [&](int64_t begin, int64_t end) {
    const auto arrays = worker_arrays<ForwardArrays<T>>(shape);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t head = unit / blocks, first = unit % blocks * per_block;
      attend_block(args, head / shape.heads, head % shape.heads, arrays, {first, min(per_block, shape.queries - first)});
    }
  });
}

}  // namespace
}  // namespace cvfast
