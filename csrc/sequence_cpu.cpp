// Sequence ops on the CPU: OpenMP over sequences; inside one, blocks of tokens that stay in L1: a serial scan in fp64
// (a running sum over 32k tokens keeps fp32 accuracy; the add is latency-bound either way), then a vectorised epilogue.
// target_clones compiles each hot loop for AVX-512, AVX2 and the baseline and picks one when the library is loaded.

#include "sequence_cpu.h"

#include <algorithm>

#include "token_math.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define IPVRM_SIMD __attribute__((target_clones("avx512f", "avx2", "default"), flatten))
#else
#define IPVRM_SIMD
#endif

namespace ipvrm {
namespace {

constexpr int64_t kBlock = 512;

template <typename Body>
void for_each_sequence(const int32_t* cu_seqlens, int64_t num_sequences, int num_threads, const Body& body) {
  const int64_t num_rows = cu_seqlens[num_sequences];
  const int threads = num_rows < 16384 ? 1 : num_threads;  // below this a thread team costs more than it saves
  const int chunk = static_cast<int>(std::clamp<int64_t>(num_sequences / (16 * threads), 1, 256));
#pragma omp parallel for schedule(dynamic, chunk) num_threads(threads)
  for (int64_t b = 0; b < num_sequences; ++b) {
    const int64_t start = cu_seqlens[b];
    const int64_t length = cu_seqlens[b + 1] - start;
    if (length > 0) body(b, start, length);
  }
}

IPVRM_SIMD void prefix_values_block(const float* __restrict sums, const float* __restrict log_ratio,
                                    float* __restrict value, float* __restrict mean_value, float* __restrict prob,
                                    float* __restrict td, int64_t first, int64_t count, float beta) {
  for (int64_t i = 0; i < count; ++i) {
    const PrefixValue v = prefix_value(sums[i], beta, static_cast<float>(static_cast<int32_t>(first + i + 1)));
    value[i] = v.value;
    mean_value[i] = v.mean_value;
    prob[i] = v.prob;
    td[i] = beta * log_ratio[i];
  }
}

IPVRM_SIMD void prefix_slopes_block(const float* __restrict dvalue, const float* __restrict dmean_value,
                                    const float* __restrict dprob, const float* __restrict prob,
                                    float* __restrict slope, int64_t first, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    slope[i] = prefix_value_slope(dvalue ? dvalue[i] : 0.0f, dmean_value ? dmean_value[i] : 0.0f,
                                  dprob ? dprob[i] : 0.0f, prob[i], static_cast<float>(static_cast<int32_t>(first + i + 1)));
  }
}

// Returns the block's sum of omega_t * loss_t; fills its slopes.
IPVRM_SIMD float margin_loss_block(const float* __restrict sums, float* __restrict slope, int64_t first,
                                   int64_t count, float beta, float sign, float margin, float scale, PrefixWeights weights) {
  float losses[kBlock];
  for (int64_t i = 0; i < count; ++i) {
    const float t = static_cast<float>(static_cast<int32_t>(first + i + 1));
    const MarginLoss at = margin_loss(beta * sums[i] / t, sign, margin);
    const float omega = weights.at(t);
    losses[i] = omega * at.loss;
    slope[i] = scale * omega * at.derivative / t;
  }
  double total = 0.0;
  for (int64_t i = 0; i < count; ++i) total += losses[i];
  return static_cast<float>(total);
}

}  // namespace

void segment_scan_cpu(const float* x, const int32_t* cu_seqlens, float* y, int64_t num_sequences, float decay,
                      bool reverse, int num_threads) {
  for_each_sequence(cu_seqlens, num_sequences, num_threads, [&](int64_t, int64_t start, int64_t length) {
    double carry = 0.0;
    if (reverse) {
      for (int64_t i = start + length - 1; i >= start; --i) y[i] = static_cast<float>(carry = x[i] + decay * carry);
    } else {
      for (int64_t i = start; i < start + length; ++i) y[i] = static_cast<float>(carry = x[i] + decay * carry);
    }
  });
}

