// What the bindings of recurrent layers and of attention share: dtypes, and uninitialised tensors on the CPU.
#pragma once
#include "../cpu/fresh_result.h"
#include "tensor_common.h"

namespace cvfast {

// torch's number of a dtype, as the C functions take it.
inline int32_t dtype_code(const Tensor& tensor) {
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  return code;
}

// bfloat16 and float16 are computed in float32.
inline int32_t compute_code(const Tensor& tensor) {
  return dtype_code(tensor) == aoti_torch_dtype_float64() ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

inline Ints sizes_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

inline Tensor prepared(const Tensor& result) {
  prepare_result(result.mutable_data_ptr(), result.numel() * result.element_size());
  return result;
}

inline Ints contiguous_strides(const Ints& sizes) {
  Ints strides(sizes.size());
  int64_t next = 1;
  for (size_t i = sizes.size(); i-- > 0; next *= sizes[i] > 0 ? sizes[i] : 1) strides[i] = next;
  return strides;
}

inline Tensor empty_contiguous(const Ints& sizes, int32_t dtype) {
  const Ints strides = contiguous_strides(sizes);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return prepared(Tensor(handle));
}

// As torch.empty_like: dense dimensions keep their order in memory.
inline Tensor dense_like(const Tensor& t) {
  return t.is_contiguous() ? empty_contiguous(sizes_of(t), dtype_code(t)) : prepared(torch::stable::empty_like(t));
}

}  // namespace cvfast
