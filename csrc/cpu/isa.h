// The choice of an instruction set: each kernel is built for several of them and one is active in the process.
#pragma once
#include <string>
#include <vector>

#include "kernel_table.h"

#ifndef CVFAST_EXPORT
#define CVFAST_EXPORT __attribute__((visibility("default")))
#endif

namespace cvfast {

// The active kernels; at first those of best_isa(). Safe to call from any thread.
CVFAST_EXPORT const KernelTable& kernels();

// Those of instruction set `name`, whichever is active. std::invalid_argument if `name` is not available.
CVFAST_EXPORT const KernelTable& kernels(const std::string& name);

// Names of the instruction sets in this library, and of those among them that this machine can run, best last.
// "emulated512" (64-byte vectors made of AVX2 instructions) is built for tests only, in
// place of avx512, and is never the best.
CVFAST_EXPORT std::vector<std::string> compiled_isas();
CVFAST_EXPORT std::vector<std::string> available_isas();

CVFAST_EXPORT std::string best_isa();
CVFAST_EXPORT std::string active_isa();

CVFAST_EXPORT bool made_by_intel();  // this machine's processor
CVFAST_EXPORT bool halves_avx512();  // whether it computes 64 bytes in two steps, hence no faster than AVX2's: Zen 4

// Makes another instruction set active for the whole process. Calls already running finish with the old one.
// std::invalid_argument if `name` is not available; the active one then stays.
CVFAST_EXPORT void set_isa(const std::string& name);

}  // namespace cvfast
