// gelu in training for one instruction set; see conv2d.cpp. Exports cvfast::<CVFAST_ISA>::gelu and nothing else.
#include "gelu.h"

#include "../kernel_table.h"
#include "parallel.h"

namespace cvfast {
namespace {

// Calls body(first, count) for the vectors of so many elements.
template <class Body>
void for_vectors(int64_t elements, const ThreadPool& pool, Body&& body) {
  constexpr int64_t piece = 4096, L = lanes<float>;
  parallel_for(pool, ceil_div(elements, piece), [&](int64_t begin, int64_t end) {
    const int64_t last = min(end * piece, elements);
    int64_t i = begin * piece;
    for (; i + L <= last; i += L) body(i, L);
    if (i < last) body(i, last - i);
  });
}

void run_forward(const GeluForward& args, const ThreadPool& pool) {
  for_vectors(args.count, pool, [&](int64_t i, int64_t count) {
    store_first(gelu(load_first(args.input + i, count)), args.output + i, count);
  });
}

void run_backward(const GeluBackward& args, const ThreadPool& pool) {
  for_vectors(args.count, pool, [&](int64_t i, int64_t count) {
    const FloatVector grad = load_first(args.grad + i, count), x = load_first(args.input + i, count);
    store_first(grad * gelu_derivative(x), args.grad_input + i, count);
  });
}

}  // namespace

namespace CVFAST_ISA {
extern const GeluKernels gelu;
const GeluKernels gelu = {run_forward, run_backward};
}  // namespace CVFAST_ISA

}  // namespace cvfast
