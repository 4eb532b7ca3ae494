"""Weights are written and compared in pieces, with the bits of the whole sum."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import Tensor

from dt_lens.edits import writing
from dt_lens.edits.low_rank import Placed
from dt_lens.edits.writing import add_changes, put_back
from dt_lens.lens.matrices import Factor
from dt_lens.lens.weights import same_bits

FACTORS = {
    "whole": Factor("W", "a b -> a b"),
    "one head": Factor("W", "a b -> a b", 1),
    "one head, turned": Factor("W", "d e -> e d", 1),
    "all heads": Factor("W", "h d e -> d (h e)"),
}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", FACTORS)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_sum_is_that_of_the_whole_weight(
    kind: str, turned: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "PIECE", 20)
    factor = FACTORS[kind]
    untouched = drawn(*((7, 9) if kind == "whole" else (3, 7, 9))).to(dtype)
    if turned:  # as a module of torch's stores it
        untouched = untouched.mT.contiguous().mT
    m, n = factor.view({"W": untouched}).shape
    changes = [Placed(factor, drawn(m, 2, seed=i), drawn(2, n, seed=i + 9)) for i in range(3)]
    live = torch.full_like(untouched, 7.0)
    weights = {"W": live}
    for some in ([], changes[:1], changes):
        expected = sum((change.dense(weights) for change in some), untouched.double())
        written = []
        for order in permutations(some):
            add_changes(live, untouched, order, weights)
            torch.testing.assert_close(live.double(), expected.to(dtype).double(), rtol=1e-12, atol=0)  # type: ignore[union-attr]
            written.append(live.clone())
        assert all(same_bits(one, written[0]) for one in written)
    # Outside the head nothing changes, not even the sign of a zero.
    if factor.head is not None:
        untouched[0] = -0.0
        add_changes(live, untouched, changes[:1], weights)
        assert same_bits(live[0], untouched[0]) and same_bits(live[2], untouched[2])


def test_changes_of_two_heads_are_summed() -> None:
    untouched = drawn(3, 7, 9).float()
    changes = [Placed(Factor("W", "a b -> a b", h), drawn(7, 1, seed=h), drawn(1, 9, seed=h)) for h in (0, 2)]
    live = untouched.clone()
    add_changes(live, untouched, changes, {"W": live})
    for h, change in zip((0, 2), changes, strict=True):
        torch.testing.assert_close(live[h], (untouched[h].double() + change.left @ change.right).float())
    assert same_bits(live[1], untouched[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_one_bit_anywhere_is_seen(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "PIECE", 2)
    for shape in ((), (0,), (5,), (13, 11), (3, 4, 5)):
        a = drawn(*shape).to(dtype)
        for one in (a, a.T if a.ndim == 2 else a):
            b = one.clone()
            assert same_bits(one, b)
            for i in range(b.numel()):
                flat = b.reshape(-1).clone()
                flat[i] = -flat[i]
                assert not same_bits(one, flat.reshape(b.shape))
    zero, nan = torch.zeros(3, dtype=dtype), torch.full((3,), float("nan"), dtype=dtype)
    assert not same_bits(zero, -zero) and same_bits(nan, nan.clone())
    assert not same_bits(zero, zero[:2]) and not same_bits(zero, torch.zeros(3, dtype=torch.int32))


@pytest.mark.parametrize("kind", FACTORS)
def test_what_writing_did_is_said(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of one entry in the last rows is seen, and one that overflows where the entry was finite."""
    monkeypatch.setattr(writing, "PIECE", 20)
    factor = FACTORS[kind]
    untouched = drawn(*((7, 9) if kind == "whole" else (3, 7, 9))).half()
    m, n = factor.view({"W": untouched}).shape
    last = drawn(m, 1).zero_(), drawn(1, n).zero_()
    last[0][-1], last[1][0, -1] = 1.0, 1.0

    def written(size: float, before: Tensor = untouched) -> tuple[bool, bool]:
        live = before.clone()
        return tuple(add_changes(live, before, [Placed(factor, size * last[0], last[1])], {"W": live}))  # type: ignore[return-value]

    assert written(0.0) == (False, False)
    assert written(1e-9) == (False, False)  # rounded away
    assert written(0.5) == (True, False)
    assert written(1e6) == written(-1e6) == written(float("nan")) == (True, True)
    endless = untouched.clone()
    factor.view({"W": endless})[-1, -1] = float("inf")
    view = factor.view({"W": endless})
    if view.data_ptr() != endless.data_ptr() and factor.head is None:  # a copy: all heads in one matrix
        endless[-1, -1, -1] = float("inf")
    assert written(-1e6, endless) == (False, False)


@pytest.mark.parametrize("shape", [(), (0,), (5,), (13, 11), (3, 4, 5)])
def test_what_is_put_back_is_compared(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "PIECE", 2)
    kept = drawn(*shape).float()
    for turned in (False, True):
        live = torch.full_like(kept.mT if turned and kept.ndim > 1 else kept, 7.0)
        live = live.mT if turned and kept.ndim > 1 else live
        assert put_back(live, kept) and same_bits(live, kept)
    if kept.numel():
        assert not put_back(torch.zeros(shape, dtype=torch.float16), kept)  # as a weight that was cast


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_slices_of_any_strides_are_compared(dtype: torch.dtype) -> None:
    """Four entries of a row of seven: bits are compared eight bytes at a time, where they lie so in memory."""
    whole = drawn(3, 7).to(dtype)
    for part in (whole[:, :4], whole[:, 1:5], whole[:1, :4], whole[:1, None, :4], whole[1:2, :4], whole[0, :4]):
        other = part.clone()
        assert same_bits(part, other) and same_bits(other, part) and same_bits(part, part)
        other[..., -1] += 1
        assert not same_bits(part, other) and not same_bits(other, part)
