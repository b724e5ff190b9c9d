// Small kernels for the tests of the simulator itself: each is right as it stands, except those named *_bug*.
#include <cstdint>

namespace {

constexpr int kThreads = 64;

// Each thread reads what its neighbour wrote to shared memory.
__device__ void rotate(float* values, bool before_reading) {
  __shared__ float shared[kThreads];
  shared[threadIdx.x] = values[threadIdx.x];
  if (before_reading) __syncthreads();
  values[threadIdx.x] = shared[(threadIdx.x + 1) % kThreads];
}

}  // namespace

extern "C" __global__ void rotate_values(float* values) { rotate(values, true); }

extern "C" __global__ void bug_missing_barrier(float* values) { rotate(values, false); }

// The second round overwrites shared memory that others may still read.
extern "C" __global__ void bug_missing_second_barrier(float* values) {
  __shared__ float shared[kThreads];
  for (int round = 0; round < 2; ++round) {
    shared[threadIdx.x] = values[threadIdx.x];
    __syncthreads();
    values[threadIdx.x] = shared[(threadIdx.x + 1) % kThreads];
  }
}

extern "C" __global__ void bug_divergent_barrier(float* values) {
  if (threadIdx.x < 32) {
    values[threadIdx.x] += 1;
    __syncthreads();
    values[threadIdx.x] += 1;
  } else {
    values[threadIdx.x] += 2;
  }
}

extern "C" __global__ void bug_one_past_the_end(float* values) { values[threadIdx.x + 1] = 0; }

extern "C" __global__ void bug_shared_out_of_bounds(float* values, int shift) {
  __shared__ float shared[kThreads];
  shared[threadIdx.x + shift] = 1;
  __syncthreads();
  values[threadIdx.x] = shared[threadIdx.x];
}

extern "C" __global__ void bug_uninitialised_shared(float* values, int count) {
  __shared__ float shared[kThreads];
  if (threadIdx.x < count) shared[threadIdx.x] = 1;
  __syncthreads();
  values[threadIdx.x] = shared[threadIdx.x];
}

extern "C" __global__ void bug_misaligned(float* values) {
  *reinterpret_cast<float4*>(values + 1) = make_float4(1, 2, 3, 4);
}

// All blocks write one element.
extern "C" __global__ void bug_blocks_collide(float* values) { values[threadIdx.x] = blockIdx.x; }

// Sums each warp by shuffles, then the warps through shared memory.
extern "C" __global__ void sum(const float* values, float* total) {
  extern __shared__ float warps[];
  float value = values[blockIdx.x * blockDim.x + threadIdx.x];
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < blockDim.x / 32; ++warp) value += warps[warp];
    total[blockIdx.x] = value;
  }
}

// Hands a value through shared memory inside a warp, ordered by __syncwarp (or not).
extern "C" __global__ void rotate_in_warp(float* values) {
  __shared__ float shared[kThreads];
  shared[threadIdx.x] = values[threadIdx.x];
  __syncwarp();
  values[threadIdx.x] = shared[threadIdx.x / 32 * 32 + (threadIdx.x + 1) % 32];
}

extern "C" __global__ void bug_missing_warp_barrier(float* values) {
  __shared__ float shared[kThreads];
  shared[threadIdx.x] = values[threadIdx.x];
  values[threadIdx.x] = shared[threadIdx.x / 32 * 32 + (threadIdx.x + 1) % 32];
}

// Instructions whose meaning is easily got wrong; results by position in `out`.
extern "C" __global__ void shuffles(int* out) {
  const int lane = threadIdx.x;
  out[lane] = __shfl_up_sync(0xffffffffu, lane, 3);
  out[32 + lane] = __shfl_down_sync(0xffffffffu, lane, 5, 16);
  out[64 + lane] = __shfl_sync(0xffffffffu, lane, lane + 9, 8);
  out[96 + lane] = __shfl_xor_sync(0xffffffffu, lane, 6);
  out[128 + lane] = __ballot_sync(0xffffffffu, lane % 3 == 0);
}

extern "C" __global__ void integers(const int64_t* a, const int64_t* b, int64_t* out) {
  const int64_t x = a[threadIdx.x], y = b[threadIdx.x];
  int64_t* row = out + threadIdx.x * 12;
  row[0] = x / y;
  row[1] = x % y;
  row[2] = __mul64hi(x, y);
  row[3] = static_cast<int32_t>(x) >> (y & 31);
  row[4] = static_cast<uint32_t>(x) >> (y & 31);
  row[5] = x < y ? x : y;
  row[6] = static_cast<uint64_t>(x) < static_cast<uint64_t>(y);
  row[7] = static_cast<int64_t>(static_cast<int32_t>(x)) * static_cast<int32_t>(y);
  row[8] = __popcll(x);
  row[9] = static_cast<int8_t>(x);
  row[10] = static_cast<int32_t>(x) / (static_cast<int32_t>(y) | 1);
  row[11] = __umul64hi(x, y);
}

extern "C" __global__ void floats(const float* a, const float* b, float* out) {
  const float x = a[threadIdx.x], y = b[threadIdx.x];
  float* row = out + threadIdx.x * 11;
  row[0] = fmaf(x, y, -x * y);
  row[1] = fminf(x, y);
  row[2] = fmaxf(x, y);
  row[3] = x < y;
  row[4] = !(x < y);
  row[5] = x != y;
  row[6] = __float2int_rz(x);
  row[7] = __float2uint_rn(x);
  row[8] = __fdiv_rn(x, y);
  row[9] = __fsqrt_rn(x);
  row[10] = static_cast<float>(static_cast<double>(x) * y);
}

extern "C" __global__ void reads_grid(int* out) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] = block * 1000 + thread;
}
