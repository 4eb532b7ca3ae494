"""A video of an agent in one episode: what it shows is what `evaluate` measures, and the edits are gone afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dt_lens.behaviour.agents.filming import dose_of, film
from dt_lens.behaviour.evaluate import evaluate
from dt_lens.decision_transformer.facts import RunFacts
from dt_lens.edits.singular import SingularEdit
from dt_lens.errors import DtLensError


@pytest.fixture(scope="module")
def walker(make_dt: Callable[..., Any]) -> Any:
    """An untrained agent on the ice, whose edited self goes another way."""
    model = make_dt(0, state_dim=16, act_dim=4, n_layers=1, max_ep_len=100, discrete_actions=True, action_tanh=False)
    kwargs = {"is_slippery": False}
    model.facts = RunFacts(
        context=4, environment="FrozenLake-v1", environment_kwargs=kwargs, target_returns=(1.0,), return_scale=1.0
    )
    return model


def test_the_episodes_of_a_video_are_those_of_evaluate(walker: Any, tmp_path: Path) -> None:
    edit = SingularEdit(walker, "blocks.0.mlp.W_out", 0, value=-30.0)
    base = evaluate(walker, episodes=1, seed=5, workers=1)
    with edit:
        edited = evaluate(walker, episodes=1, seed=5, workers=1)
    told: list[str] = []
    made = film(walker, tmp_path / "v.gif", None, [edit], seed=5, size=64, progress=lambda what, _: told.append(what))
    assert made.reason == "" and made.lengths == (int(base.lengths[0]), int(edited.lengths[0]))
    assert made.returns == (float(base.outcomes[0]), float(edited.outcomes[0]))
    assert not edit.active and told[0] == "running the agent, unedited" and told[-1] == "drawing"
    with Image.open(tmp_path / "v.gif") as shown:
        assert shown.width == 2 * 64 + 4
    alone = film(walker, tmp_path / "w.gif", seed=5, size=64, steps=3)
    assert alone.lengths == made.lengths[:1] and alone.frames == min(3, alone.lengths[0]) + 1


def test_an_edit_is_called_by_its_place_and_its_dose(walker: Any) -> None:
    matrix = "blocks.0.mlp.W_out"
    assert dose_of(SingularEdit(walker, matrix, 0, value=2.0)) == f"{matrix} sv=0 sigma × 2"
    assert dose_of(SingularEdit(walker, matrix, [0, 2], value="zero")) == f"{matrix} sv=0,2 zero"
    assert dose_of(SingularEdit(walker, matrix, 1).control(0)).startswith(matrix)


def test_what_is_no_video_is_refused(walker: Any, tmp_path: Path) -> None:
    with pytest.raises(DtLensError, match=r"ends in \.png; a video is written as \.mp4 or \.gif"):
        film(walker, tmp_path / "v.png")
    with pytest.raises(DtLensError, match="edits is a str; it must be a list of edits"):
        film(walker, tmp_path / "v.gif", edits="blocks.0.mlp.W_out")  # type: ignore[arg-type]
