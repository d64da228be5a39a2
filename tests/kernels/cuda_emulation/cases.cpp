// One case of test_cuda_emulation.py: `cases OP SIZES [drop|shift LINE]` runs an op's emulated CUDA kernels under every
// order of threads. SIZES: lengths of sequences, edges for `unchecked`, a count for `clipped_surrogate`, a kernel's name
// for `faulty`. Exits 1 and says what is wrong: a value too far from the definition in fp64, bits that depend on the order,
// something written outside an output, or what the emulation reports. No oracle here shares a line with the kernels.
#include <cuda_runtime.h>

#include <cstdio>
#include <sstream>

#include "policy_cuda.h"
#include "sequence_cuda.h"

void run_faulty(const std::string& name, float* out);

namespace {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

constexpr double kEps = 1.0 / (1 << 23);
constexpr float kBeta = 10.0f;
constexpr float kGuard = 7.0f;
constexpr int64_t kRoom = 64;  // floats before and behind every buffer
const float kInf = INFINITY;

int failures = 0;
std::mt19937 generator{0};

template <class... Parts>
void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  std::printf("FAIL %s [%s]\n", text.str().c_str(), emulation::kOrders[static_cast<int>(emulation::order)]);
  ++failures;
}

// A buffer of n with padding around it: NaN around an input, guards around an output, which itself holds NaN.
struct Buffer {
  Floats all;
  int64_t n;
  explicit Buffer(const Floats& input) : all(input.size() + 2 * kRoom, NAN), n(static_cast<int64_t>(input.size())) {
    std::copy(input.begin(), input.end(), all.begin() + kRoom);
  }
  explicit Buffer(int64_t n_, float inside = NAN) : all(n_ + 2 * kRoom, kGuard), n(n_) {
    std::fill(all.begin() + kRoom, all.end() - kRoom, inside);
  }
  float* data() { return all.data() + kRoom; }
  float operator[](int64_t i) const { return all[kRoom + i]; }
  bool intact() const {
    for (int64_t i = 0; i < kRoom; ++i)
      if (all[i] != kGuard || all[all.size() - 1 - i] != kGuard) return false;
    return true;
  }
};

// What a number must be, and how far fp32 may be from it.
struct Expected {
  Doubles value, bound;
  explicit Expected(int64_t n) : value(n), bound(n) {}
  void set(int64_t i, double v, double b) { value[i] = v, bound[i] = b; }
};

std::vector<Buffer> kept;  // all outputs of one order

void check(const char* what, const Buffer& got, const Expected& expected) {
  if (!got.intact()) fail(what, " is written outside its ", got.n, " numbers");
  for (int64_t i = 0; i < got.n; ++i) {
    const double value = expected.value[i], error = std::fabs(got[i] - value);
    if (got[i] == value || error <= expected.bound[i] || (std::isnan(value) && std::isnan(got[i]))) continue;
    fail(what, "[", i, "] = ", got[i], ", not ", value, " +- ", expected.bound[i]);
    break;
  }
  kept.push_back(got);
}

Floats randn(int64_t n) {
  std::normal_distribution<float> normal;
  Floats x(n);
  for (float& value : x) value = normal(generator);
  return x;
}

double sigmoid(double z) { return 1.0 / (1.0 + std::exp(-z)); }
double softplus(double z) { return std::max(z, 0.0) + std::log1p(std::exp(-std::fabs(z))); }

struct Sequences {
  std::vector<int32_t> edges{0};
  int64_t B = 0, N = 0;
  explicit Sequences(const std::vector<int64_t>& lengths) : B(static_cast<int64_t>(lengths.size())) {
    for (int64_t length : lengths) edges.push_back(static_cast<int32_t>(N += length));
  }
  int64_t start(int64_t b) const { return edges[b]; }
  int64_t length(int64_t b) const { return edges[b + 1] - edges[b]; }
};

