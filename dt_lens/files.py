"""Read a checkpoint from disk without running anything that is in it."""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dt_lens.errors import DtLensError

__all__ = ["Checkpoint", "read_checkpoint"]

# Where code bases put the state dict inside the dict that they save.
NESTED = ("model_state_dict", "state_dict", "model_state", "model")
SAFETENSORS, TORCH = (".safetensors",), (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".tar")


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by key, and whatever else the files say.

    ``tensors`` and ``config`` (of ``config.json``, empty where there is none) are what an adapter recognises; ``extra``
    holds what stood beside the state dict in a pickled file; ``folder`` is where further files may lie.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    def require_finite(self) -> None:
        """Raise ``DtLensError`` naming the first tensor with a NaN or an infinity."""
        for key, tensor in self.tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise DtLensError(
                    f"The tensor {key!r} in {self.path} holds NaN or infinite values; the checkpoint is damaged."
                )


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a folder in Hugging Face's form, a ``.safetensors`` file, or a pickled state dict.

    Pickles load with ``weights_only=True``: one that wants to run code is refused.

    Raises:
        DtLensError: for a path that does not exist or cannot be read as a checkpoint, with the reason.
    """
    path = Path(path)
    if not path.exists():
        raise DtLensError(f"There is no file or folder {str(path)!r}; give the path of a checkpoint.")
    checkpoint = _read_folder(path) if path.is_dir() else _read_file(path)
    if not checkpoint.tensors:
        raise DtLensError(f"{path} holds no tensors; expected the weights of a model.")
    checkpoint.require_finite()
    return checkpoint


def _read_folder(folder: Path) -> Checkpoint:
    config = _read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).exists():
            shards = _read_json(folder / index).get("weight_map")
            if not isinstance(shards, dict):
                raise DtLensError(f"{folder / index} has no weight_map; it should name the shard of every tensor.")
            tensors: dict[str, Tensor] = {}
            for shard in sorted(set(shards.values())):
                tensors |= _read_file(folder / shard).tensors
            return Checkpoint(folder, tensors, config, folder=folder)
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return Checkpoint(folder, _read_file(folder / name).tensors, config, folder=folder)
    raise DtLensError(
        f"The folder {folder} holds no model.safetensors or pytorch_model.bin; give a folder in Hugging Face's form, "
        "or the file itself."
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DtLensError(f"{file} cannot be read as JSON: {error}.") from error
    if not isinstance(values, dict):
        raise DtLensError(f"{file} must hold a JSON object.")
    return values


def _read_file(file: Path) -> Checkpoint:
    if not file.exists():
        raise DtLensError(f"There is no file {str(file)!r}, though the checkpoint's index names it.")
    if file.suffix in SAFETENSORS:
        try:
            return Checkpoint(file, load_file(file), folder=file.parent)
        except (SafetensorError, OSError, ValueError) as error:
            raise DtLensError(
                f"{file} is no whole safetensors file ({error}); it may be truncated, so fetch it again."
            ) from error
    return _read_pickle(file)


def _read_pickle(file: Path) -> Checkpoint:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error).lower() or "unsupported global" in str(error).lower():
            raise DtLensError(
                f"{file} is a pickle that wants to run code when it is loaded, so it was not loaded; save its "
                "state_dict() and give that file."
            ) from error
        raise DtLensError(_no_checkpoint(file)) from error
    # torch.load answers a file that is no checkpoint with whatever its parser stumbled over.
    except (
        OSError,
        EOFError,
        ValueError,
        RuntimeError,
        KeyError,
        IndexError,
        AttributeError,
        TypeError,
        AssertionError,
        zipfile.BadZipFile,
    ) as error:
        raise DtLensError(_no_checkpoint(file)) from error
    if not isinstance(loaded, Mapping):
        raise DtLensError(
            f"{file} holds a {type(loaded).__name__}; expected a state dict, which maps names to tensors."
        )
    tensors: Any = loaded
    extra: dict[str, Any] = {}
    for name in NESTED:
        inner = loaded.get(name)
        if isinstance(inner, Mapping) and any(isinstance(v, Tensor) for v in inner.values()):
            tensors, extra = inner, {k: v for k, v in loaded.items() if k != name}
            break
    bad = next((key for key, value in tensors.items() if not isinstance(value, Tensor)), None)
    if bad is not None:
        raise DtLensError(
            f"{file} holds {str(bad)!r}, which is no tensor; expected a state dict, which maps names to tensors."
        )
    return Checkpoint(file, {str(k): v for k, v in tensors.items()}, extra=extra, folder=file.parent)


def _no_checkpoint(file: Path) -> str:
    kinds = ", ".join(SAFETENSORS + TORCH)
    return (
        f"{file} cannot be read as a checkpoint; expected a file that torch.save or safetensors wrote ({kinds}), whole."
    )
