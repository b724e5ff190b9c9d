// Attention backward: the scores are computed again, a block of queries by a block of keys at a time. With w the weights
// (recovered from the scores and log_sum), f the dropout factors and g the output's gradient,
//   grad_value[j] = sum over i of w[i, j] f[i, j] g[i]
//   grad_score    = w[i, j] (f[i, j] g[i] . value[j] - delta[i]),  delta[i] = g[i] . output[i] - grad_log_sum[i]
//   grad_query    = scale * grad_score key;  grad_key = scale * grad_score^T query;  grad_bias = grad_score
// The scale is a factor of g and of delta already, wherever grad_score is not wanted itself.
// Every sum runs over blocks in ascending order, whichever thread does it.
#pragma once
#include "attention_forward.h"

namespace cvfast {
namespace {

constexpr int64_t backward_queries = 128, backward_keys = 128;  // of a block

template <class T>
struct BackwardArrays {
  int64_t queries, keys, key_stride, value_stride, stride;
  int64_t *index, *nonfinite;           // [keys]
  T *key, *value;                       // [keys][key_stride], [keys][value_stride]
  T *query_panels, *grad_panels;        // panels [D][panel_width], [Dv][panel_width]
  T* output_panel;                      // one [Dv][panel_queries]
  T *query, *grad;                      // [queries][key_stride], [queries][value_stride]
  T *log_sum, *delta;                   // [queries], log_sum in units of log 2, +inf where no key was seen
  T *weights, *score_grads;             // [keys][stride]
  T* query_sums;                        // [queries][key_stride], as the next two for gradients that are not summed in place
  T* product;                           // [keys or panel_queries][key_stride or value_stride]
  T *key_sums, *value_sums;             // [S][key_stride], [S][value_stride]; not with_sums: nothing

