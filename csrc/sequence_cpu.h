// CPU kernels of the sequence ops: addresses in, outputs filled. fp32 contiguous, cu_seqlens int32 (B+1,).
// The forwards write nothing and return false unless cu_seqlens rises from 0 to num_rows; the backward trusts it.
#pragma once

#include <cstdint>

#include "token_math.h"

namespace ipvrm {

// Whether cu_seqlens, num_sequences + 1 of them, rises from 0 to num_rows without decreasing.
bool edges_rise_cpu(const int32_t* cu_seqlens, int64_t num_sequences, int64_t num_rows);

// What a sequence's losses are made of besides its tokens, one (B,) each. Null margin: margin_value for all. Null weight: 1.
// Null denominator: the loss is multiplied by inverse_divisor instead of divided. The tokens weigh omega_t, by `weighting`;
// `per_sequence`: a sequence's loss is divided by its sum of omega.
struct LossTerms {
  const float *outcome, *margin, *weight, *denominator;
  float margin_value, inverse_divisor;
  Weighting weighting;
  bool per_sequence;
  float margin_of(int64_t b) const { return margin ? margin[b] : margin_value; }
};

bool segment_scan_cpu(const float* x, const int32_t* cu_seqlens, float* y, int64_t num_sequences, int64_t num_rows,
                      double decay, bool reverse, int num_threads);

bool prefix_values_fwd_cpu(const float* log_ratio, const int32_t* cu_seqlens, float* value, float* mean_value, float* prob,
                           float* td, int64_t num_sequences, int64_t num_rows, float beta, int num_threads);

// Upstream gradients of the four outputs, (N,) each; null where nobody used one.
struct PrefixValueGradients {
  const float *dvalue, *dmean_value, *dprob, *dtd;
};
void prefix_values_bwd_cpu(const PrefixValueGradients& upstream, const float* prob, const int32_t* cu_seqlens,
                           float* dlog_ratio, int64_t num_sequences, float beta, int num_threads);

// Writes nothing and returns false also where an outcome is not 0 or 1, a number not finite or *denominator not positive.
// loss: sum over sequences of w_b * sum_t omega_t loss_t, times the divisor; over the sum of omega of all tokens if `count`.  gradient (N,), unless null: d loss / d log_ratio.
bool prefix_value_loss_fwd_cpu(const float* log_ratio, const int32_t* cu_seqlens, const LossTerms& terms, float* loss,
                               float* gradient, int64_t num_sequences, int64_t num_rows, float beta, bool count,
                               int num_threads);

}  // namespace ipvrm
