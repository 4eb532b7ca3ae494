"""A sweep's file that was damaged, or deleted while its sweep ran, is one sentence."""

from __future__ import annotations

import shutil
import sqlite3
import struct
from collections.abc import Callable
from typing import Any

import pytest

from dt_lens.behaviour.sweep.results import SweepResults
from dt_lens.errors import DtLensError

Make = Callable[..., Any]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("DELETE FROM episodes WHERE unit = 3 AND seed = 8", "unit 3 is done and holds 2 of its 3 episodes"),
        ("UPDATE units SET status = 'todo' WHERE unit = 3", "unit 3 is todo and holds 3 of its 3 episodes"),
        ("UPDATE units SET seed = 3 WHERE unit = 1", "units 0 and 1 hold the same seed of one arm"),
        ("UPDATE units SET episodes = 'three' WHERE unit = 1", "unit 1 has no arm, or a seed or a number"),
        ("UPDATE units SET seed = -4 WHERE unit = 1", "unit 1 has no arm, or a seed or a number"),
        ("UPDATE units SET arm = 70 WHERE unit = 1", "unit 1 has no arm"),
        (
            "UPDATE episodes SET length = -1 WHERE unit = 2 AND seed = 4",
            "seed 4 of unit 2 has a length",
        ),
        ("UPDATE episodes SET return = 'much' WHERE unit = 2 AND seed = 4", "the episode with seed 4 of unit 2"),
        ("UPDATE episodes SET terminated = 7 WHERE unit = 2 AND seed = 4", "the episode with seed 4 of unit 2"),
        ("UPDATE episodes SET seed = 99 WHERE unit = 2 AND seed = 4", "unit 2 is done and holds 2 of its 3"),
        ("INSERT INTO episodes SELECT 77, seed, return, length, 0, 1 FROM episodes WHERE unit = 2", "unit 77, which"),
        ("UPDATE arms SET energy = 'big' WHERE arm = 1", "arm 1 is neither"),
        ("UPDATE arms SET kind = 'edid' WHERE arm = 1", "arm 1 is neither"),
        ("UPDATE arms SET of = 0 WHERE kind = 'control'", "arm 2 is neither"),
        (
            "UPDATE episodes SET return = return + 1e-9 WHERE unit = 2 AND seed = 4",
            "outcomes of unit 2 have changed",
        ),
        ("UPDATE units SET arm = 7 - arm WHERE arm IN (3, 4)", "the outcomes of unit 6 have changed"),
        ("UPDATE plan SET options = json_set(options, '$.episodes', 'six')", "its plan or its arms cannot be read"),
        ("UPDATE plan SET options = json_set(options, '$.time_limit', -9)", "its plan or its arms cannot be read"),
    ],
)
def test_a_file_that_makes_no_sense_is_one_sentence(
    finished: Make, make_sweep: Make, remembering: Make, damage: str, said: str
) -> None:
    sweep = finished()
    results = sweep.results
    results.table()
    with sqlite3.connect(sweep.file) as db:
        assert db.execute(damage).rowcount > 0
    db.close()
    for read in (results.table, results.episodes, results.baseline, results.status, lambda: SweepResults(sweep.file)):
        with pytest.raises(DtLensError, match=f"damaged, or not a sweep's file .*{said}.*; move it away"):
            read()
    if "time_limit" not in damage and "$.episodes" not in damage:
        with pytest.raises(DtLensError, match=f"damaged, or not a sweep's file .*{said}.*; move it away"):
            make_sweep(sv="0,1").run(engine=remembering())


def test_one_flipped_bit_of_a_return_is_noticed(finished: Make, make_sweep: Make, remembering: Make) -> None:
    sweep = finished()
    value = float(sweep.episodes()["return"].iloc[4])
    whole = bytearray(sweep.file.read_bytes())
    whole[whole.index(struct.pack(">d", value)) + 1] ^= 0x10
    sweep.file.write_bytes(whole)
    with pytest.raises(DtLensError, match="the outcomes of unit 1 have changed since they were written"):
        SweepResults(sweep.file)
    with pytest.raises(DtLensError, match="the outcomes of unit 1 have changed since they were written"):
        make_sweep(sv="0,1").run(engine=remembering())


def test_a_unit_of_an_older_version_has_no_checksum(finished: Make, make_sweep: Make, remembering: Make) -> None:
    sweep = finished()
    before = sweep.table()
    with sqlite3.connect(sweep.file) as db:
        db.execute("DROP TABLE checksums")
    db.close()
    assert SweepResults(sweep.file).table().equals(before)
    grown = make_sweep(sv="0,1").run(engine=remembering())
    assert len(grown.table()) > len(before)


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_a_file_that_goes_while_its_sweep_runs_is_one_sentence(
    make_sweep: Make, remembering: Make, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    sweep, engine = make_sweep(), remembering()
    waited = 0

    def wait(seconds: float) -> Any:
        nonlocal waited
        waited += 1
        if waited == 4:
            copy = sweep.file.with_name("copy")
            shutil.copy(sweep.file, copy)
            sweep.file.unlink()
            if how == "replaced":
                copy.rename(sweep.file)
        return type(engine).wait(engine, seconds)

    monkeypatch.setattr(engine, "wait", wait)
    with pytest.raises(DtLensError, match=r"sweep\.sqlite was deleted or replaced while its sweep ran"):
        sweep.run(engine=engine)
    assert waited == 4


def test_results_whose_file_goes_are_one_sentence(finished: Make) -> None:
    sweep = finished()
    results = sweep.results
    sweep.file.unlink()
    with pytest.raises(DtLensError, match=r"sweep\.sqlite was moved or deleted meanwhile; open it where it is now\.$"):
        results.table()
    assert not sweep.file.exists()
