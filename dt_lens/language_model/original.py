"""Build Hugging Face's own class over loaded tensors, without a copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dt_lens.errors import DtLensError, because
from dt_lens.language_model.family import Family
from dt_lens.lens.checkpoints import Checkpoint

__all__ = ["IGNORED_FIELDS", "config_values", "fill", "original"]
# These do not change what is computed; they may make the class fetch code or create any number of labels.
IGNORED_FIELDS = {
    "_attn_implementation", "_experts_implementation", "_name_or_path", "attn_implementation", "auto_map", "dtype",
    "experts_implementation", "id2label", "label2id", "num_labels", "quantization_config", "torch_dtype",
}  # fmt: skip


def config_values(model: nn.Module) -> dict[str, Any]:
    """The values of a live model's configuration; its memory says whether the unembedding is tied."""
    config: Any = model.config
    values: dict[str, Any] = config.to_dict()
    embed, unembed = (getattr(model, f"get_{side}_embeddings")() for side in ("input", "output"))
    tied = embed is not None and unembed is not None and embed.weight.data_ptr() == unembed.weight.data_ptr()
    return {**values, "tie_word_embeddings": tied}


def original(family: Family, checkpoint: Checkpoint) -> nn.Module:
    """The family's class over a checkpoint's tensors, in evaluation mode; no tensor is copied.

    Raises:
        DtLensError: for tensors that do not fit the configuration, before anything is built, or a configuration that
            the class refuses.
    """
    cfg = family.config(checkpoint.config)
    layout = family.layout(cfg)
    own = layout.require({key: tensor.shape for key, tensor in checkpoint.tensors.items()})
    checkpoint.require_finite(own.values())
    _require_one_kind(checkpoint.tensors, own.values())
    tensors = {key: checkpoint.tensors[held] for key, held in own.items()}
    unembed = family.whole["unembed.W_U"].key
    if cfg.tied:
        names = [unembed, *(name for name, key in family.renamed.items() if key == unembed)]
        second = next((checkpoint.tensors[name] for name in names if name in checkpoint.tensors), None)
        first = tensors[family.whole["embed.W_E"].key]
        if second is not None and not (second.shape == first.shape and torch.equal(second, first)):
            raise DtLensError(
                f"The configuration ties {unembed!r} to the token embedding, and the checkpoint holds another one; "
                'say "tie_word_embeddings": false in config.json if that is intended.'
            )
        tensors[unembed] = first
    return fill(_class(family), _hf_config(family, checkpoint.config), tensors)


def _require_one_kind(tensors: Mapping[str, Tensor], used: Any) -> None:
    kinds: dict[torch.dtype, str] = {}
    for key in used:
        kinds.setdefault(tensors[key].dtype, key)
        if tensors[key].dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise DtLensError(
                f"The tensor {key!r} holds {str(tensors[key].dtype).removeprefix('torch.')} numbers; weights must be "
                "float64, float32, bfloat16 or float16."
            )
    if len(kinds) > 1:
        (first, key), (second, other) = [(str(k).removeprefix("torch."), v) for k, v in list(kinds.items())[:2]]
        raise DtLensError(f"The tensor {key!r} is {first} and {other!r} is {second}; save the checkpoint in one type.")


def _class(family: Family) -> Any:
    import transformers

    return getattr(transformers, family.architectures[0])


def _hf_config(family: Family, values: Mapping[str, Any]) -> Any:
    try:
        return _class(family).config_class(**{name: v for name, v in values.items() if name not in IGNORED_FIELDS})
    except Exception as error:  # its validation may raise anything
        raise DtLensError(f"Hugging Face's class refuses this configuration: {because(error)}.") from error


def fill(kind: Any, config: Any, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A model of class ``kind`` whose parameters are ``tensors`` themselves, in evaluation mode.

    Raises:
        DtLensError: when the class wants other tensors, or refuses the configuration.
    """
    try:
        with torch.device("meta"):
            model: Any = kind(config)
        model.load_state_dict({key: tensor.detach() for key, tensor in tensors.items()}, strict=True, assign=True)
        embed, unembed = model.get_input_embeddings(), model.get_output_embeddings()
        if embed.weight.data_ptr() == unembed.weight.data_ptr():
            unembed.weight = embed.weight  # one parameter, so that they stay together wherever the model is moved
        for parameter in model.parameters():
            parameter._is_hf_initialized = True
        # What is computed rather than saved (frequencies of a rotation, causal masks) is computed by the class itself.
        device = next(iter(tensors.values())).device
        for module in model.modules():
            empty = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
            for name in empty:
                module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
            if empty:
                model._init_weights(module)
    except Exception as error:
        raise DtLensError(f"Hugging Face's class refuses this checkpoint: {because(error)}.") from error
    for parameter in model.parameters():
        del parameter._is_hf_initialized
    return model.eval()  # type: ignore[no-any-return]
