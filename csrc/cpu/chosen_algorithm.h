// Which algorithm the last convolution took, for whoever explains what ran.
#pragma once

#ifndef CVFAST_EXPORT
#define CVFAST_EXPORT __attribute__((visibility("default")))
#endif

namespace cvfast {

// The name of the algorithm that the last convolution called by this thread took; "" before the first.
CVFAST_EXPORT const char* chosen_algorithm();
CVFAST_EXPORT void set_chosen_algorithm(const char* name);  // a literal

}  // namespace cvfast
