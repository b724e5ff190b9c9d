// What translated PTX calls. Registers hold bits: unsigned integers of the register's width, bool for predicates.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace sim {

struct Dim3 {
  uint32_t x = 1, y = 1, z = 1;
  uint64_t count() const { return uint64_t{x} * y * z; }
};

struct Extent {
  uint64_t offset, bytes;
};

struct Kernel {
  const char* name;
  void (*run)();
  const Extent* parameters;
  size_t parameter_count;
  uint64_t parameter_bytes;
  const Extent* shared;  // the variables in shared memory, in increasing order; dynamic shared memory comes after them
  size_t shared_count;
};

extern const Kernel kernels[];  // of the translated module
extern const size_t kernel_count;

constexpr uint32_t kWarpSize = 32;
constexpr uint64_t kSharedBase = 1024;  // first address of the shared window, so that null faults
constexpr uint64_t kSharedGap = 256;    // at least, between variables, so that an index past one's end faults
constexpr uint64_t kSharedWindow = 0x7f00ull << 48;  // a generic address of shared memory: this + its shared address

// ---- what the running thread asks of the machine (machine.cpp). `site`: an instruction and its place, for messages;
// threads that wait for each other must do so at the same site. ----

const Dim3& thread_index();
const Dim3& block_index();
const Dim3& block_size();
const Dim3& grid_size();
uint32_t lane();
uint64_t dynamic_shared_address();

enum class Mode { read, read_constant, write };  // read_constant: promised not to be written during the launch
const char* parameter(uint64_t offset, uint64_t bytes);
char* global_memory(uint64_t address, uint64_t bytes, Mode mode);
char* shared_memory(uint64_t address, uint64_t bytes, Mode mode);

void block_barrier(const char* site);
void warp_barrier(uint32_t mask, const char* site);

enum class Shuffle { up, down, butterfly, index };
struct ShuffleResult {
  uint32_t value;
  bool in_range;
};
// shfl.sync: `clamp_and_segment` as PTX packs it. A lane that reads one outside the mask gets all ones, so that the
// value can't pass for a right one.
ShuffleResult shuffle(Shuffle mode, uint32_t value, uint32_t by, uint32_t clamp_and_segment, uint32_t mask,
                      const char* site);
// vote.sync.ballot: one bit for each lane of the mask whose predicate holds.
uint32_t ballot(bool predicate, uint32_t mask, const char* site);

[[noreturn]] void fail(const char* complaint);

// The bits of a register as a value of an instruction's type; a narrower type takes the low bits.
template <class T, class Register>
[[gnu::always_inline]] inline T read(Register bits) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(bits);
  } else {
    static_assert(sizeof(T) == sizeof(Register), "a floating-point type needs a register of its width");
    T value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
}

// A value as the bits of a register; signed integers are extended by their sign, unsigned ones by zeros.
template <class Register, class T>
[[gnu::always_inline]] inline Register write(T value) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<Register>(value);
  } else {
    static_assert(sizeof(T) == sizeof(Register), "a floating-point type needs a register of its width");
    Register bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
  }
}

// ---- memory ----

template <class T>
[[gnu::always_inline]] inline void load_parameter(uint64_t offset, T* values, size_t count) {
  std::memcpy(values, parameter(offset, sizeof(T) * count), sizeof(T) * count);
}

template <class T>
[[gnu::always_inline]] inline void load_global(uint64_t address, T* values, size_t count) {
  std::memcpy(values, global_memory(address, sizeof(T) * count, Mode::read), sizeof(T) * count);
}

template <class T>
[[gnu::always_inline]] inline void load_constant(uint64_t address, T* values, size_t count) {
  std::memcpy(values, global_memory(address, sizeof(T) * count, Mode::read_constant), sizeof(T) * count);
}

template <class T>
[[gnu::always_inline]] inline void load_shared(uint64_t address, T* values, size_t count) {
  std::memcpy(values, shared_memory(address, sizeof(T) * count, Mode::read), sizeof(T) * count);
}

template <class T>
[[gnu::always_inline]] inline void store_global(uint64_t address, const T* values, size_t count) {
  std::memcpy(global_memory(address, sizeof(T) * count, Mode::write), values, sizeof(T) * count);
}

template <class T>
[[gnu::always_inline]] inline void store_shared(uint64_t address, const T* values, size_t count) {
  std::memcpy(shared_memory(address, sizeof(T) * count, Mode::write), values, sizeof(T) * count);
}

// ---- arithmetic whose PTX meaning differs from C++ ----

template <class T>
T divide(T a, T b) {
  if (b == 0) fail("integer division by zero");
  if (std::is_signed_v<T> && b == T(-1)) return static_cast<T>(0 - a);
  return a / b;
}

template <class T>
T remainder(T a, T b) {
  if (b == 0) fail("integer remainder by zero");
  if (std::is_signed_v<T> && b == T(-1)) return 0;
  return a % b;
}

// A shift by the width or more leaves the sign, or nothing.
template <class T>
T shift_left(T a, uint32_t by) {
  return by >= 8 * sizeof(T) ? 0 : static_cast<T>(a << by);
}

template <class T>
T shift_right(T a, uint32_t by) {
  if (by >= 8 * sizeof(T)) return a < 0 ? T(-1) : T(0);
  return static_cast<T>(a >> by);
}

template <class T>
T multiply_high(T a, T b) {
  using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  return static_cast<T>(static_cast<Wide>(a) * b >> (8 * sizeof(T)));
}

// A rounded floating-point value as an integer: saturated, NaN is 0.
template <class T, class Float>
T saturate(Float value) {
  if (std::isnan(value)) return 0;
  if (value <= static_cast<Float>(std::numeric_limits<T>::min())) return std::numeric_limits<T>::min();
  if (value >= static_cast<Float>(std::numeric_limits<T>::max())) return std::numeric_limits<T>::max();
  return static_cast<T>(value);
}

template <class T>
bool unordered(T a, T b) {
  return std::isnan(a) || std::isnan(b);
}

// The bit field of `length` bits from bit `start` on; signed types extend it by its top bit.
template <class T>
T extract_bits(T a, uint32_t start, uint32_t length) {
  constexpr uint32_t width = 8 * sizeof(T);
  start &= 255;
  length &= 255;
  if (length == 0) return 0;
  const uint32_t last = start + length - 1, top = last < width ? last : width - 1;
  const bool negative = std::is_signed_v<T> && (static_cast<std::make_unsigned_t<T>>(a) >> top & 1);
  T field = 0;
  for (uint32_t i = 0; i < width; ++i) {
    const bool bit = i < length && start + i < width ? a >> (start + i) & 1 : negative;
    field |= static_cast<T>(std::make_unsigned_t<T>(bit) << i);
  }
  return field;
}

}  // namespace sim
