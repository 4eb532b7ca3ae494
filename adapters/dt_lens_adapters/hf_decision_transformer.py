"""Hugging Face's ``DecisionTransformerModel``: a live one, or a folder or hub id of one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.decision_transformer.facts import RunFacts
from dt_lens.decision_transformer.hf_layout import canonical_from_hf, config_from_hf
from dt_lens.decision_transformer.model import HookedDecisionTransformer
from dt_lens.errors import DtLensError, nearest
from dt_lens.files import Checkpoint

__all__ = ["HFDecisionTransformer"]

# What the files hold and the model does not use: GPT-2's token table, and the causal masks of older releases. The
# patterns are whole keys: a suffix match on "attn.bias" would swallow "attn.c_attn.bias" too.
UNUSED = re.compile(r"encoder\.wte\.weight|encoder\.h\.\d+\.attn\.(masked_)?bias")
FACTS = {f.name for f in fields(RunFacts)}
OPTIONS = {"context", "discrete_actions", *FACTS}


class HFDecisionTransformer:
    """The adapter; the tensors of the file or of the live model become views of one another, no copy is made."""

    name = "hf_decision_transformer"

    def recognises(self, source: Checkpoint | nn.Module) -> bool:
        if isinstance(source, nn.Module):
            return type(source).__name__ == "DecisionTransformerModel" and hasattr(source, "encoder")
        return {"embed_return.weight", "encoder.h.0.attn.c_attn.weight"} <= set(source.tensors)

    def load(self, checkpoint: Checkpoint, **given: Any) -> HookedDecisionTransformer:
        if not checkpoint.config:
            raise DtLensError(
                f"{checkpoint.path} lies without its config.json, which tells the number of heads and the options; "
                "give the folder that holds both."
            )
        kept = RunFacts.load(checkpoint.folder) if checkpoint.folder else None
        return self.build(dict(checkpoint.tensors), checkpoint.config, kept, **given)

    def build(
        self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], kept: RunFacts | None, **given: Any
    ) -> HookedDecisionTransformer:
        """The lens over Hugging Face's own class, filled with ``tensors`` without a copy."""
        refuse_unknown(given, OPTIONS)
        cfg = config_from_hf(config)
        used = {key: tensor for key, tensor in tensors.items() if not UNUSED.fullmatch(key)}
        canonical_from_hf(used, cfg)  # refuses what does not fit, before anything is built
        return self.wrap(_original(used, config, cfg), kept=kept, **given)

    def wrap(self, model: nn.Module, *, kept: RunFacts | None = None, **given: Any) -> HookedDecisionTransformer:
        refuse_unknown(given, OPTIONS)
        kept = kept or _facts_beside(model)
        about = kept.about if kept else {}
        discrete = bool(given.pop("discrete_actions", about.get("discrete_actions", False)))
        facts = given_facts(kept, given)
        config = model.config.to_dict()  # type: ignore[union-attr, operator]
        cfg = config_from_hf(config, facts.context, discrete)

        def views() -> dict[str, Tensor]:
            return canonical_from_hf({k: t for k, t in model.state_dict().items() if not UNUSED.fullmatch(k)}, cfg)

        with torch.device("meta"):
            hooked = HookedDecisionTransformer(cfg)
        hooked.look_at(model, views, HFReference(model, cfg))
        hooked.facts = facts
        hooked.train(model.training)
        return hooked


def refuse_unknown(given: Mapping[str, Any], known: set[str]) -> None:
    """Raise for a keyword that means nothing to an adapter."""
    for name in given:
        if name not in known:
            raise DtLensError(
                f"Unknown option {name!r} for this checkpoint; it takes {', '.join(sorted(known))}."
                + nearest(name, known)
            )


def given_facts(kept: RunFacts | None, given: Mapping[str, Any]) -> RunFacts:
    """The checkpoint's facts, overridden by what the user gave; context 20 (the paper's) where nobody says."""
    chosen: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items() if name in FACTS
    }
    if kept is not None:
        return replace(kept, **chosen)
    chosen.setdefault("context", 20)
    return RunFacts(**chosen)


