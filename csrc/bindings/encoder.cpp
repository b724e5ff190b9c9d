// Layers of a transformer's encoder on the CPU, and self-attention with its projections by itself: each one call of many
// kernels. The schemas are in cvfast/ops/encoder.py.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>

#include "../cpu/isa.h"
#include "brief_result.h"
#include "conv2d_how.h"
#include "cpu_tensors.h"
#include "opaque.h"
#include "thread_pool.h"

namespace {

using namespace cvfast;
using MaybeTensor = std::optional<Tensor>;

// Of the sizes of `like` but for the last one.
Tensor brief_rows(const Tensor& like, int64_t features) {
  Ints sizes = sizes_of(like);
  sizes.back() = features;
  return brief_contiguous(sizes, like);
}

// [N, 1, E] from contiguous x [N, L, E].
Tensor first_positions(const Tensor& x) {
  const int64_t batch = x.size(0), bytes = x.size(2) * x.element_size(), step = x.size(1) * bytes;
  const Tensor result = brief_contiguous({batch, 1, x.size(2)}, x);
  for (int64_t n = 0; n < batch; ++n)
    std::memcpy(static_cast<char*>(result.mutable_data_ptr()) + n * bytes,
                static_cast<const char*>(x.const_data_ptr()) + n * step, bytes);
  return result;
}

// A linear layer: weight [O, I], bias [O], the weight as conv2d_pack gave it.
struct Layer {
  const Tensor& weight;
  const MaybeTensor &bias, &packed;

  void check(const Tensor& input, int64_t in) const {
    STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == in && weight.scalar_type() == input.scalar_type() &&
                        weight.device() == input.device(),
                    "cvfast encoder: a weight does not fit the input");
  }
};

// activation(linear(input) + residual) [*, O] of contiguous rows [*, I]: a 1x1 convolution of one image whose pixels are the rows.
Tensor projected(const Tensor& input, const Layer& layer, Activation activation = Activation::none,
                 const Tensor* residual = nullptr) {
  const int64_t in = layer.weight.size(1), out = layer.weight.size(0), rows = input.numel() / in;
  const int64_t ones[] = {1, 1}, none[] = {0, 0};
  const Conv2dShape shape = conv2d_shape(Sizes4{1, in, rows, 1}, Sizes4{out, in, 1, 1}, ones, none, ones, 1);
  const Tensor result = brief_rows(input, out);
  Tensor keep;
  kernels().conv2d_forward({shape, dtype_of(input), {input.const_data_ptr(), {rows * in, 1, in, in}},
                            {layer.weight.const_data_ptr(), {layer.weight.stride(0), layer.weight.stride(1), 1, 1}},
                            bias_data(layer.bias, input, out, keep), {result.mutable_data_ptr(), {rows * out, 1, out, out}},
                            {activation, 0, residual ? residual->const_data_ptr() : nullptr, Pooling::none},
                            layer.packed.has_value() ? layer.packed->const_data_ptr() : nullptr},
                           thread_pool());
  return result;
}

// [N, L, E] from query, key and value side by side [N, L, 3 E]; or the results of the first `queries` positions alone.
Tensor attended(const Tensor& projections, int64_t heads, int64_t queries) {
  const int64_t batch = projections.size(0), length = projections.size(1), width = projections.size(2), features = width / 3,
                size = features / heads;
  auto operand = [&](int64_t which) -> ConstTensor4 {
    const char* data = static_cast<const char*>(projections.const_data_ptr());
    return {data + which * features * projections.element_size(), {length * width, size, width, 1}};
  };
  AttentionProblem p = {};
  p.shape = {batch, heads, heads, queries, length, size, size};
  p.dtype = dtype_of(projections);
  p.query = operand(0), p.key = operand(1), p.value = operand(2);
  p.scale = 1 / std::sqrt(static_cast<double>(size));
  p.visible.left = p.visible.right = length;
  const Tensor result = brief_contiguous({batch, queries, features}, projections);
  kernels().attention.forward({p, {result.mutable_data_ptr(), {queries * features, size, features, 1}}, nullptr},
                              thread_pool());
  return result;
}

void check_attention(const Tensor& input, const Layer& in, const Layer& out, int64_t heads) {
  STD_TORCH_CHECK(input.dim() == 3 && input.is_contiguous(), "cvfast encoder: input must be [N, L, E], contiguous");
  in.check(input, input.size(2));
  const int64_t features = in.weight.size(0) / 3;
  out.check(input, features);
  STD_TORCH_CHECK(in.weight.size(0) == 3 * features && heads > 0 && features > 0 && features % heads == 0,
                  "cvfast encoder: sizes of weights and heads do not fit");
}

const float* feature_data(const Tensor& t, int64_t features) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == features && t.is_contiguous() && dtype_of(t) == DType::f32,
                  "cvfast encoder: a layer norm's weight or bias does not fit the input");
  return static_cast<const float*>(t.const_data_ptr());
}

