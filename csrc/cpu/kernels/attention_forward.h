// Attention forward: online softmax over blocks of keys.
#pragma once
#include "attention_block.h"

namespace cvfast {
namespace {

constexpr int64_t forward_queries = 256, forward_keys = 256;  // of a block

// What there is of a panel's output: nothing, sums of weighted values, or all of it.
enum class PanelState : unsigned char { empty, summed, written };

template <class T>
struct ForwardArrays {
  int64_t queries, keys, key_stride, value_stride;
  int64_t *index, *nonfinite;    // [keys]
  T *key, *value;                // [keys][key_stride], [keys][value_stride], for what can't be read in place
  T *query, *sums;               // panels [D][panel_width]; [queries][value_stride]
  T *maximum, *denominator;      // [queries]
  T *scores;                     // [keys][panel_width]; before: [panel_queries][key_stride]
  PanelState* state;             // [vectors of queries]: that of a panel stands at its first one

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
    state = arena.take<PanelState>(queries / lanes<T>);
    if (value && shape.value_size % lanes<T> != 0)  // read with the rest of a tile, then ignored
      zero_matrix(Matrix<T>{value, value_stride, 1}, keys, value_stride);
  }
};

// scores[k, i] for k in [first, last) become weights 2^(score - maximum), and the queries' sum of weights is brought up to
// date. before: the maximum that it had. rescale[i]: the factor that brings earlier weights to the new maximum. Weights are
// summed `sum_step` keys at a time: all of them in one chain would err more than anything else in attention.
template <int Vectors, class T>
void weigh(T* scores, int64_t first, int64_t last, const T* before, const T* maximum, T* denominator, T* rescale) {
  using V = Vector<T>;
  constexpr int step = lanes<T>, width = Vectors * step;
  constexpr int64_t sum_step = 16;
  V top[Vectors], denominators[Vectors], sum[Vectors] = {};
#pragma GCC unroll 4
  for (int j = 0; j < Vectors; ++j) {
    top[j] = load_as<V>(maximum + j * step);
    top[j] = top[j] == -infinity<T> ? V{} : top[j];  // none seen
    const V factor = exp2<T>(load_as<V>(before + j * step) - top[j]);
    store_as(rescale + j * step, factor);
    denominators[j] = load_as<V>(denominator + j * step) * factor;
  }
  while (first < last) {
    V part[Vectors] = {};
    for (const int64_t stop = min(last, first + sum_step); first < stop; ++first) {
      T* const at = scores + first * width;
      V weight[Vectors];
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) weight[j] = load_as<V>(at + j * step) - top[j];
      exp2<T>(weight);
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) {
        part[j] += weight[j];
        store_as(at + j * step, weight[j]);
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) sum[j] += part[j];
  }
#pragma GCC unroll 4
  for (int j = 0; j < Vectors; ++j) store_as(denominator + j * step, denominators[j] + sum[j]);
}

template <int Vectors, class T>
void drop(const PanelDropout<T>& dropout, const KeyBlock& keys, const Seen& s, T* weights) {
  constexpr int width = Vectors * lanes<T>;
  T factors[width];
  for (int64_t k = s.first; k < s.last; ++k) {
    dropout.template factors<Vectors>(keys.index[k], factors);
    for (int i = 0; i < width; ++i) weights[k * width + i] *= factors[i];
  }
}

// One block of keys with its values, as read.
template <class T>
struct KeysAndValues {
  KeyBlock keys;
  Matrix<const T> key, value;
  Nonfinite nonfinite;  // of the values
  bool last;            // no more blocks follow
};

// Stores the log_sum of a panel's queries, `count` from `offset` in their block on.
template <class T>
void store_log_sums(const ForwardArrays<T>& a, int64_t offset, int64_t count, T* to) {
  using V = Vector<T>;
  T log_sum[panel_queries<T>];
  for (int i = 0; i < count; i += lanes<T>) {
    const V denominator = load_as<V>(a.denominator + offset + i);
    const V sum = load_as<V>(a.maximum + offset + i) * static_cast<T>(ln_2) + log<T>(denominator);
    store_as(log_sum + i, denominator == 0 ? V{} - infinity<T> : sum);
  }
  copy_contiguous(log_sum, to, count);
}

// 1 / (sum of weights) of a panel's queries, 0 for one that saw no key; and their log_sum, stored if it is wanted.
template <class T>
void finish_sums(const AttentionForward& args, int64_t b, int64_t h, const ForwardArrays<T>& a, Queries block, Queries panel,
                 T* factor) {
  using V = Vector<T>;
  const AttentionShape& shape = args.problem.shape;
  const int64_t offset = panel.first - block.first;
  for (int i = 0; i < panel.count; i += lanes<T>) {
    const V denominator = load_as<V>(a.denominator + offset + i);
    store_as(factor + i, denominator == 0 ? V{} : 1 / denominator);
  }
  if (args.log_sum)
    store_log_sums(a, offset, panel.count,
                   static_cast<T*>(args.log_sum) + (b * shape.heads + h) * shape.queries + panel.first);
}

// Whether tiles can be stored to the output: whole vectors of T.
template <class T>
bool takes_tiles(const AttentionForward& args) {
  return is_of<T>(args.problem.dtype) && args.output.stride[3] == 1 && args.problem.shape.value_size % lanes<T> == 0;
}

