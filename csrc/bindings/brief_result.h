// Tensors on the CPU that live briefly, in memory that others have used before: results of models without gradients, and gradients.
#pragma once
#include "../cpu/result_memory.h"
#include "conv2d_common.h"
#include "cpu_tensors.h"

namespace cvfast {

// An uninitialised tensor of so many bytes, in that memory where there is some; it cannot be resized.
inline Tensor brief_tensor(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype, int64_t bytes) {
  AtenTensorHandle result;
  void* data = borrow_result(bytes);
  if (!data) {
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &result));
    return Tensor(result);
  }
  const AOTITorchError error = torch_from_blob(
      data, dims, sizes, strides, 0, dtype, aoti_torch_device_type_cpu(), -1, &result, aoti_torch_layout_strided(), nullptr,
      0, [](void* memory, void*) { return_result(memory); }, nullptr);
  if (error != AOTI_TORCH_SUCCESS) return_result(data);
  TORCH_ERROR_CODE_CHECK(error);
  return Tensor(result);
}

// Contiguous.
inline Tensor brief_contiguous(const Ints& sizes, int32_t dtype, int64_t element_size) {
  int64_t bytes = element_size;
  for (const int64_t size : sizes) bytes *= size;
  return prepared(brief_tensor(static_cast<int64_t>(sizes.size()), sizes.data(), contiguous_strides(sizes).data(), dtype, bytes));
}
inline Tensor brief_contiguous(const Ints& sizes, const Tensor& like) {
  return brief_contiguous(sizes, dtype_code(like), like.element_size());
}

inline Tensor brief_result(const Sizes4& size, const Tensor& first, const Tensor& second) {
  const ResultLayout r(size, first, second);
  return brief_tensor(4, r.size.data(), r.strides, r.dtype, r.elements() * first.element_size());
}

}  // namespace cvfast
