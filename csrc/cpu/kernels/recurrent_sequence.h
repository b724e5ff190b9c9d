// Samples by rank, rows by step; and the working memory of the recurrent kernels.
#pragma once
#include "../scratch.h"
#include "cvfast/recurrent.h"
#include "simd.h"

namespace cvfast {
namespace {

template <class S>
void zero_row(S* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = S{};
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

// Calls run(S{}) for the storage type S of `dtype`, one that is computed in T.
template <class T, class Run>
void with_storage(DType dtype, Run&& run) {
  if constexpr (sizeof(T) == sizeof(double)) return run(double{});
  else if (dtype == DType::bf16) return run(Bf16{});
  else if (dtype == DType::f16) return run(F16{});
  else return run(float{});
}

// Rows in memory as rows of T; offsets in elements.
template <class T>
struct Storage {
  DType dtype;

  bool converts() const { return dtype == DType::bf16 || dtype == DType::f16; }

  void load(const void* from, int64_t offset, T* to, int64_t count) const {
    with_storage<T>(dtype, [&](auto s) { copy_contiguous(static_cast<const decltype(s)*>(from) + offset, to, count); });
  }
  void store(const T* from, void* to, int64_t offset, int64_t count) const {
    with_storage<T>(dtype, [&](auto s) { copy_contiguous(from, static_cast<decltype(s)*>(to) + offset, count); });
  }
  void zero(void* to, int64_t offset, int64_t count) const {
    with_storage<T>(dtype, [&](auto s) { zero_row(static_cast<decltype(s)*>(to) + offset, count); });
  }
  // The row where it lies, or converted in `scratch`.
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
    Carver measuring;
    cut(measuring);
    Carver carver;
    carver.base_ = static_cast<char*>(thread_scratch(use, measuring.used_));
    cut(carver);
  }

 private:
  char* base_ = nullptr;
  int64_t used_ = 0;
};

}  // namespace
}  // namespace cvfast
