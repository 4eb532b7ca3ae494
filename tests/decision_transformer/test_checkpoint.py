"""Saving: what Hugging Face's format cannot hold is refused, and a failed write leaves the old files."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dt_lens
from dt_lens.decision_transformer import checkpoint
from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.decision_transformer.facts import RunFacts
from dt_lens.decision_transformer.model import HookedDecisionTransformer
from dt_lens.errors import DtLensError

FILES = {"config.json", "dt_lens.json", "model.safetensors"}


def small(encoder: nn.Module | None = None, **options: Any) -> HookedDecisionTransformer:
    torch.manual_seed(0)
    sizes = {"d_model": 8, "n_layers": 1, "n_heads": 2, "d_mlp": 8, "n_ctx": 4, "max_ep_len": 20}
    return HookedDecisionTransformer(HookedDecisionTransformerConfig(5, 3, **{**sizes, **options}), encoder)


def test_what_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "agent"
    model = small(discrete_actions=True, action_tanh=False)
    model.facts = RunFacts(4, environment="CartPole-v1", about={"dataset": "x"})
    assert dt_lens.save_pretrained(model, str(folder)) == folder
    assert {file.name for file in folder.iterdir()} == FILES
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "decision_transformer" and config["dtype"] == "float32"
    again = dt_lens.load(folder)
    assert again.cfg.discrete_actions and again.facts == model.facts
    assert dt_lens.load(folder, discrete_actions=False).cfg.discrete_actions is False
    dt_lens.save_pretrained(small(d_mlp=16), folder)  # over the old one
    assert dt_lens.load(folder).cfg.d_mlp == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalization": "post"}, "has no normalization='post'; only 'pre' can be saved in its format"),
        ({"normalization": "none"}, "has no normalization='none'"),
        ({"embed_ln": False}, "has no embed_ln=False"),
        ({"final_ln": False}, "has no final_ln=False"),
        ({"embed_ln_eps": 1e-3}, r"has no embed_ln_eps=0\.001"),
        ({"position": "learned", "n_position": 12}, "no learned positions, so a model with position='learned' cannot"),
        ({"position": "step", "n_position": 12}, "no learned positions, so a model with position='step' cannot"),
        ({"timestep_of": "window"}, "has no timestep_of='window'"),
        ({"encoder": nn.Linear(5, 8)}, r"needs the weight 'embed\.state\.W', which this model lacks"),
    ],
)
def test_what_hugging_face_cannot_represent(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DtLensError, match=message):
        dt_lens.save_pretrained(small(**options), tmp_path / "agent")
    assert not (tmp_path / "agent").exists()


@pytest.mark.parametrize("where", ["the weights", "the last sync"])
def test_a_full_disk(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dt_lens.save_pretrained(small(), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "the weights":
        monkeypatch.setattr(checkpoint, "save_file", fail)
    else:  # some disks report that they are full only then
        monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(DtLensError, match=r"model\.safetensors cannot be written: No space left on device; choose"):
        dt_lens.save_pretrained(small(d_mlp=16), tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "agent").write_text("a file")
    for folder in (tmp_path / "agent", tmp_path / "agent" / "deeper", Path("/dev/null/agent")):
        with pytest.raises(DtLensError, match=r"cannot be written: .*; choose another folder or make room\.$"):
            dt_lens.save_pretrained(small(), folder)


def test_the_folder_alone_must_be_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mounted folder whose parent belongs to somebody else."""
    places: list[Path] = []
    touch = Path.touch

    def watched(self: Path) -> None:
        places.append(self.parent)
        touch(self)

    monkeypatch.setattr(Path, "touch", watched)
    dt_lens.save_pretrained(small(), tmp_path / "out")
    assert places == [tmp_path / "out"] * 3
