"""TransformerLens's ``TransformerBridge`` around a model of a family that dt-lens knows.

The bridge has put its own modules into the model that it wraps and renamed what the model's state dict shows, so that
there is no forward pass of Hugging Face's left to compare with. A second model of Hugging Face's class is built
around the same parameters: no number is copied, an edit through the lens is seen by the bridge, and the bridge's own
logits are the proof that it computes with these weights.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dt_lens.arguments import refuse_unknown
from dt_lens.errors import DtLensError, a_type, because
from dt_lens.language_model.family import Family
from dt_lens.language_model.model import HookedLanguageModel
from dt_lens.language_model.original import config_values, fill
from dt_lens.lens.checkpoints import Checkpoint
from dt_lens_adapters.gpt2 import GPT2
from dt_lens_adapters.gpt_neo import GPTNeo
from dt_lens_adapters.gptj import GPTJ
from dt_lens_adapters.llama import Llama, Mistral, Qwen2

__all__ = ["Bridge"]

FAMILIES = tuple(adapter.family for adapter in (GPT2, GPTJ, GPTNeo, Llama, Mistral, Qwen2))
WRAPPED = "._original_component"


class Bridge:
    """The adapter for a live ``TransformerBridge``."""

    name = "bridge"

    def recognises(self, source: Checkpoint | nn.Module) -> bool:
        return isinstance(source, nn.Module) and any(b.__name__ == "TransformerBridge" for b in type(source).__mro__)

    def load(self, checkpoint: Checkpoint, **given: Any) -> HookedLanguageModel:
        raise DtLensError("A TransformerBridge is not a file; load the model's folder, or wrap the live bridge.")

    def wrap(self, model: nn.Module, **given: Any) -> HookedLanguageModel:
        refuse_unknown(given, {"tokenizer"})
        bridge: Any = model
        wrapped = bridge.original_model
        family = _family(wrapped)
        config = copy.deepcopy(wrapped.config)  # the twin's attention is switched while it runs with hooks
        with torch.device("meta"):
            wanted = set(type(wrapped)(config).state_dict())
        tensors = _parameters(wrapped, wanted)
        _require_unprocessed(bridge, tensors)
        twin = fill(type(wrapped), config, tensors)
        cfg = family.config(config_values(twin))
        layout = family.layout(cfg.replace(tied=False))

        def check_shared(names: Sequence[str]) -> None:
            now, mine = _parameters(wrapped, wanted), twin.state_dict()
            for name in names:
                key = layout.entries[name].key
                if now[key].data_ptr() != mine[key].data_ptr():
                    raise DtLensError(
                        f"The wrapped bridge no longer shares the weight {name!r}: it was moved, cast or processed "
                        "after dt_lens.wrap; wrap it again."
                    )

        tokenizer = given.get("tokenizer", bridge.tokenizer)
        lens = HookedLanguageModel(twin, family, cfg, tokenizer, original=model, check_shared=check_shared)
        _require_same_logits(bridge, lens)
        return lens.train(model.training)


def _family(wrapped: nn.Module) -> Family:
    names = {base.__name__ for base in type(wrapped).__mro__}
    found = next((family for family in FAMILIES if names & set(family.architectures)), None)
    if found is None:
        known = ", ".join(family.architectures[0] for family in FAMILIES)
        raise DtLensError(f"This bridge wraps {a_type(wrapped)}; dt-lens knows bridges around {known}.")
    return found


def _parameters(wrapped: nn.Module, wanted: set[str]) -> dict[str, Tensor]:
    """The wrapped model's own tensors under Hugging Face's keys; ``DtLensError`` naming one that is missing."""
    held: dict[str, Tensor] = {}
    for name, tensor in [*wrapped.named_parameters(remove_duplicate=False), *wrapped.named_buffers()]:
        held.setdefault(name.replace(WRAPPED, ""), tensor.detach())
    for key in wanted:
        if key not in held:
            raise DtLensError(f"The model inside the bridge has no tensor {key!r}, which its class should have.")
    return {key: held[key] for key in wanted}


def _require_unprocessed(bridge: Any, tensors: dict[str, Tensor]) -> None:
    """The bridge computes with these tensors' own memory, not with a processed copy that an edit would miss."""
    memory = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    for key, parameter in bridge.original_model.named_parameters():
        if parameter.untyped_storage().data_ptr() not in memory and bool(parameter.any()):
            raise DtLensError(
                f"The bridge has a weight {key.replace(WRAPPED, '')!r} of its own; it holds processed weights, so wrap "
                "one that was not brought into compatibility mode."
            )
    for name, tensor in bridge.tl_parameters().items():
        plain = name.endswith(("W_E", "W_pos", "W_Q", "W_O", "W_in", "W_gate", "W_out", "W_U"))
        if plain and tensor.untyped_storage().data_ptr() not in memory:
            raise DtLensError(
                f"The bridge computes with a copy of {name!r}, which an edit would miss; wrap one that was not brought "
                "into compatibility mode."
            )


def _require_same_logits(bridge: Any, lens: HookedLanguageModel) -> None:
    tokens = lens.probe()["tokens"]
    training = bridge.training
    bridge.eval()
    try:
        with torch.no_grad():
            theirs, mine = bridge(tokens, return_type="logits"), lens(tokens)
    except Exception as error:  # another library's forward pass
        raise DtLensError(f"The bridge's own forward pass fails: {because(error)}.") from error
    finally:
        bridge.train(training)
    eps = torch.finfo(mine.dtype).eps
    if not bool((theirs - mine).abs().max() <= 1e3 * eps * mine.abs().max()):
        raise DtLensError(
            "The bridge's logits are not those of the model inside it, so its weights cannot be certified; wrap one "
            "that was not processed."
        )
