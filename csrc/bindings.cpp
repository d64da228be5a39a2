// The module ipvrm_kernels._C: functions that take addresses, sizes and a CUDA stream as integers and what belongs together
// as structs, whose fields Python sets by name, addresses as integers; and the flag has_cuda.
// Python allocates and validates; these fill. The GIL is released throughout.

#include <pybind11/pybind11.h>

#include <type_traits>

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif

#include "bf16_cpu.h"
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

// A struct as Python holds it: 0 and null until set, with what its addresses point into.
template <typename S>
struct Held : S {
  py::object alive;
};

template <typename S>
struct Struct : py::class_<Held<S>> {
  Struct(py::module_& m, const char* name) : py::class_<Held<S>>(m, name) {
    this->def(py::init<>());
    this->def_readwrite("alive", &Held<S>::alive);
  }

  template <typename F>
  Struct& field(const char* name, F S::* member) {
    if constexpr (std::is_pointer_v<F>) {
      this->def_property(
          name, [=](const Held<S>& s) { return reinterpret_cast<Address>(s.*member); },
          [=](Held<S>& s, Address address) { s.*member = reinterpret_cast<F>(address); });
    } else if constexpr (std::is_enum_v<F>) {
      this->def_property(
          name, [=](const Held<S>& s) { return static_cast<int>(s.*member); },
          [=](Held<S>& s, int value) { s.*member = static_cast<F>(value); });
    } else if constexpr (std::is_class_v<F>) {  // by value; who sets it keeps what it points into alive
      this->def_property(name, nullptr, [=](Held<S>& s, const Held<F>& value) { s.*member = value; });
    } else {
      this->def_property(
          name, [=](const Held<S>& s) { return s.*member; }, [=](Held<S>& s, F value) { s.*member = value; });
    }
    return *this;
  }
};

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
  m.attr("has_bf16_products") = ipvrm::has_bf16_products();
  m.attr("has_amx") = ipvrm::has_amx();

  m.def(
      "edges_rise_cpu", [](Address cu, int64_t B, int64_t N, int) { return ipvrm::edges_rise_cpu(edges(cu), B, N); },
      no_gil);
  m.def(
      "segment_scan_cpu",
      [](Address x, Address cu, Address y, int64_t B, int64_t N, double decay, bool reverse, int threads) {
        return ipvrm::segment_scan_cpu(in(x), edges(cu), out(y), B, N, decay, reverse, threads);
      },
      no_gil);
  m.def(
      "prefix_values_fwd_cpu",
      [](Address l, Address cu, Address value, Address mean, Address prob, Address td, int64_t B, int64_t N, float beta,
         int threads) {
        return ipvrm::prefix_values_fwd_cpu(in(l), edges(cu), out(value), out(mean), out(prob), out(td), B, N, beta,
                                            threads);
      },
      no_gil);
  Struct<ipvrm::PrefixValueGradients>(m, "PrefixValueGradients")
      .field("dvalue", &ipvrm::PrefixValueGradients::dvalue)
      .field("dmean_value", &ipvrm::PrefixValueGradients::dmean_value)
      .field("dprob", &ipvrm::PrefixValueGradients::dprob)
      .field("dtd", &ipvrm::PrefixValueGradients::dtd);
  m.def(
      "prefix_values_bwd_cpu",
      [](const Held<ipvrm::PrefixValueGradients>& upstream, Address prob, Address cu, Address dl, int64_t B, int64_t,
         float beta,
         int threads) { ipvrm::prefix_values_bwd_cpu(upstream, in(prob), edges(cu), out(dl), B, beta, threads); },
      no_gil);
  Struct<ipvrm::LossTerms>(m, "LossTerms")
      .field("outcome", &ipvrm::LossTerms::outcome)
      .field("margin", &ipvrm::LossTerms::margin)
      .field("weight", &ipvrm::LossTerms::weight)
      .field("denominator", &ipvrm::LossTerms::denominator)
      .field("margin_value", &ipvrm::LossTerms::margin_value)
      .field("inverse_divisor", &ipvrm::LossTerms::inverse_divisor)
      .field("weighting", &ipvrm::LossTerms::weighting)
      .field("per_sequence", &ipvrm::LossTerms::per_sequence);
  m.def(
      "prefix_value_loss_fwd_cpu",
      [](Address l, Address cu, const Held<ipvrm::LossTerms>& terms, Address loss, Address gradient, int64_t B, int64_t N,
         float beta, bool count, int threads) {
        return ipvrm::prefix_value_loss_fwd_cpu(in(l), edges(cu), terms, out(loss), out(gradient), B, N, beta, count,
                                                threads);
      },
      no_gil);

  // Head ops
  Struct<ipvrm::LogitTransform>(m, "LogitTransform")
      .field("scale", &ipvrm::LogitTransform::scale)
      .field("limit", &ipvrm::LogitTransform::limit);
  Struct<ipvrm::RowState>(m, "RowState")
      .field("top", &ipvrm::RowState::top)
      .field("sumexp", &ipvrm::RowState::sumexp)
      .field("sum_z_exp", &ipvrm::RowState::sum_z_exp);
  Struct<ipvrm::CandidateBuffers>(m, "CandidateBuffers")
      .field("count", &ipvrm::CandidateBuffers::count)
      .field("ids", &ipvrm::CandidateBuffers::ids)
      .field("z", &ipvrm::CandidateBuffers::z)
      .field("threshold", &ipvrm::CandidateBuffers::threshold)
      .field("slots", &ipvrm::CandidateBuffers::slots)
      .field("capacity", &ipvrm::CandidateBuffers::capacity)
      .field("log_min_prob", &ipvrm::CandidateBuffers::log_min_prob);
  Struct<ipvrm::RowBlock>(m, "RowBlock")
      .field("rows", &ipvrm::RowBlock::rows)
      .field("K", &ipvrm::RowBlock::K)
      .field("D", &ipvrm::RowBlock::D)
      .field("ids", &ipvrm::RowBlock::ids)
      .field("id_z", &ipvrm::RowBlock::id_z)
      .field("expectation", &ipvrm::RowBlock::expectation)
      .field("state", &ipvrm::RowBlock::state)
      .field("candidates", &ipvrm::RowBlock::candidates);
  m.def(
      "head_forward_tile_cpu",
      [](Address tile, int64_t cols, int64_t col0, Address bias, const Held<ipvrm::LogitTransform>& transform,
         const Held<ipvrm::RowBlock>& block,
         int threads) { ipvrm::head_forward_tile_cpu(out(tile), cols, col0, in(bias), transform, block, threads); },
      no_gil);
  m.def(
      "head_finish_cpu",
      [](const Held<ipvrm::RowBlock>& block, int64_t V, const Held<ipvrm::LogitTransform>& transform, Address lse,
         Address lse_low, Address entropy, Address logprobs, int threads) {
        ipvrm::head_finish_cpu(block, V, transform, out(lse), out(lse_low), out(entropy), out(logprobs), threads);
      },
      no_gil);
  m.def(
      "head_candidates_cpu",
      [](const Held<ipvrm::RowBlock>& block, int64_t slots, Address ids, Address logprobs, Address counts, int threads) {
        ipvrm::head_candidates_cpu(block, slots, at<int64_t>(ids), out(logprobs), at<int64_t>(counts), threads);
      },
      no_gil);
  m.def(
      "head_row_gradients_cpu",
      [](Address dlogprobs, Address dlse, Address dentropy, Address ids, int64_t N, int64_t K, int64_t V, Address total,
         Address active, int threads) {
        ipvrm::head_row_gradients_cpu(in(dlogprobs), in(dlse), in(dentropy), at<int64_t>(ids), N, K, V, at<double>(total),
                                      at<uint8_t>(active), threads);
      },
      no_gil);
  Struct<ipvrm::RowGradients>(m, "RowGradients")
      .field("dlogprobs", &ipvrm::RowGradients::dlogprobs)
      .field("ids", &ipvrm::RowGradients::ids)
      .field("K", &ipvrm::RowGradients::K)
      .field("total", &ipvrm::RowGradients::total)
      .field("lse", &ipvrm::RowGradients::lse)
      .field("lse_low", &ipvrm::RowGradients::lse_low)
      .field("dentropy", &ipvrm::RowGradients::dentropy)
      .field("entropy", &ipvrm::RowGradients::entropy)
      .field("active", &ipvrm::RowGradients::active);
  m.def(
      "head_backward_tile_cpu",
      [](Address tile, Address dz, int64_t rows, int64_t cols, int64_t col0, int64_t row0, bool saved, Address bias,
         const Held<ipvrm::LogitTransform>& transform, const Held<ipvrm::RowGradients>& gradients, int threads) {
        ipvrm::head_backward_tile_cpu(in(tile), out(dz), rows, cols, col0, row0, saved, in(bias), transform, gradients,
                                      threads);
      },
      no_gil);

  m.def(
      "transpose_cpu",
      [](Address x, int64_t rows, int64_t cols, Address y, int threads) {
        ipvrm::transpose_cpu(in(x), rows, cols, out(y), threads);
      },
      no_gil);

  // Products of bf16 matrices
  Struct<ipvrm::Brgemm>(m, "Brgemm").field("multiply", &ipvrm::Brgemm::multiply).field("release", &ipvrm::Brgemm::release);
  m.def(
      "pack_panels_cpu",
      [](Address x, bool wide, int64_t rows, int64_t cols, int64_t stride, bool transpose, int64_t K, Address out,
         int threads) {
        ipvrm::pack_panels_cpu(at<void>(x), wide, rows, cols, stride, transpose, K, at<ipvrm::bf16>(out), threads);
      },
      no_gil);
  m.def(
      "round_tile_cpu",
      [](Address tile, int64_t rows, int64_t cols, Address out, Address out_t, int64_t height, int threads) {
        ipvrm::round_tile_cpu(in(tile), rows, cols, at<ipvrm::bf16>(out), at<ipvrm::bf16>(out_t), height, threads);
      },
      no_gil);
  m.def(
      "multiply_panels_cpu",
      [](const Held<ipvrm::Brgemm>& brgemm, Address a, int64_t lda, Address panels, int64_t M, int64_t N, int64_t K,
         Address c, bool add, int threads) {
        ipvrm::multiply_panels_cpu(brgemm, at<ipvrm::bf16>(a), lda, at<ipvrm::bf16>(panels), M, N, K, out(c), add, threads);
      },
      no_gil);

  // Policy losses
  Struct<ipvrm::Clips>(m, "Clips")
      .field("low", &ipvrm::Clips::low)
      .field("high", &ipvrm::Clips::high)
      .field("dual", &ipvrm::Clips::dual);
  m.def(
      "clipped_surrogate_fwd_cpu",
      [](Address logprobs, Address old, Address advantages, int64_t count, const Held<ipvrm::Clips>& clips, Address loss,
         Address clipped, Address dual_clipped, Address derivative, int threads) {
        ipvrm::clipped_surrogate_fwd_cpu(in(logprobs), in(old), in(advantages), count, clips, out(loss),
                                         at<uint8_t>(clipped), at<uint8_t>(dual_clipped), out(derivative), threads);
      },
      no_gil);
  m.def(
      "clipped_surrogate_bwd_cpu",
      [](Address dloss, Address derivative, Address dlogprobs, int64_t count, int threads) {
        ipvrm::clipped_surrogate_bwd_cpu(in(dloss), in(derivative), out(dlogprobs), count, threads);
      },
      no_gil);
  Struct<ipvrm::PolicyRows>(m, "PolicyRows")
      .field("logprobs", &ipvrm::PolicyRows::logprobs)
      .field("old_logprobs", &ipvrm::PolicyRows::old_logprobs)
      .field("old_candidate_logprobs", &ipvrm::PolicyRows::old_candidate_logprobs)
      .field("advantages", &ipvrm::PolicyRows::advantages)
      .field("candidate_advantages", &ipvrm::PolicyRows::candidate_advantages)
      .field("cu_seqlens", &ipvrm::PolicyRows::cu_seqlens)
      .field("B", &ipvrm::PolicyRows::B)
      .field("row0", &ipvrm::PolicyRows::row0)
      .field("n", &ipvrm::PolicyRows::n)
      .field("K", &ipvrm::PolicyRows::K);
  Struct<ipvrm::Branch>(m, "Branch")
      .field("reduction", &ipvrm::Branch::reduction)
      .field("divisor", &ipvrm::Branch::divisor)
      .field("clips", &ipvrm::Branch::clips);
  Struct<ipvrm::ObjectiveOutputs>(m, "ObjectiveOutputs")
      .field("loss", &ipvrm::ObjectiveOutputs::loss)
      .field("token_loss", &ipvrm::ObjectiveOutputs::token_loss)
      .field("candidate_loss", &ipvrm::ObjectiveOutputs::candidate_loss)
      .field("metrics", &ipvrm::ObjectiveOutputs::metrics)
      .field("dlogprobs", &ipvrm::ObjectiveOutputs::dlogprobs);
  m.def(
      "distrl_objective_cpu",
      [](const Held<ipvrm::PolicyRows>& rows, const Held<ipvrm::Branch>& tokens, const Held<ipvrm::Branch>& candidates,
         float alpha, const Held<ipvrm::ObjectiveOutputs>& outputs, Address partial, int64_t block_rows, int threads) {
        ipvrm::distrl_objective_cpu(rows, tokens, candidates, alpha, outputs, at<double>(partial), block_rows, threads);
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
      [=](const Held<ipvrm::PrefixValueGradients>& upstream, Address prob, Address cu, Address dl, int64_t B, int64_t N,
          float beta, Address stream) {
        ipvrm::prefix_values_bwd_cuda(upstream, in(prob), edges(cu), out(dl), B, N, beta, stream_of(stream));
      },
      no_gil);
  m.def(
      "prefix_value_loss_fwd_cuda",
      [=](Address l, Address cu, const Held<ipvrm::LossTerms>& terms, Address loss, Address counted, Address dvalue,
          int64_t B, int64_t N, float beta, Address stream) {
        ipvrm::prefix_value_loss_fwd_cuda(in(l), edges(cu), terms, out(loss), out(counted), out(dvalue), B, N, beta,
                                          stream_of(stream));
      },
      no_gil);
  m.def(
      "prefix_value_loss_bwd_cuda",
      [=](Address dvalue, Address cu, Address scale, Address dl, int64_t B, int64_t N, float beta, Address stream) {
        ipvrm::prefix_value_loss_bwd_cuda(in(dvalue), edges(cu), in(scale), out(dl), B, N, beta, stream_of(stream));
      },
      no_gil);
  m.def(
      "clipped_surrogate_fwd_cuda",
      [=](Address logprobs, Address old, Address advantages, int64_t count, const Held<ipvrm::Clips>& clips, Address loss,
          Address clipped, Address dual_clipped, Address derivative, Address stream) {
        ipvrm::clipped_surrogate_fwd_cuda(in(logprobs), in(old), in(advantages), count, clips, out(loss),
                                          at<uint8_t>(clipped), at<uint8_t>(dual_clipped), out(derivative),
                                          stream_of(stream));
      },
      no_gil);
  m.def(
      "clipped_surrogate_bwd_cuda",
      [=](Address dloss, Address derivative, Address dlogprobs, int64_t count, Address stream) {
        ipvrm::clipped_surrogate_bwd_cuda(in(dloss), in(derivative), out(dlogprobs), count, stream_of(stream));
      },
      no_gil);
#else
  m.attr("has_cuda") = false;
#endif
}
