"""distrl_loss against Python floats, element by element; blocks of rows; a million terms; its contract."""

import math

import pytest
import torch
from oracles import edges, surrogate

from ipvrm_kernels import backend, linear_distrl_loss, linear_logprobs
from ipvrm_kernels.distrl_loss import (
    CANDIDATE_REDUCTIONS,
    DISTRL_METRICS,
    EVALUATE,
    REDUCTIONS,
    Divisors,
    LossInputs,
    Objective,
    batch_divisors,
    distrl_loss,
)

OP = "distrl_loss"
CLIPS = (0.2, 0.28, 0.1, 0.15)
LOG_TINY = math.log(2.0**-126)  # a pi_old below the smallest normal fp32 number counts as 0


def case(lengths=(5, 0, 1, 9, 3), K=4, seed=0, drift=0.5):
    """(logprobs, batch) with each kind of unused element and every extreme of a used one."""
    g = torch.Generator().manual_seed(seed)
    N = sum(lengths)
    old = -3 * torch.rand(N, 1 + K, generator=g)
    new = (old + drift * torch.randn(N, 1 + K, generator=g)).clamp(max=0)
    advantages = torch.randn(N, 1 + K, generator=g)
    ids = torch.randint(0, 99, (N, 1 + K), generator=g)
    flat = ids.view(-1), old.view(-1), new.view(-1), advantages.view(-1)
    kinds = torch.randint(0, 16, (ids.numel(),), generator=g)
    for kind, changes in enumerate(
        (
            (-1, None, math.nan, math.nan),  # unused, though its old log-prob is finite
            (-1, -math.inf, None, None),
            (None, -math.inf, math.inf, math.nan),
            (-1, math.nan, None, None),
            (None, None, None, 0.0),  # says nothing, but counts
            (None, -200.0, 0.0, 1.0),  # pi_old underflows, rho overflows: clipped
            (None, None, -math.inf, -1.0),  # rho = 0; its KL is infinite
        )
    ):
        for x, value in zip(flat, changes, strict=True):
            if value is not None:
                x[kinds == kind] = value
    cu_seqlens = edges(lengths)
    old = old.masked_fill(ids < 0, -math.inf)
    parts = [(x[:, 0].contiguous(), x[:, 1:].contiguous()) for x in (old, advantages)]
    return new, LossInputs(*parts[0], *parts[1], cu_seqlens, None, None)


def oracle(logprobs, batch, objective):
    """(loss, token_loss, candidate_loss, metrics, dlogprobs) of a whole batch."""
    N, columns = logprobs.shape
    edges = batch.cu_seqlens.tolist()
    T = [last - first for first, last in zip(edges, edges[1:], strict=False) for _ in range(last - first)]
    olds = torch.cat([batch.old_logprobs[:, None], batch.old_candidate_logprobs], 1)
    probs = torch.where(olds < LOG_TINY, 0.0, olds.exp()).double().tolist()
    advantages = torch.cat([batch.advantages[:, None], batch.candidate_advantages], 1).tolist()
    used = [(n, k) for n in range(N) for k in range(columns) if olds[n, k] != -math.inf]
    mass = sum(probs[n][k] for n, k in used if k)
    totals = {"sequence_mean": len(edges) - 1, "token_mean": N, "old_prob_mean": mass}
    divisors = []
    for kind, given in zip(objective[3:], batch[5:], strict=True):
        divisors.append(totals[kind] if given is None else float(given))
    losses, metrics = [0.0, 0.0], [[0.0, 0.0] for _ in DISTRL_METRICS]
    dlogprobs = torch.zeros(N, columns, dtype=torch.float64)
    for n, k in used:
        b = int(k > 0)  # the branch
        clips = objective.clips[2 * b : 2 * b + 2]
        new, old, prob = logprobs[n, k].item(), olds[n, k].item(), probs[n][k] if k else 1.0
        loss, derivative, clipped, dual = surrogate(new, old, advantages[n][k], *clips, objective.dual_clip)
        weight = prob / divisors[b] / (T[n] if objective[3 + b] == "sequence_mean" else 1)
        if weight > 0:
            losses[b] += weight * loss
            dlogprobs[n, k] = (objective.alpha if k else 1.0) * weight * derivative
        for i, x in enumerate((clipped, dual, prob * (old - new) if prob > 0 else 0.0)):
            metrics[3 * b + i][0] += x
            metrics[3 * b + i][1] += 1
    metrics[6][:] = [sum(k > 0 for _, k in used), N]
    metrics[7][:] = [mass, N]
    values = (losses[0] + objective.alpha * losses[1], *losses, metrics)
    return *(torch.tensor(x, dtype=torch.float64) for x in values), dlogprobs


