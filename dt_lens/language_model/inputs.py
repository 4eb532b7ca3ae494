"""The residual stream as attention and MLP read it: ``hook_attn_in`` and ``hook_mlp_in``, as in TransformerLens.

They are copies of the stream before the norm. What a hook returns is what attention, or the MLP, reads, and the stream
itself goes on as it was. Attention's has a copy for each head; where one is changed, queries, keys and values are
computed head by head, with the model's own norm and weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from einops import einsum, rearrange, reduce, repeat
from torch import Tensor, nn

from dt_lens.errors import DtLensError

if TYPE_CHECKING:
    from collections.abc import Callable

    from dt_lens.language_model.config import LanguageModelConfig
    from dt_lens.language_model.family import Family, Modules

__all__ = ["Inputs"]


class Passage(Protocol):
    """What is needed of a pass."""

    cfg: LanguageModelConfig
    family: Family
    modules: Modules
    see: Callable[[str, Tensor], Tensor]
    wanted: Callable[[str], bool]
    handles: list[Any]

    def module(self, path: str) -> Any: ...
    def before(self, path: str, replace: Callable[[Tensor], Tensor]) -> None: ...
    def weight(self, layer: int, name: str) -> Tensor: ...


class Inputs:
    """Shows the stream to hooks where attention and MLP read it, and gives them what the hooks return."""

    def __init__(self, passage: Passage) -> None:
        self.passage = passage
        self.given: dict[int, Tensor] = {}  # each head's copy of the stream where a hook changed it, by layer
        self.read: dict[int, Tensor] = {}  # and what the norm made of it
        self.stream: dict[int, Tensor] = {}  # what the one norm of attention and MLP reads
        self.again: set[str] = set()  # norms that now run on a changed copy

    def of_attention(self, layer: int, path: str) -> None:
        """``hook_attn_in``, ``[batch, pos, head, d_model]``."""
        name, at, passage = f"blocks.{layer}.hook_attn_in", self.passage.modules, self.passage
        if not passage.wanted(name):
            return
        norm = None if at.ln1 is None else f"{path}.{at.ln1}"

        def show(x: Tensor) -> Tensor:
            if norm not in self.again:
                copies = repeat(x, "n t d -> n t h d", h=passage.cfg.n_heads).clone()
                given = passage.see(name, copies)
                self.given.pop(layer, None)  # of a pass that was given up
                if given is not copies:
                    self.given[layer] = given
                    self.read.pop(layer, None)
            return x

        passage.before(norm or f"{path}.{at.attn}", show)
        heads = [f"{path}.{part}" for part in at.qkv]

        def projected(letters: str, pattern: str) -> Callable[..., Tensor | None]:
            def hook(_module: nn.Module, _inputs: Any, _out: Tensor) -> Tensor | None:
                if layer not in self.given:
                    return None
                given = self.given[layer]
                if layer not in self.read:
                    self.read[layer] = given if norm is None else self._normed(norm, given)
                read = self.read[layer]
                if letters.endswith("V"):
                    del self.given[layer], self.read[layer]
                return _joined([self._project(layer, letter, given, read) for letter in letters], pattern)

            return hook

        apart = len(heads) == 3
        pattern = "n t (h part e)" if at.by_head else "n t (part h e)"
        for path_of, letters in zip(heads, "QKV" if apart else ["QKV"], strict=True):
            hook = projected(letters, pattern)
            passage.handles.append(passage.module(path_of).register_forward_hook(hook))

    def of_mlp(self, layer: int, path: str) -> None:
        """``hook_mlp_in``, ``[batch, pos, d_model]``."""
        name, at, passage = f"blocks.{layer}.hook_mlp_in", self.passage.modules, self.passage
        if not passage.wanted(name):
            return

        def seen(x: Tensor) -> Tensor:
            shown = x.clone()
            given = passage.see(name, shown)
            return x if given is shown else given

        if passage.cfg.has_ln2:
            passage.before(f"{path}.{at.ln2}", seen)
            return
        if at.ln1 is None:
            passage.before(f"{path}.{at.mlp}", seen)
            return
        norm = f"{path}.{at.ln1}"

        def note(x: Tensor) -> Tensor:
            if norm not in self.again:
                self.stream[layer] = x
            return x

        def replace(normed: Tensor) -> Tensor:
            x = self.stream.pop(layer)
            given = seen(x)
            return normed if given is x else self._normed(norm, given)

        passage.before(norm, note)
        passage.before(f"{path}.{at.mlp}", replace)

    def _normed(self, norm: str, x: Tensor) -> Tensor:
        """What a norm, hooks on it included, makes of a changed copy of the stream."""
        self.again.add(norm)
        try:
            found: Tensor = self.passage.module(norm)(x)
        finally:
            self.again.remove(norm)
        return found

    def _project(self, layer: int, letter: str, given: Tensor, read: Tensor) -> Tensor:
        """Queries, keys or values ``[batch, pos, head, d_head]``, of each head's own copy."""
        cfg = self.passage.cfg
        if letter != "Q" and cfg.n_kv_heads < cfg.n_heads:
            shared = rearrange(given, "n t (kv group) d -> n t kv group d", kv=cfg.n_kv_heads)
            if not torch.equal(shared, shared[..., :1, :].expand_as(shared)):
                raise DtLensError(
                    f"In this model {cfg.n_heads // cfg.n_kv_heads} heads share keys and values, so a hook at "
                    f"blocks.{layer}.hook_attn_in must change the copies of such a group alike."
                )
            read = reduce(read, "n t (kv group) d -> n t kv d", "mean", kv=cfg.n_kv_heads)
        found = einsum(read, self.passage.weight(layer, f"attn.W_{letter}"), "n t h d, h d e -> n t h e")
        biased = f"attn.b_{letter}" in self.passage.family.block and cfg.qkv_bias
        return found + self.passage.weight(layer, f"attn.b_{letter}") if biased else found


def _joined(parts: list[Tensor], pattern: str) -> Tensor:
    """Queries, keys and values as the model's own modules give them; unequal numbers of heads only side by side."""
    if len(parts) == 1 or pattern == "n t (part h e)":
        return torch.cat([rearrange(part, "n t h e -> n t (h e)") for part in parts], -1)
    return rearrange(torch.stack(parts), f"part n t h e -> {pattern}")
