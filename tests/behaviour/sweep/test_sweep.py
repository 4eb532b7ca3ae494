"""A sweep from end to end: the numbers of ``evaluate`` and ``compare``, the same bits however it is run."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock

from dt_lens.behaviour.evaluate import evaluate
from dt_lens.behaviour.sweep.blocks import Work
from dt_lens.behaviour.sweep.engines.local import LocalEngine
from dt_lens.behaviour.sweep.results import SweepResults
from dt_lens.behaviour.sweep.store import FILE, Store
from dt_lens.edits.singular import SingularEdit
from dt_lens.errors import DtLensError

Make = Callable[..., Any]
same = pd.testing.assert_frame_equal


def identical(one: Any, other: Any) -> None:
    same(one.table(), other.table(), check_exact=True)
    same(one.episodes(), other.episodes(), check_exact=True)


def runs(sweep: Any) -> list[tuple[int, str | None]]:
    with sqlite3.connect(sweep.file) as db:
        return db.execute("SELECT block, result FROM runs ORDER BY run").fetchall()


def test_the_table_is_what_evaluate_and_compare_say(make_sweep: Make, inline: Make, agent: Any) -> None:
    sweep = make_sweep(edits="zero,scale:2", episodes=9).run(engine=inline(3))
    table = sweep.table()
    assert len(table) == 3 * 2 * 2
    options = {"episodes": 9, "seed": 3, "max_steps": 9, "workers": 1}
    baseline = evaluate(agent, **options)
    same(sweep.results.baseline().to_frame(), baseline.to_frame(), check_exact=True)
    evaluations = sweep.evaluations()
    for arm, row in table.iterrows():
        value = {"zero": "zero", "2": 2.0}[row["value"]]
        edit = SingularEdit(agent, row["matrix"], row["sv"], side=row["side"], value=value, seed=3)
        edit = edit if row["kind"] == "edit" else edit.control(row["control"])
        with edit:
            edited = evaluate(agent, **options)
        same(evaluations[arm].to_frame(), edited.to_frame(), check_exact=True)
        assert (evaluations[arm].model_id, evaluations[arm].edits) == (edited.model_id, edited.edits)
        compared = edited.compare(baseline)
        assert row["energy"] == edit.energy
        assert row["episodes"] == 9
        assert row["mean_return"] == edited.mean != baseline.mean
        assert row["difference"] == compared.difference
        assert (row["difference_low"], row["difference_high"]) == compared.difference_interval
        assert row["p_value"] == compared.p_value
        assert row["failure_rate"] == compared.failure_edited
        assert (row["failure_low"], row["failure_high"]) == compared.failure_edited_interval
        assert row["mean_length"] == edited.lengths.mean()
        assert row["survival_p_value"] == compared.survival_p_value
    assert table.loc[table["kind"] == "edit", "q_value"].notna().all()
    assert table.loc[table["kind"] == "control", "q_value"].isna().all()


def test_the_file_says_what_counts_as_failing(finished: Make, make_sweep: Make, remembering: Make) -> None:
    guessed = finished().table()
    assert guessed.attrs == {"failure_rule": "ended before the time limit", "failure_guessed": True}
    assert (guessed["failure_rate"] == 0).all()  # a pendulum never ends
    told = make_sweep(failure="truncated").run(engine=remembering())  # the same episodes, judged anew
    assert told.table().attrs["failure_guessed"] is False and (told.table()["failure_rate"] == 1).all()
    assert told.results.baseline().failed.all() and not told.results.baseline().failure_guessed
    assert (told.table(failure=-1e9)["failure_rate"] == 0).all()
    with pytest.raises(DtLensError, match="failure is 'fell'"):
        make_sweep(failure="fell")


def test_a_return_that_is_not_finite_in_an_old_file_is_no_discovery(finished: Make) -> None:
    """Version 0.2 kept a NaN that came on an episode's last step, and counted it as one."""
    sweep = finished()
    with closing(sqlite3.connect(sweep.file)) as db, db:
        db.execute("DROP TABLE checksums")  # which files of version 0.2 lack
        db.execute(
            "UPDATE outcomes SET return = NULL WHERE block = (SELECT block FROM blocks WHERE arm = 1) AND unit = 3"
        )
    table = SweepResults(sweep.file).table()
    row = table.loc[1]
    assert np.isnan(row[["difference", "p_value", "q_value", "difference_low"]].astype(float)).all()
    assert row["difference_note"] == "no interval: not all differences are finite"
    assert table.loc[table["kind"] == "edit", "q_value"].notna().sum() == 2


