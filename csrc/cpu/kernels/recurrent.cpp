// Recurrent layers for one instruction set; see conv2d.cpp. Exports cvfast::<CVFAST_ISA>::recurrent and nothing else.
#include "../kernel_table.h"
#include "recurrent_backward.h"
#include "recurrent_forward.h"
#include "recurrent_single_step.h"

namespace cvfast {
namespace {

template <class T>
void run_forward(const RecurrentForward& problem, const ThreadPool& pool) {
  if (single_step_applies(problem) && !problem.packed) SingleStep<T>(problem).run(pool);
  else Forward<T>(problem).run(pool);
}

// bfloat16 and float16 are stored narrow and computed in float32.
void forward(const RecurrentForward& problem, const ThreadPool& pool) {
  problem.dtype == DType::f64 ? run_forward<double>(problem, pool) : run_forward<float>(problem, pool);
}

void backward(const RecurrentBackward& problem, const ThreadPool& pool) {
  problem.dtype == DType::f64 ? Backward<double>(problem).run(pool) : Backward<float>(problem).run(pool);
}

template <class T>
void run_lstm_cell_backward(const LstmCellBackward& p, const ThreadPool& pool) {
  constexpr int L = lanes<T>;
  const CellKind<T>& cell = cell_kind<T>(RecurrentCell::lstm);
  const int64_t hidden = p.hidden, units = round_up(hidden, L);
  parallel_for(pool, p.batch, [&](int64_t begin, int64_t end) {
    T* const dh = static_cast<T*>(thread_scratch(ScratchUse::worker, 2 * units * sizeof(T)));
    T* const dc = dh + units;  // the cell takes whole vectors
    zero_row(dh, 2 * units);
    for (int64_t row = begin; row < end; ++row) {
      T* const grad_c = static_cast<T*>(p.grad_c) + row * hidden;
      copy_row(static_cast<const T*>(p.grad_h) + row * hidden, dh, hidden);
      copy_row(grad_c, dc, hidden);
      cell.backward({hidden, 0, hidden, static_cast<const T*>(p.saved) + row * cell.saved * hidden,
                     static_cast<const T*>(p.c) + row * p.c_stride, dh, dc,
                     static_cast<T*>(p.grad_gates) + row * p.grad_gates_stride});
      copy_row(dc, grad_c, hidden);
    }
  });
}

void lstm_cell_backward(const LstmCellBackward& problem, const ThreadPool& pool) {
  problem.dtype == DType::f64 ? run_lstm_cell_backward<double>(problem, pool) : run_lstm_cell_backward<float>(problem, pool);
}

template <class T>
int64_t packed_bytes_of(const RecurrentForward& problem) { return Forward<T>(problem).packed_bytes(); }

// A call without samples and steps that has these weights.
RecurrentForward call_of(const RecurrentPack& p) {
  RecurrentForward call = {};
  call.cell = p.cell, call.dtype = p.dtype, call.shape = p.shape, call.weights = p.weights;
  return call;
}

int64_t packed_bytes(const RecurrentPack& p) {
  return p.dtype == DType::f64 ? packed_bytes_of<double>(call_of(p)) : packed_bytes_of<float>(call_of(p));
}

void pack(const RecurrentPack& p, void* to, const ThreadPool& pool) {
  const RecurrentForward call = call_of(p);
  p.dtype == DType::f64 ? Forward<double>(call).pack_into(to, pool) : Forward<float>(call).pack_into(to, pool);
}

}  // namespace

namespace CVFAST_ISA {
extern const RecurrentKernels recurrent;
const RecurrentKernels recurrent = {forward, backward, lstm_cell_backward, packed_bytes, pack};
}  // namespace CVFAST_ISA

}  // namespace cvfast
