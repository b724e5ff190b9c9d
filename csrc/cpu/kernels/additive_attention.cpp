// Additive attention for one instruction set; see conv2d.cpp. Exports
// cvfast::<CVFAST_ISA>::additive_attention and nothing else.
#include "../kernel_table.h"
#include "../scratch.h"
#include "cvfast/additive_attention.h"
#include "exp.h"
#include "parallel.h"
#include "sigmoid_tanh.h"

namespace cvfast {
namespace {

// The features that one piece of backward work takes: whole cache lines of every type.
constexpr int64_t feature_block = 128;
// The keys that are summed in one chain in the backward pass, and that one piece of forward work takes.
constexpr int64_t key_chain = 16, key_block_size = 32;
// The keys that are scored together, so that no tanh waits for another one.
constexpr int keys_together = 4;

template <class S>
struct AdditiveView {
  using T = Compute<S>;
  const AdditiveProblem& p;
  const S* query(int64_t b, int64_t t) const { return row(p.query, b * p.shape.queries + t); }
  const S* key(int64_t b, int64_t s) const { return row(p.key, b * p.shape.keys + s); }
  const S* weight() const { return static_cast<const S*>(p.weight); }
  bool seen(int64_t b, int64_t t, int64_t s) const {
    return !p.mask || p.mask[b * p.mask_stride[0] + t * p.mask_stride[1] + s * p.mask_stride[2]];
  }