void segment_scan(const Sequences& s) {
  Buffer x(randn(s.N));
  for (double decay : {1.0, 0.999, -0.5})
    for (bool reverse : {false, true}) {
      Expected expected(s.N);
      for (int64_t b = 0; b < s.B; ++b) {
        double sum = 0, size = 0;
        for (int64_t i = 0; i < s.length(b); ++i) {
          const int64_t t = s.start(b) + (reverse ? s.length(b) - 1 - i : i);
          sum = x[t] + decay * sum, size = std::fabs(x[t]) + std::fabs(decay) * size;
          expected.set(t, sum, 16 * kEps * size);
        }
      }
      Buffer y(s.N);
      ipvrm::segment_scan_cuda(x.data(), s.edges.data(), y.data(), s.B, s.N, decay, reverse, nullptr);
      check("y", y, expected);
    }
}

void prefix_values(const Sequences& s) {
  Buffer x(randn(s.N)), prob_given(s.N);
  Expected value(s.N), mean_value(s.N), prob(s.N), td(s.N);
  for (int64_t b = 0; b < s.B; ++b) {
    double sum = 0, size = 0;
    for (int64_t i = 0; i < s.length(b); ++i) {
      const int64_t t = s.start(b) + i;
      sum += kBeta * double{x[t]}, size += 16 * kEps * kBeta * std::fabs(x[t]);
      value.set(t, sum, size);
      mean_value.set(t, sum / (i + 1), size / (i + 1));
      prob.set(t, sigmoid(sum / (i + 1)), size / (i + 1) / 4 + 4 * kEps);
      td.set(t, kBeta * double{x[t]}, 2 * kEps * kBeta * std::fabs(x[t]));
      prob_given.data()[t] = static_cast<float>(prob.value[t]);
    }
  }
  Buffer out[] = {Buffer(s.N), Buffer(s.N), Buffer(s.N), Buffer(s.N)};
  ipvrm::prefix_values_fwd_cuda(x.data(), s.edges.data(), out[0].data(), out[1].data(), out[2].data(), out[3].data(), s.B,
                                s.N, kBeta, nullptr);
  check("value", out[0], value), check("mean_value", out[1], mean_value);
  check("prob", out[2], prob), check("td", out[3], td);

  Buffer up[] = {Buffer(randn(s.N)), Buffer(randn(s.N)), Buffer(randn(s.N)), Buffer(randn(s.N))};
  for (int given : {15, 1, 2, 4, 8, 0}) {  // bit i: up[i] is there
    auto at = [&](int i, int64_t t) { return given >> i & 1 ? double{up[i][t]} : 0.0; };
    auto address = [&](int i) { return given >> i & 1 ? up[i].data() : nullptr; };
    Expected expected(s.N);
    for (int64_t b = 0; b < s.B; ++b) {
      double sum = 0, size = 0;
      for (int64_t i = s.length(b) - 1; i >= 0; --i) {
        const int64_t t = s.start(b) + i;
        const double p = prob_given[t];
        const double terms[] = {at(0, t), at(1, t) / (i + 1), at(2, t) * p * (1 - p) / (i + 1)};
        for (double term : terms) sum += term, size += std::fabs(term);
        expected.set(t, kBeta * (sum + at(3, t)), 16 * kEps * kBeta * (size + std::fabs(at(3, t))));
      }
    }
    Buffer dlog_ratio(s.N);
    ipvrm::prefix_values_bwd_cuda({address(0), address(1), address(2), address(3)}, prob_given.data(), s.edges.data(),
                                  dlog_ratio.data(), s.B, s.N, kBeta, nullptr);
    check("dlog_ratio", dlog_ratio, expected);
  }
}

