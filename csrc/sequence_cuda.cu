// Sequence ops on NVIDIA GPUs: one thread block per sequence walks it in tiles of kTile tokens and carries the running sum
// across tiles. Each thread scans kItems tokens in registers, warps scan by shuffles, warp totals meet in shared memory.
// Thread i of the block owns tokens i*kItems .. i*kItems+3 of the tile: each of a warp's kItems loads strides 16 bytes, and
// the four together read whole sectors, from L1 after the first. Edges are held to 0 .. num_rows: nothing here is read or
// written out of bounds, whatever cu_seqlens holds.

#include <cuda_runtime.h>

#include "launch_cuda.h"
#include "sequence_cuda.h"
#include "token_math.h"

namespace ipvrm {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kItems = 4;
constexpr int kTile = kThreads * kItems;

struct Rows {
  int64_t start, length;
};

// The rows of the block's sequence, none where an unchecked edge makes no sense. In 64 bits: neither the difference of two
// unchecked edges nor a tile that ends behind 2^31 - 1 tokens fits in 32.
__device__ __forceinline__ Rows rows_of_block(const int32_t* cu_seqlens, int64_t num_rows) {
  const int64_t start = min(max(int64_t{cu_seqlens[blockIdx.x]}, int64_t{0}), num_rows);
  return {start, max(min(int64_t{cu_seqlens[blockIdx.x + 1]}, num_rows) - start, int64_t{0})};
}

// decay^exponent in double and rounded once: a factor near 1 loses 1024 roundings otherwise.
__device__ __forceinline__ float int_power(double base, int exponent) {
  if (base == 1.0) return 1.0f;
  double result = 1.0;
  for (; exponent > 0; exponent >>= 1, base *= base)
    if (exponent & 1) result *= base;
  return static_cast<float>(result);
}

// The block-wide decayed scan: y_i = x_i + decay * y_{i-1} over the tile's tokens in order, seeded by a carry.
// Powers of the decay are constants of the launch, so only sums travel through shuffles.
struct TileScan {
  float decay;
  float lane_power;      // decay^(kItems * lane)
  float thread_power;    // decay^(kItems * threadIdx.x)
  float step_powers[6];  // decay^(kItems * 2^k); the last, 32 lanes, is a warp's
  float tile_power;      // decay^kTile
  float carry = 0.0f;    // y at the end of the previous tile
  float* warp_sums;      // (kWarps,) shared

  __device__ TileScan(double decay_, float* shared) : decay(static_cast<float>(decay_)), warp_sums(shared) {
    lane_power = int_power(decay_, kItems * (threadIdx.x % 32));
    thread_power = int_power(decay_, kItems * threadIdx.x);
#pragma unroll
    for (int k = 0; k < 6; ++k) step_powers[k] = int_power(decay_, kItems << k);
    tile_power = int_power(decay_, kTile);
  }

  // items: in x, out y. Tokens beyond the sequence must come in as 0.
  __device__ void step(float (&items)[kItems]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int k = 1; k < kItems; ++k) items[k] += decay * items[k - 1];
    float total = items[kItems - 1];  // inclusive over this thread, then over lanes
#pragma unroll
    for (int k = 0; k < 5; ++k) {
      const float left = __shfl_up_sync(0xffffffffu, total, 1 << k);
      if (lane >= 1 << k) total += step_powers[k] * left;
    }
    float before = __shfl_up_sync(0xffffffffu, total, 1);  // sum of the lanes to the left
    if (lane == 0) before = 0.0f;
    if (lane == 31) warp_sums[warp] = total;
    __syncthreads();
    float block_total = 0.0f, left_warps = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (w == warp) left_warps = block_total;
      block_total = warp_sums[w] + step_powers[5] * block_total;
    }
    before += lane_power * left_warps + thread_power * carry;
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      before *= decay;
      items[k] += before;
    }
    carry = block_total + tile_power * carry;
    __syncthreads();  // warp_sums is rewritten by the next tile
  }
};

