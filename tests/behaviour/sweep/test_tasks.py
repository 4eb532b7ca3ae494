"""Sweeps of models that are no agents: windows of text, and a third party's task."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import dt_lens
from dt_lens.behaviour.evaluate import evaluate
from dt_lens.behaviour.sweep.results import SweepResults
from dt_lens.behaviour.sweep.settings import SweepSettings
from dt_lens.behaviour.sweep.store import FILE, KEPT
from dt_lens.behaviour.sweep.sweep import Sweep
from dt_lens.behaviour.terms import Terms
from dt_lens.behaviour.texts.evaluation import TextEvaluation
from dt_lens.cli.app import app
from dt_lens.edits.singular import SingularEdit
from dt_lens.errors import DtLensError
from tests.behaviour.toy import Points, sorter

Make = Callable[..., Any]
same = pd.testing.assert_frame_equal
TEXT = "Of the making of many books there is no end, and much study is a weariness of the flesh. " * 3


class Bytes:
    """A tokenizer whose tokens are bytes."""

    bos_token_id: int | None = None

    def __len__(self) -> int:
        return 256

    def encode(self, text: str, add_special_tokens: bool = True, **_: Any) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("latin-1")


@pytest.fixture(scope="module")
def reader() -> Any:
    """A small language model that was not trained."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 24, "vocab_size": 260}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return dt_lens.wrap(model.eval(), tokenizer=Bytes(), check=False)


READING: dict[str, Any] = {"matrices": "*.W_in", "sv": "0,1", "controls": 1, "edits": "zero", "texts": TEXT}
READING |= {"windows": 6, "block_size": 4, "workers": 1}


def test_a_table_of_windows_is_what_evaluate_and_compare_say(reader: Any, inline: Make, tmp_path: Path) -> None:
    sweep = Sweep(reader, tmp_path, **READING).run(engine=inline(3))
    table, baseline = sweep.table(), evaluate(reader, TEXT, windows=6)
    assert len(table) == 8 and not {"failure_rate", "survival", "mean_length", "episodes"} & set(table)
    assert not table.attrs
    kept = sweep.results.baseline()
    assert type(kept) is TextEvaluation and kept.bits_per_byte == baseline.bits_per_byte
    assert not kept.kl.any() and kept.terms == baseline.terms
    evaluations = sweep.evaluations()
    for arm, row in table.iterrows():
        edit = SingularEdit(reader, row["matrix"], row["sv"], side=row["side"], value="zero")
        with edit if row["kind"] == "edit" else edit.control(row["control"]):
            edited = evaluate(reader, TEXT, windows=6)
        same(evaluations[arm].to_frame(), edited.to_frame(), check_exact=True)
        assert (evaluations[arm].model_id, evaluations[arm].base_id) == (edited.model_id, edited.base_id)
        compared = evaluations[arm].compare(baseline)
        assert row["windows"] == 6 and row["mean_loss"] == edited.mean != baseline.mean
        assert row["difference"] == compared.difference and row["p_value"] == compared.p_value
        assert row["mean_kl"] == compared.kl > 0
    rows = sweep.outcomes()
    assert list(rows)[-4:] == ["index", *baseline.terms.measures] and len(rows) == 9 * 6
    with pytest.raises(DtLensError, match="Failing has no meaning in the task 'text'; leave out failure"):
        sweep.table(failure=3.0)


