"""Successive halving: which edits are promoted, what their numbers mean, and that the null is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from dt_lens.behaviour.sweep.halving import halving_state, parse_halving, rungs_of
from dt_lens.errors import DtLensError
from dt_lens.statistics.multiplicity import q_values
from dt_lens.statistics.outcomes import sign_flip

Make = Callable[..., Any]
same = pd.testing.assert_frame_equal

HALVING: dict[str, Any] = {"matrices": "*.mlp.*", "sv": "0,1", "controls": 1, "episodes": 5, "halving": "2,3"}


def identical(one: Any, other: Any) -> None:
    same(one.table(), other.table(), check_exact=True)
    same(one.episodes(), other.episodes(), check_exact=True)


def differences(*rows: list[float]) -> dict[int, dict[int, float]]:
    return {arm: dict(enumerate(row)) for arm, row in enumerate(rows)}


def test_which_edits_are_promoted() -> None:
    rungs = [range(2), range(2, 3), range(3, 9)]
    found = halving_state(rungs, differences([1, 1], [-9, -9], [2, 2], [0, -30], [3, -3]), {})
    assert (found.rung, found.stopped) == (1, {0, 4})
    assert found.reached == {0: 0, 1: 1, 2: 1, 3: 1, 4: 0}  # the mean counts, whichever its sign: 9, 2 and 15
    found = halving_state(rungs, differences([1, 1], [-9, -9, 30], [2, 2, 2], [0, -30, 1], [3, -3]), {})
    assert (found.rung, found.stopped) == (2, {0, 4, 2})  # 4, 2 and 9.67 over all three
    assert [arm for arm, rung in found.reached.items() if rung == 2] == [1, 3]
    assert halving_state(rungs, differences([5, 5], [5, 5], [5]), {}).rung == 0  # not yet
    given_up = halving_state(rungs, differences([5, 5], [5, 5], [5]), {2: {1}})
    assert (given_up.rung, given_up.stopped) == (1, {1, 2})  # of equals the earlier one; who cannot be run is stopped
    assert halving_state(rungs, differences([1, 1], [float("nan"), 1]), {}).stopped == {1}
    assert halving_state(rungs, {}, {}).rung == 2
    assert halving_state([range(5)], differences([1], [2]), {}).stopped == frozenset()


@pytest.mark.parametrize("halving", ["", "4,", "a", [0], [1.5], "-1", [None], {}])
def test_a_halving_that_is_not_valid(halving: Any, make_sweep: Make) -> None:
    with pytest.raises(DtLensError, match="it must be the number of units of each rung before the last, such as 4,8"):
        parse_halving(halving)
    with pytest.raises(DtLensError, match="needs the baseline"):
        make_sweep(halving=2, baseline=False)


def test_a_sweep_by_halves(make_sweep: Make, remembering: Make, tmp_path: Path) -> None:
    sweep = make_sweep(**HALVING).run(engine=remembering(3))
    full = make_sweep(tmp_path / "full", **HALVING | {"episodes": 10, "halving": None}).run(engine=remembering(3))
    rungs = rungs_of(sweep.results.options)
    assert rungs == [range(3, 5), range(5, 8), range(8, 13)]
    table, episodes, everything = sweep.table(), sweep.episodes(), full.episodes()
    assert list(table.index) == list(full.table().index)
    # Every episode that was run is that of the full sweep.
    merged = episodes.merge(everything, on=["arm", "seed"], suffixes=("", " of all"))
    assert len(merged) == len(episodes) and (merged["return"] == merged["return of all"]).all()

    edits = table[table["kind"] == "edit"]
    assert list(edits["rung"].value_counts().sort_index()) == [4, 2, 2]
    returns = everything.pivot(index="seed", columns="arm", values="return")
    effect = returns.sub(returns[0], axis=0).drop(columns=0)
    first = effect.loc[3:4, edits.index].mean().abs().nlargest(4).index
    second = effect.loc[3:7, first].mean().abs().nlargest(2).index
    assert set(edits.index[edits["rung"] == 2]) == set(second)
    assert set(edits.index[edits["rung"] == 1]) == set(first) - set(second)
    for arm, row in table.iterrows():
        rung = edits.loc[arm if row["kind"] == "edit" else row["of"], "rung"]
        if row["kind"] == "control" and rung < 2:
            assert row["episodes"] == 0 and np.isnan(row["p_value"])
            continue
        seeds = rungs[2] if rung == 2 else range(3, rungs[rung].stop)
        assert row["episodes"] == len(seeds)
        assert row["difference"] == pytest.approx(effect.loc[list(seeds), arm].mean())
        assert row["p_value"] == (sign_flip(effect.loc[list(seeds), arm]) if rung == 2 else 1.0)
    assert list(edits["q_value"]) == list(q_values(edits["p_value"]))


def test_a_sweep_by_halves_grows(make_sweep: Make, finished: Make, remembering: Make, tmp_path: Path) -> None:
    """With more edits others may be in the better half; the table is still that of the larger sweep."""
    larger = HALVING | {"edits": "zero,flip", "controls": 2, "episodes": 7}
    whole = make_sweep(tmp_path / "whole", **larger).run(engine=remembering(2))
    small = finished(tmp_path / "grown", **HALVING)
    before = small.episodes().drop(columns=["arm", "of"])
    grown = make_sweep(tmp_path / "grown", **larger).run(engine=remembering(2, seed=1))
    same(grown.table(), whole.table(), check_exact=True)
    assert len(before.merge(grown.episodes().drop(columns=["arm", "of"]))) == len(before)
    with pytest.raises(DtLensError, match=r"its halving is \[2, 3\] and this one's \[3\]"):
        make_sweep(tmp_path / "grown", **HALVING | {"halving": 3}).run(engine=remembering())


def test_a_stopped_sweep_by_halves_resumes(make_sweep: Make, finished: Make, interrupted: Make, tmp_path: Path) -> None:
    whole = finished(tmp_path / "whole", **HALVING)
    sweep = make_sweep(tmp_path / "stopped", **HALVING)
    texts: list[str] = []
    shares: list[float] = []
    for _ in range(20):
        try:
            sweep.run(lambda what, share: (texts.append(what), shares.append(share)), engine=interrupted(5, 2))
            break
        except KeyboardInterrupt:
            undecided = sweep.table()
            standing = undecided["rung"] < 2
            assert set(undecided.loc[standing, "p_value"].dropna()) <= {1.0}
    identical(sweep, whole)
    assert texts[0].startswith("rung 1 of 3: 0 of ") and texts[-1].startswith("rung 3 of 3: ")
    assert shares[-1] == 1.0 and max(shares[:-1]) <= 1.0


def discoveries(rng: np.random.Generator, shift: float, arms: int = 24) -> tuple[bool, bool, float, float]:
    """One sweep of edits that shift the return by ``shift``: is anything discovered, from fresh episodes and naively?

    Also the mean estimate of the edits that reached the last rung, from fresh episodes and from all.
    """
    rungs = [range(4), range(4, 12), range(12, 24)]
    # Episodes of the unedited agent are shared by all edits, as in a sweep.
    data = shift + rng.standard_normal((arms, 24)) - 0.5 * rng.standard_normal(24)
    measured = {arm: dict(enumerate(row)) for arm, row in enumerate(data)}
    found = halving_state(rungs, measured, {})
    ends = [arm for arm in range(arms) if found.reached[arm] == 2]
    p = np.ones(arms)
    p[ends] = [sign_flip(data[arm, 12:], resamples=500) for arm in ends]
    naive = [sign_flip(data[arm], resamples=500) for arm in ends]
    estimates = float(np.abs(data[ends, 12:].mean(1)).mean()), float(np.abs(data[ends].mean(1)).mean())
    return bool((q_values(p) <= 0.05).any()), bool((q_values(naive) <= 0.05).any()), *estimates


def test_the_null_gives_few_discoveries() -> None:
    """Under a true null at most 5 % of sweeps discover anything; with the episodes of the selection more do."""
    rng, sweeps = np.random.default_rng(0), 400
    drawn = [discoveries(rng, 0.0) for _ in range(sweeps)]
    right, naive = (sum(row[i] for row in drawn) for i in (0, 1))
    assert binomtest(right, sweeps, 0.05, alternative="greater").pvalue > 0.01
    assert binomtest(naive, sweeps, 0.05, alternative="greater").pvalue < 1e-6
    # The selection biases a survivor's estimate from all episodes away from zero.
    assert np.mean([row[3] for row in drawn]) > 1.1 * np.mean([row[2] for row in drawn]) / np.sqrt(2)


def test_a_real_effect_is_found() -> None:
    rng = np.random.default_rng(1)
    assert np.mean([discoveries(rng, 1.5)[0] for _ in range(40)]) > 0.9