 private:
  const S* row(const void* data, int64_t index) const { return static_cast<const S*>(data) + index * p.shape.size; }
};

template <class T>
struct TanhAndSlope {
  Vector<T> tanh, slope;
};

// tanh(x), error at most 3 ulp, and its derivative; a NaN stays one. With e = exp(2 x) and u = e - 1, of full accuracy near
// 0: u / (u + 2) and 4 e / (u + 2)^2, which, unlike 1 - tanh^2, loses nothing where tanh is near 1.
template <class T, int N>
[[gnu::always_inline]] inline void tanhs_and_slopes(Vector<T> (&x)[N], TanhAndSlope<T> (&y)[N]) {
  constexpr T most = -Exponential<T>::least;
  ExpParts<T> e[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) x[i] = clamp<T>(x[i] + x[i], -most, most);
  exp_parts<T, N>(x, e);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    const Vector<T> grown = e[i].scale * e[i].growth, u = grown + (e[i].scale - 1), inverse = 1 / (u + 2);
    y[i] = {u * inverse, 4 * ((grown + e[i].scale) * inverse) * inverse};
  }
}

template <class T>
T sum_of_lanes(Vector<T> v) {
  T total = 0;
  for (int i = 0; i < lanes<T>; ++i) total += v[i];
  return total;
}

// The scores of some keys, each the sum of a chain of its own.
template <class S>
void additive_scores(const S* query, const S* const (&keys)[keys_together], const S* weight, int64_t size,
                     Compute<S>* const (&to)[keys_together]) {
  using T = Compute<S>;
  constexpr int L = lanes<T>;
  Vector<T> sum[keys_together] = {};
  const auto add = [&](int64_t a, auto load) {
    const Vector<T> q = load(query + a), w = load(weight + a);
    Vector<T> x[keys_together];
    TanhAndSlope<T> y[keys_together];
#pragma GCC unroll 8
    for (int i = 0; i < keys_together; ++i) x[i] = q + load(keys[i] + a);
    tanhs_and_slopes<T, keys_together>(x, y);
#pragma GCC unroll 8
    for (int i = 0; i < keys_together; ++i) sum[i] += w * y[i].tanh;
  };
  const int64_t whole = size / L * L;
  for (int64_t a = 0; a < whole; a += L) add(a, [](const S* from) { return load_vector(from); });
  if (whole < size) add(whole, [&](const S* from) { return load_first(from, size - whole); });  // the weight's are 0 beyond
  for (int i = 0; i < keys_together; ++i) *to[i] = sum_of_lanes<T>(sum[i]);
}

template <class S>
Compute<S> dot_score(const S* query, const S* key, double scale, int64_t size) {
  using T = Compute<S>;
  constexpr int L = lanes<T>;
  Vector<T> sum = {};
  for (int64_t a = 0; a < size; a += L) sum += load_first(query + a, size - a) * load_first(key + a, size - a);
  return sum_of_lanes<T>(sum) * static_cast<T>(scale);
}

// The scores of keys [first, last), -inf where hidden. to: [S].
template <class S>
void scores(const AdditiveView<S>& view, int64_t b, int64_t t, int64_t first, int64_t last, Compute<S>* to) {
  using T = Compute<S>;
  const int64_t size = view.p.shape.size;
  const S* keys[keys_together];
  T* results[keys_together];
  int waiting = 0;
  for (int64_t s = first; s < last; ++s) {
    if (!view.seen(b, t, s)) {
      to[s] = -static_cast<T>(__builtin_inf());
    } else if (!view.weight()) {
      to[s] = dot_score(view.query(b, t), view.key(b, s), view.p.scale, size);
    } else {
      keys[waiting] = view.key(b, s), results[waiting] = to + s;
      if (++waiting < keys_together) continue;
      additive_scores<S>(view.query(b, t), keys, view.weight(), size, results);
      waiting = 0;
    }
  }
  if (!waiting) return;
  for (int i = waiting; i < keys_together; ++i) keys[i] = keys[0], results[i] = results[0];  // the same once more
  additive_scores<S>(view.query(b, t), keys, view.weight(), size, results);
}

// Scores, -inf where hidden, become weights.
template <class T>
void additive_softmax(T* row, int64_t keys) {
  constexpr int L = lanes<T>;
  T top = -static_cast<T>(__builtin_inf());
  for (int64_t s = 0; s < keys; ++s) top = row[s] > top ? row[s] : top;
  if (top == -static_cast<T>(__builtin_inf())) top = T{};  // nothing is seen, or NaN only
  Vector<T> sums = {};
  for (int64_t s = 0; s < keys; s += L) {
    const int64_t count = min<int64_t>(L, keys - s);
    Vector<T> score = Vector<T>{} - static_cast<T>(__builtin_inf());
    for (int64_t i = 0; i < count; ++i) score[i] = row[s + i];
    const Vector<T> weight = exp2<T>((score - top) * static_cast<T>(log2_e));
    sums += weight;
    store_first(weight, row + s, count);
  }
  T sum = {};
  for (int i = 0; i < L; ++i) sum += sums[i];
  if (sum == 0) return;
  for (int64_t s = 0; s < keys; ++s)
    if (row[s] != 0) row[s] /= sum;  // a hidden key's 0 stays, even if the sum is NaN
}

// Sums over keys of `feature_block` features: chains of key_chain keys, added up in order.
template <class T>
struct ChainedSums {
  T chain[feature_block] = {}, total[feature_block] = {};
  void add(int64_t a, Vector<T> v) { store_as(chain + a, load_as<Vector<T>>(chain + a) + v); }
  void end_chain() {
    for (int64_t a = 0; a < feature_block; ++a) total[a] += chain[a], chain[a] = T{};
  }
};

// The context of one query: the values' mean under its weights.
template <class S>
void weighted_mean(const AdditiveWeights& args, int64_t row) {
  using T = Compute<S>;
  constexpr int L = lanes<T>;
  const AdditiveShape& shape = args.problem.shape;
  const T* const weights = static_cast<const T*>(args.weights) + row * shape.keys;
  const S* const values = static_cast<const S*>(args.values) + row / shape.queries * shape.keys * args.value_size;
  S* const context = static_cast<S*>(args.context) + row * args.context_stride;
  for (int64_t first = 0; first < args.value_size; first += feature_block) {
    const int64_t count = min(feature_block, args.value_size - first);
    ChainedSums<T> sums;
    for (int64_t s = 0; s < shape.keys; ++s) {
      const S* const value = values + s * args.value_size + first;
      if (weights[s] != 0)
        for (int64_t a = 0; a < count; a += L) sums.add(a, weights[s] * load_first(value + a, count - a));
      if (s % key_chain == key_chain - 1 || s == shape.keys - 1) sums.end_chain();
    }
    for (int64_t a = 0; a < count; ++a) from_compute(sums.total[a], context + first + a);
  }
}

template <class S>
void additive_weights(const AdditiveWeights& args, const ThreadPool& pool) {
  using T = Compute<S>;
  const AdditiveShape& shape = args.problem.shape;
  const AdditiveView<S> view = {args.problem};
  T* const weights = static_cast<T*>(args.weights);
  const int64_t blocks = ceil_div(shape.keys, key_block_size), rows = shape.batch * shape.queries;
  parallel_for(pool, rows * blocks, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t row = unit / blocks, b = row / shape.queries, t = row % shape.queries;
      const int64_t first = unit % blocks * key_block_size, last = min(first + key_block_size, shape.keys);
      scores(view, b, t, first, last, weights + row * shape.keys);
    }
  });
  parallel_for(pool, rows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      additive_softmax(weights + row * shape.keys, shape.keys);
      if (args.context) weighted_mean<S>(args, row);
    }
  });
}