def test_a_sweep_of_windows_stops_resumes_and_grows(
    reader: Any, inline: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(inline):  # type: ignore[misc]
        waits = 0

        def wait(self, seconds: float) -> Any:
            self.waits += 1
            if self.waits == 4:
                raise KeyboardInterrupt
            return super().wait(seconds)

    larger = READING | {"windows": 9, "controls": 2}
    whole = Sweep(reader, tmp_path / "whole", **larger).run(engine=inline(2))
    with pytest.raises(KeyboardInterrupt, match="Stopped with 3 of 18 blocks done"):
        Sweep(reader, tmp_path / "grown", **READING).run(engine=Stopped())
    Sweep(reader, tmp_path / "grown", **READING).run(engine=inline())
    said: list[str] = []
    grown = Sweep(reader, tmp_path / "grown", **larger).run(lambda what, share: said.append(what), inline(2, seed=1))
    same(grown.table(), whole.table(), check_exact=True)
    same(grown.outcomes(), whole.outcomes(), check_exact=True)
    assert said[-1].startswith("39 of 39 blocks of windows  ") and " windows/s" in said[-1]
    with pytest.raises(DtLensError, match="holds another sweep: its context is 24 and this one's 12"):
        Sweep(reader, tmp_path / "grown", **READING, context=12).run(engine=inline())
    with pytest.raises(DtLensError, match="holds another sweep: its text_id is"):
        Sweep(reader, tmp_path / "grown", **READING | {"texts": TEXT[5:]}).run(engine=inline())


def test_controls_of_windows_with_the_same_output_energy(reader: Any, inline: Make, tmp_path: Path) -> None:
    options = READING | {"matrices": "*.0.mlp.W_in", "control_match": "output"}
    sweep = Sweep(reader, tmp_path, **options).run(engine=inline(2))
    assert sorted(file.name for file in tmp_path.iterdir()) == [KEPT, FILE]
    table = sweep.table()
    of = table[table["kind"] == "control"]
    assert list(of["output_energy"]) == pytest.approx(list(table.loc[of["of"], "output_energy"]), rel=1e-6)
    (tmp_path / KEPT).unlink()  # collected again, to the bit
    Sweep(reader, tmp_path, **options | {"windows": 7}).run(engine=inline())


def test_windows_by_halves_take_those_that_are_left(reader: Any, inline: Make, tmp_path: Path) -> None:
    options = READING | {"windows": 99, "seed": 5, "halving": [2, 3]}  # a seed of controls: windows start at 0
    sweep = Sweep(reader, tmp_path, **options).run(engine=inline(2))
    table, every = sweep.table(), len(evaluate(reader, TEXT))
    best = table[(table["rung"] == 2) & (table["kind"] == "edit")]
    assert len(best) == 1 and list(best["windows"]) == [every - 5]
    with pytest.raises(DtLensError, match=rf"halving needs 99 windows before its last rung, and there are {every}"):
        Sweep(reader, tmp_path, **options | {"halving": 99})


def test_a_third_partys_task(inline: Make, tmp_path: Path) -> None:
    model, task = sorter(), Points()
    options = {"task": task, "matrices": "*.mlp.*", "sv": "0,1", "edits": "zero", "controls": 1, "halving": "3,4"}
    sweep = Sweep(model, tmp_path / "a", SweepSettings(units=8, seed=2), **options, workers=1).run()  # a worker process
    other = Sweep(model, tmp_path / "b", units=8, seed=2, block_size=3, **options).run(engine=inline(3))
    table = sweep.table()
    same(table, other.table(), check_exact=True)
    assert table.attrs == {"failure_rule": task.terms.failures["wrong"], "failure_guessed": False}
    baseline = sweep.results.baseline()
    best = table[(table["rung"] == 2) & (table["kind"] == "edit")]
    assert len(best) == 2 and list(baseline.units) == list(range(2, 2 + 3 + 4 + 8))
    for arm, row in best.iterrows():
        with SingularEdit(model, row["matrix"], row["sv"], side=row["side"], value="zero"):
            edited = evaluate(model, task, units=8, seed=9)
        compared = edited.compare(evaluate(model, task, units=8, seed=9))
        assert row["clouds"] == 8 and row["mean_score"] == edited.mean
        assert row["difference"] == compared.difference and row["failure_rate"] == compared.failure_edited
        assert sweep.evaluations()[arm].at(range(9, 17)).mean == edited.mean
    told = sweep.table(failure=0.0)
    assert told.attrs["failure_rule"] == "score below 0" and (told.loc[best.index, "failure_rate"] == 1).all()
    rows = sweep.outcomes()
    assert rows["wrong"].dtype == bool and rows["score"].dtype == np.float64


class Named(Points):
    """Measures something that the file calls otherwise."""

    @property
    def terms(self) -> Terms:
        return Terms(task="named", measures={"order": "real", "Unit": "integer"}, outcome="order")


def test_options_that_do_not_fit_are_one_sentence(reader: Any, agent: Any, tmp_path: Path) -> None:
    for model, options, sentence in (
        (
            reader,
            READING | {"episodes": 3},
            "This is a language model, and Sweep reads texts with it; leave out episodes",
        ),
        (agent, {"windows": 3}, "leave out texts, context and windows"),
        (reader, {"task": Points(), "texts": TEXT}, "The task says what is run; leave out texts"),
        (reader, READING | {"units": 3}, "given twice"),
        (sorter(steps=0), {"task": Named()}, "measures 'Unit', which a sweep's file cannot hold"),
    ):
        with pytest.raises(DtLensError, match=sentence) as caught:
            Sweep(model, tmp_path, **options)
        assert "\n" not in str(caught.value)
    said = CliRunner().invoke(app, ["sweep", "tiny-gpt2", "--episodes", "3", "--out", str(tmp_path)])
    assert isinstance(said.exception, DtLensError)
    assert str(said.exception) == "The model is a language model, which reads --text; leave out --episodes."


@pytest.mark.acceptance(minutes=4)
@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_a_killed_command_resumes_with_the_same_table(tmp_path: Path) -> None:
    words = ["sweep", "tiny-gpt2", "--matrices", "*.W_in", "--sv", "0-1", "--controls", "1", "--windows", "8", "--out"]
    command = [sys.executable, "-c", "from dt_lens.cli import main; main()", *words]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, timeout=300, capture_output=True)
    driver = subprocess.Popen([*command, str(tmp_path / "killed")], stderr=subprocess.DEVNULL)
    file, end = tmp_path / "killed" / FILE, time.monotonic() + 120
    while time.monotonic() < end and _done(file) < 4:
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait(timeout=60)
    assert 4 <= _done(file) < 17
    subprocess.run([*command, str(tmp_path / "killed")], check=True, timeout=300, capture_output=True)
    killed, whole = SweepResults(file), SweepResults(tmp_path / "whole")
    same(killed.table(), whole.table(), check_exact=True)
    same(killed.outcomes(), whole.outcomes(), check_exact=True)


def _done(file: Path) -> int:
    if not file.exists():
        return 0
    with closing(sqlite3.connect(file)) as db:
        try:
            return int(db.execute("SELECT count(*) FROM blocks WHERE status = 'done'").fetchone()[0])
        except sqlite3.OperationalError:  # no table yet
            return 0