def test_the_same_bits_whatever_runs_it(make_sweep: Make, inline: Make, tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "one").run(engine=inline())
    shuffled = make_sweep(tmp_path / "two").run(engine=inline(5, seed=1))
    processes = make_sweep(tmp_path / "three", workers=2).run()
    identical(sweep, shuffled)
    identical(sweep, processes)
    blocks = make_sweep(tmp_path / "four", block_size=4).run(engine=inline(2))
    identical(sweep, blocks)
    returns = sweep.episodes().groupby("arm")["return"].apply(tuple)
    assert len(set(returns)) == len(returns)  # every arm is another agent


def test_one_file_is_left_and_the_model_as_it_was(
    make_sweep: Make, remembering: Make, agent: Any, tmp_path: Path
) -> None:
    before = {name: weight.clone() for name, weight in agent.weights.items()}
    shares: list[tuple[str, float]] = []
    sweep = make_sweep(tmp_path / "new" / "folder")
    sweep.run(lambda what, share: shares.append((what, share)), remembering())
    assert [file.name for file in sweep.file.parent.iterdir()] == [FILE]
    assert all(torch.equal(weight, before[name]) for name, weight in agent.weights.items())
    assert shares[0] == ("0 of 14 blocks of episodes", 0.0)
    assert shares[-1][0].startswith("14 of 14 blocks of episodes  ") and shares[-1][1] == 1.0
    assert sweep.results.status() == {"todo": 0, "done": 14, "failed": 0, "void": 0}
    log, bytes_ = runs(sweep), sweep.file.read_bytes()
    assert sorted(log) == [(unit, "done") for unit in range(14)]
    make_sweep(tmp_path / "new" / "folder").run(engine=None)  # nothing to do, no worker started
    assert runs(sweep) == log
    sweep.file.chmod(0o400)
    moved = sweep.file.rename(tmp_path / "moved.sqlite")
    same(SweepResults(moved).table(), SweepResults(moved).table())
    assert len(moved.read_bytes()) == len(bytes_)


def test_without_baseline_or_controls(make_sweep: Make, remembering: Make) -> None:
    table = make_sweep(baseline=False, controls=0).run(engine=remembering()).table()
    assert (table["kind"] == "edit").all() and len(table) == 3
    assert table["mean_return"].notna().all() and table["difference"].isna().all()


def test_another_plan_is_refused(
    finished: Make, make_sweep: Make, remembering: Make, make_model: Make, tmp_path: Path
) -> None:
    finished()
    for options, words in (
        ({"seed": 4}, "its seed is 3 and this one's 4"),
        ({"target_return": 5.0}, "its target_return is 200"),
        ({"max_steps": 8}, "its time_limit is 9"),
        ({"fold_layernorm": False}, "its fold_layernorm is true"),
        ({"model": make_model("Pendulum-v1", seed=1)}, "its model is"),
        ({"halving": 2}, "its halving is null and this one's [2]"),
    ):
        with pytest.raises(DtLensError) as caught:
            make_sweep(**options).run(engine=remembering())
        assert words in str(caught.value) and "\n" not in str(caught.value)
        assert "holds another sweep" in str(caught.value)
    with sqlite3.connect(tmp_path / FILE) as db:
        db.execute("UPDATE plan SET options = json_set(options, '$.format', 99)")
    db.close()
    with pytest.raises(DtLensError, match="its format is 99 and this version of dt-lens writes 3"):
        make_sweep().run(engine=remembering())
    with pytest.raises(DtLensError, match="is 99 and this version of dt-lens reads 2 and 3; read it with the version"):
        SweepResults(tmp_path)
    with sqlite3.connect(tmp_path / FILE) as db:
        db.execute("UPDATE plan SET options = json_set(options, '$.format', 3)")
    db.close()
    make_sweep(sv="0-0", matrices=["blocks.?.mlp.W_in", "blocks.0.mlp.W_out"]).run()  # the same arms in other words


