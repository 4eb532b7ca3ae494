"""The error class, and the functions that word its sentences."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import dt_lens
from dt_lens.errors import DtLensError, because, nearest


def test_the_class_is_public() -> None:
    assert dt_lens.DtLensError is DtLensError and not issubclass(DtLensError, (ValueError, RuntimeError))


def test_nearest() -> None:
    assert nearest("hoper", ["hopper", "walker"]) == " Did you mean 'hopper'?"
    assert nearest(5, ["5", "hopper"]) == "" and nearest(None, ["None"]) == "" and nearest(["a"], ["a"]) == ""
    assert nearest("xyzzy", ["hopper", "walker"]) == "" and nearest("x", []) == ""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("bad\n  thing. "), "bad thing"),
        (KeyError(), "KeyError"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (ValueError("word " * 100), "word " * 40),
    ],
)
def test_because_is_one_line(error: Exception, said: str) -> None:
    assert because(error) == said.strip()
    assert len(because(ValueError("x" * 5000))) <= 203


def test_values_are_written_on_one_line_everywhere() -> None:
    """``{value!r:.80}`` keeps the line breaks of an array or a table; ``as_written`` does not."""
    root = Path(__file__).parents[1]
    for file in (file for folder in ("dt_lens", "adapters") for file in (root / folder).rglob("*.py")):
        assert not re.search(r"!r:\.\d", file.read_text(encoding="utf-8")), file
