"""Atlases of sweeps with scripted outcomes, so that the right answers are known."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import dt_lens
from dt_lens.behaviour.sweep.plan import Arm
from dt_lens.behaviour.sweep.sweep import Sweep
from dt_lens.cli.app import app
from dt_lens.errors import DtLensError
from dt_lens.study.atlas.atlas import make_atlas
from dt_lens.study.atlas.page import write_atlas
from dt_lens.study.atlas.result import Atlas
from dt_lens.study.atlas.sentences import sentences
from dt_lens.study.atlas.tables import MatchColumn, correlations_of
from dt_lens.svd.weight_svd import WeightSVD


@pytest.fixture(scope="module")
def planted(agent: Any, scripted: Any, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """W_out hurts more the closer it matches the action output; of W_in only the first direction kills."""
    sweep = Sweep(
        agent,
        tmp_path_factory.mktemp("planted"),
        matrices=["*.W_in", "*.W_out"],
        sv="all",
        edits="zero",
        controls=2,
        episodes=12,
        block_size=6,
        workers=1,
    )
    svd = WeightSVD(agent)
    cosine = {
        name: svd.cosines(name, "action_out", side="write").abs().max(axis=1).to_numpy()
        for name in dict.fromkeys(arm.matrix for arm in sweep.plan.arms if arm.matrix)
        if name.endswith("W_out")
    }
    energies = {name: svd[name].sigma.tolist() for name in cosine}

    def lost(arm: Arm) -> float:
        if arm.kind != "edit":
            return 0.0
        assert arm.matrix is not None
        assert arm.sv is not None
        if arm.matrix in cosine:
            return float(100 * cosine[arm.matrix][arm.sv] * energies[arm.matrix][arm.sv])
        return 900.0 if arm.sv == 0 else 0.0

    sweep.run(engine=scripted(sweep, lost))
    return sweep


@pytest.fixture(scope="module")
def atlas(agent: Any, planted: Sweep) -> Atlas:
    return make_atlas(agent, planted.results)


def correlation(atlas: Atlas, what: str, side: str, embedding: str, response: str) -> Any:
    table = atlas.correlations
    wanted = {"what": what, "side": side, "embedding": embedding, "response": response}
    (row,) = table[(table[list(wanted)] == list(wanted.values())).all(axis=1)].to_dict("records")
    return row


def test_an_atlas_is_printed_in_a_few_lines(atlas: Atlas) -> None:
    text, page = repr(atlas), atlas._repr_html_()
    assert text.startswith("Atlas of Pendulum-v1") and len(text.splitlines()) < 8
    assert f"{len(atlas.directions)} of {atlas.planned} directions" in text
    assert f"{int((atlas.directions['q_value'] < 0.05).sum())} directions with q < 0.05" in text
    assert atlas.shares["worst"].iloc[0] in page


def test_a_row_for_each_direction_with_what_its_removal_did(atlas: Atlas, agent: Any) -> None:
    table = atlas.directions
    assert len(table) == atlas.planned == 15 * 2 + 16 * 2
    assert not table.duplicated(["matrix", "sv"]).any()
    assert table["energy"].to_numpy() == pytest.approx(_energies(agent, table), rel=1e-6)
    killed = table[(table["kind"] == "W_in") & (table["sv"] == 0)]
    assert killed["damage"].to_numpy() == pytest.approx(900, abs=3)
    assert (killed["damage_low"] > 890).all()
    assert (killed["q_value"] < 0.05).all()
    assert (killed["beyond_p_value"] < 0.05).all()
    assert killed["beyond"].to_numpy() == pytest.approx(900, abs=3)
    assert killed["control_damage"].to_numpy() == pytest.approx(0, abs=3)
    assert table["damage_per_energy"].to_numpy() == pytest.approx((table["damage"] / table["energy"]).to_numpy())


def _energies(agent: Any, table: pd.DataFrame) -> Any:
    from dt_lens.edits.singular import SingularEdit

    return [
        SingularEdit(agent, m, int(sv), value="zero").energy for m, sv in zip(table["matrix"], table["sv"], strict=True)
    ]


def test_cosine_predicts_damage_only_where_that_is_planted(atlas: Atlas) -> None:
    found = correlation(atlas, "W_out", "write", "action_out", "damage")
    assert found["low"] > 0
    assert found["q_value"] < 0.05
    assert found["n"] == 32
    held = correlation(atlas, "W_out", "write", "action_out", "damage at equal size")
    assert held["low"] > 0
    assert held["q_value"] < 0.05
    beyond = correlation(atlas, "W_out", "write", "action_out", "beyond")
    assert beyond["rho"] > 0.5
    other = correlation(atlas, "W_in", "read", "action_out", "damage")
    assert abs(other["rho"]) < 0.5
    # This is exactly what is planted; it is shown, and not tested.
    per = correlation(atlas, "W_out", "write", "action_out", "damage_per_energy")
    assert per["rho"] > 0.95
    assert np.isnan(per["p_value"])
    assert np.isnan(per["q_value"])
    assert set(atlas.untrained) == {"state_out", "reward_out"}
    text = " ".join(sentences(atlas))
    assert "W_out: |cosine| with action_out against damage has rank correlation **+" in text
    assert "a closer match goes with more damage" in text


def test_an_interval_beside_zero_that_is_no_discovery_is_not_called_a_relation(atlas: Atlas) -> None:
    table = atlas.correlations.copy()
    table.loc[(table["what"] == "W_out") & (table["response"] == "damage at equal size"), "q_value"] = 0.24
    text = " ".join(sentences(dataclasses.replace(atlas, correlations=table)))
    said = text[text.index("W_out: |cosine| with action_out") :]
    assert "a closer match goes with more damage. Among" in said
    assert "not decided, since among all tests of the table it is no discovery (q = 0.24)" in said
    table[["low", "high", "q_value"]] = np.nan
    text = " ".join(sentences(dataclasses.replace(atlas, correlations=table)))
    assert "too few directions to say" in text and "no discovery" not in text


def test_what_a_removal_costs_beyond_its_control_is_tested_over_directions(atlas: Atlas) -> None:
    """A pair is a direction with its control, not an episode."""
    shares: Any = atlas.shares.set_index("what")
    beyond = atlas.directions.query("kind == 'W_out'")["beyond"]
    assert shares.loc["W_out", "beyond"] == pytest.approx(beyond.mean())
    assert shares.loc["W_out", "beyond_low"] > 0
    assert shares.loc["W_out", "beyond_p_value"] < 0.01
    # Two of thirty kill, and the others do nothing.
    assert shares.loc["W_in", "beyond"] == pytest.approx(60, abs=2)
    assert "beyond a random change (p =" in " ".join(sentences(atlas))


def test_damage_from_energy_alone_is_not_predicted_by_cosine(agent: Any, scripted: Any, tmp_path: Path) -> None:
    """If damage is energy alone, sigma predicts it, and cosine at equal energy does not."""
    sweep = Sweep(agent, tmp_path, matrices="*.W_out", sv="all", edits="zero", episodes=8, workers=1)
    svd = WeightSVD(agent)

    def lost(arm: Arm) -> float:
        sigma = 0.0 if arm.matrix is None else float(svd[arm.matrix].sigma[arm.sv or 0])
        return 50 * sigma + 5 * float(np.random.default_rng(arm.number).normal())

    sweep.run(engine=scripted(sweep, lost))
    found = make_atlas(agent, sweep.results)
    (sigma,) = found.predictors.query("what == 'W_out' and predictor == 'sigma'")["rho"].tolist()
    assert sigma > 0.9
    held = correlation(found, "W_out", "write", "action_out", "damage at equal size")
    assert held["low"] < 0 < held["high"]
    assert held["p_value"] > 0.05
    assert found.directions["beyond"].isna().all()
    assert np.isnan(found.shares["beyond"]).all()


def test_an_effect_of_size_is_not_an_effect_of_the_match() -> None:
    """A large direction may cost more than its control, and match better, because of its size alone."""
    rng, size = np.random.default_rng(0), np.linspace(1, 5, 120)
    rows = pd.DataFrame({"matrix": "blocks.0.mlp.W_in", "kind": "W_in", "energy": size, "damage": size})
    rows["beyond"] = size + 0.3 * rng.standard_normal(120)
    rows["damage_per_energy"] = 1.0
    rows["by size"] = size + 0.3 * rng.standard_normal(120)
    rows["by itself"] = rows["beyond"] - size
    columns = [MatchColumn(name, "read", name) for name in ("by size", "by itself")]
    table = correlations_of(rows, columns, 0).query("what == 'W_in'").set_index(["embedding", "response"])
    assert table["low"]["by size", "beyond"] > 0.5
    assert table["low"]["by size", "beyond at equal size"] < 0 < table["high"]["by size", "beyond at equal size"]
    assert table["low"]["by itself", "beyond at equal size"] > 0.5


def test_which_sigma_predicts_the_damage_of_its_own_directions(agent: Any, scripted: Any, tmp_path: Path) -> None:
    """Planted: damage is the output on real inputs, which only the activation-aware sigma is."""
    activations = dt_lens.collect_activations(agent, episodes=2, max_steps=10)
    options: dict[str, Any] = {"matrices": "*.W_in", "sv": "all", "edits": "zero", "episodes": 6, "workers": 1}
    aware = WeightSVD(agent, activations=activations)

    def lost(arm: Arm) -> float:
        if arm.matrix is None or arm.sv is None:
            return 0.0
        if arm.directions == "plain":
            return float(50 * np.random.default_rng(arm.number).random())
        return float(50 * aware[arm.matrix].sigma[arm.sv])

    Sweep(agent, tmp_path, **options).run(engine=scripted(plain := Sweep(agent, tmp_path, **options), lost))
    before = make_atlas(agent, plain.results)
    assert before.weighted.empty
    assert not before.predictors["predictor"].str.contains("aware").any()
    sweep = Sweep(agent, tmp_path, directions="activation", activations=activations, **options)
    sweep.run(engine=scripted(sweep, lost))
    found = make_atlas(agent, sweep.results)
    pd.testing.assert_frame_equal(
        found.directions[before.directions.columns.drop("output_energy", errors="ignore")],
        before.directions.drop(columns="output_energy", errors="ignore"),
    )
    sigmas = [float(aware[m].sigma[sv]) for m, sv in zip(found.weighted["matrix"], found.weighted["sv"], strict=True)]
    assert found.weighted["sigma"].to_numpy() == pytest.approx(sigmas)
    known = found.predictors.query("what == 'W_in'").set_index("predictor")
    assert known.loc["activation-aware sigma", "rho"] > 0.9
    assert abs(known.loc["plain sigma", "rho"]) < 0.6
    assert known.loc["activation-aware minus plain", "low"] > 0
    assert "the second predicts better" in " ".join(sentences(found))
    write_atlas(found, tmp_path / "page")
    assert len(pd.read_csv(tmp_path / "page" / "weighted.csv")) == len(found.weighted)
    sweep.file.with_name("activations.safetensors").unlink()
    with pytest.raises(DtLensError, match="which are not in its folder; give their file"):
        make_atlas(agent, sweep.results)
    assert len(make_atlas(agent, sweep.results, activations).weighted) == len(found.weighted)
    only = Sweep(agent, tmp_path / "only", directions="activation", activations=activations, **options)
    only.run(engine=scripted(only, lost))
    with pytest.raises(DtLensError, match="holds no plain directions; it has activation directions"):
        make_atlas(agent, only.results)


def test_shares_count_the_directions_that_hurt(atlas: Atlas) -> None:
    shares: Any = atlas.shares.set_index("what")
    assert shares.loc["W_in", "large"] == 2
    assert shares.loc["W_in", "worst_damage"] == pytest.approx(900, abs=3)
    assert shares.loc["W_in", "directions"] == 30
    by_hand = atlas.directions.query("kind == 'W_out' and q_value < 0.05 and damage > 0")
    assert shares.loc["W_out", "hurts"] == len(by_hand)
    assert shares.loc["all", "controlled"] == atlas.planned
    assert shares.loc["all", "controls"] == 2 * atlas.planned
    assert shares.loc["all", "controls_large"] == 0
    # By size alone, whatever q, as for controls.
    assert shares.loc["W_in", "controlled_large"] == 2
    assert shares.loc["blocks.0.mlp.W_in", "hurts"] <= shares.loc["W_in", "hurts"]


def test_an_unfinished_halving_sweep_has_an_atlas_too(agent: Any, scripted: Any, tmp_path: Path) -> None:
    """Directions that are not decided have no p-value yet."""
    options: dict[str, Any] = {"matrices": "*.0.mlp.W_out", "sv": "0-9", "edits": "zero", "workers": 1}
    sweep = Sweep(agent, tmp_path, episodes=8, halving=[2, 2], **options)

    with pytest.raises(KeyboardInterrupt):
        sweep.run(engine=scripted(sweep, lambda arm: float(arm.sv or 0), stops=5))
    found = make_atlas(agent, sweep.results)
    assert found.directions["q_value"].isna().all()
    assert sentences(found)


def test_an_unfinished_sweep_says_so(agent: Any, scripted: Any, tmp_path: Path) -> None:
    sweep = Sweep(agent, tmp_path, matrices="*.0.mlp.W_out", sv="0-9", edits="zero", episodes=4, workers=1)

    with pytest.raises(KeyboardInterrupt):
        sweep.run(engine=scripted(sweep, lambda arm: float(arm.sv or 0), stops=7))
    found = make_atlas(agent, sweep.results)
    assert 5 <= len(found.directions) < found.planned == 10
    assert f"{len(found.directions)} of 10 directions are measured" in sentences(found)[-1]


def test_bad_input_is_one_sentence(agent: Any, scripted: Any, planted: Sweep, tmp_path: Path) -> None:
    options: dict[str, Any] = {"matrices": "*.0.mlp.W_out", "sv": 0, "episodes": 2, "workers": 1}
    flips = Sweep(agent, tmp_path / "flips", value="flip,random", **options)
    flips.run(engine=scripted(flips, lambda arm: 1.0))
    with pytest.raises(DtLensError, match="holds no edits with value 'zero'; it has flip, random"):
        make_atlas(agent, flips.results)
    with pytest.raises(DtLensError, match="make_atlas takes the results of a sweep, not a str"):
        make_atlas(agent, "flips")  # type: ignore[arg-type]
    alone = Sweep(agent, tmp_path / "alone", edits="zero", baseline=False, **options)
    alone.run(engine=scripted(alone, lambda arm: 1.0))
    with pytest.raises(DtLensError, match="no episodes of the unedited agent"):
        make_atlas(agent, alone.results)
    weight = agent.weights["blocks.0.mlp.W_in"]
    kept = weight.clone()
    try:
        weight.mul_(2)
        with pytest.raises(DtLensError, match="other weights"):
            make_atlas(agent, planted.results)
    finally:
        weight.copy_(kept)


def test_the_page_and_the_tables(atlas: Atlas, tmp_path: Path) -> None:
    page = write_atlas(atlas, tmp_path, "a <small> agent", "dt-lens atlas it").read_text()
    assert "An atlas of a &lt;small&gt; agent" in page
    assert "dt-lens atlas it" in page
    for title in ("Does what a direction matches predict what it does?", "What removing each direction leaves"):
        assert title in page
    assert "How many directions matter" in page and "Does size predict what a direction does?" in page
    kept = pd.read_csv(tmp_path / "directions.csv")
    assert len(kept) == len(atlas.directions)
    assert kept["damage"].to_numpy() == pytest.approx(atlas.directions["damage"].to_numpy(), rel=1e-4)
    tests = atlas.correlations.query("what == kind and response != 'damage_per_energy'")
    sure = tests[tests["q_value"] < 0.05]["response"].value_counts()
    assert f"{len(tests)} tests of kinds" in page
    assert f"{sure['damage']} with damage as it is" in page
    assert f"{sure['damage at equal size']} among directions of equal size" in page
    assert f"{sure.get('beyond at equal size', 0)} with that among directions of equal size" in page
    assert "Bonett and Wright" in page
    for name in ("correlations", "shares", "reliability", "predictors"):
        assert (tmp_path / f"{name}.csv").is_file()
    (tmp_path / "file").write_text("")
    with pytest.raises(DtLensError, match="cannot be written"):
        write_atlas(atlas, tmp_path / "file" / "x")


def test_removals_without_any_effect_are_said_and_not_drawn(atlas: Atlas, tmp_path: Path) -> None:
    flat = dataclasses.replace(atlas, directions=atlas.directions.assign(damage=0.0))
    assert sentences(flat)[0].startswith("**Nothing changed**: no removal of")
    assert "How many directions matter?" not in write_atlas(flat, tmp_path).read_text()


def test_the_command(folder: Path, planted: Sweep, tmp_path: Path) -> None:
    run = CliRunner().invoke(
        app, ["atlas", str(folder), "--sweep", str(planted.file.parent), "--out", str(tmp_path / "atlas")]
    )
    assert run.exit_code == 0, run.output
    assert "Removing one singular direction costs the agent return" in run.output
    assert (tmp_path / "atlas" / "atlas.html").is_file()
    missing = CliRunner().invoke(app, ["atlas", str(folder), "--sweep", str(tmp_path / "none")])
    assert isinstance(missing.exception, DtLensError)
