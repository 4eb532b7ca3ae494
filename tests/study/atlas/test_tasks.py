"""Atlases of other tasks than episodes, on sweeps made by hand: less may be better, and a model may be anything."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import dt_lens
from dt_lens.behaviour.evaluation import Evaluation
from dt_lens.behaviour.tasks import identity_of
from dt_lens.behaviour.terms import Terms
from dt_lens.behaviour.texts.evaluation import TextEvaluation, terms_of_windows
from dt_lens.errors import DtLensError
from dt_lens.statistics.outcomes import sign_flip
from dt_lens.study.atlas.atlas import make_atlas
from dt_lens.study.atlas.figures import along_the_spectrum
from dt_lens.study.atlas.page import write_atlas
from dt_lens.study.atlas.result import Atlas
from dt_lens.study.atlas.sentences import sentences
from dt_lens.study.labels import tried_on
from dt_lens.svd.weight_svd import WeightSVD
from tests.behaviour.toy import Points, sorter

UNITS = np.arange(12)


class Swept:
    """What ``SweepResults`` gives, of removals of every direction of ``matrices``, each with one control."""

    def __init__(
        self,
        model: Any,
        terms: Terms,
        mean: float,
        cost: Callable[[str, int], float],
        control: float = 0.0,
        number: int = 4,
    ) -> None:
        self.options = {"model": identity_of(model, terms), "baseline": True, "fold_layernorm": True, "seed": 0}
        self.options["task"] = terms.to_dict()
        self.rng, self.terms = np.random.default_rng(0), terms
        self.found, rows, svd = {0: self.arm(mean, ())}, [], WeightSVD(model)
        for name in ("blocks.0.mlp.W_in", "blocks.0.mlp.W_out"):
            for sv in range(number):
                for kind, damage in (("edit", cost(name, sv)), ("control", control)):
                    arm = len(self.found)
                    self.found[arm] = self.arm(
                        mean - terms.sign * damage,
                        ({"matrix": name, "sv": [sv], "value": "zero", "fold_layernorm": True},),
                    )
                    rows.append(self.row(arm, kind, name, sv, float(svd[name].sigma[sv])))
        self.rows = pd.DataFrame(rows).set_index("arm")

    def arm(self, mean: float, edits: tuple[dict[str, Any], ...]) -> Evaluation:
        outcomes = mean + 1e-4 * self.rng.standard_normal(len(UNITS))
        if self.terms.task == "text":
            columns: Mapping[str, Any] = {"loss": outcomes, "kl": 0 * outcomes, "tokens": UNITS}
            return TextEvaluation(self.terms, UNITS, columns, edits=edits)
        return Evaluation(self.terms, UNITS, {"score": outcomes, "wrong": outcomes < -1}, edits=edits)

    def row(self, number: int, kind: str, name: str, sv: int, energy: float) -> dict[str, Any]:
        change = self.found[number].outcomes - self.found[0].outcomes
        row = {"arm": number, "kind": kind, "matrix": name, "layer": int(name.split(".")[1]), "head": pd.NA, "sv": sv}
        row |= {
            "value": "zero",
            "directions": "plain",
            "energy": energy,
            "output_energy": np.nan,
            self.terms.units: len(UNITS),
        }
        row |= {f"mean_{self.terms.outcome}": self.found[number].mean, "difference": change.mean()}
        row |= {"difference_low": change.min(), "difference_high": change.max(), "p_value": sign_flip(change)}
        return row | ({} if self.terms.failure is None else {"failure_rate": float(self.found[number].failed.mean())})

    def evaluations(self, failure: Any = None) -> dict[int, Evaluation]:
        return self.found

    def table(self, failure: Any = None) -> pd.DataFrame:
        return self.rows.astype({"head": "Int64"})

    def controls(self) -> dict[int, list[int]]:
        return {arm: [arm + 1] for arm in self.rows.index[self.rows["kind"] == "edit"]}

    def activations(self) -> None:
        return None


@pytest.fixture(scope="module")
def of_text(make_lm: Callable[..., Any]) -> Atlas:
    """Of W_out a closer match with a token costs more, up to 0.6 nats; of W_in nothing costs anything."""
    model = dt_lens.wrap(make_lm("gpt2"), check=False)
    name = "blocks.0.mlp.W_out"
    cosine = WeightSVD(model).cosines(name, "token_out", side="write").abs().max(axis=1)

    def cost(matrix: str, sv: int) -> float:
        return 0.6 * float(cosine.iloc[sv]) if matrix == name else 0.0

    swept: Any = Swept(model, terms_of_windows("a text", "0a1b", 12), 3.0, cost, 0.02, 15)
    return make_atlas(model, swept)


def test_a_gain_of_loss_is_damage(of_text: Atlas) -> None:
    rows = of_text.directions[of_text.directions["kind"] == "W_out"]
    assert (rows["damage"] > 0.1).all() and rows["damage"].max() <= 0.62
    assert rows["mean_loss"].to_numpy() == pytest.approx(of_text.baseline.mean + rows["damage"].to_numpy())
    assert (rows["damage_low"] < rows["damage"]).all() and (rows["damage"] < rows["damage_high"]).all()
    assert rows[["damage_odd", "damage_even"]].mean(axis=1).to_numpy() == pytest.approx(rows["damage"].to_numpy())
    assert rows["control_damage"].to_numpy() == pytest.approx(0.02, abs=1e-3)
    assert rows["beyond"].to_numpy() == pytest.approx((rows["damage"] - rows["control_damage"]).to_numpy(), abs=1e-9)
    assert (rows["controls_as_costly"] == 0).all()
    others = of_text.directions[of_text.directions["kind"] == "W_in"]
    assert (others["controls_as_costly"] == 1).all() and (others["beyond"] < 0).all()
    assert not {"failure_rate", "mean_length", "control_failure_rate"} & set(of_text.directions)


def test_an_atlas_of_another_edit_says_which(make_lm: Callable[..., Any], tmp_path: Path) -> None:
    model = dt_lens.wrap(make_lm("gpt2"), check=False)
    swept: Any = Swept(model, terms_of_windows("a text", "0a1b", 12), 3.0, lambda matrix, sv: 0.01 * sv, 0.02, 15)
    swept.rows["value"] = "constant"
    atlas = make_atlas(model, swept)  # the only value that the sweep has
    page = write_atlas(atlas, tmp_path).read_text(encoding="utf-8")
    # Of scripts only the figures' titles and legends count; plotly.js has words of its own.
    said = re.sub("<script.*?</script>", "", page, flags=re.DOTALL)
    drawn = " ".join(re.findall(r'"(?:text|name|title)":"([^"]*)"', page))
    assert "What editing each direction leaves" in drawn and "edited, q" in drawn
    assert atlas.value == "constant" and "Editing one singular direction (constant) raises" in said
    assert "A singular vector of every direction was edited (value constant)" in said
    assert not re.search("[Rr]emov(al|ed|ing)", said + drawn)
    swept.rows.loc[swept.rows.index[-2:], "value"] = "flip"
    with pytest.raises(DtLensError, match=r"no edits with value 'zero'; it has constant, flip; name one as value"):
        make_atlas(model, swept)
    assert len(make_atlas(model, swept, value="flip").directions) == 1


def test_a_large_loss_is_what_the_task_says(of_text: Atlas) -> None:
    """0.1 nats per token; a share of the mean loss of 3 would be 0.3."""
    assert of_text.large == 0.1 and np.isnan(of_text.unit)
    shares: Any = of_text.shares.set_index("what")
    damage = of_text.directions.query("kind == 'W_out'")["damage"]
    assert shares.loc["W_out", "large"] == (damage > 0.1).sum() > (damage > 0.3).sum()
    assert shares.loc["all", ["controls_large"]].item() == 0
    text = " ".join(sentences(of_text))
    assert "Removing one singular direction raises the model's loss (q < 0.05) for" in text
    assert f"and more than 0.1 nats per token for **{shares.loc['all', 'large']:.0f}**" in text
    assert "random changes cost more than 0.1 nats per token, and" in text
    assert re.search(r"removal costs \*\*\+0\.\d{4}\*\* nats per token \[\+0\.\d{4}, \+0\.\d{4}\] beyond", text)
    assert "only the direction costs more than 0.5 nats per token" in text


def test_cosine_with_tokens_is_tried_and_predicts_where_that_is_planted(of_text: Atlas) -> None:
    assert of_text.matches == {"W_in": ["read token_out", "read token_in"], "W_out": ["write token_out"]}
    table = of_text.correlations.query("what == kind and response == 'damage at equal size'")
    found = table.set_index(["kind", "embedding"])
    assert found.loc[("W_out", "token_out"), "low"] > 0
    assert found.loc[("W_in", "token_in"), "low"] < 0 < found.loc[("W_in", "token_in"), "high"]
    text = " ".join(sentences(of_text))
    assert "W_out: |cosine| with token_out against damage has rank correlation **+" in text
    assert "W_in: |cosine| with token_in against damage has rank correlation" in text


def test_the_page_is_in_the_words_of_the_task(of_text: Atlas, tmp_path: Path) -> None:
    page = write_atlas(of_text, tmp_path, "a reader").read_text()
    words = re.sub(r"<script.*?</script>|<style.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL)
    assert "windows per direction" in words and of_text.terms.place in words
    assert "for 12 windows, the indices from 0 on" in words and "3.0000 nats per token on average" in words
    assert not re.search(r"\b(return|returns|episodes?|agents?|seeds|environment|failures?)\b", words, re.IGNORECASE)
    drawn = page.replace("\\u003c", "<")
    assert "mean loss" in drawn and "loss gained" in drawn and "return lost" not in drawn
    assert list(pd.read_csv(tmp_path / "directions.csv").filter(like="mean_")) == ["mean_loss"]


def test_controls_are_drawn_where_their_loss_is(of_text: Atlas) -> None:
    """Above the unedited model's: a control that costs 0.02 has a loss of 3.02."""
    figure = along_the_spectrum(of_text.directions, of_text.baseline.mean, of_text.terms)
    heights = np.concatenate([np.asarray(trace.y, float) for trace in figure.data if trace.name == "its control"])
    assert heights == pytest.approx(3.02, abs=1e-3)


