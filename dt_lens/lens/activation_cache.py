"""TransformerLens's ``ActivationCache`` of a wrapped model: what would not be right of the model is refused."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import ItemsView, Iterator, KeysView, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dt_lens.errors import DtLensError, as_written, nearest
from dt_lens.lens.matrices import norm_scale

__all__ = ["ActivationCache", "broadcast", "position_axis"]

if TYPE_CHECKING:

    class _Theirs:
        """``transformer_lens.ActivationCache``, with the types of what is used here."""

        cache_dict: Any
        has_batch_dim: bool
        has_embed: bool
        has_pos_embed: bool
        model: Any

        def __init__(self, cache_dict: Any, model: Any, has_batch_dim: bool = True) -> None: ...
        def __getitem__(self, key: Any) -> Tensor: ...
        def __iter__(self) -> Iterator[str]: ...
        def __len__(self) -> int: ...
        def keys(self) -> KeysView[str]: ...
        def items(self) -> ItemsView[str, Tensor]: ...
        def remove_batch_dim(self, *args: Any) -> Any: ...
        def apply_slice_to_batch_dim(self, *args: Any, **kwargs: Any) -> Any: ...
        def logit_lens(self, **kwargs: Any) -> Any: ...
        def logit_attrs(self, *args: Any, **kwargs: Any) -> Any: ...
        def decompose_resid(self, *args: Any, **kwargs: Any) -> Any: ...
        def stack_head_results(self, *args: Any, **kwargs: Any) -> Any: ...
        def stack_neuron_results(self, *args: Any, **kwargs: Any) -> Any: ...
        def get_full_resid_decomposition(self, *args: Any, **kwargs: Any) -> Any: ...
        def apply_ln_to_stack(self, *args: Any, **kwargs: Any) -> Any: ...
        def _ensure_head_results(self) -> bool: ...

else:
    from dt_lens.lens.transformer_lens_classes import ActivationCache as _Theirs

# The axis of positions stands before heads and features here, and before features elsewhere (queries, in a pattern).
BY_HEAD = ("hook_q", "hook_k", "hook_v", "hook_z", "hook_result", "hook_rot_q", "hook_rot_k", "hook_attn_in")


def position_axis(name: str) -> int:
    """The axis of positions of an activation or its gradient, counted from the last."""
    return -3 if name.removesuffix("_grad").endswith(BY_HEAD) else -2


def broadcast(cache: dict[str, Tensor]) -> None:
    """Give what is the same for the whole batch, positions, a row for each of the batch; nothing is copied."""
    positions = cache.get("hook_pos_embed")
    like = cache.get("hook_embed", cache.get("blocks.0.hook_resid_pre"))
    if positions is not None and like is not None and positions.shape != like.shape:
        rows = positions if positions.ndim == like.ndim else positions[None]
        if rows.shape[1] in (1, like.shape[1]):
            cache["hook_pos_embed"] = rows.expand(len(like), like.shape[1], -1)


class ActivationCache(_Theirs):
    """What ``run_with_cache`` gives: TransformerLens's own class, with ``cache["pattern", 0]`` and all of its methods.

    Weights are as they are stored: ``apply_ln_to_stack`` divides by the norm's scale, and leaves its weights out.
    ``logit_attrs`` has those of the last norm in the directions, so that the attributions of a whole decomposition add
    up to the logit, less what biases give to it.

    Raises:
        DtLensError: for an activation that is not in the cache, and from a method that adds up what this model's stream
            is not the sum of.
    """

    def __getitem__(self, key: Any) -> Tensor:
        """An activation by its name, or by TransformerLens's short form: ``cache["pattern", 0]``."""
        try:
            return super().__getitem__(key)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            name = error.args[0] if isinstance(error, KeyError) and error.args else key
            raise DtLensError(f"The cache has no activation {as_written(name)}{self._why_missing(name)}") from None

    def _why_missing(self, name: object) -> str:
        if name not in getattr(self.model, "hook_dict", {}):
            return "." + (nearest(name, self.cache_dict) or " list(cache) names those that it has.")
        if str(name).endswith("hook_result"):
            return "; call cache.compute_head_results(), or model.set_use_attn_result(True) before the run."
        if str(name).endswith(("hook_attn_in", "hook_mlp_in")):
            setting = "set_use_attn_in" if str(name).endswith("hook_attn_in") else "set_use_hook_mlp_in"
            return f"; call model.{setting}(True) before the run."
        return ", though the model does: names_filter or stop_at_layer left it out."

    def __contains__(self, name: object) -> bool:
        return name in self.cache_dict

    def remove_batch_dim(self, batch_size: int | None = None) -> ActivationCache:
        """TransformerLens's ``remove_batch_dim``; of a batch of one."""
        try:
            super().remove_batch_dim(batch_size)
        except AssertionError as error:
            raise DtLensError(f"{' '.join(str(error).split())}; remove_batch_dim=True is for a batch of one.") from None
        return self

    def apply_slice_to_batch_dim(self, *args: Any, **kwargs: Any) -> ActivationCache:
        """TransformerLens's ``apply_slice_to_batch_dim``."""
        part = super().apply_slice_to_batch_dim(*args, **kwargs)
        return ActivationCache(part.cache_dict, self.model, part.has_batch_dim)

    def logit_lens(self, **kwargs: Any) -> Any:
        """TransformerLens's ``logit_lens``, of a language model."""
        if "unembed.W_U" not in self.model.weights:
            raise DtLensError(
                f"logit_lens reads a vocabulary, which a {self.model.kind} does not have; multiply "
                "cache.accumulated_resid(apply_ln=True) by a head's weights, such as "
                "model.weights['predict.action.W']."
            )
        if getattr(self.model.cfg, "logit_softcap", None) is not None:
            raise DtLensError(
                "logit_lens would leave out this model's soft cap of the logits; apply model.ln_final and "
                "model.unembed to cache.accumulated_resid(), and the cap (cfg.logit_softcap)."
            )
        return super().logit_lens(**kwargs)

    def logit_attrs(self, residual_stack: Tensor, tokens: Any, incorrect_tokens: Any = None, **kwargs: Any) -> Any:
        """TransformerLens's ``logit_attrs``; of a decision transformer, ``tokens`` are numbers or labels of actions."""
        ids = self.model.output_ids
        return super().logit_attrs(
            residual_stack, ids(tokens), None if incorrect_tokens is None else ids(incorrect_tokens), **kwargs
        )

    def decompose_resid(
        self, layer: int | None = None, mlp_input: bool = False, mode: Any = "all", **kwargs: Any
    ) -> Any:
        """TransformerLens's ``decompose_resid``.

        Where the embeddings pass a norm, or a timestep is added to them (decision transformers, Bloom), ``embed`` is
        all that enters the first block, positions included.
        """
        self._require_sums(heads=False, mlp_input=mlp_input)
        with self._what_enters():
            return super().decompose_resid(layer, mlp_input, mode, **kwargs)

    def stack_head_results(self, layer: int = -1, *args: Any, **kwargs: Any) -> Any:
        """TransformerLens's ``stack_head_results``."""
        self._require_sums(heads=True)
        return super().stack_head_results(layer, *args, **kwargs)

    def stack_neuron_results(self, layer: int, *args: Any, **kwargs: Any) -> Any:
        """TransformerLens's ``stack_neuron_results``."""
        self._require_sums(heads=True, mlp_input=bool(kwargs.get("mlp_input")))
        return super().stack_neuron_results(layer, *args, **kwargs)

    def get_full_resid_decomposition(self, layer: int | None = None, mlp_input: bool = False, **kwargs: Any) -> Any:
        """TransformerLens's ``get_full_resid_decomposition``; ``embed`` is as in ``decompose_resid``."""
        self._require_sums(heads=True, mlp_input=mlp_input)
        self._ensure_head_results()
        with self._what_enters():
            return super().get_full_resid_decomposition(layer, mlp_input, **kwargs)

    def apply_ln_to_stack(
        self,
        residual_stack: Tensor,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: Any = None,
        batch_slice: Any = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Any:
        """TransformerLens's ``apply_ln_to_stack``: of each norm by itself, since a model may lack some of them."""
        structure = self.model.structure
        last = layer is None or layer in (-1, structure.n_layers)
        if last:
            norm = "ln_final" if "ln_final.w" in self.model.weights else None
        else:
            norms = structure.mlp_norm if mlp_input else structure.attn_norm
            norm = norms[layer]
            mlp_input = norm is not None and norm.endswith("ln2")  # side by side, they may read through one norm
        if norm is None:
            from transformer_lens.utilities import Slice

            part = batch_slice if isinstance(batch_slice, Slice) else Slice(batch_slice)
            return part.apply(residual_stack, dim=1) if has_batch_dim else residual_stack
        return super().apply_ln_to_stack(
            residual_stack, layer, mlp_input, pos_slice, batch_slice, has_batch_dim, recompute_ln
        )

    def _require_sums(self, heads: bool, mlp_input: bool = False) -> None:
        """Raise unless the stream is the sum of what sublayers, or heads and neurons, give."""
        why = self.model.not_a_sum(heads)
        if why is not None:
            raise DtLensError(f"{why}; cache.accumulated_resid() gives the stream after every layer.")
        if mlp_input and self.model.structure.parallel:
            raise DtLensError(
                "In this model the MLP reads the same stream as attention, without what its own layer's attention "
                "adds; leave out mlp_input."
            )

    @contextmanager
    def _what_enters(self) -> Iterator[None]:
        """In a model whose embeddings pass a norm, what it makes of them stands for ``hook_embed``."""
        if self.model.embeds_plainly or "hook_embed" not in self.cache_dict:
            yield
            return
        own, positions = self.cache_dict, self.has_pos_embed
        self.cache_dict = ChainMap({"hook_embed": self["blocks.0.hook_resid_pre"]}, own)
        self.has_pos_embed = False
        try:
            yield
        finally:
            self.cache_dict, self.has_pos_embed = own, positions


class Attribution:
    """What TransformerLens's cache asks of a model, besides its weights and its structure."""

    readout = "unembed.W_U"  # the head whose outputs logit_attrs attributes

    @property
    def embeds_plainly(self) -> bool:
        """Whether what enters the first block is ``hook_embed``, plus ``hook_pos_embed``."""
        return "embed_ln.w" not in self.weights

    if TYPE_CHECKING:

        @property
        def weights(self) -> Mapping[str, Tensor]: ...
        @property
        def structure(self) -> Any: ...

    def not_a_sum(self, heads: bool) -> str | None:
        """Why the stream is not the sum of what sublayers (``heads``: heads and neurons) give, if it is not."""
        if heads and self.structure.attn_post_norm:
            return (
                "What heads and neurons give passes a norm of their sum before it joins the stream, so the stream is "
                "not the sum of what each gives"
            )
        return None

    def output_ids(self, tokens: Any) -> Any:
        """Outputs of the head that are given by name, by number."""
        return tokens

    def tokens_to_residual_directions(self, tokens: Any) -> Tensor:
        """The directions ``[..., d_model]`` that the logits of these tokens are read off, before the last norm.

        The norm's weights are in them: a direction is ``ln_final.w * W_U[:, token]``, as in a model of
        TransformerLens's whose norms are folded.

        Args:
            tokens: a token, as a number or a text, or a tensor of tokens of any shape.
        """
        weights = self.weights
        head = weights[self.readout]
        ids = torch.as_tensor(self.output_ids(tokens), device=head.device)
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise DtLensError(f"tokens are {str(ids.dtype)[6:]}; they must be whole numbers.")
        if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < head.shape[1]):
            raise DtLensError(
                f"tokens run from {int(ids.min())} to {int(ids.max())}; this model's outputs are 0 to "
                f"{head.shape[1] - 1}."
            )
        # As TransformerLens does: one token has no axis of its own.
        found = head.T[ids.reshape(()) if ids.numel() == 1 else ids]
        return found * norm_scale(self, "ln_final").to(found) if "ln_final.w" in weights else found

    def accumulated_bias(self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True) -> Tensor:
        """The sum ``[d_model]`` of the biases that blocks before ``layer`` add to the stream.

        Args:
            layer: 0 to the number of blocks.
            mlp_input: with the attention's of ``layer`` itself.
            include_mlp_biases: with the MLPs'.

        Raises:
            DtLensError: where biases pass a norm before they join the stream.
        """
        weights, structure = self.weights, self.structure
        layers = range(layer + mlp_input)
        names = [f"blocks.{i}.attn.b_O" for i in layers]
        names += [f"blocks.{i}.mlp.b_out" for i in range(layer)] if include_mlp_biases else []
        like = weights["blocks.0.attn.W_O"]
        found = [weights[name] for name in names if name in weights]
        if found and structure.attn_post_norm:
            raise DtLensError(
                "The biases of this model's blocks pass a norm before they join the stream, so what they add depends "
                "on the token; accumulated_bias has no value."
            )
        return sum(found, torch.zeros(structure.d_model, dtype=like.dtype, device=like.device))
