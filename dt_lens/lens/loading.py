"""Make a wrapped model: ``load`` a checkpoint, ``wrap`` a live model, or ``open_checkpoint`` for its weights only."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from dt_lens.errors import DtLensError, a_type, because, nearest
from dt_lens.lens.adapters import Adapter, choose, opener, unpack
from dt_lens.lens.checkpoints import SUFFIXES, read_checkpoint
from dt_lens.lens.environment_names import import_module_of
from dt_lens.lens.protocol import Lens, is_wrapped

__all__ = ["load", "open_checkpoint", "wrap"]

# Weights, configuration and tokenizer; a hub repository often holds the same weights in other formats too.
HUB_FILES = ["*.json", "*.safetensors", "pytorch_model*.bin", "merges.txt", "tokenizer.model"]


def load(source: str | Path, *, adapter: str | Adapter | type | None = None, check: bool = True, **given: Any) -> Any:
    """Load a model by a bundled name, from a local file or folder, or from the Hugging Face hub.

    Args:
        source: ``"hopper"``, ``"runs/walker"``, ``"model.pt"``,
            ``"edbeeching/decision-transformer-gym-hopper-expert"``.
        adapter: insist on one by name, ``"module:Class"``, class or object; found by the checkpoint's content when
            omitted.
        check: certify the result (a forward pass or two); leave it on.
        given: what the file does not say, such as ``n_heads=1``, ``environment="Hopper-v5"``, ``context=20``.

    Returns:
        the wrapped model, in evaluation mode; for a decision transformer a ``HookedDecisionTransformer``.

    Raises:
        DtLensError: if the model does not exist, the file is damaged, no adapter knows it, or ``certify`` refuses it.
    """
    if not isinstance(source, (str, Path)):
        raise DtLensError(
            f"load takes a name or a path, not {a_type(source)}; use dt_lens.wrap for a live torch model."
        )
    checkpoint = read_checkpoint(_locate(source), partial(unpack, adapter=adapter))
    chosen = choose(checkpoint, adapter, sorted(checkpoint.tensors))
    import_module_of(given.get("environment"))
    return _certified(chosen.load(checkpoint, **given), check)


def wrap(model: nn.Module, *, adapter: str | Adapter | type | None = None, check: bool = True, **given: Any) -> Any:
    """Wrap a live torch model. The lens shares its storage, so an edit made through the lens edits the model itself.

    The arguments are ``load``'s. A model that is moved, cast or loaded again after wrapping has other storage: wrap it
    again (an edit raises an error that says so).
    """
    if is_wrapped(model):
        if given:
            raise DtLensError(f"This model is wrapped already, so {next(iter(given))}= cannot change it; leave it out.")
        return model
    if not isinstance(model, nn.Module):
        raise DtLensError(
            f"wrap takes a torch model, not {a_type(model)}; use dt_lens.load for a file, folder or name."
        )
    chosen = choose(model, adapter, [type(model).__name__, *(name for name, _ in model.named_parameters())])
    import_module_of(given.get("environment"))
    return _certified(chosen.wrap(model, **given), check)


def open_checkpoint(source: str | Path, *, adapter: str | Adapter | type | None = None, **given: Any) -> Any:
    """Open the safetensors files of a language model for its weights only, for models bigger than memory.

    The result can be decomposed, scanned and compared like any wrapped model. It cannot run, so it cannot be certified
    or edited. Files are mapped into memory; a weight stays mapped as long as something refers to it.

    Args:
        source: a local folder in Hugging Face's form with ``config.json`` and ``model.safetensors`` or its shards.
        adapter: insist on one, as for ``load``.
        given: ``tokenizer=``; the one in the folder by default.

    Returns:
        a ``WeightsOnly``.

    Raises:
        DtLensError: if the folder does not exist, a shard is missing or cut off, no adapter can read the model this
            way, or a tensor does not fit.
    """
    if not isinstance(source, (str, Path)):
        raise DtLensError(f"open_checkpoint takes the path of a folder, not {a_type(source)}.")
    from dt_lens.lens.shards import Shards

    shards = Shards(_locate(source))
    return opener(shards, adapter).open(shards, **given)


def _certified(lens: Lens, check: bool) -> Lens:
    if check:
        from dt_lens.lens.certification import certify

        certify(lens)
    return lens


def _locate(source: str | Path) -> Path:
    from dt_lens.zoo.models import bundled

    name, path = str(source), Path(source)
    models = bundled()
    try:
        # A folder that has a bundled model's name by chance, such as a study's results, does not hide the model.
        if path.exists() and not (name in models and path.is_dir() and not (path / "config.json").exists()):
            return path
        # A hub id looks like a relative path; with a checkpoint's suffix, or in a folder that exists, it is a path.
        if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and path.suffix not in SUFFIXES and not path.parent.is_dir():
            return _download(name)
    except (OSError, ValueError) as error:
        raise DtLensError(f"{name[:200]!r} cannot be accessed: {because(error)}.") from error
    if name in models:
        return models[name]
    raise DtLensError(
        f"There is no model {name!r}: it is not a local file or folder, nor a bundled model "
        f"({', '.join(models)})." + nearest(name, models)
    )


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=HUB_FILES))
    except RepositoryNotFoundError as error:
        raise DtLensError(
            f"There is no local path {hub_id!r}, and no model of that id on the Hugging Face hub that you may read; "
            "check the name."
        ) from error
    except Exception as error:  # being offline raises many different exceptions
        raise DtLensError(
            f"There is no local path {hub_id!r}, and the Hugging Face hub could not be reached for a model of that id; "
            "check the name and the connection."
        ) from error