// The scores' gradients of one query, [S]; 0 where hidden.
template <class S>
void score_grads(const AdditiveWeightsBackward& args, const AdditiveView<S>& view, int64_t b, int64_t t, Compute<S>* to) {
  using T = Compute<S>;
  const AdditiveShape& shape = args.problem.shape;
  const int64_t row = (b * shape.queries + t) * shape.keys;
  const T* const weights = static_cast<const T*>(args.weights) + row;
  const T* const grads = static_cast<const T*>(args.grad_weights) + row;
  double mean = 0;
  for (int64_t s = 0; s < shape.keys; ++s)
    if (view.seen(b, t, s)) mean += static_cast<double>(weights[s]) * grads[s];
  for (int64_t s = 0; s < shape.keys; ++s)
    to[s] = view.seen(b, t, s) ? static_cast<T>(weights[s] * (grads[s] - mean)) : T{};
}

// A number for a template, told by an argument's type.
template <int n>
struct Constant {
  static constexpr int value = n;
};

// Sums of a vector of features that one query's backward pass forms over a chain of keys.
template <class T>
struct ChainGrads {
  Vector<T> query = {}, weight = {};
};

// One query, keys [first, last), one vector of features: give(s, share) takes what they give to key s.
template <class T, class Seen, class Load, class Give>
ChainGrads<T> chain_grads(Vector<T> query, const T* grad_scores, int64_t first, int64_t last, Seen seen, Load key, Give give) {
  ChainGrads<T> sums;
  const auto add = [&](int64_t s, auto together) {
    constexpr int N = decltype(together)::value;
    Vector<T> x[N];
    TanhAndSlope<T> y[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) x[i] = query + key(s + i);
    tanhs_and_slopes<T, N>(x, y);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      const Vector<T> share = grad_scores[s + i] * y[i].slope;
      give(s + i, share);
      sums.query += share;
      sums.weight += grad_scores[s + i] * y[i].tanh;
    }
  };
  for (int64_t s = first; s < last;) {
    int seen_together = 0;
    while (seen_together < min<int64_t>(keys_together, last - s) && seen(s + seen_together)) ++seen_together;
    if (seen_together == keys_together) {
      add(s, Constant<keys_together>{});
      s += keys_together;
    } else if (seen_together) {
      add(s++, Constant<1>{});
    } else {
      give(s++, Vector<T>{});
    }
  }
  return sums;
}

// to (+)= the first `count` elements of value.
template <class T, class To>
[[gnu::always_inline]] inline void put(Vector<T> value, To* to, int64_t count, bool add) {
  if (count < lanes<T>)
    store_first(add ? load_first(to, count) + value : value, to, count);
  else if (add)
    store_vector(load_vector(to) + value, to);
  else
    store_vector(value, to);
}

