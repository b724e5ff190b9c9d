// Convolutions and pooling in a row on the CPU, prepared once and run as one call. The schemas are in cvfast/ops/sequence.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../cpu/cache_size.h"
#include "../cpu/huge_pages.h"
#include "../cpu/isa.h"
#include "../cpu/poison.h"
#include "brief_result.h"
#include "conv2d_how.h"
#include "cpu_tensors.h"
#include "opaque.h"
#include "thread_pool.h"

namespace {

using namespace cvfast;
using MaybeTensor = std::optional<Tensor>;

enum class StepKind : int64_t { conv2d, max_pooling, max_pooling_ceil, averaged_linear, linear };

struct Step {
  int64_t input, residual;  // the numbers of the values that it reads; residual -1: none
  StepKind kind;
  Conv2dHow how;
  double negative_slope;
  Sizes4 weight_size;  // of a linear layer [O, I, 1, 1]
  ConstTensor4 weight;
  const void *bias, *packed;
  bool own_weight;     // nobody else can change it
  bool channels_last;  // the result
  size_t in_bands;  // so many steps from this one on may be run together: 0, 2 or 3

  bool pools() const { return kind == StepKind::max_pooling || kind == StepKind::max_pooling_ceil; }
  bool is_pointwise() const {
    return kind == StepKind::conv2d && weight_size[2] == 1 && weight_size[3] == 1 && how.stride[0] == 1 && how.stride[1] == 1 &&
           how.padding[0] == 0 && how.padding[1] == 0 && how.groups == 1 && how.pooling == Pooling::none;
  }
  bool is_depthwise() const {
    return kind == StepKind::conv2d && how.groups == weight_size[0] && weight_size[1] == 1 && weight_size[2] >= how.stride[0] &&
           how.dilation[0] == 1 && how.pooling == Pooling::none && residual < 0;
  }
};

// What `prepare` found out.
struct Sequence {
  static constexpr char what[] = "sequence";
  OpaqueMark mark;
  DType dtype;
  int32_t dtype_code;
  int64_t inputs, element_size;
  std::vector<Step> steps;
  std::vector<size_t> last_use;  // of each value: the step after which it is not needed
  std::vector<Tensor> kept;      // that the steps point to

  // Whether step i + 1 alone reads the result of step i, as its input.
  bool is_link(size_t i) const {
    const int64_t value = inputs + static_cast<int64_t>(i);
    return steps[i + 1].input == value && steps[i + 1].residual != value && last_use[value] == i + 1;
  }
  size_t steps_in_bands(size_t i) const {
    const size_t depthwise = i + (steps[i].is_pointwise() && steps[i].residual < 0), left = steps.size() - i;
    const size_t count = depthwise - i + 2;
    if (left < count || !steps[depthwise].is_depthwise() || !steps[depthwise + 1].is_pointwise()) return 0;
    for (size_t k = i; k <= depthwise; ++k)
      if (!is_link(k)) return 0;
    return count;
  }
};

// A value: an input or a result, in memory that was borrowed or is a tensor's.
struct Image {
  Sizes4 size;
  int64_t strides[4];
  void* data = nullptr;
  bool channels_last = false, borrowed = false;
  MaybeTensor tensor;

  Image() = default;
  Image(const Image&) = delete;
  Image& operator=(Image&&) = delete;
  ~Image() { free(); }

