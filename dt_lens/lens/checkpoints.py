"""Read a checkpoint from disk without running any code in it."""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dt_lens.arguments import local_path
from dt_lens.errors import DtLensError, a_type, because
from dt_lens.lens.remedies import refuse_pointer
from dt_lens.zoo.models import bundled

__all__ = ["SUFFIXES", "Checkpoint", "Read", "Unpack", "read_checkpoint", "read_index", "read_json"]

# Where code bases put the state dict inside the dict that they save.
NESTED = ("model_state_dict", "state_dict", "model_state", "model", "transformer")
PREFIXES = ("_orig_mod.", "module.")  # those that torch.compile and DataParallel add
SAFETENSORS, TORCH = (".safetensors",), (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".tar")
SUFFIXES = SAFETENSORS + TORCH
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # what Hugging Face calls them, in the order of preference

# What rebuilds an array of numbers, under NumPy's names for it before and since version 2; nothing in it runs code.
_ARRAY = {"_reconstruct": np.empty(0).__reduce__()[0], "scalar": np.float64(0).__reduce__()[0]}
ARRAYS: list[Any] = [
    *((call, f"numpy.{core}.multiarray.{name}") for name, call in _ARRAY.items() for core in ("core", "_core")),
    *(np.ndarray, np.dtype),
    *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"},
]


class _Settings:
    """What a pickle says of the fields of an object of settings; the object's own class is never imported."""

    fields: Mapping[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict) or not all(type(value) in PLAIN for value in state.values()):
            raise DtLensError(
                "An object of settings in the checkpoint holds something else than numbers and strings; save its "
                "fields as a plain dict."
            )
        self.fields = {str(name): value for name, value in state.items()}


PLAIN = (int, float, bool, str, type(None))
# Classes whose objects code bases save beside the weights (build-nanogpt), under the names that a pickle may have.
SETTINGS: list[Any] = [(_Settings, f"{module}.GPTConfig") for module in ("__main__", "train_gpt2", "model")]

# What an adapter finds in a pickled dict of plain values, read from that file: the bytes of a file that torch.save
# wrote, and a configuration; None where the dict is not of its code base's form.
Unpack = Callable[[Mapping[str, Any], Path], tuple[bytes, Mapping[str, Any]] | None]
# What an adapter reads from a file of its code base's own binary form: tensors, and what else it says; None where the
# file does not begin like one.
Read = Callable[[Path], tuple[Mapping[str, Tensor], Mapping[str, Any]] | None]


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by key, and whatever else the files say.

    ``tensors`` and ``config`` (of ``config.json``, empty where there is none) are what an adapter recognises; ``extra``
    holds what else was in a pickled file with the state dict; ``folder`` is where further files may be.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    @property
    def bundled(self) -> bool:
        """Whether these are the files of a model that comes with the package."""
        return self.folder is not None and self.folder.resolve() in {known.resolve() for known in bundled().values()}

    def config_beside(self) -> dict[str, Any]:
        """What a ``config.json`` in the same folder says, if it is of Hugging Face's form; else nothing."""
        file = None if self.folder is None else self.folder / "config.json"
        config = read_json(file) if file is not None and file.is_file() else {}
        return config if {"model_type", "architectures"} & set(config) else {}

    def require_finite(self, keys: Iterable[str]) -> None:
        """Raise ``DtLensError`` naming the first of these tensors that holds a NaN or an infinity.

        An adapter calls it for the tensors that it uses: a causal mask, say, may be infinite.
        """
        for key in keys:
            tensor = self.tensors[key]
            # isfinite does not take one-byte numbers, and no model computes with them: their type is refused elsewhere.
            wide = tensor.is_floating_point() and tensor.dtype.itemsize > 1
            if wide and not bool(torch.isfinite(tensor).all()):
                raise DtLensError(
                    f"The tensor {key!r} in {self.path} holds NaN or infinite values; the checkpoint is damaged."
                )


def read_checkpoint(path: str | Path, unpack: Unpack | None = None, read: Read | None = None) -> Checkpoint:
    """Read a folder in Hugging Face's form, a ``.safetensors`` file, or a pickled state dict.

    Pickles load with ``weights_only=True``, arrays of numbers allowed: one that wants to run code is refused.

    Args:
        path: of the file or folder.
        unpack: finds the bytes of a file of torch's in a pickled dict of numbers, strings and bytes; such a file is
            refused when omitted.
        read: reads a file of a code base's own binary form; such a file is refused when omitted.

    Raises:
        DtLensError: for a path that does not exist or cannot be read as a checkpoint, with the reason.
    """
    path = local_path(path, "path")
    try:
        if not path.exists():
            raise DtLensError(f"There is no file or folder {str(path)!r}; give the path of a checkpoint.")
        folder = path.is_dir()
        if folder:
            (path / "config.json").exists()  # raises for a folder that may not be entered
    except (OSError, ValueError) as error:  # a name too long, a folder that may not be entered, a null character
        raise DtLensError(f"{str(path)[:200]!r} cannot be accessed: {because(error)}.") from error
    checkpoint = _read_folder(path, unpack) if folder else _read_file(path, unpack, read)
    if path.name in WEIGHTS and (path.parent / "config.json").is_file():  # one file of a folder in that form
        checkpoint = replace(checkpoint, config=read_json(path.parent / "config.json"))
    checkpoint = replace(checkpoint, tensors=_unprefixed(checkpoint.tensors))
    if not checkpoint.tensors:
        raise DtLensError(f"{path} holds no tensors; expected the weights of a model.")
    for key, tensor in checkpoint.tensors.items():
        _require_plain(path, key, tensor)
    return checkpoint


