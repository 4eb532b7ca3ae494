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
        ("DELETE FROM outcomes WHERE block = 3 AND unit = 8", "block 3 is done and holds 2 of its 3 episodes"),
        ("UPDATE blocks SET status = 'todo' WHERE block = 3", "block 3 is todo and holds 3 of its 3 episodes"),
        ("UPDATE blocks SET first = 3 WHERE block = 1", "blocks 0 and 1 hold the same episode of one arm"),
        ("UPDATE blocks SET count = 'three' WHERE block = 1", "block 1 has no arm, or a first episode or a number"),
        ("UPDATE blocks SET first = -4 WHERE block = 1", "block 1 has no arm, or a first episode or a number"),
        ("UPDATE blocks SET arm = 70 WHERE block = 1", "block 1 has no arm"),
        (
            "UPDATE outcomes SET length = -1 WHERE block = 2 AND unit = 4",
            "seed 4 of block 2 has a value of length that cannot be",
        ),
        (
            "UPDATE outcomes SET return = 'much' WHERE block = 2 AND unit = 4",
            "the episode with seed 4 of block 2 .* return",
        ),
        ("UPDATE outcomes SET terminated = 7 WHERE block = 2 AND unit = 4", "the episode with seed 4 of block 2"),
        ("UPDATE outcomes SET unit = 99 WHERE block = 2 AND unit = 4", "block 2 is done and holds 2 of its 3"),
        ("INSERT INTO outcomes SELECT 77, unit, return, length, 0, 1 FROM outcomes WHERE block = 2", "block 77, which"),
        ("UPDATE arms SET energy = 'big' WHERE arm = 1", "arm 1 is neither"),
        ("UPDATE arms SET kind = 'edid' WHERE arm = 1", "arm 1 is neither"),
        ("UPDATE arms SET of = 0 WHERE kind = 'control'", "arm 2 is neither"),
        (
            "UPDATE outcomes SET return = return + 1e-9 WHERE block = 2 AND unit = 4",
            "outcomes of block 2 have changed",
        ),
        ("UPDATE blocks SET arm = 7 - arm WHERE arm IN (3, 4)", "the outcomes of block 6 have changed"),
        ("UPDATE plan SET options = json_set(options, '$.units', 'six')", "its plan or its arms cannot be read"),
        ("UPDATE plan SET options = json_set(options, '$.task.measures', -9)", "its plan or its arms cannot be read"),
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
    if "measures" not in damage and "$.units" not in damage:
        with pytest.raises(DtLensError, match=f"damaged, or not a sweep's file .*{said}.*; move it away"):
            make_sweep(sv="0,1").run(engine=remembering())


def test_one_flipped_bit_of_a_return_is_noticed(finished: Make, make_sweep: Make, remembering: Make) -> None:
    sweep = finished()
    value = float(sweep.episodes()["return"].iloc[4])
    whole = bytearray(sweep.file.read_bytes())
    whole[whole.index(struct.pack(">d", value)) + 1] ^= 0x10
    sweep.file.write_bytes(whole)
    with pytest.raises(DtLensError, match="the outcomes of block 1 have changed since they were written"):
        SweepResults(sweep.file)
    with pytest.raises(DtLensError, match="the outcomes of block 1 have changed since they were written"):
        make_sweep(sv="0,1").run(engine=remembering())


def test_a_block_of_an_older_version_has_no_checksum(finished: Make, make_sweep: Make, remembering: Make) -> None:
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
