// Weights of a convolution, or of the gradient to its input, in the form in which an algorithm reads them, kept by the caller from call to call.
//
// In front of them stands what they were made of. A call compares this with its own weights and options, and packs anew
// where it differs, so whatever a caller hands over the result is right as long as the weights' sampled elements tell a
// change.
#pragma once
#include "conv2d_problem.h"

namespace cvfast {
namespace {

// panels: conv2d_implicit_gemm.h; taps and U: conv2d_winograd_weights.h, of a kernel with 3x3 or with 2x2 taps per phase.
enum class PackedForm : int64_t { none, panels, taps3, taps2, u3, u2 };

struct alignas(64) PackedHeader {
  static constexpr int64_t samples = 32;
  struct Origin {
    PackedForm form;
    int64_t vector_bytes, dtype, groups, size[4], stride[4];
    int64_t phases[9];  // all on which those of the gradient to the input depend; 0 of a forward convolution
    char elements[samples * 8];
  } origin;
  bool finite;  // no weight is NaN or infinite; said of panels, and where taps were left out (conv2d_live_taps.h)

  // Behind the header, aligned to 64 bytes.
  void* data() { return this + 1; }
  const void* data() const { return this + 1; }
};

inline int64_t element_bytes(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

inline void note_phases(const Conv2dForward&, PackedHeader::Origin&) {}
inline void note_phases(const Conv2dInputGrad& p, PackedHeader::Origin& origin) {
  const Conv2dShape s = input_grad_shape(p.shape);
  const int64_t phases[] = {1, s.stride_h, s.stride_w, s.padding_h, s.padding_w, s.dilation_h, s.dilation_w,
                            min(s.stride_h, s.in_height), min(s.stride_w, s.in_width)};
  __builtin_memcpy(origin.phases, phases, sizeof phases);
}

// Without the elements where nobody compares them: they lie anywhere in memory.
template <class Problem>
PackedHeader::Origin packed_origin(const Problem& p, PackedForm form, bool with_elements = true) {
  const Conv2dShape& s = p.shape;
  PackedHeader::Origin origin;
  __builtin_memset(&origin, 0, sizeof origin);  // compared as bytes
  origin.form = form, origin.vector_bytes = CVFAST_VECTOR_BYTES;
  origin.dtype = static_cast<int64_t>(p.dtype), origin.groups = s.groups;
  const int64_t size[4] = {s.out_channels, s.in_channels / s.groups, s.kernel_height, s.kernel_width};
  int64_t count = 1;
  bool dense = true;  // divisions take longer than all else
  note_phases(p, origin);
  for (int d = 3; d >= 0; --d) {
    dense &= size[d] == 1 || p.weight.stride[d] == count;
    origin.size[d] = size[d], origin.stride[d] = p.weight.stride[d], count *= size[d];
  }
  const int64_t bytes = element_bytes(p.dtype);
  for (int64_t i = 0; with_elements && i < PackedHeader::samples && count > 0; ++i) {
    int64_t index = (count - 1) * i / (PackedHeader::samples - 1), at = dense ? index : 0;
    for (int d = 3; !dense && d >= 0; index /= size[d], --d) at += index % size[d] * p.weight.stride[d];
    __builtin_memcpy(origin.elements + i * bytes, static_cast<const char*>(p.weight.data) + at * bytes, bytes);
  }
  return origin;
}

inline Conv2dPacking packing(PackedForm form, int64_t bytes) {
  return {static_cast<int64_t>(form), bytes + static_cast<int64_t>(sizeof(PackedHeader))};
}

inline bool same_weights(const Conv2dForward& p) { return p.same_weights; }
inline bool same_weights(const Conv2dInputGrad&) { return false; }

// The kept weights of a call in the form `form`, or nullptr.
template <class Problem>
const PackedHeader* kept_weights(const Problem& p, PackedForm form) {
  const auto* kept = static_cast<const PackedHeader*>(p.packed);
  if (!kept || kept->origin.form != form) return nullptr;
  const PackedHeader::Origin own = packed_origin(p, form, !same_weights(p));
  const int64_t compared = same_weights(p) ? __builtin_offsetof(PackedHeader::Origin, elements) : sizeof own;
  return __builtin_memcmp(&own, &kept->origin, compared) == 0 ? kept : nullptr;
}

}  // namespace
}  // namespace cvfast
