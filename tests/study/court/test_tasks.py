"""The court on other tasks than episodes: texts, where less loss is better, and a third party's."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dt_lens
from dt_lens.behaviour.terms import Terms
from dt_lens.behaviour.texts.evaluation import TextEvaluation, terms_of_windows
from dt_lens.study.court.case import Case
from dt_lens.study.court.claims import WAYS, Finding, verdict_of
from dt_lens.study.court.court import court
from dt_lens.study.court.damage import cosine_predicts_damage, hurts_more
from dt_lens.study.court.rollouts import MeasuredEdit, MeasuredEdits
from tests.behaviour.texts.test_texts import Bytes, hf_model
from tests.behaviour.toy import CLASSES, Points, sorter

N = 60
TEXT = "the quick brown fox jumps over the lazy dog and runs away again " * 3


def ruled(found: Finding) -> str:
    return verdict_of("behaviour", found, found.p_value)


def measured(costs: dict[tuple[str, int], float], control: float = 0.0) -> MeasuredEdits:
    """Edits that raise the loss by ``costs``, in nats per token, beside controls that raise it by ``control``."""
    rng = np.random.default_rng(0)

    def losses(cost: float) -> Any:
        return 3.0 + cost + 0.01 * rng.standard_normal(N)

    terms = terms_of_windows("a text", "0a1b", 12)
    unedited = losses(0.0)
    base = TextEvaluation(terms, np.arange(N), {"loss": unedited, "kl": 0 * unedited, "tokens": np.full(N, 11)})
    edits = [
        MeasuredEdit(f"blocks.0.mlp.{kind}", kind, "read", sv, 1.0, {}, losses(cost), losses(control)[None])
        for (kind, sv), cost in costs.items()
    ]
    return MeasuredEdits(base, edits, [edit for edit in edits if edit.kind == "W_in"])


@pytest.fixture(scope="module")
def case(make_lm: Callable[..., Any]) -> Case:
    return Case(dt_lens.wrap(make_lm("gpt2"), check=False), 0, 200)


@pytest.mark.parametrize(
    ("inside", "outside", "wanted"),
    [(0.3, 0.1, "supported"), (0.1, 0.3, "not supported"), (0.13, 0.1, "not supported"), (-0.3, -0.1, "not supported")],
)
def test_a_gain_of_loss_is_damage_in_nats(case: Case, inside: float, outside: float, wanted: str) -> None:
    """0.03 nats per token is sure and below the margin of 0.05; of a mean loss of 3 it would be a share of 0.01."""
    made = measured({("W_in", 0): inside, ("W_in", 2): inside, ("W_out", 0): outside, ("W_out", 2): outside})
    found = hurts_more(case, "proper", made, {"Frobenius energy": [1.0] * 4})
    assert found.margin == 0.05 and found.statistic == pytest.approx(inside - outside, abs=0.005)
    assert ruled(found) == wanted
    (cost, other) = re.findall(r"(\S+) nats per token in W_in and (\S+) in W_out", found.said)[0]
    assert (float(cost), float(other)) == pytest.approx((inside, outside), abs=0.005)
    assert "over windows" in found.said and "the return" not in found.said and "% of" not in found.said
    note = hurts_more(case, "note", made, {})
    assert note.statistic == pytest.approx(inside - outside, abs=0.005) and "nats per token" in note.said


def test_the_cosine_with_tokens_predicts_a_gain_of_loss(case: Case) -> None:
    tokens = case.labels(case.embedding("output"), "proper", case.matrices("W_in", 0)[0]).rows
    cosines = np.abs(case.vectors(case.matrices("W_in", 0)[0], "proper") @ tokens.T).max(1)
    for sign, wanted in ((1, "supported"), (-1, "not supported")):
        made = measured({("W_in", sv): sign * float(cosine) for sv, cosine in enumerate(cosines[:15])})
        found = cosine_predicts_damage(case, "proper", made, "made")
        assert np.sign(found.numbers["inside matrices"][0]) == sign  # type: ignore[index]
        if sign < 0:
            assert ruled(found) == wanted
        else:
            assert found.statistic > 0.3


def test_a_language_model_is_tried_with_edits(tmp_path: Path) -> None:
    model = dt_lens.wrap(hf_model(0), tokenizer=Bytes(), check=False)
    options: dict[str, Any] = {"texts": TEXT, "context": 12, "units": 5, "draws": 200, "workers": 1}
    result = court(model, tmp_path, name="a reader", **options)
    verdicts = {(ruling.claim.number, ruling.way): ruling for ruling in result.rulings}
    assert {number for (number, _), ruling in verdicts.items() if ruling.found is None} == {5, 6, 7, 8}
    assert "8 edits, fewer than the 12" in verdicts[7, "proper"].reason
    assert "the most common token (" in verdicts[2, "proper"].found.said
    assert "nats per token" in verdicts[3, "proper"].found.said
    assert verdicts[3, "proper"].claim.statistic.startswith("loss gained, in nats per token, by an edit of typical")
    assert result.facts["windows"] == 5 and result.facts["context"] == 12 and result.facts["arms"] == 21
    assert result.facts["unedited_mean_loss"] == pytest.approx(
        dt_lens.evaluate(model, TEXT, context=12, windows=5).mean, abs=1e-4
    )
    page = (tmp_path / "court.html").read_text()
    assert "loss gained, in nats per token" in page and "share of the return" not in page
    # The finished sweeps and the counted tokens are read, and the answer is the same.
    again = court(model, tmp_path, name="a reader", **options)
    assert again.to_dict() == result.to_dict() and (tmp_path / "tokens.json").is_file()


def test_what_a_third_partys_task_lacks_is_a_reason(tmp_path: Path) -> None:
    result = court(sorter(steps=0), tmp_path, Points(), units=3, draws=200, workers=1)
    reasons = {r.claim.number: r.reason for r in result.rulings if r.found is None and r.way == "proper"}
    assert set(reasons) == {2, 3, 4, 5, 6, 7, 8}
    assert reasons[8].startswith("its task does not list what the model can be faced with")
    assert reasons[2] == "the task 'points' does not say which class is the most common one"
    assert "the mean score of the unedited sorter is -" in reasons[3] and reasons[3].endswith("a share of it")
    assert reasons[4] == "the model has no OV"
    assert result.ruling(1).found is not None and result.facts["clouds"] == 3


class Counted(Points):
    """The same with what a large loss of score is, and with its outputs counted."""

    @property
    def terms(self) -> Terms:
        return dataclasses.replace(super().terms, large=0.2, scale="nats")

    def common_outputs(self, model: Any, tell: Any = None) -> Any:
        return np.array([1, 5, 2, 2])


def test_a_third_partys_task_may_say_more(tmp_path: Path) -> None:
    result = court(sorter(steps=0), tmp_path, Counted(), units=3, draws=200, workers=1)
    for way in WAYS:
        assert f"the most common class ({CLASSES[1]})" in result.ruling(2, way).found.said  # type: ignore[union-attr]
        found = result.ruling(3, way).found
        assert found is not None and found.margin == 0.1 and " nats " in found.said
    assert result.ruling(3).claim.statistic.startswith("score lost, in nats, by an edit")