__global__ void __launch_bounds__(kThreads)
    segment_scan_kernel(const float* __restrict__ x, const int32_t* __restrict__ cu_seqlens, float* __restrict__ y,
                        int64_t num_rows, double decay, bool reverse) {
  __shared__ float warp_sums[kWarps];
  const auto [start, length] = rows_of_block(cu_seqlens, num_rows);
  TileScan scan(decay, warp_sums);
  for (int64_t tile = 0; tile < length; tile += kTile) {
    const int64_t base = tile + threadIdx.x * kItems;
    float items[kItems];
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int64_t t = base + k;
      items[k] = t < length ? x[start + (reverse ? length - 1 - t : t)] : 0.0f;
    }
    scan.step(items);
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int64_t t = base + k;
      if (t < length) y[start + (reverse ? length - 1 - t : t)] = items[k];
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    prefix_values_fwd_kernel(const float* __restrict__ log_ratio, const int32_t* __restrict__ cu_seqlens,
                             float* __restrict__ value, float* __restrict__ mean_value, float* __restrict__ prob,
                             float* __restrict__ td, int64_t num_rows, float beta) {
  __shared__ float warp_sums[kWarps];
  const auto [start, length] = rows_of_block(cu_seqlens, num_rows);
  TileScan scan(1.0, warp_sums);
  for (int64_t tile = 0; tile < length; tile += kTile) {
    const int64_t base = tile + threadIdx.x * kItems;
    float ratios[kItems], items[kItems];
#pragma unroll
    for (int k = 0; k < kItems; ++k) items[k] = ratios[k] = base + k < length ? log_ratio[start + base + k] : 0.0f;
    scan.step(items);
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int64_t t = base + k;
      if (t >= length) continue;
      const float at = beta * items[k];
      const PrefixValue v = prefix_value(at, 1.0f / static_cast<float>(t + 1));
      value[start + t] = at;
      mean_value[start + t] = v.mean_value;
      prob[start + t] = v.prob;
      td[start + t] = beta * ratios[k];
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    prefix_values_bwd_kernel(const float* __restrict__ dvalue, const float* __restrict__ dmean_value,
                             const float* __restrict__ dprob, const float* __restrict__ dtd, const float* __restrict__ prob,
                             const int32_t* __restrict__ cu_seqlens, float* __restrict__ dlog_ratio, int64_t num_rows,
                             float beta) {
  __shared__ float warp_sums[kWarps];
  const auto [start, length] = rows_of_block(cu_seqlens, num_rows);
  TileScan scan(1.0, warp_sums);
  for (int64_t tile = 0; tile < length; tile += kTile) {
    const int64_t base = tile + threadIdx.x * kItems;
    float items[kItems];
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int64_t t = length - 1 - (base + k);
      const int64_t row = start + t;
      items[k] = t < 0 ? 0.0f
                       : prefix_value_gradient(dvalue ? dvalue[row] : 0.0f, dmean_value ? dmean_value[row] : 0.0f,
                                               dprob ? dprob[row] : 0.0f, prob[row], 1.0f / static_cast<float>(t + 1));
    }
    scan.step(items);
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int64_t t = length - 1 - (base + k);
      if (t >= 0) dlog_ratio[start + t] = beta * (items[k] + (dtd ? dtd[start + t] : 0.0f));
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    prefix_value_loss_fwd_kernel(const float* __restrict__ log_ratio, const int32_t* __restrict__ cu_seqlens,
                                 LossTerms terms, float* __restrict__ losses, float* __restrict__ counted,
                                 float* __restrict__ dvalue, int64_t num_rows, float beta) {
  __shared__ float warp_sums[kWarps];
  const int b = blockIdx.x;
  const auto [start, length] = rows_of_block(cu_seqlens, num_rows);
  if (length == 0) {
    if (threadIdx.x == 0) {
      losses[b] = 0.0f;
      if (counted) counted[b] = 0.0f;
    }
    return;
  }
  const PrefixWeights weights = prefix_weights(terms.weighting, static_cast<float>(length));
  float scale = terms.denominator ? 1.0f / *terms.denominator : terms.inverse_divisor;
  if (terms.weight) scale *= terms.weight[b];
  if (terms.per_sequence) scale /= weights.sum;
  const float sign = 2.0f * terms.outcome[b] - 1.0f;
  const float margin_b = terms.margin ? terms.margin[b] : terms.margin_value;
  TileScan scan(1.0, warp_sums);
  float total = 0.0f;
  for (int64_t tile = 0; tile < length; tile += kTile) {
    const int64_t base = tile + threadIdx.x * kItems;
    float items[kItems];
#pragma unroll
    for (int k = 0; k < kItems; ++k) items[k] = base + k < length ? log_ratio[start + base + k] : 0.0f;
    scan.step(items);
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int64_t t = base + k;
      if (t >= length) continue;
      const float t1 = static_cast<float>(t + 1);
      const MarginLoss at = margin_loss(beta * items[k] / t1, sign, margin_b);
      const float omega = weights.at(t1);
      total += omega * at.loss;
      if (dvalue) dvalue[start + t] = scale * omega * at.derivative / t1;
    }
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) total += __shfl_down_sync(0xffffffffu, total, offset);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = total;
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += warp_sums[w];
    losses[b] = scale * sum;
    if (counted) counted[b] = weights.sum;
  }
}

__global__ void __launch_bounds__(kThreads)
    prefix_value_loss_bwd_kernel(const float* __restrict__ dvalue, const int32_t* __restrict__ cu_seqlens,
                                 const float* __restrict__ scale, float* __restrict__ dlog_ratio, int64_t num_rows,
                                 float beta) {
  __shared__ float warp_sums[kWarps];
  const auto [start, length] = rows_of_block(cu_seqlens, num_rows);
  const float factor = beta * *scale;
  TileScan scan(1.0, warp_sums);
  for (int64_t tile = 0; tile < length; tile += kTile) {
    const int64_t base = tile + threadIdx.x * kItems;
    float items[kItems];
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int64_t t = length - 1 - (base + k);
      items[k] = t < 0 ? 0.0f : dvalue[start + t];
    }
    scan.step(items);
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int64_t t = length - 1 - (base + k);
      if (t >= 0) dlog_ratio[start + t] = factor * items[k];
    }
  }
}

}  // namespace

