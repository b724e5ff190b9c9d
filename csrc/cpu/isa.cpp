#include "isa.h"

#include <atomic>
#include <stdexcept>

namespace cvfast {

#if defined(__x86_64__)
namespace emulated512 { extern const Conv2dKernels conv2d; extern const PeakKernels peak; }
namespace baseline { extern const Conv2dKernels conv2d; extern const PeakKernels peak; }
namespace avx2 { extern const Conv2dKernels conv2d; extern const PeakKernels peak; }
namespace avx512 { extern const Conv2dKernels conv2d; extern const PeakKernels peak; }
#elif defined(__aarch64__)
namespace neon { extern const Conv2dKernels conv2d; extern const PeakKernels peak; }
#else
namespace baseline { extern const Conv2dKernels conv2d; extern const PeakKernels peak; }
#endif

namespace {

struct Variant {
  KernelTable table;
  bool runnable;
};

KernelTable make_table(const char* isa, int vector_bytes, const Conv2dKernels& conv2d, const PeakKernels& peak) {
  return {isa, vector_bytes, conv2d.forward, conv2d.input_grad, conv2d.weight_grad, peak};
}

// Best last.
const std::vector<Variant>& variants() {
#if defined(__x86_64__)
  static const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  static const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const std::vector<Variant> all = {
      {make_table("emulated512", 64, emulated512::conv2d, emulated512::peak), has_avx2},
      {make_table("baseline", 16, baseline::conv2d, baseline::peak), true},
      {make_table("avx2", 32, avx2::conv2d, avx2::peak), has_avx2},
      {make_table("avx512", 64, avx512::conv2d, avx512::peak), has_avx512},
  };
#elif defined(__aarch64__)
  static const std::vector<Variant> all = {{make_table("neon", 16, neon::conv2d, neon::peak), true}};
#else
  static const std::vector<Variant> all = {{make_table("baseline", 16, baseline::conv2d, baseline::peak), true}};
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

}  // namespace cvfast
