#include "precision.h"

#include <atomic>

namespace cvfast {
namespace {

std::atomic<bool> strict_now{false};

}  // namespace

bool strict_precision() { return strict_now.load(std::memory_order_relaxed); }
void set_strict_precision(bool strict) { strict_now.store(strict, std::memory_order_relaxed); }

}  // namespace cvfast
