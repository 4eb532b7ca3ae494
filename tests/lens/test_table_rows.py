"""A certificate says which rows of a table it says nothing about."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dt_lens
from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.decision_transformer.model import HookedDecisionTransformer, Table
from dt_lens.errors import DtLensError
from dt_lens.lens.table_rows import unproven_rows

SIZES = {"d_model": 8, "n_layers": 1, "n_heads": 2, "d_mlp": 12, "n_ctx": 4, "max_ep_len": 20}


def a_model(**options: Any) -> HookedDecisionTransformer:
    torch.manual_seed(0)
    return HookedDecisionTransformer(HookedDecisionTransformerConfig(5, 3, **{**SIZES, **options}))


def by_brute_force(model: Any, name: str, batch: dict[str, Any]) -> list[int]:
    """Rows that change no output of a real step when they alone are changed."""
    keep = batch.get("attention_mask", torch.ones_like(batch["timesteps"])).bool()

    def run() -> Tensor:
        out: Tensor = model(**batch).last_hidden_state
        return out[keep.repeat_interleave(3, 1)[:, : out.shape[1]]].clone()

    silent = []
    with torch.no_grad():
        model.eval()
        before, table = run(), model.weights[name]
        for row in range(len(table)):
            kept = table[row].clone()
            table[row] += torch.randn(table.shape[1])
            silent += [row] if torch.equal(run(), before) else []
            table[row] = kept
    return silent


@pytest.mark.parametrize(
    "options",
    [
        {"position": "constant", "n_position": 9},
        {"position": "learned", "n_position": 30},
        {"position": "learned", "n_position": 3},
        {"position": "step", "n_position": 6, "timestep_of": "window"},
    ],
)
def test_the_rows_are_those_that_change_nothing(options: dict[str, Any]) -> None:
    model = a_model(**options)
    batch = model.probe(1)
    found = dt_lens.certify(model, 1).unproven
    for name in ("embed.timestep.W", "embed.position.W"):
        rows = [row for some in found[name] for row in some]
        assert rows == by_brute_force(model, name, batch) and len(rows) < len(model.weights[name]), name
    if model.cfg.timestep_of == "step":  # the ends of the timestep table are always looked at
        assert found["embed.timestep.W"][0].start > 0 and found["embed.timestep.W"][-1].stop < 20


def test_the_certificate_lists_them(make_hf: Any, make_lm: Any) -> None:
    certificate = dt_lens.certify(dt_lens.wrap(make_hf(n_positions=7), check=False))
    assert certificate.unproven["embed.position.W"] == (range(1, 7),)
    said = str(certificate)
    assert (
        " (not proven: " in said and "6 rows of embed.position.W, which change no output of this batch) in the" in said
    )
    lens = dt_lens.wrap(make_lm("gpt2"), check=False)
    tokens = lens.probe()["tokens"]
    unproven = dt_lens.certify(lens).unproven
    assert {row for rows in unproven["embed.W_E"] for row in rows} == set(range(lens.cfg.d_vocab)) - set(
        tokens.flatten().tolist()
    )
    assert unproven["pos_embed.W_pos"] == (range(7, lens.cfg.n_ctx),)


def test_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = a_model(position="learned", n_position=30)
        assert dt_lens.certify(model).unproven["embed.position.W"] == (range(12, 30),)
    assert dt_lens.certify(model).unproven["embed.position.W"] == (range(12, 30),)


def test_a_table_that_changes_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = a_model(position="learned", n_position=30)
    right = HookedDecisionTransformer._positions
    # The original's own mistake: it looks the rows up and does not use them.
    monkeypatch.setattr(
        HookedDecisionTransformer,
        "_add_position",
        lambda self, x: (self.hook_pos_embed(right(self, x.shape[1], "tokens")), x)[1],
    )
    with pytest.raises(DtLensError, match=r"no row of embed\.position\.W changes an output.*declare its tensor unused"):
        dt_lens.certify(model)
    monkeypatch.setattr(HookedDecisionTransformer, "_add_position", lambda self, x: x)
    with pytest.raises(DtLensError, match=r"hook_pos_embed' did not run: this forward pass does not reach"):
        dt_lens.certify(model)


def test_rows_that_are_not_those_named_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Table, "forward", lambda self, index: self.W[index.flip(-1)])
    with pytest.raises(DtLensError, match=r"hook_embed_timestep does not hold the rows of embed\.timestep\.W"):
        dt_lens.certify(a_model())


def test_a_model_without_tables_has_no_rows() -> None:
    assert unproven_rows(object(), {}, {}) == {}  # type: ignore[arg-type]