def test_a_third_partys_task(tmp_path: Path) -> None:
    model = sorter(steps=0)
    swept: Any = Swept(model, Points().terms, -0.5, lambda name, sv: 0.2 * (sv == 0 and name.endswith("W_in")))
    found = make_atlas(model, swept)
    assert found.matches == {"W_in": ["read class_out", "read point_in"], "W_out": ["write class_out"]}
    assert found.unit == pytest.approx(0.5, abs=1e-3) and found.large == pytest.approx(0.05, abs=1e-4)
    killed = found.directions.query("kind == 'W_in' and sv == 0")
    assert killed["damage"].to_numpy() == pytest.approx(0.2, abs=1e-3) and len(killed) == 1
    assert killed["mean_score"].to_numpy() == pytest.approx(-0.7, abs=1e-3)
    assert found.shares.set_index("what").loc["all", "large"] == 1
    text = " ".join(sentences(found))
    assert "costs the sorter score (q < 0.05) for" in text and "more than 10 % of it for **1**" in text
    page = write_atlas(found, tmp_path).read_text()
    assert "clouds per direction" in page and "more than a quarter of the points sorted wrongly" in page
    with pytest.raises(DtLensError, match="other weights"):
        make_atlas(sorter(seed=1, steps=0), swept)
    swept.found.pop(0)
    with pytest.raises(DtLensError, match="no clouds of the unedited sorter"):
        make_atlas(model, swept)


def test_a_task_that_identifies_models_in_its_own_way_is_asked() -> None:
    class Named(Points):
        def identity(self, model: Any) -> tuple[str, str]:
            return "mine", "mine"

    model = sorter(steps=0)
    swept: Any = Swept(model, Points().terms, -0.5, lambda name, sv: 0.0)
    swept.options["model"] = "mine"
    with pytest.raises(DtLensError, match="other weights"):
        make_atlas(model, swept)
    assert make_atlas(model, swept, task=Named()).planned == 8


def test_what_an_agent_reads_is_tried_on_its_actions_alone(make_dt: Callable[..., Any]) -> None:
    embeddings = make_dt().embeddings
    assert tried_on(embeddings, "read") == tried_on(embeddings, "write") == ["action_out"]


@pytest.mark.parametrize("large", [0.0, -1.0, float("nan"), "much"])
def test_a_large_loss_is_a_number_above_0(large: Any) -> None:
    with pytest.raises(DtLensError, match=r"large is .* it must be a number above 0"):
        dataclasses.replace(terms_of_windows("a text", "0a1b", 12), large=large)
