"""Weights read in place give what the loaded model's give; a vocabulary too large to hold; stops, damage, refusals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
)

import dt_lens
from dt_lens import DtLensError, SingularEdit, WeightSVD
from dt_lens.lens.matrices import catalogue
from dt_lens.svd import decompositions as svd
from dt_lens.svd import side_labels as matching
from dt_lens.svd.two_models import comparison

GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "vocab_size": 70}
LLAMA = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA |= {"intermediate_size": 48, "vocab_size": 70, "max_position_embeddings": 16}
GPT |= {"bos_token_id": 0, "eos_token_id": 0}
MODELS: dict[str, Any] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT)),
    "gptj": lambda: GPTJForCausalLM(GPTJConfig(**GPT, rotary_dim=4)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**LLAMA, head_dim=6)),
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**LLAMA, pad_token_id=0)),
}


def saved(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    model = MODELS[kind]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + float("norm" in name or "ln_" in name))
    model.to(dtype).save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").exists()  # several shards
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", list(MODELS))
def test_the_scan_is_the_loaded_models(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = saved(kind, tmp_path, dtype)
    opened, loaded = dt_lens.open_checkpoint(folder), dt_lens.load(folder)  # loading certifies the name map
    assert list(catalogue(opened)) == list(catalogue(loaded))
    for name, weight in loaded.weights.items():
        assert torch.equal(opened.weights[name], weight), name
    one, two = (
        WeightSVD(model, rank=6).scan(embeddings=["token_in", "token_out"], draws=200) for model in (opened, loaded)
    )
    pd.testing.assert_frame_equal(one, two)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_vocabulary_in_blocks(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same matches; other draws of the same null."""
    opened = dt_lens.open_checkpoint(saved(kind, tmp_path))
    whole = WeightSVD(opened).scan(["*.W_in", "*.OV.*"], embeddings=["token_in", "token_out"])
    monkeypatch.setattr(matching, "WHOLE", 0)
    monkeypatch.setattr("dt_lens.svd.side_labels.BLOCK", 4000)  # a few rows at a time
    blocks = WeightSVD(opened).scan(["*.W_in", "*.OV.*"], embeddings=["token_in", "token_out"])
    chances = ["z", "p_value", "q_value"]
    pd.testing.assert_frame_equal(whole.drop(columns=chances), blocks.drop(columns=chances), rtol=1e-9)
    p, expected = blocks["p_value"], whole["p_value"]
    assert ((p - expected).abs() <= 0.1 * expected + 0.02).all()


def test_a_stopped_scan_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "WHOLE", 0)
    folder = saved("gptj", tmp_path / "model")
    straight = WeightSVD(dt_lens.open_checkpoint(folder), rank=4).scan(embeddings="token_*", draws=200)
    reported: list[str] = []

    def stop(what: str, share: float) -> None:
        reported.append(what)
        if len(reported) == 9:
            raise KeyboardInterrupt

    def go(tell: Any) -> pd.DataFrame:
        resumed = WeightSVD(dt_lens.open_checkpoint(folder), rank=4, resume=tmp_path / "kept")
        return resumed.scan(embeddings="token_*", progress=tell, draws=200)

    with pytest.raises(KeyboardInterrupt):
        go(stop)
    kept = sorted((tmp_path / "kept").iterdir())
    assert len(kept) == 8
    kept[0].write_bytes(kept[0].read_bytes()[:-7])  # as a full disk leaves it
    decomposed: list[str] = []
    real = svd.decompose_matrix

    def counted(factors: Any, rank: Any) -> Any:
        decomposed.append(factors.matrix.name)
        return real(factors, rank)

    monkeypatch.setattr(svd, "decompose_matrix", counted)
    pd.testing.assert_frame_equal(go(False), straight)
    missing = len(catalogue(dt_lens.open_checkpoint(folder))) - 7
    assert len(decomposed) == missing
    pd.testing.assert_frame_equal(go(False), straight)
    assert len(decomposed) == missing
    # Other weights are another matter.
    shard = next(file for file in sorted((tmp_path / "model").glob("*.safetensors")) if len(load_file(file)) > 1)
    save_file({key: tensor * 1.5 for key, tensor in load_file(shard).items()}, shard, {"format": "pt"})
    assert not go(False)["sigma"].equals(straight["sigma"])


KILLED = """
import os, signal, sys
import dt_lens

def tell(what, share):
    if len(os.listdir(sys.argv[3])) >= 3:
        os.kill(os.getpid(), signal.SIGKILL)

one, two = (dt_lens.open_checkpoint(folder) for folder in sys.argv[1:3])
dt_lens.compare(one, two, resume=sys.argv[3], progress=tell)
"""


