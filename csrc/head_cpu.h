// CPU kernels of the head ops: what happens to a tile (rows, cols) of h.w while it is in cache. fp32 contiguous tiles whose
// first column is token `col0`; ids are int64, and one outside the vocabulary is no token. The matmuls are the caller's.
#pragma once

#include <cstdint>

#include "token_math.h"

namespace ipvrm {

// What a block of rows knows after some columns: max z, sum exp(z - max), sum (z - max) exp(z - max) (null if unwanted).
struct RowState {
  float* top;
  double* sumexp;
  double* sum_z_exp;
};

// Per row up to `capacity` tokens above `threshold`, of which the best `slots` survive a pruning. With `log_min_prob` the
// threshold follows the log-sum-exp so far, without (-inf) the slots-th best value.
struct CandidateBuffers {
  int32_t* count;    // (rows,)
  int32_t* ids;      // (rows, capacity)
  float* z;          // (rows, capacity)
  float* threshold;  // (rows,)
  int64_t slots;
  int64_t capacity;
  float log_min_prob;
};

// A block of rows on its way through the vocabulary: what the forward carries from tile to tile.
struct RowBlock {
  int64_t rows;
  int64_t K;
  int64_t D;
  const int64_t* ids;  // (rows, K)
  float* id_z;         // (rows, K) z of the ids met so far
  float* expectation;  // (rows, D), null if unwanted
  RowState state;
  CandidateBuffers candidates;  // count null if unwanted
};

// h.w to z in place; the state takes in this tile (rows, cols), id_z the z of the ids in it; candidates are emitted. With
// `expectation` the tile becomes exp(z - max) dz/da, in units of dz/da at the maximum, and the rows of `expectation` are
// rescaled.
void head_forward_tile_cpu(float* tile, int64_t cols, int64_t col0, const float* bias, LogitTransform transform,
                           const RowBlock& block, int num_threads);

// lse, what rounding it to fp32 lost, entropy (the latter two null if unwanted), logprobs (rows, K); the expectation leaves
// its units and is divided by sumexp.
void head_finish_cpu(const RowBlock& block, int64_t V, LogitTransform transform, float* lse, float* lse_low, float* entropy,
                     float* logprobs, int num_threads);

// Sorted (rows, slots) ids and log-probs, padded with -1 and -inf, and their counts.
void head_candidates_cpu(const RowBlock& block, int64_t slots, int64_t* ids, float* logprobs, int64_t* counts,
                         int num_threads);

// total[n] = sum_k dlogprobs - dlse, active[n] = whether any upstream gradient of row n is not 0. Any may be null.
void head_row_gradients_cpu(const float* dlogprobs, const float* dlse, const float* dentropy, const int64_t* ids, int64_t N,
                            int64_t K, int64_t V, double* total, uint8_t* active, int num_threads);

// Upstream gradients and statistics of all rows of a batch; dlogprobs and dentropy may be null.
struct RowGradients {
  const float* dlogprobs;  // (N, K)
  const int64_t* ids;      // (N, K)
  int64_t K;
  const double* total;
  const float* lse;
  const float* lse_low;  // may be null
  const float* dentropy;
  const float* entropy;
  const int64_t* active;  // rows with a gradient; null: all
};

// out (rows, cols) = dz/d(h.w + b) dL/dz of the active rows row0 .. row0 + rows. The tile holds h.w of these rows, and `out`
// may be `tile`; or, if `saved`, z of all rows of the batch.
void head_backward_tile_cpu(const float* tile, float* out, int64_t rows, int64_t cols, int64_t col0, int64_t row0,
                            bool saved, const float* bias, LogitTransform transform, const RowGradients& gradients,
                            int num_threads);

// out (cols, rows) = in (rows, cols) transposed.
void transpose_cpu(const float* in, int64_t rows, int64_t cols, float* out, int num_threads);

}  // namespace ipvrm
