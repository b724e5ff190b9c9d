// What torch shows of its tensors to C: DLPack 1.3 (https://dmlc.github.io/dlpack), as far as it is used here.
#pragma once
#include <cstdint>

namespace cvfast::dlpack {

constexpr int32_t cpu = 1;  // a device's type
enum class Code : uint8_t { floating = 2, bfloat = 4 };

struct Device {
  int32_t type, index;
};

struct ElementType {
  Code code;
  uint8_t bits;
  uint16_t lanes;
};

// A tensor as it is, valid as long as that lives; strides in elements.
struct View {
  void* data;
  Device device;
  int32_t dims;
  ElementType element;
  const int64_t *sizes, *strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  static constexpr uint32_t known_version = 1;
  static constexpr char capsule[] = "dlpack_exchange_api";  // by this name in the class's __dlpack_c_exchange_api__

  uint32_t version, minor_version;
  void* older;
  void (*others[3])();
  int (*view)(void* tensor, View* view);  // 0, or -1 with a Python exception
  void (*stream)();
};

}  // namespace cvfast::dlpack