  BackwardArrays(Arena& arena, const AttentionShape& shape, bool with_sums)
      : queries(query_block<T>(shape.queries, backward_queries)),
        key_stride(padded_row<T>(shape.size)),
        value_stride(padded_row<T>(shape.value_size)),
        stride(padded_row<T>(queries)) {
    keys = key_block<T>(key_stride + value_stride, backward_keys);
    index = arena.take<int64_t>(keys);
    nonfinite = arena.take<int64_t>(keys);
    key = arena.take<T>(keys * key_stride);
    value = arena.take<T>(keys * value_stride);
    query_panels = arena.take<T>(queries * shape.size);
    grad_panels = arena.take<T>(queries * shape.value_size);
    output_panel = arena.take<T>(panel_queries<T> * shape.value_size);
    query = arena.take<T>(queries * key_stride);
    grad = arena.take<T>(queries * value_stride);
    log_sum = arena.take<T>(queries);
    delta = arena.take<T>(queries);
    weights = arena.take<T>(keys * stride);
    score_grads = arena.take<T>(keys * stride);
    query_sums = arena.take<T>(queries * key_stride);
    product = arena.take<T>(max(keys, panel_queries<T>) * max(key_stride, value_stride));
    key_sums = arena.take<T>(with_sums ? shape.keys * key_stride : 0);
    value_sums = arena.take<T>(with_sums ? shape.keys * value_stride : 0);
    if (!key) return;
    zero_matrix(Matrix<T>{key, key_stride, 1}, keys, key_stride);  // read with the rest of a tile, then ignored
    zero_matrix(Matrix<T>{query, key_stride, 1}, queries, key_stride);
    zero_matrix(Matrix<T>{grad, value_stride, 1}, queries, value_stride);
  }
};

// to[i] = left[:, i] . right[:, i] for the queries of two panels of `Vectors` vectors, added up in the order of panel_product: a
// query that sees one key then has g . value = g . output to the last bit, and gradient 0.
template <int Vectors, class T>
void panel_dot(const T* left, const T* right, int64_t size, T* to) {
  using V = Vector<T>;
  constexpr int width = Vectors * lanes<T>;
  V sum[Vectors] = {};
  for (int64_t d = 0; d < size; ++d)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j)
      sum[j] += load_as<V>(left + d * width + j * lanes<T>) * load_as<V>(right + d * width + j * lanes<T>);
#pragma GCC unroll 4
  for (int j = 0; j < Vectors; ++j) store_as(to + j * lanes<T>, sum[j]);
}

// A block of queries and their output's gradient, as rows.
template <class T>
struct QueryRows {
  Matrix<const T> query, grad;
};

// Whether some query of a block saw no key.
template <class T>
bool some_saw_none(const T* log_sum, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (log_sum[i] == -infinity<T>) return true;
  return false;
}

// Reads a block of queries with everything that belongs to it. factor: of grad_panels and delta.
template <class T>
QueryRows<T> read_queries(const AttentionBackward& args, int64_t b, int64_t h, const BackwardArrays<T>& a, Queries block,
                          T factor) {
  const AttentionProblem& p = args.problem;
  const AttentionShape& shape = p.shape;
  const int64_t place = (b * shape.heads + h) * shape.queries + block.first;
  const T* const log_sums = static_cast<const T*>(args.log_sum) + place;
  const bool copied = some_saw_none(log_sums, block.count);  // and then changed
  auto read = [&](const ConstTensor4& from, int64_t size, T* copy, int64_t stride) {
    const Matrix<const T> rows = copied ? Matrix<const T>{} : rows_in_place<T>(from, p.dtype, b, h, block.first, size);
    if (rows.data) return rows;
    read_rows(from, p.dtype, b, h, block.first, block.count, size, copy, stride);
    return Matrix<const T>{copy, stride, 1};
  };
  const QueryRows<T> rows = {read(p.query, shape.size, a.query, a.key_stride),
                             read(args.grad_output, shape.value_size, a.grad, a.value_stride)};
  for_panels<T>(block, [&](Queries panel) {
    const int64_t offset = panel.first - block.first;
    pack_panel(rows.query.data + offset * rows.query.row_stride, rows.query.row_stride, panel, shape.size,
               static_cast<T>(p.scale * log2_e), a.query_panels + offset * shape.size);
    T* const grad_panel = a.grad_panels + offset * shape.value_size;
    pack_panel(rows.grad.data + offset * rows.grad.row_stride, rows.grad.row_stride, panel, shape.value_size, factor, grad_panel);
    Matrix<const T> output = rows_in_place<T>(args.output, p.dtype, b, h, panel.first, shape.value_size);
    if (!output.data) {
      read_rows(args.output, p.dtype, b, h, panel.first, panel.count, shape.value_size, a.product, a.value_stride);
      output = {a.product, a.value_stride, 1};
    }
    pack_panel(output.data, output.row_stride, panel, shape.value_size, T{1}, a.output_panel);
    with_vectors<T, most_panel_vectors>(
        panel.count, [&](auto n) { panel_dot<n.value>(grad_panel, a.output_panel, shape.value_size, a.delta + offset); });
  });
  for (int64_t i = 0; i < a.queries; ++i) a.log_sum[i] = infinity<T>;
  for (int64_t i = 0; i < block.count; ++i) {
    if (log_sums[i] == -infinity<T>) {  // saw no key: whatever the rows hold, it takes no part
      for (int64_t d = 0; d < shape.size; ++d) a.query[i * a.key_stride + d] = T{};
      for (int64_t d = 0; d < shape.value_size; ++d) a.grad[i * a.value_stride + d] = T{};
      a.delta[i] = T{};
      continue;
    }
    a.log_sum[i] = static_cast<T>(log_sums[i] * log2_e);
    if (args.grad_log_sum) a.delta[i] -= factor * static_cast<const T*>(args.grad_log_sum)[place + i];
  }
  return rows;
}

// weights: scores -> w f; score_grads: g . value -> grad_score; for one panel, positions [s.first, s.last).
template <int Vectors, bool with_dropout, class T>
void differentiate(const KeyBlock& keys, const Seen& s, const PanelDropout<T>* dropout, const T* log_sum, const T* delta,
                   T* weights, T* score_grads, int64_t stride) {
  using V = Vector<T>;
  constexpr int step = lanes<T>;
  T factors[panel_queries<T>];
  V sum[Vectors], shift[Vectors];
#pragma GCC unroll 4
  for (int j = 0; j < Vectors; ++j) sum[j] = load_as<V>(log_sum + j * step), shift[j] = load_as<V>(delta + j * step);
  for (int64_t k = s.first; k < s.last; ++k) {
    if constexpr (with_dropout) dropout->template factors<Vectors>(keys.index[k], factors);
    T *const at = weights + k * stride, *const grad_at = score_grads + k * stride;
    V weight[Vectors];
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) weight[j] = load_as<V>(at + j * step) - sum[j];
    exp2<T>(weight);
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) {
      const V score = load_as<V>(at + j * step);
      V grad = load_as<V>(grad_at + j * step);
      if constexpr (with_dropout) grad *= load_as<V>(factors + j * step);
      store_as(grad_at + j * step, score == -infinity<T> ? V{} : weight[j] * (grad - shift[j]));
      if constexpr (with_dropout) weight[j] *= load_as<V>(factors + j * step);
      store_as(at + j * step, weight[j]);
    }
  }
}

