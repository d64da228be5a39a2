"""`python -m ipvrm_kernels`: what is right passes, a seeded fault of each op is caught; words, exit codes."""

import json
import os
import subprocess
import sys

import pytest
import torch

import ipvrm_kernels
from ipvrm_kernels import backend, check
from ipvrm_kernels.check import Head, heads, judge, sequences

HEAD = Head(48, 1003)
NATIVE = pytest.mark.skipif(not backend.HAS_CPP, reason="faults are seeded into what the C++ ops return")


@pytest.fixture(scope="module")
def given():
    batch = heads.draw(HEAD, 64, "cpu", torch.float32)
    return batch, heads.Exact(batch)


def of_head(op, given, impl="cpp"):
    found = judge.Judge()
    batch, exact = given
    heads.CHECKS[op](found, batch, exact.of(impl), impl)
    return check.Result(op, impl, "cpu", "fp32", found.findings)


def of_sequences(op, impl="cpp"):
    found = judge.Judge()
    sequences.CHECKS[op](found, sequences.draw("cpu"), impl)
    return check.Result(op, impl, "cpu", "fp32", found.findings)


def test_every_op_is_checked():
    assert {*heads.CHECKS, *sequences.CHECKS} == set(ipvrm_kernels.OPS)


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_right_passes(dtype, softcap):
    batch = heads.draw(HEAD._replace(softcap=softcap), 64, "cpu", dtype)
    exact = heads.Exact(batch)
    assert 0.4 < exact.candidates[:, 0].unique().numel() / 64 < 0.7  # half of the rows are peaked
    for op in heads.CHECKS:
        for impl in check.runnable(op, "cpu"):
            result = of_head(op, (batch, exact), impl)
            assert result.right, f"{op} {impl}: {result.reason}"


def test_the_expected_values_are_those_of_full_logits(given):
    batch, exact = given
    hidden, weight = (x.double().requires_grad_() for x in (batch.hidden, batch.weight))
    log_p = torch.log_softmax(hidden @ weight.T, 1)
    used = batch.ids >= 0
    picked = log_p.gather(1, batch.ids.clamp(min=0))
    entropy = -(log_p.exp() * log_p).sum(1)
    torch.testing.assert_close(exact.logprobs[used], picked[used].detach())
    torch.testing.assert_close(exact.entropy, entropy.detach())
    total = (batch.upstream * picked.masked_fill(~used, 0)).sum() + (batch.entropy_upstream * entropy).sum()
    dhidden, dweight = torch.autograd.grad(total, (hidden, weight))
    torch.testing.assert_close(exact.gradients["logprobs"].hidden, dhidden)
    torch.testing.assert_close(exact.gradients["logprobs"].weight, dweight[exact.tokens])
    assert exact.candidates.tolist() == (log_p.exp() >= heads.MIN_PROB).nonzero().tolist()
    assert exact.tokens.diff().max() <= heads.VOCABULARY_STEP  # no tile of 32 columns is left out


def test_the_reference_alone_may_be_as_far_off_as_log_softmax(given):
    exact = given[1]
    assert exact.of("cpp") is exact and exact.reference_error > 0
    assert exact.of("torch").allowed == exact.allowed + 2 * exact.reference_error
    assert exact.of("torch").entropy_allowed > exact.entropy_allowed and exact.of("torch").lse is exact.lse


@pytest.mark.parametrize("op", sequences.CHECKS)
def test_sequences_that_are_right_pass(op):
    for impl in check.runnable(op, "cpu"):
        result = of_sequences(op, impl)
        assert result.right, f"{impl}: {result.reason}"


def column_tile(weight, start=256, size=128):
    """As if the tile of these columns held logits of zero."""
    wrong = weight.detach().clone()
    wrong[start : start + size] = 0
    return wrong


SEEDED = {  # (op, field of the result): what a fault makes of it
    ("linear_logprobs", "logprobs"): lambda x: x + 1e-4 * (x > -8),
    ("linear_logprobs", "lse"): lambda x: x * (1 + 1e-4),
    ("linear_logprobs", "entropy"): lambda x: x.index_fill(0, torch.tensor([9]), 0.0),
    ("linear_candidates", "ids"): lambda x: x.roll(1, 0),
    ("linear_candidates", "logprobs"): lambda x: x - 1e-3,
    ("linear_candidates", "lse"): lambda x: x.index_fill(0, torch.tensor([63]), float("nan")),
    ("linear_candidates", "sampled_logprobs"): lambda x: x.bfloat16().float(),
    ("linear_candidates", "counts"): lambda x: x + 1,
    ("linear_distrl_loss", "loss"): lambda x: x * 1.001,
    ("linear_logprobs_partial", "sumexp"): lambda x: x * 1.0001,
    ("linear_logprobs_partial", "sum_z_exp"): lambda x: x * 1.001,
    ("linear_logprobs_partial", "id_logits"): lambda x: x + 1e-4,
}


