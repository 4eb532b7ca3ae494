"""The study: what it refuses before it begins; ``tests/test_cli.py`` runs one."""

from __future__ import annotations

from pathlib import Path

import pytest

import dt_lens
from dt_lens.errors import DtLensError
from dt_lens.study.study import Study


def test_a_language_model_is_refused_at_once(tmp_path: Path) -> None:
    study = Study(dt_lens.load("tiny-gpt2", check=False), str(tmp_path / "out"))
    with pytest.raises(DtLensError, match=r"takes a decision transformer .*, not a HookedLanguageModel; "):
        study.run()
    assert study.folder == tmp_path / "out" and not study.folder.exists()
