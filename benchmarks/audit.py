"""The claims of the atlas computed again from its committed tables: parts A to D of "What is computed again, and how".

    python benchmarks/audit.py docs/atlas

See ``docs/method_audit.md`` for each statistic, its null and its threshold, written down before the first run.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from dt_lens.statistics.local_linear import beside_neighbours
from dt_lens.statistics.multiplicity import q_values
from dt_lens.statistics.outcomes import mcnemar
from dt_lens.statistics.rank_correlation import at_equal_size

Array = NDArray[Any]
RESAMPLES = 10_000
CONTROLS = 19
NEAR = 25  # random changes nearest in output energy
FIRST, OTHERS, OTHER_MATRIX = 10, 6, "blocks.1.mlp.W_in"
RENOISED = 400
RUNS, ARMS, EPISODES, SPREAD = 1000, 1146, 20, 43.0
MATCHES = {"W_in": "read action_out", "W_out": "write action_out", "OV": "write action_out"}


def costliest(directions: pd.DataFrame, costly: pd.DataFrame) -> None:
    """Part A, 1 to 3: what a selected direction's place among nineteen random changes says."""
    print(f"costliest of 127 beats its own 19, where nothing is special: {127 / (127 + CONTROLS):.3f}")
    chosen_by = directions.set_index(["matrix", "sv"])["damage"]
    ranked = costly.assign(first=chosen_by.loc[list(zip(costly["matrix"], costly["sv"], strict=True))].to_numpy())
    ranked = ranked.sort_values("first", ascending=False)  # as they were picked, not by the fresh episodes
    above = ranked["controls_as_costly"].to_numpy() == 0
    print(f"observed: {above.sum()} of {len(ranked)}, {above[:FIRST].sum()} of the costliest {FIRST}")
    print(f"least q of the {len(ranked)}: {q_values(ranked['rank_p_value']).min():.3f}")
    for name, pools in (("same matrix", _of_matrix(directions)), (f"{NEAR} nearest in size", _near(directions))):
        all_of, first_of = _resampled(directions, pools, np.random.default_rng(0))
        for what, counts, seen in (("all", all_of, above.sum()), (f"top {FIRST}", first_of, above[:FIRST].sum())):
            p = (1 + (counts >= seen).sum()) / (1 + len(counts))
            print(f"resampled, {name}: {what} {counts.mean():.2f} on average, observed {seen}, p = {p:.3f}")


def _of_matrix(directions: pd.DataFrame) -> list[Array]:
    pools = {m: rows["control_damage"].to_numpy() for m, rows in directions.groupby("matrix")}
    return [pools[m] for m in directions["matrix"]]


def _near(directions: pd.DataFrame) -> list[Array]:
    found: dict[int, Array] = {}
    for _, rows in directions.groupby("matrix"):
        size, cost = rows["output_energy"].to_numpy(), rows["control_damage"].to_numpy()
        for at, own in zip(rows.index, size, strict=True):
            found[at] = cost[np.argsort(np.abs(np.log(size / own)), kind="stable")[:NEAR]]
    return [found[at] for at in directions.index]


def _resampled(directions: pd.DataFrame, pools: list[Array], rng: np.random.Generator) -> tuple[Array, Array]:
    """How many of the picked beat their own nineteen, in every resample: of all picked, and of the costliest ten."""
    other = np.flatnonzero((directions["matrix"] == OTHER_MATRIX).to_numpy())
    width = max(len(pool) for pool in pools)
    table = np.array([np.resize(pool, width) for pool in pools])  # pools of one kind have one length but for 127 or 128
    rows, counts = np.arange(len(pools)), []
    for _ in range(RESAMPLES):
        cost = table[rows, rng.integers(0, width, len(pools))]
        order = np.argsort(-cost, kind="stable")[:FIRST]
        more = other[np.argsort(-cost[other], kind="stable")[:OTHERS]]
        picked = np.concatenate([order, np.setdiff1d(more, order)])
        rivals = table[picked[:, None], rng.integers(0, width, (len(picked), CONTROLS))]
        ties = (rivals == cost[picked, None]).sum(1)
        beats = (rivals <= cost[picked, None]).all(1) & (rng.random(len(picked)) < 1 / (1 + ties))
        counts.append((beats.sum(), beats[:FIRST].sum()))
    whole, first = np.array(counts).T
    return whole, first


