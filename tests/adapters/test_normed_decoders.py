"""What Qwen 3 has beyond Llama: norms of queries and keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dt_lens
from dt_lens import DtLensError, SingularEdit, WeightSVD
from dt_lens.language_model.model import HookedLanguageModel
from dt_lens.lens.matrices import catalogue, find_matrix, select_matrices

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [28, 7, 18, 2, 8, 1, 8, 0]])
ODD: list[tuple[str, dict[str, Any]]] = [
    ("qwen3", {"head_dim": 6, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("qwen3", {"attention_bias": True, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
]
NORMED = ("qwen3",)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def spoiled(lens: HookedLanguageModel, name: str) -> HookedLanguageModel:
    """A lens on the same model that shows one weight rolled by one coordinate."""

    class Spoiled(HookedLanguageModel):
        @property
        def weights(self) -> dict[str, Tensor]:
            found = dict(super().weights)
            return {**found, name: found[name].roll(1, -1)}

    return Spoiled(lens.model, lens.family, lens.cfg)


@pytest.mark.parametrize(("kind", "options"), ODD, ids=[f"{kind}-{i}" for i, (kind, _) in enumerate(ODD)])
def test_odd_configurations_live_from_a_file_and_in_place(
    kind: str, options: dict[str, Any], make_lm: Any, tmp_path: Path
) -> None:
    model = make_lm(kind, **options)
    wanted = model(TOKENS).logits
    lens = dt_lens.wrap(model)
    out, cache = lens.run_with_cache(TOKENS)
    close(out, wanted)
    assert set(cache) == set(lens.hook_dict)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    loaded, opened = dt_lens.load(tmp_path), dt_lens.open_checkpoint(tmp_path)
    close(loaded(TOKENS), wanted)
    assert opened.cfg == loaded.cfg == lens.cfg
    for name, weight in lens.weights.items():
        assert torch.equal(opened.weights[name], weight), name
    assert list(catalogue(opened)) == list(catalogue(lens))
    for name in ("blocks.1.attn.OV.1", "blocks.1.mlp.W_in", "blocks.0.mlp.W_out"):
        close(WeightSVD(opened)[name].sigma, WeightSVD(lens)[name].sigma)
    for matrix in ("blocks.0.attn.W_K", "blocks.1.mlp.W_in", "blocks.1.attn.W_O"):
        with SingularEdit(lens, matrix, sv=0, value="flip"):
            assert (model(TOKENS).logits - wanted).abs().max() > 1e-4
    assert torch.equal(model(TOKENS).logits, wanted)


@pytest.mark.parametrize("kind", NORMED)
def test_a_norm_of_queries_or_keys_that_is_another_is_refused(kind: str, make_lm: Any) -> None:
    lens = dt_lens.wrap(make_lm(kind), check=False)
    for name in ("q_norm", "k_norm"):
        with pytest.raises(DtLensError, match=rf"blocks\.1\.attn\.{name} does not reproduce"):
            dt_lens.certify(spoiled(lens, f"blocks.1.attn.{name}.w"))


@pytest.mark.parametrize("kind", NORMED)
def test_there_is_no_qk_circuit_where_queries_and_keys_are_normed(kind: str, make_lm: Any) -> None:
    lens = dt_lens.wrap(make_lm(kind), check=False)
    assert not [name for name in catalogue(lens, per_head=True) if ".QK." in name]
    said = r"no circuit '.*QK.*': its queries and keys pass a norm of their own.*use W_Q and W_K"
    for look in (
        lambda: find_matrix(lens, "blocks.1.attn.QK.0"),
        lambda: find_matrix(lens, "blocks.1.attn.QK", head=0),
        lambda: select_matrices(lens, ["*.QK.*"]),
        lambda: WeightSVD(lens)["blocks.1.attn.QK.0"],
        lambda: SingularEdit(lens, "blocks.1.attn.QK.0", side="query"),
    ):
        with pytest.raises(DtLensError, match=said) as caught:
            look()
        assert "\n" not in str(caught.value)
