"""A lens that maps any one weight wrongly is refused, whatever the format: nothing wrong is certified."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import dt_lens
from dt_lens import DtLensError
from dt_lens.lens.matrices import catalogue

SIZES = (6, 80)  # examples of a property in every run, and in make fuzz
SETTINGS = settings(deadline=None, database=None, phases=[Phase.generate, Phase.shrink])
WAYS = ("transposed", "heads", "features", "scaled", "negative", "one entry")


def wrong(way: str, weight: Tensor) -> Tensor:
    """The weight as a wrong reshape, another order of heads, or a wrong scale would show it."""
    changed = weight.detach().clone()
    match way:
        case "transposed":
            return changed.mT.reshape(weight.shape)
        case "heads":
            return changed.flip(0)
        case "features":
            return changed.flip(-1)
        case "scaled":
            return changed * 1.001
        case "negative":
            return -changed
    changed = changed.contiguous()
    changed.view(-1)[changed.abs().argmax()] *= 1.05
    return changed


def test_one_weight_that_is_mapped_wrongly(made: Any, scratch: Any, said: Any, size: int) -> None:
    with scratch() as folder:
        lens = made.load(made.write(folder, made.tensors))
        right = {name: weight.clone() for name, weight in lens.weights.items()}
    names = [name for name in right if name in catalogue(lens) or ".attn.W_" in name]
    shown: dict[str, Tensor] = dict(right)
    lens.__class__ = type("Disguised", (type(lens),), {"weights": property(lambda self: shown)})
    dt_lens.certify(lens)

    @settings(SETTINGS, max_examples=size)
    @given(data=st.data(), name=st.sampled_from(names), way=st.sampled_from([*WAYS, "another"]))
    def check(data: st.DataObject, name: str, way: str) -> None:
        alike = [other for other in names if right[other].shape == right[name].shape and other != name]
        if way == "one entry" and name.endswith("W_out"):
            return  # that of a neuron which is silent on the random batch does nothing there
        if way == "another" and alike:
            shown[name] = right[data.draw(st.sampled_from(alike))]
        else:
            shown[name] = wrong(way, right[name])
        try:
            if bool((shown[name] == right[name]).all()):
                return
            with pytest.raises(DtLensError) as caught:
                dt_lens.certify(lens)
            assert name in said(caught.value)
        finally:
            shown[name] = right[name]

    check()
