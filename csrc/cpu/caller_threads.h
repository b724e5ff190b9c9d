// torch's threads for callers that know nothing of torch.
#pragma once
#include "cvfast/common.h"
#include "isa.h"

namespace cvfast {

// Those that set_caller_threads named, at first the caller alone.
CVFAST_EXPORT ThreadPool caller_threads();
CVFAST_EXPORT void set_caller_threads(ThreadPool (*pool)());

}  // namespace cvfast
