"""Rows of an embedding as a side is compared with them: effective directions, whatever the precision and the block."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dt_lens import DtLensError, Embedding
from dt_lens.svd import side_labels
from dt_lens.svd.side_labels import row_blocks, unit_rows


@pytest.fixture(params=["plain", "norm", "rms", "columns", "half", "double"])
def embedding(request: pytest.FixtureRequest) -> Embedding:
    torch.manual_seed(0)
    rows = torch.randn(40, 12) + 3  # a mean that centring has to remove
    dtype = {"half": torch.float16, "double": torch.float64}.get(request.param, torch.float32)
    if request.param == "columns":
        rows = rows.T.contiguous().T
    options = {} if request.param == "plain" else {"layernorm": torch.rand(12) + 0.5, "rms": request.param == "rms"}
    return Embedding(rows.to(dtype), kind="token", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize(("folded", "centred"), [(True, True), (True, False), (False, False)])
def test_rows_are_the_effective_directions(
    embedding: Embedding, dtype: torch.dtype, side: str, folded: bool, centred: bool
) -> None:
    embedding = Embedding(
        embedding.directions,
        kind="token",
        side=side,
        layernorm=embedding.layernorm,
        rms=embedding.rms,  # type: ignore[arg-type]
    )
    before = embedding.directions.clone()
    wanted = (embedding.effective if folded else embedding.directions).double()
    wanted = wanted - wanted.mean(1, keepdim=True) if centred else wanted
    wanted = wanted / wanted.norm(dim=1, keepdim=True)
    for rows in (slice(None), slice(5, 9), torch.tensor([30, 2, 2])):
        found = unit_rows(embedding, rows, folded, centred, dtype)
        assert found.dtype == dtype
        np.testing.assert_allclose(found, wanted[rows], atol=1e-12 if dtype == torch.float64 else 2e-6)
    assert torch.equal(embedding.directions, before)  # nothing was written to the model


def test_blocks_are_the_rows_in_order(embedding: Embedding, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_labels, "BLOCK", 60)
    for kept in (None, [3, 4, 5, 20, 39], [7], list(range(40))):
        numbers, rows = zip(*row_blocks(embedding, kept, 3, True, True), strict=True)
        assert torch.cat(numbers).tolist() == (list(range(40)) if kept is None else kept)
        np.testing.assert_allclose(torch.cat(rows), unit_rows(embedding, torch.cat(numbers), True, True), atol=1e-15)
        assert max(map(len, rows)) == min(4, len(torch.cat(numbers)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_centring_removes_is_not_a_direction(dtype: torch.dtype) -> None:
    constant, near = torch.full((12,), 0.7), torch.full((12,), 0.7)
    near[3] += 1e-4
    rows = unit_rows(Embedding(torch.stack([constant, near])), slice(None), True, True, dtype)
    assert not rows[0].any()
    wanted = (near.double() - near.double().mean()) / (near.double() - near.double().mean()).norm()
    np.testing.assert_allclose(rows[1], wanted, atol=1e-6)  # decided in double precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("side", ["in", "out"])
def test_one_large_scale_loses_no_direction(side: str, centred: bool, rms: bool, dtype: torch.dtype) -> None:
    """In half precision too: only what centring takes away is lost, and a scale takes nothing away."""
    torch.manual_seed(0)
    w = torch.ones(64)
    w[7] = 2000.0
    directions = torch.randn(300, 64).bfloat16()
    directions[0] = 0.0
    directions[1] = 0.7  # constant, and no longer so behind the scale
    embedding = Embedding(directions, side=side, layernorm=w, rms=rms)  # type: ignore[arg-type]
    rows = unit_rows(embedding, slice(None), True, centred, dtype)
    lost = {0, 1} if side == "in" and not rms else {0}
    assert set((~rows.any(1)).nonzero().flatten().tolist()) == lost
    wanted = embedding.effective.double()
    wanted = wanted - wanted.mean(1, keepdim=True) if centred else wanted
    kept = [row for row in range(300) if row not in lost]
    wanted = wanted[kept] / wanted[kept].norm(dim=1, keepdim=True)
    np.testing.assert_allclose(rows[kept], wanted, atol=1e-5 if dtype == torch.float32 else 1e-12)


def test_values_that_are_not_finite_are_named() -> None:
    rows = torch.randn(4, 3)
    embedding = Embedding(rows)
    rows[2, 1] = float("nan")
    with pytest.raises(DtLensError, match="NaN"):
        unit_rows(embedding, slice(None), True, False)


@pytest.mark.parametrize("held", [0, 800, 10**6])
def test_rows_kept_for_a_null_are_those_made_at_every_pass(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_labels, "WHOLE", 0)
    monkeypatch.setattr(side_labels, "BLOCK", 320)  # ten rows at a time
    monkeypatch.setattr(side_labels, "HELD", held)
    E = torch.randn(73, 16, generator=torch.Generator().manual_seed(0))
    E[[3, 50]] = 1.0  # nothing is left of them by centring
    labels = side_labels.SideLabels(Embedding(E), True, True)
    found = labels.for_null
    rows = unit_rows(labels.embedding, slice(None), True, True, torch.float32).numpy()
    expected = rows[rows.any(1)]
    assert found.n == len(expected) == 71
    for _ in range(2):
        np.testing.assert_array_equal(np.concatenate(list(found.blocks())), expected)
    np.testing.assert_allclose(found.rows(np.arange(71)), expected, atol=1e-6)