void segment_scan_cuda(const float* x, const int32_t* cu_seqlens, float* y, int64_t num_sequences, int64_t num_rows,
                       double decay, bool reverse, void* stream) {
  if (num_sequences == 0) return;
  const unsigned blocks = grid("segment_scan", num_sequences);
  segment_scan_kernel<<<blocks, kThreads, 0, as_stream(stream)>>>(x, cu_seqlens, y, num_rows, decay, reverse);
  check_launch("segment_scan");
}

void prefix_values_fwd_cuda(const float* log_ratio, const int32_t* cu_seqlens, float* value, float* mean_value, float* prob,
                            float* td, int64_t num_sequences, int64_t num_rows, float beta, void* stream) {
  if (num_sequences == 0) return;
  const unsigned blocks = grid("prefix_values", num_sequences);
  prefix_values_fwd_kernel<<<blocks, kThreads, 0, as_stream(stream)>>>(log_ratio, cu_seqlens, value, mean_value, prob, td,
                                                                       num_rows, beta);
  check_launch("prefix_values");
}

void prefix_values_bwd_cuda(const PrefixValueGradients& upstream, const float* prob, const int32_t* cu_seqlens,
                            float* dlog_ratio, int64_t num_sequences, int64_t num_rows, float beta, void* stream) {
  if (num_sequences == 0) return;
  const unsigned blocks = grid("prefix_values backward", num_sequences);
  prefix_values_bwd_kernel<<<blocks, kThreads, 0, as_stream(stream)>>>(
      upstream.dvalue, upstream.dmean_value, upstream.dprob, upstream.dtd, prob, cu_seqlens, dlog_ratio, num_rows, beta);
  check_launch("prefix_values backward");
}

void prefix_value_loss_fwd_cuda(const float* log_ratio, const int32_t* cu_seqlens, const LossTerms& terms, float* losses,
                                float* counted, float* dvalue, int64_t num_sequences, int64_t num_rows, float beta,
                                void* stream) {
  if (num_sequences == 0) return;
  const unsigned blocks = grid("prefix_value_loss", num_sequences);
  prefix_value_loss_fwd_kernel<<<blocks, kThreads, 0, as_stream(stream)>>>(log_ratio, cu_seqlens, terms, losses, counted,
                                                                           dvalue, num_rows, beta);
  check_launch("prefix_value_loss");
}

void prefix_value_loss_bwd_cuda(const float* dvalue, const int32_t* cu_seqlens, const float* scale, float* dlog_ratio,
                                int64_t num_sequences, int64_t num_rows, float beta, void* stream) {
  if (num_sequences == 0) return;
  const unsigned blocks = grid("prefix_value_loss backward", num_sequences);
  prefix_value_loss_bwd_kernel<<<blocks, kThreads, 0, as_stream(stream)>>>(dvalue, cu_seqlens, scale, dlog_ratio, num_rows,
                                                                           beta);
  check_launch("prefix_value_loss backward");
}

}  // namespace ipvrm
