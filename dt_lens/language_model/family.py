"""The declaration of a family of language models: its checkpoints, and where its weights and activations are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dt_lens.language_model.config import LanguageModelConfig, Values
from dt_lens.language_model.layout import At, Layout, Stored

__all__ = ["Family", "Modules"]


@dataclass(frozen=True)
class Modules:
    """The paths of a live model's modules; those of a block are relative to it.

    ``qkv`` is one module whose output holds queries, keys and values side by side, or the three of them; ``by_head``
    says that each head's three stand together in the one output. Where ``mlp_gate`` is ``mlp_in``, the one module's
    output holds the gate and the input side by side. ``flat_mlp``: the second half of a block sees all texts as one,
    ``[batch * pos, ...]``.
    """

    embed: str
    block: str  # "{l}" for the layer
    ln1: str | None
    attn: str  # gives (what attention adds to the stream, ...)
    qkv: tuple[str, ...]
    out: str
    mlp: str
    mlp_in: str
    mlp_out: str
    ln_final: str
    unembed: str = "lm_head"
    pos_embed: str | None = None
    ln2: str | None = None
    mlp_gate: str | None = None
    by_head: bool = False
    flat_mlp: bool = False
    embed_ln: str | None = None
    qk_norm: tuple[str, str] | None = None  # the norms of queries and of keys
    qk_normed: str = "n t h e"  # what those give; "n t (h e)" where one norms all heads together
    ln1_post: str | None = None  # the norms that what attention and MLP give passes before it joins the stream
    ln2_post: str | None = None
    embed_scale: str | None = None  # the embedding's buffer that its rows are multiplied by
    # Where scores become a pattern: in a method _attn(query, key, value, ...) of this module of the block, or in the
    # function that Hugging Face's attention interface gives to it; or the module is the dropout of the pattern.
    core: str = "attn"
    core_kind: Literal["interface", "method", "dropout"] = "interface"


@dataclass(frozen=True)
class Family:
    """What distinguishes one family from the others; data, and one function that reads a configuration.

    Attributes:
        name: the adapter's.
        model_types: the values of ``model_type`` in its config.json.
        architectures: the classes of live models, and what ``architectures`` in config.json says.
        whole: rules for the weights outside the blocks, by canonical name.
        block: rules for a block's weights, by canonical name without ``blocks.{l}.``; keys without ``block_key``.
        block_key: the start of a block's keys, ``{l}`` for the layer.
        modules: the live model's modules, whose inputs and outputs are the activations.
        defaults: the values that config.json leaves out.
        read: makes the configuration from those values.
        ignored: whole keys that are knowingly not read, as regular expressions.
        prefix: what checkpoints of the bare model lack in front of their keys.
        single_inside: the class computes norms or attention in float32, whatever type its weights have.
        renamed: what files call some tensors, and the class's keys for them.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    whole: Mapping[str, At]
    block: Mapping[str, At]
    block_key: str
    modules: Modules
    defaults: Mapping[str, Any]
    read: Callable[[Values], LanguageModelConfig]
    ignored: tuple[str, ...] = ()
    prefix: str = ""
    single_inside: bool = False
    renamed: Mapping[str, str] = field(default_factory=dict)

    def config(self, values: Mapping[str, Any]) -> LanguageModelConfig:
        """The configuration from the values of a config.json.

        Raises:
            DtLensError: for a value that no model can have.
        """
        return self.read(Values(values, self.defaults))

    def layout(self, cfg: LanguageModelConfig) -> Layout:
        """Where every weight of a model of this configuration is stored."""
        embed, unembed = self.whole["embed.W_E"], self.whole["unembed.W_U"]
        ignored = self.ignored
        whole = {name: rule for name, rule in self.whole.items() if _exists(rule, cfg)}
        if cfg.tied:
            # A file of a tied model may hold the one table under one name or under both.
            whole["unembed.W_U"] = unembed._replace(key=embed.key)
            ignored = (*ignored, unembed.key.replace(".", r"\."))
        first = [name for name in whole if not name.startswith(("ln_final", "unembed"))]
        entries = {name: Stored.of(whole[name], cfg.sizes) for name in first}
        for layer in range(cfg.n_layers):
            for name, rule in self.block.items():
                if _exists(rule, cfg):
                    rule = rule._replace(key=self.block_key + rule.key)
                    entries[f"blocks.{layer}.{name}"] = Stored.of(rule, cfg.sizes, layer)
        entries |= {name: Stored.of(rule, cfg.sizes) for name, rule in whole.items() if name not in first}
        return Layout(entries, ignored, self.prefix, cfg.n_layers, self.block_key, self.renamed)

    def recognises(self, config: Mapping[str, Any], keys: Iterable[str]) -> bool:
        """Whether a checkpoint with this config.json and these keys is of this family."""
        if config.get("model_type") not in self.model_types:
            return False
        named = config.get("architectures")
        if isinstance(named, list) and named and not any(name in self.architectures for name in named):
            return False
        embed = self.whole["embed.W_E"].key
        return bool({embed, embed.removeprefix(self.prefix)} & set(keys))


def _exists(rule: At, cfg: LanguageModelConfig) -> bool:
    """Whether a model of this configuration has the rule's weight."""
    return rule.when is None or bool(getattr(cfg, rule.when))
