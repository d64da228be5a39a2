// The module ipvrm_kernels._C: functions that take addresses, sizes and a CUDA stream as integers, and the flag has_cuda.
// Python allocates and validates; these fill. The GIL is released throughout.

#include <pybind11/pybind11.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif

#include "head_cpu.h"
#include "policy_cpu.h"
#include "sequence_cpu.h"
#ifdef IPVRM_WITH_CUDA
#include "policy_cuda.h"
#include "sequence_cuda.h"
#endif

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

const float* in(Address address) { return reinterpret_cast<const float*>(address); }
const int32_t* edges(Address address) { return reinterpret_cast<const int32_t*>(address); }
float* out(Address address) { return reinterpret_cast<float*>(address); }
template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// In the order in which ipvrm_kernels/distrl_objective.py passes them.
ipvrm::PolicyRows policy_rows(Address logprobs, Address token_ids, Address candidate_ids, Address old, Address candidate_old,
                              Address advantages, Address candidate_advantages, Address cu, int64_t B, int64_t row0,
                              int64_t n, int64_t K) {
  return {in(logprobs), at<int64_t>(token_ids), at<int64_t>(candidate_ids), in(old), in(candidate_old), in(advantages),
          in(candidate_advantages), edges(cu), B, row0, n, K};
}
ipvrm::Branch branch(int reduction, float divisor, float low, float high, float dual) {
  return {static_cast<ipvrm::Reduction>(reduction), divisor, {low, high, dual}};
}

// The family of an AMD processor (0x19: Zen 3 and 4, 0x1A: Zen 5), 0 of any other.
int amd_family() {
#if defined(__x86_64__) && defined(__GNUC__)
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(0, &eax, &ebx, &ecx, &edx) || ebx != signature_AMD_ebx) return 0;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return 0;
  return static_cast<int>(((eax >> 8) & 0xF) + ((eax >> 20) & 0xFF));
