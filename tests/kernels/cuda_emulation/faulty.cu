// Kernels that are wrong, each in one way but the first, to see that the emulation says so. out: (kThreads,).
#include <cuda_runtime.h>

#include <string>

namespace {

constexpr int kThreads = 64;
constexpr unsigned kAll = 0xffffffffu;

__global__ void right(float* out) {
  __shared__ float given[kThreads];
  given[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncthreads();
  const float other = given[(threadIdx.x + 40) % kThreads];
  out[threadIdx.x] = __shfl_xor_sync(kAll, other, 1) + __shfl_sync(kAll, other, 3);
}

__global__ void no_barrier(float* out) {
  __shared__ float given[kThreads];
  given[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = given[(threadIdx.x + 40) % kThreads];
}

__global__ void written_again_too_early(float* out) {
  __shared__ float given;
  if (threadIdx.x == 0) given = 1.0f;
  __syncthreads();
  out[threadIdx.x] = given;
  if (threadIdx.x == 0) given = 7.0f;
}

__global__ void seen_in_another_order_only(float* out) {
  __shared__ float given;
  if (threadIdx.x == 0) given = 1.0f;
  __syncthreads();
  out[threadIdx.x] = given;
  if (threadIdx.x == kThreads - 1) given = 7.0f;
}

__global__ void different_barriers(float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1.0f;
}

__global__ void lane_has_left(float* out) {
  if (threadIdx.x == 5) return;
  out[threadIdx.x] = __shfl_down_sync(kAll, 1.0f, 1);
}

__global__ void lane_at_a_barrier(float* out) {
  if (threadIdx.x == 5) __syncthreads();
  out[threadIdx.x] = __shfl_up_sync(kAll, 1.0f, 1);
  if (threadIdx.x != 5) __syncthreads();
}

__global__ void different_shuffles(float* out) {
  if (threadIdx.x % 2 == 0) {
    out[threadIdx.x] = __shfl_up_sync(kAll, 1.0f, 1);
  } else {
    out[threadIdx.x] = __shfl_up_sync(kAll, 1.0f, 2);
  }
}

__global__ void lane_outside_the_mask(float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_down_sync(0x0000ffffu, 1.0f, 1);
}

__global__ void not_in_its_own_mask(float* out) {
  __syncwarp(0x0000ffffu);
  out[threadIdx.x] = 1.0f;
}

__global__ void writes_behind_the_end(float* out) { out[threadIdx.x + 1] = 1.0f; }

__global__ void reads_far_away(float* out) { out[threadIdx.x] = out[threadIdx.x + 1000]; }

}  // namespace

void run_faulty(const std::string& name, float* out) {
  void* stream = nullptr;
#define RUN(kernel) \
  if (name == #kernel) return kernel<<<1, kThreads, 0, stream>>>(out);
  RUN(right)
  RUN(no_barrier)
  RUN(written_again_too_early)
  RUN(seen_in_another_order_only)
  RUN(different_barriers)
  RUN(lane_has_left)
  RUN(lane_at_a_barrier)
  RUN(different_shuffles)
  RUN(lane_outside_the_mask)
  RUN(not_in_its_own_mask)
  RUN(writes_behind_the_end)
  RUN(reads_far_away)
  if (name == "empty_grid") return right<<<0, kThreads, 0, stream>>>(out);
  throw emulation::Error("no kernel called " + name);
}
