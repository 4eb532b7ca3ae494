"""Files and models that hold something else than plain weights: what is said, and that the remedy works."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import dt_lens
from dt_lens.errors import DtLensError


class Settings:
    """What code bases pickle beside their weights."""


def refusal(source: Any, load: Any = dt_lens.load) -> str:
    with pytest.raises(DtLensError) as caught:
        load(source)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message and len(message) < 600, message
    return message


@pytest.fixture
def tensors(make_lm: Any) -> dict[str, torch.Tensor]:
    """A small GPT-2's own tensors, the tied table once."""
    return {key: tensor for key, tensor in make_lm("gpt2").state_dict().items() if key != "lm_head.weight"}


@pytest.fixture
def folder(make_lm: Any, tmp_path: Path) -> Path:
    make_lm("gpt2").save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.mark.parametrize("name", ["agent.pt", "model.safetensors", "agent.d3"])
def test_a_pointer_of_git_lfs(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n")
    assert f"{name} is a Git LFS pointer" in refusal(file) and "git lfs pull" in refusal(file)
    if name == "model.safetensors":
        (tmp_path / "config.json").write_text("{}")
        assert "is a Git LFS pointer" in refusal(tmp_path)
        assert "is a Git LFS pointer" in refusal(tmp_path, dt_lens.open_checkpoint)


def test_a_safetensors_file_without_its_configuration(folder: Path) -> None:
    (folder / "config.json").rename(folder / "settings.json")
    for source in (folder, folder / "model.safetensors"):
        assert "has no config.json beside it, which a model in Hugging Face's form needs" in refusal(source)
        assert "docs/adapters.md" in refusal(source)


def test_a_file_of_any_name_beside_its_configuration(folder: Path) -> None:
    expected = dt_lens.load(folder, check=False)
    (folder / "model.safetensors").rename(folder / "step-300.safetensors")
    assert "or the file itself (step-300.safetensors)" in refusal(folder)
    mine = dt_lens.load(folder / "step-300.safetensors", check=False)
    named = dt_lens.load(folder / "step-300.safetensors", check=False, adapter="gpt2")
    assert mine.cfg == named.cfg == expected.cfg and torch.equal(
        mine.weights["embed.W_E"], expected.weights["embed.W_E"]
    )


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers(folder: Path, tensors: dict[str, torch.Tensor], prefix: str) -> None:
    expected = dt_lens.load(folder, check=False).weights["embed.W_E"]
    (folder / "model.safetensors").unlink()
    torch.save({f"{prefix}{key}": tensor for key, tensor in tensors.items()}, folder / "pytorch_model.bin")
    assert torch.equal(dt_lens.load(folder, check=False).weights["embed.W_E"], expected)


def test_a_whole_model_or_its_settings_in_a_pickle(tmp_path: Path) -> None:
    file = tmp_path / "agent.pt"
    torch.save(nn.Linear(2, 2), file)
    message = refusal(file)
    assert "torch.save(torch.load(file, weights_only=False).state_dict(), new_file)" in message
    torch.save({"model": nn.Linear(2, 2).state_dict(), "args": Settings()}, file)
    assert "Settings" in refusal(file) and "gives a dict: save that without the objects" in refusal(file)
    for save in ({}, {"_use_new_zipfile_serialization": False}):
        torch.save(Settings(), file, **save)
        assert "save its state_dict() and give that file" in refusal(file)


def test_files_of_a_lora(folder: Path) -> None:
    key = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
    save_file({key: torch.zeros(4, 16)}, folder / "adapter_model.safetensors")
    assert "model.merge_and_unload()" in refusal(folder / "adapter_model.safetensors")
    save_file({key: torch.zeros(4, 16)}, folder / "model.safetensors")
    for load in (dt_lens.load, dt_lens.open_checkpoint):
        assert "holds matrices of a LoRA" in refusal(folder, load)


def test_files_of_quantised_models(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    weight = "transformer.h.0.attn.c_attn.weight"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    assert dt_lens.load(folder, check=False).cfg.d_model == 16  # dequantised since
    plain = {key: tensor.clone() for key, tensor in tensors.items()}
    save_file({**plain, weight: plain[weight].to(torch.float8_e4m3fn)}, folder / "model.safetensors")
    assert "model.dequantize()" in refusal(folder)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("SCB", "absmax", "quant_state.bitsandbytes__nf4", "weight_scale_inv"):
        key = weight.replace("weight", name) if name.startswith("weight") else f"{weight}.{name}"
        save_file({**plain, key: torch.zeros(3)}, folder / "model.safetensors")
        for load in (dt_lens.load, dt_lens.open_checkpoint):
            assert "holds quantised weights" in refusal(folder, load)
    torch.save({"a": torch.eye(3).to_sparse()}, folder / "agent.pt")
    assert "with .to_dense() or .dequantize()" in refusal(folder / "agent.pt")


def compiled(model: nn.Module) -> nn.Module:
    """Of the form that ``torch.compile`` gives, which takes seconds to import."""

    class OptimizedModule(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._orig_mod = model

    return OptimizedModule()


def a_lora(model: nn.Module) -> nn.Module:
    layer: Any = model.get_submodule("transformer.h.0.mlp")
    layer.c_fc.lora_A = nn.ModuleDict({"default": nn.Linear(16, 2, bias=False)})
    return model


def quantised(model: nn.Module) -> nn.Module:
    class Linear4bit(nn.Module):
        __module__ = "bitsandbytes.nn.modules"

    layer: Any = model.get_submodule("transformer.h.0.mlp")
    layer.c_fc = Linear4bit()
    return model


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            compiled,
            "that torch.compile puts around a model; wrap the model inside it: dt_lens.wrap(model._orig_mod)",
        ),
        (
            nn.DataParallel,
            "DataParallel that torch puts around a model; wrap the model inside it: dt_lens.wrap(model.module)",
        ),
        (a_lora, "dt_lens.wrap(model.merge_and_unload())"),
        (quantised, "('transformer.h.0.mlp.c_fc' is a Linear4bit); wrap it dequantised"),
    ],
)
def test_live_models_inside_something_else(make_lm: Any, change: Any, said: str) -> None:
    assert said in refusal(change(make_lm("gpt2")), dt_lens.wrap)


def test_a_parameter_may_be_quantised_too(make_lm: Any) -> None:
    class Params4bit(nn.Parameter):
        pass

    model = make_lm("llama")
    part = model.model.layers[0].mlp.up_proj
    part.weight = Params4bit(part.weight.data)
    assert "'model.layers.0.mlp.up_proj' is a Linear" in refusal(model, dt_lens.wrap)
