"""A file grows: nothing that is finished is lost or run again, and the table is that of the larger sweep."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from dt_lens.behaviour.sweep.plan import identity_of
from dt_lens.behaviour.sweep.schema import read_arms
from dt_lens.behaviour.sweep.store import FILE

Make = Callable[..., Any]
same = pd.testing.assert_frame_equal


def identical(one: Any, other: Any) -> None:
    same(one.table(), other.table(), check_exact=True)
    same(one.episodes(), other.episodes(), check_exact=True)
    assert one.results.options["sv"] == other.results.options["sv"]


def done(file: Path) -> dict[tuple[str, int], list[tuple[Any, ...]]]:
    """The outcomes of each finished block, by its arm's identity and its first seed."""
    with closing(sqlite3.connect(file)) as db:
        identities = {arm.number: identity_of(arm.record) for arm in read_arms(db)}
        blocks = db.execute("SELECT block, arm, first FROM blocks WHERE status = 'done'").fetchall()
        return {
            (identities[arm], first): db.execute("SELECT * FROM outcomes WHERE block = ?", (block,)).fetchall()
            for block, arm, first in blocks
        }


def runs_per_block(file: Path) -> set[int]:
    """How often blocks were finished; none was begun again afterwards."""
    with closing(sqlite3.connect(file)) as db:
        assert set(dict(db.execute("SELECT block, result FROM runs ORDER BY run")).values()) == {"done"}
        return {count for (count,) in db.execute("SELECT count(*) FROM runs WHERE result = 'done' GROUP BY block")}


SMALL = {"matrices": ["*.0.mlp.W_in"], "sv": 1, "edits": "zero", "controls": 0, "episodes": 4}
LARGER: list[dict[str, Any]] = [
    {"controls": 2, "block_size": 2},
    {"matrices": ["*.0.mlp.W_*", "*.1.attn.OV.1"], "edits": "constant,zero"},
    {"sv": "0,1,-1", "edits": "flip,zero", "controls": 1, "episodes": 11},
]


@pytest.mark.parametrize("more", LARGER)
def test_a_grown_sweep_is_the_larger_one(
    make_sweep: Make, remembering: Make, tmp_path: Path, more: dict[str, Any]
) -> None:
    larger = {**SMALL, **more}
    whole = make_sweep(tmp_path / "whole", **larger).run(engine=remembering(2))
    small = make_sweep(**SMALL).run(engine=remembering())
    before = done(small.file)
    grown = make_sweep(**larger).run(engine=remembering(3, seed=1))
    identical(grown, whole)
    assert before.items() <= done(grown.file).items()
    assert runs_per_block(grown.file) == {1}
    assert [file.name for file in tmp_path.glob("*.sqlite*")] == [FILE]
    of = grown.table().query("kind == 'control'")
    assert (of["of"] == of.index - 1 - (of["control"] - 3)).all()  # each edit is followed by its controls


def test_it_grows_in_the_middle_of_its_work(
    make_sweep: Make, remembering: Make, interrupted: Make, tmp_path: Path
) -> None:
    larger = {"sv": "0,1", "controls": 2, "episodes": 8, "block_size": 3}
    whole = make_sweep(tmp_path / "whole", **larger).run(engine=remembering(2))
    with pytest.raises(KeyboardInterrupt, match="Stopped with 3 of 14 blocks"):
        make_sweep().run(engine=interrupted(4))
    with pytest.raises(KeyboardInterrupt, match="Stopped with 6 of 57 blocks"):
        make_sweep(**larger).run(engine=interrupted(4))
    grown = make_sweep(**larger).run(engine=remembering(2))
    identical(grown, whole)
    assert runs_per_block(grown.file) == {1}


def test_arms_that_are_no_longer_named_stay(make_sweep: Make, remembering: Make, tmp_path: Path) -> None:
    """A run with fewer arms or episodes removes nothing, and runs nothing else."""
    both = {"matrices": "*.mlp.W_in", "edits": "zero,flip", "sv": "0,1", "controls": 1}
    whole = make_sweep(tmp_path / "whole", **both).run(engine=remembering(2))
    first = make_sweep(**both | {"edits": "zero", "matrices": "*.0.mlp.W_in"}).run(engine=remembering())
    before = done(first.file)
    other = make_sweep(**both | {"edits": "flip", "sv": 1, "episodes": 3, "baseline": False}).run(engine=remembering())
    assert before.items() <= done(other.file).items()
    table = other.table()
    assert list(table["episodes"]) == [6, 6, 3, 3, 6, 6, 3, 3]
    assert table.loc[table["value"] == "flip", "difference"].notna().all()
    again = make_sweep(**both | {"edits": "zero", "matrices": "*.0.mlp.W_in", "sv": 0}).run(engine=remembering())
    assert list(again.table()["episodes"]) == [6, 6, 6, 6, 3, 3, 3, 3]  # 6 episodes, but not of the other arms
    identical(make_sweep(**both).run(engine=remembering()), whole)


def test_a_baseline_can_come_later(make_sweep: Make, remembering: Make, tmp_path: Path) -> None:
    whole = make_sweep(tmp_path / "whole").run(engine=remembering())
    without = make_sweep(baseline=False).run(engine=remembering())
    assert without.results.baseline() is None
    identical(make_sweep().run(engine=remembering()), whole)
