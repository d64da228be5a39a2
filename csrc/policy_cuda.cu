// Policy losses on NVIDIA GPUs: one thread per element, neighbours in neighbouring threads. The objective's sums leave each
// block in fp32 and are added in fp64, in an order that depends on the shape alone, by a second launch of one block.

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "policy_cuda.h"
#include "token_math.h"

namespace ipvrm {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": launch failed: " + cudaGetErrorString(error));
}

__global__ void __launch_bounds__(kThreads)
clipped_surrogate_fwd_kernel(const float* __restrict__ logprobs, const float* __restrict__ old_logprobs,
                             const float* __restrict__ advantages, int64_t count, Clips clips, float* __restrict__ loss,
                             uint8_t* __restrict__ clipped, uint8_t* __restrict__ dual_clipped,
                             float* __restrict__ slope) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const Surrogate s = clipped_surrogate(logprobs[i], old_logprobs[i], advantages[i], clips);
  loss[i] = s.loss;
  slope[i] = s.slope;
  clipped[i] = s.clipped;
  dual_clipped[i] = s.dual_clipped;
}

__global__ void __launch_bounds__(kThreads)
clipped_surrogate_bwd_kernel(const float* __restrict__ dloss, const float* __restrict__ slope,
                             float* __restrict__ dlogprobs, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) dlogprobs[i] = clipped_surrogate_slope(dloss[i], slope[i]);
}

// Tokens of the sequence that owns `row`; memory-safe, if meaningless, for edges that nobody checked.
__device__ int32_t sequence_length(const PolicyRows& rows, int64_t row) {
  int64_t low = 0, high = rows.B;  // cu[low] <= row < cu[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (rows.cu_seqlens[middle] <= row) low = middle;
    else high = middle;
  }
  return rows.B == 0 ? 1 : rows.cu_seqlens[low + 1] - rows.cu_seqlens[low];
}

// The sum of x over the block, in thread 0.
template <typename T>
__device__ T block_sum(T x, T* warp_sums) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_down_sync(0xffffffffu, x, offset);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = x;
  __syncthreads();
  T sum = 0;
  if (threadIdx.x == 0) {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += warp_sums[w];
  }
  __syncthreads();  // warp_sums is rewritten by the next sum
  return sum;
}

__global__ void __launch_bounds__(kThreads)
distrl_objective_kernel(PolicyRows rows, Branch tokens, Branch candidates, const float* __restrict__ token_denominator,
                        const float* __restrict__ candidate_denominator, float alpha, float* __restrict__ dlogprobs,
                        float* __restrict__ partial) {
  __shared__ float warp_sums[kWarps];
  const float token_divisor = token_denominator ? *token_denominator : tokens.divisor;
  const float candidate_divisor = candidate_denominator ? *candidate_denominator : candidates.divisor;
  float sums[kObjectiveSums] = {};
  const int64_t count = rows.n * (rows.K + 1), step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step) {
    const int64_t n = i / (rows.K + 1), k = i - n * (rows.K + 1) - 1;  // k = -1: the sampled token
    const int64_t c = n * rows.K + k;
    const int64_t id = k < 0 ? rows.token_ids[n] : rows.candidate_ids[c];
    const float old_logprob = k < 0 ? rows.old_logprobs[n] : rows.old_candidate_logprobs[c];
    float slope = 0.0f;
    if (id >= 0 && old_logprob != -INFINITY) {
      const Branch branch = {k < 0 ? tokens.reduction : candidates.reduction, k < 0 ? token_divisor : candidate_divisor,
                             k < 0 ? tokens.clips : candidates.clips};
      const int32_t length = branch.reduction == Reduction::sequence_mean ? sequence_length(rows, rows.row0 + n) : 1;
      const float prob = k < 0 ? 1.0f : exp_any(old_logprob);
      const float advantage = k < 0 ? rows.advantages[n] : rows.candidate_advantages[c];
      const ObjectiveTerm t =
          objective_term(rows.logprobs[i], old_logprob, advantage, prob, branch.factor(length), branch.clips);
      slope = k < 0 ? t.slope : alpha * t.slope;
      const float own[kBranchSums] = {t.loss, static_cast<float>(t.clipped), static_cast<float>(t.dual_clipped), t.kl, 1.0f};
#pragma unroll
      for (int s = 0; s < kBranchSums; ++s) {
        sums[s] += k < 0 ? own[s] : 0.0f;
        sums[kBranchSums + s] += k < 0 ? 0.0f : own[s];
      }
      sums[kMass] += k < 0 ? 0.0f : prob;
    }
    dlogprobs[i] = slope;
  }
#pragma unroll
  for (int s = 0; s < kObjectiveSums; ++s) {
    const float sum = block_sum(sums[s], warp_sums);
    if (threadIdx.x == 0) partial[blockIdx.x * kObjectiveSums + s] = sum;
  }
}

__global__ void __launch_bounds__(kThreads)
finish_objective_kernel(const float* __restrict__ partial, int blocks, int64_t rows, float alpha, ObjectiveOutputs outputs) {
  __shared__ double warp_sums[kWarps], sums[kObjectiveSums];
  for (int s = 0; s < kObjectiveSums; ++s) {
    double sum = 0.0;
    for (int block = threadIdx.x; block < blocks; block += kThreads) sum += partial[block * kObjectiveSums + s];
    const double total = block_sum(sum, warp_sums);
    if (threadIdx.x == 0) sums[s] = total;
  }
  if (threadIdx.x == 0) {
    finish_objective(sums, rows, alpha, outputs.loss, outputs.token_loss, outputs.candidate_loss, outputs.metrics);
  }
}

cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }
unsigned grid(int64_t count) { return static_cast<unsigned>((count + kThreads - 1) / kThreads); }

}  // namespace

void clipped_surrogate_fwd_cuda(const float* logprobs, const float* old_logprobs, const float* advantages, int64_t count,
                                Clips clips, float* loss, uint8_t* clipped, uint8_t* dual_clipped, float* slope,
                                void* stream) {
  if (count == 0) return;
  clipped_surrogate_fwd_kernel<<<grid(count), kThreads, 0, as_stream(stream)>>>(
      logprobs, old_logprobs, advantages, count, clips, loss, clipped, dual_clipped, slope);
  check_launch("clipped_surrogate");
}

void clipped_surrogate_bwd_cuda(const float* dloss, const float* slope, float* dlogprobs, int64_t count, void* stream) {
  if (count == 0) return;
  clipped_surrogate_bwd_kernel<<<grid(count), kThreads, 0, as_stream(stream)>>>(dloss, slope, dlogprobs, count);
  check_launch("clipped_surrogate backward");
}

void distrl_objective_cuda(PolicyRows rows, Branch tokens, Branch candidates, const float* token_denominator,
                           const float* candidate_denominator, float alpha, ObjectiveOutputs outputs, float* partial,
                           int blocks, void* stream) {
  if (blocks > 0) {
    distrl_objective_kernel<<<blocks, kThreads, 0, as_stream(stream)>>>(
        rows, tokens, candidates, token_denominator, candidate_denominator, alpha, outputs.dlogprobs, partial);
  }
  finish_objective_kernel<<<1, kThreads, 0, as_stream(stream)>>>(partial, blocks, rows.n, alpha, outputs);
  check_launch("distrl_objective");
}

}  // namespace ipvrm
