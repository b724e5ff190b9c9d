#include "chosen_algorithm.h"

namespace cvfast {
namespace {

thread_local const char* chosen = "";

}  // namespace

const char* chosen_algorithm() { return chosen; }
void set_chosen_algorithm(const char* name) { chosen = name; }

}  // namespace cvfast
