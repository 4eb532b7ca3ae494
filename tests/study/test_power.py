"""Power: the curves agree with what whole scans find."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from dt_lens import DtLensError, WeightSVD
from dt_lens.statistics.multiplicity import q_values
from dt_lens.study.power import COLUMNS, critical_values, main, needed_cosines, planted_model, power, write_power
from dt_lens.study.power_figure import power_curves


def test_power_rises_with_the_cosine_and_falls_with_labels_and_rows() -> None:
    table = power(d_models=(16, 64), labels=(1, 8), rows=(20, 2000), cosines=np.linspace(0.05, 0.95, 19), trials=200)
    assert list(table.columns) == COLUMNS
    for _, curve in table.groupby(["d_model", "labels", "rows"]):
        found = curve["found"].to_numpy()
        assert (np.diff(found) >= -0.02).all()  # as the same draws serve all cosines
        assert found[0] < 0.05
        assert found[-1] > 0.98
        assert ((curve["low"] <= found) & (found <= curve["high"])).all()
    half = needed_cosines(table).set_index(["d_model", "labels", "rows"])["50%"]
    assert (half.xs(64, level=0) < half.xs(16, level=0)).all()
    assert (half.xs(1, level=1) < half.xs(8, level=1)).all()
    assert (half.xs(20, level=2) < half.xs(2000, level=2)).all()
    again = power(d_models=(16,), labels=(8,), rows=(20,), cosines=[0.6], trials=50, seed=3)
    assert again.equals(power(d_models=(16,), labels=(8,), rows=(20,), cosines=[0.6], trials=50, seed=3))


def test_the_critical_value_is_where_the_step_up_procedure_turns() -> None:
    limits = critical_values(30, 40, alpha=0.2, seed=5)
    rng = np.random.default_rng([5, 30])
    for limit in limits:
        others = rng.random(29)
        for p, wanted in ((limit * 0.999, True), (limit * 1.001, False)):
            assert bool(q_values([p, *others])[0] <= 0.2) is wanted
    # As in theory: a p-value that is uniform too is a discovery at most once in twenty at alpha = 0.05.
    assert critical_values(1000, 200).mean() < 0.05


@pytest.mark.parametrize("cosine", [0.62, 0.69])
def test_whole_scans_find_what_the_curve_says(cosine: float) -> None:
    """Matrices with one planted direction, decomposed and scanned, before and behind the curve's steep part."""
    scans, found = 70, 0
    for seed in range(scans):
        model = planted_model(cosine, d_model=24, labels=3, layers=2, directions=12, seed=seed)
        table = WeightSVD(model).scan(embeddings="planted", draws=1000, seed=seed)
        assert len(table) == 24
        row = table[(table["layer"] == 0) & (table["sv"] == 0)].iloc[0]
        if row["label"] == "label 0":
            assert abs(row["cosine"]) == pytest.approx(cosine, abs=1e-9)
        found += bool(row["q_value"] < 0.05 and row["label"] == "label 0")
    # Every scan has labels of its own; so have the curves.
    curve = [
        power(d_models=(24,), labels=(3,), rows=(24,), cosines=[cosine], trials=100, seed=seed)["found"].iloc[0]
        for seed in range(8)
    ]
    assert np.mean(curve) < 0.3 if cosine < 0.65 else np.mean(curve) > 0.95
    low, high = stats.binomtest(found, scans).proportion_ci(0.999)
    assert low - 0.03 <= np.mean(curve) <= high + 0.03


def test_a_strong_plant_is_found_and_nothing_is_not() -> None:
    strong = WeightSVD(planted_model(0.9, d_model=64, labels=5, directions=16)).scan(draws=1000)
    best = strong.sort_values("p_value").iloc[0]
    assert (best["sv"], best["label"], best["q_value"] < 1e-6) == (0, "label 0", True)
    with pytest.raises(DtLensError, match="from 0 to 1"):
        planted_model(1.2, d_model=8)
    with pytest.raises(DtLensError, match="at most d_model"):
        planted_model(0.5, d_model=8, directions=9)


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), ([], 2), (["--nothing"], 2)])
def test_options_and_bad_arguments_make_no_folder(
    words: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == code
    assert not list(tmp_path.iterdir())


def test_what_is_written(tmp_path: Path) -> None:
    table = power(d_models=(16,), labels=(1,), rows=(20, 50), cosines=[0.2, 0.5, 0.9], trials=40)
    files = {file.name: file for file in write_power(tmp_path / "made", table)}
    assert set(files) == {"power.csv", "power.html", "power.md"}
    assert files["power.csv"].read_text().splitlines()[0] == ",".join(COLUMNS)
    page = files["power.md"].read_text()
    assert "| 16 | 1 | 20 | 0." in page and "in tables of 50 rows" in page
    assert set(re.findall(r"\]\(([^)]+)\)", page)) == {"power.csv", "power.html"}  # what was written beside it
    figure = power_curves(table)
    assert len(figure.data) == 2
    assert list(figure.data[1].x) == [0.2, 0.5, 0.9]
    assert "50 rows" in figure.layout.title.subtitle.text
    with pytest.raises(DtLensError, match="cannot be written"):
        (tmp_path / "file").write_text("")
        write_power(tmp_path / "file", table)