Tensor normalized(const Tensor& input, const Tensor& weight, const Tensor& bias, double epsilon) {
  const int64_t dims = input.dim(), features = dims > 0 ? input.size(dims - 1) : 0;
  STD_TORCH_CHECK(features > 0 && input.numel() > 0 && input.is_contiguous() && dtype_of(input) == DType::f32,
                  "cvfast encoder: input must be float32, contiguous and not empty");
  const float *weights = feature_data(weight, features), *biases = feature_data(bias, features);
  const Tensor result = brief_rows(input, features);
  kernels().layer_norm.forward({input.numel() / features, features, epsilon, static_cast<const float*>(input.const_data_ptr()),
                                weights, biases, static_cast<float*>(result.mutable_data_ptr())},
                               thread_pool());
  return result;
}

Tensor self_attention(const Tensor& input, const Tensor& in_weight, const MaybeTensor& in_bias, const Tensor& out_weight,
                      const MaybeTensor& out_bias, int64_t heads, const MaybeTensor& packed_in, const MaybeTensor& packed_out) {
  const Layer in = {in_weight, in_bias, packed_in}, out = {out_weight, out_bias, packed_out};
  check_attention(input, in, out, heads);
  return projected(attended(projected(input, in), heads, input.size(1)), out);
}

// Half of a layer: its operands are those of a layer norm and of two linear layers.
struct Half {
  const Tensor &norm_weight, &norm_bias;
  double epsilon;
  Layer in, out;
  int64_t heads;  // 0: of an mlp
  Activation activation;

  // Of the first position alone, with `first`, where other positions matter to attention.
  Tensor operator()(const Tensor& input, bool first) const {
    const Tensor normal = normalized(input, norm_weight, norm_bias, epsilon);
    const int64_t features = input.size(input.dim() - 1);
    STD_TORCH_CHECK(out.weight.dim() == 2 && out.weight.size(0) == features,
                    "cvfast encoder: the result does not fit the input");
    if (heads > 0) {
      check_attention(normal, in, out, heads);
      const Tensor residual = first ? first_positions(input) : input;
      return projected(attended(projected(normal, in), heads, residual.size(1)), out, Activation::none, &residual);
    }
    in.check(input, features);
    out.check(input, in.weight.size(0));
    STD_TORCH_CHECK(in.weight.size(0) > 0, "cvfast encoder: an mlp without features");
    return projected(projected(normal, in, activation), out, Activation::none, &input);
  }
};

// What `prepare` was given; behind the halves there may be a layer norm: its weight and bias, and its epsilon. From the half
// `narrow` on, an attention's if there is one, only the first position is computed.
struct Encoder {
  static constexpr char what[] = "encoder";
  OpaqueMark mark;
  std::vector<MaybeTensor> operands, packed;
  std::vector<double> epsilons;
  Ints heads;
  std::vector<Activation> activations;
  int64_t narrow;
};

constexpr size_t half_operands = 6;

Tensor prepare(std::vector<MaybeTensor> operands, std::vector<MaybeTensor> packed, std::vector<double> epsilons, Ints heads,
               Ints hows, int64_t narrow) {
  const size_t halves = heads.size(), last = epsilons.size() == halves + 1;
  STD_TORCH_CHECK(halves > 0 && operands.size() == half_operands * halves + 2 * last && packed.size() == 2 * halves &&
                      hows.size() == halves && epsilons.size() == halves + last,
                  "cvfast encoder: the operands of the halves do not fit");
  for (size_t i = 0; i < operands.size(); ++i)
    STD_TORCH_CHECK(operands[i].has_value() || (i < half_operands * halves && (i % half_operands == 3 || i % half_operands == 5)),
                    "cvfast encoder: a weight is missing");
  const int64_t count = static_cast<int64_t>(halves);
  STD_TORCH_CHECK(narrow == -1 || (narrow >= 0 && narrow < count && heads[narrow] > 0),
                  "cvfast encoder: only attention leaves positions out, got half ", narrow);
  std::vector<Activation> activations;
  for (int64_t how : hows) {
    activations.push_back(Conv2dHow::unpacked(how).activation);
    STD_TORCH_CHECK(activations.back() <= Activation::hardsigmoid, "cvfast encoder: unknown activation");
  }
  return opaque(std::make_unique<Encoder>(Encoder{{}, std::move(operands), std::move(packed), std::move(epsilons),
                                                  std::move(heads), std::move(activations), narrow}));
}

Tensor encoder(const Tensor& prepared, const Tensor& input) {
  const Encoder& e = opened<Encoder>(prepared);
  const size_t halves = e.heads.size();
  Tensor x = input;
  for (size_t i = 0; i < halves; ++i) {
    const MaybeTensor *o = &e.operands[half_operands * i], *packed = &e.packed[2 * i];
    x = Half{*o[0], *o[1], e.epsilons[i], {*o[2], o[3], packed[0]}, {*o[4], o[5], packed[1]}, e.heads[i],
             e.activations[i]}(x, static_cast<int64_t>(i) == e.narrow);
  }
  if (e.epsilons.size() == halves) return x;
  const MaybeTensor* norm = &e.operands[half_operands * halves];
  return normalized(x, *norm[0], *norm[1], e.epsilons[halves]);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cvfast_kernels, CPU, m) {
  m.impl("self_attention", TORCH_BOX(&self_attention));
  m.impl("encoder_prepare", TORCH_BOX(&prepare));
  m.impl("encoder", TORCH_BOX(&encoder));
}
