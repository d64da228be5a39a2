// What the sequence ops do to a block of tokens that stays in L1: vector scans and vectorised per-token mathematics. Running
// sums are fp32 within kScan tokens and fp64 between them, so that 32k tokens keep fp32 accuracy without fp64's latency at
// every token. target_clones compiles each loop for AVX-512, AVX2 and the baseline and picks one when the library is loaded.
#pragma once

#include <algorithm>

#include "token_math.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define IPVRM_SIMD __attribute__((target_clones("avx512f", "avx2", "default"), flatten))
#else
#define IPVRM_SIMD
#endif

namespace ipvrm {
namespace {

constexpr int kLanes = 16;       // floats in the widest vector: loops run whole vectors, the last one padded with zeros
constexpr int kBlock = 1024;     // tokens: a few buffers of a block fit L1
constexpr int kScan = 64;        // tokens between two roundings of the fp64 carry
constexpr int kLossBlock = 256;  // losses summed in fp32 before they join an fp64 sum

constexpr float kZeros[kBlock] = {};

// 1 / t at [t - 1]: one division less per token of all but very long sequences.
constexpr int kTable = 8192;
constexpr struct Reciprocals {
  float at[kTable] = {};
  constexpr Reciprocals() {
    for (int i = 0; i < kTable; ++i) at[i] = 1.0f / static_cast<float>(i + 1);
  }
} kReciprocals;

int vectors(int count) { return (count + kLanes - 1) / kLanes; }

// The block as it is, or where it ends in the middle of a vector, a copy padded with zeros.
const float* padded(const float* block, int count, float* copy) {
  if (count % kLanes == 0) return block;
  std::copy(block, block + count, copy);
  std::fill(copy + count, copy + vectors(count) * kLanes, 0.0f);
  return copy;
}

// Where to write a block in whole vectors: in place, or a buffer that `copy_back` copies from.
float* whole(float* block, int count, float* buffer) { return count % kLanes == 0 ? block : buffer; }
void copy_back(float* block, int count, const float* written) {
  if (written != block) std::copy(written, written + count, block);
}

// 1 / t for t = before+1 .. before+count in whole vectors: the table, or beyond its end `buffer`, filled.
IPVRM_SIMD const float* inverse_positions(int before, int count, float* buffer) {
  if (before + kBlock <= kTable) return kReciprocals.at + before;
  for (int i = 0; i < kLanes * vectors(count); ++i) buffer[i] = 1.0f / static_cast<float>(before + i + 1);
  return buffer;
}

// sums[i] = factor * (carry + x[0] + .. + x[i]); returns the new carry.
IPVRM_SIMD double scan_block(const float* __restrict x, float* __restrict sums, int count, double carry, float factor) {
  for (int first = 0; first < vectors(count); first += kScan / kLanes) {
    const float base = static_cast<float>(carry);
    const int n = std::min(kScan / kLanes, vectors(count) - first);
    const float* from = x + kLanes * first;
    float* to = sums + kLanes * first;
    float sum = 0.0f;
#pragma omp simd reduction(inscan, + : sum)
    for (int i = 0; i < kLanes * n; ++i) {
      sum += from[i];
#pragma omp scan inclusive(sum)
      to[i] = factor * (base + sum);
    }
    carry += sum;
  }
  return carry;
}

// sums[i] = factor * (carry + x[i] + .. + x[end]), where sums may be x; returns the new carry.
IPVRM_SIMD double reverse_scan_block(const float* x, float* sums, int count, double carry, float factor) {
  for (int last = vectors(count); last > 0; last -= kScan / kLanes) {
    const float base = static_cast<float>(carry);
    const int n = std::min(kScan / kLanes, last);
    const float* from = x + kLanes * last - 1;
    float* to = sums + kLanes * last - 1;
    float sum = 0.0f;
#pragma omp simd reduction(inscan, + : sum)
    for (int i = 0; i < kLanes * n; ++i) {
      sum += from[-i];
#pragma omp scan inclusive(sum)
      to[-i] = factor * (base + sum);
    }
    carry += sum;
  }
  return carry;
}

IPVRM_SIMD void prefix_values_block(const float* __restrict value, const float* __restrict inverse_t,
                                    float* __restrict mean_value, float* __restrict prob, int count) {
  for (int i = 0; i < kLanes * vectors(count); ++i) {
    const PrefixValue v = prefix_value(value[i], inverse_t[i]);
    mean_value[i] = v.mean_value;
    prob[i] = v.prob;
  }
}

IPVRM_SIMD void multiply_block(const float* __restrict x, float* __restrict y, int64_t count, float factor) {
  for (int64_t i = 0; i < count; ++i) y[i] = factor * x[i];
}

IPVRM_SIMD void add_product_block(const float* __restrict x, float* __restrict y, int64_t count, float factor) {
  for (int64_t i = 0; i < count; ++i) y[i] += factor * x[i];
}

IPVRM_SIMD void prefix_gradient_block(const float* __restrict dvalue, const float* __restrict dmean_value,
                                      const float* __restrict dprob, const float* __restrict prob,
                                      const float* __restrict inverse_t, float* __restrict gradient, int count) {
  for (int i = 0; i < count; ++i) {
    gradient[i] = prefix_value_gradient(dvalue[i], dmean_value[i], dprob[i], prob[i], inverse_t[i]);
  }
}

// One stretch of margin_loss_block: `lanes` tokens in whole vectors from position t0 on, of which those up to `last` count.
template <bool kWeighted, bool kPartial>
inline float margin_loss_stretch(const float* __restrict value, const float* __restrict inverse, float* __restrict out,
                                 int t0, int lanes, float last, float margin, float constant, float linear,
                                 PrefixWeights weights) {
  float part = 0.0f;
#pragma omp simd reduction(+ : part)
  for (int i = 0; i < lanes; ++i) {
    const MarginLoss at = margin_loss(value[i] * inverse[i], -1.0f, margin);
    float loss = at.loss;
    if (kWeighted || kPartial) {
      const float t = static_cast<float>(t0 + i);  // compared as a float: g++ would split the loop at an integer
      if (kWeighted) loss *= weights.at(t);
      if (kPartial) loss = t > last ? 0.0f : loss;
    }
    part += loss;
    out[i] = (kWeighted ? constant * inverse[i] + linear : constant * inverse[i]) * at.derivative;  // scale * omega_t / t
  }
  return part;
}

// values[i] = -sign * value_t, scale = -sign * d sums / d (omega_t loss_t). Returns the block's sum of omega_t * loss_t;
// fills its dvalue. Uniform weights, omega_t = 1, stay out of the loop: 256 x 2,048 tokens on two cores take 167 us so, with
// them 183 us.
template <bool kWeighted>
inline double margin_loss_stretches(const float* values, const float* inverse_t, float* dvalue, int before, int count,
                                    float margin, float scale, PrefixWeights weights) {
  const float constant = scale * weights.constant, linear = scale * weights.slope;
  const float last = static_cast<float>(before + count);
  double total = 0.0;
  for (int first = 0; first < count; first += kLossBlock) {
    const int n = std::min(kLossBlock, count - first), full = n / kLanes * kLanes, t0 = before + first + 1;
    const float *value = values + first, *inverse = inverse_t + first;
    float* out = dvalue + first;
    total += margin_loss_stretch<kWeighted, false>(value, inverse, out, t0, full, last, margin, constant, linear, weights);
    if (full < n) {
      total += margin_loss_stretch<kWeighted, true>(value + full, inverse + full, out + full, t0 + full, kLanes, last,
                                                    margin, constant, linear, weights);
    }
  }
  return total;
}

IPVRM_SIMD double margin_loss_block(const float* values, const float* inverse_t, float* dvalue, int before, int count,
                                    float margin, float scale, PrefixWeights weights) {
  if (weights.constant == 1.0f && weights.slope == 0.0f) {
    return margin_loss_stretches<false>(values, inverse_t, dvalue, before, count, margin, scale, weights);
  }
  return margin_loss_stretches<true>(values, inverse_t, dvalue, before, count, margin, scale, weights);
}

// The same for a run of short sequences with each token's margin, scale and omega; leaves omega_t * loss_t in `omega`.
IPVRM_SIMD void margin_loss_run(const float* __restrict values, const float* __restrict inverse_t,
                                const float* __restrict margin, const float* __restrict scale, float* __restrict omega,
                                float* __restrict dvalue, int count) {
  for (int i = 0; i < kLanes * vectors(count); ++i) {
    const MarginLoss at = margin_loss(values[i] * inverse_t[i], -1.0f, margin[i]);
    dvalue[i] = scale[i] * (omega[i] * inverse_t[i]) * at.derivative;
    omega[i] *= at.loss;
  }
}

}  // namespace
}  // namespace ipvrm
