// The process-wide choice between fast and exact algorithms.
#pragma once

#ifndef CVFAST_EXPORT
#define CVFAST_EXPORT __attribute__((visibility("default")))
#endif

namespace cvfast {

// Under strict precision only algorithms are taken that form the sums of the definition itself: no Winograd. Off at
// first. Safe to call from any thread; calls already running finish as they began.
CVFAST_EXPORT bool strict_precision();
CVFAST_EXPORT void set_strict_precision(bool strict);

}  // namespace cvfast
