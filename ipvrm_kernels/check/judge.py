"""How a result is judged: every number against fp64, with the error allowed and what was found beside it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor


class Finding(NamedTuple):
    what: str
    error: float  # the largest; inf where one number is NaN
    allowed: float

    @property
    def share(self) -> float:
        """Of the error that is allowed; above 1 is wrong."""
        return self.error / self.allowed if self.allowed else math.inf if self.error else 0.0

    def __str__(self) -> str:
        return f"{self.what}: error {self.error:.1e}, allowed {self.allowed:.1e}"


class Judge:
    """Collects findings about one op."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []

    def within(self, what: str, got: Tensor, expected: Tensor, allowed: float) -> None:
        """Every number within `allowed`; equal infinities have no error."""
        got, expected = got.detach().double(), expected.double().to(got.device)
        self._add(what, (got - expected).masked_fill(got == expected, 0).abs().max(), allowed)

    def rows_within(self, what: str, got: Tensor, expected: Tensor, allowed: float, floor: Tensor) -> None:
        """(R, D) each row within `allowed` times its largest number, so that small ones count; or floor."""
        error = (got.detach().double() - expected).abs().amax(1)
        scale = expected.abs().amax(1) + floor / allowed
        self._add(what, (error / scale.clamp(min=1e-30)).max(), allowed)

    def equal(self, what: str, got: Tensor, expected: Tensor) -> None:
        """No bit differs."""
        self._add(what, (got.detach() != expected.detach()).sum(), 0.0)

    def _add(self, what: str, error: Tensor, allowed: float) -> None:
        number = float(error)
        self.findings.append(Finding(what, math.inf if math.isnan(number) else number, allowed))


class Result(NamedTuple):
    """One implementation of one op on one device in one dtype."""

    op: str
    impl: str
    device: str
    dtype: str
    findings: list[Finding]
    failure: str = ""  # what it raised
    times: dict[str, float] = {}  # in matmuls of the same shape; a sequence op, which has none, is not timed

    @property
    def right(self) -> bool:
        return not self.failure and all(finding.share <= 1 for finding in self.findings)

    @property
    def worst(self) -> Finding:
        """The finding that takes most of the error allowed to it."""
        return max(self.findings, key=lambda finding: finding.share)

    @property
    def reason(self) -> str:
        """What is wrong, or nearest to it."""
        return self.failure or str(self.worst)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity."""
        worst = None if self.failure else self.worst._asdict()
        if worst and math.isinf(worst["error"]):
            worst["error"] = None
        return dict(
            op=self.op, impl=self.impl, device=self.device, dtype=self.dtype, right=self.right,
            failure=self.failure, worst=worst, times=self.times,
        )  # fmt: skip
