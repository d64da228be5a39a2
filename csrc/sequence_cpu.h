// CPU kernels of the sequence ops: addresses in, outputs filled. fp32 contiguous, cu_seqlens int32 (B+1,) checked by the caller.
#pragma once

#include <cstdint>

namespace ipvrm {

// Whether cu_seqlens rises from 0 to num_rows without decreasing.
bool edges_rise_cpu(const int32_t* cu_seqlens, int64_t num_sequences, int64_t num_rows);

// Whether moreover every outcome is 0 or 1, every margin and weight finite, and *denominator (may be null) positive and finite.
bool loss_inputs_valid_cpu(const int32_t* cu_seqlens, const float* outcome, const float* margin, const float* weight,
                           const float* denominator, int64_t num_sequences, int64_t num_rows);

void segment_scan_cpu(const float* x, const int32_t* cu_seqlens, float* y, int64_t num_sequences, float decay,
                      bool reverse, int num_threads);

void prefix_values_fwd_cpu(const float* log_ratio, const int32_t* cu_seqlens, float* value, float* mean_value,
                           float* prob, float* td, int64_t num_sequences, float beta, int num_threads);

// Any of the four upstream gradients may be null (an output nobody used).
void prefix_values_bwd_cpu(const float* dvalue, const float* dmean_value, const float* dprob, const float* dtd,
                           const float* prob, const int32_t* cu_seqlens, float* dlog_ratio, int64_t num_sequences,
                           float beta, int num_threads);

// sums (B,2): [w_b * sum_t omega_t loss_t, sum_t omega_t], both divided by the latter if `per_sequence`.
// slope (N,): d sums[b,0] / d value_t, so that d loss / d log_ratio is beta times its reverse scan.
void prefix_value_loss_fwd_cpu(const float* log_ratio, const int32_t* cu_seqlens, const float* outcome,
                               const float* margin, const float* weight, float* sums, float* slope,
                               int64_t num_sequences, float beta, int weighting, bool per_sequence, int num_threads);

// dlog_ratio_t = *scale * beta * sum_{j >= t} slope_j.
void prefix_value_loss_bwd_cpu(const float* slope, const int32_t* cu_seqlens, const float* scale, float* dlog_ratio,
                               int64_t num_sequences, float beta, int num_threads);

}  // namespace ipvrm