// Keys that are multiplied together where the window hides some: with the queries that see one of them.
constexpr int64_t keys_together = 2 * rows_of_tile<panel_vectors>;

// What a panel has of keys [first, last).
template <int Vectors, class T>
void zero_columns(T* to, int64_t stride, int64_t first, int64_t last) {
  for (int64_t k = first; k < last; ++k)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) store_as(to + k * stride + j * lanes<T>, Vector<T>{});
}

// The weights and score_grads of a panel of `Vectors` vectors with one block of keys; 0 for the `around` keys before and after
// those that it sees.
template <int Vectors, class T>
void differentiate_panel(const AttentionProblem& p, int64_t b, int64_t h, const BackwardArrays<T>& a,
                         const KeysAndValues<T>& block, const Seen& s, int64_t around, Queries queries, Queries panel,
                         Ahead& ahead) {
  const KeyBlock& keys = block.keys;
  const AttentionShape& shape = p.shape;
  const int64_t offset = panel.first - queries.first;
  T *const weights = a.weights + offset, *const grads = a.score_grads + offset;
  auto zero_around = [&](T* to) {
    zero_columns<Vectors>(to, a.stride, max<int64_t>(0, s.first - around), s.first);
    zero_columns<Vectors>(to, a.stride, s.last, min(keys.count, s.last + around));
  };
  zero_around(weights), zero_around(grads);
  if (s.first == s.last) return;
  panel_scores<Vectors>(block.key, a.query_panels + offset * shape.size, panel.count, shape.size, s, weights, a.stride,
                        static_cast<T*>(nullptr), ahead);
  panel_products<Vectors>(block.value, a.grad_panels + offset * shape.value_size, Vectors * lanes<T>, shape.value_size,
                          s.last_of, s.first, StoreSums<T>{grads, a.stride, false}, ahead);
  finish_scores(p, b, h, keys, s, panel, weights, a.stride);
  if (p.dropout.probability > 0) {
    const PanelDropout<T> dropout(p.dropout, b * shape.heads + h, panel.first);
    differentiate<Vectors, true>(keys, s, &dropout, a.log_sum + offset, a.delta + offset, weights, grads, a.stride);
  } else {
    differentiate<Vectors, false, T>(keys, s, nullptr, a.log_sum + offset, a.delta + offset, weights, grads, a.stride);
  }
}

template <class T>
Seen differentiate_panel(const AttentionProblem& p, int64_t b, int64_t h, const BackwardArrays<T>& a,
                         const KeysAndValues<T>& block, int64_t around, Queries queries, Queries panel, Ahead& ahead) {
  const Seen s = seen<T>(p.visible, block.keys, panel);
  with_vectors<T, most_panel_vectors>(
      panel.count, [&](auto n) { differentiate_panel<n.value>(p, b, h, a, block, s, around, queries, panel, ahead); });
  return s;
}

// The gradients of a head's keys or values: rows of sums. Those before `written` are there.
template <class T>
struct KeySums {
  Matrix<T> rows;
  int64_t size, written;
  T* at(int64_t key) const { return rows.data + key * rows.row_stride; }
  void write_until(int64_t key) {
    if (written >= key) return;
    zero_matrix(Matrix<T>{at(written), rows.row_stride, 1}, key - written, size);
    written = key;
  }
};

