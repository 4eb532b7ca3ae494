"""Small GPTs after nanoGPT: a real one to the loss that it was trained to, and both spellings of the keys."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import dt_lens
from dt_lens import DtLensError, SingularEdit, WeightSVD
from dt_lens_adapters.nano_gpt import CharacterTokenizer
from originals.nano_gpt import as_nano

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [28, 7, 18, 2, 8, 1, 8, 0]])


def test_the_real_one_reaches_its_loss(real_checkpoints: Callable[[str], Path]) -> None:
    lens = dt_lens.load(real_checkpoints("char-gpt2/ckpt.pt"))
    text = real_checkpoints("char-gpt2/corpus.txt").read_text()
    tokens = lens.to_tokens(text)[0]
    windows = tokens.unfold(0, lens.cfg.n_ctx + 1, lens.cfg.n_ctx)
    with torch.no_grad():
        loss = float(F.cross_entropy(lens(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()))
    assert abs(loss - 0.070) < 0.003
    assert lens.cfg.tied
    assert lens.labels[:3] == ["\\n", " ", ","]
    assert lens.tokenizer.decode(tokens[:40]) == text[:40]
    table = WeightSVD(lens, rank=4).scan(["*.W_in", "*.W_out"], seed=0)
    assert set(table["embedding"]) == {"token_in", "token_out", "position_in"}
    with SingularEdit(lens, "blocks.2.mlp.W_in", sv=0), torch.no_grad():
        worse = float(F.cross_entropy(lens(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()))
    assert worse > loss + 0.05


@pytest.mark.parametrize("spelling", ["transformer", "blocks"])
@pytest.mark.parametrize("compiled", [False, True])
def test_both_spellings(spelling: str, compiled: bool, make_lm: Any, tmp_path: Path) -> None:
    model = make_lm("gpt2", activation_function="gelu")
    tensors = as_nano(model, spelling)
    mask = "transformer.h.0.attn.bias" if spelling == "transformer" else "blocks.0.attn.mask"
    tensors[mask] = torch.ones(1, 1, 12, 12)
    if compiled:
        tensors = {f"_orig_mod.{key}": tensor for key, tensor in tensors.items()}
    torch.save({"model": tensors, "model_args": {"n_head": 4}}, tmp_path / "ckpt.pt")
    lens = dt_lens.load(tmp_path / "ckpt.pt")
    torch.testing.assert_close(lens(TOKENS), model(TOKENS).logits, rtol=1e-4, atol=1e-5)
    assert lens.tokenizer is None


def test_a_head_of_its_own(make_lm: Any, tmp_path: Path) -> None:
    model = make_lm("gpt2", activation_function="gelu", tie_word_embeddings=False)
    torch.save(as_nano(model, "blocks"), tmp_path / "ckpt.pt")
    lens = dt_lens.load(tmp_path / "ckpt.pt", n_heads=4)
    assert not lens.cfg.tied
    torch.testing.assert_close(lens(TOKENS), model(TOKENS).logits, rtol=1e-4, atol=1e-5)


def test_a_model_without_biases(make_lm: Any, tmp_path: Path) -> None:
    model = make_lm("gpt2", activation_function="gelu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    tensors = {key: tensor for key, tensor in as_nano(model, "transformer").items() if not key.endswith("bias")}
    torch.save({"model": tensors, "model_args": {"n_head": 4}}, tmp_path / "ckpt.pt")
    lens = dt_lens.load(tmp_path / "ckpt.pt")
    torch.testing.assert_close(lens(TOKENS), model(TOKENS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "given", "said"),
    [
        (lambda t: None, {}, "pass n_heads="),
        (lambda t: None, {"n_heads": 3}, "n_head is 3"),
        (lambda t: None, {"n_heads": 4, "act_fn": "gelo"}, "act_fn is 'gelo'"),
        (lambda t: None, {"heads": 4}, "Unknown option 'heads'"),
        (lambda t: t.update({"blocks.0.attn.bias_k": torch.ones(2)}), {"n_heads": 4}, r"blocks\.0\.attn\.bias_k"),
        (lambda t: t.pop("blocks.1.ln_1.bias"), {"n_heads": 4}, r"no tensor 'transformer\.h\.1\.ln_1\.bias'"),
        (lambda t: t["ln_f.weight"].fill_(float("inf")), {"n_heads": 4}, r"ln_f\.weight.*NaN or infinite"),
        (lambda t: t.update({"blocks.0.mlp.c_fc.weight": torch.ones(16)}), {"n_heads": 4}, "c_fc"),
        (lambda t: t.update({"ln_f.weight": torch.ones(16).half()}), {"n_heads": 4}, "float16"),
    ],
)
def test_what_does_not_fit(change: Any, given: Any, said: str, make_lm: Any, tmp_path: Path) -> None:
    tensors = as_nano(make_lm("gpt2"), "blocks")
    change(tensors)
    torch.save(tensors, tmp_path / "ckpt.pt")
    with pytest.raises(DtLensError, match=said):
        dt_lens.load(tmp_path / "ckpt.pt", **given)


def test_characters_that_are_not_in_the_vocabulary() -> None:
    tokenizer = CharacterTokenizer(["a", "b"])
    assert tokenizer.decode(tokenizer.encode("abba")) == "abba"
    with pytest.raises(DtLensError, match="'c' is not in this model's vocabulary of 2"):
        tokenizer.encode("abc")


def saved_by_build_nanogpt(file: Path, model: Any, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> None:
    """A file as its train_gpt2.py writes it: the settings are an object of a class in the script itself."""
    config = type("GPTConfig", (), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "GPTConfig", config, raising=False)
    settings = config()
    vars(settings).update({"block_size": 12, "vocab_size": 29, "n_layer": 2, "n_head": 4, "n_embd": 16, **fields})
    beside = {"config": settings, "step": 19072, "val_loss": 3.07}
    torch.save({"model": as_nano(model, "transformer"), **beside}, file)
    monkeypatch.undo()  # whoever reads it has no such class


def test_a_file_of_build_nanogpt(make_lm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_lm("gpt2", activation_function="gelu_new", size=0.6)
    saved_by_build_nanogpt(tmp_path / "model_19072.pt", model, monkeypatch)
    tokenizer = CharacterTokenizer([chr(97 + i) for i in range(25)])
    lens = dt_lens.load(tmp_path / "model_19072.pt", tokenizer=tokenizer)
    assert lens.cfg.n_heads == 4 and lens.assumed == {"act_fn": "gelu_new"}
    torch.testing.assert_close(lens(TOKENS), model(TOKENS).logits, rtol=1e-5, atol=1e-5)
    other = dt_lens.load(tmp_path / "model_19072.pt", act_fn="gelu")
    assert (other(TOKENS) - model(TOKENS).logits).abs().max() > 1e-4
    assert lens.labels[24:26] == ["y", "unused 25"]  # its vocabulary is padded to a round size


def test_settings_that_are_no_settings_are_refused(
    make_lm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_by_build_nanogpt(tmp_path / "model.pt", make_lm("gpt2"), monkeypatch, n_head=[4])
    with pytest.raises(DtLensError, match="An object of settings in the checkpoint holds something else"):
        dt_lens.load(tmp_path / "model.pt")
