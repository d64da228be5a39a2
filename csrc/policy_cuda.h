// Launchers of the CUDA policy losses: device addresses in, outputs filled, on the given stream. Contracts of policy_cpu.h.
#pragma once

#include <cstdint>

#include "policy_cpu.h"
#include "token_math.h"

namespace ipvrm {

void clipped_surrogate_fwd_cuda(const float* logprobs, const float* old_logprobs, const float* advantages, int64_t count,
                                Clips clips, float* loss, uint8_t* clipped, uint8_t* dual_clipped, float* derivative,
                                void* stream);
void clipped_surrogate_bwd_cuda(const float* dloss, const float* derivative, float* dlogprobs, int64_t count, void* stream);

}  // namespace ipvrm
