"""Decompositions by name, and what makes one differ from another in the cache on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dt_lens import DtLensError, WeightSVD
from dt_lens.lens.matrices import catalogue
from dt_lens.svd import solvers
from dt_lens.svd.decomposition import Decomposition
from dt_lens.svd.decompositions import Decompositions

Make = Callable[..., Any]
W_IN = "blocks.0.mlp.W_in"


@pytest.fixture(scope="module")
def model(make_dt: Make) -> Any:
    return make_dt()


def test_the_cache_holds_each_rank_and_folding_apart(model: Any, tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [{}, {"rank": 3}, {"fold_layernorm": False}, {"rank": 3, "fold_layernorm": False}]

    def read() -> list[Decomposition]:
        return [WeightSVD(model, resume=tmp_path, **options)[W_IN] for options in settings]

    first = read()
    assert len(list(tmp_path.iterdir())) == len(settings)
    for found in (first, read()):  # computed, and from the cache
        assert [(len(d.sigma), d.folded) for d in found] == [(15, True), (3, True), (16, False), (3, False)]
        for options, d in zip(settings, found, strict=True):
            direct = WeightSVD(model, **options)[W_IN]
            assert torch.equal(d.sigma, direct.sigma) and torch.equal(d.left, direct.left)
    assert len(list(tmp_path.iterdir())) == len(settings)


def test_what_another_version_of_the_solver_stored_is_not_read(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    WeightSVD(model, resume=tmp_path)[W_IN]
    monkeypatch.setattr(solvers, "VERSION", solvers.VERSION + 1)
    WeightSVD(model, resume=tmp_path)[W_IN]
    assert len(list(tmp_path.iterdir())) == 2


def test_another_model_of_the_same_shape_gets_the_same_settings(model: Any, make_dt: Make, tmp_path: Path) -> None:
    other = make_dt(1)
    svd = WeightSVD(model, 3, "state_*", False, tmp_path).like(other)
    assert isinstance(svd, WeightSVD)
    assert (svd.model, svd.rank, svd.fold_layernorm, svd.cache.folder) == (other, 3, False, None)
    assert {pairing.labels.embedding.name for pairing in svd.pairings()} == {"state_in", "state_out"}


def test_labels_are_prepared_once_for_all_matrices_alike(model: Any) -> None:
    pairings = Decompositions(model).pairings("*.W_*", ["state_in"])
    prepared = {(id(pairing.labels), pairing.labels.centred) for pairing in pairings}
    assert len(pairings) > 4
    assert sorted(centred for _, centred in prepared) == [False, True]


@pytest.mark.parametrize("small", [0, 2**22])
def test_matrices_side_by_side_have_the_bits_of_one_alone(
    make_dt: Make, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dt_lens.svd import side_by_side

    model = make_dt()
    monkeypatch.setattr(side_by_side, "SMALL", small)
    alone = WeightSVD(model, rank=4)
    one_by_one = {name: alone[name] for name in catalogue(model)}
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        together = WeightSVD(model, rank=4).decompose()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert list(together) == list(one_by_one)
    for name, found in together.items():
        for mine, theirs in zip(found.tensors().values(), one_by_one[name].tensors().values(), strict=True):
            assert torch.equal(mine, theirs), name


def test_an_error_beside_others_names_its_matrix(make_dt: Make) -> None:
    model = make_dt()
    model.weights["blocks.1.mlp.W_out"][0, 0] = float("nan")
    with pytest.raises(DtLensError, match=r"blocks\.1\.mlp\.W_out: .*NaN"):
        WeightSVD(model).decompose()
    assert len(WeightSVD(model).decompose("blocks.0.*")) > 4
