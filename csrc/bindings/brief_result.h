// Results on the CPU that live briefly: those of models without gradients, and gradients.
#pragma once
#include "../cpu/result_memory.h"
#include "conv2d_common.h"

namespace cvfast {

// An uninitialised result in memory that others have used before, where there is some; it cannot be resized.
inline Tensor brief_result(const Ints& size, const Tensor& first, const Tensor& second) {
  const ResultLayout r(size, first, second);
  void* data = borrow_result(r.elements() * first.element_size());
  if (!data) return empty_result(r);
  AtenTensorHandle result;
  const AOTITorchError error =
      torch_from_blob(data, 4, r.size.data(), r.strides, 0, r.dtype, r.device_type, r.device_index, &result,
                      aoti_torch_layout_strided(), nullptr, 0, [](void* memory, void*) { return_result(memory); }, nullptr);
  if (error != AOTI_TORCH_SUCCESS) return_result(data);
  TORCH_ERROR_CODE_CHECK(error);
  return Tensor(result);
}

}  // namespace cvfast
