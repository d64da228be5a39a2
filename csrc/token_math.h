// Per-token mathematics, compiled by g++ and nvcc alike, so that the CPU tests run the lines the
// GPU runs. Branch-free, so that g++ vectorises loops over these functions. Equation numbers are the paper's.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define IPVRM_HD __host__ __device__ __forceinline__
#else
#define IPVRM_HD inline __attribute__((always_inline))
#endif

namespace ipvrm {

enum class Weighting : int { uniform = 0, late = 1, early = 2 };

// exp(r) for |r| <= 0.347: minimax, relative error 3e-9 before its own rounding.
IPVRM_HD float exp_reduced(float r) {
  float p = 1.38144673e-3f;
  p = p * r + 8.36878084e-3f;
  p = p * r + 4.16683927e-2f;
  p = p * r + 1.66665196e-1f;
  p = p * r + 0.49999994f;
  p = p * r + 1.0f;
  return p * r + 1.0f;
}

// x rounded to a whole number n, as a float and as the low bits of an integer. The conversion of a NaN, or of what no
// integer holds, is undefined in C++; here they give some bits, and whoever multiplies by x gets its NaN.
struct Whole {
  float value;
  uint32_t bits;
};
IPVRM_HD Whole whole(float x) {
  const float shifted = x + 12582912.0f;  // 1.5 * 2^23: the lowest bits become n, for |x| < 2^22
  uint32_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  return {shifted - 12582912.0f, bits - 0x4B400000u};
}

// 2^n as a float, n from -126 to 127; n = -127 gives 0. Unsigned: a negative number must not be shifted.
IPVRM_HD float power_of_two(uint32_t n) {
  const uint32_t bits = (n + 127u) << 23;
  float power;
  memcpy(&power, &bits, sizeof power);
  return power;
}

// exp(x) for x in [-88, 0] to 1 ulp or so (a little above 0 is fine); 0 below -87.68, where it would be denormal.
IPVRM_HD float exp_in_range(float x) {
  const Whole n = whole(x * 1.44269504f);
  const float r = (x - n.value * 0.693359375f) + n.value * 2.12194440e-4f;  // Cody-Waite: ln 2 in two parts
  return exp_reduced(r) * power_of_two(n.bits);
}

// exp(-|z|) to 1 ulp; 1.6e-38 where |z| > 87 (no denormals). NaN stays NaN.
IPVRM_HD float exp_negative_abs(float z) {
  const float a = fabsf(z);
  const float x = a > 87.0f ? 87.0f : a;
  const Whole n = whole(x * -1.44269504f);
  const float r = (-x - n.value * 0.693359375f) + n.value * 2.12194440e-4f;  // Cody-Waite: ln 2 in two parts
  return exp_reduced(r) * power_of_two(n.bits);
}

// exp(x) for x <= 0 (a little above is fine), 0 below -87.68; NaN stays NaN.
IPVRM_HD float exp_nonpositive(float x) { return exp_in_range(x < -88.0f ? -88.0f : x); }

// exp(x) for any x to 1 ulp or so: denormal, 0 and inf where exp(x) is; NaN stays NaN.
IPVRM_HD float exp_any(float x) {
  const float low = x < -104.0f ? -104.0f : x;
  const float c = low > 89.0f ? 89.0f : low;
  const Whole n = whole(c * 1.44269504f);
  const float r = (c - n.value * 0.693359375f) + n.value * 2.12194440e-4f;  // Cody-Waite: ln 2 in two parts
  // 2^n in two factors, floor(n / 2) and the rest: n = 128 and n = -149 are no exponents of a float
  const uint32_t upper = ((n.bits + 256u) >> 1) - 128u;
  return exp_reduced(r) * power_of_two(upper) * power_of_two(n.bits - upper);
}

// tanh to 3e-7, relative where |x| is small: Eigen's 13/6 rational approximation, free of branches.
IPVRM_HD float tanh_rational(float x) {
  const float low = x < -7.90531110f ? -7.90531110f : x;
  const float c = low > 7.90531110f ? 7.90531110f : low;
  const float q = c * c;
  float p = -2.76076847742355e-16f;
  p = p * q + 2.00018790482477e-13f;
  p = p * q - 8.60467152213735e-11f;
  p = p * q + 5.12229709037114e-08f;
  p = p * q + 1.48572235717979e-05f;
  p = p * q + 6.37261928875436e-04f;
  p = p * q + 4.89352455891786e-03f;
  float d = 1.19825839466702e-06f;
  d = d * q + 1.18534705686654e-04f;
  d = d * q + 2.26843463243900e-03f;
  d = d * q + 4.89352518554385e-03f;
  return c * p / d;
}

// From h.w + b to the transformed logit: limit * tanh(x * scale), or x * scale where there is no softcap (limit 0).
struct LogitTransform {
  float scale;
  float limit;
  IPVRM_HD float linear(float x) const { return x * scale; }
  IPVRM_HD float capped(float x) const { return limit * tanh_rational(x * scale); }
  IPVRM_HD float capped_derivative(float z) const {  // dz/dx from z
    const float t = z / limit;
    return (1.0f - t) * (1.0f + t) * (scale * limit);
  }
};

// -p (G + g_H (log p + H)): the dense part of dL/dz, with G = sum_k g_k - g_lse.
IPVRM_HD float dense_dz(float log_p, float total) { return -exp_nonpositive(log_p) * total; }
IPVRM_HD float dense_dz(float log_p, float total, float dentropy, float entropy) {
  const float finite = log_p < -88.0f ? -88.0f : log_p;  // p is 0 there, and 0 * -inf is not
  return -exp_nonpositive(log_p) * (total + dentropy * (finite + entropy));
}

// The interval that rho is clipped to, and the multiple of |A| that a loss with A < 0 never exceeds (inf: no dual clip).
struct Clips {
  float low;
  float high;
  float dual;
};

// max(-A rho, -A clip(rho)) with rho = exp(logprob - old_logprob), Eq. 11 and 12, and its derivative by logprob.
struct Surrogate {
  float loss;
  float derivative;
  int32_t clipped;  // 0 or 1; with bool g++ keeps the struct in memory and its loops scalar
  int32_t dual_clipped;
};
IPVRM_HD Surrogate clipped_surrogate(float logprob, float old_logprob, float advantage, Clips clips) {
  const float rho = exp_any(logprob - old_logprob);
  const float above = rho < clips.low ? clips.low : rho;
  const float unclipped = -advantage * rho;
  const float bounded = -advantage * (above > clips.high ? clips.high : above);
  const float larger = bounded > unclipped ? bounded : unclipped;  // NaN if either is
  const float ceiling = -advantage * clips.dual;
  // selected last and without short cuts: a branch before the exp would keep the loop from being vectorised
  const bool counted = (old_logprob != -INFINITY) & (advantage != 0.0f);
  const bool clipped = counted & (bounded > unclipped);
  const bool dual_clipped = counted & (advantage < 0.0f) & (larger > ceiling);
  const float loss = dual_clipped ? ceiling : larger;
  return {counted ? loss : 0.0f, counted & !clipped & !dual_clipped ? unclipped : 0.0f, clipped, dual_clipped};
}
// The derivative against an upstream gradient, which must not be read where the derivative is 0: a NaN there stays out.
IPVRM_HD float clipped_surrogate_gradient(float dloss, float derivative) {
  return derivative != 0.0f ? dloss * derivative : 0.0f;
}

// How the losses of a branch are averaged; index = ipvrm_kernels/distrl_loss.py's CANDIDATE_REDUCTIONS.
enum class Reduction : int { sequence_mean = 0, token_mean = 1, old_prob_mean = 2 };

// A branch of the DistRL objective: what its divisor is, and its clips.
struct Branch {
  Reduction reduction;
  float divisor;
  Clips clips;
  // The factor of every loss in a row whose sequence has `length` tokens.
  IPVRM_HD float factor(int32_t length) const {
    if (reduction == Reduction::old_prob_mean) return divisor == 0.0f ? 0.0f : 1.0f / divisor;  // NaN stays NaN
    return (reduction == Reduction::sequence_mean ? 1.0f / static_cast<float>(length) : 1.0f) / divisor;
  }
};

// pi_old, 0 below the smallest normal float: there rho = exp(new - old) may be infinite. NaN stays NaN.
IPVRM_HD float normal_prob(float old_logprob) {
  const float prob = exp_any(old_logprob);
  return prob < 1.17549435e-38f ? 0.0f : prob;
}

// One used element of the objective: its loss and derivative times prob * factor (Eq. 11; prob is 1 in Eq. 12), and its
// statistics. A prob of 0 must not meet its infinite rho; a NaN, which is not 0, must come through.
struct ObjectiveTerm {
  float loss;
  float derivative;
  float kl;
  int32_t clipped;
  int32_t dual_clipped;
};
IPVRM_HD ObjectiveTerm objective_term(float logprob, float old_logprob, float advantage, float prob, float factor,
                                      Clips clips) {
  const Surrogate s = clipped_surrogate(logprob, old_logprob, advantage, clips);
  const float weight = prob * factor;
  const float kl = prob * (old_logprob - logprob);
  const bool counts = (prob != 0.0f) & (weight != 0.0f);
  return {counts ? weight * s.loss : 0.0f, counts ? weight * s.derivative : 0.0f, prob != 0.0f ? kl : 0.0f, s.clipped,
          s.dual_clipped};
}

// The objective's sums over elements: for the tokens, then for the candidates, kBranchSums each; then the mass of pi_old.
enum ObjectiveSum : int { kLoss, kClipped, kDualClipped, kKl, kUsed, kBranchSums, kMass = 2 * kBranchSums, kObjectiveSums };

// From the sums of `rows` rows to loss, token_loss, candidate_loss and the (sum, count) of every entry of METRICS.
IPVRM_HD void finish_objective(const double* sums, int64_t rows, float alpha, float* loss, float* token_loss,
                               float* candidate_loss, float* metrics) {
  const double* candidates = sums + kBranchSums;
  *loss = static_cast<float>(sums[kLoss] + alpha * candidates[kLoss]);
  *token_loss = static_cast<float>(sums[kLoss]);
  *candidate_loss = static_cast<float>(candidates[kLoss]);
  for (int i = 0; i < 6; ++i) {
    const double* branch = i < 3 ? sums : candidates;
    metrics[2 * i] = static_cast<float>(branch[kClipped + i % 3]);
    metrics[2 * i + 1] = static_cast<float>(branch[kUsed]);
  }
  metrics[12] = static_cast<float>(candidates[kUsed]);
  metrics[14] = static_cast<float>(sums[kMass]);
  metrics[13] = metrics[15] = static_cast<float>(rows);
}

// log(1 + u) for u in [0, 1] as u times a polynomial, which keeps the relative accuracy of small u: 1.5 ulp, no division.
IPVRM_HD float log1p_unit(float u) {
  float p = 5.36482455e-3f;  // minimax of log(1 + u) / u: relative error 3e-8
  p = p * u - 3.00657917e-2f;
  p = p * u + 7.92045370e-2f;
  p = p * u - 1.37538031e-1f;
  p = p * u + 1.91536546e-1f;
  p = p * u - 2.48571634e-1f;
  p = p * u + 3.33213240e-1f;
  p = p * u - 4.99996483e-1f;
  p = p * u + 1.0f;
  return p * u;
}

IPVRM_HD float sigmoid(float z) {
  const float e = exp_negative_abs(z);
  return (z < 0.0f ? e : 1.0f) / (1.0f + e);
}

// omega_t of Eq. 9, 17, 18 for position t = 1..length as constant + slope * t, and its sum over the sequence.
struct PrefixWeights {
  float constant;
  float slope;
  float sum;
  IPVRM_HD float at(float t) const { return constant + slope * t; }
};
IPVRM_HD PrefixWeights prefix_weights(Weighting kind, float length) {
  if (kind == Weighting::late) return {0.0f, 1.0f / length, 0.5f * (length + 1.0f)};
  if (kind == Weighting::early && length > 1.0f) return {1.0f, -1.0f / length, 0.5f * (length - 1.0f)};
  return {1.0f, 0.0f, length};
}

// One prefix of L_ipvrm: softplus(margin - sign * mean_value), and its derivative by mean_value.
struct MarginLoss {
  float loss;
  float derivative;
};
IPVRM_HD MarginLoss margin_loss(float mean_value, float sign, float margin) {
  const float z = margin - sign * mean_value;
  const float e = exp_negative_abs(z);
  const float softplus = (z > 0.0f ? z : 0.0f) + log1p_unit(e);
  return {softplus, -sign * ((z < 0.0f ? e : 1.0f) / (1.0f + e))};
}

// Eq. 5 and its normalisation: what a prefix of t tokens with summed log-ratio `sum` is worth.
struct PrefixValue {
  float mean_value;
  float prob;
};
IPVRM_HD PrefixValue prefix_value(float value, float inverse_t) {
  const float mean_value = value * inverse_t;
  return {mean_value, sigmoid(mean_value)};
}
// d / d value_t of (value_t, mean_value_t, prob_t) against their upstream gradients.
IPVRM_HD float prefix_value_gradient(float dvalue, float dmean_value, float dprob, float prob, float inverse_t) {
  return dvalue + inverse_t * (dmean_value + dprob * prob * (1.0f - prob));
}

}  // namespace ipvrm
