"""What is printed fits the width of a terminal; a pipe gets all of it."""

from __future__ import annotations

import io
import os
import pty
import re
import sys

import pandas as pd
import pytest

from dt_lens.cli.output import print_table, say
from dt_lens.progress import progress

SCAN = pd.DataFrame(
    {
        "matrix": ["blocks.0.attn.OV.0", "blocks.2.mlp.W_out"],
        "layer": [0, 2],
        "head": pd.array([0, None], "Int64"),
        "side": ["write", "write"],
        "sv": [1, 10],
        "block": [1, 1],
        "sigma": [3.308, 2.4],
        "embedding": ["action_out", "action_out"],
        "label": ["thigh_joint torque", "leg_joint torque"],
        "cosine": [0.786, -0.7],
        "z": [12.3, float("nan")],
        "p_value": [8e-27, 1e-9],
        "q_value": [1.2e-23, 1e-5],
    }
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines(monkeypatch: pytest.MonkeyPatch, columns: int, table: pd.DataFrame, terminal: bool = True) -> list[str]:
    """What is printed of a table, without colours."""
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", str(columns))
    print_table(table, "The strongest")
    monkeypatch.undo()
    return re.sub(r"\x1b\[[\d;]*m", "", stream.getvalue()).splitlines()


@pytest.mark.parametrize("columns", [60, 80, 100, 160])
def test_a_table_fits_and_no_cell_is_cut(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    found = lines(monkeypatch, columns, SCAN)
    assert max(map(len, found)) <= columns and "…" not in "".join(found)
    # Whole words of every column that is left, and what is left out is named.
    for word in ("blocks.0.attn.OV.0", "blocks.2.mlp.W_out", "thigh_joint", "1.2e-23"):
        assert any(word in line for line in found), word
    said = " ".join(found)
    for name in SCAN.columns:
        # A heading is broken where its name has a line; a sentence has it as it is.
        assert name in said or all(part in said for part in name.split("_")), name
    assert ("Not shown for lack of room: head, layer" in said) == (columns <= 100)
    assert "nan" not in said


def test_a_column_without_contents_is_left_out_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    said = " ".join(lines(monkeypatch, 80, SCAN.assign(head=["", ""])))
    assert "head" not in said and "lack of room: layer, block" in said


def test_a_pipe_has_all_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    found = lines(monkeypatch, 60, SCAN, terminal=False)
    assert all(name in found[1] for name in SCAN.columns) and len(found) == 4


def test_sentences_are_broken_between_words_below_their_column(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "A title\n  mean return   " + "8.7 against 8.7, and so on, " * 3 + "\n" + "/a/long/path" * 12
    say(text)
    assert capsys.readouterr().out == text + "\n"
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", "60")
    say(text)
    monkeypatch.undo()
    found = stream.getvalue().splitlines()
    assert found[0] == "A title" and found[-1] == "/a/long/path" * 12
    assert found[1].startswith("  mean return   8.7") and all(line.startswith(" " * 16) for line in found[2:-1])
    assert max(map(len, found[:-1])) <= 60 and " ".join(" ".join(found[1:-1]).split()) == " ".join(text.split()[2:-1])


def test_a_bar_leaves_room_for_the_sign_of_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = pty.openpty()
    with os.fdopen(there, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "80")
        with progress() as tell:
            tell("step 100 of 10,000  " + "loss 0.1 " * 20, 0.1)
        monkeypatch.undo()
        shown = os.read(here, 65536).decode()
    os.close(here)
    drawn = [re.sub(r"\x1b\[[?\d;]*\w", "", part) for part in re.split(r"[\r\n]", shown)]
    assert any("step 100" in part for part in drawn) and max(map(len, drawn)) <= 77