// sums[key] += the block's product [key][size] of `factors` [key][query] with `rows` [query][size]. Where the window hides keys, a
// few at a time are multiplied with the queries that see some of them.
template <class T>
void add_to_keys(const AttentionVisibility& visible, const KeyBlock& keys, const T* factors, const BackwardArrays<T>& a,
                 Queries queries, Matrix<const T> rows, int64_t stride, KeySums<T>& sums, Ahead& ahead) {
  const bool in_place = keys.contiguous();
  const int64_t end = keys.index[keys.count - 1] + 1;
  sums.write_until(in_place ? keys.index[0] : end);
  const int64_t added = in_place ? min(keys.count, sums.written - keys.index[0]) : 0;  // the first ones; others are stored
  const int64_t step = seen<T>(visible, keys, queries).partly() ? keys_together : keys.count;
  for (int64_t k = 0, count; k < keys.count; k += count) {
    count = even_piece((k < added ? added : keys.count) - k, step);
    const int64_t first = max<int64_t>(0, keys.index[k] - visible.right - queries.first);
    const int64_t last = min(queries.count, keys.index[k + count - 1] + visible.left + 1 - queries.first);
    const TileOperands<T, RowsOfA<T>> operands = {{factors + k * a.stride + first, a.stride}, rows.data + first * rows.row_stride,
                                                  rows.row_stride, max<int64_t>(0, last - first)};
    const StoreSums<T> store = in_place ? StoreSums<T>{sums.at(keys.index[k]), sums.rows.row_stride, k < added}
                                        : StoreSums<T>{a.product + k * stride, stride, false};
    tile_product<T>(count, sums.size, operands, store, ahead);
  }
  sums.written = max(sums.written, end);
  if (in_place) return;
  for (int64_t k = 0; k < keys.count; ++k)
    for (int64_t d = 0; d < sums.size; ++d) sums.at(keys.index[k])[d] += a.product[k * stride + d];
}

// Reads the keys and values that `queries` see, a block at a time, and calls body(block, the key that follows) for each.
template <class T, class Body>
void for_key_blocks(const AttentionProblem& p, int64_t b, int64_t h, const BackwardArrays<T>& a, Queries queries,
                    Body&& body) {
  const int64_t key_head = h / (p.shape.heads / p.shape.key_heads);
  KeyWalk walk(p, b, h, queries);
  for (KeyBlock keys = {a.index, 0}; walk.fill(keys, a.keys);) {
    KeysAndValues<T> block = {keys, read_keys(p.key, p.dtype, b, key_head, keys, p.shape.size, a.key, a.key_stride),
                              read_keys(p.value, p.dtype, b, key_head, keys, p.shape.value_size, a.value, a.value_stride),
                              {a.nonfinite, 0}, walk.finished()};
    if (hides_some(p, keys, queries))
      block.nonfinite.count = find_nonfinite(block.key, keys.count, p.shape.size, a.nonfinite);
    body(block, walk.following());
  }
}

// Where rows of a head's gradient are summed: in place if tiles can store whole vectors there, else in `sums`.
template <class T>
Matrix<T> gradient_rows(const Tensor4& to, DType dtype, int64_t b, int64_t h, int64_t first, int64_t size, T* sums,
                        int64_t stride) {
  if (!is_of<T>(dtype) || to.stride[3] != 1 || size % lanes<T> != 0) return {sums, stride, 1};
  const Matrix<T> rows = head_of<T>(to, b, h);
  return {rows.data + first * rows.row_stride, rows.row_stride, 1};
}

