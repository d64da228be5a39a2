// Launchers of the CUDA sequence ops: device addresses in, outputs filled, on the given stream. Same contracts as sequence_cpu.h,
// except that cu_seqlens may be unchecked: its edges are held to 0 .. num_rows.
#pragma once

#include <cstdint>

#include "sequence_cpu.h"  // PrefixValueGradients, LossTerms

namespace ipvrm {

void segment_scan_cuda(const float* x, const int32_t* cu_seqlens, float* y, int64_t num_sequences, int64_t num_rows,
                       double decay, bool reverse, void* stream);
void prefix_values_fwd_cuda(const float* log_ratio, const int32_t* cu_seqlens, float* value, float* mean_value, float* prob,
                            float* td, int64_t num_sequences, int64_t num_rows, float beta, void* stream);
void prefix_values_bwd_cuda(const PrefixValueGradients& upstream, const float* prob, const int32_t* cu_seqlens,
                            float* dlog_ratio, int64_t num_sequences, int64_t num_rows, float beta, void* stream);
// losses (B,) and counted (B,), unless null: what prefix_value_loss_fwd_cpu sums, here left to one reduction of the
// caller's. dvalue (N,), unless null: d loss / d value_t, for the backward.
void prefix_value_loss_fwd_cuda(const float* log_ratio, const int32_t* cu_seqlens, const LossTerms& terms, float* losses,
                                float* counted, float* dvalue, int64_t num_sequences, int64_t num_rows, float beta,
                                void* stream);
// dlog_ratio_t = *scale * beta * sum_{j >= t} dvalue_j; `scale` is a device scalar, so that no launch waits for it.
void prefix_value_loss_bwd_cuda(const float* dvalue, const int32_t* cu_seqlens, const float* scale, float* dlog_ratio,
                                int64_t num_sequences, int64_t num_rows, float beta, void* stream);

}  // namespace ipvrm