// per_sequence: the mean of each sequence's, with weights, margins and a denominator; else sums, with omega counted.
void prefix_value_loss(const Sequences& s) {
  Buffer x(randn(s.N)), margin(randn(s.B)), weight(randn(s.B)), outcome(s.B);
  for (int64_t b = 0; b < s.B; ++b) {
    margin.data()[b] += 5.0f, weight.data()[b] = 0.5f + std::fabs(weight[b]);
    outcome.data()[b] = static_cast<float>(generator() % 2);
  }
  const float denominator = 3.25f;
  for (int kind : {0, 1, 2})  // uniform, late, early
    for (bool per_sequence : {true, false}) {
      const ipvrm::LossTerms terms{outcome.data(), per_sequence ? margin.data() : nullptr,
                                   per_sequence ? weight.data() : nullptr, per_sequence ? &denominator : nullptr, 5.0f, 0.5f,
                                   static_cast<ipvrm::Weighting>(kind), per_sequence};
      Expected losses(s.B), counted(s.B), dvalue(s.N), dlog_ratio(s.N);
      const double factor = 0.75;
      for (int64_t b = 0; b < s.B; ++b) {
        const double L = static_cast<double>(s.length(b)), sign = 2 * outcome[b] - 1;
        auto omega = [&](double t) { return kind == 1 ? t / L : kind == 2 && L > 1 ? 1 - t / L : 1.0; };
        double omegas = 0, sum = 0, size = 0, loss = 0, bound = 0;
        for (int64_t i = 1; i <= s.length(b); ++i) omegas += omega(static_cast<double>(i));
        double scale = per_sequence ? weight[b] / denominator / (omegas > 0 ? omegas : 1.0) : 0.5;
        for (int64_t i = 0; i < s.length(b); ++i) {
          const int64_t t = s.start(b) + i;
          const double position = static_cast<double>(i + 1), at = omega(position);
          sum += kBeta * double{x[t]}, size += 16 * kEps * kBeta * std::fabs(x[t]);
          const double m = per_sequence ? margin[b] : 5.0, z = m - sign * sum / position;
          const double off = size / position + 2 * kEps * (std::fabs(z) + std::fabs(m));  // of z
          loss += at * softplus(z);
          bound += (at + 4 * kEps) * off + (16 * kEps * at + 4 * kEps) * softplus(z);
          dvalue.set(t, -scale * at * sign * sigmoid(z) / position,
                    scale / position * ((16 * kEps * at + 4 * kEps) * sigmoid(z) + at * (off * sigmoid(z) + kEps * 1e-6)));
        }
        losses.set(b, scale * loss, scale * bound);
        counted.set(b, omegas, 4 * kEps * omegas);
        double total = 0, range = 0;
        for (int64_t t = s.start(b) + s.length(b) - 1; t >= s.start(b); --t) {
          total += dvalue.value[t], range += 16 * kEps * std::fabs(dvalue.value[t]) + dvalue.bound[t];
          dlog_ratio.set(t, factor * kBeta * total, factor * kBeta * range);
        }
      }
      Buffer got_losses(s.B), got_counted(s.B), got_dvalue(s.N), got_dlog_ratio(s.N), alone(s.B);
      ipvrm::prefix_value_loss_fwd_cuda(x.data(), s.edges.data(), terms, got_losses.data(),
                                        per_sequence ? nullptr : got_counted.data(), got_dvalue.data(), s.B, s.N, kBeta,
                                        nullptr);
      check("losses", got_losses, losses), check("dvalue", got_dvalue, dvalue);
      if (!per_sequence) check("counted", got_counted, counted);
      if (kind == 0) {
        ipvrm::prefix_value_loss_fwd_cuda(x.data(), s.edges.data(), terms, alone.data(), nullptr, nullptr, s.B, s.N, kBeta,
                                          nullptr);
        check("losses without gradient", alone, losses);
      }
      const float device_scalar = static_cast<float>(factor);
      ipvrm::prefix_value_loss_bwd_cuda(got_dvalue.data(), s.edges.data(), &device_scalar, got_dlog_ratio.data(), s.B, s.N,
                                        kBeta, nullptr);
      check("dlog_ratio", got_dlog_ratio, dlog_ratio);
    }
}