#else
  return 0;
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  const py::call_guard<py::gil_scoped_release> no_gil;

  m.attr("amd_family") = amd_family();

  m.def(
      "edges_rise_cpu",
      [](Address cu, int64_t B, int64_t N, int) { return ipvrm::edges_rise_cpu(edges(cu), B, N); }, no_gil);
  // The CPU kernels have no use for N: their edges are checked.
  m.def(
      "segment_scan_cpu",
      [](Address x, Address cu, Address y, int64_t B, int64_t, double decay, bool reverse, int threads) {
        ipvrm::segment_scan_cpu(in(x), edges(cu), out(y), B, decay, reverse, threads);
      },
      no_gil);
  m.def(
      "prefix_values_fwd_cpu",
      [](Address l, Address cu, Address value, Address mean, Address prob, Address td, int64_t B, int64_t, float beta, int threads) {
        ipvrm::prefix_values_fwd_cpu(in(l), edges(cu), out(value), out(mean), out(prob), out(td), B, beta, threads);
      },
      no_gil);
  m.def(
      "prefix_values_bwd_cpu",
      [](Address dvalue, Address dmean, Address dprob, Address dtd, Address prob, Address cu, Address dl, int64_t B,
         int64_t, float beta, int threads) {
        ipvrm::prefix_values_bwd_cpu(in(dvalue), in(dmean), in(dprob), in(dtd), in(prob), edges(cu), out(dl), B, beta,
                                     threads);
      },
      no_gil);
  m.def(
      "prefix_value_loss_fwd_cpu",
      [](Address l, Address cu, Address outcome, Address margin, Address weight, Address denominator, float margin_value,
         float inverse_divisor, Address loss, Address gradient, int64_t B, int64_t N, float beta, int weighting,
         bool per_sequence, bool count, int threads) {
        return ipvrm::prefix_value_loss_fwd_cpu(
            in(l), edges(cu), {in(outcome), in(margin), in(weight), in(denominator), margin_value, inverse_divisor},
            out(loss), out(gradient), B, N, beta, weighting, per_sequence, count, threads);
      },
      no_gil);

  // Head ops: (scale, limit) is a LogitTransform, (top, sumexp, sum_z_exp) a RowState, (count, cand_ids, cand_z, threshold,
  // slots, capacity, log_min_prob) CandidateBuffers.
  m.def(
      "head_forward_tile_cpu",
      [](Address tile, int64_t rows, int64_t cols, int64_t col0, Address bias, float scale, float limit, Address top,
         Address sumexp, Address sum_z_exp, Address ids, Address id_z, int64_t K, Address count, Address cand_ids,
         Address cand_z, Address threshold, int64_t slots, int64_t capacity, float log_min_prob, Address expectation,
         int64_t D, int threads) {
        ipvrm::head_forward_tile_cpu(
            out(tile), rows, cols, col0, in(bias), {scale, limit}, {out(top), at<double>(sumexp), at<double>(sum_z_exp)},
            at<int64_t>(ids), out(id_z), K,
            {at<int32_t>(count), at<int32_t>(cand_ids), out(cand_z), out(threshold), slots, capacity, log_min_prob},
            out(expectation), D, threads);
      },
      no_gil);
  m.def(
      "head_finish_cpu",
      [](Address top, Address sumexp, Address sum_z_exp, Address ids, Address id_z, int64_t rows, int64_t K, int64_t V,
         Address lse, Address lse_low, Address entropy, Address logprobs, Address expectation, int64_t D, int threads) {
        ipvrm::head_finish_cpu({out(top), at<double>(sumexp), at<double>(sum_z_exp)}, at<int64_t>(ids), in(id_z), rows, K, V,
                               out(lse), out(lse_low), out(entropy), out(logprobs), out(expectation), D, threads);
      },
      no_gil);
  m.def(
      "head_candidates_cpu",
      [](Address top, Address sumexp, Address count, Address cand_ids, Address cand_z, Address threshold, int64_t slots,
         int64_t capacity, float log_min_prob, int64_t rows, int64_t K, Address ids, Address logprobs, Address counts,
         int threads) {
        ipvrm::head_candidates_cpu(
            {out(top), at<double>(sumexp), nullptr},
            {at<int32_t>(count), at<int32_t>(cand_ids), out(cand_z), out(threshold), slots, capacity, log_min_prob}, rows, K,
            at<int64_t>(ids), out(logprobs), at<int64_t>(counts), threads);
      },
      no_gil);
  m.def(
      "head_upstream_cpu",
      [](Address dlogprobs, Address dlse, Address dentropy, Address ids, int64_t N, int64_t K, int64_t V, Address total,
         Address active, int threads) {
        ipvrm::head_upstream_cpu(in(dlogprobs), in(dlse), in(dentropy), at<int64_t>(ids), N, K, V, at<double>(total),
                                 at<uint8_t>(active), threads);
      },
      no_gil);
  m.def(
      "head_backward_tile_cpu",
      [](Address tile, Address dz, int64_t rows, int64_t cols, int64_t col0, Address index, int64_t row0, bool gather,
         bool transformed, Address bias, float scale, float limit, Address dlogprobs, Address ids, int64_t K, Address total,
         Address lse, Address lse_low, Address dentropy, Address entropy, int threads) {
        ipvrm::head_backward_tile_cpu(in(tile), out(dz), rows, cols, col0, at<int64_t>(index), row0, gather, transformed,
                                      in(bias), {scale, limit},
                                      {in(dlogprobs), at<int64_t>(ids), K, at<double>(total), in(lse), in(lse_low),
                                       in(dentropy), in(entropy)},
                                      threads);
      },
      no_gil);

  m.def(
      "transpose_cpu",
      [](Address x, int64_t rows, int64_t cols, Address y, int threads) {
        ipvrm::transpose_cpu(in(x), rows, cols, out(y), threads);
      },
      no_gil);

  // Policy losses: (low, high, dual) is a Clips.
  m.def(
      "clipped_surrogate_fwd_cpu",
      [](Address logprobs, Address old, Address advantages, int64_t count, float low, float high, float dual, Address loss,
         Address clipped, Address dual_clipped, Address slope, int threads) {
        ipvrm::clipped_surrogate_fwd_cpu(in(logprobs), in(old), in(advantages), count, {low, high, dual}, out(loss),
                                         at<uint8_t>(clipped), at<uint8_t>(dual_clipped), out(slope), threads);
      },
      no_gil);
  m.def(
      "clipped_surrogate_bwd_cpu",
      [](Address dloss, Address slope, Address dlogprobs, int64_t count, int threads) {
        ipvrm::clipped_surrogate_bwd_cpu(in(dloss), in(slope), out(dlogprobs), count, threads);
      },
      no_gil);
  m.def(
      "distrl_objective_cpu",
      [](Address logprobs, Address token_ids, Address candidate_ids, Address old, Address candidate_old,
         Address advantages, Address candidate_advantages, Address cu, int64_t B, int64_t row0, int64_t n, int64_t K,
         int token_reduction, float token_divisor, float token_low, float token_high, int candidate_reduction,
         float candidate_divisor, float candidate_low, float candidate_high, float dual, float alpha, Address loss,
         Address token_loss, Address candidate_loss, Address metrics, Address dlogprobs, Address partial, int64_t block_rows,
         int threads) {
        ipvrm::distrl_objective_cpu(
            policy_rows(logprobs, token_ids, candidate_ids, old, candidate_old, advantages, candidate_advantages, cu, B,
                        row0, n, K),
            branch(token_reduction, token_divisor, token_low, token_high, dual),
            branch(candidate_reduction, candidate_divisor, candidate_low, candidate_high, dual), alpha,
            {out(loss), out(token_loss), out(candidate_loss), out(metrics), out(dlogprobs)}, at<double>(partial), block_rows,
            threads);
      },
      no_gil);

