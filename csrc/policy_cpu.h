// CPU kernels of the policy losses: addresses in, outputs filled. fp32 contiguous.
#pragma once

#include <cstdint>

#include "token_math.h"

namespace ipvrm {

// Every array has `count` elements; derivative = d loss / d logprob.
void clipped_surrogate_fwd_cpu(const float* logprobs, const float* old_logprobs, const float* advantages, int64_t count,
                               Clips clips, float* loss, uint8_t* clipped, uint8_t* dual_clipped, float* derivative,
                               int num_threads);
void clipped_surrogate_bwd_cpu(const float* dloss, const float* derivative, float* dlogprobs, int64_t count,
                               int num_threads);

// n rows of a batch, from its row `row0` on: K candidates each, in cu_seqlens (B+1,) of the whole batch. An old log-prob of
// -inf marks an unused element, whose other inputs are not read.
struct PolicyRows {
  const float* logprobs;                // (n, 1 + K), the sampled token first
  const float* old_logprobs;            // (n,)
  const float* old_candidate_logprobs;  // (n, K)
  const float* advantages;              // (n,)
  const float* candidate_advantages;    // (n, K)
  const int32_t* cu_seqlens;
  int64_t B;
  int64_t row0;
  int64_t n;
  int64_t K;
};
struct ObjectiveOutputs {
  float* loss;
  float* token_loss;
  float* candidate_loss;
  float* metrics;    // (8, 2)
  float* dlogprobs;  // (n, 1 + K), of loss
};

// The DistRL objective of these rows. partial (ceil(n / block_rows), 11) is scratch: sums of blocks, added in their order,
// so that the result does not depend on the number of threads.
void distrl_objective_cpu(const PolicyRows& rows, const Branch& tokens, const Branch& candidates, float alpha,
                          const ObjectiveOutputs& outputs, double* partial, int64_t block_rows, int num_threads);

}  // namespace ipvrm
