"""The shell completes bundled models, and the matrices and embeddings of the one that was typed, without torch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

import dt_lens as library
from dt_lens.cli.completion import NULLS, VALUES, embedding_names, matrix_names
from dt_lens.edits.replacements import Value
from dt_lens.lens.matrices import catalogue
from dt_lens.statistics.nulls.kinds import NULLS as KNOWN
from dt_lens.zoo.models import bundled

Run = Callable[..., Any]


@pytest.fixture
def completed(dt_lens: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """What bash is given for the last word of a line."""

    def complete(line: str) -> list[str]:
        monkeypatch.setenv("_DT_LENS_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
        return list(dt_lens().stdout.split())

    return complete


@pytest.mark.parametrize("model", sorted(bundled()))
def test_the_names_are_those_of_the_model(model: str) -> None:
    loaded = library.load(model, check=False)
    assert matrix_names(model) == list(catalogue(loaded))
    assert embedding_names(model) == list(loaded.embeddings)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("dt-lens cl", ["clusters"]),
        ("dt-lens scan ho", ["hopper"]),
        ("dt-lens compare hopper ta", ["taxi"]),
        ("dt-lens top hopper blocks.1.mlp", ["blocks.1.mlp.W_in", "blocks.1.mlp.W_out"]),
        ("dt-lens top tiny-gpt2 blocks.0.attn.OV.3", ["blocks.0.attn.OV.3"]),
        ("dt-lens top hopper blocks.1.mlp.W_in act", ["action_in", "action_out"]),
        ("dt-lens scan hopper --matrices *.W_in,blocks.2.mlp.W_o", ["*.W_in,blocks.2.mlp.W_out"]),
        ("dt-lens scan tiny-gpt2 --embeddings token", ["token_in", "token_out"]),
        ("dt-lens evaluate hopper --episodes 9 --edit blocks.0.mlp.W_i", ["blocks.0.mlp.W_in"]),
        ("dt-lens scan model.pt --matrices b", []),
        ("dt-lens scan hopper --null s", ["spectrum", "shuffled"]),
        ("dt-lens evaluate hopper --side w", ["write"]),
        ("dt-lens sweep hopper --value zero,f", ["zero,flip"]),
        ("dt-lens bench s", ["start_up", "solvers"]),
        ("dt-lens scan --matrices b", []),
    ],
)
def test_words_are_completed(completed: Callable[[str], list[str]], line: str, wanted: list[str]) -> None:
    assert completed(line) == wanted


def test_the_words_of_options_are_those_of_the_library() -> None:
    assert tuple(KNOWN) == NULLS
    assert [value for value in VALUES if not value.endswith(":")] == list(get_args(Value))


def test_files_beside_a_bundled_model_are_completed(
    completed: Callable[[str], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hop.pt").touch()
    (tmp_path / "hopper").mkdir()
    (tmp_path / "hopping").mkdir()
    assert completed("dt-lens scan hop") == ["hopper", "hop.pt", "hopping/"]
    assert completed("dt-lens scan ta") == ["taxi"]


def test_it_imports_nothing_heavy() -> None:
    check = """
import sys
from dt_lens.cli import main
sys.argv = ["dt-lens"]
try:
    main()
except SystemExit:
    print(sorted({"torch", "transformers", "pandas", "numpy", "safetensors"} & set(sys.modules)))
"""
    words = {"_DT_LENS_COMPLETE": "complete_bash", "COMP_WORDS": "dt-lens top hopper b", "COMP_CWORD": "3"}
    done = subprocess.run([sys.executable, "-c", check], env={**os.environ, **words}, capture_output=True, text=True)
    assert done.stdout.split()[-1] == "[]" and "blocks.0.mlp.W_in" in done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_it_is_installed(shell: str, tmp_path: Path) -> None:
    words = [sys.executable, "-c", "from dt_lens.cli import main; main()", "--install-completion", shell]
    env = {**os.environ, "HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert any(file.is_file() for file in tmp_path.rglob("*"))
