#include "sequence_order.h"

#include <algorithm>
#include <numeric>

namespace cvfast {

SequenceOrder SequenceOrder::uniform(int64_t steps, int64_t batch) {
  SequenceOrder order;
  order.steps_ = steps, order.batch_ = batch;
  return order;
}

SequenceOrder SequenceOrder::padded(const int64_t* lengths, int64_t batch, int64_t steps) {
  SequenceOrder order = uniform(steps, batch);
  order.order_.resize(batch);
  std::iota(order.order_.begin(), order.order_.end(), 0);
  std::stable_sort(order.order_.begin(), order.order_.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
  order.first_.assign(steps + 1, 0);
  for (int64_t sample : order.order_) order.lengths_.push_back(lengths[sample]);
  for (int64_t step = 0, active = batch; step < steps; ++step) {
    while (active > 0 && order.lengths_[active - 1] <= step) --active;
    order.first_[step + 1] = order.first_[step] + active;
  }
  return order;
}

SequenceOrder SequenceOrder::packed(const int64_t* batch_sizes, int64_t steps, int64_t batch) {
  SequenceOrder order = uniform(steps, batch);
  order.packed_ = true;
  order.first_.assign(steps + 1, 0);
  std::partial_sum(batch_sizes, batch_sizes + steps, order.first_.begin() + 1);
  order.lengths_.assign(batch, 0);
  for (int64_t step = 0; step < steps; ++step)
    for (int64_t rank = 0; rank < batch_sizes[step]; ++rank) ++order.lengths_[rank];
  return order;
}

Sequence SequenceOrder::sequence(bool reverse) const {
  if (first_.empty()) return {steps_, batch_, nullptr, nullptr, nullptr, false, reverse};
  return {steps_, batch_, lengths_.data(), packed_ ? nullptr : order_.data(), first_.data(), packed_, reverse};
}

}  // namespace cvfast
