// Recurrent layers for one instruction set; see conv2d.cpp. Exports cvfast::<CVFAST_ISA>::recurrent and nothing else.
#include "../kernel_table.h"
#include "recurrent_backward.h"
#include "recurrent_forward.h"
#include "recurrent_single_step.h"

namespace cvfast {
namespace {

template <class T>
void run_forward(const RecurrentForward& problem, const ThreadPool& pool) {
  if (single_step_applies(problem)) SingleStep<T>(problem).run(pool);
  else Forward<T>(problem).run(pool);
}

// bfloat16 and float16 are stored narrow and computed in float32.
void forward(const RecurrentForward& problem, const ThreadPool& pool) {
  problem.dtype == DType::f64 ? run_forward<double>(problem, pool) : run_forward<float>(problem, pool);
}

void backward(const RecurrentBackward& problem, const ThreadPool& pool) {
  problem.dtype == DType::f64 ? Backward<double>(problem).run(pool) : Backward<float>(problem).run(pool);
}

}  // namespace

namespace CVFAST_ISA {
extern const RecurrentKernels recurrent;
const RecurrentKernels recurrent = {forward, backward};
}  // namespace CVFAST_ISA

}  // namespace cvfast