// One panel of `Vectors` vectors of queries with one block of keys.
template <int Vectors, class T>
void attend(const AttentionForward& args, int64_t b, int64_t h, const ForwardArrays<T>& a, const KeysAndValues<T>& block,
            Queries queries, Queries panel, Ahead& ahead) {
  const AttentionProblem& p = args.problem;
  const Seen s = seen<T>(p.visible, block.keys, panel);
  if (s.first == s.last) return;
  const int64_t offset = panel.first - queries.first, width = Vectors * lanes<T>, size = p.shape.value_size;
  T before[panel_queries<T>], rescale[panel_queries<T>], factor[panel_queries<T>];
  T* const maximum = a.maximum + offset;
  copy_contiguous(maximum, before, width);
  const bool finishes = finishes_scores(p, s);  // only then are they the ones to compare
  panel_scores<Vectors>(block.key, a.query + offset * p.shape.size, panel.count, p.shape.size, s, a.scores, width,
                        finishes ? nullptr : maximum, ahead);
  if (finishes) {
    finish_scores(p, b, h, block.keys, s, panel, a.scores, width);
    add_maximum<Vectors>(a.scores, width, s.first, s.last, maximum);
  }
  weigh<Vectors>(a.scores, s.first, s.last, before, maximum, a.denominator + offset, rescale);
  if (p.dropout.probability > 0)
    drop<Vectors>(PanelDropout<T>(p.dropout, b * p.shape.heads + h, panel.first), block.keys, s, a.scores);
  T* const sums = a.sums + offset * a.value_stride;
  PanelState& state = a.state[offset / lanes<T>];
  MergeSums<T> merge = {sums, a.value_stride, state == PanelState::summed ? rescale : nullptr, sums, a.value_stride, nullptr};
  state = PanelState::summed;
  if (block.last && takes_tiles<T>(args)) {
    finish_sums(args, b, h, a, queries, panel, factor);
    const Matrix<T> output = head_of<T>(args.output, b, h);
    merge.to = output.data + panel.first * output.row_stride, merge.stride = output.row_stride, merge.factor = factor;
    state = PanelState::written;
  }
  add_seen_rows(p.visible, block.keys, s, panel, a.scores, width, block.value, block.nonfinite, size, merge,
                ahead);
}

// Writes the output of a panel from its sums; a query that saw no key gets 0.
template <class T>
void finish_panel(const AttentionForward& args, int64_t b, int64_t h, const ForwardArrays<T>& a, Queries block, Queries panel) {
  const int64_t offset = panel.first - block.first, size = args.problem.shape.value_size;
  const PanelState state = a.state[offset / lanes<T>];
  if (state == PanelState::written) return;
  T* const sums = a.sums + offset * a.value_stride;
  if (state == PanelState::empty) zero_matrix(Matrix<T>{sums, a.value_stride, 1}, panel.count, size);
  T factor[panel_queries<T>];
  finish_sums(args, b, h, a, block, panel, factor);
  scale_rows(sums, a.value_stride, panel.count, size, factor);
  write_rows(sums, a.value_stride, args.output, args.problem.dtype, b, h, panel.first, panel.count, size);
}

// The queries of a panel, times scale * log2(e).
template <class T>
void read_panel(const AttentionProblem& p, int64_t b, int64_t h, Queries panel, T* buffer, int64_t buffer_stride, T* to) {
  const T factor = static_cast<T>(p.scale * log2_e);
  if (is_of<T>(p.dtype) && p.query.stride[3] == 1) {
    const Matrix<const T> rows = head_of<T>(p.query, b, h);
    return pack_panel(rows.data + panel.first * rows.row_stride, rows.row_stride, panel, p.shape.size, factor, to);
  }
  read_rows(p.query, p.dtype, b, h, panel.first, panel.count, p.shape.size, buffer, buffer_stride);
  pack_panel(buffer, buffer_stride, panel, p.shape.size, factor, to);
}

// The queries' output, and what follows a block of keys and a block of queries in memory.
inline Ahead rows_ahead(const AttentionForward& args, int64_t b, int64_t h, int64_t key_head, int64_t next_key,
                        int64_t count, Queries queries) {
  const AttentionProblem& p = args.problem;
  const AttentionShape& shape = p.shape;
  Ahead ahead;
  if (!fetches_ahead(shape)) return ahead;
  add_rows(ahead, args.output, p.dtype, b, h, queries.first, queries.count, shape.queries, shape.value_size);
  add_rows(ahead, p.key, p.dtype, b, key_head, next_key, count, shape.keys, shape.size);
  add_rows(ahead, p.value, p.dtype, b, key_head, next_key, count, shape.keys, shape.value_size);
  add_rows(ahead, p.query, p.dtype, b, h, queries.first + queries.count, queries.count, shape.queries, shape.size);
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
  for (int64_t i = 0; i < a.queries / lanes<T>; ++i) a.state[i] = PanelState::empty;
  KeyWalk walk(p, b, h, queries);
  for (KeyBlock keys = {a.index, 0}; walk.fill(keys, a.keys);) {
    KeysAndValues<T> block = {keys, read_keys(p.key, p.dtype, b, key_head, keys, shape.size, a.key, a.key_stride),
                              read_keys(p.value, p.dtype, b, key_head, keys, shape.value_size, a.value, a.value_stride),
                              {a.nonfinite, 0}, walk.finished()};
    if (hides_some(p, keys, queries))
      block.nonfinite.count = find_nonfinite(block.value, keys.count, shape.value_size, a.nonfinite);
    Ahead ahead = rows_ahead(args, b, h, key_head, walk.following(), keys.count, queries);
    for_panels<T>(queries, [&](Queries panel) {
      with_vectors<T, most_panel_vectors>(panel.count, [&](auto n) { attend<n.value>(args, b, h, a, block, queries, panel, ahead); });
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
