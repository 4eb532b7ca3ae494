"""What a wrapped model is: dt-lens's own three classes, and a third party's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import dt_lens
from dt_lens import DtLensError, SingularEdit, WeightSVD
from dt_lens.lens.protocol import Lens, is_wrapped, require_agent, require_running

Make = Callable[..., Any]


class Own:
    """A lens that is neither of dt-lens's classes nor a torch module: it delegates to another lens."""

    kind = "toy"
    can_run, can_act = True, False
    original = reference = None

    def __init__(self, inner: Any) -> None:
        self._inner, self.cfg = inner, inner.cfg

    @property
    def weights(self) -> Mapping[str, torch.Tensor]:
        return self._inner.weights  # type: ignore[no-any-return]

    @property
    def structure(self) -> Any:
        return self._inner.structure

    @property
    def embeddings(self) -> Any:
        return self._inner.embeddings

    def probe(self, seed: int = 0) -> dict[str, Any]:
        return self._inner.probe(seed)  # type: ignore[no-any-return]

    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any:
        return self._inner.run_with_cache(*args, **kwargs)

    def hooks(self, *args: Any, **kwargs: Any) -> Any:
        return self._inner.hooks(*args, **kwargs)


@pytest.fixture(scope="module")
def opened(make_lm: Make, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model that was opened for its weights only."""
    folder: Path = tmp_path_factory.mktemp("gpt2")
    make_lm("gpt2").save_pretrained(folder)
    return dt_lens.open_checkpoint(folder)


def test_three_kinds_of_wrapped_model(make_dt: Make, make_lm: Make, opened: Any) -> None:
    found = [make_dt(), dt_lens.wrap(make_lm("gpt2"), check=False), opened]
    assert all(isinstance(model, Lens) and is_wrapped(model) for model in found)
    assert [model.kind for model in found] == ["decision transformer", "language model", "language model"]
    assert [(model.can_run, model.can_act) for model in found] == [(True, True), (True, False), (False, False)]


def test_a_third_partys_lens(make_dt: Make) -> None:
    inner = make_dt()
    model: Lens = Own(inner)  # mypy checks this line
    assert isinstance(model, Lens) and dt_lens.wrap(model) is model  # type: ignore[arg-type]
    assert dt_lens.certify(model).errors == dt_lens.certify(inner).errors
    pd.testing.assert_frame_equal(WeightSVD(model).scan("*.W_in"), WeightSVD(inner).scan("*.W_in"))
    before = inner.weights["blocks.0.mlp.W_in"].clone()
    with SingularEdit(model, "blocks.0.mlp.W_in"):
        assert not torch.equal(inner.weights["blocks.0.mlp.W_in"], before)
    assert torch.equal(inner.weights["blocks.0.mlp.W_in"], before)
    found = dt_lens.collect_activations(model, batches=[model.probe()])
    assert found.inputs["blocks.0.mlp.W_in"].mean.shape == (16,)


def test_a_lens_whose_properties_raise_is_not_asked_for_them() -> None:
    class Lazy(Own):
        @property
        def embeddings(self) -> Any:
            raise AssertionError("computed")

    assert is_wrapped(Lazy.__new__(Lazy))


def test_what_is_not_a_wrapped_model_is_refused() -> None:
    for given, name in ((torch.nn.Linear(2, 2), "a Linear"), ("hopper", "a str"), (None, "a NoneType"), (5, "an int")):
        assert not is_wrapped(given)
        with pytest.raises(DtLensError, match=rf"^court takes a wrapped model, not {name}; call dt_lens\.wrap or "):
            require_running(given, "court")
        with pytest.raises(DtLensError, match=rf"^steer takes a decision transformer .*, not {name}; wrap it first"):
            require_agent(given, "steer")


def test_what_a_model_cannot_do_is_refused_by_its_kind(make_dt: Make, opened: Any) -> None:
    require_running(make_dt(), "certify")
    require_agent(make_dt(), "steer")
    require_running(Own(make_dt()), "certify")
    with pytest.raises(DtLensError, match=r"^This model was opened for its weights only and cannot run; use "):
        require_running(opened, "certify")
    with pytest.raises(DtLensError, match=r"^steer takes a decision transformer .*, not a toy; scan its weights, and "):
        require_agent(Own(make_dt()), "steer")
    with pytest.raises(DtLensError, match="not a language model; scan"):
        require_agent(opened, "steer")