def _unprefixed(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors by their own names, if all have the prefix of a wrapper around the model that was saved."""
    while tensors:
        prefix = next((one for one in PREFIXES if all(key.startswith(one) for key in tensors)), None)
        if prefix is None:
            break
        tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return tensors


def _require_plain(path: Path, key: str, tensor: Tensor) -> None:
    """Raise ``DtLensError`` for a tensor whose memory does not hold one number for each entry of its shape.

    Also for a name that would not fit into a sentence.
    """
    if len(key) > 300 or not key.isprintable():
        raise DtLensError(f"{path} has a tensor {key[:60]!r}..., which cannot be the name of a part of a model.")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        raise DtLensError(
            f"The tensor {key!r} in {path} is sparse or quantised; save it as a plain tensor, with .to_dense() or "
            ".dequantize()."
        )
    if tensor.is_meta:
        raise DtLensError(f"The tensor {key!r} in {path} was saved on the meta device, without numbers; save it whole.")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        # An edit of one number would be an edit of many, and a few bytes could claim a shape that no memory holds.
        raise DtLensError(
            f"The tensor {key!r} in {path} has shape {list(tensor.shape)} and repeats fewer numbers than that; save it "
            "with .contiguous()."
        )


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; a ``DtLensError`` for anything else."""
    try:
        if file.exists() and not file.is_file():  # reading a pipe or a device may never end
            raise IsADirectoryError("it is not a file")
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DtLensError(f"{file} cannot be read as JSON: {because(error)}.") from error
    if not isinstance(values, dict):
        raise DtLensError(f"{file} holds a JSON {type(values).__name__}; expected an object with named fields.")
    return values


def _read_folder(folder: Path, unpack: Unpack | None) -> Checkpoint:
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).exists():
            return Checkpoint(folder, _read_shards(folder, index, unpack), config, folder=folder)
    for name in WEIGHTS:
        if (folder / name).exists():
            return Checkpoint(folder, _read_file(folder / name, unpack).tensors, config, folder=folder)
    files = sorted(file.name for file in folder.iterdir() if file.suffix in SUFFIXES and file.is_file())
    itself = f"the file itself ({', '.join(files[:3])})" if files else "the file itself"
    raise DtLensError(
        f"The folder {folder} holds no model.safetensors or pytorch_model.bin; give a folder in Hugging Face's form, "
        f"or {itself}."
    )


def read_index(file: Path) -> dict[str, str]:
    """Which file holds which tensor, as the index of some shards says.

    Raises:
        DtLensError: for an index of another form, or one in a folder with a single weights file that it does not name.
    """
    shards = read_json(file).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise DtLensError(f"{file} has no weight_map; it should name the shard of every tensor.")
    for shard in set(shards.values()):
        if not shard or shard != Path(shard).name or not shard.isprintable() or len(shard) > 255:
            raise DtLensError(
                f"{file} names a shard {shard[:80]!r}, which is not the name of a file in the same folder."
            )
    single = file.with_name(file.name.removesuffix(".index.json"))
    if single.exists() and set(shards.values()) != {single.name}:
        raise DtLensError(f"{file.parent} holds {single.name} and an index of other files; remove what is out of date.")
    return shards


def _read_shards(folder: Path, index: str, unpack: Unpack | None) -> dict[str, Tensor]:
    shards = read_index(folder / index)
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(shards.values())):
        if not (folder / shard).exists():
            raise DtLensError(f"There is no file {str(folder / shard)!r}, though {index} names it.")
        held = _read_file(folder / shard, unpack).tensors
        for key in held:
            if key in tensors:
                raise DtLensError(f"The tensor {key!r} is in {shards.get(key, shard)} and in {shard}; keep one.")
        for key in (key for key, named in shards.items() if named == shard and key not in held):
            raise DtLensError(f"{index} says that {shard} holds the tensor {key!r}, and it does not.")
        tensors |= held
    return tensors


def _read_file(file: Path, unpack: Unpack | None, read: Read | None = None) -> Checkpoint:
    if file.exists() and not file.is_file() and not file.is_dir():
        raise DtLensError(f"{file} is a device or a pipe; give the path of a file or a folder.")
    refuse_pointer(file)
    if file.suffix not in SAFETENSORS:
        found = read(file) if read is not None and file.is_file() else None
        return _read_pickle(file, unpack) if found is None else Checkpoint(file, found[0], {}, found[1], file.parent)
    try:
        return Checkpoint(file, load_file(file), folder=file.parent)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise DtLensError(
            f"{file} is not a complete safetensors file ({because(error)}); it may be truncated, so fetch it again."
        ) from error


