// Which attention weights are dropped: a hash of the seed and of the weight's place, so that nothing is stored and the
// backward pass finds the same ones. The twin in torch is `kept` in cvfast/ops/attention.py.
#pragma once
#include "cvfast/attention.h"
#include "attention_tiles.h"

namespace cvfast {
namespace {

constexpr uint32_t golden_ratio = 0x9e3779b9u;

// A bijection of 32 bits in which every input bit flips every output bit about half of the time.
inline uint32_t mixed(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

template <class T>
constexpr int64_t panel_queries = most_panel_vectors * lanes<T>;

// The dropout of one panel of queries: a pair of keys per query, drawn from seed, head and query.
template <class T>
class PanelDropout {
 public:
  // `head`: b * H + h.
  PanelDropout(const AttentionDropout& dropout, int64_t head, int64_t query)
      : threshold_(static_cast<uint32_t>(min(dropout.probability * 4294967296.0, 4294967295.0))),
        factor_(static_cast<T>(dropout.probability < 1 ? 1 / (1 - dropout.probability) : 0)) {
    const uint32_t seed = mixed(static_cast<uint32_t>(dropout.seed) + mixed(static_cast<uint32_t>(dropout.seed >> 32)));
    const uint32_t first = mixed(seed + mixed(static_cast<uint32_t>(head))), second = mixed(first ^ golden_ratio);
    for (int i = 0; i < panel_queries<T>; ++i) {
      const uint32_t place = static_cast<uint32_t>(query + i);
      first_[i] = mixed(first + place);
      second_[i] = mixed(second + place);
    }
  }

  // to[i]: 0 for a dropped weight, else 1 / (1 - probability), of the panel's queries i, `Vectors` vectors of them, with one key.
  template <int Vectors>
  void factors(int64_t key, T* to) const {
    const uint32_t place = static_cast<uint32_t>(key) * golden_ratio;
#pragma GCC ivdep
    for (int i = 0; i < Vectors * lanes<T>; ++i) {
      uint32_t x = first_[i] + place;
      x = (x ^ (x >> 16)) * 0x7feb352du;
      x = ((x ^ (x >> 15)) + second_[i]) * 0x846ca68bu;
      to[i] = (x ^ (x >> 16)) >= threshold_ ? factor_ : T{};
    }
  }

 private:
  uint32_t threshold_;
  T factor_;
  uint32_t first_[panel_queries<T>], second_[panel_queries<T>];
};

}  // namespace
}  // namespace cvfast
