"""One declaration serves a live tensor and a file, and says no to what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dt_lens import DtLensError
from dt_lens.language_model.layout import At, Interleaved, Layout, Part, Stored

SIZES = {"d": 6, "head": 2, "kv": 1, "e": 3, "mlp": 8, "vocab": 11}
FUSED = At("h.{l}.qkv.weight", "d (head e) -> head d e", Part(1, 1, 3))
BY_HEAD = At("h.{l}.all.weight", "(head part e) d -> part head d e", Interleaved(2, 3))
UNEQUAL = At("h.{l}.some.weight", "(kv e) d -> kv d e", Part(0, 1, ("head e", "kv e", "2")))
LINEAR = At("h.{l}.o.weight", "d (head e) -> head e d")


def test_a_pattern_says_the_shape_of_the_stored_tensor() -> None:
    assert Stored.of(FUSED, SIZES, 4).shape == (6, 18)
    assert Stored.of(FUSED, SIZES, 4).key == "h.4.qkv.weight"
    assert Stored.of(At("w", "mlp d -> d mlp"), SIZES).shape == (8, 6)


def test_a_part_is_a_view_with_its_heads_in_order() -> None:
    tensor = torch.arange(6 * 18.0).reshape(6, 18)
    view = Stored.of(FUSED, SIZES, 0).view(tensor)
    assert view.shape == (2, 6, 3)
    assert torch.equal(view[1], tensor[:, 9:12])
    view[1, 2, 0] = -1
    assert tensor[2, 9] == -1


def test_parts_that_alternate_by_head_and_parts_of_unequal_size() -> None:
    tensor = torch.arange(18 * 6.0).reshape(18, 6)
    view = Stored.of(BY_HEAD, SIZES, 0).view(tensor)
    assert torch.equal(view[0], tensor[6:9].T)  # the third part of the first head
    assert torch.equal(view[1], tensor[15:18].T)
    view[1, 2, 0] = -1
    assert tensor[15, 2] == -1
    assert Stored.of(UNEQUAL, SIZES, 0).shape == (6 + 3 + 2, 6)
    assert torch.equal(Stored.of(UNEQUAL, SIZES, 0).view(tensor[:11])[0], tensor[6:9].T)


@pytest.mark.parametrize("rule", [FUSED, LINEAR, BY_HEAD, UNEQUAL])
def test_a_file_gives_what_the_tensor_gives(rule: At, tmp_path: Path) -> None:
    stored = Stored.of(rule, SIZES, 0)
    tensor = torch.randn(stored.shape)
    save_file({stored.key: tensor, "bare": tensor + 1}, tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert torch.equal(stored.read(file), stored.view(tensor))
        assert torch.equal(stored.read(file, "bare"), stored.view(tensor + 1))


def layout() -> Layout:
    rules = {
        "a": At("model.a", "d -> d"),
        "b": At("model.h.{l}.b", "mlp d -> d mlp"),
        "u": At("head", "vocab d -> d vocab"),
    }
    entries = {name: Stored.of(rule, SIZES, 0) for name, rule in rules.items()}
    return Layout(entries, (r"model\.h\.\d+\.bias",), "model.", 1, "model.h.{l}.")


def shapes() -> dict[str, tuple[int, ...]]:
    return {"model.a": (6,), "model.h.0.b": (8, 6), "head": (11, 6)}


def test_keys_with_the_prefix_without_it_and_ignored_ones() -> None:
    assert layout().require(shapes()) == {key: key for key in shapes()}
    bare = {key.removeprefix("model."): shape for key, shape in shapes().items()}
    assert layout().require({**bare, "h.0.bias": (3,)}) == {"model.a": "a", "model.h.0.b": "h.0.b", "head": "head"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model.h.0.b": None}, "no tensor 'model.h.0.b'"),
        ({"model.h.0.b": (6, 8)}, "'model.h.0.b' has shape [6, 8]; [8, 6] was expected"),
        ({"model.h.1.b": (8, 6)}, "'model.h.1.b' of block 1, and its configuration says there are 1 blocks"),
        ({"model.h.0.c": (8, 6)}, "'model.h.0.c' that a model of its configuration has no place for"),
        ({"model.h.0.bias_k": (8,)}, "'model.h.0.bias_k'"),  # begins like one
        ({"model.h.0.c.bias": (8,)}, "'model.h.0.c.bias'"),  # ends like an ignored key but is not one
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, tuple[int, ...] | None], said: str) -> None:
    held = {key: shape for key, shape in {**shapes(), **change}.items() if shape is not None}
    with pytest.raises(DtLensError) as caught:
        layout().require(held)
    assert said in str(caught.value)


def test_views_of_everything() -> None:
    tensors = {key: torch.randn(shape) for key, shape in shapes().items()}
    views = layout().views(tensors)
    assert torch.equal(views["u"], tensors["head"].T)
    assert views["u"].data_ptr() == tensors["head"].data_ptr()