def evaluate(impl, device, logprobs, batch, objective, rows=None):
    """The implementation's result on the CPU in fp64, of all rows or of rows[0] .. rows[1]."""
    moved = LossInputs._make(x.to(device) if isinstance(x, torch.Tensor) else x for x in batch)
    divisors = batch_divisors(moved, objective)
    r0, r1 = rows or (0, len(logprobs))
    out = EVALUATE[impl](logprobs[r0:r1].contiguous().to(device), moved.rows(r0, r1), objective, divisors, r0)
    assert all(x.dtype == torch.float32 and x.is_contiguous() for x in out)
    return [x.cpu().double() for x in out]


def check(impl, device, logprobs, batch, objective):
    for mine, truth in zip(
        evaluate(impl, device, logprobs, batch, objective), oracle(logprobs, batch, objective), strict=True
    ):
        torch.testing.assert_close(mine, truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("candidate_reduction", CANDIDATE_REDUCTIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("given", [False, True], ids=["computed", "given"])
def test_every_kind_of_element(impl, device, reduction, candidate_reduction, dual_clip, given, poisoned):
    logprobs, batch = case((15, 0, 1, 19, 8), drift=1.0)
    if given:
        batch = batch._replace(
            token_denominator=torch.tensor(7.0), candidate_denominator=torch.tensor(2.5)
        )  # fmt: skip
    objective = Objective(0.3, CLIPS, dual_clip, reduction, candidate_reduction)
    check(impl, device, logprobs, batch, objective)
    clipped, dual, _, candidate_clipped, candidate_dual, *_ = oracle(logprobs, batch, objective)[3][:, 0]
    assert clipped > 0 and candidate_clipped > 0  # or the comparison would prove little
    assert (dual > 0) == (candidate_dual > 0) == (dual_clip is not None)


@pytest.mark.parametrize("K", [0, 1, 10])
@pytest.mark.parametrize(
    "lengths", [(), (0,), (0, 0, 1), (1,), (300, 0, 700), (2,) * 300], ids=lambda x: str(x)[:20]
)
def test_shapes(impl, device, lengths, K):
    logprobs, batch = case(lengths, K)
    for reductions in (("sequence_mean", "sequence_mean"), ("token_mean", "old_prob_mean")):
        check(impl, device, logprobs, batch, Objective(0.3, CLIPS, 3.0, *reductions))


@pytest.mark.parametrize("reductions", [("sequence_mean", "sequence_mean"), ("token_mean", "old_prob_mean")])
def test_blocks_of_rows_add_up(impl, device, reductions):
    """Edges inside sequences; the factors are those of the whole batch."""
    logprobs, batch = case((5, 0, 40, 1, 9))
    objective = Objective(0.3, CLIPS, 1.5, *reductions)
    whole = evaluate(impl, device, logprobs, batch, objective)
    edges = (0, 3, 5, 5, 17, 55)
    blocks = [
        evaluate(impl, device, logprobs, batch, objective, rows)
        for rows in zip(edges, edges[1:], strict=False)
    ]
    for i, truth in enumerate(whole):
        parts = [block[i] for block in blocks]
        torch.testing.assert_close(torch.cat(parts) if i == 4 else sum(parts), truth, rtol=1e-5, atol=1e-6)


def extreme(old, new=0.0, advantage=-1.0):
    """Three rows of two sequences, two candidates each, with one extreme candidate and one unused slot."""
    olds = torch.tensor([[-1.0, -0.5, -0.7], [-2.0, old, -1.5], [-0.3, -0.2, -math.inf]])
    news = torch.tensor([[-1.1, -0.6, -0.7], [-1.9, new, -1.5], [-0.3, -0.4, -0.1]])
    advantages = torch.tensor([[1.0, -0.5, 2.0], [-1.0, advantage, 1.0], [0.5, -2.0, math.nan]])
    parts = [(x[:, 0].contiguous(), x[:, 1:].contiguous()) for x in (olds, advantages)]
    return news, LossInputs(*parts[0], *parts[1], torch.tensor([0, 2, 3]).int(), None, None)


@pytest.mark.parametrize("candidate_reduction", CANDIDATE_REDUCTIONS)
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
@pytest.mark.parametrize("new", [0.0, -1e-4, -90.0, -math.inf])
@pytest.mark.parametrize("old", [-87.0, -90.0, -95.0, -103.0, -200.0])
def test_a_tiny_old_probability(impl, device, old, new, advantage, candidate_reduction):
    """From -87.34 on pi_old is denormal, then 0, while rho = exp(new - old) overflows: no inf, no NaN."""
    logprobs, batch = extreme(old, new, advantage)
    objective = Objective(0.3, CLIPS, None, "token_mean", candidate_reduction)
    got, truth = evaluate(impl, device, logprobs, batch, objective), oracle(logprobs, batch, objective)
    for mine, theirs in zip(got, truth, strict=True):
        # 5e-5: one ulp of exp's argument at 87 is 7.6e-6
        torch.testing.assert_close(mine, theirs, rtol=5e-5, atol=1e-6)
    assert all(x.isfinite().all() for x in (*got[:3], got[4]))
    if new == 0 and advantage < 0:  # unclipped: a gradient of pi_old * rho = 1, or none at all
        assert (got[4][1, 1] == 0) == (old < LOG_TINY)


@pytest.mark.parametrize("candidate_reduction", CANDIDATE_REDUCTIONS)
@pytest.mark.parametrize("place", ["old", "new", "advantage", "token old", "denominator"])
def test_nan_is_not_hidden(impl, device, place, candidate_reduction):
    logprobs, batch = extreme(
        math.nan if place == "old" else -1.0,
        math.nan if place == "new" else -1.0,
        math.nan if place == "advantage" else -1.0,
    )
    if place == "token old":
        batch.old_logprobs[1] = math.nan
    if place == "denominator":
        batch = batch._replace(candidate_denominator=torch.tensor(math.nan))
    objective = Objective(0.3, CLIPS, 1.5, "sequence_mean", candidate_reduction)
    loss, token_loss, candidate_loss, metrics, dlogprobs = evaluate(impl, device, logprobs, batch, objective)
    assert loss.isnan() and (token_loss if place == "token old" else candidate_loss).isnan()
    assert (candidate_loss if place == "token old" else token_loss).isfinite()
    row, column = (1, 0) if place == "token old" else (1, 1)
    assert dlogprobs[row, column].isnan() and dlogprobs[2, 2] == 0  # the unused slot stays out
    assert metrics[[0, 1, 3, 4, 6], :].isfinite().all() and metrics[:, 1].isfinite().all()


@pytest.mark.slow
def test_a_million_elements_keep_fp32_accuracy(impl, device):
    """Every sum to a few eps of the sum of its terms' sizes, and the same bits whatever the thread count."""
    if backend.INTERPRETED:
        pytest.skip("a million elements are the native kernels' matter")
    lengths = (40_000, 1, 59_999)
    g = torch.Generator().manual_seed(0)
    old = -3 * torch.rand(100_000, 11, generator=g)
    new = (old + 0.3 * torch.randn(old.shape, generator=g)).clamp(max=0)
    advantages = torch.randn(old.shape, generator=g)
    old = torch.where(torch.rand(old.shape, generator=g) < 0.9, old, -math.inf)
    parts = [(x[:, 0].contiguous(), x[:, 1:].contiguous()) for x in (old, advantages)]
    cu_seqlens = edges(lengths)
    batch = LossInputs(*parts[0], *parts[1], cu_seqlens, None, None)
    objective = Objective(0.3, CLIPS, 1.5, "token_mean", "old_prob_mean")
    wide = LossInputs._make(x.double() if x is not None and x.is_floating_point() else x for x in batch)
    truth = EVALUATE["torch"](new.double(), wide, objective, batch_divisors(wide, objective))
    mine = evaluate(impl, device, new, batch, objective)
    positive = wide._replace(
        advantages=wide.advantages.abs(), candidate_advantages=wide.candidate_advantages.abs()
    )
    sizes = EVALUATE["torch"](new.double(), positive, objective, batch_divisors(positive, objective))
    eps = torch.finfo(torch.float32).eps
    for i in range(3):
        assert abs(mine[i] - truth[i]) <= 4 * eps * sizes[i].abs()
    counts = [0, 1, 3, 4, 6]  # clipped elements: a rho within rounding of the clip may fall on either side
    assert ((mine[3] - truth[3])[counts].abs() <= 20).all()
    torch.testing.assert_close(mine[3][[2, 5, 7]], truth[3][[2, 5, 7]], rtol=1e-5, atol=0)
    if impl == "cpp":
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(3 - min(threads, 2))
            again = evaluate(impl, device, new, batch, objective)
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(x, y) for x, y in zip(mine, again, strict=True))


@pytest.mark.parametrize(
    "fault", ["row0 ignored", "a candidate's alpha", "unused slots counted", "B of a block"]
)
def test_seeded_faults_are_caught(impl, device, fault, monkeypatch):
    real = EVALUATE[impl]

    def faulty(logprobs, batch, objective, divisors, row0=0):
        if fault == "row0 ignored":
            row0 = 0
        if fault == "a candidate's alpha":
            objective = objective._replace(alpha=1.0)
        if fault == "unused slots counted":
            batch = batch._replace(old_candidate_logprobs=batch.old_candidate_logprobs.clamp(min=-1))
        if fault == "B of a block":
            divisors = Divisors(1.0, 1.0)
        return real(logprobs, batch, objective, divisors, row0)

    def both():
        test_blocks_of_rows_add_up(impl, device, ("sequence_mean", "sequence_mean"))
        test_every_kind_of_element(impl, device, "sequence_mean", "sequence_mean", 1.5, False, None)

    both()
    monkeypatch.setitem(EVALUATE, impl, faulty)
    with pytest.raises(AssertionError):
        both()


# ------------------------------------------------------------------------------------------------ the op


def arguments(dtype=torch.float32, lengths=(5, 0, 1, 9, 3), device="cpu"):
    """What the public function takes, new log-probs with gradient."""
    new, batch = case(lengths)
    new = new.nan_to_num(nan=-1.0, posinf=0.0, neginf=-2.0)  # finite, so that a gradient can be compared
    old = [x.nan_to_num(nan=-1.0, neginf=-math.inf) for x in batch[:2]]
    of_tokens, of_candidates = (x.to(device, dtype).requires_grad_() for x in (new[:, 0], new[:, 1:]))
    advantages = [x.nan_to_num(nan=1.0) for x in batch[2:4]]
    rest = [x.to(device, dtype) for x in (*old, *advantages)]
    return of_tokens, of_candidates, *rest, batch.cu_seqlens.to(device)


OPTIONS = {
    "alpha": 0.3, "clip_low": 0.2, "clip_high": 0.28, "candidate_clip_low": 0.1, "candidate_clip_high": 0.15,
    "dual_clip": 1.5,
}  # fmt: skip


@pytest.mark.parametrize("candidate_reduction", CANDIDATE_REDUCTIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_op_and_its_gradients(impl, device, reduction, candidate_reduction):
    given = arguments(device=device)
    found = distrl_loss(
        *given, **OPTIONS, reduction=reduction, candidate_reduction=candidate_reduction, impl=impl
    )
    gradients = torch.autograd.grad(found.loss * 3.0, given[:2])
    columns = torch.cat([given[0][:, None], given[1]], 1).detach().cpu()
    batch = LossInputs(*(x.cpu() for x in given[2:]), None, None)
    objective = Objective(0.3, CLIPS, 1.5, reduction, candidate_reduction)
    loss, token_loss, candidate_loss, metrics, dlogprobs = oracle(columns, batch, objective)
    mine = torch.cat([gradients[0][:, None], gradients[1]], 1).cpu().double()
    torch.testing.assert_close(mine, 3 * dlogprobs, rtol=1e-5, atol=1e-6)
    for value, truth in zip(found[:3], (loss, token_loss, candidate_loss), strict=True):
        torch.testing.assert_close(value.detach().cpu().double(), truth, rtol=1e-5, atol=1e-6)
    for i, name in enumerate(DISTRL_METRICS):
        pair = torch.stack(found.metrics[name]).cpu().double()
        torch.testing.assert_close(pair, metrics[i], rtol=1e-5, atol=1e-6)
    assert not found.token_loss.requires_grad and not found.candidate_loss.requires_grad


def test_the_op_is_linear_distrl_loss_behind_the_head(impl, device):
    """The same losses, metrics and gradients by hidden and weight, a negative id and its -inf included."""
    g = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(18, 8, generator=g), torch.randn(40, 8, generator=g)
    ids = torch.randint(-1, 40, (18, 5), generator=g).to(device)
    hidden, weight = (x.to(device).requires_grad_() for x in (hidden, weight))
    _, _, *rest = arguments(device=device)
    rest[0], rest[1] = (
        x.masked_fill(i < 0, -math.inf) for x, i in zip(rest, (ids[:, 0], ids[:, 1:]), strict=False)
    )
    logprobs = linear_logprobs(hidden, weight, ids, impl=impl).logprobs
    ours = distrl_loss(logprobs[:, 0], logprobs[:, 1:], *rest, **OPTIONS, impl=impl)
    whole = linear_distrl_loss(hidden, weight, ids[:, 0], ids[:, 1:], *rest, **OPTIONS, impl=impl)
    for a, b in zip((*ours[:3], *map(torch.stack, ours.metrics.values())),
                    (*whole[:3], *map(torch.stack, whole.metrics.values())), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for x in (hidden, weight):
        mine, theirs = (torch.autograd.grad(loss.loss, x, retain_graph=True)[0] for loss in (ours, whole))
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def owners_lengths(cu_seqlens, N):
    """(N,) fp64 tokens of the sequence that owns each row, by a search among the three edges."""
    cu = cu_seqlens.tolist()
    owner = [1 if cu[1] <= row else 0 for row in range(N)]
    return torch.tensor([cu[b + 1] - cu[b] for b in owner], dtype=torch.float64)


def test_unchecked_edges_stay_in_bounds(impl, device, unchecked):
    """On a GPU nobody checks the edges: each row's weight is what they say, also beyond int32."""
    buffers, tokens, cu, _, guard = unchecked
    N, alpha = len(tokens), 0.1
    new = torch.ones(N, 2, device=device, requires_grad=True)
    others = tokens[:, None]
    out = distrl_loss(new[:, 0], new[:, 1:], tokens, others, tokens, others, cu, alpha=alpha, impl=impl)
    (gradient,) = torch.autograd.grad(out.loss, new)
    shares = -1 / (2 * owners_lengths(cu, N))  # rho = 1, advantage 1, two sequences
    expected = torch.stack([shares, alpha * math.e * shares], 1)
    assert abs(out.loss.item() / expected.sum().item() - 1) <= 1e-6
    torch.testing.assert_close(gradient.double().cpu(), expected, rtol=1e-6, atol=0)
    assert buffers
    for buffer in buffers:
        assert (buffer[:guard] == 7).all() and (buffer[-guard:] == 7).all()


def test_gradcheck():
    of_tokens, of_candidates, *rest = arguments(torch.float64, (3, 4))

    def loss(*logprobs):
        return distrl_loss(*logprobs, *rest, alpha=0.3, clip_low=0.9, clip_high=9.0, impl="torch").loss

    assert torch.autograd.gradcheck(loss, (of_tokens, of_candidates))


@pytest.mark.slow
def test_opcheck(impl, device):
    of_tokens, of_candidates, *rest = arguments(device=device)
    columns = torch.cat([of_tokens[:, None], of_candidates], 1).detach().requires_grad_()
    numbers = [x for number in (0.3, *CLIPS, 1.5) for x in (number, None)]
    options = (*numbers, "sequence_mean", "old_prob_mean", impl)
    torch.library.opcheck(torch.ops.ipvrm.distrl_loss.default, (columns, *rest, None, None, *options))


def test_compile(impl, device):
    given = arguments(device=device)

    def run(of_tokens, of_candidates):
        return distrl_loss(of_tokens, of_candidates, *given[2:], **OPTIONS, impl=impl).loss

    eager = torch.autograd.grad(run(*given[:2]), given[:2])
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(torch.autograd.grad(compiled(*given[:2]), given[:2]), eager, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_nothing_to_learn_from(impl, device):
    given = arguments(lengths=(), device=device)
    found = distrl_loss(*given, impl=impl)
    assert found.loss.item() == 0
    assert [x.shape for x in torch.autograd.grad(found.loss, given[:2])] == [(0,), (0, 4)]


FLAT = r"logprobs must be \(N,\) and candidate_logprobs \(N, K\), got "


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs": torch.zeros(18, 1)}, FLAT + r"\(18, 1\)"),
        ({"candidate_logprobs": torch.zeros(17, 4)}, r"got \(18,\) and \(17, 4\)"),
        ({"logprobs": torch.zeros(18).long()}, "logprobs must be floating point on one device"),
        ({"old_logprobs": torch.zeros(17)}, r"old_logprobs must be .* of shape \(18,\), got \(17,\)"),
        ({"cu_seqlens": torch.tensor([0, 17], dtype=torch.int32)}, "cu_seqlens must rise from 0 to N|to N"),
        ({"alpha": math.nan}, "alpha must be finite, got nan"),
        ({"reduction": "mean"}, "reduction must be one of sequence_mean, token_mean, got 'mean'"),
        ({"candidate_reduction": "mean"}, "candidate_reduction must be None or one of"),
        ({"token_denominator": 0.0}, "token_denominator must be finite and > 0, got 0.0"),
        ({"candidate_denominator": 0.0}, "candidate_denominator must be > 0 where there are candidates"),
        ({"candidate_denominator": torch.ones(1)}, "candidate_denominator must be a number or 0-d"),
        ({"impl": "cuda"}, "impl='cuda' does not exist for this op"),
    ],
)  # fmt: skip
def test_errors(change, message):
    names = ("logprobs", "candidate_logprobs", "old_logprobs", "old_candidate_logprobs", "advantages",
             "candidate_advantages", "cu_seqlens")  # fmt: skip
    with pytest.raises(ValueError, match="distrl_loss: .*" + message):
        distrl_loss(**dict(zip(names, arguments(), strict=True)) | change)