def _read_pickle(file: Path, unpack: Unpack | None) -> Checkpoint:
    config: Mapping[str, Any] = {}
    try:
        try:
            loaded = _unpickled(file)
        except pickle.UnpicklingError:
            values = _plain_values(file) if unpack is not None else None
            found = unpack(values, file) if unpack is not None and isinstance(values, dict) else None
            if found is None:
                raise
            loaded, config = _unpickled(io.BytesIO(found[0])), found[1]
    except DtLensError:
        raise
    except Exception as error:
        # torch.load may raise anything for a file that is not a checkpoint.
        wanted = _wants(file, error)
        if wanted:
            raise DtLensError(
                f"{file} is a pickle that wants to run code when it is loaded ({wanted}), so it was not loaded; save "
                f"its state_dict() and give that file (if you trust it, {_export(file)})."
            ) from error
        if isinstance(error, zipfile.BadZipFile):
            raise DtLensError(f"{file} is damaged ({because(error)}); fetch it again.") from error
        kinds = ", ".join(SUFFIXES)
        raise DtLensError(
            f"{file} cannot be read as a checkpoint; expected a file that torch.save or safetensors wrote ({kinds}), "
            "whole."
        ) from error
    if not isinstance(loaded, Mapping):
        raise DtLensError(f"{file} holds {a_type(loaded)}; expected a state dict, which maps names to tensors.")
    tensors: Any = loaded
    extra: dict[str, Any] = {}
    for name in NESTED:
        inner = loaded.get(name)
        if isinstance(inner, Mapping) and any(isinstance(v, Tensor) for v in inner.values()):
            tensors, extra = inner, {str(k): _fields(v) for k, v in loaded.items() if k != name}
            break
    bad = next((key for key, value in tensors.items() if not isinstance(value, Tensor)), None)
    if bad is not None:
        raise DtLensError(
            f"{file} holds {str(bad)!r}, which is not a tensor; expected a state dict, which maps names to tensors."
        )
    return Checkpoint(file, {str(k): v for k, v in tensors.items()}, config, extra, file.parent)


def _fields(value: Any) -> Any:
    return value.fields if isinstance(value, _Settings) else value


def _unpickled(file: Path | IO[bytes]) -> Any:
    with warnings.catch_warnings(), torch.serialization.safe_globals(ARRAYS + SETTINGS):
        warnings.simplefilter("ignore")
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    _require_checksums(file)
    return loaded


def _require_checksums(file: Path | IO[bytes]) -> None:
    """Raise for damaged records in torch's zip file: torch writes checksums and never checks them."""
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        # For one that is marked as a folder (bit 4 is MS-DOS's) torch returns memory that was never written.
        damaged = next((record.filename for record in records if record.external_attr & 16 or record.is_dir()), None)
        # All are zero if torch was set to leave them out.
        if damaged is None and any(record.CRC for record in records):
            damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"the record {damaged!r} does not fit its checksum")


class _Plain(pickle._Unpickler):
    """An unpickler of numbers, strings, bytes and their containers; anything else is refused.

    Based on Python's own unpickler: the one in C allocates as much memory as any four bytes of the file ask for.
    """

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is not a plain value")


def _plain_values(file: Path) -> Any:
    """What a pickle of plain values holds; ``None`` for any other."""
    try:
        with file.open("rb") as stream:
            return _Plain(stream).load()
    except Exception:  # an unpickler may raise anything for a file that is not a pickle
        return None


def _export(file: Path) -> str:
    """How to get plain tensors out of a pickle that holds objects: a whole model, or a dict with a configuration."""
    load = "torch.load(file, weights_only=False)"
    try:
        with zipfile.ZipFile(file) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            # What the pickle makes first is the outermost object.
            first = next(code for code, _, _ in pickletools.genops(archive.read(name)) if code.name != "PROTO")
    except Exception:  # torch's old format, or not torch's
        first = None
    if first is not None and first.name in ("EMPTY_DICT", "DICT"):
        return (
            f"where its classes can be imported, {load} gives a dict: save that without the objects that are not plain"
        )
    return f"where its class can be imported, torch.save({load}.state_dict(), new_file)"


def _wants(file: Path, error: Exception) -> str | None:
    """What a refused pickle would have called, or ``None`` when that is not why it was refused."""
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    if named:
        return named[1]
    # torch.load refuses a pickle that torch did not write before it reaches the call, so its opcodes are read here.
    wanted: list[str] = []
    strings: list[str] = []
    try:
        with file.open("rb") as stream:
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name in ("GLOBAL", "INST"):
                    wanted.append(str(argument).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    wanted.append(".".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
    except Exception:
        return None  # not a pickle
    return wanted[0] if wanted else None
