// The order in which recurrent kernels work on samples of different lengths: the longest first, so that the samples of a
// step are the first ones.
#pragma once
#include <cstdint>
#include <vector>

#include "cvfast/recurrent.h"
#include "isa.h"

namespace cvfast {

// Owns what a Sequence points to.
class CVFAST_EXPORT SequenceOrder {
 public:
  // Every sample has all steps.
  static SequenceOrder uniform(int64_t steps, int64_t batch);
  // Padded rows; lengths [batch] from 0 to steps, in any order.
  static SequenceOrder padded(const int64_t* lengths, int64_t batch, int64_t steps);
  // torch's PackedSequence: how many samples have each time [steps], not increasing, at most batch.
  static SequenceOrder packed(const int64_t* batch_sizes, int64_t steps, int64_t batch);

  int64_t rows() const { return first_.empty() ? steps_ * batch_ : first_.back(); }  // (step, sample) pairs

  // Valid while this object lives.
  Sequence sequence(bool reverse) const;

 private:
  int64_t steps_ = 0, batch_ = 0;
  bool packed_ = false;
  std::vector<int64_t> lengths_, order_, first_;
};

}  // namespace cvfast
