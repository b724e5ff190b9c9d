#pragma once
#include "cvfast/recurrent.h"

namespace cvfast {

constexpr int64_t gates_of(RecurrentCell cell) {
  return cell == RecurrentCell::lstm ? 4 : cell == RecurrentCell::gru ? 3 : 1;
}

}  // namespace cvfast
