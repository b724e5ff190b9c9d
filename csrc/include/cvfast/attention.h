// Softmax attention, as torch.nn.functional.scaled_dot_product_attention defines it. For query i and key j of one head,
//   score[i, j]  = scale * sum over d of query[i, d] * key[j, d]  + bias[i, j]
//   weight[i, j] = exp(score[i, j]) / sum over visible j' of exp(score[i, j']);  0 where j is not visible from i
//   output[i]    = sum over j of weight[i, j] * dropout[i, j] * value[j]
// Head h of the queries sees head h / (H/Hk) of the keys and values.
#pragma once
#include "common.h"

namespace cvfast {

struct AttentionShape {
  int64_t batch;       // B
  int64_t heads;       // H, a multiple of key_heads
  int64_t key_heads;   // Hk
  int64_t queries;     // L
  int64_t keys;        // S
  int64_t size;        // D, of a query and of a key
  int64_t value_size;  // Dv
};

// Key j is visible from query i of sample b if all of these hold. A key that is visible from no query is never read,
// nor is its value; a value reaches only the queries that see its key, NaN or not.
struct AttentionVisibility {
  int64_t left, right;         // i - left <= j <= i + right; both >= 0
  const int64_t* key_lengths;  // [B]: j < key_lengths[b]; nullptr: all
  ConstTensor4 mask;           // bool [B, H, L, S]: mask[b, h, i, j]; stride 0 where broadcast; data nullptr: all
};

// Weights are dropped with `probability`, the others divided by 1 - probability. Which ones depends on the seed and on the
// weight's place (b * H + h, i, j) alone: attention_dropout.h. probability 0: none.
struct AttentionDropout {
  double probability;
  uint64_t seed;
};

struct AttentionProblem {
  AttentionShape shape;
  DType dtype;             // of query, key and value
  ConstTensor4 query;      // [B, H, L, D]
  ConstTensor4 key;        // [B, Hk, S, D]
  ConstTensor4 value;      // [B, Hk, S, Dv]
  ConstTensor4 bias;       // [B, H, L, S], stride 0 where broadcast; data nullptr: none. -inf hides a key from a query.
  DType bias_dtype;
  double scale;
  AttentionVisibility visible;
  AttentionDropout dropout;
};

// A query that sees no key has output 0, log_sum -inf and gradients 0. Every size may be 0. Results are uninitialised on
// entry and fully written on return, and never overlap an operand. They are the same bits for any number of threads, for
// a sample alone or in a batch, and for any strides.

struct AttentionForward {
  AttentionProblem problem;
  Tensor4 output;  // [B, H, L, Dv]
  void* log_sum;   // [B, H, L], contiguous, in the compute type: log of the sum of exp(score); nullptr: not wanted
};

struct AttentionBackward {
  AttentionProblem problem;
  ConstTensor4 output;                  // [B, H, L, Dv]
  const void* log_sum;                  // [B, H, L], contiguous, in the compute type
  ConstTensor4 grad_output;             // [B, H, L, Dv]
  const void* grad_log_sum;             // as log_sum; nullptr: 0
  Tensor4 grad_query, grad_key, grad_value;  // as query, key and value
  // Contiguous [b, h, l, s], in the compute type, each size 1 where the bias is broadcast and else B, H, L or S;
  // nullptr: not wanted.
  void* grad_bias;
  int64_t grad_bias_size[4];
};

}  // namespace cvfast
