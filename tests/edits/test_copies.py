"""A copy made inside an edit knows it, and a checkpoint is not saved with an edit by accident."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import dt_lens
from dt_lens import DtLensError, SingularEdit
from dt_lens.edits.state import unedited

W_IN, W_OUT = "blocks.0.mlp.W_in", "blocks.1.mlp.W_out"


@pytest.mark.parametrize("kind", ["agent", "agent of Hugging Face", "gpt2"])
def test_a_copy_knows_its_edits(kind: str, make_dt: Any, make_hf: Any, make_lm: Any) -> None:
    if kind == "agent":
        model = make_dt()
    else:
        model = dt_lens.wrap(make_hf() if kind != "gpt2" else make_lm("gpt2"), check=False)
    before = {name: weight.clone() for name, weight in model.weights.items()}
    with SingularEdit(model, W_IN) as edit, edit.control(), SingularEdit(model, W_OUT):
        during = {name: weight.clone() for name, weight in model.weights.items()}
        copied = copy.deepcopy(model)
        assert all(torch.equal(weight, during[name]) for name, weight in copied.weights.items())
        assert [one.to_dict() for one in copied.active_edits] == [one.to_dict() for one in model.active_edits]
        assert all(one.model is copied for one in copied.active_edits)
        assert torch.equal(unedited(copied).weights[W_IN], before[W_IN])
        for one in list(copied.active_edits):
            one.undo()
        assert all(torch.equal(weight, before[name]) for name, weight in copied.weights.items())
        assert all(torch.equal(weight, during[name]) for name, weight in model.weights.items())
        with SingularEdit(copied, W_IN):
            pass
        second = copy.deepcopy(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.weights.items())
    assert len(second.active_edits) == 3  # what the original does no longer concerns the copy
    assert torch.equal(second.weights[W_IN], during[W_IN])


def test_an_agent_is_not_saved_with_an_edit_unless_asked(make_hf: Any, tmp_path: Path) -> None:
    model = dt_lens.wrap(make_hf(), check=False)
    before = model.weights[W_IN].clone()
    with SingularEdit(model, W_IN):
        with pytest.raises(DtLensError, match=r"An edit of blocks\.0\.mlp\.W_in is in force, and would be saved"):
            dt_lens.save_pretrained(model, tmp_path / "a")
        assert not (tmp_path / "a").exists()
        edited = model.weights[W_IN].clone()
        dt_lens.save_pretrained(model, tmp_path / "a", edited=True)
    dt_lens.save_pretrained(model, tmp_path / "b")
    assert torch.equal(dt_lens.load(tmp_path / "a", check=False).weights[W_IN], edited)
    assert torch.equal(dt_lens.load(tmp_path / "b", check=False).weights[W_IN], before)


@pytest.mark.parametrize("kind", ["agent", "gpt2"])
def test_hugging_faces_own_save_pretrained_refuses_too(kind: str, make_hf: Any, make_lm: Any, tmp_path: Path) -> None:
    theirs = make_hf() if kind == "agent" else make_lm("gpt2")
    model = dt_lens.wrap(theirs, check=False)
    edit = SingularEdit(model, W_IN)
    with edit, edit.control():
        for one in (theirs, copy.deepcopy(theirs)):
            with pytest.raises(DtLensError, match="edited=True"):
                one.save_pretrained(tmp_path / "a")
        assert not (tmp_path / "a").exists()
        edited = model.weights[W_IN].clone()
        theirs.save_pretrained(tmp_path / "a", edited=True)
    assert "save_pretrained" not in vars(theirs)
    theirs.save_pretrained(tmp_path / "b")
    back = type(theirs).from_pretrained(tmp_path / "a")
    assert torch.equal(dt_lens.wrap(back, check=False).weights[W_IN], edited)
    with pytest.raises(DtLensError, match="changes no bit"):
        SingularEdit(model, W_IN, value=1.0).apply()
    assert "save_pretrained" not in vars(theirs)
