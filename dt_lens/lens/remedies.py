"""Models and files that hold something else than plain weights: what they are, and how to get the plain weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dt_lens.errors import DtLensError, a_type

__all__ = ["refuse_pointer", "refuse_special_files", "refuse_special_model"]

POINTER = b"version https://git-lfs.github.com/spec/"
LORA = re.compile(r"(^|\.)(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)(\.|$)")
# What bitsandbytes, GPTQ, AWQ and compressed-tensors store beside or in place of a weight.
QUANTISED = re.compile(r".*\.(SCB|absmax|quant_map|quant_state\.\w+|qweight|qzeros|weight_packed|weight_scale(_inv)?)")
# Where another library's wrapper keeps the model.
WRAPPERS = {
    "OptimizedModule": ("_orig_mod", "torch.compile"),
    "DataParallel": ("module", "torch"),
    "DistributedDataParallel": ("module", "torch"),
    "FullyShardedDataParallel": ("module", "torch"),
}
DEQUANTISE = "load it with Transformers and give the result of model.dequantize(), or take the unquantised original"


def refuse_pointer(file: Path) -> None:
    """Raise ``DtLensError`` for what Git LFS leaves in place of a large file that was not fetched."""
    try:
        with file.open("rb") as stream:
            start = stream.read(len(POINTER))
    except OSError:
        return  # whoever reads the file says why
    if start == POINTER:
        raise DtLensError(
            f"{file} is a Git LFS pointer, a few lines in place of the file; fetch the file itself with git lfs pull."
        )


def refuse_special_files(
    source: Path, keys: Iterable[str], config: Mapping[str, Any], whole: Collection[Tensor] = ()
) -> None:
    """Raise ``DtLensError`` for the files of a LoRA or of a quantised model.

    Args:
        source: of the tensors, for the message.
        keys: of the tensors.
        config: the values of ``config.json``.
        whole: the tensors, where they are read.
    """
    for key in keys:
        if LORA.search(key):
            raise DtLensError(
                f"{source} holds matrices of a LoRA ({key!r}); load it with peft, merge it into the model with "
                "model.merge_and_unload(), and give the folder that its save_pretrained writes."
            )
        if QUANTISED.fullmatch(key):
            raise DtLensError(f"{source} holds quantised weights ({key!r}); {DEQUANTISE}.")
    if config.get("quantization_config") and any(
        tensor.ndim > 1 and tensor.dtype.itemsize == 1 and tensor.dtype != torch.bool for tensor in whole
    ):
        raise DtLensError(f"{source} holds quantised weights, as its config.json says; {DEQUANTISE}.")


def refuse_special_model(model: nn.Module) -> None:
    """Raise ``DtLensError`` for a live model inside a wrapper of another library, or with quantised weights."""
    names = {base.__name__ for base in type(model).__mro__}
    for name, (inner, who) in WRAPPERS.items():
        if name in names and isinstance(getattr(model, inner, None), nn.Module):
            raise DtLensError(
                f"This is the {name} that {who} puts around a model; wrap the model inside it: "
                f"dt_lens.wrap(model.{inner})."
            )
    parts = dict(model.named_modules())
    if any(LORA.search(name) for name in parts) or "PeftModel" in names:
        raise DtLensError(
            "This model has the matrices of a LoRA beside its weights; merge them first: "
            "dt_lens.wrap(model.merge_and_unload())."
        )
    quantised = next((name for name, part in parts.items() if _is_quantised(part)), None)
    if quantised is not None:
        raise DtLensError(
            f"The weights of this model are quantised ({quantised!r} is {a_type(parts[quantised])}); "
            "wrap it dequantised, for a model of Transformers' dt_lens.wrap(model.dequantize()), or load the "
            "unquantised original."
        )


def _is_quantised(part: nn.Module) -> bool:
    """Whether a module keeps its weight in another form than as numbers: by its class, or by its weight's."""
    if re.search(
        r"(^|\.)(quantized|bitsandbytes|auto_gptq|gptqmodel|awq|optimum\.quanto)(\.|$)", type(part).__module__
    ):
        return True
    weight = getattr(part, "weight", None)
    kinds = ("Params4bit", "Int8Params", "QTensor", "AffineQuantizedTensor")
    return isinstance(weight, Tensor) and (weight.is_quantized or type(weight).__name__ in kinds)