// The gradients of one sample for features [first, first + count). key_sums: [S][feature_block], which one query alone does
// without; grad_scores: [S].
template <class S>
void additive_backward_block(const AdditiveWeightsBackward& args, int64_t b, int64_t first, int64_t count,
                             Compute<S>* key_sums, Compute<S>* grad_scores) {
  using T = Compute<S>;
  constexpr int L = lanes<T>;
  const AdditiveShape& shape = args.problem.shape;
  const AdditiveView<S> view = {args.problem};
  const S* const weight = view.weight() + first;
  S* const grad_keys = static_cast<S*>(args.grad_key) + b * shape.keys * shape.size + first;
  const int64_t size = shape.size;
  const bool only_query = shape.queries == 1;
  T weight_sums[feature_block] = {};
  if (!shape.queries)
    for (int64_t i = 0; i < shape.keys * feature_block; ++i) key_sums[i] = T{};
  for (int64_t t = 0; t < shape.queries; ++t) {
    score_grads(args, view, b, t, grad_scores);
    T query_sums[feature_block] = {};
    // A vector of features at a time: its sums over a chain of keys stay in registers, the chain's keys in the first cache.
    for (int64_t s = 0, last; s < shape.keys; s = last) {
      last = min(s + key_chain, shape.keys);
      for (int64_t a = 0; a < count; a += L) {
        const S* const keys = view.key(b, 0) + first + a;
        const auto chain = [&](auto seen, auto load, int64_t width) {
          const Vector<T> factor = load(weight + a);
          const auto give = [&](int64_t k, Vector<T> share) {
            if (only_query)
              put<T>(share * factor, grad_keys + k * size + a, width, args.add);
            else
              put<T>(share, key_sums + k * feature_block + a, L, t > 0);
          };
          return chain_grads<T>(load(view.query(b, t) + first + a), grad_scores, s, last, seen,
                                [&](int64_t k) { return load(keys + k * size); }, give);
        };
        const auto seen = [&](int64_t k) { return view.seen(b, t, k); };
        const auto load_some = [&](const S* from) { return load_first(from, count - a); };
        const auto load_whole = [&](const S* from) {
          __builtin_prefetch(from + key_chain * size);  // of the next chain
          return load_vector(from);
        };
        const bool masked = args.problem.mask != nullptr;
        const ChainGrads<T> sums = count - a < L || masked ? chain(seen, load_some, count - a)
                                                           : chain([](int64_t) { return true; }, load_whole, L);
        store_as(query_sums + a, load_as<Vector<T>>(query_sums + a) + sums.query);
        store_as(weight_sums + a, load_as<Vector<T>>(weight_sums + a) + sums.weight);
      }
    }
    S* const grad_query = static_cast<S*>(args.grad_query) + (b * shape.queries + t) * shape.size + first;
    for (int64_t a = 0; a < count; a += L)  // of query + key, whose derivative is weight times the slope
      store_first(load_as<Vector<T>>(query_sums + a) * load_first(weight + a, count - a), grad_query + a, count - a);
  }
  for (int64_t s = 0; !only_query && s < shape.keys; ++s)
    for (int64_t a = 0; a < count; a += L)
      put<T>(load_as<Vector<T>>(key_sums + s * feature_block + a) * load_first(weight + a, count - a),
             grad_keys + s * size + a, count - a, args.add);
  T* const grad_weight = static_cast<T*>(args.grad_weight) + b * shape.size + first;
  for (int64_t a = 0; a < count; a += L) put<T>(load_as<Vector<T>>(weight_sums + a), grad_weight + a, count - a, args.add);
}

template <class S>
void additive_weights_backward(const AdditiveWeightsBackward& args, const ThreadPool& pool) {
  using T = Compute<S>;
  const AdditiveShape& shape = args.problem.shape;
  const int64_t blocks = ceil_div(shape.size, feature_block);
  parallel_for(pool, shape.batch * blocks, [&](int64_t begin, int64_t end) {
    const int64_t elements = max<int64_t>(1, shape.keys) * (feature_block + 1);
    T* const key_sums = static_cast<T*>(thread_scratch(ScratchUse::worker, elements * static_cast<int64_t>(sizeof(T))));
    T* const grad_scores = key_sums + shape.keys * feature_block;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit % blocks * feature_block;
      additive_backward_block<S>(args, unit / blocks, first, min(feature_block, shape.size - first), key_sums,
                                 grad_scores);
    }
  });
}

// Calls run(S{}) for the storage type S of `dtype`.
template <class Run>
void with_storage(DType dtype, Run&& run) {
  switch (dtype) {
    case DType::f32: return run(float{});
    case DType::f64: return run(double{});
    case DType::bf16: return run(Bf16{});
    case DType::f16: return run(F16{});
  }
}

void forward(const AdditiveWeights& args, const ThreadPool& pool) {
  with_storage(args.problem.dtype, [&](auto s) { additive_weights<decltype(s)>(args, pool); });
}

void backward(const AdditiveWeightsBackward& args, const ThreadPool& pool) {
  with_storage(args.problem.dtype, [&](auto s) { additive_weights_backward<decltype(s)>(args, pool); });
}

}  // namespace

namespace CVFAST_ISA {
extern const AdditiveAttentionKernels additive_attention;
const AdditiveAttentionKernels additive_attention = {forward, backward};
}  // namespace CVFAST_ISA

}  // namespace cvfast