// The queries' gradient; what follows a block of keys and a block of queries in memory; and, where no more queries follow,
// the gradients of these keys and values.
inline Ahead rows_ahead(const AttentionBackward& args, int64_t b, int64_t h, int64_t key_head, const KeyBlock& keys,
                        int64_t next_key, Queries block) {
  const AttentionProblem& p = args.problem;
  const AttentionShape& shape = p.shape;
  Ahead ahead;
  if (!fetches_ahead(shape)) return ahead;
  const int64_t next = block.first + block.count, group = shape.heads / shape.key_heads;
  add_rows(ahead, p.key, p.dtype, b, key_head, next_key, keys.count, shape.keys, shape.size);
  add_rows(ahead, p.value, p.dtype, b, key_head, next_key, keys.count, shape.keys, shape.value_size);
  add_rows(ahead, args.grad_query, p.dtype, b, h, block.first, block.count, shape.queries, shape.size);
  add_rows(ahead, p.query, p.dtype, b, h, next, block.count, shape.queries, shape.size);
  add_rows(ahead, args.grad_output, p.dtype, b, h, next, block.count, shape.queries, shape.value_size);
  add_rows(ahead, args.output, p.dtype, b, h, next, block.count, shape.queries, shape.value_size);
  if (next < shape.queries || (h + 1) % group != 0) return ahead;
  add_rows(ahead, args.grad_key, p.dtype, b, key_head, keys.index[0], keys.count, shape.keys, shape.size);
  add_rows(ahead, args.grad_value, p.dtype, b, key_head, keys.index[0], keys.count, shape.keys, shape.value_size);
  return ahead;
}

// One block of queries: its grad_query, and its share of the sums for keys and values.
template <class T>
void backward_block(const AttentionBackward& args, int64_t b, int64_t h, const BackwardArrays<T>& a, Queries block,
                    KeySums<T>& key_sums, KeySums<T>& value_sums) {
  const AttentionProblem& p = args.problem;
  const AttentionShape& shape = p.shape;
  const int64_t key_head = h / (shape.heads / shape.key_heads);
  const QueryRows<T> rows = read_queries(args, b, h, a, block, static_cast<T>(p.scale));
  const Matrix<T> sums =
      gradient_rows(args.grad_query, p.dtype, b, h, block.first, shape.size, a.query_sums, a.key_stride);
  bool add = false;
  for_key_blocks(p, b, h, a, block, [&](const KeysAndValues<T>& keys, int64_t next_key) {
    Ahead ahead = rows_ahead(args, b, h, key_head, keys.keys, next_key, block);
    for_panels<T>(block, [&](Queries panel) {
      const Seen s = differentiate_panel(p, b, h, a, keys, keys_together, block, panel, ahead);
      const int64_t offset = panel.first - block.first;
      if (s.first < s.last || !add)
        add_seen_rows(p.visible, keys.keys, s, panel, a.score_grads + offset, a.stride, keys.key, keys.nonfinite, shape.size,
                      StoreSums<T>{sums.data + offset * sums.row_stride, sums.row_stride, add}, ahead);
    });
    add_to_keys(p.visible, keys.keys, a.weights, a, block, rows.grad, a.value_stride, value_sums, ahead);
    add_to_keys(p.visible, keys.keys, a.score_grads, a, block, rows.query, a.key_stride, key_sums, ahead);
    add = true;
  });
  if (!add) zero_matrix(sums, block.count, shape.size);  // nothing is seen
  if (sums.data == a.query_sums)
    write_rows(a.query_sums, a.key_stride, args.grad_query, p.dtype, b, h, block.first, block.count, shape.size);
}

// Calls body(block) for the blocks of queries.
template <class T, class Body>
void for_query_blocks(const AttentionShape& shape, Body&& body) {
  const int64_t step = query_block<T>(shape.queries, backward_queries);
  for (int64_t first = 0; first < shape.queries; first += step)
    body(Queries{first, min(step, shape.queries - first)});
}

// All gradients that belong to one head of the keys.
template <class T>
void backward_head(const AttentionBackward& args, int64_t b, int64_t key_head, const BackwardArrays<T>& a) {
  const AttentionProblem& p = args.problem;
  const AttentionShape& shape = p.shape;
  const int64_t group = shape.heads / shape.key_heads;
  auto sums_of = [&](const Tensor4& to, int64_t size, T* sums, int64_t stride) {
    return KeySums<T>{gradient_rows(to, p.dtype, b, key_head, 0, size, sums, stride), size, 0};
  };
  KeySums<T> key_sums = sums_of(args.grad_key, shape.size, a.key_sums, a.key_stride);
  KeySums<T> value_sums = sums_of(args.grad_value, shape.value_size, a.value_sums, a.value_stride);
  for (int64_t h = key_head * group; h < (key_head + 1) * group; ++h)
    for_query_blocks<T>(shape, [&](Queries block) { backward_block(args, b, h, a, block, key_sums, value_sums); });
  auto finish = [&](KeySums<T>& sums, const Tensor4& to, const T* buffer) {
    sums.write_until(shape.keys);
    if (sums.rows.data == buffer)
      write_rows(buffer, sums.rows.row_stride, to, p.dtype, b, key_head, 0, shape.keys, sums.size);
  };
  finish(key_sums, args.grad_key, a.key_sums);
  finish(value_sums, args.grad_value, a.value_sums);
}

