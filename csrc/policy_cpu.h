// CPU kernels of the policy losses: addresses in, outputs filled. fp32 contiguous.
#pragma once

#include <cstdint>

#include "token_math.h"

namespace ipvrm {

// Every array has `count` elements; slope = d loss / d logprob.
void clipped_surrogate_fwd_cpu(const float* logprobs, const float* old_logprobs, const float* advantages, int64_t count,
                               Clips clips, float* loss, uint8_t* clipped, uint8_t* dual_clipped, float* slope,
                               int num_threads);
void clipped_surrogate_bwd_cpu(const float* dloss, const float* slope, float* dlogprobs, int64_t count, int num_threads);

}  // namespace ipvrm
