// What is prepared once for many calls, as a tensor in whose memory it lies: Python holds it, nobody looks into it.
#pragma once
#include <memory>

#include "tensor_common.h"

namespace cvfast {

// The first member of such a T, which has a `static constexpr char what[]`.
struct OpaqueMark {
  const void* self = nullptr;  // a copy of the tensor's bytes is none
  const char* what = nullptr;
};

template <class T>
Tensor opaque(std::unique_ptr<T> object) {
  object->mark = {object.get(), T::what};
  const int64_t size = sizeof(T), one = 1;
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(torch_from_blob(
      object.get(), 1, &size, &one, 0, aoti_torch_dtype_uint8(), aoti_torch_device_type_cpu(), -1, &result,
      aoti_torch_layout_strided(), nullptr, 0, [](void* data, void*) { delete static_cast<T*>(data); }, nullptr));
  object.release();
  return Tensor(result);
}

template <class T>
const T& opened(const Tensor& tensor) {
  const auto* object = static_cast<const T*>(tensor.const_data_ptr());
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.numel() == sizeof(T) && object->mark.self == object && object->mark.what == T::what,
                  "cvfast: this is no ", T::what, " that was prepared");
  return *object;
}

}  // namespace cvfast
