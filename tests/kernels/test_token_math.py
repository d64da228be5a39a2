"""csrc/token_math.h alone: no undefined behaviour for any bits of a float, and its accuracy."""

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
FLAGS = [
    "-std=c++17", "-O1", "-g0", f"-I{CSRC}", "-fno-math-errno", "-fno-trapping-math",
    "-fsanitize=undefined,float-cast-overflow", "-fno-sanitize=float-divide-by-zero",
    "-fno-sanitize-recover=all",
]  # fmt: skip
PROGRAM = r"""
#include <cstdio>
#include <initializer_list>
#include "token_math.h"
using namespace ipvrm;

bool fine = true;
void close(const char* what, float x, float got, double want) {  // 3 ulp, and 1 ulp of a denormal
  const bool same = got == want || std::fabs(got - want) <= 1.8e-7 * std::fabs(want) + 1.5e-45;
  if ((std::isnan(x) ? !std::isnan(got) : !same) && fine) {
    std::printf("%s(%a) = %a, not %a\n", what, x, got, want);
    fine = false;
  }
}

int main() {
  float sum = 0;
  for (uint64_t b = 0; b <= 0xFFFFFFFFull; b += 4093) {  // every sign and exponent; NaN and inf among them
    const uint32_t bits = static_cast<uint32_t>(b);
    float x;
    memcpy(&x, &bits, sizeof x);
    const double e = std::exp(static_cast<double>(x));
    close("exp_any", x, exp_any(x), e > 3.4028235677973366e38 ? INFINITY : e);
    if (!(x > 0)) close("exp_nonpositive", x, exp_nonpositive(x), x < -87.68f ? 0 : e);
    if (!(std::fabs(x) > 87)) {
      close("exp_negative_abs", x, exp_negative_abs(x), std::exp(-std::fabs(static_cast<double>(x))));
    }
    for (float y : {0.0f, -1.0f, 3.0f, INFINITY, -INFINITY, NAN, x}) {
      sum += exp_negative_abs(x) + sigmoid(x) + normal_prob(x) + tanh_rational(x) + prefix_value(x, y).prob;
      sum += dense_dz(x, y) + dense_dz(x, y, y, x);
      const Surrogate s = clipped_surrogate(x, y, y, {0.8f, 1.28f, 3.0f});
      const ObjectiveTerm t = objective_term(y, x, x, y, 0.5f, {0.8f, 1.28f, INFINITY});
      const MarginLoss m = margin_loss(x, 1.0f, y);
      sum += s.loss + s.derivative + t.loss + t.derivative + t.kl + m.loss + m.derivative;
    }
  }
  std::printf("%s %d\n", fine ? "ok" : "wrong", std::isnan(sum));
  return fine ? 0 : 1;
}
"""


@pytest.mark.slow
def test_any_float_is_defined_and_accurate(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    probe = [compiler, *FLAGS, "-x", "c++", "-", "-o", str(tmp_path / "probe")]
    if subprocess.run(probe, input="int main() {}", text=True, capture_output=True).returncode:
        pytest.skip("this compiler has no sanitizers")
    (tmp_path / "all.cpp").write_text(PROGRAM)
    program = str(tmp_path / "program")
    built = subprocess.run(
        [compiler, *FLAGS, str(tmp_path / "all.cpp"), "-o", program], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([program], capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0 and ran.stdout.startswith("ok"), ran.stdout + ran.stderr
