"""FSDP2 with two gloo processes: gradients of a sharded model with the patched head equal one process's."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ipvrm import patch_head
from ipvrm.models.causal_lm import fewest_devices, memory_estimate
from ipvrm_kernels import gathered_weight, linear_distrl_loss

WORLD, V, B, T, K = 2, 97, 2, 10, 3
CASES = [  # (tied, unit of the head, the loss forms its gradients in the forward)
    (False, "root", False), (False, "own", False), (True, "root", False), (False, "own", True), (True,
    "root", True),
    (False, "tail", False), (True, "tail", False),  # with the last norm, as accelerate has it since 1.15
]  # fmt: skip


class Fused(torch.nn.Module):
    """`linear_distrl_loss` on a model: no weight in its backward."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, labels, candidate_ids):
        hidden = self.model.model(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1]
        weight, _ = gathered_weight(self.model.lm_head)
        N, cu = B * (T - 1), torch.arange(0, B * (T - 1) + 1, T - 1, dtype=torch.int32)
        old = torch.full((N, K), -2.0)
        advantages = torch.linspace(-1, 1, N)
        return linear_distrl_loss(
            hidden.flatten(0, 1), weight, labels[:, 1:].flatten(), candidate_ids.flatten(0, 1), old[:, 0],
            old, advantages, old * advantages[:, None], cu, alpha=0.5, clip_low=0.9, clip_high=9.0,
        ).loss  # fmt: skip


