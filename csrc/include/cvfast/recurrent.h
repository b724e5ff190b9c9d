// One layer and direction of a recurrent network, as torch.nn.LSTM, GRU and RNN define them. With x the input at a step,
// h (and c) the state before it, gates in torch's order (i, f, g, o; r, z, n):
//   X = W_ih x + b_ih,  R = W_hh h + b_hh
//   lstm: c' = sigmoid(X_f + R_f) c + sigmoid(X_i + R_i) tanh(X_g + R_g),  h' = sigmoid(X_o + R_o) tanh(c')
//   gru:  r, z = sigmoid(X_r + R_r), sigmoid(X_z + R_z),  n = tanh(X_n + r R_n),  h' = n + z (h - n)
//   rnn:  h' = tanh(X + R) or max(X + R, 0)
// With a projection (W_hr [P, H]), h' is W_hr times what is called h' above.
//
// T steps, B samples, I inputs, H hidden units, O units in the output and in h (P with a projection, else H), G gates
// (lstm 4, gru 3, rnn 1). Every size may be 0. Results never overlap operands and are fully written.
#pragma once
#include "common.h"

namespace cvfast {

enum class RecurrentCell : int32_t { lstm, gru, rnn_tanh, rnn_relu };

// Which samples take part in which step. Samples are worked on by rank: the longest first. With lengths == nullptr every
// sample has all steps, and rank and sample are the same.
struct Sequence {
  int64_t steps, batch;    // T, B
  const int64_t* lengths;  // [B] steps of each rank, not increasing, at most T
  const int64_t* order;    // [B] sample of each rank; nullptr: the same
  const int64_t* first;    // [T + 1] how many (step, rank) pairs come before each step
  bool packed;             // rows lie as in torch's PackedSequence: time 0 of all ranks, then time 1 of those that have it
  bool reverse;            // a sample's steps go from its last time to its first
};

// The rows of a tensor [T, B, width], or [sum of lengths, width] where the sequence is packed (time_stride: unused).
// Elements of a row are contiguous; strides in elements.
struct Rows {
  void* data;
  int64_t time_stride, sample_stride;
};

struct ConstRows {
  const void* data;
  int64_t time_stride, sample_stride;
};

struct RecurrentShape {
  int64_t input, hidden, projected;  // I, H, P (0: no projection; only the lstm has one)
};

// Contiguous; biases (both or none) and projection may be nullptr.
struct RecurrentWeights {
  const void *w_ih, *w_hh;  // [G H, I], [G H, O]
  const void *b_ih, *b_hh;  // [G H]
  const void* w_hr;         // [P, H]
};

// What the derivative needs of the forward pass, a row per (step, rank), in the computing dtype (float32; float64 of
// float64). lstm [5 H]: i, f, g, o, c'; gru [4 H]: r, z, n, R_n; rnn [H]: h'.
constexpr int64_t saved_per_unit(RecurrentCell cell) {
  return cell == RecurrentCell::lstm ? 5 : cell == RecurrentCell::gru ? 4 : 1;
}

// States are [B, O] (c: [B, H]), contiguous, by sample; a sample without steps keeps its initial ones. Rows of the output
// beyond a sample's length become 0. With one step, output and h_n may be the same memory.
struct RecurrentForward {
  RecurrentCell cell;
  DType dtype;
  Sequence sequence;
  RecurrentShape shape;
  RecurrentWeights weights;
  ConstRows input;
  const void *h_0, *c_0;  // c_0, c_n: lstm only
  Rows output;
  void *h_n, *c_n;
  void* saved;  // nullptr: not wanted
  const void* packed;  // what `pack` made of these weights, or nullptr; what was made of others is not used
};

// Weights to be packed ahead of calls of `forward` with more than one step.
struct RecurrentPack {
  RecurrentCell cell;
  DType dtype;
  RecurrentShape shape;
  RecurrentWeights weights;
};

// Gradients of everything, from those of the results (each may be nullptr: zero), in memory that is there where it is
// wanted: for the input, for the weights, always for the states.
struct RecurrentBackward {
  RecurrentCell cell;
  DType dtype;
  Sequence sequence;
  RecurrentShape shape;
  RecurrentWeights weights;
  ConstRows input;
  const void *h_0, *c_0;
  ConstRows output;
  const void* saved;
  ConstRows grad_output;
  const void *grad_h_n, *grad_c_n;
  bool wants_input, wants_weights;
  Rows grad_input;
  void *grad_h_0, *grad_c_0;
  struct {
    void *w_ih, *w_hh, *b_ih, *b_hh, *w_hr;
  } grad_weights;
};

// The derivative of the lstm's cell alone, for layers that multiply with weights themselves: f32 or f64. States are [B, H],
// contiguous, but for rows of c before the step.
struct LstmCellBackward {
  DType dtype;
  int64_t batch, hidden;
  const void* saved;  // [B, 5 H], as forward gave it
  const void* c;      // [B, H] before the step
  int64_t c_stride;
  const void* grad_h;
  void* grad_c;      // to c after the step; becomes that to c before it
  void* grad_gates;  // [B, 4 H], rows grad_gates_stride apart
  int64_t grad_gates_stride;
};

}  // namespace cvfast
