#include "poison.h"

#include <atomic>

namespace cvfast {
namespace {
std::atomic<bool> poisoned{false};
}

bool results_are_poisoned() { return poisoned.load(std::memory_order_relaxed); }
void poison_results(bool on) { poisoned.store(on, std::memory_order_relaxed); }

}  // namespace cvfast
