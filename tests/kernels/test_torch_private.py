"""Private names of PyTorch: in one file, and each does what it is used for. A failure names the torch."""

import ast
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import ipvrm_kernels
from ipvrm_kernels import torch_private as private
from ipvrm_kernels.head import matmul

ROOT = Path(__file__).parents[2]
PACKAGE = Path(ipvrm_kernels.__file__).parent
BROKEN = f"torch {torch.__version__} has changed it: see ipvrm_kernels/torch_private.py"
LIBRARIES = ("torch", "forward_ad", "triton", "transformers", "accelerate", "peft", "trl")


def private_names(text):
    """(line, name) of each attribute or import of a library with a component that begins with one `_`."""
    found = []
    for node in ast.walk(ast.parse(text)):
        names = []
        if isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            first, *rest = name.split(".")
            if first in LIBRARIES and any(x.startswith("_") and not x.startswith("__") for x in rest):
                found.append((node.lineno, name))
    return found


@pytest.mark.slow
def test_private_names_stand_in_one_file():
    files = [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "ipvrm").rglob("*.py")]
    assert len(files) > 60
    strays = [
        f"{path}:{line}: {name}"
        for path in files
        if path.name != "torch_private.py"
        for line, name in private_names(path.read_text(encoding="utf-8"))
    ]
    assert not strays, "\n".join(strays)
    assert len(private_names((PACKAGE / "torch_private.py").read_text())) > 15


@pytest.mark.parametrize(
    "line",
    ["torch._C.x()", "from torch._dynamo import reset", "a = forward_ad._current_level",
     "import torch._inductor", "torch.ops.mkldnn._linear_pointwise.default(a)",
     "from transformers import _x"],
)  # fmt: skip
def test_private_names_are_seen(line):
    assert private_names(line)
    assert not private_names("torch.__version__\nself._torch._x\ntorch.library.Library('a')")


@pytest.mark.parametrize("name", [name for name in vars(private) if name[0] not in "_"])
def test_each_name_is_there(name):
    assert getattr(private, name) is not None, BROKEN


def test_a_torch_without_a_name_is_named(monkeypatch):
    monkeypatch.delattr(torch._C, "_dispatch_keys")
    with pytest.raises(
        ImportError, match=rf"torch_private.py: torch {torch.__version__.split('+')[0]}.* changed"
    ):
        exec(compile((PACKAGE / "torch_private.py").read_text(), "torch_private.py", "exec"), {})


def test_what_comes_between_a_call_and_an_op():
    class Functions(torch.overrides.TorchFunctionMode):
        pass

    class Dispatches(TorchDispatchMode):
        pass

    def found():
        return (
            private.tracing_state() is not None, private.transform_level() is not None,
            private.num_dispatch_modes(), private.num_function_modes(), private.forward_level() >= 0,
        )  # fmt: skip

    seen = {"nothing": found()}
    with Functions():
        seen["functions"] = found()
    with Dispatches():
        seen["dispatches"] = found()
    with forward_ad.dual_level():
        seen["forward"] = found()

    def note(x):
        seen["vmap"] = found()
        return x

    torch.func.vmap(note)(torch.ones(2))
    assert seen == {
        "nothing": (False, False, 0, 0, False), "functions": (False, False, 0, 1, False),
        "dispatches": (False, False, 1, 0, False), "forward": (False, False, 0, 0, True),
        "vmap": (False, True, 0, 0, False),
    }, BROKEN  # fmt: skip


def test_wrapped_tensors():
    seen = []

    def look(x):
        seen.append(
            (private.is_functorch_wrapped_tensor(x), private.is_gradtrackingtensor(x),
             private.is_batchedtensor(x), type(private.get_unwrapped(x)))
        )  # fmt: skip
        return x.sum()

    torch.func.grad(look)(torch.ones(2))
    torch.func.vmap(look)(torch.ones(2, 2))
    assert seen == [(True, True, False, torch.Tensor), (True, False, True, torch.Tensor)], BROKEN
    plain = torch.ones(2)
    wrapped = (private.is_functorch_wrapped_tensor, private.is_batchedtensor, private.is_legacy_batchedtensor)
    assert not any(test(plain) for test in wrapped), BROKEN


def test_keys_and_graphs():
    x = torch.ones(2, requires_grad=True)
    keys, of = private.DispatchKey, private.DispatchKeySet
    plain = of(keys.CPU) | of(keys.AutocastCPU) | of(keys.ADInplaceOrView) | of(keys.AutogradCPU)
    assert private.dispatch_keys(x).raw_repr() == plain.raw_repr(), BROKEN
    kept = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            with private.BelowAutograd():
                return x * 2

        @staticmethod
        def backward(ctx, dy):
            kept.append(bool(private.retains_graph()))
            return dy * 2

    Look.apply(x).sum().backward()
    y = Look.apply(x).sum()
    y.backward(retain_graph=True)
    assert kept == [False, True], BROKEN
    with private.BelowAutograd():
        assert not (x * 2).requires_grad, BROKEN


@pytest.mark.skipif(not private.has_onednn(), reason="this build of PyTorch has no oneDNN op")
def test_onednn_multiplies():
    a, weight = torch.randn(16, 8), torch.randn(4, 8)
    torch.testing.assert_close(private.linear_onednn(a, weight), a @ weight.T, msg=lambda m: f"{BROKEN}\n{m}")


@pytest.mark.skipif(not private.brgemm_addresses(), reason="this build of PyTorch does not export it")
def test_the_kernel_of_bf16_blocks_multiplies():
    """Where the processor has the instructions; test_bf16_products.py has the rest."""
    reason = matmul.why_not_bf16()
    assert reason is None or "AVX512-BF16" in reason, BROKEN


def test_upper_bounds_are_those_of_torch_and_trl():
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *(x for xs in project["optional-dependencies"].values() for x in xs)]
    bounded = {
        text.split(">")[0].split("<")[0] for text in needed if "<" in text or "==" in text.split(";")[0]
    }
    assert bounded == {"torch", "trl"}