  void view(const Tensor& t) {
    for (int d = 0; d < 4; ++d) size[d] = t.size(d), strides[d] = t.stride(d);
    data = const_cast<void*>(t.const_data_ptr()), channels_last = is_channels_last(t), tensor = t;
  }
  // An uninitialised result. lasting: it leaves the sequence.
  void make(const Sizes4& of_size, int64_t dims, bool in_channels_last, const Sequence& s, bool lasting) {
    size = of_size, channels_last = in_channels_last;
    const int64_t c = size[1], h = size[2], w = size[3], bytes = size[0] * c * h * w * s.element_size;
    const int64_t planes[] = {c * h * w, h * w, w, 1}, pixels[] = {h * w * c, 1, w * c, c};
    for (int d = 0; d < 4; ++d) strides[d] = channels_last ? pixels[d] : planes[d];
    if (!lasting) data = borrow_result(bytes), borrowed = data != nullptr;
    if (!borrowed) tensor = brief_tensor(dims, size.data(), strides, s.dtype_code, bytes), data = tensor->mutable_data_ptr();
    prefer_huge_pages(data, bytes);
    if (results_are_poisoned()) std::memset(data, 0xff, bytes);  // NaN in every dtype
  }
  void free() {
    if (borrowed) return_result(data);
    borrowed = false, data = nullptr;
    tensor.reset();
  }
  ConstTensor4 to_read() const { return {data, {strides[0], strides[1], strides[2], strides[3]}}; }
  Tensor4 to_write() const { return {data, {strides[0], strides[1], strides[2], strides[3]}}; }
};

Tensor prepare(std::vector<Tensor> weights, std::vector<MaybeTensor> biases, std::vector<MaybeTensor> packed, Ints steps,
               std::vector<double> negative_slopes, int64_t inputs) {
  constexpr size_t numbers = 6;  // of a step
  const size_t count = weights.size();
  STD_TORCH_CHECK(count > 0 && inputs > 0 && biases.size() == count && packed.size() == count &&
                      steps.size() == numbers * count && negative_slopes.size() == count,
                  "cvfast sequence: the steps do not fit");
  auto s = std::make_unique<Sequence>();
  s->dtype = dtype_of(weights[0]), s->dtype_code = dtype_code(weights[0]);
  s->inputs = inputs, s->element_size = weights[0].element_size(), s->last_use.resize(inputs + count, count);
  for (size_t i = 0; i < count; ++i) {
    const int64_t* given = &steps[numbers * i];
    Step step = {given[0], given[1], static_cast<StepKind>(given[2]), Conv2dHow::unpacked(given[3]), negative_slopes[i]};
    step.own_weight = given[4] != 0, step.channels_last = given[5] != 0;
    const int64_t known = inputs + static_cast<int64_t>(i);
    STD_TORCH_CHECK(step.input >= 0 && step.input < known && step.residual >= -1 && step.residual < known,
                    "cvfast sequence: a step reads what is not there yet");
    STD_TORCH_CHECK(step.kind >= StepKind::conv2d && step.kind <= StepKind::linear &&
                        step.how.activation <= Activation::hardsigmoid && step.how.pooling <= Pooling::average,
                    "cvfast sequence: a step of no known kind");
    STD_TORCH_CHECK((step.kind == StepKind::conv2d || (s->dtype == DType::f32 && step.residual < 0)) &&
                        (step.kind != StepKind::averaged_linear || i + 1 == count) &&
                        (step.residual < 0 || step.how.pooling == Pooling::none),
                    "cvfast sequence: a step that is not possible here");
    s->last_use[step.input] = i;
    if (step.residual >= 0) s->last_use[step.residual] = i;
    if (!step.pools()) {
      const int64_t dims = step.kind == StepKind::conv2d ? 4 : 2;
      STD_TORCH_CHECK(weights[i].dim() == dims && dtype_of(weights[i]) == s->dtype &&
                          weights[i].device() == weights[0].device() && weights[i].numel() > 0,
                      "cvfast sequence: a weight does not fit");
      const Tensor& weight = weights[i];
      step.weight_size = {1, 1, 1, 1}, step.weight = {weight.const_data_ptr(), {1, 1, 1, 1}};
      for (int64_t d = 0; d < dims; ++d) step.weight_size[d] = weight.size(d), step.weight.stride[d] = weight.stride(d);
      s->kept.push_back(weight);
      if (biases[i].has_value()) {
        Tensor bias = *biases[i];
        step.bias = bias_data(biases[i], weight, step.weight_size[0], bias);
        s->kept.push_back(bias);
      }
      if (packed[i].has_value()) step.packed = packed[i]->const_data_ptr(), s->kept.push_back(*packed[i]);
    }
    s->steps.push_back(step);
  }
  for (size_t i = 0; i < count; ++i) s->steps[i].in_bands = s->steps_in_bands(i);
  return opaque(std::move(s));
}

void check_residual(const Image* residual, const Image& output) {
  if (residual)
    for (int d = 0; d < 4; ++d)
      STD_TORCH_CHECK(residual->size[d] == output.size[d] && (residual->strides[d] == output.strides[d] || output.size[d] == 1),
                      "cvfast sequence: a residual must have the result's sizes and strides");
}

Conv2dShape shape_of(const Step& step, const Sizes4& input) {
  return conv2d_shape(input, step.weight_size, step.how.stride, step.how.padding, step.how.dilation, step.how.groups);
}

void convolve(const Sequence& s, const Step& step, const Conv2dShape& shape, ConstTensor4 input, const void* residual,
              Tensor4 output) {
  kernels().conv2d_forward({shape, s.dtype, input, step.weight, step.bias, output,
                            {step.how.activation, step.negative_slope, residual, step.how.pooling}, step.packed, step.own_weight},
                           thread_pool());
}

void convolve(const Sequence& s, const Step& step, const Image& input, const Image* residual, Image& output, bool last) {
  Conv2dShape shape = shape_of(step, input.size);
  Sizes4 size = output_sizes(shape);
  if (step.how.pooling != Pooling::none) {
    size[2] /= 2, size[3] /= 2;
    STD_TORCH_CHECK(size[2] > 0 && size[3] > 0, "cvfast conv2d: the result is too small to pool 2x2 pixels");
    shape.out_height = 2 * size[2], shape.out_width = 2 * size[3];
  }
  output.make(size, 4, step.channels_last, s, last);
  check_residual(residual, output);
  convolve(s, step, shape, input.to_read(), residual ? residual->data : nullptr, output.to_write());
}

// A depthwise convolution between two of 1x1 (or before one), whose images are many times as large as input and result: in bands
// of lines, whose part of those images stays in the L2 cache. An element's bits are those of the whole image.
struct Bands {
  const Step *widen, &depthwise, &narrow;  // widen: nullptr where there is none
  Conv2dShape shape;                       // of the depthwise convolution of a sample
  int64_t line, out_line;                  // bytes of a line of its input and of its result
  int64_t lines;                           // of its result, in a band

