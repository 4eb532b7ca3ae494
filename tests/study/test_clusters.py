"""A study of an agent whose states have factors shows which directions sort them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from dt_lens.decision_transformer.facts import RunFacts
from dt_lens.study.study import Study

N = 16
FACTORS = {"row": tuple(i // 4 for i in range(N)), "column": tuple(i % 4 for i in range(N))}
MANY = {"name": tuple("abcdefgh" * 2), "half": tuple("xy" * 8)}


def test_the_report_has_the_clusters(make_dt: Any, tmp_path: Path) -> None:
    agent = make_dt(0, n_layers=1, state_dim=N, act_dim=4, discrete_actions=True, action_tanh=False)
    agent.facts = RunFacts(3, environment="FrozenLake-v1", target_returns=(1.0,), factors={"state_in": FACTORS})
    options: dict[str, Any] = {"units": 2, "edits": 1, "workers": 1, "video": False, "matrices": ["*.W_in"]}
    result = Study(agent, tmp_path / "with", **options).run()
    assert result.clusters is not None and set(result.clusters["factor"]) <= {"row", "column"}
    kept = pd.read_csv(tmp_path / "with" / "clusters.csv")
    pd.testing.assert_series_equal(kept["p_value"], result.clusters["p_value"])
    page = result.report.read_text()
    found = int((result.clusters["q_value"] <= 0.05).sum())
    assert f"<strong>{found} of {len(result.clusters)}</strong> directions sort the labels of state_in" in page
    assert "sv 0 × state_in" in page or "× state_in" in page
    # Factors that cannot be tested, or more panels than a page shows, end no study.
    untestable = replace(agent.facts, factors={"state_in": {"name": tuple(map(str, range(N)))}})
    crowded = replace(agent.facts, factors={"state_in": {"row": (0, 1) * 8, "column": (0,) * 8 + (1,) * 8, **MANY}})
    for number, (facts, said) in enumerate(
        ((untestable, "The factors of the labels were not tested. "), (crowded, ""))
    ):
        agent.facts = facts
        odd = Study(agent, tmp_path / f"odd {number}", **options).run()
        assert said in odd.report.read_text() and "Directions that sort labels" in odd.report.read_text()
    agent.facts = replace(agent.facts, factors=None)
    bare = Study(agent, tmp_path / "without", **options).run()
    assert bare.clusters is None and not (tmp_path / "without" / "clusters.csv").exists()
    assert "sort the labels" not in bare.report.read_text()
