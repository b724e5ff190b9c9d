// The weights of additive attention (Bahdanau et al. 2015), without a tensor [B, T, S, A]: softmax over s of
//   score[b, t, s] = sum over a of weight[a] * tanh(query[b, t, a] + key[b, s, a])
// with query and key already projected to A features. A query that sees no key has weights and gradients 0. Forward, the
// score may be the dot product instead: scale * sum over a of query[b, t, a] * key[b, s, a].
#pragma once
#include "common.h"

namespace cvfast {

struct AdditiveShape {
  int64_t batch, queries, keys, size;  // B, T, S, A
};

// Query, key and weight are contiguous; mask is bool [B, T, S] with strides (0 where broadcast), data nullptr: all seen.
// Keys that the mask hides are not read. Every size may be 0. Results are fully written, and the same bits for any number
// of threads and for a sample alone or in a batch.
struct AdditiveProblem {
  AdditiveShape shape;
  DType dtype;
  const void *query, *key, *weight;  // [B, T, A], [B, S, A], [A]; weight nullptr: dot products
  double scale;                      // of dot products
  const unsigned char* mask;
  int64_t mask_stride[3];
};

struct AdditiveWeights {
  AdditiveProblem problem;
  void* weights;  // [B, T, S], contiguous, in the compute type; 0 where hidden
  // context [B, T, E], its rows context_stride elements apart, = weights values, of values [B, S, E], contiguous; nullptr:
  // not wanted. A value whose weights are 0 takes no part, NaN or not.
  const void* values;
  int64_t value_size;
  void* context;
  int64_t context_stride;
};

struct AdditiveWeightsBackward {
  AdditiveProblem problem;
  const void *grad_weights, *weights;  // [B, T, S], contiguous, in the compute type
  void *grad_query, *grad_key;         // [B, T, A], [B, S, A]
  void* grad_weight;                   // [B, A], in the compute type: to be added up over B
  bool add;                            // grad_key and grad_weight are added to what is there
};

}  // namespace cvfast
