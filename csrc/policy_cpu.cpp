// Policy losses on the CPU: OpenMP over blocks of elements, each a vectorised loop over token_math.h. target_clones compiles
// the loops for AVX-512, AVX2 and the baseline and picks one when the library is loaded.

#include "policy_cpu.h"

#include <algorithm>
#include <limits>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define IPVRM_SIMD __attribute__((target_clones("avx512f", "avx2", "default"), flatten))
#else
#define IPVRM_SIMD
#endif

namespace ipvrm {
namespace {

constexpr int64_t kBlock = 4096;
constexpr int64_t kThreaded = 65536;  // elements; below, a thread team costs more than it saves

template <typename Body>
void for_each_block(int64_t count, int num_threads, const Body& body) {
  const int threads = count < kThreaded ? 1 : num_threads;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t first = 0; first < count; first += kBlock) body(first, std::min(kBlock, count - first));
}

IPVRM_SIMD void surrogate_block(const float* __restrict logprobs, const float* __restrict old_logprobs,
                                const float* __restrict advantages, int64_t count, Clips clips, float* __restrict loss,
                                uint8_t* __restrict clipped, uint8_t* __restrict dual_clipped,
                                float* __restrict derivative) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const Surrogate s = clipped_surrogate(logprobs[i], old_logprobs[i], advantages[i], clips);
    loss[i] = s.loss;
    derivative[i] = s.derivative;
    clipped[i] = s.clipped;
    dual_clipped[i] = s.dual_clipped;
  }
}

IPVRM_SIMD void gradient_block(const float* __restrict dloss, const float* __restrict derivative,
                               float* __restrict dlogprobs, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) dlogprobs[i] = clipped_surrogate_gradient(dloss[i], derivative[i]);
}

// Used elements of one branch, gathered: what goes through the vectorised loop, and where its derivative belongs.
struct Elements {
  static constexpr int64_t kCapacity = 512;
  int64_t count = 0;
  float logprob[kCapacity], old_logprob[kCapacity], advantage[kCapacity], factor[kCapacity];
  float loss[kCapacity], derivative[kCapacity], kl[kCapacity], prob[kCapacity];
  int32_t clipped[kCapacity], dual_clipped[kCapacity];
  float* target[kCapacity];
};

IPVRM_SIMD void objective_terms(Elements& e, bool with_prob, float scale, Clips clips) {
  const int64_t count = e.count;
  if (with_prob) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) e.prob[i] = normal_prob(e.old_logprob[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) e.prob[i] = 1.0f;
  }
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const ObjectiveTerm t = objective_term(e.logprob[i], e.old_logprob[i], e.advantage[i], e.prob[i], e.factor[i], clips);
    e.loss[i] = t.loss;
    e.derivative[i] = scale * t.derivative;
    e.kl[i] = t.kl;
    e.clipped[i] = t.clipped;
    e.dual_clipped[i] = t.dual_clipped;
  }
}

template <typename T>
IPVRM_SIMD double sum_of(const T* x, int64_t count) {
  double sum = 0.0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += x[i];
  return sum;
}

// Evaluates and empties `e`: derivatives to their places, sums onto `sums`. scale: of the derivatives, alpha for candidates.
void flush(Elements& e, bool is_candidate, float scale, Clips clips, double* sums) {
  objective_terms(e, is_candidate, scale, clips);
  double* branch = sums + (is_candidate ? kBranchSums : 0);
  branch[kLoss] += sum_of(e.loss, e.count);
  branch[kClipped] += sum_of(e.clipped, e.count);
  branch[kDualClipped] += sum_of(e.dual_clipped, e.count);
  branch[kKl] += sum_of(e.kl, e.count);
  branch[kUsed] += static_cast<double>(e.count);
  if (is_candidate) sums[kMass] += sum_of(e.prob, e.count);
  for (int64_t i = 0; i < e.count; ++i) *e.target[i] = e.derivative[i];
  e.count = 0;
}