// Adds one block's score_grads to the gradient of the bias.
template <class T>
void add_to_bias(const AttentionBackward& args, int64_t b, int64_t h, const BackwardArrays<T>& a, Queries block) {
  const int64_t* size = args.grad_bias_size;
  const int64_t key_step = size[3] > 1, query_step = size[2] > 1 ? size[3] : 0;
  const int64_t place = ((size[0] > 1 ? b : 0) * size[1] + (size[1] > 1 ? h : 0)) * size[2] * size[3];
  T* const grad = static_cast<T*>(args.grad_bias) + place;
  read_queries(args, b, h, a, block, T{1});
  for_key_blocks(args.problem, b, h, a, block, [&](const KeysAndValues<T>& keys_and_values, int64_t) {
    const KeyBlock& keys = keys_and_values.keys;
    Ahead ahead;
    for_panels<T>(block, [&](Queries panel) {
      differentiate_panel(args.problem, b, h, a, keys_and_values, keys.count, block, panel, ahead);
    });
    for (int64_t i = 0; i < block.count; ++i)
      for (int64_t k = 0; k < keys.count; ++k)
        grad[(block.first + i) * query_step + keys.index[k] * key_step] += a.score_grads[k * a.stride + i];
  });
}

// A range of one dimension: all of it where the bias is broadcast along it, else only `place`.
struct Along {
  int64_t begin, end;
  Along(int64_t bias_size, int64_t size, int64_t place)
      : begin(bias_size == 1 ? 0 : place), end(bias_size == 1 ? size : place + 1) {}
};

// A pass of its own, whose pieces of work are the elements of the bias, so that samples and heads that share them are
// added up in order.
template <class T>
void bias_gradient(const AttentionBackward& args, const ThreadPool& pool) {
  const AttentionShape& shape = args.problem.shape;
  const int64_t* size = args.grad_bias_size;
  const int64_t step = query_block<T>(shape.queries, backward_queries), blocks = ceil_div(shape.queries, step);
  zero_matrix(Matrix<T>{static_cast<T*>(args.grad_bias), size[3], 1}, size[0] * size[1] * size[2], size[3]);
  const int64_t block_units = size[2] == 1 ? 1 : blocks;
  parallel_for(pool, size[0] * size[1] * block_units, [&](int64_t begin, int64_t end) {
    const auto arrays = worker_arrays<BackwardArrays<T>>(shape, false);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t head = unit / block_units;
      const Along bs(size[0], shape.batch, head / size[1]), hs(size[1], shape.heads, head % size[1]);
      const Along qs(size[2], blocks, unit % block_units);
      for (int64_t b = bs.begin; b < bs.end; ++b)
        for (int64_t h = hs.begin; h < hs.end; ++h)
          for (int64_t q = qs.begin; q < qs.end; ++q)
            add_to_bias(args, b, h, arrays, {q * step, min(step, shape.queries - q * step)});
    }
  });
}

template <class T>
void attention_backward(const AttentionBackward& args, const ThreadPool& pool) {
  const AttentionShape& shape = args.problem.shape;
  parallel_for(pool, shape.batch * shape.key_heads, [&](int64_t begin, int64_t end) {
    const auto arrays = worker_arrays<BackwardArrays<T>>(shape, true);
    for (int64_t unit = begin; unit < end; ++unit)
      backward_head(args, unit / shape.key_heads, unit % shape.key_heads, arrays);
  });
  if (args.grad_bias) bias_gradient<T>(args, pool);
}

}  // namespace
}  // namespace cvfast