#ifdef IPVRM_WITH_CUDA
  m.attr("has_cuda") = true;
  const auto stream_of = [](Address stream) { return reinterpret_cast<void*>(stream); };
  m.def(
      "segment_scan_cuda",
      [=](Address x, Address cu, Address y, int64_t B, int64_t N, double decay, bool reverse, Address stream) {
        ipvrm::segment_scan_cuda(in(x), edges(cu), out(y), B, N, decay, reverse, stream_of(stream));
      },
      no_gil);
  m.def(
      "prefix_values_fwd_cuda",
      [=](Address l, Address cu, Address value, Address mean, Address prob, Address td, int64_t B, int64_t N, float beta,
          Address stream) {
        ipvrm::prefix_values_fwd_cuda(in(l), edges(cu), out(value), out(mean), out(prob), out(td), B, N, beta,
                                      stream_of(stream));
      },
      no_gil);
  m.def(
      "prefix_values_bwd_cuda",
      [=](Address dvalue, Address dmean, Address dprob, Address dtd, Address prob, Address cu, Address dl, int64_t B, int64_t N,
          float beta, Address stream) {
        ipvrm::prefix_values_bwd_cuda(in(dvalue), in(dmean), in(dprob), in(dtd), in(prob), edges(cu), out(dl), B, N, beta,
                                      stream_of(stream));
      },
      no_gil);
  m.def(
      "prefix_value_loss_fwd_cuda",
      [=](Address l, Address cu, Address outcome, Address margin, Address weight, Address denominator, float margin_value,
         float inverse_divisor, Address loss, Address counted, Address slope, int64_t B, int64_t N, float beta, int weighting,
         bool per_sequence, Address stream) {
        ipvrm::prefix_value_loss_fwd_cuda(
            in(l), edges(cu), {in(outcome), in(margin), in(weight), in(denominator), margin_value, inverse_divisor},
            out(loss), out(counted), out(slope), B, N, beta, weighting, per_sequence, stream_of(stream));
      },
      no_gil);
  m.def(
      "prefix_value_loss_bwd_cuda",
      [=](Address slope, Address cu, Address scale, Address dl, int64_t B, int64_t N, float beta, Address stream) {
        ipvrm::prefix_value_loss_bwd_cuda(in(slope), edges(cu), in(scale), out(dl), B, N, beta, stream_of(stream));
      },
      no_gil);
  m.def(
      "clipped_surrogate_fwd_cuda",
      [=](Address logprobs, Address old, Address advantages, int64_t count, float low, float high, float dual, Address loss,
          Address clipped, Address dual_clipped, Address slope, Address stream) {
        ipvrm::clipped_surrogate_fwd_cuda(in(logprobs), in(old), in(advantages), count, {low, high, dual}, out(loss),
                                          at<uint8_t>(clipped), at<uint8_t>(dual_clipped), out(slope), stream_of(stream));
      },
      no_gil);
  m.def(
      "clipped_surrogate_bwd_cuda",
      [=](Address dloss, Address slope, Address dlogprobs, int64_t count, Address stream) {
        ipvrm::clipped_surrogate_bwd_cuda(in(dloss), in(slope), out(dlogprobs), count, stream_of(stream));
      },
      no_gil);
#else
  m.attr("has_cuda") = false;
#endif
}