def test_a_second_driver_is_refused(make_sweep: Make, remembering: Make) -> None:
    sweep = make_sweep()
    lock = Path(f"{sweep.file}.lock")
    with FileLock(lock), pytest.raises(DtLensError, match="Another process is running the sweep in"):
        sweep.run(engine=remembering())
    assert lock.is_file()  # as a driver leaves it that is killed; the system has released the lock itself
    sweep.run(engine=remembering())
    assert [file.name for file in lock.parent.iterdir()] == [FILE]


def test_a_file_system_without_locks_is_refused(make_sweep: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another kind of lock would outlive a killed driver, and nobody could resume its sweep."""

    def flock(*args: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(DtLensError, match="cannot be written: Function not implemented"):
        make_sweep().run()


def test_an_arm_that_comes_out_with_other_bits_is_refused(
    make_sweep: Make, remembering: Make, interrupted: Make
) -> None:
    """As on another machine: the first unit of an arm is done, and its edited weights are not the same any more."""
    sweep = make_sweep()
    with pytest.raises(KeyboardInterrupt, match="Stopped with 3 of 14"):
        sweep.run(engine=interrupted(4))
    with closing(sqlite3.connect(sweep.file)) as db, db:
        assert db.execute("UPDATE arms SET model_id = 'another' WHERE arm = 1 AND model_id IS NOT NULL").rowcount == 1
    with pytest.raises(DtLensError, match="Arm 1 of the sweep comes out with other bits here than where it was begun;"):
        sweep.run(engine=remembering())
    assert sweep.results.status() == {"todo": 11, "done": 3, "failed": 0, "void": 0}


def test_a_damaged_file_is_refused(make_sweep: Make, remembering: Make, tmp_path: Path) -> None:
    sweep = make_sweep()
    sweep.file.write_bytes(b"")  # as a driver killed at the very first moment leaves it
    sweep.run(engine=remembering())
    whole = sweep.file.read_bytes()
    for damaged in (b"this is not a database" * 99, whole[:5000], whole[:2000] + b"\xff" * 6000 + whole[8000:]):
        sweep.file.write_bytes(damaged)
        with pytest.raises(DtLensError, match=r"damaged, or not a sweep's file .*; move it away") as caught:
            make_sweep().run(engine=remembering())
        assert "\n" not in str(caught.value)
    sweep.file.unlink()
    with sqlite3.connect(sweep.file) as db:
        db.execute("CREATE TABLE plan (x)")
    with pytest.raises(DtLensError, match="a database of something else"):
        make_sweep().run(engine=remembering())
    with pytest.raises(DtLensError, match="There is no sweep in"):
        SweepResults(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "damage",
    [
        """UPDATE arms SET record = '{"kind" "singular"}' WHERE arm = 2""",
        """UPDATE arms SET record = replace(record, '"of"', '"if"')""",
        "UPDATE arms SET matrix = 'blocks.0.mlp.W_im' WHERE arm = 1",
        "UPDATE arms SET side = 'reed' WHERE arm = 1",
        "UPDATE plan SET options = replace(options, 'measures', 'measurez')",
        "UPDATE plan SET options = substr(options, 9)",
        "UPDATE arms SET value = CAST(x'ff' AS TEXT) WHERE arm = 1",
        "DELETE FROM plan",
    ],
)
def test_a_file_whose_text_is_damaged_is_refused(
    finished: Make, make_sweep: Make, remembering: Make, damage: str
) -> None:
    sweep = finished()
    results = sweep.results
    with sqlite3.connect(sweep.file) as db:
        db.execute(damage)
    db.close()
    with pytest.raises(DtLensError, match=r"damaged, or not a sweep's file .*; move it away") as caught:
        make_sweep(matrices="*.1.mlp.W_in").run(engine=remembering())
    assert "\n" not in str(caught.value)
    for read in (results.table, results.evaluations, results.episodes):
        try:
            read()
        except DtLensError as error:  # if it reads what is damaged
            assert "damaged, or not a sweep's file" in str(error)


def test_a_healthy_file_is_not_called_damaged(finished: Make, make_sweep: Make) -> None:
    sweep = make_sweep()
    sweep.file.touch()
    with pytest.raises(DtLensError, match=r"has not begun; run it first\.$"):
        SweepResults(sweep.file)
    sweep = finished()
    with pytest.raises(DtLensError, match="failure is array"):
        sweep.table(failure=np.array([1, 2]))
    with pytest.raises(ValueError, match="invalid literal"):  # the function's own
        sweep.table(failure=lambda frame: int("x"))
    for confidence in (2, 0.0, "a"):
        with pytest.raises(DtLensError, match=r"confidence is .*; it must be a number between 0 and 1"):
            sweep.table(confidence=confidence)


def test_a_file_that_cannot_be_opened_is_not_said_to_be_unwritable(
    finished: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one whose sweep was cut off, in a folder that is read-only."""
    results = finished().results

    def closed(*_: Any, **__: Any) -> Any:
        raise sqlite3.OperationalError("unable to open database file")

    monkeypatch.setattr(sqlite3, "connect", closed)
    with pytest.raises(DtLensError, match="cannot be read: unable to open database file; check that you may read it"):
        results.status()


def test_results_are_of_the_file_as_it_is_now(make_sweep: Make, remembering: Make, tmp_path: Path) -> None:
    small = make_sweep(baseline=False, sv="0,1", halving=None).run(engine=remembering()).results
    assert small.options["baseline"] is False and small.table()["difference"].isna().all()
    make_sweep(sv="0,1").run(engine=remembering())
    assert small.baseline() is not None and small.options["baseline"] is True
    same(small.table(), SweepResults(tmp_path).table(), check_exact=True)
    assert small.table()["difference"].notna().all()


def test_where_nothing_can_be_written(make_sweep: Make, remembering: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DtLensError, match=r"cannot be written: .*; choose another folder or make room"):
        make_sweep(tmp_path / "file").run(engine=remembering())
    for name in (FILE, f"{FILE}.lock"):
        (tmp_path / f"taken {name}" / name).mkdir(parents=True)
        with pytest.raises(DtLensError, match=rf"{FILE} cannot be written: .*; choose another folder or make room"):
            make_sweep(tmp_path / f"taken {name}").run(engine=remembering())


def test_a_sweep_is_printed_in_a_few_lines(make_sweep: Make, inline: Make) -> None:
    sweep = make_sweep()
    assert "none done" in repr(sweep) and repr(sweep).endswith("run()")
    sweep.run(engine=inline())
    arms = sweep.table()["kind"].value_counts()
    for shown in (repr(sweep), repr(sweep.results), sweep._repr_html_(), sweep.results._repr_html_()):
        assert f"{arms['edit']} edits, {arms['control']} controls" in shown and "6 episodes of each" in shown
        assert "14 of 14 done" in shown
    assert len(repr(sweep).splitlines()) < 8
    sweep.file.write_bytes(b"damaged")
    assert "sweep.sqlite is damaged" in repr(sweep), "printing raises nothing"


def test_after_a_full_disk_it_resumes(
    make_sweep: Make, remembering: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = Store._prepare

    def small(store: Store) -> None:
        prepare(store)
        pages = store._db.execute("PRAGMA page_count").fetchone()[0]
        store._db.execute(f"PRAGMA max_page_count = {pages}")

    whole = make_sweep(tmp_path / "whole", episodes=30, max_steps=4).run(engine=remembering())
    sweep = make_sweep(tmp_path / "full", episodes=30, max_steps=4)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "_prepare", small)
        with pytest.raises(DtLensError, match=r"cannot be written: database or disk is full; choose another"):
            sweep.run(engine=remembering())
    assert 0 < sweep.results.status()["done"] < 70
    identical(sweep.run(engine=remembering()), whole)


def test_an_edit_that_cannot_be_put_in_force_is_noted(make_sweep: Make, remembering: Make) -> None:
    sweep = make_sweep(edits="scale:1,zero", controls=0).run(engine=remembering(2))
    table = sweep.table()
    void = table[table["value"] == "1"]
    assert void["note"].str.contains("changes no bit of the weights").all()
    assert (void["episodes"] == 0).all() and void["difference"].isna().all()
    assert (table.loc[table["value"] == "zero", "episodes"] == 6).all()
    assert sweep.results.status() == {"todo": 0, "done": 8, "failed": 0, "void": 6}
    assert table.loc[table["value"] == "zero", "q_value"].notna().all()


def test_a_model_that_cannot_be_sent_to_workers(make_sweep: Make, agent: Any) -> None:
    with pytest.raises(DtLensError, match="has hooks"), agent.hooks([("blocks.0.hook_mlp_out", lambda x, hook: x)]):
        make_sweep()
    with SingularEdit(agent, "blocks.0.mlp.W_in"), pytest.raises(DtLensError, match="end it first"):
        make_sweep()
    with pytest.raises(DtLensError, match=r"Sweep takes a wrapped model, not a Linear; call dt_lens\.wrap"):
        make_sweep(model=torch.nn.Linear(2, 2))
    sweep = make_sweep()
    with SingularEdit(agent, "blocks.0.mlp.W_in"), pytest.raises(DtLensError, match="weights have changed"):
        sweep.run()
    with pytest.raises(DtLensError, match="has hooks"), agent.hooks([("blocks.0.hook_mlp_out", lambda x, hook: x)]):
        sweep.run()
    assert not sweep.file.exists()


def test_results_can_be_read_meanwhile(make_sweep: Make, remembering: Make) -> None:
    sweep = make_sweep()
    seen: list[Any] = []

    class Watched(remembering):  # type: ignore[misc]
        def wait(self, seconds: float) -> Any:
            seen.append(sweep.table())
            return super().wait(seconds)

    sweep.run(engine=Watched())
    counts = [int(table["episodes"].sum()) for table in seen]
    assert counts == sorted(counts) and counts[0] == 0
    assert seen[3].iloc[0]["episodes"] == 3  # half of the first edit's, compared with the same half of the baseline's
    first = sweep.episodes()
    half = first[first["seed"] < 6].groupby("arm")["return"].mean()
    assert seen[3].iloc[0]["difference"] == pytest.approx(half[1] - half[0])


def test_ctrl_c_says_how_to_resume(
    make_sweep: Make, finished: Make, remembering: Make, interrupted: Make, tmp_path: Path
) -> None:
    whole = finished(tmp_path / "whole")
    sweep = make_sweep(tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt, match=r"Stopped with 4 of 14 blocks done; the same command resumes"):
        sweep.run(engine=interrupted(5))
    assert [file.name for file in sweep.file.parent.iterdir()] == [FILE]
    identical(sweep.run(engine=remembering()), whole)


class Deadly(LocalEngine):
    """Kills the worker of some blocks as soon as they have been sent."""

    together = 1  # a block that runs beside another dies with it

    def __init__(self, workers: int, deaths: dict[int, int]) -> None:
        super().__init__(workers)
        self.deaths = deaths

    def submit(self, work: Work) -> None:
        super().submit(work)
        if self.deaths.get(work.number, 0):
            self.deaths[work.number] -= 1
            next(w for w in self._workers if work.number in w.blocks).process.kill()


def test_dead_workers_are_replaced_and_a_deadly_unit_given_up(
    make_sweep: Make, remembering: Make, tmp_path: Path
) -> None:
    # Units long enough that a kill always comes before their end.
    options = {"max_steps": 100, "matrices": ["*.0.mlp.W_in"], "controls": 0}
    whole = make_sweep(tmp_path / "whole", **options).run(engine=remembering())
    sweep = make_sweep(tmp_path / "deaths", **options).run(engine=Deadly(2, {1: 1, 2: 99}))
    assert sweep.results.status() == {"todo": 0, "done": 3, "failed": 1, "void": 0}
    assert sweep.results.failures() == ["The workers that ran it died 3 times, last by signal 9."]
    assert sorted(runs(sweep)) == [
        (0, "done"),
        (1, "died"),
        (1, "done"),
        (2, "died"),
        (2, "died"),
        (2, "died"),
        (3, "done"),
    ]
    identical(sweep.run(engine=remembering()), whole)


def test_a_unit_that_raises_is_kept_as_failed(make_sweep: Make, make_model: Make) -> None:
    model = make_model("Pendulum-v1", seed=2)
    sweep = make_sweep(model=model, edits="scale:1e38", controls=0, matrices=["*.0.mlp.W_out"]).run()
    assert sweep.results.status() == {"todo": 0, "done": 2, "failed": 2, "void": 0}
    assert "not finite" in sweep.results.failures()[0]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("import os; os._exit(7)", r"end before they are ready \(exit status 7\)"),
        ("import sys; sys.modules['gymnasium'] = None", r"A worker process cannot run this model: \w+: .*gymnasium"),
    ],
)
def test_workers_that_cannot_start(
    make_sweep: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str, sentence: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DtLensError, match=sentence):
        make_sweep().run()