  // step: the first of step->in_bands.
  Bands(const Sequence& s, const Step* step, const Sizes4& input)
      : widen(step->in_bands == 3 ? step : nullptr), depthwise(step[step->in_bands - 2]), narrow(step[step->in_bands - 1]),
        shape(shape_of(depthwise, {1, widen ? widen->weight_size[0] : input[1], input[2], input[3]})),
        line(shape.in_channels * shape.in_width * s.element_size),
        out_line(shape.out_channels * shape.out_width * s.element_size) {
    const int64_t held = cache() - (widen ? shape.kernel_height * line : 0);
    const int64_t most = held / ((widen ? shape.stride_h * line : 0) + out_line), all = shape.out_height;
    const int64_t bands = most > 0 ? (all + most - 1) / most : all;
    lines = (all + bands - 1) / bands;
  }
  // With a small L2 cache bands are filled sooner, and two lines gain: an image of 16 x 112 x 112 widened to 96 channels takes 1.0 ms
  // instead of 1.6 (Zen 3).
  bool pay() const {
    return narrow.channels_last && lines < shape.out_height && lines >= (has_small_cache() ? 2 : 4) &&
           thread_pool().threads == 1;
  }

  void run(const Sequence& s, const Image& input, const Image* residual, Image& output, bool last) const {
    const Sizes4 wide = {1, shape.in_channels, (lines - 1) * shape.stride_h + shape.kernel_height, shape.in_width};
    if (widen) shape_of(*widen, input.size);  // checks
    const Conv2dShape narrowed = shape_of(narrow, {input.size[0], shape.out_channels, shape.out_height, shape.out_width});
    output.make(output_sizes(narrowed), 4, true, s, last);
    check_residual(residual, output);
    Image widened, filtered;
    if (widen) widened.make(wide, 4, true, s, false);
    filtered.make({1, shape.out_channels, lines, shape.out_width}, 4, true, s, false);
    for (int64_t sample = 0; sample < input.size[0]; ++sample) {
      const auto at = [&](const Image& image, int64_t y) {
        return static_cast<char*>(image.data) + (sample * image.strides[0] + y * image.strides[2]) * s.element_size;
      };
      Range has = {0, 0};  // lines of the depthwise convolution's input that `widened` has
      for (int64_t y = 0; y < shape.out_height; y += lines) {
        const int64_t some = std::min(lines, shape.out_height - y), first = y * shape.stride_h - shape.padding_h;
        const Range needs = {std::max<int64_t>(0, first),
                             std::min(shape.in_height, first + (some - 1) * shape.stride_h + shape.kernel_height)};
        ConstTensor4 from = input.to_read();
        from.data = at(input, needs.begin);
        if (widen) {
          char* const data = static_cast<char*>(widened.data);
          const int64_t kept = std::max<int64_t>(0, has.end - needs.begin), more = needs.end - needs.begin - kept;
          if (kept > 0) std::memmove(data, data + (needs.begin - has.begin) * line, kept * line);
          ConstTensor4 source = input.to_read();
          source.data = at(input, needs.begin + kept);
          Tensor4 to = widened.to_write();
          to.data = data + kept * line;
          if (more > 0) convolve(s, *widen, shape_of(*widen, {1, input.size[1], more, input.size[3]}), source, nullptr, to);
          has = needs, from = widened.to_read();
        }
        Conv2dShape band = shape;
        band.in_height = needs.end - needs.begin, band.out_height = some;
        band.padding_h = needs.begin - first;
        convolve(s, depthwise, band, from, nullptr, filtered.to_write());
        Tensor4 to = output.to_write();
        to.data = at(output, y);
        convolve(s, narrow, shape_of(narrow, {1, shape.out_channels, some, shape.out_width}), filtered.to_read(),
                 residual ? at(*residual, y) : nullptr, to);
      }
    }
  }

