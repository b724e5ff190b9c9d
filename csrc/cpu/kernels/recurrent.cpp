// Recurrent layers for one instruction set; see conv2d.cpp. Exports cvfast::<CVFAST_ISA>::recurrent and nothing else.
#include "../kernel_table.h"
#include "recurrent_backward.h"
#include "recurrent_forward.h"
#include "recurrent_single_step.h"

namespace cvfast {
namespace {

// Calls run(Cell{}) for the cell that computes in T.
template <class T, class Run>
void with_cell(RecurrentCell cell, Run&& run) {
  switch (cell) {
    case RecurrentCell::lstm: return run(LstmCell<T>{});
    case RecurrentCell::gru: return run(GruCell<T>{});
    case RecurrentCell::rnn_tanh: return run(RnnCell<T, false>{});
    case RecurrentCell::rnn_relu: return run(RnnCell<T, true>{});
  }
}
template <class Run>
void with_cell(DType dtype, RecurrentCell cell, Run&& run) {
  if (dtype == DType::f64) with_cell<double>(cell, run);
  else with_cell<float>(cell, run);
}

template <class Cell>
void run_forward(const RecurrentForward& problem, const ThreadPool& pool) {
  if (!single_step_applies(problem)) return Forward<Cell>(problem).run(pool);
  with_storage<typename Cell::Element>(problem.dtype,
                                       [&](auto s) { SingleStep<decltype(s), Cell>(problem).run(pool); });
}

void forward(const RecurrentForward& problem, const ThreadPool& pool) {
  with_cell(problem.dtype, problem.cell, [&](auto cell) { run_forward<decltype(cell)>(problem, pool); });
}

void backward(const RecurrentBackward& problem, const ThreadPool& pool) {
  with_cell(problem.dtype, problem.cell, [&](auto cell) { Backward<decltype(cell)>(problem).run(pool); });
}

}  // namespace

namespace CVFAST_ISA {
extern const RecurrentKernels recurrent;
const RecurrentKernels recurrent = {forward, backward};
}  // namespace CVFAST_ISA

}  // namespace cvfast
