// Attention forward: online softmax over blocks of keys.
#pragma once
#include "attention_block.h"

namespace cvfast {
namespace {

constexpr int64_t forward_queries = 256, forward_keys = 256;  // of a block

template <class T>
struct ForwardArrays {
  int64_t queries, keys, key_stride, value_stride;
  int64_t *index, *nonfinite;    // [keys]
  T *key, *value;                // [keys][key_stride], [keys][value_stride], for what can't be read in place
  T *query, *sums;               // panels [D][panel_queries]; [queries][value_stride]
  T *maximum, *denominator;      // [queries]
  T *scores;                     // [keys][panel_queries]; before: [panel_queries][key_stride]
  bool *has_sums;                // [panels]: sums are defined

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
    has_sums = arena.take<bool>(queries / panel_queries<T>);
    if (value && shape.value_size % tile_cols<T> != 0)  // read with the rest of a tile, then ignored
      zero_matrix(Matrix<T>{value, value_stride, 1}, keys, value_stride);
  }
};

// scores[k, i] for k in [first, last) become weights 2^(score - maximum); the queries' running maximum and sum of weights
// are brought up to date. rescale[i]: the factor that brings earlier weights to the new maximum. Weights are summed
// `sum_step` keys at a time: all of them in one chain would err more than anything else in attention.
template <int Vectors, class T>
void weigh(T* scores, int64_t first, int64_t last, T* maximum, T* denominator, T* rescale) {
  using V = Vector<T>;
  constexpr int width = panel_queries<T>, step = lanes<T>;
  constexpr int64_t sum_step = 16;
  V before[Vectors], top[Vectors], denominators[Vectors], sum[Vectors] = {};
#pragma GCC unroll 2
  for (int j = 0; j < Vectors; ++j) top[j] = before[j] = load_as<V>(maximum + j * step);
  for (int64_t k = first; k < last; ++k)
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) {
      const V score = load_as<V>(scores + k * width + j * step);
      top[j] = score > top[j] ? score : top[j];  // leaves a NaN to the exponential
    }
#pragma GCC unroll 2
  for (int j = 0; j < Vectors; ++j) {
    store_as(maximum + j * step, top[j]);
    const V none_seen = top[j] == -infinity<T> ? V{} : top[j];
    const V factor = exp2<T>(before[j] - none_seen);
    store_as(rescale + j * step, factor);
    denominators[j] = load_as<V>(denominator + j * step) * factor;
    top[j] = none_seen;
  }
  while (first < last) {
    V part[Vectors] = {};
    for (const int64_t stop = min(last, first + sum_step); first < stop; ++first)
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) {
        T* at = scores + first * width + j * step;
        const V weight = exp2<T>(load_as<V>(at) - top[j]);
        part[j] += weight;
        store_as(at, weight);
      }
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) sum[j] += part[j];
  }
#pragma GCC unroll 2
  for (int j = 0; j < Vectors; ++j) store_as(denominator + j * step, denominators[j] + sum[j]);
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

// One block of keys with its values, as read.
template <class T>
struct KeysAndValues {
  KeyBlock keys;
  Matrix<const T> key, value;
  Nonfinite nonfinite;  // of the values
};

// One panel of `Vectors` vectors of queries with one block of keys.
template <int Vectors, class T>
void attend(const AttentionProblem& p, int64_t b, int64_t h, const ForwardArrays<T>& a, const KeysAndValues<T>& block,
            Queries queries, Queries panel, Ahead& ahead) {
  const Seen s = seen<T>(p.visible, block.keys, panel);
  if (s.first == s.last) return;
  const int64_t offset = panel.first - queries.first, width = panel_queries<T>, size = p.shape.value_size;
  panel_scores<Vectors>(block.key, a.query + offset * p.shape.size, p.shape.size, s, a.scores, width,
                        [&] { ahead.step(); });
  finish_scores(p, b, h, block.keys, s, panel, a.scores, width);
  T rescale[panel_queries<T>];
  T* const sums = a.sums + offset * a.value_stride;
  weigh<Vectors>(a.scores, s.first, s.last, a.maximum + offset, a.denominator + offset, rescale);
  bool& has_sums = a.has_sums[offset / width];
  if (has_sums) scale_rows(sums, a.value_stride, panel.count, size, rescale);
  if (p.dropout.probability > 0)
    drop(PanelDropout<T>(p.dropout, b * p.shape.heads + h, panel.first), block.keys, s, a.scores, width);
  add_seen_rows(p.visible, block.keys, s, panel, a.scores, width, block.value, block.nonfinite, size, sums, a.value_stride,
                has_sums);
  has_sums = true;
}

// Calls body(panel) for the panels of a block.
template <class T, class Body>
void for_panels(Queries block, Body&& body) {
  for (int64_t i = 0; i < block.count; i += panel_queries<T>)
    body(Queries{block.first + i, min(panel_queries<T>, block.count - i)});
}

