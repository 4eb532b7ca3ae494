"""Files of llama2.c against its own forward pass, written separately."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dt_lens
from dt_lens import DtLensError, SingularEdit, WeightSVD
from originals.llama2_c import SIZES, exported, logits, random_tensors

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


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("version", [0, 1])
def test_what_export_py_writes_for_c(version: int, tied: bool, tmp_path: Path) -> None:
    tensors = random_tensors(tied=tied)
    (tmp_path / "model.bin").write_bytes(exported(tensors, version))
    lens = dt_lens.load(tmp_path / "model.bin", check=tied)
    close(lens(TOKENS), logits(TOKENS, tensors))
    assert (lens.cfg.n_kv_heads, lens.cfg.n_ctx, lens.cfg.d_mlp, lens.cfg.tied) == (2, 12, 40, tied)
    assert not lens.assumed
    close(dt_lens.load(tmp_path / "model.bin", check=False, eps=1e-2)(TOKENS), logits(TOKENS, tensors, eps=1e-2))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda whole: whole[:-4], "ask for [0-9]+ bytes, and it has"),
        (lambda whole: whole + bytes(4), "ask for [0-9]+ bytes, and it has"),
        (lambda whole: whole[:24] + (2**22).to_bytes(4, "little") + whole[28:], "ask for [0-9]{9,} bytes"),
        (lambda whole: whole[:12] + (5).to_bytes(4, "little") + whole[16:], "n_heads 5.*which no model can have"),
        (lambda whole: b"24ka" + bytes([2, 0, 0, 0]) + whole, "8-bit numbers; export version 0 or 1"),
        (lambda whole: b"24ka" + bytes([7, 0, 0, 0]) + whole, "version 7, which is not known here"),
        (lambda whole: b"24ka" + bytes([1, 0, 0, 0]) + bytes(99), "ends within its header"),
        (lambda whole: b"24ka" + bytes([1, 0, 0, 0]) + bytes(256), "dim 0, .*which no model can have"),
        (lambda whole: bytes(28), "cannot be read as a checkpoint"),
    ],
)
def test_an_export_that_is_not_whole(change: Any, said: str, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(change(exported(random_tensors(), 0)))
    with pytest.raises(DtLensError, match=said) as caught:
        dt_lens.load(tmp_path / "model.bin")
    assert "\n" not in str(caught.value) and "model.bin" in str(caught.value)
