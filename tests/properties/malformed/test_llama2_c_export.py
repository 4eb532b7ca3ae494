"""A ``model.bin`` of llama2.c that is cut off or whose header is damaged: one sentence, and little memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import dt_lens
from dt_lens import DtLensError
from originals.llama2_c import exported, random_tensors

SIZES = (20, 400)  # examples of a property in every run, and in make fuzz
SETTINGS = settings(deadline=None, database=None, phases=[Phase.generate, Phase.shrink])


def test_cut_off_or_damaged(scratch: Any, said: Any, little_memory: Any, size: int) -> None:
    wholes = [exported(random_tensors(tied=tied), version) for version in (0, 1) for tied in (True, False)]
    number = st.one_of(st.integers(-(2**31), 2**31 - 1), st.integers(-2, 70))

    @settings(SETTINGS, max_examples=size)
    @given(data=st.data(), whole=st.sampled_from(wholes), cut=st.booleans())
    def check(data: st.DataObject, whole: bytes, cut: bool) -> None:
        if cut:
            damaged = whole[: data.draw(st.one_of(st.integers(0, 300), st.integers(0, len(whole) - 1)))]
        else:
            place = 4 * data.draw(st.integers(0, 9))
            damaged = whole[:place] + data.draw(number).to_bytes(4, "little", signed=True) + whole[place + 4 :]
        with scratch() as folder, little_memory():
            Path(folder / "model.bin").write_bytes(damaged)
            try:
                lens = dt_lens.load(folder / "model.bin", check=False)
            except DtLensError as error:
                assert str(folder / "model.bin") in said(error) or "n_heads" in said(error), error
            else:  # the context of version 1 changes no size
                assert not cut and lens.cfg.d_model == 24 and lens.cfg.n_layers == 2

    check()