// Divides the sums of a panel by the denominators; a query that saw no key gets 0.
template <class T>
void finish_panel(const AttentionForward& args, int64_t b, int64_t h, const ForwardArrays<T>& a, Queries block, Queries panel) {
  using V = Vector<T>;
  const AttentionShape& shape = args.problem.shape;
  const int64_t offset = panel.first - block.first;
  T* const sums = a.sums + offset * a.value_stride;
  if (!a.has_sums[offset / panel_queries<T>]) zero_matrix(Matrix<T>{sums, a.value_stride, 1}, panel.count, shape.value_size);
  T log_sum[panel_queries<T>], factor[panel_queries<T>];
  for (int i = 0; i < panel_queries<T>; i += lanes<T>) {
    const V denominator = load_as<V>(a.denominator + offset + i);
    store_as(factor + i, denominator == 0 ? V{} : 1 / denominator);
    const V sum = load_as<V>(a.maximum + offset + i) * static_cast<T>(ln_2) + log<T>(denominator);
    store_as(log_sum + i, denominator == 0 ? V{} - infinity<T> : sum);
  }
  scale_rows(sums, a.value_stride, panel.count, shape.value_size, factor);
  copy_contiguous(log_sum, static_cast<T*>(args.log_sum) + (b * shape.heads + h) * shape.queries + panel.first, panel.count);
  write_rows(sums, a.value_stride, args.output, args.problem.dtype, b, h, panel.first, panel.count, shape.value_size);
}

// The queries of a panel, times scale * log2(e).
template <class T>
void read_panel(const AttentionProblem& p, int64_t b, int64_t h, Queries panel, T* buffer, int64_t buffer_stride, T* to) {
  const T factor = static_cast<T>(p.scale * log2_e);
  const bool of_t = p.dtype == DType::f32 || p.dtype == DType::f64;
  if (of_t && p.query.stride[3] == 1) {
    const Matrix<const T> rows = head_of<T>(p.query, b, h);
    return pack_panel(rows.data + panel.first * rows.row_stride, rows.row_stride, panel.count, p.shape.size, factor, to);
  }
  read_rows(p.query, p.dtype, b, h, panel.first, panel.count, p.shape.size, buffer, buffer_stride);
  pack_panel(buffer, buffer_stride, panel.count, p.shape.size, factor, to);
}

// What follows a block of keys and a block of queries in memory, and the queries' output.
inline Ahead rows_ahead(const AttentionForward& args, int64_t b, int64_t h, int64_t key_head, int64_t next_key,
                        int64_t count, Queries queries) {
  const AttentionProblem& p = args.problem;
  const AttentionShape& shape = p.shape;
  const int64_t next_query = queries.first + queries.count;
  Ahead ahead;
  ahead.add(p.key, p.dtype, b, key_head, next_key, count, shape.keys, shape.size);
  ahead.add(p.value, p.dtype, b, key_head, next_key, count, shape.keys, shape.value_size);
  ahead.add(p.query, p.dtype, b, h, next_query, queries.count, shape.queries, shape.size);
  const Tensor4& to = args.output;
  ahead.add({to.data, {to.stride[0], to.stride[1], to.stride[2], to.stride[3]}}, p.dtype, b, h, queries.first, queries.count,
            shape.queries, shape.value_size, true);
  return ahead;
}

template <class T>
void attend_block(const AttentionForward& args, int64_t b, int64_t h, const ForwardArrays<T>& a, Queries queries) {
  const AttentionProblem& p = args.problem;
  const AttentionShape& shape = p.shape;
  const int64_t key_head = h / (shape.heads / shape.key_heads);
  for_panels<T>(queries, [&](Queries panel) {
    read_panel(p, b, h, panel, a.scores, a.key_stride, a.query + (panel.first - queries.first) * shape.size);
  });
  for (int64_t i = 0; i < a.queries; ++i) a.maximum[i] = -infinity<T>, a.denominator[i] = T{};
  for (int64_t i = 0; i < a.queries / panel_queries<T>; ++i) a.has_sums[i] = false;
  KeyWalk walk(p, b, h, queries);
  for (KeyBlock keys = {a.index, 0}; walk.fill(keys, a.keys);) {
    KeysAndValues<T> block = {keys, read_keys(p.key, p.dtype, b, key_head, keys, shape.size, a.key, a.key_stride),
                              read_keys(p.value, p.dtype, b, key_head, keys, shape.value_size, a.value, a.value_stride),
                              {a.nonfinite, 0}};
    if (hides_some(p, keys, queries))
      block.nonfinite.count = find_nonfinite(block.value, keys.count, shape.value_size, a.nonfinite);
    Ahead ahead = rows_ahead(args, b, h, key_head, walk.following(), keys.count, queries);
    ahead.start(ceil_div(queries.count, panel_queries<T>) * ceil_div(keys.count, tile_rows));
    for_panels<T>(queries, [&](Queries panel) {
      panel.count > lanes<T> ? attend<2>(p, b, h, a, block, queries, panel, ahead)
                             : attend<1>(p, b, h, a, block, queries, panel, ahead);
    });
  }
  for_panels<T>(queries, [&](Queries panel) { finish_panel(args, b, h, a, queries, panel); });
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
