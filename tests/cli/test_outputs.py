"""What a command could not write at its end is refused in one sentence, before a model is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer

from dt_lens.cli.app import app
from dt_lens.cli.output import require_file
from dt_lens.errors import DtLensError

Run = Callable[..., Any]
GROUP: Any = typer.main.get_command(app)
# What else the commands need.
WORDS = {
    "study": ("hopper",),
    "scan": ("hopper",),
    "top": ("hopper", "*.W_in"),
    "clusters": ("taxi",),
    "compare": ("hopper", "hopper"),
    "evaluate": ("hopper",),
    "video": ("hopper",),
    "sweep": ("hopper", "--out", "{free}"),
    "atlas": ("hopper", "--sweep", "{free}"),
    "court": ("hopper",),
    "steer": ("hopper",),
    "activations": ("hopper", "--out", "{free}.safetensors"),
    "train": ("no/such-v0",),
    "train-text": ("no.txt",),
    "record": (),
    "bench": ("edits",),
}
# The ending of each file that an option writes; None for a folder.
WRITES: dict[tuple[str, str], str | None] = {
    ("scan", "--out"): ".csv",
    ("scan", "--resume"): None,
    ("top", "--out"): ".csv",
    ("top", "--html"): ".html",
    ("clusters", "--out"): ".csv",
    ("compare", "--out"): None,
    ("compare", "--resume"): None,
    ("evaluate", "--out"): ".csv",
    ("video", "--out"): ".mp4",
    ("sweep", "--out"): None,
    ("sweep", "--table"): ".csv",
    ("activations", "--out"): ".safetensors",
    ("record", "--folder"): None,
    ("bench", "--out"): ".csv",
    **{(name, "--out"): None for name in ("study", "atlas", "court", "steer", "train", "train-text")},
}
READS = {"--text", "--edits-from", "--activations", "--counts", "--factors", "--sweep", "--prompts"}
# The places, and what the sentence says of them. Root may write anywhere, so no folder here is closed to it.
PLACES = {
    "below a file": "{file}/out{ending}",
    "in the way": "{folder}{ending}",
    "another ending": "{free}.txt",
}


@pytest.fixture(autouse=True)
def _no_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def begun(*_: object, **__: object) -> None:
        pytest.fail("the work began")

    for name in ("lens.loading.load", "lens.loading.open_checkpoint", "cli.commands.bench._measured"):
        monkeypatch.setattr(f"dt_lens.{name}", begun)


def test_every_option_of_a_path_is_known_here() -> None:
    seen = set[tuple[str, str]]()
    for name, command in GROUP.commands.items():
        hints = get_type_hints(inspect.unwrap(command.callback))
        for parameter in command.params:
            kind = hints.get(parameter.name)
            if parameter.param_type_name == "option" and (kind is Path or Path in get_args(kind)):
                options = {(name, word) for word in parameter.opts}
                assert options & set(WRITES) or set(parameter.opts) & READS, options
                seen |= options
    assert set(WRITES) <= seen


@pytest.mark.parametrize(("name", "option"), WRITES)
@pytest.mark.parametrize("place", PLACES)
def test_what_cannot_be_written_is_found_before_the_work(
    dt_lens: Run, tmp_path: Path, name: str, option: str, place: str
) -> None:
    ending = WRITES[name, option]
    if place == "another ending" and ending is None:
        return
    (tmp_path / "file").write_text("in the way")
    folder = tmp_path / f"folder{ending or ''}"
    folder.mkdir()
    names = {"file": tmp_path / "file", "folder": tmp_path / "folder", "free": tmp_path / "new" / "free"}
    if place == "in the way" and ending is None:  # a file where a folder should be
        given = str(names["file"])
    else:
        given = PLACES[place].format(**names, ending=ending or "")
    done = dt_lens(name, *(word.format(**names) for word in WORDS[name]), option, given)
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert done.stderr.startswith("dt-lens: ") and done.stderr.count("\n") == 1, done.stderr
    assert "written" in done.stderr
    assert sorted(found.name for found in tmp_path.iterdir()) == sorted(["file", folder.name])
    assert not any(folder.iterdir())


@pytest.mark.parametrize(("name", "option"), WRITES)
def test_what_can_be_written_reaches_the_work(dt_lens: Run, tmp_path: Path, name: str, option: str) -> None:
    if name in ("train", "train-text", "record"):
        pytest.skip("its work is not the loading of a model")
    free = tmp_path / "new" / "free"
    file = tmp_path / "old" / f"out{WRITES[name, option] or ''}"
    if WRITES[name, option]:  # a file that exists is replaced
        file.parent.mkdir()
        file.write_text("of an earlier run")
    with pytest.raises(pytest.fail.Exception, match="the work began"):
        dt_lens(name, *(word.format(free=free) for word in WORDS[name]), option, file)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("t.csv.json", ".csv"), ("t.csv.zst", ".csv"), ("t.gz", ".csv"), ("t.safetensors.gz", ".safetensors"),
        ("t.md.gz", ".csv .md"), (".csv", ".csv"), ("csv", ".csv"),
    ],
)  # fmt: skip
def test_a_name_of_another_kind_is_refused(tmp_path: Path, name: str, kinds: str) -> None:
    with pytest.raises(DtLensError, match="file is written there; give a name that ends so"):
        require_file(tmp_path / name, *kinds.split())


@pytest.mark.parametrize("name", ["t.csv", "T.CSV", "run.1.csv", "t.csv.gz", "t.CSV.zip", "t.md"])
def test_a_name_of_the_kind_is_not(tmp_path: Path, name: str) -> None:
    require_file(tmp_path / name, ".csv", ".md")