void prefix_values_fwd_cpu(const float* log_ratio, const int32_t* cu_seqlens, float* value, float* mean_value,
                           float* prob, float* td, int64_t num_sequences, float beta, int num_threads) {
  for_each_sequence(cu_seqlens, num_sequences, num_threads, [&](int64_t, int64_t start, int64_t length) {
    float sums[kBlock];
    double carry = 0.0;
    for (int64_t first = 0; first < length; first += kBlock) {
      const int64_t count = std::min(kBlock, length - first);
      const int64_t row = start + first;
      for (int64_t i = 0; i < count; ++i) sums[i] = static_cast<float>(carry += log_ratio[row + i]);
      prefix_values_block(sums, log_ratio + row, value + row, mean_value + row, prob + row, td + row, first, count, beta);
    }
  });
}

void prefix_values_bwd_cpu(const float* dvalue, const float* dmean_value, const float* dprob, const float* dtd,
                           const float* prob, const int32_t* cu_seqlens, float* dlog_ratio, int64_t num_sequences,
                           float beta, int num_threads) {
  const auto at = [](const float* p, int64_t row) { return p ? p + row : nullptr; };
  for_each_sequence(cu_seqlens, num_sequences, num_threads, [&](int64_t, int64_t start, int64_t length) {
    float slope[kBlock];
    double carry = 0.0;
    for (int64_t block = (length - 1) / kBlock; block >= 0; --block) {
      const int64_t first = block * kBlock;
      const int64_t count = std::min(kBlock, length - first);
      const int64_t row = start + first;
      prefix_slopes_block(at(dvalue, row), at(dmean_value, row), at(dprob, row), prob + row, slope, first, count);
      for (int64_t i = count - 1; i >= 0; --i) {
        carry += slope[i];
        dlog_ratio[row + i] = beta * (static_cast<float>(carry) + (dtd ? dtd[row + i] : 0.0f));
      }
    }
  });
}

void prefix_value_loss_fwd_cpu(const float* log_ratio, const int32_t* cu_seqlens, const float* outcome,
                               const float* margin, const float* weight, float* sums, float* slope,
                               int64_t num_sequences, float beta, int weighting, bool per_sequence, int num_threads) {
  const auto kind = static_cast<Weighting>(weighting);
  std::fill(sums, sums + 2 * num_sequences, 0.0f);
  for_each_sequence(cu_seqlens, num_sequences, num_threads, [&](int64_t b, int64_t start, int64_t length) {
    const PrefixWeights weights = prefix_weights(kind, static_cast<float>(length));
    const float scale = per_sequence ? weight[b] / weights.sum : weight[b];
    const float sign = 2.0f * outcome[b] - 1.0f;
    float prefix_sums[kBlock];
    double carry = 0.0, total = 0.0;
    for (int64_t first = 0; first < length; first += kBlock) {
      const int64_t count = std::min(kBlock, length - first);
      const int64_t row = start + first;
      for (int64_t i = 0; i < count; ++i) prefix_sums[i] = static_cast<float>(carry += log_ratio[row + i]);
      total += margin_loss_block(prefix_sums, slope + row, first, count, beta, sign, margin[b], scale, weights);
    }
    sums[2 * b] = static_cast<float>(scale * total);
    sums[2 * b + 1] = per_sequence ? 1.0f : weights.sum;
  });
}

void prefix_value_loss_bwd_cpu(const float* slope, const int32_t* cu_seqlens, const float* scale, float* dlog_ratio,
                               int64_t num_sequences, float beta, int num_threads) {
  const float factor = beta * *scale;
  for_each_sequence(cu_seqlens, num_sequences, num_threads, [&](int64_t, int64_t start, int64_t length) {
    double carry = 0.0;
    for (int64_t i = start + length - 1; i >= start; --i) dlog_ratio[i] = factor * static_cast<float>(carry += slope[i]);
  });
}

}  // namespace ipvrm
