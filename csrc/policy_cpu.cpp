// Policy losses on the CPU: OpenMP over blocks of elements, each a vectorised loop over token_math.h. target_clones compiles
// the loops for AVX-512, AVX2 and the baseline and picks one when the library is loaded.

#include "policy_cpu.h"

#include <algorithm>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define IPVRM_SIMD __attribute__((target_clones("avx512f", "avx2", "default"), flatten))
#else
#define IPVRM_SIMD
#endif

namespace ipvrm {
namespace {

constexpr int64_t kBlock = 4096;

template <typename Body>
void for_each_block(int64_t count, int num_threads, const Body& body) {
  const int threads = count < 16384 ? 1 : num_threads;  // below this a thread team costs more than it saves
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t first = 0; first < count; first += kBlock) body(first, std::min(kBlock, count - first));
}

IPVRM_SIMD void surrogate_block(const float* __restrict logprobs, const float* __restrict old_logprobs,
                                const float* __restrict advantages, int64_t count, Clips clips, float* __restrict loss,
                                uint8_t* __restrict clipped, uint8_t* __restrict dual_clipped, float* __restrict slope) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const Surrogate s = clipped_surrogate(logprobs[i], old_logprobs[i], advantages[i], clips);
    loss[i] = s.loss;
    slope[i] = s.slope;
    clipped[i] = s.clipped;
    dual_clipped[i] = s.dual_clipped;
  }
}

IPVRM_SIMD void slope_block(const float* __restrict dloss, const float* __restrict slope, float* __restrict dlogprobs,
                            int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) dlogprobs[i] = clipped_surrogate_slope(dloss[i], slope[i]);
}

}  // namespace

void clipped_surrogate_fwd_cpu(const float* logprobs, const float* old_logprobs, const float* advantages, int64_t count,
                               Clips clips, float* loss, uint8_t* clipped, uint8_t* dual_clipped, float* slope,
                               int num_threads) {
  for_each_block(count, num_threads, [&](int64_t i, int64_t length) {
    surrogate_block(logprobs + i, old_logprobs + i, advantages + i, length, clips, loss + i, clipped + i, dual_clipped + i,
                    slope + i);
  });
}

void clipped_surrogate_bwd_cpu(const float* dloss, const float* slope, float* dlogprobs, int64_t count, int num_threads) {
  for_each_block(count, num_threads,
                 [&](int64_t i, int64_t length) { slope_block(dloss + i, slope + i, dlogprobs + i, length); });
}

}  // namespace ipvrm
