"""A live run gives the outcomes of ``evaluate``, to the bit, and the intervals of ``compare``."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest

from dt_lens import SingularEdit, evaluate
from dt_lens.decision_transformer.facts import RunFacts
from dt_lens.errors import DtLensError
from dt_lens.explorer import live_run
from dt_lens.explorer.pictures import picture_of

EDITS = [
    {"matrix": "blocks.0.mlp.W_in", "sv": "0-1", "value": "zero"},
    {"matrix": "blocks.1.mlp.W_out", "sv": "0", "value": 3.0},
]
WANTED = {"edits": EDITS, "control": 0, "units": 5, "seed": 3, "max_steps": 20}


@pytest.fixture(scope="module")
def agent(make_dt: Callable[..., Any]) -> Any:
    made = make_dt(2, state_dim=3, act_dim=1)
    made.facts = RunFacts(context=4, environment="Pendulum-v1", target_returns=(-200.0,))
    return made


def events_of(agent: Any, check: Callable[[], None] = lambda: None, **changes: Any) -> list[dict[str, Any]]:
    heard: list[dict[str, Any]] = []
    say = lambda kind, **values: heard.append({"kind": kind, **json.loads(json.dumps(values, allow_nan=False))})  # noqa: E731
    live_run.play(agent, {**WANTED, **changes}, True, say, check)
    return heard


def test_outcomes_and_intervals_are_those_of_evaluate_and_compare(agent: Any) -> None:
    heard = events_of(agent)
    first = SingularEdit(agent, "blocks.0.mlp.W_in", [0, 1], value="zero")
    second = SingularEdit(agent, "blocks.1.mlp.W_out", 0, value=3.0)
    options: dict[str, Any] = {"episodes": 5, "seed": 3, "max_steps": 20, "workers": 1}
    found = {"unedited": evaluate(agent, **options)}
    with first, second:
        found["edited"] = evaluate(agent, **options)
    with first.control(0), second.control(0):
        found["control"] = evaluate(agent, **options)
    for arm, evaluation in found.items():
        own = {event["unit"]: event["value"] for event in heard if event["kind"] == "outcome" and event["arm"] == arm}
        assert own == dict(zip(evaluation.seeds.tolist(), evaluation.returns.tolist(), strict=True))
    last = [event for event in heard if event["kind"] == "summary"][-1]
    assert last["n"] == 5
    assert {arm: one["mean"] for arm, one in last["means"].items()} == {arm: e.mean for arm, e in found.items()}
    for row in last["compared"]:
        compared = found[row["arm"]].compare(found[row["with"]])
        assert (row["difference"], row["low"], row["high"]) == (compared.difference, *compared.difference_interval)
        assert row["p"] == compared.p_value
    assert [(row["arm"], row["with"]) for row in last["compared"]] == [
        ("edited", "unedited"), ("control", "unedited"), ("edited", "control"),
    ]  # fmt: skip
    assert not agent.active_edits


def test_the_return_beside_a_picture_is_the_return_so_far(agent: Any) -> None:
    """A Pendulum has no picture, and its last frame is the episode's end."""
    heard = events_of(agent, control=None, units=2)
    frames = [event for event in heard if event["kind"] == "frame"]
    outcomes = {(event["arm"], event["unit"]): event["value"] for event in heard if event["kind"] == "outcome"}
    assert frames and all(one["picture"] is None for frame in frames for one in frame["arms"])
    final = {one["arm"]: one for one in frames[-1]["arms"]}
    for number, arm in enumerate(("unedited", "edited")):
        assert final[number]["total"] == outcomes[arm, frames[-1]["seed"]] and final[number]["step"] == 20


def test_the_check_stops_a_run_between_steps(agent: Any) -> None:
    class Enough(Exception):
        pass

    calls = []

    def check() -> None:
        calls.append(1)
        if len(calls) > 7:
            raise Enough

    with pytest.raises(Enough):
        events_of(agent, check)
    assert not agent.active_edits


def test_more_episodes_than_rows_still_run(agent: Any) -> None:
    """Later ones begin as others end, in rows that had another episode."""
    task, _ = live_run.task_of(agent, units=9, max_steps=6)
    run = live_run._Run(agent, task, {"unedited": []}, {}, lambda *_, **__: None, lambda: None, None)
    run.found = {"unedited": {}}
    run.told = (1e18, 0)  # no intervals
    assert run._watched(run.task, range(9))
    assert sorted(run.found["unedited"]) == list(range(9))


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({"edits": []}, "no edit"),
        ({"edits": "x"}, "cannot be read"),
        ({"edits": [{"matrix": "nonsense"}]}, "nonsense"),
        ({"units": "many"}, "episodes"),
        ({"seed": -1}, "seed"),
        ({"max_steps": 0}, "steps of an episode .* whole number above 0, or empty; it is 0"),
        ({"max_steps": "many"}, "steps of an episode .* it is 'many'"),
        ({"max_steps": 2.5}, "steps of an episode .* it is 2.5"),
        ({"max_steps": True}, "steps of an episode .* it is True"),
    ],
)
def test_a_run_that_cannot_be_is_a_sentence(agent: Any, changes: dict[str, Any], needed: str) -> None:
    with pytest.raises(DtLensError, match=needed):
        events_of(agent, **changes)


def test_a_hopper_is_drawn_where_its_bodies_are() -> None:
    env = gymnasium.make("Hopper-v5")
    env.reset(seed=0)
    picture = picture_of(env)
    assert picture is not None and picture["kind"] == "body" and len(picture["parts"]) == 4
    torso = picture["parts"][0]
    height = float(env.unwrapped.data.xpos[1][2])  # type: ignore[attr-defined]
    assert torso[1] + torso[3] == pytest.approx(2 * height, abs=0.01)  # the middle of the torso
    env.step(np.ones(3, np.float32))
    assert picture_of(env) != picture
    json.dumps(picture)


def test_a_taxi_is_drawn_with_its_walls() -> None:
    env = gymnasium.make("Taxi-v4" if "Taxi-v4" in gymnasium.registry else "Taxi-v3")
    env.reset(seed=0)
    base: Any = env.unwrapped
    picture = picture_of(env)
    assert picture is not None
    row, column, passenger, destination = base.decode(base.s)
    assert picture["agent"] == [column, row, None] and len(picture["walls"]) == 6
    for x, y, _ in picture["walls"]:  # no way through: east of the wall cannot be reached from its west
        state = base.encode(y, x - 1, passenger, destination)
        assert base.P[state][2][0][1] == state
    json.dumps(picture)
