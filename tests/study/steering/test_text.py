"""Steering text: the log probability of an answer, with the loss on other text as what must not rise."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dt_lens.behaviour.evaluate import evaluate
from dt_lens.behaviour.readout import of_task
from dt_lens.behaviour.task import Columns
from dt_lens.behaviour.terms import Terms
from dt_lens.behaviour.texts.prompts import PromptTask
from dt_lens.edits.singular import SingularEdit
from dt_lens.errors import DtLensError
from dt_lens.lens.loading import wrap
from dt_lens.study.steering import steering
from dt_lens.study.steering.page import randoms_figure
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


@pytest.fixture(scope="module")
def planted() -> Any:
    """A language model whose neuron 0 of the last layer answers to ``q`` alone and writes the token of ``x``."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 24, "vocab_size": 260}
    tied = {"tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0}
    theirs = GPT2LMHeadModel(GPT2Config(**sizes, **tied)).eval()
    q = torch.nn.functional.normalize(torch.tensor([1.0, -1.0] * 8), dim=0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        theirs.transformer.wte.weight[ord("q")] += 30 * q
        mlp = theirs.transformer.h[1].mlp
        for norm in (theirs.transformer.h[1].ln_2, theirs.transformer.ln_f):
            norm.weight.fill_(1.0)
            norm.bias.zero_()
        mlp.c_fc.weight[:, 0], mlp.c_fc.bias[0] = 10 * q, -25.0
        mlp.c_proj.weight.mul_(0.1)
        x = theirs.lm_head.weight[ord("x")]
        mlp.c_proj.weight[0] = torch.nn.functional.normalize(x - x.mean(), dim=0)
    return wrap(theirs, tokenizer=Bytes(), check=False)


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


CALM = "The brown dog naps on the warm mat, as ever. "  # without the letter that the planted neuron answers to
ASKED = ["one q", "a fq", "so q", "they q", "wq", "he q", "on q", "oh q"]


def test_a_planted_handle_is_found(planted: Any, tmp_path: Path) -> None:
    """Its doses move the answer and leave other text, where it is silent, alone; 19 random directions do neither."""
    text = {"prompts": ASKED, "answers": "x", "context": 16}
    result = steer(planted, tmp_path, [CALM], candidates=1, doses=(0.0, 2.0), **text)
    n = result.numbers
    assert result.verdict == "found", result.sentence
    assert result.best is not None and (result.best.matrix, result.best.sv) == (W_OUT, 0)
    assert n["read_as_far"] == n["put_as_far"] == 0 and n["read_p_value"] == n["put_p_value"] == 0.05
    assert n["reach_interval"][0] > 1 and abs(n["rise"]) < 0.01
    # Nothing reads the stream behind the last layer: no downstream gain was matched, and it is not said.
    assert n["put_side"] == "write" and n["put_matched"] == "length"
    assert "no later matrix reads what it writes" in result.sentence and "gain" not in result.sentence
    # The axes are the points', not those of an interval of one mean.
    low, high = randoms_figure(result).layout.xaxis.range
    spread = np.ptp(result.randoms[["lowest", "highest"]].to_numpy())
    assert high - low == pytest.approx(1.1 * spread)
    page = (tmp_path / "steering.html").read_text(encoding="utf-8")
    assert "with the same length: no later matrix reads that" in page and "same gain" not in page
    for words in ("failing", "failures", "target", "return", "agent"):
        assert words not in result.sentence and words not in page.partition("<main")[2].partition("<script")[0]
    assert result.curve["guard"][0] == pytest.approx(evaluate(planted, [CALM], context=16).mean)
    kept = [json.loads(file.read_text()) for file in (tmp_path / "arms").glob("*.json")]
    # Nobody reads it, and it costs a second pass.
    measures = [set(file["value"]["task"]["measures"]) for file in kept]
    assert {"loss"} in [found & {"loss", "kl"} for found in measures]
    assert not any("kl" in found for found in measures)


def test_given_directions_are_the_candidates(planted: Any, few_random: None, tmp_path: Path) -> None:
    edits = [SingularEdit(planted, W_OUT, "0-1"), SingularEdit(planted, "blocks.0.attn.OV.1", 2, side="write")]
    text = {"prompts": ASKED, "answers": "x", "context": 16, "doses": (0.0, 2.0)}
    result = steer(planted, tmp_path / "given", [CALM], edits=edits, **text)
    places = result.choosing[["matrix", "sv", "side"]].itertuples(index=False, name=None)
    assert list(places) == [(W_OUT, 0, "write"), (W_OUT, 1, "write"), ("blocks.0.attn.OV.1", 2, "write")]
    assert set(result.choosing["why"]) == {"given"} and result.choosing["cosine"][0] > 0.85
    assert result.best is not None and result.best[:2] == (W_OUT, 0)
    assert "The candidates were given." in (tmp_path / "given" / "steering.html").read_text(encoding="utf-8")
    task = PromptTask.of(planted, ASKED, "x")
    with SingularEdit(planted, W_OUT, 0, value=2.0):
        wanted = task.evaluate(planted, range(4, 8)).mean  # the half that reports
    assert result.table.set_index("dose")["mean"][2.0] == pytest.approx(wanted)
    one = steer(planted, tmp_path / "given", [CALM], edits=edits[0], **text)
    assert one.best == result.best and one.table.equals(result.table)  # by the same rule, from the same files
    for wrong, words in (
        ([SingularEdit(planted, W_OUT, 0, value="zero")], "has the value 'zero'; in steering the dose is the value"),
        ([SingularEdit(planted, "blocks.0.mlp.W_in", 0, fold_layernorm=False)], "make it without --raw"),
        ([edits[0].control()], "holds a Control"),
        (5, "edits holds an int"),
        ([SingularEdit(copy.deepcopy(planted), W_OUT, 0)], "was made of another model"),
        ([], "edits is empty"),
    ):
        with pytest.raises(DtLensError, match=words):
            steer(planted, tmp_path / "none", [CALM], edits=wrong, **text)
    with pytest.raises(DtLensError, match="leave out candidates"):
        steer(planted, tmp_path / "none", [CALM], edits=edits, candidates=3, **text)


def test_a_readout_of_ones_own(few_random: None, tmp_path: Path) -> None:
    readout = of_task(Points(), 6, 4, 0, least=0.01)
    result = steer(sorter(), tmp_path, readout=readout, candidates=1)
    assert result.numbers["least"] == 0.01 and result.numbers["units"] == 6
    with pytest.raises(DtLensError, match="leave out task, units"):
        steer(sorter(), tmp_path, readout=readout, task=Points(), units=6)
    with pytest.raises(DtLensError, match="readout is a str"):
        steer(sorter(), tmp_path, readout="return")


class Centred(Points):
    """Measures something whose mean is 0, and in which nothing fails."""

    large: float | None = None

    @property
    def terms(self) -> Terms:
        return Terms(task="centred", measures={"tilt": "real"}, outcome="tilt", unit="cloud", large=self.large)

    def run(self, model: Any, units: Sequence[int], **_: Any) -> Columns:
        scores = super().run(model, units)["score"]
        return {"tilt": [score * (-1) ** unit for score, unit in zip(scores, units, strict=True)]}


def test_a_task_whose_mean_is_zero_says_what_is_large(few_random: None, tmp_path: Path) -> None:
    task = Centred()
    with pytest.raises(DtLensError, match=r"The unedited mean tilt is .* say in the task's terms .*Terms\(large="):
        steer(sorter(), tmp_path / "none", task, units=6, choosing=4, candidates=1)
    task.large = 0.2
    result = steer(sorter(), tmp_path, task, units=6, choosing=4, candidates=1)
    assert result.numbers["least"] == 0.2 and "Failing has no meaning" in result.sentence
    assert "failure_rate" not in result.table and "rise" not in result.numbers
    assert "failures" not in (tmp_path / "steering.html").read_text(encoding="utf-8").partition("<script")[0]


@pytest.mark.parametrize("start", [None, 257])
def test_the_start_of_a_text_is_there_once(model: Any, monkeypatch: pytest.MonkeyPatch, start: int | None) -> None:
    """A tokenizer may put a token before every text: before the prompt, and not before the answer."""
    monkeypatch.setattr(model.tokenizer, "bos_token_id", start)
    task = PromptTask.of(model, ["one", "two"], ["xy", "z"])
    first = [] if start is None else [start]
    assert [row.tolist() for row in task.tokens] == [[*first, *b"onexy"], [*first, *b"twoz"]]
    assert task.answered == (2, 1) and task.first_tokens == [ord("x"), ord("z")]
    (score, _) = task.evaluate(model, task.units()).outcomes
    with torch.no_grad():
        log_p = model.original(torch.tensor([[*first, *b"onexy"]])).logits[0].double().log_softmax(-1)
    assert score == pytest.approx(float(log_p[-3, ord("x")] + log_p[-2, ord("y")]), rel=1e-9)


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
    assert result.numbers["rise"] > 0.45


def test_a_cost_is_said(planted: Any, few_random: None, tmp_path: Path, monkeypatch: Any) -> None:
    """The planted handle again, with a cost on other text at its largest dose."""
    harm = steering._Search._harm

    def costly(self: Any, edit: Any, arm: Any) -> Any:
        dose = 1.0 if edit is None else edit.to_dict()["value"]
        return harm(self, edit, arm) + (0.5 if dose == 2.0 else 0.0)

    monkeypatch.setattr(steering._Search, "_harm", costly)
    text = {"prompts": ASKED, "answers": "x", "context": 16}
    result = steer(planted, tmp_path, [CALM], candidates=1, doses=(0.0, 2.0), **text)
    assert result.verdict == "moves the log probability at the cost of the loss on other text"
    assert "the loss on other text rises by +0.5" in result.sentence and "is not excluded" not in result.sentence


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
