// clipped_surrogate on NVIDIA GPUs: one thread per element, neighbours in neighbouring threads.

#include <cuda_runtime.h>

#include "launch_cuda.h"
#include "policy_cuda.h"
#include "token_math.h"

namespace ipvrm {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    clipped_surrogate_fwd_kernel(const float* __restrict__ logprobs, const float* __restrict__ old_logprobs,
                                 const float* __restrict__ advantages, int64_t count, Clips clips, float* __restrict__ loss,
                                 uint8_t* __restrict__ clipped, uint8_t* __restrict__ dual_clipped,
                                 float* __restrict__ derivative) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const Surrogate s = clipped_surrogate(logprobs[i], old_logprobs[i], advantages[i], clips);
  loss[i] = s.loss;
  derivative[i] = s.derivative;
  clipped[i] = s.clipped;
  dual_clipped[i] = s.dual_clipped;
}

__global__ void __launch_bounds__(kThreads)
    clipped_surrogate_bwd_kernel(const float* __restrict__ dloss, const float* __restrict__ derivative,
                                 float* __restrict__ dlogprobs, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) dlogprobs[i] = clipped_surrogate_gradient(dloss[i], derivative[i]);
}

}  // namespace

void clipped_surrogate_fwd_cuda(const float* logprobs, const float* old_logprobs, const float* advantages, int64_t count,
                                Clips clips, float* loss, uint8_t* clipped, uint8_t* dual_clipped, float* derivative,
                                void* stream) {
  if (count == 0) return;
  const unsigned blocks = grid("clipped_surrogate", count, kThreads);
  clipped_surrogate_fwd_kernel<<<blocks, kThreads, 0, as_stream(stream)>>>(logprobs, old_logprobs, advantages, count, clips,
                                                                           loss, clipped, dual_clipped, derivative);
  check_launch("clipped_surrogate");
}

void clipped_surrogate_bwd_cuda(const float* dloss, const float* derivative, float* dlogprobs, int64_t count,
                                void* stream) {
  if (count == 0) return;
  const unsigned blocks = grid("clipped_surrogate backward", count, kThreads);
  clipped_surrogate_bwd_kernel<<<blocks, kThreads, 0, as_stream(stream)>>>(dloss, derivative, dlogprobs, count);
  check_launch("clipped_surrogate backward");
}

}  // namespace ipvrm
