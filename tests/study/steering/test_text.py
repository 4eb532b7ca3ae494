"""Steering text: the log probability of an answer, with the loss on other text as what must not rise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dt_lens.behaviour.texts.prompts import PromptTask
from dt_lens.errors import DtLensError
from dt_lens.lens.loading import wrap
from dt_lens.study.steering import steering
from dt_lens.study.steering.steering import steer
from tests.behaviour.texts.test_texts import Bytes, hf_model
from tests.behaviour.toy import Points, sorter

PROMPTS = ["one day", "a fox", "so it", "they go", "we see", "he ran"]
OTHER = "The quick brown fox jumps over the lazy dog. " * 3
W_OUT = "blocks.1.mlp.W_out"


@pytest.fixture(scope="module")
def model() -> Any:
    """A language model in which direction 0 of the last ``W_out`` writes the token of ``x``."""
    theirs = hf_model(2)
    lens = wrap(theirs, tokenizer=Bytes(), check=False)
    with torch.no_grad():
        W, x = lens.weights[W_OUT], lens.weights["unembed.W_U"][:, ord("x")]
        x = x - x.mean()
        neurons = torch.linspace(0.5, 1.5, len(W))
        W.add_(4 * torch.outer(neurons / neurons.norm(), x / x.norm()))
    return lens


@pytest.fixture
def few_random(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steering, "RANDOM", 2)


def test_the_log_probability_of_an_answer(model: Any) -> None:
    task = PromptTask.of(model, PROMPTS, "xy")
    found = task.evaluate(model, task.units())
    for number, prompt in enumerate(PROMPTS):
        ids = torch.tensor([list((prompt + "xy").encode())])
        with torch.no_grad():
            log_p = model.original(ids).logits[0].double().log_softmax(-1)
        n = len(prompt)
        wanted = float(log_p[n - 1, ord("x")] + log_p[n, ord("y")])
        assert found.outcomes[number] == pytest.approx(wanted, rel=1e-9)
        assert found.columns["rank"][number] == int((log_p[n - 1] > log_p[n - 1, ord("x")]).sum())
    assert task.first_tokens == [ord("x")] and found.terms.better == "more"
    each = PromptTask.of(model, "a b\n\nc d", ["x", "y"])
    assert len(each.tokens) == 2 and each.first_tokens == [ord("x"), ord("y")]


@pytest.mark.parametrize(
    ("prompts", "answers", "words"),
    [
        ([], "x", "empty"),
        (["a"], "", "none of them empty"),
        (["a"], ["x", "y"], "1 prompts and 2 answers"),
        (["a" * 99], "x", "must be at most the model's 24"),
    ],
)
def test_prompts_that_cannot_be_asked(model: Any, prompts: Any, answers: Any, words: str) -> None:
    with pytest.raises(DtLensError, match=words):
        PromptTask.of(model, prompts, answers)


def test_a_planted_direction_moves_its_answer(model: Any, few_random: None, tmp_path: Path) -> None:
    result = steer(model, tmp_path, [OTHER], prompts=PROMPTS, answers="x", context=16, candidates=4)
    assert result.best is not None and (result.best.matrix, result.best.sv) == (W_OUT, 0)
    assert result.best.why == "writes towards an answer" and result.best.cosine > 0.85
    n = result.numbers
    task = PromptTask.of(model, PROMPTS, "x")
    unedited = task.evaluate(model, range(3, 6)).mean
    means = result.table.set_index("dose")["mean"]
    assert means[1.0] == pytest.approx(unedited) and n["units"] == n["choosing_units"] == 3
    assert n["reach"] > 0 and np.sign(means[2.0] - means[0.0]) == np.sign(n["slope_when_chosen"])
    assert {"guard", "guard_rise"} & {*result.table, *result.randoms} == {"guard", "guard_rise"}
    assert "loss on other text rises by" in result.sentence and "nats per token" in result.sentence
    page = (tmp_path / "steering.html").read_text(encoding="utf-8")
    assert "log probability" in page and "failures" not in result.sentence


def test_other_text_must_not_get_worse(model: Any, few_random: None, tmp_path: Path, monkeypatch: Any) -> None:
    """Where every dose costs more than the bound on other text, the verdict says so."""
    harm = steering._Search._harm

    def costly(self: Any, edit: Any, arm: Any) -> Any:
        # A rise at one end of the doses and a fall at the other: their average is 0.
        value = 1.0 if edit is None else edit.to_dict()["value"]
        return harm(self, edit, arm) + 0.5 * ((value if isinstance(value, float) else 1.0) - 1)

    monkeypatch.setattr(steering._Search, "_harm", costly)
    result = steer(model, tmp_path, [OTHER], prompts=PROMPTS, answers="x", context=16, candidates=2)
    assert result.choosing["set_aside"].all()
    assert result.verdict in ("moves it at the cost of the guard", "undecided", "none found")
    assert result.numbers["rise"] > 0.45


def test_a_third_partys_task(few_random: None, tmp_path: Path) -> None:
    result = steer(sorter(), tmp_path, Points(), units=6, choosing=4, candidates=3)
    assert result.best is not None and result.best.why == "large sigma" and np.isnan(result.best.cosine)
    assert result.numbers["least"] == pytest.approx(0.1 * abs(float(result.curve["mean"].iloc[0])))
    assert "the score by" in result.sentence and "agent" not in result.sentence
    assert "mean score" in (tmp_path / "steering.html").read_text(encoding="utf-8")


def test_what_steering_needs(model: Any, tmp_path: Path) -> None:
    for options, words in (
        ({}, "give prompts and answers"),
        ({"prompts": PROMPTS}, "needs both prompts and answers"),
        ({"prompts": PROMPTS[:3], "answers": "x"}, "needs at least 4"),
        ({"prompts": PROMPTS, "answers": "x", "targets": [1, 2]}, "targets are those of an agent"),
    ):
        with pytest.raises(DtLensError, match=words):
            steer(model, tmp_path / "none", [OTHER], context=16, **options)