def test_a_comparison_that_was_killed_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, other, kept = saved("gptj", tmp_path / "a"), saved("gptj", tmp_path / "b"), tmp_path / "kept"
    for shard in sorted(other.glob("*.safetensors")):
        held = load_file(shard)
        held = {key: tensor * 1.1 if "h.1.attn" in key else tensor for key, tensor in held.items()}
        save_file(held, shard, {"format": "pt"})
    kept.mkdir()
    ended = subprocess.run([sys.executable, "-c", KILLED, folder, other, kept], check=False)
    assert ended.returncode == -signal.SIGKILL
    (kept / ".part-1-1-0.safetensors").write_bytes(b"cut off")  # as one that was killed while writing leaves it
    measured: list[str] = []
    real = comparison.measure
    monkeypatch.setattr(comparison, "measure", lambda one, *rest: measured.append(one.matrix.name) or real(one, *rest))
    one, two = dt_lens.open_checkpoint(folder), dt_lens.open_checkpoint(other)
    found = dt_lens.compare(one, two, resume=kept)
    differ = [name for name in catalogue(one) if name.startswith("blocks.1.attn")]
    assert list(found.spectra) == differ and measured == differ[3:]
    # The models in memory say the same, to the bit.
    straight = dt_lens.compare(dt_lens.load(folder), dt_lens.load(other))
    pd.testing.assert_frame_equal(found.table, straight.table, check_exact=True)


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    folder = saved("gptj", tmp_path)
    opened = dt_lens.open_checkpoint(folder)
    with pytest.raises(DtLensError, match=r"opened for its weights only"):
        SingularEdit(opened, "blocks.0.mlp.W_in")
    with pytest.raises(DtLensError, match=r"opened for its weights only"):
        dt_lens.certify(opened)
    with pytest.raises(DtLensError, match=r"opened for its weights only"):
        dt_lens.evaluate(opened)
    with pytest.raises(DtLensError, match=r"Unknown option 'n_heads'"):
        dt_lens.open_checkpoint(folder, n_heads=3)
    with pytest.raises(DtLensError, match=r"cannot read weights in place"):
        dt_lens.open_checkpoint(folder, adapter="kzl")
    with pytest.raises(DtLensError, match=r"There is no model"):
        dt_lens.open_checkpoint(tmp_path / "nowhere")
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    names = sorted(set(good["weight_map"].values()))
    wrong = {**good, "weight_map": {**good["weight_map"], "transformer.h.7.nothing": names[0]}}
    index.write_text(json.dumps(wrong))
    with pytest.raises(DtLensError, match=r"holds the tensor 'transformer.h.7.nothing', and it does not"):
        dt_lens.open_checkpoint(folder)
    index.write_text(json.dumps(good))
    config = folder / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "n_embd": 64}))
    with pytest.raises(DtLensError, match=r"'transformer.wte.weight' has shape \[70, 32\]; \[70, 64\] was expected"):
        dt_lens.open_checkpoint(folder)
    config.write_text(json.dumps({**values, "model_type": "mamba"}))
    with pytest.raises(DtLensError, match=r"its model_type is mamba"):
        dt_lens.open_checkpoint(folder)
    config.write_text(json.dumps(values))
    whole = (folder / names[1]).read_bytes()
    (folder / names[1]).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DtLensError, match=r"is not a complete safetensors file"):
        dt_lens.open_checkpoint(folder)
    (folder / names[1]).unlink()
    with pytest.raises(DtLensError, match=r"is missing; fetch it again"):
        dt_lens.open_checkpoint(folder)


MEASURE = """
import resource, sys
import dt_lens
model = dt_lens.open_checkpoint(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for layer in range(model.cfg.n_layers):
    dt_lens.WeightSVD(model, rank=2)[f"blocks.{layer}.attn.OV.0"]
    float(model.weights[f"blocks.{layer}.mlp.W_in"].sum())
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.acceptance
def test_weights_do_not_pile_up(tmp_path: Path) -> None:
    """Going through 150 MB of weights takes the memory of a block or two."""
    big = GPTJConfig(n_embd=512, n_layer=12, n_head=8, rotary_dim=16, n_positions=16, vocab_size=70, eos_token_id=0)
    GPTJForCausalLM(big).save_pretrained(tmp_path)
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) / 2**20
    assert size > 140
    grown = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    assert float(grown.stdout) < 0.4 * size