// Edges that nobody checked: tokens that they enclose, held to 0 .. N, are written, no others, and nothing else is read.
void unchecked(const std::vector<int64_t>& given) {
  constexpr int64_t N = 12;
  const std::vector<int32_t> edges(given.begin(), given.end());
  const int64_t B = static_cast<int64_t>(edges.size()) - 1;
  std::vector<bool> enclosed(N);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t t = std::max<int64_t>(given[b], 0); t < std::min(given[b + 1], N); ++t) enclosed[t] = true;
  auto held = [&](const char* what, const Buffer& got) {
    if (!got.intact()) fail(what, " is written outside its ", got.n, " numbers");
    for (int64_t t = 0; t < N; ++t)
      if (std::isnan(got[t]) || (got[t] != kGuard) != enclosed[t]) return fail(what, "[", t, "] = ", got[t]);
  };
  Buffer ones(Floats(N, 1.0f)), outcome(Floats(B, 1.0f));
  const float one = 1.0f;
  for (bool reverse : {false, true}) {
    Buffer y(N, kGuard);
    ipvrm::segment_scan_cuda(ones.data(), edges.data(), y.data(), B, N, 0.9, reverse, nullptr);
    held("y", y);
  }
  Buffer out[] = {Buffer(N, kGuard), Buffer(N, kGuard), Buffer(N, kGuard), Buffer(N, kGuard), Buffer(N, kGuard)};
  ipvrm::prefix_values_fwd_cuda(ones.data(), edges.data(), out[0].data(), out[1].data(), out[2].data(), out[3].data(), B, N,
                                1.5f, nullptr);
  ipvrm::prefix_values_bwd_cuda({ones.data(), ones.data(), ones.data(), ones.data()}, ones.data(), edges.data(),
                                out[4].data(), B, N, 1.5f, nullptr);
  for (const Buffer& got : out) held("prefix_values", got);
  Buffer losses(B), dvalue(N, kGuard), dlog_ratio(N, kGuard);
  const ipvrm::LossTerms terms{outcome.data(), nullptr, nullptr, nullptr, 5.0f, 1.0f, ipvrm::Weighting::uniform, true};
  ipvrm::prefix_value_loss_fwd_cuda(ones.data(), edges.data(), terms, losses.data(), nullptr, dvalue.data(), B, N, 1.5f,
                                    nullptr);
  ipvrm::prefix_value_loss_bwd_cuda(ones.data(), edges.data(), &one, dlog_ratio.data(), B, N, 1.5f, nullptr);
  held("dvalue", dvalue), held("dlog_ratio", dlog_ratio);
  for (int64_t b = 0; b < B; ++b)
    if (!std::isfinite(losses[b])) fail("losses[", b, "] = ", losses[b]);
}

void clipped_surrogate(int64_t n) {
  Buffer logprobs(randn(n)), old_logprobs(randn(n)), advantages(randn(n)), dloss(randn(n));
  for (int64_t i = 0; i < n; ++i) {
    if (i % 5 == 1) old_logprobs.data()[i] = -kInf, logprobs.data()[i] = dloss.data()[i] = NAN;  // unused
    if (i % 7 == 2) advantages.data()[i] = 0.0f;
  }
  if (n > 10) logprobs.data()[3] = NAN, logprobs.data()[8] = -kInf;
  for (double dual : {double{INFINITY}, 1.5}) {
    const double low = 0.8f, high = 1.28f;
    Expected loss(n), derivative(n), dlogprobs(n);
    std::vector<int> clipped(n), dual_clipped(n);
    for (int64_t i = 0; i < n; ++i) {
      const double a = advantages[i], ratio = std::exp(double{logprobs[i]} - double{old_logprobs[i]});
      if (old_logprobs[i] == -kInf || a == 0) continue;
      const double plain = -a * ratio, bounded = -a * (ratio < low ? low : ratio > high ? high : ratio);
      const double larger = std::isnan(ratio) ? NAN : std::max(plain, bounded), bound = 16 * kEps * std::fabs(plain);
      clipped[i] = bounded > plain, dual_clipped[i] = a < 0 && larger > -a * dual;
      const bool moves = !clipped[i] && !dual_clipped[i];
      loss.set(i, dual_clipped[i] ? -a * dual : larger, bound + 4 * kEps * std::fabs(bounded));
      derivative.set(i, moves ? plain : 0.0, bound);
      dlogprobs.set(i, moves ? dloss[i] * plain : 0.0, std::fabs(dloss[i]) * bound);
    }
    Buffer got_loss(n), got_derivative(n), got_dlogprobs(n);
    std::vector<uint8_t> got_clipped(n + 2, 9), got_dual(n + 2, 9);
    ipvrm::clipped_surrogate_fwd_cuda(logprobs.data(), old_logprobs.data(), advantages.data(), n,
                                      {0.8f, 1.28f, static_cast<float>(dual)}, got_loss.data(), &got_clipped[1], &got_dual[1],
                                      got_derivative.data(), nullptr);
    check("loss", got_loss, loss), check("derivative", got_derivative, derivative);
    for (int64_t i = 0; i < n; ++i)
      if (got_clipped[i + 1] != clipped[i] || got_dual[i + 1] != dual_clipped[i]) return fail("flags of element ", i);
    if (got_clipped[0] != 9 || got_dual[0] != 9 || got_clipped[n + 1] != 9 || got_dual[n + 1] != 9)
      fail("flags are written outside their ", n, " numbers");
    ipvrm::clipped_surrogate_bwd_cuda(dloss.data(), got_derivative.data(), got_dlogprobs.data(), n, nullptr);
    check("dlogprobs", got_dlogprobs, dlogprobs);
  }
}