 private:
  struct Range {
    int64_t begin, end;
  };

  static bool has_small_cache() { return l2_cache_bytes() <= 512 << 10; }
  static int64_t cache() { return has_small_cache() ? l2_cache_bytes() / 4 * 3 : l2_cache_bytes() / 2; }
};

// In `how` the dilation is the window's length.
void pool(const Sequence& s, const Step& step, const Image& input, Image& output, bool last) {
  const int64_t window = step.how.dilation[0], stride = step.how.stride[0], padding = step.how.padding[0];
  STD_TORCH_CHECK(step.how.dilation[1] == window && step.how.stride[1] == stride && step.how.padding[1] == padding &&
                      stride > 0 && 2 * padding <= window,
                  "cvfast sequence: max pooling has square windows");
  const Sizes4& in = input.size;
  const auto pooled = [&](int64_t size) {
    const int64_t whole = output_size(size, window, stride, padding, 1);
    // One more, whose window sticks out, if that begins inside the image.
    return whole + (step.kind == StepKind::max_pooling_ceil && (whole - 1) * stride + window < size + padding + padding &&
                    whole * stride < size + padding);
  };
  output.make({in[0], in[1], pooled(in[2]), pooled(in[3])}, 4, step.channels_last, s, last);
  kernels().pooling.max({in[0], in[1], in[2], in[3], output.size[2], output.size[3], window, stride, padding,
                         input.to_read(), output.to_write()},
                        thread_pool());
}

// A linear layer of rows: a 1x1 convolution of one image whose pixels they are.
void multiply(const Sequence& s, const Step& step, int64_t rows, const void* data, Image& output, bool last) {
  const int64_t in = step.weight_size[1], out = step.weight_size[0];
  output.make({rows, out, 1, 1}, 2, true, s, last);
  const Conv2dShape shape = {.batch = 1, .in_channels = in, .in_height = rows, .in_width = 1, .out_channels = out,
                             .out_height = rows, .out_width = 1, .kernel_height = 1, .kernel_width = 1, .stride_h = 1,
                             .stride_w = 1, .padding_h = 0, .padding_w = 0, .dilation_h = 1, .dilation_w = 1, .groups = 1};
  convolve(s, step, shape, {data, {rows * in, 1, in, in}}, nullptr, {output.data, {rows * out, 1, out, out}});
}

// Of the average of the pixels.
void average(const Sequence& s, const Step& step, const Image& input, Image& output, bool last) {
  const int64_t rows = input.size[0], in = input.size[1], pixels = input.size[2] * input.size[3];
  const int64_t* stride = input.strides;
  STD_TORCH_CHECK(step.weight_size[1] == in && (input.size[2] == 1 || input.size[3] == 1 || stride[2] == input.size[3] * stride[3]),
                  "cvfast sequence: the linear layer does not fit");
  Image averages;
  averages.make({rows, in, 1, 1}, 2, true, s, false);
  kernels().pooling.average({rows, in, pixels, static_cast<const float*>(input.data), stride[0], stride[1],
                             input.size[3] == 1 ? stride[2] : stride[3], static_cast<float*>(averages.data)},
                            thread_pool());
  multiply(s, step, rows, averages.data, output, last);
}

// Of the flattened images.
void flatten(const Sequence& s, const Step& step, const Image& input, Image& output, bool last) {
  int64_t elements = 1;
  bool dense = true;
  for (int d = 3; d > 0; elements *= input.size[d--]) dense = dense && (input.size[d] == 1 || input.strides[d] == elements);
  STD_TORCH_CHECK(dense && (input.size[0] == 1 || input.strides[0] == elements) && elements == step.weight_size[1],
                  "cvfast sequence: the linear layer does not fit");
  multiply(s, step, input.size[0], input.data, output, last);
}

Tensor run(const Tensor& prepared, std::vector<Tensor> inputs) {
  const Sequence& s = opened<Sequence>(prepared);
  STD_TORCH_CHECK(static_cast<int64_t>(inputs.size()) == s.inputs, "cvfast sequence: the inputs do not fit");
  const size_t count = s.steps.size();
  const auto values = std::make_unique<Image[]>(inputs.size() + count);
  for (size_t i = 0; i < inputs.size(); ++i) {
    STD_TORCH_CHECK(inputs[i].dim() == 4 && dtype_code(inputs[i]) == s.dtype_code && inputs[i].is_cpu() && inputs[i].numel() > 0,
                    "cvfast sequence: an input does not fit");
    values[i].view(inputs[i]);
  }
  const auto residual_of = [&](const Step& step) { return step.residual < 0 ? nullptr : &values[step.residual]; };
  const auto free_after = [&](size_t i) {
    for (int64_t value : {s.steps[i].input, s.steps[i].residual})
      if (value >= 0 && s.last_use[value] == i) values[value].free();
  };
  for (size_t i = 0; i < count; ++i) {
    const Step& step = s.steps[i];
    const Image& input = values[step.input];
    if (step.in_bands > 0 && input.channels_last) {
      const Bands bands(s, &step, input.size);
      if (bands.pay()) {
        const size_t end = i + step.in_bands;
        bands.run(s, input, residual_of(bands.narrow), values[inputs.size() + end - 1], end == count);
        for (; i + 1 < end; ++i) free_after(i);
        free_after(i);
        continue;
      }
    }
    Image& output = values[inputs.size() + i];
    const bool last = i + 1 == count;
    switch (step.kind) {
      case StepKind::conv2d: convolve(s, step, input, residual_of(step), output, last); break;
      case StepKind::max_pooling:
      case StepKind::max_pooling_ceil: pool(s, step, input, output, last); break;
      case StepKind::averaged_linear: average(s, step, input, output, last); break;
      case StepKind::linear: flatten(s, step, input, output, last); break;
    }
    free_after(i);
  }
  return *values[inputs.size() + count - 1].tensor;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cvfast_kernels, CPU, m) {
  m.impl("sequence_prepare", TORCH_BOX(&prepare));
  m.impl("sequence", TORCH_BOX(&run));
}
