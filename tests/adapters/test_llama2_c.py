"""Files of llama2.c against its own forward pass, written separately."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dt_lens
from dt_lens import DtLensError, SingularEdit, WeightSVD
from originals.llama2_c import SIZES, logits, random_tensors

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [28, 7, 18, 2, 8, 1, 8, 0]])


def close(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_what_train_py_saves(tied: bool, tmp_path: Path) -> None:
    tensors = random_tensors(tied=tied)
    beside = {"model_args": {**SIZES, "multiple_of": 32, "dropout": 0.0}, "iter_num": 9, "best_val_loss": 2.0}
    prefixed = {f"_orig_mod.{key}": tensor for key, tensor in tensors.items()}
    torch.save({"model": prefixed, "config": {}, "optimizer": {}, **beside}, tmp_path / "ckpt.pt")
    lens = dt_lens.load(tmp_path / "ckpt.pt")
    close(lens(TOKENS), logits(TOKENS, tensors))
    assert (lens.cfg.n_kv_heads, lens.cfg.n_ctx, lens.cfg.d_mlp, lens.cfg.tied) == (2, 12, 40, tied)
    assert not lens.assumed
    close(lens.run_with_cache(TOKENS)[0], logits(TOKENS, tensors))
    # QK is a circuit of the stream, which does not know the order of a head's features.
    q, k = (tensors[f"layers.1.attention.w{letter}.weight"] for letter in "qk")
    expected = q[18:24].T.double() @ k[6:12].double()
    close(WeightSVD(lens, fold_layernorm=False)["blocks.1.attn.QK.3"].sigma, torch.linalg.svdvals(expected)[:6])
    wanted = logits(
        TOKENS, {**tensors, "layers.0.feed_forward.w2.weight": 0 * tensors["layers.0.feed_forward.w2.weight"]}
    )
    with SingularEdit(lens, "blocks.0.mlp.W_out", sv=slice(None), value="zero"):
        close(lens(TOKENS), wanted)


def test_a_bare_state_dict_needs_the_heads_and_lists_what_is_assumed(tmp_path: Path) -> None:
    """As Meta's consolidated.00.pth, which has the frequencies in it and its arguments elsewhere."""
    tensors = random_tensors(tied=False)
    torch.save({**tensors, "rope.freqs": torch.ones(3)}, tmp_path / "consolidated.00.pth")
    with pytest.raises(DtLensError, match="pass n_heads="):
        dt_lens.load(tmp_path / "consolidated.00.pth")
    lens = dt_lens.load(tmp_path / "consolidated.00.pth", n_heads=4)
    assert lens.assumed == {"n_ctx": 2048, "eps": 1e-5, "rope_theta": 1e4}
    close(lens(TOKENS), logits(TOKENS, tensors))
    told = dt_lens.load(tmp_path / "consolidated.00.pth", n_heads=4, eps=1e-2, rope_theta=5e2, n_ctx=8)
    assert not told.assumed and told.cfg.n_ctx == 8
    close(told(TOKENS), logits(TOKENS, tensors, eps=1e-2, theta=5e2))


@pytest.mark.parametrize(
    ("change", "given", "said"),
    [
        (lambda t: None, {"n_heads": 5}, "n_heads is 5; it must"),
        (lambda t: None, {"n_heads": 24}, "n_heads is 24; it must"),
        (lambda t: None, {"n_heads": 4, "act_fn": "relu"}, "Unknown option 'act_fn'"),
        (lambda t: None, {"n_heads": 4, "n_ctx": 0}, "given, says n_ctx is 0"),
        (lambda t: None, {"n_heads": 4, "eps": "x"}, "eps is 'x'"),
        (lambda t: t.pop("layers.1.ffn_norm.weight"), {"n_heads": 4}, r"no tensor 'layers\.1\.ffn_norm\.weight'"),
        (lambda t: t.update({"layers.0.attention.wq.bias": torch.ones(24)}), {"n_heads": 4}, r"wq\.bias"),
        (lambda t: t.update({"layers.7.ffn_norm.weight": torch.ones(24)}), {"n_heads": 4}, r"layers\.7|no tensor"),
        (lambda t: t.update({"norm.weight": torch.ones(3)}), {"n_heads": 4}, r"'norm\.weight' has shape \[3\]"),
        (lambda t: t["norm.weight"].fill_(float("nan")), {"n_heads": 4}, r"norm\.weight.*NaN"),
    ],
)
def test_what_does_not_fit(change: Any, given: dict[str, Any], said: str, tmp_path: Path) -> None:
    tensors = random_tensors(tied=False)
    change(tensors)
    torch.save(tensors, tmp_path / "model.pt")
    with pytest.raises(DtLensError, match=said) as caught:
        dt_lens.load(tmp_path / "model.pt", **given)
    assert "\n" not in str(caught.value)
