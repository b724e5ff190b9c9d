// Working memory that a thread keeps from call to call, so that kernels neither fault in fresh pages nor hold memory
// per shape.
#pragma once
#include <cstdint>

namespace cvfast {

// worker: the blocks of the piece of work at hand. caller: what one call prepares for all of its workers. unpooled: results
// of a call within the call, to be pooled.
enum class ScratchUse { worker, caller, unpooled };

// `bytes` of uninitialised memory, aligned to 64 bytes, valid until this thread's next request for the same use.
// A thread keeps one buffer per use; one beyond 32 MiB is given back at the next smaller request. May throw
// std::bad_alloc.
void* thread_scratch(ScratchUse use, int64_t bytes);

}  // namespace cvfast