void objective_block(const PolicyRows& rows, int64_t first, int64_t last, const Branch (&branches)[2], float alpha,
                     float* dlogprobs, double* sums) {
  Elements tokens, candidates;
  const float scales[2] = {1.0f, alpha};
  const auto add = [&](Elements& e, bool is_candidate, float logprob, const float* old_logprob, const float* advantage,
                       float factor, float* target) {
    *target = 0.0f;
    if (*old_logprob == -std::numeric_limits<float>::infinity()) return;
    e.logprob[e.count] = logprob;
    e.old_logprob[e.count] = *old_logprob;
    e.advantage[e.count] = *advantage;
    e.factor[e.count] = factor;
    e.target[e.count] = target;
    if (++e.count == Elements::kCapacity) flush(e, is_candidate, scales[is_candidate], branches[is_candidate].clips, sums);
  };
  std::fill(sums, sums + kObjectiveSums, 0.0);
  const int32_t* cu = rows.cu_seqlens;
  int64_t b = std::upper_bound(cu, cu + rows.B + 1, static_cast<int32_t>(rows.row0 + first)) - cu - 1;
  for (int64_t n = first; n < last; ++n) {
    while (b + 1 < rows.B && cu[b + 1] <= rows.row0 + n) ++b;
    const int32_t length = cu[b + 1] - cu[b];
    const float* logprobs = rows.logprobs + n * (rows.K + 1);
    float* targets = dlogprobs + n * (rows.K + 1);
    add(tokens, false, logprobs[0], rows.old_logprobs + n, rows.advantages + n, branches[0].factor(length), targets);
    const float factor = branches[1].factor(length);
    for (int64_t k = 0; k < rows.K; ++k) {
      const int64_t i = n * rows.K + k;
      add(candidates, true, logprobs[k + 1], rows.old_candidate_logprobs + i, rows.candidate_advantages + i, factor,
          targets + k + 1);
    }
  }
  flush(tokens, false, scales[0], branches[0].clips, sums);
  flush(candidates, true, scales[1], branches[1].clips, sums);
}

}  // namespace

void clipped_surrogate_fwd_cpu(const float* logprobs, const float* old_logprobs, const float* advantages, int64_t count,
                               Clips clips, float* loss, uint8_t* clipped, uint8_t* dual_clipped, float* derivative,
                               int num_threads) {
  for_each_block(count, num_threads, [&](int64_t i, int64_t length) {
    surrogate_block(logprobs + i, old_logprobs + i, advantages + i, length, clips, loss + i, clipped + i, dual_clipped + i,
                    derivative + i);
  });
}

void clipped_surrogate_bwd_cpu(const float* dloss, const float* derivative, float* dlogprobs, int64_t count,
                               int num_threads) {
  for_each_block(count, num_threads,
                 [&](int64_t i, int64_t length) { gradient_block(dloss + i, derivative + i, dlogprobs + i, length); });
}

void distrl_objective_cpu(const PolicyRows& rows, const Branch& tokens, const Branch& candidates, float alpha,
                          const ObjectiveOutputs& outputs, double* partial, int64_t block_rows, int num_threads) {
  const Branch branches[2] = {tokens, candidates};
  const int64_t blocks = (rows.n + block_rows - 1) / block_rows;
  const int threads = rows.n * (rows.K + 1) < kThreaded ? 1 : num_threads;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t block = 0; block < blocks; ++block) {
    objective_block(rows, block * block_rows, std::min(rows.n, (block + 1) * block_rows), branches, alpha,
                    outputs.dlogprobs, partial + block * kObjectiveSums);
  }
  double sums[kObjectiveSums] = {};
  for (int64_t block = 0; block < blocks; ++block) {
    for (int i = 0; i < kObjectiveSums; ++i) sums[i] += partial[block * kObjectiveSums + i];
  }
  finish_objective(sums, rows.n, alpha, outputs.loss, outputs.token_loss, outputs.candidate_loss, outputs.metrics);
}

}  // namespace ipvrm