class Recomputing(torch.nn.Module):
    """The patched head: `linear_logprobs` forms the logits again in its backward."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, labels, candidate_ids):
        out = self.model(input_ids=input_ids, labels=labels, candidate_ids=candidate_ids, return_entropy=True)
        candidates = out.candidate_logprobs.where(out.candidate_ids >= 0, 0.0)
        return out.logprobs.mean() + 0.3 * candidates.mean() + 0.1 * out.entropy.mean()


def batch(number):
    g = torch.Generator().manual_seed(number)
    ids = torch.randint(3, V, (B, T), generator=g)
    return ids, ids, torch.randint(3, V, (B, T - 1, K), generator=g)


def make(tied, fused):
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=tied,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.5)
    patch_head(model)
    return Fused(model) if fused else Recomputing(model)


def sharded(module, unit, mesh):
    for layer in module.model.model.layers:
        fully_shard(layer, mesh=mesh)
    model = module.model
    if unit == "own":
        fully_shard(model.lm_head, mesh=mesh)
    elif unit == "tail":
        tied = [model.model.embed_tokens] if model.config.tie_word_embeddings else []
        fully_shard([model.model.norm, *tied, model.lm_head], mesh=mesh, reshard_after_forward=False)
    fully_shard(module, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in module.parameters())
    return module


def gradients(module, rank):
    """Whole gradients after two micro-batches, the first without synchronisation."""
    with torch.no_grad():
        module(*batch(99))  # as an evaluation between two updates
    for number in range(2):
        module.set_requires_gradient_sync(number == 1)
        module(*batch(WORLD * number + rank)).backward()
    return {name: p.grad.full_tensor() for name, p in module.named_parameters()}


def worker(rank, rendezvous, folder, cases):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    mesh, found = init_device_mesh("cpu", (WORLD,)), {}
    for tied, unit, fused in cases:
        found[tied, unit, fused] = gradients(sharded(make(tied, fused), unit, mesh), rank)

    # what a plain full_tensor() gives for a head that is a unit of its own: the gradient of one rank
    plain = DTensor.full_tensor
    DTensor.full_tensor = lambda self, *, grad_placements=None: plain(self)
    try:
        module = sharded(make(False, False), "own", mesh)
        for number in range(2):
            module(*batch(WORLD * number + rank)).backward()
    finally:
        DTensor.full_tensor = plain
    found["plain"] = {name: p.grad.full_tensor() for name, p in module.named_parameters()}

    head = torch.nn.Linear(16, V, bias=False)
    head.weight = torch.nn.Parameter(distribute_tensor(head.weight.detach(), mesh, [Shard(0)]))
    try:
        gathered_weight(head)
    except ValueError as error:
        found["refused"] = str(error)
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.barrier()
    dist.destroy_process_group()
    # Without the interpreter's end, in which a rank died of SIGABRT twice in some thirty runs: a thread that
    # asks for the GIL there is unwound, and not every frame of PyTorch's lets that through.
    os._exit(0)


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param([(False, "own", False)], marks=pytest.mark.slow, id="a unit of its own"),
        pytest.param(CASES, marks=pytest.mark.full, id="all"),
    ],
)
def test_gradients_equal_one_process(tmp_path, cases):
    mp.spawn(worker, (str(tmp_path / "rendezvous"), str(tmp_path), cases), nprocs=WORLD)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for tied, unit, fused in cases:
        module = make(tied, fused)
        for number in range(2 * WORLD):
            (module(*batch(number)) / WORLD).backward()
        want = {name: p.grad for name, p in module.named_parameters()}
        got = found[tied, unit, fused]
        assert got.keys() == want.keys()
        for name, gradient in want.items():
            torch.testing.assert_close(
                got[name], gradient, rtol=1e-4, atol=1e-5, msg=f"{(tied, unit, fused)} {name}"
            )
        if (tied, unit, fused) == (False, "own", False):
            wrong = (found["plain"]["model.lm_head.weight"] - want["model.lm_head.weight"]).abs().max()
            assert float(wrong) > 0.1 * float(want["model.lm_head.weight"].abs().max())
    assert "FSDP2 unit of its own" in found["refused"] and "vocab_parallel_logprobs" in found["refused"]


def test_plain_parameters_are_returned_as_they_are():
    head = torch.nn.Linear(4, 7)
    weight, bias = gathered_weight(head)
    assert weight is head.weight and bias is head.bias
    assert gathered_weight(torch.nn.Linear(4, 7, bias=False))[1] is None


def test_memory_estimate_of_qwen3_8b_on_eight_devices(tmp_path):
    """Weights, gradients and moments take 16 bytes a parameter: too much for 80 GB, on eight devices not."""
    config = transformers.Qwen3Config(
        vocab_size=151_936, hidden_size=4096, intermediate_size=12_288, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    options = dict(rows=4, length=4096, mixed_precision="bf16", gradient_checkpointing=True)
    one = memory_estimate(tmp_path, **options)
    eight = memory_estimate(tmp_path, shards=8, **options)
    assert 8.1e9 < one["parameters"] < 8.3e9 and one["gathered_bytes"] == 0
    assert one["total_bytes"] > 130e9
    page = (Path(__file__).parents[2] / "ipvrm/integrations/README.md").read_text(encoding="utf-8")
    assert f"{eight['total_bytes'] / 1e9:.1f} GB on each of eight devices,\nat least three of 80 GB" in page
    assert eight["weights_gradients_adam_bytes"] == one["weights_gradients_adam_bytes"] // 8
    ends = 2 * 151_936 * 4096
    assert eight["gathered_bytes"] > 4 * ends
    # by hand: 16 * 8.19e9 / (72e9 - 4.83e9 of activations - 6.52e9 gathered) = 2.2; on 24 GB 13.8; on 141 GB
    # 135.9e9 of 126.9e9, so two
    two = memory_estimate(tmp_path, shards=2, **options)
    fewest = [fewest_devices(one, two, size * 1e9) for size in (24, 80, 141, 152)]
    assert fewest == [13, 3, 2, 1]


def test_what_fits_by_hand(tmp_path):
    """A layer has 2 * 64 * 64 + 2 * 64 * 32 of attention, 2 * 16 of its norms, 3 * 64 * 128 of the MLP and
    2 * 64 of norms: 37,024; two of them, the last norm (64) and 2 * 1000 * 64 of the ends are 202,112."""
    config = transformers.Qwen3Config(
        vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=False,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    one, two = (memory_estimate(tmp_path, rows=2, length=100, shards=n) for n in (1, 2))
    states, activations = 16 * 202_112, 2 * 100 * 2 * 64 * 4 * 16
    gathered = 2 * 4 * (128_000 + 2 * (202_112 - 128_000) // 2)
    assert one["total_bytes"] == states + activations == 4_872_192
    assert two["total_bytes"] == states // 2 + activations + gathered
    # nine tenths: 5.4 MB hold the whole; 4.5 MB leave 1,244,704 for states, 2.6 times that; 3.24 MB nothing
    assert [fewest_devices(one, two, size) for size in (6e6, 5e6, 3.6e6)] == [1, 3, None]
