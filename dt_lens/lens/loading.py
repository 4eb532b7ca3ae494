"""Make a wrapped model: ``load`` a checkpoint, ``wrap`` a live model, or ``open_checkpoint`` for its weights only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from dt_lens.errors import DtLensError, a_type, because, nearest
from dt_lens.lens.adapters import Adapter, adapter_suffixes, choose, choose_for, opener, read_own_form, unpack
from dt_lens.lens.checkpoints import SUFFIXES, read_checkpoint
from dt_lens.lens.environment_names import import_module_of
from dt_lens.lens.protocol import Lens, is_wrapped
from dt_lens.lens.remedies import refuse_special_files, refuse_special_model
from dt_lens.progress import ProgressCallback, reporting

__all__ = ["load", "open_checkpoint", "wrap"]

# Weights, configuration and tokenizer; a hub repository often holds the same weights in other formats too.
HUB_FILES = ["*.json", "*.safetensors", "pytorch_model*.bin", "merges.txt", "tokenizer.model"]


def load(
    source: str | Path,
    *,
    adapter: str | Adapter | type | None = None,
    check: bool = True,
    progress: bool | ProgressCallback | None = None,
    **given: Any,
) -> Any:
    """Load a model by a bundled name, from a local file or folder, or from the Hugging Face hub.

    Args:
        source: ``"hopper"``, ``"runs/walker"``, ``"model.pt"``,
            ``"edbeeching/decision-transformer-gym-hopper-expert"``, ``"gpt2"``. Bundled names and local paths come
            before the hub.
        adapter: insist on one by name, ``"module:Class"``, class or object; found by the checkpoint's content when
            omitted.
        check: certify the result (a forward pass or two); leave it on.
        progress: ``True`` for a bar, ``False`` for none, or a function of (what is being done, share done); by default
            a bar in a notebook and none elsewhere.
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
    with reporting(progress) as tell:
        tell(f"reading {source}", 0.0)
        checkpoint = read_checkpoint(
            _locate(source), partial(unpack, adapter=adapter), partial(read_own_form, adapter=adapter)
        )
        refuse_special_files(checkpoint.path, checkpoint.tensors, checkpoint.config, checkpoint.tensors.values())
        chosen, checkpoint = choose_for(checkpoint, adapter)
        _import_environments(given)
        tell("making the model", 0.2)
        model = chosen.load(checkpoint, **given)
        return _certified(model, check, lambda what, share: tell(what, 0.4 + 0.6 * share))


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
    refuse_special_model(model)
    chosen = choose(model, adapter, [type(model).__name__, *(name for name, _ in model.named_parameters())])
    _import_environments(given)
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
    refuse_special_files(shards.folder, shards.files, shards.config)
    return opener(shards, adapter).open(shards, **given)


def _import_environments(given: Mapping[str, Any]) -> None:
    """Import the modules of the environments that the user himself names."""
    import_module_of(given.get("environment"))
    if isinstance(other := given.get("evaluation_environment"), Mapping):
        import_module_of(other.get("id"))


def _certified(lens: Lens, check: bool, progress: ProgressCallback | None = None) -> Lens:
    if check:
        from dt_lens.lens.certification import certify_loaded

        with reporting(progress) as tell:
            certify_loaded(lens, tell)
    return lens


def _locate(source: str | Path) -> Path:
    from dt_lens.zoo.models import bundled

    name, path = str(source), Path(source)
    models = bundled()
    try:
        # A folder that has a bundled model's name by chance, such as a study's results, does not hide the model.
        if path.exists() and not (name in models and path.is_dir() and not (path / "config.json").exists()):
            return path
        if name in models:
            return models[name]
        on_hub = _may_be_on_the_hub(source)
    except (OSError, ValueError) as error:
        raise DtLensError(f"{name[:200]!r} cannot be accessed: {because(error)}.") from error
    why = ""
    if on_hub:
        try:
            return _download(name)
        except DtLensError as error:
            if "/" in name:
                raise
            why = f"{error}, and "
    raise DtLensError(
        f"There is no model {name!r}: {why}it is not a local file or folder, nor a bundled model "
        f"({', '.join(models)})." + nearest(name, models)
    )


def _may_be_on_the_hub(source: str | Path) -> bool:
    """Whether a name that does not exist here may be a hub id, such as ``"gpt2"`` or ``"edbeeching/hopper"``.

    One with a checkpoint's suffix, or in a folder that exists, is a path.
    """
    name, path = str(source), Path(source)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+" if isinstance(source, Path) else r"[\w.-]+(/[\w.-]+)?", name):
        return False
    inside = "/" in name and path.parent.is_dir()
    return not inside and path.suffix.lower() not in {*SUFFIXES, *adapter_suffixes()}


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    # A name without a slash may be a misspelt bundled one, whose error says more.
    local = f"There is no local path {hub_id!r}, and "
    try:
        return Path(snapshot_download(hub_id, allow_patterns=HUB_FILES))
    except RepositoryNotFoundError as error:
        if "/" not in hub_id:
            raise DtLensError("the Hugging Face hub has none of that id that you may read") from error
        raise DtLensError(
            f"{local}no model of that id on the Hugging Face hub that you may read; check the name."
        ) from error
    except Exception as error:  # being offline raises many different exceptions
        if "/" not in hub_id:
            raise DtLensError("the Hugging Face hub could not be reached for one of that id") from error
        raise DtLensError(
            f"{local}the Hugging Face hub could not be reached for a model of that id; check the name and the "
            "connection."
        ) from error
