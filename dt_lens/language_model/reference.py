"""The original's activations under canonical names, from one pass of Hugging Face's own code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dt_lens.errors import DtLensError
from dt_lens.language_model.config import LanguageModelConfig
from dt_lens.language_model.family import Family
from dt_lens.language_model.passage import hook_names, passing
from dt_lens.lens.hooks import BY_CHOICE

__all__ = ["LanguageModelReference"]


class LanguageModelReference:
    """The original's activations, against which ``certify`` checks a language model's weights."""

    def __init__(self, model: nn.Module, family: Family, cfg: LanguageModelConfig) -> None:
        self.model = model
        self.family = family
        self.cfg = cfg

    def activations(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """One evaluation-mode pass of the original, heads split.

        Raises:
            DtLensError: when the MLP does not compute what the configuration says.
        """
        model: Any = self.model
        seen: dict[str, Tensor] = {}

        def note(name: str, x: Tensor) -> Tensor:
            seen[name] = x
            return x

        # Inside a norm, and head by head, it is the lens that computes; only the norm's output is the original's.
        def wanted(name: str) -> bool:
            return not name.endswith((".hook_scale", ".hook_normalized", ".hook_attn_scores", *BY_CHOICE))

        modes = [(module, module.training) for module in model.modules()]
        try:
            model.eval()
            with torch.no_grad(), passing(model, self.family, self.cfg, note, wanted):
                model(input_ids=batch["tokens"], use_cache=False, return_dict=True)
        finally:
            for module, training in modes:
                module.training = training
        silent = [name for name in hook_names(self.cfg) if wanted(name) and name not in seen]
        if silent:
            raise DtLensError(
                f"certify: the original's forward pass does not reach {silent[0]}; check the options of its structure."
            )
        for layer in range(self.cfg.n_layers):
            self._require_sum(f"blocks.{layer}", seen)
            self._require_activation(f"blocks.{layer}", seen)
        return {name: tensor.detach() for name, tensor in seen.items()}

    def _require_sum(self, block: str, seen: Mapping[str, Tensor]) -> None:
        """Raise unless the MLP reads the stream where the configuration says: before what attention adds, or after."""
        before, attn = seen[f"{block}.hook_resid_pre"], seen[f"{block}.hook_attn_out"]
        read = seen.get(f"{block}.mlp_stream" if self.cfg.parallel else f"{block}.hook_resid_mid")
        if read is None:  # one norm serves both
            return
        expected = before if self.cfg.parallel else before + attn
        size = torch.maximum(before.abs(), attn.abs()).max()
        if bool((read - expected).abs().max() > 4 * torch.finfo(read.dtype).eps * size):
            said = "beside" if self.cfg.parallel else "after"
            raise DtLensError(
                f"certify: the MLP of {block} does not read the stream {said} its attention; the adapter declares "
                "parallel wrongly."
            )

        if self.cfg.post_norm and not self.cfg.parallel:
            after, size = read + seen[f"{block}.hook_mlp_out"], torch.maximum(size, read.abs().max())
            if bool((seen[f"{block}.hook_resid_post"] - after).abs().max() > 4 * torch.finfo(read.dtype).eps * size):
                raise DtLensError(
                    f"certify: {block} does not add to the stream what the norm behind its MLP gives; the adapter "
                    "declares that norm wrongly."
                )

    def _require_activation(self, block: str, seen: Mapping[str, Tensor]) -> None:
        """Raise unless the neurons are the activation of ``hook_pre``, times ``hook_pre_linear`` if gated."""
        from transformers.activations import ACT2FN

        if self.cfg.act_fn not in ACT2FN:
            raise DtLensError(
                f"The configuration's activation is {self.cfg.act_fn!r}, which Hugging Face does not have."
            )
        pre, post = seen[f"{block}.mlp.hook_pre"], seen[f"{block}.mlp.hook_post"]
        made = ACT2FN[self.cfg.act_fn](pre)
        if self.cfg.gated:
            made = made * seen[f"{block}.mlp.hook_pre_linear"]
        # A constant of the function may have the digits of single precision only.
        single = self.family.single_inside and post.dtype == torch.float64
        eps = torch.finfo(torch.float32 if single else post.dtype).eps
        # Two forms of one function agree to the rounding of their terms, some of which are as large as the input.
        terms = torch.maximum(post.abs(), pre.abs() if not self.cfg.gated else post.abs())
        if not bool(((made - post).abs() <= 8 * eps * terms + eps).all()):
            raise DtLensError(
                f"certify: the neurons of {block} are not {self.cfg.act_fn} of its MLP's input; the adapter maps the "
                "MLP wrongly."
            )
