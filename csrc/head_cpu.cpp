// Tile epilogues of the head ops on the CPU. Rows are shared out over threads; a row of a tile stays in L1 over its passes.
// fp32 sums over a tile's columns are carried on in fp64. target_clones picks AVX-512, AVX2 or the baseline at load time,
// and `omp simd reduction` lets the compiler sum in lanes.

#include "head_cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define IPVRM_SIMD __attribute__((target_clones("avx512f", "avx2", "default"), flatten))
#else
#define IPVRM_SIMD
#endif

namespace ipvrm {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kGroup = 64;  // columns that one comparison for candidates covers

template <typename Body>
void for_each_row(int64_t rows, int64_t work, int num_threads, const Body& body) {
  const int threads = rows * work < 16384 ? 1 : num_threads;  // below this a thread team costs more than it saves
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; ++row) body(row);
}

IPVRM_SIMD void transform_row(const float* a, float* z, int64_t cols, const float* bias, LogitTransform t) {
  if (t.limit > 0.0f) {
    if (bias) {
#pragma omp simd
      for (int64_t j = 0; j < cols; ++j) z[j] = t.capped(a[j] + bias[j]);
    } else {
#pragma omp simd
      for (int64_t j = 0; j < cols; ++j) z[j] = t.capped(a[j]);
    }
  } else if (bias) {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) z[j] = t.linear(a[j] + bias[j]);
  } else if (t.scale != 1.0f || a != z) {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) z[j] = t.linear(a[j]);
  }
}

IPVRM_SIMD float max_of(const float* z, int64_t cols) {
  float top = -kInf;
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < cols; ++j) top = z[j] > top ? z[j] : top;
  return top;
}

IPVRM_SIMD float sum_exp(const float* z, int64_t cols, float top) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < cols; ++j) sum += exp_nonpositive(z[j] - top);
  return sum;
}

IPVRM_SIMD float sum_exp(const float* z, int64_t cols, float top, float& sum_z_exp) {
  float sum = 0.0f, weighted = 0.0f;
#pragma omp simd reduction(+ : sum, weighted)
  for (int64_t j = 0; j < cols; ++j) {
    const float x = z[j] - top;
    const float e = exp_nonpositive(x);
    sum += e;
    weighted += e * (x < -88.0f ? -88.0f : x);  // e is 0 there, and 0 * -inf is not
  }
  sum_z_exp = weighted;
  return sum;
}

// dz/da where z is the row's maximum, or 1 where that is 0: what an expectation is counted in. The maximum's own term is
// then 1 (or 0), so that rounding the others to bf16 leaves a row's 1 - p as exact as they are.
float unit_of(LogitTransform t, float top) {
  if (!(t.limit > 0.0f)) return t.scale;
  const float derivative = t.capped_derivative(top);
  return derivative != 0.0f ? derivative : 1.0f;
}

// z to exp(z - top) dz/da in units of `unit_of`
IPVRM_SIMD void exp_in_place(float* z, int64_t cols, float top, LogitTransform t, float unit) {
  if (t.limit > 0.0f) {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) z[j] = exp_nonpositive(z[j] - top) * (t.capped_derivative(z[j]) / unit);
  } else {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) z[j] = exp_nonpositive(z[j] - top);
  }
}

IPVRM_SIMD void scale_row(float* x, int64_t count, float factor) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) x[j] *= factor;
}

IPVRM_SIMD int32_t count_above(const float* z, int64_t count, float threshold) {
  int32_t above = 0;
#pragma omp simd reduction(+ : above)
  for (int64_t j = 0; j < count; ++j) above += z[j] > threshold;
  return above;
}

IPVRM_SIMD void dz_row(const float* z, float* dz, int64_t cols, LogitTransform t, float lse, float lse_low, float total,
                       float dentropy, float entropy) {
  const bool with_entropy = dentropy != 0.0f;
  if (t.limit > 0.0f && with_entropy) {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j)
      dz[j] = dense_dz(z[j] - lse - lse_low, total, dentropy, entropy) * t.capped_derivative(z[j]);
  } else if (t.limit > 0.0f) {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) dz[j] = dense_dz(z[j] - lse - lse_low, total) * t.capped_derivative(z[j]);
  } else if (with_entropy) {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) dz[j] = dense_dz(z[j] - lse - lse_low, total, dentropy, entropy) * t.scale;
  } else {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) dz[j] = dense_dz(z[j] - lse - lse_low, total) * t.scale;
  }
}

