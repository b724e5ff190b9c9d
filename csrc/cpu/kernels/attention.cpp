// Softmax attention for one instruction set; see conv2d.cpp. Exports cvfast::<CVFAST_ISA>::attention and nothing else.
#include "../kernel_table.h"
#include "attention_backward.h"

namespace cvfast {
namespace {

void forward(const AttentionForward& args, const ThreadPool& pool) {
  args.problem.dtype == DType::f64 ? attention_forward<double>(args, pool) : attention_forward<float>(args, pool);
}

void backward(const AttentionBackward& args, const ThreadPool& pool) {
  args.problem.dtype == DType::f64 ? attention_backward<double>(args, pool) : attention_backward<float>(args, pool);
}

}  // namespace

namespace CVFAST_ISA {
extern const AttentionKernels attention;
const AttentionKernels attention = {forward, backward};
}  // namespace CVFAST_ISA

}  // namespace cvfast