// More blocks than a launch can have are refused, and nothing is launched.
void refused_grids() {
  const int32_t edges[] = {0, 1};
  Buffer x(Floats(1, 1.0f));
  for (int64_t blocks : {int64_t{1} << 31, (int64_t{1} << 32) + 1}) {
    Buffer y(1, kGuard);
    try {
      ipvrm::segment_scan_cuda(x.data(), edges, y.data(), blocks, 1, 1.0, false, nullptr);
      fail("segment_scan of ", blocks, " sequences");
    } catch (const emulation::Error&) {
      throw;
    } catch (const std::runtime_error&) {
    }
    try {
      ipvrm::clipped_surrogate_bwd_cuda(x.data(), x.data(), y.data(), (blocks - 1) * 256 + 1, nullptr);
      fail("clipped_surrogate of ", blocks, " blocks");
    } catch (const emulation::Error&) {
      throw;
    } catch (const std::runtime_error&) {
    }
    if (y[0] != kGuard) fail("something was launched");
  }
}

void faulty(const std::string& name) {
  constexpr int64_t n = 64;
  Expected expected(n);
  if (name == "right")
    for (int64_t t = 0; t < n; ++t) expected.set(t, (t ^ 1) + 40 - (t < 24 ? 0 : 64) + (t < 32 ? 43 : 11), 0);
  else
    for (int64_t t = 0; t < n; ++t) expected.set(t, name == "no_barrier" ? (t + 40) % n : 1, 0);
  Buffer out(n);
  run_faulty(name, out.data());
  check("out", out, expected);
}

void run(const std::string& op, const std::string& text) {
  std::vector<int64_t> sizes;
  std::stringstream stream(text);
  if (op != "faulty")
    for (std::string part; std::getline(stream, part, ',');) sizes.push_back(std::stoll(part));
  if (op == "segment_scan") return segment_scan(Sequences(sizes));
  if (op == "prefix_values") return prefix_values(Sequences(sizes));
  if (op == "prefix_value_loss") return prefix_value_loss(Sequences(sizes));
  if (op == "unchecked") return unchecked(sizes);
  if (op == "clipped_surrogate") return clipped_surrogate(sizes.at(0));
  if (op == "refused_grids") return refused_grids();
  if (op == "faulty") return faulty(text);
  throw std::invalid_argument("no op called " + op);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3 && argc != 5) return std::fprintf(stderr, "cases OP SIZES [drop|shift LINE]\n"), 2;
  if (argc == 5) (std::string(argv[3]) == "drop" ? emulation::dropped_line : emulation::shifted_line) = std::stoi(argv[4]);
  std::vector<Buffer> first;
  for (int o = 0; o < 5; ++o) {
    emulation::order = static_cast<emulation::Order>(o);
    emulation::dice.seed(o);
    generator.seed(0);
    kept.clear();
    try {
      run(argv[1], argv[2]);
    } catch (const emulation::Error& error) {
      fail(error.what());
      break;
    }
    if (o == 0) first = kept;
    for (size_t i = 0; i < std::min(kept.size(), first.size()); ++i)
      if (std::memcmp(kept[i].all.data(), first[i].all.data(), sizeof(float) * kept[i].all.size()) != 0) {
        fail("output ", i, " is not the same as under the order ", emulation::kOrders[0]);
        break;
      }
    if (failures) break;
  }
  std::printf("%s\n", failures ? "wrong" : "right");
  return failures != 0;
}
