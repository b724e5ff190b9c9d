// For tests: results of CPU operators start as NaN instead of uninitialised memory, so an element that no kernel
// writes shows. Off by default; holds for the whole process.
#pragma once
#include "isa.h"

namespace cvfast {

CVFAST_EXPORT bool results_are_poisoned();
CVFAST_EXPORT void poison_results(bool on);

}  // namespace cvfast
