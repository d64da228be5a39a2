"""pack, unpack: the round trip, gradients, errors."""

import pytest
import torch

from ipvrm_kernels import pack, unpack


@pytest.mark.parametrize("trailing", [(), (3,)])
def test_round_trip(trailing):
    lengths = torch.tensor([0, 4, 1, 0, 3])
    mask = torch.arange(5) < lengths[:, None]
    padded = torch.randn(5, 5, *trailing)
    packed, cu_seqlens = pack(padded, mask)
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.tolist() == [0, 0, 4, 5, 5, 8]
    assert packed[4].equal(padded[2, 0])
    expected = padded * mask.reshape(5, 5, *(1 for _ in trailing))
    assert unpack(packed, cu_seqlens, 5).equal(expected)


def test_pack_follows_the_mask_wherever_it_is():
    packed, cu_seqlens = pack(torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[0, 1, 1], [1, 0, 1]]))
    assert packed.tolist() == [2, 3, 4, 6] and cu_seqlens.tolist() == [0, 2, 4]


def test_no_sequences():
    packed, cu_seqlens = pack(torch.zeros(0, 3), torch.zeros(0, 3))
    assert packed.shape == (0,) and cu_seqlens.tolist() == [0]
    assert unpack(packed, cu_seqlens, 3).shape == (0, 3)


def test_gradcheck():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    padded = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: pack(x, mask)[0], padded)
    packed = torch.randn(3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: unpack(x, pack(padded, mask)[1], 4), packed)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: pack(torch.zeros(2, 3), torch.zeros(3, 2)),
            r"pack: padded must be \(B, T, ...\) .* got \(2, 3\) and",
        ),
        (lambda: pack(torch.zeros(2), torch.zeros(2)), r"mask \(B, T\)"),
        (
            lambda: unpack(torch.zeros(3), torch.tensor([0, 3]).int(), 2),
            "at least the longest sequence, 3, got 2",
        ),
        (
            lambda: unpack(torch.zeros(3), torch.tensor([0, 2]).int(), 2),
            "unpack: cu_seqlens must rise from 0 to N=3",
        ),
        (lambda: unpack(torch.zeros(3), torch.tensor([0, 3]), 3), "unpack: cu_seqlens must be .* int32"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
