// Samples by rank, rows by step, and what else the recurrent kernels share.
#pragma once
#include "../scratch.h"
#include "cvfast/recurrent.h"
#include "simd.h"

namespace cvfast {
namespace {

template <class T>
void zero_row(T* to, int64_t count) {
  if (count > 0) __builtin_memset(to, 0, count * sizeof(T));
}
template <class T>
void copy_row(const T* from, T* to, int64_t count) {
  if (count > 0) __builtin_memcpy(to, from, count * sizeof(T));
}

struct Ranks {
  const Sequence& s;

  int64_t length(int64_t rank) const { return s.lengths ? s.lengths[rank] : s.steps; }
  int64_t sample(int64_t rank) const { return s.order ? s.order[rank] : rank; }
  int64_t first(int64_t step) const { return s.first ? s.first[step] : step * s.batch; }  // counts (step, rank) pairs
  int64_t active(int64_t step) const { return first(step + 1) - first(step); }
  int64_t time(int64_t step, int64_t rank) const { return s.reverse ? length(rank) - 1 - step : step; }
  bool padded() const { return s.lengths && !s.packed; }

  // Where the row of (time, rank) begins, in elements.
  int64_t offset(int64_t time_stride, int64_t sample_stride, int64_t time, int64_t rank) const {
    if (s.packed) return (first(time) + rank) * sample_stride;
    return time * time_stride + sample(rank) * sample_stride;
  }
  int64_t offset(Rows rows, int64_t time, int64_t rank) const {
    return offset(rows.time_stride, rows.sample_stride, time, rank);
  }
  int64_t offset(ConstRows rows, int64_t time, int64_t rank) const {
    return offset(rows.time_stride, rows.sample_stride, time, rank);
  }

  // The first rank of piece `piece` of `pieces`, which have about the same number of steps.
  int64_t cut(int64_t piece, int64_t pieces) const {
    if (!s.lengths) return s.batch * piece / pieces;
    const int64_t goal = first(s.steps) * piece / pieces;
    int64_t rank = 0;
    for (int64_t done = 0; rank < s.batch && (piece == pieces || done < goal); ++rank) done += length(rank);
    return rank;
  }
};

// Rows in memory as rows of T; offsets in elements. Compiled once for all cells and callers.
template <class T>
struct Storage {
  DType dtype;

  bool converts() const { return dtype == DType::bf16 || dtype == DType::f16; }
  int64_t bytes(int64_t count) const { return count * static_cast<int64_t>(converts() ? sizeof(Bf16) : sizeof(T)); }

  [[gnu::noinline]] void load(const void* from, int64_t offset, T* to, int64_t count) const {
    const void* at = static_cast<const char*>(from) + bytes(offset);
    if (!converts()) return copy_row(static_cast<const T*>(at), to, count);
    if constexpr (sizeof(T) == sizeof(float)) {
      if (dtype == DType::bf16) copy_contiguous(static_cast<const Bf16*>(at), to, count);
      else copy_contiguous(static_cast<const F16*>(at), to, count);
    }
  }
  [[gnu::noinline]] void store(const T* from, void* to, int64_t offset, int64_t count) const {
    void* at = static_cast<char*>(to) + bytes(offset);
    if (!converts()) return copy_row(from, static_cast<T*>(at), count);
    if constexpr (sizeof(T) == sizeof(float)) {
      if (dtype == DType::bf16) copy_contiguous(from, static_cast<Bf16*>(at), count);
      else copy_contiguous(from, static_cast<F16*>(at), count);
    }
  }
  void zero(void* to, int64_t offset, int64_t count) const {
    zero_row(static_cast<char*>(to) + bytes(offset), bytes(count));  // all bits 0: 0 in every dtype
  }
  // The rows where they lie, or converted in `scratch`.
  const T* view(const void* from, int64_t offset, int64_t count, T* scratch) const {
    if (!converts()) return static_cast<const T*>(from) + offset;
    load(from, offset, scratch, count);
    return scratch;
  }
};

// Steps that are worked on together: about `rows` rows of `ranks` ranks.
inline int64_t steps_of(int64_t rows, int64_t ranks) { return max<int64_t>(1, rows / max<int64_t>(1, ranks)); }

// Cuts one piece of scratch memory into arrays, each aligned to 64 bytes. `cut(carver)` is called twice: first to measure.
class Carver {
 public:
  template <class T>
  T* take(int64_t count) {
    T* array = reinterpret_cast<T*>(base_ + used_);
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return array;
  }
  template <class Cut>
  static void carve(ScratchUse use, Cut&& cut) {
    cut_from(thread_scratch(use, bytes(cut)), cut);
  }
  template <class Cut>
  static int64_t bytes(Cut&& cut) {
    Carver measuring;
    cut(measuring);
    return measuring.used_;
  }
  template <class Cut>
  static void cut_from(void* memory, Cut&& cut) {
    Carver carver;
    carver.base_ = static_cast<char*>(memory);
    cut(carver);
  }

 private:
  char* base_ = nullptr;
  int64_t used_ = 0;
};

}  // namespace
}  // namespace cvfast