// out[j * stride + i] = in[i * cols + j] for i < height, whole cache lines of `out` at a time where height is 16
IPVRM_SIMD void transpose_band(const float* in, int64_t height, int64_t cols, float* out, int64_t stride) {
  if (height == 16) {
    for (int64_t j = 0; j < cols; ++j) {
#pragma omp simd
      for (int64_t i = 0; i < 16; ++i) out[j * stride + i] = in[i * cols + j];
    }
    return;
  }
  for (int64_t j = 0; j < cols; ++j)
    for (int64_t i = 0; i < height; ++i) out[j * stride + i] = in[i * cols + j];
}

struct Candidate {
  float value;
  int32_t id;
  bool operator<(const Candidate& other) const {  // best first, ties to the lower id
    return value > other.value || (value == other.value && id < other.id);
  }
};

// Keeps what is above the running threshold (or, in a plain top-k, everything: the threshold excludes ties that came first)
// and of that the best `slots`, which is all that can qualify. Order within the buffer does not matter.
void prune(const CandidateBuffers& c, int64_t row) {
  static thread_local std::vector<Candidate> kept;
  int32_t* ids = c.ids + row * c.capacity;
  float* z = c.z + row * c.capacity;
  const bool top_k = c.log_min_prob == -kInf;
  kept.clear();
  for (int64_t i = 0; i < c.count[row]; ++i) {
    if (top_k || z[i] > c.threshold[row]) kept.push_back({z[i], ids[i]});
  }
  if (static_cast<int64_t>(kept.size()) > c.slots) {
    std::nth_element(kept.begin(), kept.begin() + (c.slots - 1), kept.end());
    kept.resize(c.slots);
    if (top_k) c.threshold[row] = kept.back().value;
  }
  for (size_t i = 0; i < kept.size(); ++i) {
    ids[i] = kept[i].id;
    z[i] = kept[i].value;
  }
  c.count[row] = static_cast<int32_t>(kept.size());
}

// log of the sum of exp z so far
double log_sum(const RowState& state, int64_t row) {
  return static_cast<double>(state.top[row]) + std::log(state.sumexp[row]);
}

// Appends the tile's tokens above the threshold; a full buffer is pruned on the way (slots < capacity, so that frees some).
void emit(const CandidateBuffers& c, const RowState& state, int64_t row, const float* z, int64_t cols, int64_t col0,
          float top) {
  if (c.log_min_prob != -kInf) {  // any log-sum-exp so far is a lower bound; the slack covers its rounding
    const float bound = static_cast<float>(log_sum(state, row) + c.log_min_prob);
    c.threshold[row] = bound - 1e-4f - 2.4e-7f * std::fabs(bound);
  }
  if (!(top > c.threshold[row])) return;
  int32_t* ids = c.ids + row * c.capacity;
  float* values = c.z + row * c.capacity;
  for (int64_t first = 0; first < cols; first += kGroup) {
    const int64_t last = std::min(first + kGroup, cols);
    if (count_above(z + first, last - first, c.threshold[row]) == 0) continue;
    for (int64_t j = first; j < last; ++j) {
      if (!(z[j] > c.threshold[row])) continue;
      if (c.count[row] == c.capacity) {
        prune(c, row);
        if (!(z[j] > c.threshold[row])) continue;
      }
      const int32_t at = c.count[row]++;
      ids[at] = static_cast<int32_t>(col0 + j);
      values[at] = z[j];
    }
  }
}

}  // namespace