def beside_one(directions: pd.DataFrame, unit: float) -> None:
    """Part A, 4: every direction against its one random change, at the same seeds."""
    own, other = directions["control_damage"] + directions["beyond"], directions["control_damage"]
    for share in (0.1, 0.5):
        a, b = own > share * unit, other > share * unit
        print(
            f"losses over {share:.0%}: {a.sum()} directions, {b.sum()} random changes; only the direction "
            f"{(a & ~b).sum()}, only the change {(b & ~a).sum()}, McNemar p = {mcnemar(a, b):.2g}"
        )


def reliability(directions: pd.DataFrame) -> None:
    """Part B: how well damage beyond the control repeats, from its standard errors, at equal size."""
    error = (directions["beyond_high"] - directions["beyond_low"]) / 3.92
    rng = np.random.default_rng(0)
    for kind, rows in [("all", directions), *directions.groupby("kind")]:
        value, noise = rows["beyond"].to_numpy(), error[rows.index].to_numpy()
        again = [_equal_rho(value, value + noise * rng.standard_normal(len(value)), rows) for _ in range(RENOISED)]
        c = float(np.mean(again))
        reliable = max(0.0, 2 - 1 / c**2)
        print(
            f"reliability of damage beyond the control, {kind}: c = {c:.3f}, {reliable:.2f}, root {reliable**0.5:.2f}"
        )


def _equal_rho(x: Array, y: Array, rows: pd.DataFrame) -> float:
    """The correlation of ``at_equal_size``, without its permutations."""
    total = np.zeros(3)
    for _, part in rows.reset_index(drop=True).groupby("matrix"):
        order = part["output_energy"].rank(method="first").to_numpy() - 1
        bins = (order * max(1, len(part) // 6)).astype(int) // len(part)
        for b in np.unique(bins):
            mine = part.index.to_numpy()[bins == b]
            u, v = (stats.rankdata(column[mine]) / len(mine) for column in (x, y))
            u, v = u - u.mean(), v - v.mean()
            total += [u @ v, u @ u, v @ v]
    return float(total[0] / np.sqrt(total[1] * total[2]))


def at_equal(directions: pd.DataFrame) -> None:
    """Part C: cosine against damage at equal size, by bins and by the local-linear version."""
    for kind, column in MATCHES.items():
        rows = directions[directions["kind"] == kind]
        for response in ("damage", "beyond"):
            columns = rows[column], rows[response], rows["output_energy"], rows["matrix"]
            for name, found in (("bins", at_equal_size(*columns)), ("local-linear", beside_neighbours(*columns))):
                print(f"{kind} {response}, {name}: {found.rho:+.3f} [{found.low:+.3f}, {found.high:+.3f}] "
                      f"p = {found.p_value:.3f}")  # fmt: skip


def shared_baseline() -> None:
    """Part D: discoveries among arms without effect that share one set of episodes of the unedited agent."""
    rng, counts = np.random.default_rng(0), {"own": [], "shared": []}
    for _ in range(RUNS):
        arms = SPREAD * rng.standard_normal((ARMS, EPISODES))
        for name, rows in (("own", ARMS), ("shared", 1)):
            base = SPREAD * rng.standard_normal((rows, EPISODES))
            p = stats.ttest_1samp(base - arms, 0.0, axis=1).pvalue
            counts[name].append(int((stats.false_discovery_control(p) < 0.05).sum()))
    for name, found in counts.items():
        seen = np.array(found)
        some = seen[seen > 0]
        print(
            f"{name} baseline: any discovery in {(seen > 0).mean():.1%} of {RUNS} runs; "
            f"then {np.median(some):.0f} in the median, {seen.max()} at most; mean {seen.mean():.2f}"
        )


def main(folder: str) -> None:
    """Print everything."""
    directions = pd.read_csv(Path(folder) / "directions.csv")
    unit = float((directions["mean_return"] + directions["damage"]).mean())
    print(f"{len(directions)} directions, unedited {unit:,.0f}")
    costliest(directions, pd.read_csv(Path(folder) / "costly.csv"))
    beside_one(directions, unit)
    reliability(directions)
    at_equal(directions)
    shared_baseline()


if __name__ == "__main__":
    main(*sys.argv[1:])