def _facts_beside(model: nn.Module) -> RunFacts | None:
    """The run facts of the folder that ``from_pretrained`` read, if that is what was done."""
    folder = Path(str(getattr(model, "name_or_path", "") or "?"))
    return RunFacts.load(folder) if folder.is_dir() else None


def _original(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], cfg: HookedDecisionTransformerConfig
) -> nn.Module:
    from transformers import DecisionTransformerConfig, DecisionTransformerModel

    # There are no tokens; the class's default ids lie outside its vocabulary of one and make it warn.
    values = {**config, "bos_token_id": None, "eos_token_id": None}
    try:
        hf_config = DecisionTransformerConfig(**values)
    except Exception as error:
        raise DtLensError(f"Hugging Face refuses this config.json: {error}.") from error
    with torch.device("meta"):
        model: nn.Module = DecisionTransformerModel(hf_config)
    whole = {
        "encoder.wte.weight": next(iter(tensors.values())).new_zeros(model.get_parameter("encoder.wte.weight").shape),
        **tensors,
    }
    # assign=True makes the loaded tensors the parameters: no second copy.
    model.load_state_dict(whole, strict=True, assign=True)
    return model.eval()


class HFReference:
    """Hugging Face's own forward pass, read through torch hooks on its modules and named canonically."""

    def __init__(self, model: nn.Module, cfg: HookedDecisionTransformerConfig) -> None:
        self.model = model
        self.cfg = cfg

    def activations(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Everything ``certify`` compares, from one evaluation-mode pass of the original model."""
        model: Any = self.model
        seen: dict[str, Tensor] = {}
        handles = list(self._hooks(model, seen))
        training, attention = model.training, model.config._attn_implementation
        try:
            model.eval()
            model.config._attn_implementation = "eager"  # only this one returns the pattern
            with torch.no_grad():
                out = model(**batch, output_attentions=True, return_dict=True)
        finally:
            for handle in handles:
                handle.remove()
            model.config._attn_implementation = attention
            model.train(training)
        for layer, pattern in enumerate(out.attentions):
            seen[f"blocks.{layer}.attn.hook_pattern"] = pattern
        seen |= {"action_preds": out.action_preds, "state_preds": out.state_preds, "return_preds": out.return_preds}
        return {name: tensor.detach() for name, tensor in seen.items()}

    def _hooks(self, model: Any, seen: dict[str, Tensor]) -> Any:
        def output(module: nn.Module, name: str) -> Any:
            return module.register_forward_hook(lambda _m, _i, out: seen.__setitem__(name, out))

        def entry(module: nn.Module, name: str, pattern: str = "... -> ...", **sizes: int) -> Any:
            return module.register_forward_pre_hook(
                lambda _m, inputs: seen.__setitem__(name, rearrange(inputs[0], pattern, **sizes))
            )

        for key, name in (("embed_return", "return_to_go"), ("embed_state", "state"), ("embed_action", "action")):
            yield output(getattr(model, key), f"hook_embed_{name}")
        yield output(model.embed_timestep, "hook_embed_timestep")
        yield output(model.encoder.ln_f, "hook_final")
        heads = self.cfg.n_heads
        for layer, block in enumerate(model.encoder.h):
            b = f"blocks.{layer}"
            yield entry(block.ln_1, f"{b}.hook_resid_pre")
            yield output(block.ln_1, f"{b}.attn_in")
            yield block.attn.c_attn.register_forward_hook(
                lambda _m, _i, out, b=b: seen.update(
                    zip(
                        (f"{b}.attn.hook_q", f"{b}.attn.hook_k", f"{b}.attn.hook_v"),
                        rearrange(out, "n t (which head e) -> which n t head e", which=3, head=heads),
                        strict=True,
                    )
                )
            )
            yield entry(block.attn.c_proj, f"{b}.attn.hook_z", "n t (head e) -> n t head e", head=heads)
            yield output(block.attn.c_proj, f"{b}.hook_attn_out")
            yield entry(block.ln_2, f"{b}.hook_resid_mid")
            yield output(block.ln_2, f"{b}.mlp_in")
            yield output(block.mlp.c_fc, f"{b}.mlp.hook_pre")
            yield entry(block.mlp.c_proj, f"{b}.mlp.hook_post")
            yield output(block.mlp.c_proj, f"{b}.hook_mlp_out")