void head_forward_tile_cpu(float* tile, int64_t cols, int64_t col0, const float* bias, LogitTransform transform,
                           const RowBlock& block, int num_threads) {
  const RowState& state = block.state;
  const int64_t K = block.K, D = block.D;
  float* expectation = block.expectation;
  for_each_row(block.rows, cols, num_threads, [&](int64_t row) {
    float* z = tile + row * cols;
    transform_row(z, z, cols, bias, transform);
    for (int64_t k = 0; k < K; ++k) {
      const uint64_t j = static_cast<uint64_t>(block.ids[row * K + k] - col0);
      if (j < static_cast<uint64_t>(cols)) block.id_z[row * K + k] = z[j];
    }
    const float tile_top = max_of(z, cols);
    if (tile_top == -kInf && !std::isnan(sum_exp(z, cols, 0.0f))) {  // nothing but masked tokens
      if (expectation) std::fill(z, z + cols, 0.0f);
      return;
    }
    const float old_top = state.top[row];
    const float top = std::max(old_top, tile_top);
    const double factor = old_top == -kInf ? 0.0 : std::exp(static_cast<double>(old_top) - top);
    double& sumexp = state.sumexp[row];
    float tile_sum, tile_sum_z_exp = 0.0f;
    if (state.sum_z_exp) {
      tile_sum = sum_exp(z, cols, top, tile_sum_z_exp);
      const double shift = factor == 0.0 ? 0.0 : static_cast<double>(old_top) - top;
      double& weighted = state.sum_z_exp[row];
      weighted = factor * (weighted + shift * sumexp) + tile_sum_z_exp;
    } else {
      tile_sum = sum_exp(z, cols, top);
    }
    sumexp = factor * sumexp + tile_sum;
    state.top[row] = top;
    if (block.candidates.count) emit(block.candidates, state, row, z, cols, col0, tile_top);
    if (expectation) {
      const float unit = unit_of(transform, top);
      exp_in_place(z, cols, top, transform, unit);
      if (factor != 1.0) {
        const double units = factor == 0.0 ? 0.0 : unit_of(transform, old_top) / static_cast<double>(unit);
        scale_row(expectation + row * D, D, static_cast<float>(factor * units));
      }
    }
  });
}

void head_finish_cpu(const RowBlock& block, int64_t V, LogitTransform transform, float* lse, float* lse_low, float* entropy,
                     float* logprobs, int num_threads) {
  for_each_row(block.rows, block.K + (block.expectation ? block.D : 1), num_threads, [&](int64_t row) {
    const int64_t K = block.K;
    const RowState& state = block.state;
    const double log_total = log_sum(state, row);
    lse[row] = static_cast<float>(log_total);
    if (lse_low) lse_low[row] = static_cast<float>(log_total - lse[row]);
    if (entropy) entropy[row] = static_cast<float>(std::log(state.sumexp[row]) - state.sum_z_exp[row] / state.sumexp[row]);
    for (int64_t i = row * K; i < (row + 1) * K; ++i) {
      const bool owned = static_cast<uint64_t>(block.ids[i]) < static_cast<uint64_t>(V);
      logprobs[i] = owned ? std::min(static_cast<float>(block.id_z[i] - log_total), 0.0f) : -kInf;
    }
    if (block.expectation) {
      const double unit = unit_of(transform, state.top[row]);
      scale_row(block.expectation + row * block.D, block.D, static_cast<float>(unit / state.sumexp[row]));
    }
  });
}

void head_candidates_cpu(const RowBlock& block, int64_t slots, int64_t* ids, float* logprobs, int64_t* counts,
                         int num_threads) {
  const CandidateBuffers& candidates = block.candidates;
  for_each_row(block.rows, 64, num_threads, [&](int64_t row) {
    static thread_local std::vector<Candidate> best;
    const double log_total = log_sum(block.state, row);
    prune(candidates, row);
    best.clear();
    for (int64_t i = 0; i < candidates.count[row]; ++i) {
      const int64_t at = row * candidates.capacity + i;
      const float log_p = std::min(static_cast<float>(candidates.z[at] - log_total), 0.0f);
      if (log_p >= candidates.log_min_prob) best.push_back({log_p, candidates.ids[at]});
    }
    std::sort(best.begin(), best.end());
    const int64_t used = std::min<int64_t>(slots, best.size());
    for (int64_t k = 0; k < slots; ++k) {
      ids[row * slots + k] = k < used ? best[k].id : -1;
      logprobs[row * slots + k] = k < used ? best[k].value : -kInf;
    }
    counts[row] = used;
  });
}

