#include "isa.h"

#include <atomic>
#include <stdexcept>

namespace cvfast {

// What each file of kernels/ exports for the instruction set, and the table of it. Names of namespaces are no values, so
// these two are macros.
#define CVFAST_DECLARE(isa) \
  namespace isa { \
    extern const Conv2dKernels conv2d; \
    extern const RecurrentKernels recurrent; \
    extern const AttentionKernels attention; \
    extern const AdditiveAttentionKernels additive_attention; \
    extern const BatchedProductKernel batched_product; \
    extern const BatchNormKernels batch_norm; \
    extern const GeluKernels gelu; \
    extern const LayerNormKernel layer_norm; \
    extern const PoolingKernels pooling; \
    extern const PeakKernels peak; \
  }
#define CVFAST_TABLE(isa, vector_bytes) \
  KernelTable{#isa, vector_bytes, isa::conv2d.forward, isa::conv2d.input_grad, isa::conv2d.weight_grad, isa::conv2d.bias_grad, \
              isa::conv2d.packing, isa::conv2d.pack, isa::conv2d.input_grad_packing, isa::conv2d.input_grad_pack, \
              isa::recurrent, isa::attention, isa::additive_attention, isa::batched_product, isa::batch_norm, isa::gelu, \
              isa::layer_norm, isa::pooling, isa::peak}

// CVFAST_BASELINE_ONLY: for a build that leaves the other ones out, under sanitizers say.
#if defined(__x86_64__) && !defined(CVFAST_BASELINE_ONLY)
#define CVFAST_X86
#endif

#if defined(CVFAST_X86)
CVFAST_DECLARE(baseline)
CVFAST_DECLARE(avx2)
#if defined(CVFAST_EMULATED512)
CVFAST_DECLARE(emulated512)
#else
CVFAST_DECLARE(avx512)
#endif
#elif defined(__aarch64__)
CVFAST_DECLARE(neon)
#else
CVFAST_DECLARE(baseline)
#endif

namespace {

struct Variant {
  KernelTable table;
  bool runnable;
};

// Best last.
const std::vector<Variant>& variants() {
#if defined(CVFAST_X86)
  static const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  [[maybe_unused]] static const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const std::vector<Variant> all = {
#if defined(CVFAST_EMULATED512)
      {CVFAST_TABLE(emulated512, 64), has_avx2},
#endif
      {CVFAST_TABLE(baseline, 16), true},
      {CVFAST_TABLE(avx2, 32), has_avx2},
#if !defined(CVFAST_EMULATED512)
      {CVFAST_TABLE(avx512, 64), has_avx512},
#endif
  };
#elif defined(__aarch64__)
  static const std::vector<Variant> all = {{CVFAST_TABLE(neon, 16), true}};
#else
  static const std::vector<Variant> all = {{CVFAST_TABLE(baseline, 16), true}};
#endif
  return all;
}

const KernelTable& best() {
  const KernelTable* found = nullptr;
  for (const Variant& variant : variants())
    if (variant.runnable) found = &variant.table;
  return *found;  // the last of them runs everywhere or a later one does
}

std::atomic<const KernelTable*>& active() {
  static std::atomic<const KernelTable*> table{&best()};
  return table;
}

}  // namespace

const KernelTable& kernels() { return *active().load(std::memory_order_acquire); }

const KernelTable& kernels(const std::string& name) {
  std::string available;
  for (const Variant& variant : variants()) {
    if (!variant.runnable) continue;
    if (name == variant.table.isa) return variant.table;
    available += (available.empty() ? "" : ", ") + std::string(variant.table.isa);
  }
  throw std::invalid_argument("unknown or unavailable instruction set '" + name + "'; available here: " + available);
}

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Variant& variant : variants()) names.emplace_back(variant.table.isa);
  return names;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Variant& variant : variants())
    if (variant.runnable) names.emplace_back(variant.table.isa);
  return names;
}

std::string best_isa() { return best().isa; }

std::string active_isa() { return kernels().isa; }

void set_isa(const std::string& name) { active().store(&kernels(name), std::memory_order_release); }

bool made_by_intel() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

bool halves_avx512() {
#if defined(__x86_64__)
  return __builtin_cpu_is("amdfam19h");
#else
  return false;
#endif
}

}  // namespace cvfast
