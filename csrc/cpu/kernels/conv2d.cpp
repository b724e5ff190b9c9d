// 2-D convolution for one instruction set: compiled once for each with -DCVFAST_ISA=<name>, -DCVFAST_VECTOR_BYTES=<16, 32
// or 64> and that instruction set's flags. Exports cvfast::<CVFAST_ISA>::conv2d and nothing else.
#include "../chosen_algorithm.h"
#include "../kernel_table.h"
#include "conv2d_bias_grad.h"
#include "conv2d_depthwise.h"
#include "conv2d_depthwise_weight_grad.h"
#include "conv2d_direct.h"
#include "conv2d_direct_weight_grad.h"
#include "conv2d_dots.h"
#include "conv2d_implicit_gemm.h"
#include "conv2d_live_taps.h"
#include "conv2d_pooling.h"
#include "conv2d_winograd.h"
#include "conv2d_winograd_weight_grad.h"

namespace cvfast {
namespace {

template <class Problem>
bool never(const Problem&) { return false; }

template <class Problem>
struct Algorithm {
  const char* name;
  bool (*applies)(const Problem&);
  void (*run)(const Problem&, const ThreadPool&);
  bool (*pools)(const Problem&) = never;  // whether it can pool its own results, in the forward pass
  // Of an algorithm that takes packed weights.
  Conv2dPacking (*packing)(const Problem&) = nullptr;
  void (*pack)(const Problem&, PackedHeader&, const ThreadPool&) = nullptr;
};

template <class Problem>
bool always(const Problem&) { return true; }

// For each of the three products and each storage type S: the first algorithm that applies is taken; the last one
// always does.
template <class S>
constexpr Algorithm<Conv2dForward> forward_algorithms[] = {
    {"depthwise", depthwise_applies, correlate_depthwise<S>},
    {"Winograd", winograd_applies, correlate_by_winograd<3, S>, winograd_pools, winograd_packing<3, S>, winograd_pack<3, S>},
    {"Winograd on phases", winograd_on_phases_applies, correlate_by_winograd<2, S>, winograd_pools, winograd_packing<2, S>,
     winograd_pack<2, S>},
    {"dot products", dots_apply, correlate_by_dots<S>},
    {"direct", direct_applies, correlate_direct<S>, always},
    {"implicit GEMM", always, correlate_by_gemm<S>, never, gemm_packing<S>, gemm_pack<S>},
};
template <class S>
constexpr Algorithm<Conv2dInputGrad> input_grad_algorithms[] = {
    {"depthwise", depthwise_applies, correlate_depthwise<S>},
    {"Winograd", winograd_applies, correlate_by_winograd<3, S>, never, winograd_packing<3, S>, winograd_pack<3, S>},
    {"Winograd on phases", winograd_on_phases_applies, correlate_by_winograd<2, S>, never, winograd_packing<2, S>,
     winograd_pack<2, S>},
    {"direct", direct_applies, correlate_direct<S>},
    {"implicit GEMM", always, correlate_by_gemm<S>, never, gemm_packing<S>, gemm_pack<S>},
};
template <class S>
constexpr Algorithm<Conv2dWeightGrad> weight_grad_algorithms[] = {
    {"depthwise", depthwise_applies, weight_grad_depthwise<S>},
    {"Winograd", winograd_applies, weight_grad_by_winograd<3, S>},
    {"Winograd on phases", winograd_on_phases_applies, weight_grad_by_winograd<2, S>},
    {"direct", direct_applies, weight_grad_direct<S>},
    {"implicit GEMM", always, weight_grad_by_gemm<S>},
};

template <class Problem>
const Algorithm<Problem>& first_of(const Algorithm<Problem>* algorithm, const Problem& problem) {
  while (!algorithm->applies(problem)) ++algorithm;
  set_chosen_algorithm(algorithm->name);
  return *algorithm;
}
template <class Problem>
void run_first(const Algorithm<Problem>* algorithms, const Problem& problem, const ThreadPool& pool) {
  first_of(algorithms, problem).run(problem, pool);
}

// Calls run(S{}) for the storage type S of `dtype`.
template <class Run>
void with_storage_type(DType dtype, Run&& run) {
  switch (dtype) {
    case DType::f32: return run(float{});
    case DType::f64: return run(double{});
    case DType::bf16: return run(Bf16{});
    case DType::f16: return run(F16{});
  }
}

void forward(const Conv2dForward& whole, const ThreadPool& pool) {
  with_storage_type(whole.dtype, [&]<class S>(S) {
    const Conv2dForward problem = with_live_taps<S>(whole, pool);
    const Algorithm<Conv2dForward>& algorithm = first_of(forward_algorithms<S>, problem);
    if (problem.epilogue.pooling == Pooling::none || algorithm.pools(problem))
      algorithm.run(problem, pool);
    else
      forward_then_pool<S>(problem, algorithm.run, pool);
  });
}

void input_grad(const Conv2dInputGrad& problem, const ThreadPool& pool) {
  with_storage_type(problem.dtype, [&](auto s) { run_first(input_grad_algorithms<decltype(s)>, problem, pool); });
}

void weight_grad(const Conv2dWeightGrad& whole, const ThreadPool& pool) {
  with_storage_type(whole.dtype,
                    [&]<class S>(S) { run_first(weight_grad_algorithms<S>, with_live_taps<S>(whole, pool), pool); });
}

void bias_grad(const Conv2dBiasGrad& problem, const ThreadPool& pool) {
  with_storage_type(problem.dtype, [&]<class S>(S) { bias_grad<S>(problem, pool); });
}

template <class Problem>
Conv2dPacking packing_of(const Algorithm<Problem>& algorithm, const Problem& problem) {
  return algorithm.packing ? algorithm.packing(problem) : Conv2dPacking{};
}

// Packs the weights for the algorithm, which takes some form.
template <class Problem>
PackedHeader& pack_for(const Algorithm<Problem>& algorithm, const Problem& problem, void* to, const ThreadPool& pool) {
  PackedHeader& header = *static_cast<PackedHeader*>(to);
  header = {packed_origin(problem, static_cast<PackedForm>(algorithm.packing(problem).form)), true};
  algorithm.pack(problem, header, pool);
  return header;
}

Conv2dPacking packing(const Conv2dForward& whole) {
  const Conv2dForward problem = LiveTaps(whole.shape).of(whole);
  Conv2dPacking result = {};
  with_storage_type(problem.dtype,
                    [&]<class S>(S) { result = packing_of(first_of(forward_algorithms<S>, problem), problem); });
  return result;
}

void pack(const Conv2dForward& whole, void* to, const ThreadPool& pool) {
  const LiveTaps taps(whole.shape);
  const Conv2dForward problem = taps.of(whole);
  with_storage_type(problem.dtype, [&]<class S>(S) {
    PackedHeader& header = pack_for(first_of(forward_algorithms<S>, problem), problem, to, pool);
    header.finite = header.finite && (taps.all || weights_finite<S>(whole, pool));
  });
}

Conv2dPacking input_grad_packing(const Conv2dInputGrad& problem) {
  Conv2dPacking result = {};
  with_storage_type(problem.dtype,
                    [&]<class S>(S) { result = packing_of(first_of(input_grad_algorithms<S>, problem), problem); });
  return result;
}

void input_grad_pack(const Conv2dInputGrad& problem, void* to, const ThreadPool& pool) {
  with_storage_type(problem.dtype,
                    [&]<class S>(S) { pack_for(first_of(input_grad_algorithms<S>, problem), problem, to, pool); });
}

}  // namespace

namespace CVFAST_ISA {
extern const Conv2dKernels conv2d;
const Conv2dKernels conv2d = {forward, input_grad, weight_grad, bias_grad, packing, pack, input_grad_packing, input_grad_pack};
}  // namespace CVFAST_ISA

}  // namespace cvfast
