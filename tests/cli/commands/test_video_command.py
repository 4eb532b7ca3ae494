"""The command `video`: a film of a bundled agent, and errors in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image
from typer.testing import CliRunner

from dt_lens.cli.app import app
from dt_lens.errors import DtLensError


def test_a_film_of_an_edited_agent_beside_the_unedited_one(tmp_path: Path) -> None:
    file = tmp_path / "new" / "taxi.gif"
    words = ["video", "taxi", "--edit", "blocks.0.mlp.W_in", "--sv", "0", "--value", "zero", "--steps", "4"]
    done = CliRunner().invoke(app, [*words, "--size", "64", "--seed", "1", "--out", str(file), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [row["arm"] for row in found["episodes"]] == ["unedited", "edited"] and found["frames"] == 5
    with Image.open(file) as film:
        assert film.n_frames == 5 and film.width == 2 * 64 + 4


def test_a_language_model_and_another_ending_are_refused(tmp_path: Path) -> None:
    text = CliRunner().invoke(app, ["video", "tiny-gpt2", "--out", str(tmp_path / "v.mp4")])
    assert isinstance(text.exception, DtLensError) and "a video is of an agent" in str(text.exception)
    other = CliRunner().invoke(app, ["video", "taxi", "--out", str(tmp_path / "v.avi")])
    assert isinstance(other.exception, DtLensError) and "ends in .avi" in str(other.exception)