void head_row_gradients_cpu(const float* dlogprobs, const float* dlse, const float* dentropy, const int64_t* ids, int64_t N,
                            int64_t K, int64_t V, double* total, uint8_t* active, int num_threads) {
  for_each_row(N, K + 1, num_threads, [&](int64_t row) {
    double sum = dlse ? -static_cast<double>(dlse[row]) : 0.0;
    bool any = (dlse && dlse[row] != 0.0f) || (dentropy && dentropy[row] != 0.0f);
    for (int64_t i = row * K; dlogprobs && i < (row + 1) * K; ++i) {
      if (static_cast<uint64_t>(ids[i]) >= static_cast<uint64_t>(V)) continue;  // selected before it is summed
      sum += dlogprobs[i];
      any |= dlogprobs[i] != 0.0f;
    }
    total[row] = sum;
    active[row] = any;
  });
}

void head_backward_tile_cpu(const float* tile, float* out, int64_t rows, int64_t cols, int64_t col0, int64_t row0,
                            bool saved, const float* bias, LogitTransform transform, const RowGradients& g,
                            int num_threads) {
  for_each_row(rows, cols, num_threads, [&](int64_t row) {
    const int64_t n = g.active ? g.active[row0 + row] : row0 + row;
    const float* z = tile + (saved ? n : row) * cols;
    float* dz = out + row * cols;
    if (!saved) {
      transform_row(z, dz, cols, bias, transform);
      z = dz;
    }
    static thread_local std::vector<float> z_at;  // of the ids, read before the tile is overwritten
    const int64_t K = g.dlogprobs ? g.K : 0;
    const int64_t* ids = g.ids + n * K;
    const float* dlogprobs = g.dlogprobs + n * K;
    z_at.resize(K);
    for (int64_t k = 0; k < K; ++k) {
      const uint64_t j = static_cast<uint64_t>(ids[k] - col0);
      if (j < static_cast<uint64_t>(cols)) z_at[k] = z[j];
    }
    const float lse = g.lse[n], lse_low = g.lse_low ? g.lse_low[n] : 0.0f;
    const double total = g.total[n];
    const float dentropy = g.dentropy ? g.dentropy[n] : 0.0f, entropy = g.dentropy ? g.entropy[n] : 0.0f;
    dz_row(z, dz, cols, transform, lse, lse_low, static_cast<float>(total), dentropy, entropy);
    for (int64_t k = 0; k < K;
         ++k) {  // the dense part nearly cancels the sparse one where p is near 1: both in fp64, rounded once
      const uint64_t j = static_cast<uint64_t>(ids[k] - col0);
      if (j >= static_cast<uint64_t>(cols) || std::find(ids, ids + k, ids[k]) != ids + k) continue;
      double sum = 0.0;
      for (int64_t same = k; same < K; ++same) sum += ids[same] == ids[k] ? dlogprobs[same] : 0.0f;
      const double log_p = std::max(std::min(static_cast<double>(z_at[k]) - lse - lse_low, 0.0), -745.0);
      const double dz_da = transform.limit > 0.0f ? transform.capped_derivative(z_at[k]) : transform.scale;
      dz[j] = static_cast<float>((sum - std::exp(log_p) * (total + dentropy * (log_p + entropy))) * dz_da);
    }
  });
}

void transpose_cpu(const float* in, int64_t rows, int64_t cols, float* out, int num_threads) {
  constexpr int64_t kSide = 16;  // floats of a cache line
  const int64_t bands = (rows + kSide - 1) / kSide;
  for_each_row(bands, kSide * cols, num_threads, [&](int64_t band) {
    const int64_t row0 = band * kSide, height = std::min(kSide, rows - row0);
    transpose_band(in + row0 * cols, height, cols, out + row0, rows);
  });
}

}  // namespace ipvrm
