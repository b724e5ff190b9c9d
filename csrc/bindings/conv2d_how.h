// How conv2d is called without gradients, beside its tensors, as one number: each argument of an operator costs a call about
// 0.2 µs, each list of numbers more. Needs no torch.
#pragma once
#include <cstdint>
#include <optional>
#include <string_view>
#include <utility>

#include "cvfast/conv2d.h"

namespace cvfast {

template <class Value>
using Named = std::pair<std::string_view, Value>;

constexpr Named<Activation> activations[] = {
    {"none", Activation::none}, {"relu", Activation::relu}, {"relu6", Activation::relu6},
    {"leaky_relu", Activation::leaky_relu}, {"silu", Activation::silu}, {"sigmoid", Activation::sigmoid},
    {"tanh", Activation::tanh}, {"gelu", Activation::gelu}, {"gelu_tanh", Activation::gelu_tanh},
    {"hardswish", Activation::hardswish}, {"hardsigmoid", Activation::hardsigmoid}};
constexpr Named<Pooling> poolings[] = {{"none", Pooling::none}, {"max", Pooling::max}, {"average", Pooling::average}};

// The value of the one of that name.
template <class Value, std::size_t Count>
std::optional<Value> value_of(std::string_view name, const Named<Value> (&known)[Count]) {
  for (const auto& [known_name, value] : known)
    if (name == known_name) return value;
  return std::nullopt;
}

struct Conv2dHow {
  int64_t stride[2], padding[2], dilation[2], groups;
  Activation activation;
  Pooling pooling;

  // Nothing where a number is not positive (of padding: negative) or too large.
  std::optional<int64_t> packed() const {
    int64_t bits = 0;
    bool fits = true;
    auto put = [&](int64_t value, int64_t least, int width) {
      fits = fits && value >= least && value < int64_t{1} << width;
      bits = bits << width | value;
    };
    for (int64_t s : stride) put(s, 1, stride_bits);
    for (int64_t p : padding) put(p, 0, padding_bits);
    for (int64_t d : dilation) put(d, 1, dilation_bits);
    put(groups, 1, groups_bits);
    put(static_cast<int64_t>(activation), 0, activation_bits);
    put(static_cast<int64_t>(pooling), 0, pooling_bits);
    return fits ? std::optional(bits) : std::nullopt;
  }

  // What `packed` gave; any other number gives a call of which the operator finds out whether it fits.
  static Conv2dHow unpacked(int64_t bits) {
    Conv2dHow how;
    auto take = [&](int width) {
      const int64_t value = bits & ((int64_t{1} << width) - 1);
      bits >>= width;
      return value;
    };
    how.pooling = static_cast<Pooling>(take(pooling_bits));
    how.activation = static_cast<Activation>(take(activation_bits));
    how.groups = take(groups_bits);
    for (int i : {1, 0}) how.dilation[i] = take(dilation_bits);
    for (int i : {1, 0}) how.padding[i] = take(padding_bits);
    for (int i : {1, 0}) how.stride[i] = take(stride_bits);
    return how;
  }

 private:
  static constexpr int stride_bits = 6, padding_bits = 7, dilation_bits = 6, groups_bits = 18, activation_bits = 4,
                       pooling_bits = 2;
};

}  // namespace cvfast