@NATIVE
@pytest.mark.parametrize(("op", "field"), SEEDED, ids=[f"{op}-{field}" for op, field in SEEDED])
def test_a_seeded_fault_of_a_head_op_is_caught(op, field, given, monkeypatch):
    right = getattr(ipvrm_kernels, op)

    def faulty(*arguments, **options):
        out = right(*arguments, **options)
        return out._replace(**{field: SEEDED[op, field](getattr(out, field))})

    assert of_head(op, given).right
    monkeypatch.setattr(ipvrm_kernels, op, faulty)
    result = of_head(op, given)
    assert not result.right and result.worst.share > 1


@NATIVE
@pytest.mark.parametrize("op", ["linear_logprobs", "linear_logprobs_partial", "linear_distrl_loss"])
@pytest.mark.parametrize("fault", ["hidden", "weight", "a tile of weight", "a row of weight"])
def test_a_seeded_fault_of_a_gradient_is_caught(op, fault, given, monkeypatch):
    plain = torch.autograd.grad

    def faulty(outputs, inputs, *rest):
        gradients = list(plain(outputs, inputs, *rest))
        if len(gradients) == 2 and gradients[1].shape == given[0].weight.shape:
            at = 0 if fault == "hidden" else 1
            rows = {"a tile of weight": slice(512, 576), "a row of weight": given[1].tokens[20]}.get(fault)
            gradients[at] = gradients[at].clone()
            if rows is None:
                gradients[at] *= 1.001
            else:
                gradients[at][rows] *= 0.99
        return tuple(gradients)

    monkeypatch.setattr(torch.autograd, "grad", faulty)
    result = of_head(op, given)
    assert (
        not result.right and result.worst.what == f"gradient of {'hidden' if fault == 'hidden' else 'weight'}"
    )


@NATIVE
def test_a_wrong_tile_and_a_row_that_depends_on_its_place_are_caught(given, monkeypatch):
    right = ipvrm_kernels.linear_logprobs

    def wrong_tile(hidden, weight, *rest, **options):
        return right(
            hidden, column_tile(weight).requires_grad_(weight.requires_grad) + 0 * weight, *rest, **options
        )

    monkeypatch.setattr(ipvrm_kernels, "linear_logprobs", wrong_tile)
    assert not of_head("linear_logprobs", given).right

    def by_place(hidden, *rest, **options):
        out = right(hidden, *rest, **options)
        return out._replace(lse=torch.nextafter(out.lse, out.lse + torch.arange(len(hidden)) % 2))

    monkeypatch.setattr(ipvrm_kernels, "linear_logprobs", by_place)
    result = of_head("linear_logprobs", given)
    assert result.worst.what == "lse of rows in another order" and not result.right


CARRIES = {
    "segment_scan": lambda out: out.clone().index_fill_(0, torch.tensor([3000]), 0.0),
    "prefix_values": lambda out: out._replace(mean_value=out.mean_value * (1 + 1e-4)),
    "prefix_value_loss": lambda out: out * (1 + 1e-5),
    "clipped_surrogate": lambda out: out._replace(loss=out.loss.index_fill(0, torch.tensor([5734]), 1.0)),
    "distrl_loss": lambda out: out._replace(loss=out.loss * (1 + 1e-4)),
}


@NATIVE
@pytest.mark.parametrize("op", sequences.CHECKS)
def test_a_seeded_fault_of_a_sequence_op_is_caught(op, monkeypatch):
    right = getattr(ipvrm_kernels, op)
    monkeypatch.setattr(ipvrm_kernels, op, lambda *a, **k: CARRIES[op](right(*a, **k)))
    assert not of_sequences(op).right


def test_a_nan_is_wrong():
    found = judge.Judge()
    found.within("x", torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 1.0]), 1e9)
    found.within("y", torch.tensor([-float("inf")]), torch.tensor([-float("inf")]), 0.0)
    assert found.findings[0].share > 1 and found.findings[1].share == 0.0
    result = check.Result("op", "cpp", "cpu", "fp32", found.findings)
    assert (
        not result.right
        and json.loads(json.dumps(result.as_dict(), allow_nan=False))["worst"]["error"] is None
    )


