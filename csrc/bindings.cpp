// The module ipvrm_kernels._C: functions that take addresses, sizes and a CUDA stream as integers, and the flag has_cuda.
// Python allocates and validates; these fill. The GIL is released throughout.

#include <pybind11/pybind11.h>

#include "sequence_cpu.h"
#ifdef IPVRM_WITH_CUDA
#include "sequence_cuda.h"
#endif

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

const float* in(Address address) { return reinterpret_cast<const float*>(address); }
const int32_t* edges(Address address) { return reinterpret_cast<const int32_t*>(address); }
float* out(Address address) { return reinterpret_cast<float*>(address); }

}  // namespace

PYBIND11_MODULE(_C, m) {
  const py::call_guard<py::gil_scoped_release> no_gil;

  m.def(
      "segment_scan_cpu",
      [](Address x, Address cu, Address y, int64_t B, float decay, bool reverse, int threads) {
        ipvrm::segment_scan_cpu(in(x), edges(cu), out(y), B, decay, reverse, threads);
      },
      no_gil);
  m.def(
      "prefix_values_fwd_cpu",
      [](Address l, Address cu, Address value, Address mean, Address prob, Address td, int64_t B, float beta, int threads) {
        ipvrm::prefix_values_fwd_cpu(in(l), edges(cu), out(value), out(mean), out(prob), out(td), B, beta, threads);
      },
      no_gil);
  m.def(
      "prefix_values_bwd_cpu",
      [](Address dvalue, Address dmean, Address dprob, Address dtd, Address prob, Address cu, Address dl, int64_t B,
         float beta, int threads) {
        ipvrm::prefix_values_bwd_cpu(in(dvalue), in(dmean), in(dprob), in(dtd), in(prob), edges(cu), out(dl), B, beta,
                                     threads);
      },
      no_gil);
  m.def(
      "prefix_value_loss_fwd_cpu",
      [](Address l, Address cu, Address outcome, Address margin, Address weight, Address sums, Address slope, int64_t B,
         float beta, int weighting, bool per_sequence, int threads) {
        ipvrm::prefix_value_loss_fwd_cpu(in(l), edges(cu), in(outcome), in(margin), in(weight), out(sums), out(slope), B,
                                         beta, weighting, per_sequence, threads);
      },
      no_gil);
  m.def(
      "prefix_value_loss_bwd_cpu",
      [](Address slope, Address cu, Address scale, Address dl, int64_t B, float beta, int threads) {
        ipvrm::prefix_value_loss_bwd_cpu(in(slope), edges(cu), in(scale), out(dl), B, beta, threads);
      },
      no_gil);

#ifdef IPVRM_WITH_CUDA
  m.attr("has_cuda") = true;
  const auto stream_of = [](Address stream) { return reinterpret_cast<void*>(stream); };
  m.def(
      "segment_scan_cuda",
      [=](Address x, Address cu, Address y, int64_t B, float decay, bool reverse, Address stream) {
        ipvrm::segment_scan_cuda(in(x), edges(cu), out(y), B, decay, reverse, stream_of(stream));
      },
      no_gil);
  m.def(
      "prefix_values_fwd_cuda",
      [=](Address l, Address cu, Address value, Address mean, Address prob, Address td, int64_t B, float beta,
          Address stream) {
        ipvrm::prefix_values_fwd_cuda(in(l), edges(cu), out(value), out(mean), out(prob), out(td), B, beta,
                                      stream_of(stream));
      },
      no_gil);
  m.def(
      "prefix_values_bwd_cuda",
      [=](Address dvalue, Address dmean, Address dprob, Address dtd, Address prob, Address cu, Address dl, int64_t B,
          float beta, Address stream) {
        ipvrm::prefix_values_bwd_cuda(in(dvalue), in(dmean), in(dprob), in(dtd), in(prob), edges(cu), out(dl), B, beta,
                                      stream_of(stream));
      },
      no_gil);
  m.def(
      "prefix_value_loss_fwd_cuda",
      [=](Address l, Address cu, Address outcome, Address margin, Address weight, Address sums, Address slope, int64_t B,
          float beta, int weighting, bool per_sequence, Address stream) {
        ipvrm::prefix_value_loss_fwd_cuda(in(l), edges(cu), in(outcome), in(margin), in(weight), out(sums), out(slope), B,
                                          beta, weighting, per_sequence, stream_of(stream));
      },
      no_gil);
  m.def(
      "prefix_value_loss_bwd_cuda",
      [=](Address slope, Address cu, Address scale, Address dl, int64_t B, float beta, Address stream) {
        ipvrm::prefix_value_loss_bwd_cuda(in(slope), edges(cu), in(scale), out(dl), B, beta, stream_of(stream));
      },
      no_gil);
#else
  m.attr("has_cuda") = false;
#endif
}
