"""Torch hooks on a live model that show its activations under TransformerLens's names and let them be replaced.

No module of the model is replaced. During one forward pass, hooks on its modules call ``see`` with every wanted
activation, heads split, and the model goes on with what ``see`` returns. No module lies between the rotated queries and
keys and the pattern: there ``see`` is called from a function registered with Hugging Face's attention interface, or
around the method ``_attn`` of older classes, and Hugging Face's own eager code computes the pattern. Bloom's passes a
dropout, which is a module.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from dt_lens.errors import DtLensError, a_type
from dt_lens.language_model.config import LanguageModelConfig
from dt_lens.language_model.family import Family
from dt_lens.language_model.inputs import Inputs
from dt_lens.language_model.layout import Stored
from dt_lens.language_model.scores import held_mask, scoring, seeing_scores
from dt_lens.lens.forward_mode import uncompiled
from dt_lens.lens.in_place import seen

__all__ = ["hook_names", "passing"]

See = Callable[[str, Tensor], Tensor]
Core = Callable[..., Any]
EAGER = "dt_lens_eager"  # the name of ``_attend`` in Hugging Face's attention interface
_cores: ContextVar[Mapping[int, Core]] = ContextVar("cores", default={})  # noqa: B039 (never written into)


def hook_names(cfg: LanguageModelConfig) -> list[str]:
    """The names of all activations, in the order of the forward pass."""
    names = ["hook_embed"] + ["hook_pos_embed"] * (cfg.position == "learned")
    names += ["embed_ln.hook_scale", "embed_ln.hook_normalized"] * cfg.embed_ln
    for layer in range(cfg.n_layers):
        attn = ["hook_q", "hook_k", "hook_v"] + ["hook_rot_q", "hook_rot_k"] * (cfg.position == "rotary")
        attn = [f"attn.{name}" for name in (*attn, "hook_attn_scores", "hook_pattern", "hook_z", "hook_result")]
        before, behind = ([f"{norm}.hook_scale", f"{norm}.hook_normalized"] for norm in ("ln1", "ln1_post"))
        inside = [
            "hook_resid_pre",
            "hook_attn_in",
            *before * cfg.pre_norm,
            *attn,
            *behind * cfg.post_norm,
            "hook_attn_out",
        ]
        inside += ["hook_resid_mid"] * (not cfg.parallel)
        inside += ["hook_mlp_in", *["ln2.hook_scale", "ln2.hook_normalized"] * cfg.has_ln2]
        inside += ["mlp.hook_pre"] + ["mlp.hook_pre_linear"] * cfg.gated + ["mlp.hook_post"]
        inside += ["ln2_post.hook_scale", "ln2_post.hook_normalized"] * cfg.post_norm + ["hook_mlp_out"]
        names += [f"blocks.{layer}.{name}" for name in (*inside, "hook_resid_post")]
    return [*names, "ln_final.hook_scale", "ln_final.hook_normalized", "hook_final"]


@contextmanager
def passing(
    model: nn.Module, family: Family, cfg: LanguageModelConfig, see: See, wanted: Callable[[str], bool]
) -> Iterator[None]:
    """Within this context ``see(name, activation)`` is called for every wanted activation of ``model``.

    Besides ``hook_names``, ``blocks.{l}.attn_in`` and ``mlp_in`` (what the norms give), ``blocks.{l}.mlp_stream`` (what
    the MLP's own norm is given where it stands beside attention), ``blocks.{l}.attn.q_normed`` and ``k_normed`` (what
    the norms of queries and keys give, heads split), ``blocks.{l}.attn_out`` and ``mlp_out`` (what attention and MLP
    give to the norm behind them) and ``logits``, before any soft-capping, may be wanted.
    The model goes on with what ``see`` returns; returning the same tensor changes nothing. ``hook_scale`` and
    ``hook_normalized`` (the stream divided by its scale, before the norm's own weights) are computed beside the norm
    and replace its output only if another tensor is returned.

    Raises:
        DtLensError: when the model lacks a module that its family has.
    """
    passage = _Passage(model, family, cfg, see, wanted)
    try:
        passage.open()
        with passage.attention(), uncompiled():
            yield
    finally:
        for handle in passage.handles:
            handle.remove()


class _Passage:
    def __init__(
        self, model: nn.Module, family: Family, cfg: LanguageModelConfig, see: See, wanted: Callable[[str], bool]
    ) -> None:
        self.model: Any = model
        self.cfg, self.family = cfg, family
        self.modules = family.modules
        own: See = lambda name, x: seen(lambda y: see(name, y), x)  # noqa: E731
        self.see, self.wanted = own if not family.modules.flat_mlp else self.unflattened(own), wanted
        self.inputs = Inputs(self)
        self.shape: tuple[int, ...] = ()  # [batch, pos] of the pass, where a block's second half does not have it
        self.handles: list[Any] = []
        self.cores: dict[int, Core] = {}
        self.methods: list[Any] = []
        self.skipped: dict[int, Tensor] = {}  # what has to be added to the stream past a block's MLP, by layer

    def module(self, path: str) -> Any:
        try:
            return self.model.get_submodule(path)
        except AttributeError as error:
            raise DtLensError(f"The model has no module {path!r}, which {a_type(self.model)} should have.") from error

    def unflattened(self, see: See) -> See:
        """``see`` for activations some of which have one axis in place of the texts and their tokens."""

        def seen(name: str, x: Tensor) -> Tensor:
            if x.ndim > 2:
                return see(name, x)
            whole = x.reshape(*self.shape, *x.shape[1:])
            given = see(name, whole)
            return x if given is whole else given.flatten(0, 1)

        return seen

    def note_shape(self, x: Tensor) -> Tensor:
        self.shape = tuple(x.shape[:2])
        return x

    def open(self) -> None:
        cfg, at = self.cfg, self.modules
        self.output(at.embed, "hook_embed")
        if at.pos_embed is not None:
            self.output(at.pos_embed, "hook_pos_embed")
        if at.embed_ln is not None and cfg.embed_ln:
            self.norm(at.embed_ln, "embed_ln", "embed_ln_out")
        for layer in range(cfg.n_layers):
            self.block(layer, at.block.replace("{l}", str(layer)))
        self.norm(at.ln_final, "ln_final", "hook_final")
        self.output(at.unembed, "logits")

    def block(self, layer: int, path: str) -> None:
        b, at = f"blocks.{layer}", self.modules
        if at.ln2 is None and self.cfg.has_ln2:
            raise DtLensError(
                f"The family of {a_type(self.model)} has no norm before its MLP, and its configuration does "
                "not say that attention and MLP read the stream side by side; one of the two is declared wrongly."
            )
        if at.flat_mlp:
            self.before(path, self.note_shape)
        if at.core_kind == "dropout":
            self.masked(path)
        self.entry(path, f"{b}.hook_resid_pre")
        if at.ln1 is not None:
            self.norm(f"{path}.{at.ln1}", f"{b}.ln1", f"{b}.attn_in")
        self.inputs.of_attention(layer, path)
        self.queries(f"{b}.attn", [f"{path}.{part}" for part in at.qkv])
        if at.qk_norm is not None and self.cfg.normed_qk:
            counts = (self.cfg.n_heads, self.cfg.n_kv_heads)
            for norm, letter, heads in zip(at.qk_norm, "qk", counts, strict=True):
                self.output(f"{path}.{norm}", f"{b}.attn.{letter}_normed", heads, at.qk_normed)
        self.core(f"{b}.attn", f"{path}.{at.core}")
        self.entry(f"{path}.{at.out}", f"{b}.attn.hook_z", self.cfg.n_heads)
        self.results(layer, f"{path}.{at.out}")
        self.written(f"{path}.{at.attn}", "attn", f"{b}.ln1_post", path, at.ln1_post)
        if at.ln2 is None and not self.cfg.pre_norm:
            self.middle(layer, f"{path}.{at.mlp}")
        if at.ln2 is not None and self.cfg.has_ln2:
            if self.cfg.parallel:
                self.entry(f"{path}.{at.ln2}", f"{b}.mlp_stream")
            else:
                self.middle(layer, f"{path}.{at.ln2}")
            self.norm(f"{path}.{at.ln2}", f"{b}.ln2", f"{b}.mlp_in")
        self.inputs.of_mlp(layer, path)
        gate = at.mlp_gate if self.cfg.gated else None
        if gate == at.mlp_in:
            self.parts(
                f"{path}.{gate}", [f"{b}.mlp.hook_pre", f"{b}.mlp.hook_pre_linear"], "n t (part m) -> part n t m"
            )
        else:
            if gate is not None:
                self.output(f"{path}.{gate}", f"{b}.mlp.hook_pre")
            self.output(f"{path}.{at.mlp_in}", f"{b}.mlp.{'hook_pre' if gate is None else 'hook_pre_linear'}")
        self.entry(f"{path}.{at.mlp_out}", f"{b}.mlp.hook_post")
        self.written(f"{path}.{at.mlp}", "mlp", f"{b}.ln2_post", path, at.ln2_post)
        if not self.cfg.parallel and self.wanted(f"{b}.hook_resid_mid"):
            self.rejoin(layer, f"{path}.{at.mlp if at.ln2_post is None else at.ln2_post}")
        self.output(path, f"{b}.hook_resid_post")

    def seen(self, name: str, x: Tensor, heads: int | None, held: str = "n t (h e)") -> Tensor:
        """``x`` itself unless ``see``, which gets it with heads split, returns another tensor."""
        if heads is None:
            return self.see(name, x)
        split = rearrange(x, f"{held} -> n t h e", h=heads)
        given = self.see(name, split)
        return x if given is split else rearrange(given, f"n t h e -> {held}")

    def output(self, path: str, name: str, heads: int | None = None, held: str = "n t (h e)") -> None:
        """See a module's output, or the first of several."""
        if not self.wanted(name):
            return

        def hook(_module: nn.Module, _inputs: Any, out: Any) -> Any:
            x = out[0] if isinstance(out, tuple) else out
            given = self.seen(name, x, heads, held)
            if given is x:
                return None
            return (given, *out[1:]) if isinstance(out, tuple) else given

        self.handles.append(self.module(path).register_forward_hook(hook))

    def entry(self, path: str, name: str, heads: int | None = None) -> None:
        """See a module's first input."""
        if self.wanted(name):
            self.before(path, lambda x: self.seen(name, x, heads))

    def before(self, path: str, replace: Callable[[Tensor], Tensor]) -> None:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
            x = inputs[0] if inputs else named["hidden_states"]
            given = replace(x)
            if given is x:
                return None
            return ((given, *inputs[1:]), named) if inputs else (inputs, {**named, "hidden_states": given})

        self.handles.append(self.module(path).register_forward_pre_hook(hook, with_kwargs=True))

    def masked(self, path: str) -> None:
        """Give a block a mask that single precision holds: see ``scores.held_mask``."""

        def hook(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
            return inputs, {**named, "attention_mask": held_mask(named.get("attention_mask"))}

        self.handles.append(self.module(path).register_forward_pre_hook(hook, with_kwargs=True))

    def written(self, path: str, which: str, norm: str, block: str, behind: str | None) -> None:
        """See what attention or MLP adds to the stream: its output, or what the norm behind it makes of that."""
        b = norm.rpartition(".")[0]
        if behind is None:
            self.output(path, f"{b}.hook_{which}_out")
        else:
            self.output(path, f"{b}.{which}_out")
            self.norm(f"{block}.{behind}", norm, f"{b}.hook_{which}_out")

    def middle(self, layer: int, path: str) -> None:
        """See the stream between attention and MLP; a change to it must also go around the MLP: see ``rejoin``."""
        name = f"blocks.{layer}.hook_resid_mid"
        if not self.wanted(name):
            return

        def replace(x: Tensor) -> Tensor:
            given = self.see(name, x)
            if given is not x:
                self.skipped[layer] = given - x
            return given

        self.before(path, replace)

    def rejoin(self, layer: int, path: str) -> None:
        """Add the change of the stream to the MLP's output; the path around the MLP lacks it."""

        def hook(_module: nn.Module, _inputs: Any, out: Any) -> Any:
            change = self.skipped.pop(layer, None)
            return None if change is None else out + change

        self.handles.append(self.module(path).register_forward_hook(hook))

    def norm(self, path: str, prefix: str, after: str) -> None:
        scale_name, bare_name = f"{prefix}.hook_scale", f"{prefix}.hook_normalized"
        inside = self.wanted(scale_name) or self.wanted(bare_name)
        if not inside and not self.wanted(after):
            return

        def hook(module: Any, inputs: tuple[Any, ...], out: Tensor) -> Any:
            given = out
            if inside:
                x = inputs[0]
                wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
                if self.cfg.norm == "layernorm":
                    wide = wide - wide.mean(-1, keepdim=True)
                scale = (wide.square().mean(-1, keepdim=True) + self.cfg.eps).sqrt()
                new_scale = self.see(scale_name, scale) if self.wanted(scale_name) else scale
                bare = (wide / new_scale).to(x.dtype)
                new = self.see(bare_name, bare) if self.wanted(bare_name) else bare
                if new is not bare or new_scale is not scale:
                    bias = getattr(module, "bias", None)
                    weight = 1 + module.weight if self.cfg.unit_offset else module.weight
                    given = new * weight if bias is None else new * weight + bias
            if self.wanted(after):
                given = self.see(after, given)
            return None if given is out else given

        self.handles.append(self.module(path).register_forward_hook(hook))

    def queries(self, attn: str, paths: list[str]) -> None:
        names = [f"{attn}.hook_{letter}" for letter in "qkv"]
        counts = [self.cfg.n_heads, self.cfg.n_kv_heads, self.cfg.n_kv_heads]
        if len(paths) == len(names):
            for path, name, heads in zip(paths, names, counts, strict=True):
                self.output(path, name, heads)
            return
        if self.modules.by_head:
            self.parts(paths[0], names, "n t (h part e) -> part n t h e", h=self.cfg.n_heads)
            return
        if not any(self.wanted(name) for name in names):
            return

        def hook(_module: nn.Module, _inputs: Any, out: Tensor) -> Any:
            parts = torch.split(out, [heads * self.cfg.d_head for heads in counts], -1)
            given = [
                self.seen(name, part, heads) if self.wanted(name) else part
                for name, part, heads in zip(names, parts, counts, strict=True)
            ]
            unchanged = all(new is old for new, old in zip(given, parts, strict=True))
            return None if unchanged else torch.cat(given, -1)

        self.handles.append(self.module(paths[0]).register_forward_hook(hook))

    def parts(self, path: str, names: list[str], pattern: str, **sizes: int) -> None:
        """See the equal parts of a module's output, which ``pattern`` takes apart, under a name each."""
        if not any(self.wanted(name) for name in names):
            return
        whole, apart = pattern.split(" -> ")

        def hook(_module: nn.Module, _inputs: Any, out: Tensor) -> Any:
            held = rearrange(out, pattern, part=len(names), **sizes).unbind(0)
            given = [
                self.see(name, part) if self.wanted(name) else part for name, part in zip(names, held, strict=True)
            ]
            unchanged = all(new is old for new, old in zip(given, held, strict=True))
            return None if unchanged else rearrange(torch.stack(given), f"{apart} -> {whole}")

        self.handles.append(self.module(path).register_forward_hook(hook))

    def core(self, attn: str, path: str) -> None:
        """See rotated queries and keys ``[n, head, t, e]``, and the pattern computed from them."""
        names = [f"{attn}.hook_{name}" for name in ("rot_q", "rot_k", "attn_scores", "pattern")]
        q_name, k_name, scores_name, pattern_name = names
        if not any(self.wanted(name) for name in names):
            return
        if self.modules.core_kind == "dropout":
            if self.wanted(scores_name):
                self.handles += scoring(self.module(path.rpartition(".")[0]), self.see, scores_name)
            self.output(path, pattern_name)
            return
        module = self.module(path)
        by_method = self.modules.core_kind == "method"

        def turned(name: str, x: Tensor) -> Tensor:
            if not self.wanted(name):
                return x
            split = rearrange(x, "n h t e -> n t h e")
            given = self.see(name, split)
            return x if given is split else rearrange(given, "n t h e -> n h t e")

        def run(inner: Core, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **named: Any) -> Any:
            scored = seeing_scores(self.see, scores_name) if self.wanted(scores_name) else nullcontext()
            with scored:
                out, pattern = inner(turned(q_name, q), turned(k_name, k), v, *rest, **named)
            given = self.see(pattern_name, pattern) if self.wanted(pattern_name) else pattern
            if given is not pattern:
                gathered = given @ v.repeat_interleave(self.cfg.n_heads // v.shape[1], 1)
                out = gathered if by_method else rearrange(gathered, "n h t e -> n t h e").contiguous()
            return out, given

        self.cores[id(module)] = run
        if by_method:
            self.methods.append(module)

    def weight(self, layer: int, name: str) -> Tensor:
        """One weight of a block, with its gradient."""
        rule = self.family.block[name]
        entry = Stored.of(rule._replace(key=self.family.block_key + rule.key), self.cfg.sizes, layer)
        return entry.view(self.model.get_parameter(entry.key))

    def results(self, layer: int, path: str) -> None:
        """See what each head adds to the stream, ``[n, t, head, d_model]``; the output is their sum, and the bias."""
        name = f"blocks.{layer}.attn.hook_result"
        if not self.wanted(name):
            return
        W_O = self.weight(layer, "attn.W_O")

        def hook(module: Any, inputs: tuple[Any, ...], _out: Tensor) -> Any:
            z = rearrange(inputs[0], "... (h e) -> ... h e", h=self.cfg.n_heads)
            result = einsum(z, W_O, "... h e, h e d -> ... h d")
            given = self.see(name, result)
            if given is result:
                return None
            bias = getattr(module, "bias", None)
            return given.sum(-2) if bias is None else given.sum(-2) + bias

        self.handles.append(self.module(path).register_forward_hook(hook))

    @contextmanager
    def attention(self) -> Iterator[None]:
        """Run eager attention through the cores, if there are any; restore the model's own on exit."""
        if not self.cores:
            yield
            return
        config = self.model.config
        own = config._attn_implementation
        if self.methods and own not in (None, "eager"):
            raise DtLensError(
                f"This model's attention is {own!r}, which shows no pattern; load it with Hugging Face's "
                "from_pretrained(..., attn_implementation='eager') and wrap it again."
            )
        token = _cores.set(self.cores)
        try:
            for module in self.methods:
                inner, run = module._attn, self.cores[id(module)]
                module._attn = lambda *args, inner=inner, run=run, **named: run(inner, *args, **named)
            if not self.methods:
                _register()
                config._attn_implementation = EAGER
            yield
        finally:
            _cores.reset(token)
            for module in self.methods:
                module.__dict__.pop("_attn", None)
            config._attn_implementation = own


def _register() -> None:
    """Make ``EAGER`` known to Hugging Face's attention interface, masks included."""
    from transformers import AttentionInterface, AttentionMaskInterface

    if EAGER not in AttentionInterface._global_mapping:
        AttentionMaskInterface.register(EAGER, _mask)
        AttentionInterface.register(EAGER, _attend)


def _mask(*args: Any, **named: Any) -> Tensor | None:
    """Hugging Face's own mask of eager attention, in numbers that single precision holds."""
    from transformers import AttentionMaskInterface

    return held_mask(AttentionMaskInterface._global_mapping["eager"](*args, **named))


def _attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **named: Any) -> Any:
    """Hugging Face's own eager attention from this module's file, through the module's core if it has one."""
    files = [sys.modules[base.__module__] for base in type(module).__mro__]
    eager = next(vars(file)["eager_attention_forward"] for file in files if "eager_attention_forward" in vars(file))

    def inner(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **named: Any) -> Any:
        return eager(module, q, k, v, mask, **named)

    run = _cores.get().get(id(module))
    return inner(q, k, v, mask, **named) if run is None else run(inner, q, k, v, mask, **named)