@NATIVE
def test_the_verdicts_say_how_to_do_without_an_op(monkeypatch, capsys):
    def broken(*arguments, impl=None, **options):
        if impl == "cpp":
            raise RuntimeError("no kernel\n image")
        return plain(*arguments, impl=impl, **options)

    plain = ipvrm_kernels.linear_candidates
    monkeypatch.setattr(ipvrm_kernels, "linear_candidates", broken)
    monkeypatch.setattr(check, "ROWS", 32)
    assert check.main(["--shape", "16,99", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("linear_candidates: ")]
    assert "WRONG with cpp on cpu in fp32: RuntimeError: no kernel image" in line
    assert "Switch it off: impl='torch' in the call, or IPVRM_WITHOUT=linear_candidates:cpp in" in line
    assert "segment_scan: right with cpp (cpu), torch (cpu)" in out and "NOT all right" in out
    assert "not checked: vocab_parallel_candidates, vocab_parallel_logprobs, which need a process" in out
    assert "No other implementation" in check.switch_off("segment_scan", "cpu", ["cpp", "torch"])


def test_json_is_one_line_of_stdout(monkeypatch, capsys):
    monkeypatch.setattr(check, "ROWS", 32)
    assert check.main(["--shape", "16,99", "--device", "cpu", "--json"]) == 0
    captured = capsys.readouterr()
    (line,) = captured.out.splitlines()
    content = json.loads(line)
    assert content["right"] and content["head"] == dict(D=16, V=99, softcap=None)
    assert {result["op"] for result in content["results"]} == set(ipvrm_kernels.OPS)
    if backend.HAS_CPP:
        times = {
            r["op"]: r["times"] for r in content["results"] if (r["impl"], r["dtype"]) == ("cpp", "fp32")
        }
        assert times["linear_distrl_loss"]["forward + backward"] > 0
        for op in ("linear_logprobs", "linear_logprobs_partial", "linear_candidates"):
            assert times[op]["forward"] > 0
        assert not any(times[op] for op in sequences.CHECKS)
    assert "all right" not in captured.out and "linear_logprobs" in captured.err


def test_the_head_of_a_model_is_in_its_config(tmp_path, capsys):
    sizes = dict(hidden_size=16, vocab_size=99)
    (tmp_path / "config.json").write_text(json.dumps(sizes | dict(final_logit_softcapping=30.0)))
    assert check.head_of_config(str(tmp_path)) == Head(16, 99, 30.0)
    (tmp_path / "config.json").write_text(json.dumps(dict(text_config=sizes)))
    assert check.head_of_config(str(tmp_path)) == Head(16, 99)
    (tmp_path / "config.json").write_text("{}")
    assert (
        check.main(["--model", str(tmp_path)]) == 2 and "hidden_size, vocab_size" in capsys.readouterr().err
    )
    assert check.main(["--model", str(tmp_path / "none")]) == 2
    for shape in ("16", "a,b", "0,99"):
        with pytest.raises(SystemExit):
            check.main(["--shape", shape])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_asked_for_must_be_there(capsys):
    assert check.main(["--device", "cuda"]) == 2 and "needs a GPU" in capsys.readouterr().err


OPS = list(ipvrm_kernels.OPS)[:3]


def test_a_dead_context_ends_the_check_of_its_device(monkeypatch):
    """What it kept from being checked is no right result of the GPU, and has one that says so."""
    said, begun = [], []
    findings = [check.judge.Finding("y", 0.0, 1.0)]

    def fake_results(device):
        for op in OPS[:2]:
            begun.append((device, op))
            failure = "RuntimeError: CUDA error" if device == "cuda" else ""
            yield check.Result(op, device, device, "fp32", findings, failure)

    planned = [
        (OPS[0], "cuda", "fp32"),
        (OPS[1], "cuda", "fp32"),
        (OPS[1], "cuda", "bf16"),
        (OPS[2], "cuda", "fp32"),
    ]
    monkeypatch.setattr(check, "_sequences", fake_results)
    monkeypatch.setattr(check, "_heads", lambda head, device: [])
    monkeypatch.setattr(check, "_planned", lambda device: planned)
    monkeypatch.setattr(check, "_answers", lambda: False)
    results = check.check(HEAD, ["cuda", "cpu"], said.append)
    assert begun == [("cuda", OPS[0]), ("cpu", OPS[0]), ("cpu", OPS[1])]  # nothing runs ahead of what is said
    assert "the CUDA context is dead" in said[1]
    assert [(r.op, r.impl, r.dtype) for r in results if r.failure == check.DEAD] == planned[1:]
    assert not any(r.right for r in results if r.device == "cuda")
    first, second, third = check.verdicts(results)
    assert first.startswith(f"{OPS[0]}: WRONG with cuda on cuda in fp32: RuntimeError: CUDA error")
    dead = "NOT CHECKED with cuda (cuda): the CUDA context was dead by then"
    assert second == f"{OPS[1]}: right with cpu (cpu); {dead}" and third == f"{OPS[2]}: {dead}"


def test_what_is_planned_is_what_is_checked():
    done = check.check(HEAD, ["cpu"])
    assert [(r.op, r.impl, r.dtype) for r in done] == list(check._planned("cpu"))


def test_no_memory_for_the_check_is_said(monkeypatch):
    def no_room(*arguments):
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(heads, "draw", no_room)
    results = check.check(HEAD, ["cpu"])
    failed = {result.op for result in results if not result.right}
    assert failed == set(heads.CHECKS) and "not enough memory" in check.verdicts(results)[-1]


# ---------------------------------------------------------------------------------------------- IPVRM_WITHOUT


@NATIVE
@pytest.mark.slow
def test_the_switch_leaves_an_implementation_out_of_the_defaults():
    code = "import ipvrm_kernels; b = ipvrm_kernels.backends()['cpu']; "
    code += "print(b['segment_scan']['cpp'], b['prefix_values']['cpp'])"
    environment = os.environ | dict(
        IPVRM_WITHOUT="segment_scan:cpp, triton", PYTHONPATH=os.pathsep.join(sys.path)
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200
    )
    assert ran.stdout.split() == ["available", "default"], ran.stderr
    with pytest.raises(ValueError, match="IPVRM_WITHOUT must hold IMPL or OP:IMPL, .*'segment_scan:cccp'"):
        backend._left_out("segment_scan:cccp")


def test_the_switch_holds_for_the_default_alone(monkeypatch):
    impls, x = ipvrm_kernels.OPS["segment_scan"], torch.ones(3)
    monkeypatch.setattr(backend, "_without", backend._left_out("segment_scan:cpp"))
    assert backend.choose("segment_scan", impls, None, x) == "torch"
    if backend.HAS_CPP:
        assert backend.choose("segment_scan", impls, "cpp", x) == "cpp"  # a named one runs
        assert backend.choose("prefix_values", ipvrm_kernels.OPS["prefix_values"], None, x) == "cpp"


TILES = """
import json

import triton
import triton.language as tl

import ipvrm_kernels.head.triton_forward as forward
from ipvrm_kernels.check import judge, wrong_tile


def wrong():
    found = judge.Judge()
    wrong_tile(found, "cpu")
    return json.dumps([finding.what for finding in found.findings if finding.share > 1])


print(wrong())
position = forward._tile_position


@triton.jit
def later_tile_is_the_first_again(item, row_blocks, num_columns, ROW_GROUP: tl.constexpr):
    row, column = position(item, row_blocks, num_columns, ROW_GROUP)
    return row, tl.where((item >= tl.num_programs(0)) & (column == 1), 0, column)


forward._tile_position = later_tile_is_the_first_again
print(wrong())
"""


@pytest.mark.slow
@pytest.mark.skipif(not backend.HAS_TRITON, reason="Triton is not installed")
def test_the_interpreter_has_its_tiles_checked(tmp_path):
    """As a GPU does, at a size that the interpreter can do; and a kernel that leaves a tile out is caught."""
    script = tmp_path / "tiles.py"  # Triton reads a kernel's source from its file
    script.write_text(TILES)
    environment = os.environ | dict(TRITON_INTERPRET="1", PYTHONPATH=os.pathsep.join(sys.path))
    ran = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=200
    )
    assert ran.returncode == 0, ran.stderr
    right, wrong = map(json.loads, ran.stdout.splitlines())
    partial = "bits of partial sums"
    assert right == []
    forward = ["bits of maxima of groups", partial, f"{partial} beside saved values", "bits of saved values"]
    assert wrong == forward  # dz has its own tiles
