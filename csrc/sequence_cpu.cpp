// Sequence ops on the CPU: OpenMP over sequences. A sequence too long for one thread is cut into pieces, short neighbours
// share a block; the loops over a block's tokens are in sequence_blocks.h.

#include "sequence_cpu.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "sequence_blocks.h"
#include "token_math.h"

namespace ipvrm {
namespace {

constexpr int kShort = 64;  // tokens of a sequence that shares its block with its neighbours
constexpr int kMaxThreads = 256;
constexpr int64_t kLeastRows = 16384;   // below this a thread team costs more than it saves
constexpr int64_t kLeastSplit = 16384;  // below this a sequence is not worth two passes and two barriers

// Sequences that a thread takes at a time: few enough to balance, many enough not to queue for.
int chunk_size(int64_t num_sequences, int threads) {
  return static_cast<int>(std::clamp<int64_t>(num_sequences / (16 * threads), 1, 256));
}

// Tokens first .. last-1 of the sequence that has rows start .. start+length-1. first is a multiple of kBlock.
struct Piece {
  int64_t sequence, start;
  int length, first, last;
};

// Consecutive sequences of at most kShort tokens each and kBlock in all, treated as one block. Each is scanned in whole
// vectors; what it writes beyond its own tokens is written over by the neighbour that is scanned after it.
struct Run {
  int64_t sequence;      // the first
  const int32_t* edges;  // of the first
  int num_sequences;
  int64_t row() const { return edges[0]; }
  int count() const { return edges[num_sequences] - edges[0]; }
  int offset(int k) const { return edges[k] - edges[0]; }
  int length(int k) const { return edges[k + 1] - edges[k]; }
};

void clear_tail(const Run& run, float* y) { std::fill(y + run.count(), y + run.count() + kLanes, 0.0f); }

// A block of a run, with a vector of padding before and after it.
struct RunBuffer {
  float data[kLanes + kBlock + kLanes];
  float* tokens() { return data + kLanes; }
  float* load(const float* x, const Run& run) {
    std::fill(data, data + kLanes, 0.0f);
    std::copy(x + run.row(), x + run.row() + run.count(), tokens());
    clear_tail(run, tokens());
    return tokens();
  }
  void store(float* y, const Run& run) { std::copy(tokens(), tokens() + run.count(), y + run.row()); }
};

// y = fill(k, t - 1) at the token t of sequence k of the run.
template <typename Fill>
void fill_run(const Run& run, float* y, const Fill& fill) {
  for (int k = 0; k < run.num_sequences; ++k) {
    float* to = y + run.offset(k);
    for (int i = 0; i < kLanes * vectors(run.length(k)); ++i) to[i] = fill(k, i);
  }
  clear_tail(run, y);
}

const float* inverse_positions(const Run& run, float* buffer) {
  fill_run(run, buffer, [](int, int i) { return kReciprocals.at[i]; });
  return buffer;
}

template <typename Factor>
void scan_run(const Run& run, const float* x, float* y, const Factor& factor) {
  for (int k = 0; k < run.num_sequences; ++k) {
    scan_block(x + run.offset(k), y + run.offset(k), run.length(k), 0.0, factor(k));
  }
  clear_tail(run, y);
}

void reverse_scan_run(const Run& run, const float* x, float* y, float factor) {
  for (int k = run.num_sequences - 1; k >= 0; --k) {
    const int first = run.offset(k + 1) - kLanes * vectors(run.length(k));  // whole vectors that end where it ends
    reverse_scan_block(x + first, y + first, run.length(k), 0.0, factor);
  }
}

template <typename Body>
void forward_blocks(const Piece& piece, const Body& body) {
  for (int first = piece.first; first < piece.last; first += kBlock) {
    body(piece.start + first, first, std::min(kBlock, piece.last - first));
  }
}

template <typename Body>
void reverse_blocks(const Piece& piece, const Body& body) {
  if (piece.first >= piece.last) return;
  for (int first = piece.first + (piece.last - 1 - piece.first) / kBlock * kBlock; first >= piece.first; first -= kBlock) {
    body(piece.start + first, first, std::min(kBlock, piece.last - first));
  }
}

// `op` over a sequence cut into a piece per thread, by all threads of a team: a pass of sums, then one of outputs.
// Returns the sequence's total in every thread.
template <typename Op>
double run_pieces(int64_t b, int64_t start, int length, int threads, double* sums, double* totals, const Op& op) {
  const int step = ((length - 1) / kBlock / threads + 1) * kBlock;
  const auto piece = [&](int p) {
    return Piece{b, start, length, std::min(p * step, length), std::min((p + 1) * step, length)};
  };
#pragma omp for schedule(static, 1)
  for (int p = 0; p < threads; ++p) sums[p] = op.sum(piece(p));
#pragma omp for schedule(static, 1)
  for (int p = 0; p < threads; ++p) {
    double carry = 0.0;
    for (int q = Op::kReverse ? threads - 1 : 0; q != p; q += Op::kReverse ? -1 : 1) carry += sums[q];
    totals[p] = op.run(piece(p), carry);
  }
  double total = 0.0;
  for (int p = 0; p < threads; ++p) total += totals[p];
#pragma omp barrier
  return total;
}

// Runs `op` over every sequence that has tokens:
//   op.sum(piece) -> what the piece adds to the carry of those scanned after it (double)
//   op.run(piece, carry) -> its outputs are written; returns its share of the sequence's total (double)
//   op.back() -> an op that goes over what `run` has written once more, if Op::kReturns and op.returns()
//   op.finish(sequence, length, total)
//   op.run_short(run) does all of it for a run of short sequences.
// A sequence longer than half of one thread's share of the rows is cut into pieces. Blocks lie alike whole or cut: only the
// fp64 sums between them are added in another order.
template <typename Op>
void for_each_sequence(const int32_t* cu_seqlens, int64_t num_sequences, int num_threads, const Op& op) {
  const int64_t num_rows = cu_seqlens[num_sequences];
  const int threads = num_rows < kLeastRows ? 1 : std::clamp(num_threads, 1, kMaxThreads);
  const int64_t split_above = threads == 1 ? num_rows : std::max(num_rows / (2 * threads), kLeastSplit);
  const int chunk = chunk_size(num_sequences, threads);
  int32_t longest = 0;
#pragma omp simd reduction(max : longest)
  for (int64_t b = 0; b < num_sequences; ++b) longest = std::max(longest, cu_seqlens[b + 1] - cu_seqlens[b]);
  double sums[kMaxThreads], totals[kMaxThreads];
#pragma omp parallel num_threads(threads)
  {
    for (int64_t b = 0; longest > split_above && b < num_sequences; ++b) {
      const int length = cu_seqlens[b + 1] - cu_seqlens[b];
      if (length <= split_above) continue;
      const double total = run_pieces(b, cu_seqlens[b], length, threads, sums, totals, op);
      if constexpr (Op::kReturns) {
        if (op.returns()) run_pieces(b, cu_seqlens[b], length, threads, sums, totals, op.back());
      }
#pragma omp single
      op.finish(b, length, total);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t group = 0; group < num_sequences; group += chunk) {
      const int64_t end = std::min(group + chunk, num_sequences);
      for (int64_t b = group, next; b < end; b = next) {
        const int length = cu_seqlens[b + 1] - cu_seqlens[b];
        next = b + 1;
        if (length > split_above) continue;
        if (length > kShort) {
          const Piece whole{b, cu_seqlens[b], length, 0, length};
          op.finish(b, length, op.run(whole, 0.0));
          if constexpr (Op::kReturns) {
            if (op.returns()) op.back().run(whole, 0.0);
          }
          continue;
        }
        const auto joins = [&](int64_t c) {
          return cu_seqlens[c + 1] - cu_seqlens[c] <= kShort && cu_seqlens[c + 1] - cu_seqlens[b] <= kBlock;
        };
        while (next < end && joins(next)) ++next;
        op.run_short({b, cu_seqlens + b, static_cast<int>(next - b)});
      }
    }
  }
}

// What a running sum of `x` over a piece adds to the carry.
double piece_sum(const float* x, const Piece& piece) {
  float copy[kBlock], sums[kBlock];
  double carry = 0.0;
  forward_blocks(piece, [&](int64_t row, int, int count) {
    carry = scan_block(padded(x + row, count, copy), sums, count, carry, 1.0f);
  });
  return carry;
}

struct ScanForward {
  static constexpr bool kReverse = false, kReturns = false;
  const float* x;
  float* y;
  double sum(const Piece& piece) const { return piece_sum(x, piece); }
  double run(const Piece& piece, double carry) const {
    float copy[kBlock], buffer[kBlock];
    forward_blocks(piece, [&](int64_t row, int, int count) {
      float* out = whole(y + row, count, buffer);
      carry = scan_block(padded(x + row, count, copy), out, count, carry, 1.0f);
      copy_back(y + row, count, out);
    });
    return 0.0;
  }
  void finish(int64_t, int, double) const {}
  void run_short(const Run& run) const {
    RunBuffer in, out;
    scan_run(run, in.load(x, run), out.tokens(), [](int) { return 1.0f; });
    out.store(y, run);
  }
};

// factor times the running sum from each sequence's end.
struct ScanReverse {
  static constexpr bool kReverse = true, kReturns = false;
  const float* x;
  float* y;
  float factor;
  double sum(const Piece& piece) const {
    float copy[kBlock], sums[kBlock];
    double carry = 0.0;
    reverse_blocks(piece, [&](int64_t row, int, int count) {
      carry = reverse_scan_block(padded(x + row, count, copy), sums, count, carry, 1.0f);
    });
    return carry;
  }
  double run(const Piece& piece, double carry) const {
    float copy[kBlock], buffer[kBlock];
    reverse_blocks(piece, [&](int64_t row, int, int count) {
      float* out = whole(y + row, count, buffer);
      carry = reverse_scan_block(padded(x + row, count, copy), out, count, carry, factor);
      copy_back(y + row, count, out);
    });
    return 0.0;
  }
  void finish(int64_t, int, double) const {}
  void run_short(const Run& run) const {
    RunBuffer in, out;
    reverse_scan_run(run, in.load(x, run), out.tokens(), factor);
    out.store(y, run);
  }
};

struct PrefixValuesForward {
  static constexpr bool kReverse = false, kReturns = false;
  const float* log_ratio;
  float *value, *mean_value, *prob, *td;
  float beta;
  double sum(const Piece& piece) const { return piece_sum(log_ratio, piece); }
  double run(const Piece& piece, double carry) const {
    float copy[kBlock], inverse[kBlock], buffers[3][kBlock];
    forward_blocks(piece, [&](int64_t row, int before, int count) {
      float* out[3] = {whole(value + row, count, buffers[0]), whole(mean_value + row, count, buffers[1]),
                       whole(prob + row, count, buffers[2])};
      carry = scan_block(padded(log_ratio + row, count, copy), out[0], count, carry, beta);
      prefix_values_block(out[0], inverse_positions(before, count, inverse), out[1], out[2], count);
      copy_back(value + row, count, out[0]);
      copy_back(mean_value + row, count, out[1]);
      copy_back(prob + row, count, out[2]);
      multiply_block(log_ratio + row, td + row, count, beta);
    });
    return 0.0;
  }
  void finish(int64_t, int, double) const {}
  void run_short(const Run& run) const {
    RunBuffer in, values, means, probs, inverse;
    scan_run(run, in.load(log_ratio, run), values.tokens(), [&](int) { return beta; });
    prefix_values_block(values.tokens(), inverse_positions(run, inverse.tokens()), means.tokens(), probs.tokens(),
                        run.count());
    values.store(value, run);
    means.store(mean_value, run);
    probs.store(prob, run);
    multiply_block(log_ratio + run.row(), td + run.row(), run.count(), beta);
  }
};

struct PrefixValuesBackward {
  static constexpr bool kReverse = true, kReturns = false;
  const float *dvalue, *dmean_value, *dprob, *dtd, *prob;  // the first four may be null
  float* dlog_ratio;
  float beta;
  static const float* at(const float* gradient, int64_t row) { return gradient ? gradient + row : kZeros; }
  void gradients(int64_t row, const float* inverse_t, int count, float* gradient) const {
    prefix_gradient_block(at(dvalue, row), at(dmean_value, row), at(dprob, row), prob + row, inverse_t, gradient, count);
    std::fill(gradient + count, gradient + kLanes * vectors(count), 0.0f);
  }
  double sum(const Piece& piece) const {
    float gradient[kBlock], inverse[kBlock], sums[kBlock];
    double carry = 0.0;
    reverse_blocks(piece, [&](int64_t row, int before, int count) {
      gradients(row, inverse_positions(before, count, inverse), count, gradient);
      carry = reverse_scan_block(gradient, sums, count, carry, 1.0f);
    });
    return carry;
  }
  double run(const Piece& piece, double carry) const {
    float gradient[kBlock], inverse[kBlock], buffer[kBlock];
    reverse_blocks(piece, [&](int64_t row, int before, int count) {
      float* out = whole(dlog_ratio + row, count, buffer);
      gradients(row, inverse_positions(before, count, inverse), count, gradient);
      carry = reverse_scan_block(gradient, out, count, carry, beta);
      copy_back(dlog_ratio + row, count, out);
      if (dtd) add_product_block(dtd + row, dlog_ratio + row, count, beta);
    });
    return 0.0;
  }
  void finish(int64_t, int, double) const {}
  void run_short(const Run& run) const {
    RunBuffer gradient, inverse, out;
    std::fill(gradient.data, gradient.tokens(), 0.0f);
    gradients(run.row(), inverse_positions(run, inverse.tokens()), run.count(), gradient.tokens());
    reverse_scan_run(run, gradient.tokens(), out.tokens(), beta);
    out.store(dlog_ratio, run);
    if (dtd) add_product_block(dtd + run.row(), dlog_ratio + run.row(), run.count(), beta);
  }
};

// Losses, and dvalue, which `back` turns into gradients while the sequence is still in cache.
struct LossForward {
  static constexpr bool kReverse = false, kReturns = true;
  const float* log_ratio;
  const LossTerms& terms;
  double* losses;
  float* gradient;
  float beta, inverse_divisor;
  float scale(int64_t b, const PrefixWeights& weights) const {
    const float own = terms.weight ? inverse_divisor * terms.weight[b] : inverse_divisor;
    return terms.per_sequence ? own / weights.sum : own;
  }
  double sum(const Piece& piece) const { return piece_sum(log_ratio, piece); }
  double run(const Piece& piece, double carry) const {
    const int64_t b = piece.sequence;
    const PrefixWeights weights = prefix_weights(terms.weighting, static_cast<float>(piece.length));
    const float against = 1.0f - 2.0f * terms.outcome[b];  // -sign
    float copy[kBlock], values[kBlock], buffer[kBlock], inverse[kBlock];
    double total = 0.0;
    forward_blocks(piece, [&](int64_t row, int before, int count) {
      carry = scan_block(padded(log_ratio + row, count, copy), values, count, carry, against * beta);
      float* out = gradient ? whole(gradient + row, count, buffer) : buffer;
      total += margin_loss_block(values, inverse_positions(before, count, inverse), out, before, count, terms.margin_of(b),
                                 against * scale(b, weights), weights);
      if (gradient) copy_back(gradient + row, count, out);
    });
    return total;
  }
  bool returns() const { return gradient != nullptr; }
  ScanReverse back() const { return {gradient, gradient, beta}; }
  void finish(int64_t b, int length, double total) const {
    const PrefixWeights weights = prefix_weights(terms.weighting, static_cast<float>(length));
    losses[b] = scale(b, weights) * total;
  }
  void run_short(const Run& run) const {
    RunBuffer in, values, margins, scales, omegas, dvalue, inverse;
    const auto against = [&](int k) { return 1.0f - 2.0f * terms.outcome[run.sequence + k]; };
    scan_run(run, in.load(log_ratio, run), values.tokens(), [&](int k) { return against(k) * beta; });
    inverse_positions(run, inverse.tokens());
    for (int k = 0; k < run.num_sequences; ++k) {
      const int64_t b = run.sequence + k;
      const PrefixWeights weights = prefix_weights(terms.weighting, static_cast<float>(run.length(k)));
      const float factor = against(k) * scale(b, weights);
      float *margin_to = margins.tokens() + run.offset(k), *scale_to = scales.tokens() + run.offset(k);
      float* omega_to = omegas.tokens() + run.offset(k);
      for (int i = 0; i < kLanes * vectors(run.length(k)); ++i) {
        margin_to[i] = terms.margin_of(b);
        scale_to[i] = factor;
        omega_to[i] = weights.at(static_cast<float>(i + 1));
      }
    }
    for (RunBuffer* buffer : {&margins, &scales, &omegas}) clear_tail(run, buffer->tokens());
    margin_loss_run(values.tokens(), inverse.tokens(), margins.tokens(), scales.tokens(), omegas.tokens(), dvalue.tokens(),
                    run.count());
    if (gradient) {
      std::fill(dvalue.data, dvalue.tokens(), 0.0f);
      reverse_scan_run(run, dvalue.tokens(), values.tokens(), beta);
      values.store(gradient, run);
    }
    for (int k = 0; k < run.num_sequences; ++k) {
      double total = 0.0;
      for (int i = run.offset(k); i < run.offset(k + 1); ++i) total += omegas.tokens()[i];
      if (run.length(k) > 0) finish(run.sequence + k, run.length(k), total);
    }
  }
};

bool valid(const LossTerms& terms, int64_t num_sequences) {
  bool valid = true;
  for (int64_t b = 0; b < num_sequences; ++b) valid &= (terms.outcome[b] == 0.0f) | (terms.outcome[b] == 1.0f);
  for (const float* numbers : {terms.margin, terms.weight}) {
    for (int64_t b = 0; numbers && b < num_sequences; ++b) valid &= std::isfinite(numbers[b]);
  }
  return valid && (!terms.denominator || (*terms.denominator > 0.0f && std::isfinite(*terms.denominator)));
}

}  // namespace

bool edges_rise_cpu(const int32_t* cu_seqlens, int64_t num_sequences, int64_t num_rows) {
  if (num_sequences < 0) return false;  // no edge at all: an address of nothing
  bool rises = cu_seqlens[0] == 0 && cu_seqlens[num_sequences] == num_rows;
  for (int64_t b = 0; b < num_sequences; ++b) rises &= cu_seqlens[b] <= cu_seqlens[b + 1];
  return rises;
}

bool segment_scan_cpu(const float* x, const int32_t* cu_seqlens, float* y, int64_t num_sequences, int64_t num_rows,
                      double decay, bool reverse, int num_threads) {
  if (!edges_rise_cpu(cu_seqlens, num_sequences, num_rows)) return false;
  if (decay == 1.0) {
    if (reverse) {
      for_each_sequence(cu_seqlens, num_sequences, num_threads, ScanReverse{x, y, 1.0f});
    } else {
      for_each_sequence(cu_seqlens, num_sequences, num_threads, ScanForward{x, y});
    }
    return true;
  }
  const auto scan = [&](int64_t start, int64_t end) {
    double carry = 0.0;
    if (reverse) {
      for (int64_t i = end - 1; i >= start; --i) y[i] = static_cast<float>(carry = x[i] + decay * carry);
    } else {
      for (int64_t i = start; i < end; ++i) y[i] = static_cast<float>(carry = x[i] + decay * carry);
    }
  };
  const int threads = cu_seqlens[num_sequences] < kLeastRows ? 1 : num_threads;
  const int chunk = chunk_size(num_sequences, threads);
#pragma omp parallel for schedule(dynamic, chunk) num_threads(threads)
  for (int64_t b = 0; b < num_sequences; ++b) scan(cu_seqlens[b], cu_seqlens[b + 1]);
  return true;
}

bool prefix_values_fwd_cpu(const float* log_ratio, const int32_t* cu_seqlens, float* value, float* mean_value, float* prob,
                           float* td, int64_t num_sequences, int64_t num_rows, float beta, int num_threads) {
  if (!edges_rise_cpu(cu_seqlens, num_sequences, num_rows)) return false;
  for_each_sequence(cu_seqlens, num_sequences, num_threads,
                    PrefixValuesForward{log_ratio, value, mean_value, prob, td, beta});
  return true;
}

void prefix_values_bwd_cpu(const PrefixValueGradients& upstream, const float* prob, const int32_t* cu_seqlens,
                           float* dlog_ratio, int64_t num_sequences, float beta, int num_threads) {
  const auto [dvalue, dmean_value, dprob, dtd] = upstream;
  for_each_sequence(cu_seqlens, num_sequences, num_threads,
                    PrefixValuesBackward{dvalue, dmean_value, dprob, dtd, prob, dlog_ratio, beta});
}

bool prefix_value_loss_fwd_cpu(const float* log_ratio, const int32_t* cu_seqlens, const LossTerms& terms, float* loss,
                               float* gradient, int64_t num_sequences, int64_t num_rows, float beta, bool count,
                               int num_threads) {
  if (!edges_rise_cpu(cu_seqlens, num_sequences, num_rows) || !valid(terms, num_sequences)) return false;
  float inverse_divisor = terms.denominator ? 1.0f / *terms.denominator : terms.inverse_divisor;
  if (count) {
    double sum = 0.0;
    for (int64_t b = 0; b < num_sequences; ++b) {
      const int32_t length = cu_seqlens[b + 1] - cu_seqlens[b];
      if (length > 0) sum += prefix_weights(terms.weighting, static_cast<float>(length)).sum;
    }
    inverse_divisor = static_cast<float>(inverse_divisor / sum);
  }
  std::vector<double> losses(num_sequences, 0.0);  // 0 for an empty sequence, which the loop passes over
  for_each_sequence(cu_seqlens, num_sequences, num_threads,
                    LossForward{log_ratio, terms, losses.data(), gradient, beta, inverse_divisor});
  *loss = static_cast<float>(std::accumulate(losses.begin(), losses.end(), 0.0));
  return true;
}

}  // namespace ipvrm
