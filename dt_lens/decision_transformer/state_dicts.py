"""The base of adapters for code bases that save a state dict, bundled ones and third parties'.

Such an adapter is a ``Layout``: what the shapes in a file say about the model, which tensor is which canonical weight,
and the code base's own forward pass over those tensors, against which ``certify`` checks the lens. docs/adapters.md
goes through one line by line.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from dt_lens.arguments import refuse_unknown
from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.decision_transformer.facts import FACTS, RunFacts, from_file, given_facts
from dt_lens.decision_transformer.model import HookedDecisionTransformer
from dt_lens.errors import DtLensError, because, nearest
from dt_lens.lens.assumed import Options
from dt_lens.lens.checkpoints import Checkpoint
from dt_lens.lens.weights import require_computable

__all__ = [
    "UNSCALED",
    "Layout",
    "Options",
    "StateDictAdapter",
    "Tensors",
    "Trace",
    "ask_for_heads",
    "run_facts",
    "steps_of_mask",
]


# Facts of every run of a code base that feeds states and returns as they are.
UNSCALED: dict[str, Any] = {"return_scale": 1.0, "state_mean": None, "state_std": None}


class Tensors:
    """A state dict whose tensors are taken by their exact keys, so that one that nobody takes is noticed."""

    def __init__(self, tensors: Mapping[str, Tensor], kind: str) -> None:
        self.tensors, self.kind = tensors, kind
        self._left = set(tensors)

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def size(self, key: str, ndim: int = 2) -> torch.Size:
        """The shape of a tensor that every such model has."""
        if key not in self.tensors:
            raise DtLensError(f"The checkpoint has no tensor {key!r}, which {self.kind} has.")
        shape = self.tensors[key].shape
        if len(shape) != ndim or 0 in shape:
            raise DtLensError(f"The tensor {key!r} has shape {list(shape)}; one of {ndim} sizes was expected.")
        return shape

    def holds(self, pattern: str) -> bool:
        """Whether ``pattern`` matches a whole key."""
        return any(re.fullmatch(pattern, key, re.ASCII) for key in self.tensors)

    def count(self, pattern: str) -> int:
        """How many blocks there are; the first group of ``pattern`` finds a block's number in its keys."""
        named = [match[1] for key in self.tensors if (match := re.match(pattern, key, re.ASCII))]
        found = {int(number) for number in named if len(number) < 10}  # no checkpoint has a longer one
        missing = next((number for number in range(len(found)) if number not in found), None)
        if missing is not None:
            raise DtLensError(
                f"The checkpoint has tensors of block {max(found)} but not of block {missing}; {self.kind} has both."
            )
        return len(found)

    def take(self, key: str, *shape: int) -> Tensor:
        """The tensor under ``key``, which must have this shape."""
        if key not in self.tensors:
            raise DtLensError(f"The checkpoint has no tensor {key!r}, which {self.kind} of this shape needs.")
        tensor = self.tensors[key]
        if tuple(tensor.shape) != shape:
            raise DtLensError(f"The tensor {key!r} has shape {list(tensor.shape)}; {list(shape)} was expected.")
        self._left.discard(key)
        return tensor

    def linear(self, key: str, name: str, d_in: int, d_out: int) -> dict[str, Tensor]:
        """An ``nn.Linear``, whose weight is (out, in), as ``name.W [d_in, d_out]`` and ``name.b``."""
        return {f"{name}.W": self.take(f"{key}.weight", d_out, d_in).T, f"{name}.b": self.take(f"{key}.bias", d_out)}

    def norm(self, key: str, name: str, d: int) -> dict[str, Tensor]:
        """An ``nn.LayerNorm`` as ``name.w`` and ``name.b``."""
        return {f"{name}.w": self.take(f"{key}.weight", d), f"{name}.b": self.take(f"{key}.bias", d)}

    def projection(self, key: str, name: str, letter: str, heads: int, d: int) -> dict[str, Tensor]:
        """A query, key or value projection: an ``nn.Linear`` with its heads in order."""
        weight, bias = self.take(f"{key}.weight", d, d), self.take(f"{key}.bias", d)
        return {
            f"{name}.W_{letter}": rearrange(weight, "(head e) d -> head d e", head=heads),
            f"{name}.b_{letter}": rearrange(bias, "(head e) -> head e", head=heads),
        }

    def output(self, key: str, name: str, heads: int, d: int) -> dict[str, Tensor]:
        """The attention's output projection, an ``nn.Linear`` with its heads in order."""
        weight = self.take(f"{key}.weight", d, d)
        return {
            f"{name}.W_O": rearrange(weight, "d (head e) -> head e d", head=heads),
            f"{name}.b_O": self.take(f"{key}.bias", d),
        }

    def mlp(self, first: str, second: str, name: str, d: int, d_mlp: int) -> dict[str, Tensor]:
        """The two ``nn.Linear`` layers of an MLP."""
        up, down = self.linear(first, "up", d, d_mlp), self.linear(second, "down", d_mlp, d)
        names = {"W_in": up["up.W"], "b_in": up["up.b"], "W_out": down["down.W"], "b_out": down["down.b"]}
        return {f"{name}.{leaf}": tensor for leaf, tensor in names.items()}

    def require_all_taken(self) -> None:
        """Raise ``DtLensError`` naming a tensor that was not taken: its effect would be lost."""
        if self._left:
            key = min(self._left)
            raise DtLensError(
                f"The checkpoint has a tensor {key!r} that {self.kind} of this shape has no place for."
                + nearest(key, set(self.tensors) - self._left)
            )


class Trace:
    """One forward pass over a state dict, which records activations under their canonical names."""

    def __init__(self, tensors: Mapping[str, Tensor], batch: Mapping[str, Any], n_heads: int) -> None:
        self.tensors, self.n_heads = tensors, n_heads
        self.seen: dict[str, Tensor] = {}
        real = batch.get("attention_mask")
        real = torch.ones_like(batch["timesteps"]) if real is None else real
        real = repeat(real != 0, "n step -> n 1 1 (step kind)", kind=3)
        causal = torch.ones(real.shape[-1], real.shape[-1], dtype=torch.bool, device=real.device).tril()
        # Padding attends to itself: a row without any token to attend to would be NaN and would spread.
        self.allowed = (real & causal) | torch.eye(len(causal), dtype=torch.bool, device=real.device)

    def note(self, name: str, x: Tensor) -> Tensor:
        """Record ``x`` and return it."""
        self.seen[name] = x
        return x

    def linear(self, key: str, x: Tensor) -> Tensor:
        """Apply the ``nn.Linear`` under ``key``, with its bias if it has one."""
        return F.linear(x, self.tensors[f"{key}.weight"], self.tensors.get(f"{key}.bias"))

    def norm(self, key: str, x: Tensor, eps: float = 1e-5) -> Tensor:
        """Apply the ``nn.LayerNorm`` under ``key``."""
        return F.layer_norm(x, x.shape[-1:], self.tensors[f"{key}.weight"], self.tensors[f"{key}.bias"], eps)

    def tokens(self, returns: Tensor, states: Tensor, actions: Tensor) -> Tensor:
        """Interleave the three kinds of tokens, each ``[n, step, d]``, step by step: ``[n, 3 * step, d]``."""
        return self.note("hook_embed", torch.stack((returns, states, actions), dim=2).flatten(1, 2))

    def attend(self, attn: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention; ``q``, ``k``, ``v`` and the result are ``[n, token, d]``, with the heads in order."""
        split = {"q": q, "k": k, "v": v}
        for letter, x in split.items():
            split[letter] = rearrange(x, "n t (head e) -> n head t e", head=self.n_heads)
            self.note(f"{attn}.hook_{letter}", rearrange(split[letter], "n head t e -> n t head e"))
        scores = split["q"] @ split["k"].transpose(-1, -2) / math.sqrt(split["q"].shape[-1])
        pattern = torch.softmax(scores.masked_fill(~self.allowed, -math.inf), dim=-1)
        z = rearrange(self.note(f"{attn}.hook_pattern", pattern) @ split["v"], "n head t e -> n t head e")
        return rearrange(self.note(f"{attn}.hook_z", z), "n t head e -> n t (head e)")


class Layout(ABC):
    """One model of a code base: its configuration, its weights by canonical name, and its forward pass.

    Args:
        tensors: everything in the state dict, by key.
        given: options and run facts from the file, the live model and the user; later ones override earlier ones. What
            they may lack is taken by ``given.assume(name, value)``, which lists it as assumed.

    Attributes:
        assumed: what was assumed, set by the framework.
    """

    cfg: HookedDecisionTransformerConfig
    facts: RunFacts
    assumed: Mapping[str, Any]
    kind: ClassVar[str]  # "a CORL decision transformer", for messages
    unused: ClassVar[str] = r"(?!)"  # matches whole keys that are in the file but not used in the computation

    @abstractmethod
    def __init__(self, tensors: Tensors, given: Options) -> None: ...

    @abstractmethod
    def canonical(self, tensors: Tensors) -> dict[str, Tensor]:
        """Canonical weights as views of the state dict's; biases that the code base lacks may be left out."""

    @abstractmethod
    def forward(self, trace: Trace, batch: Mapping[str, Any]) -> None:
        """The code base's own computation, recorded in ``trace``."""

    def state_encoder(self) -> nn.Module | None:
        """The module that reads states, if that is not a linear map."""
        return None

    def call(self, model: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The live model's own predictions for windows without padding, under Hugging Face's names."""
        raise NotImplementedError


class StateDictAdapter:
    """An adapter made of a ``Layout``; a subclass gives its name, its options, and the keys that identify its files.

    Attributes:
        name: the name of the entry point, which ``adapter=`` takes.
        layout: the class of ``Layout``.
        marks: keys that the code base's files all have, and no other code base's files have together.
        options: keywords of ``load`` and ``wrap`` in addition to the run facts, which every adapter takes.
    """

    name: str
    layout: ClassVar[type[Layout]]
    marks: ClassVar[frozenset[str]]
    options: ClassVar[frozenset[str]]

    def recognises(self, source: Checkpoint | nn.Module) -> bool:
        keys = source.tensors if isinstance(source, Checkpoint) else dict(source.named_parameters())
        return self.marks <= set(keys)

    def said_by_file(self, checkpoint: Checkpoint, given: Mapping[str, Any]) -> dict[str, Any]:
        """Options and facts that the file holds beside the tensors; ``given`` overrides them."""
        return {}

    def said_by_model(self, model: Any) -> dict[str, Any]:
        """Options and facts that a live model has and its state dict lacks."""
        return {}

    def load(self, checkpoint: Checkpoint, **given: Any) -> HookedDecisionTransformer:
        refuse_unknown(given, set(self.options) | FACTS)
        tensors = checkpoint.tensors
        checkpoint.require_finite(self._used(tensors))
        layout = self._layout(tensors, {**from_file(self.said_by_file(checkpoint, given)), **given})
        return self._lens(_FileTensors(self._used(tensors)), layout, live=False)

    def wrap(self, model: nn.Module, **given: Any) -> HookedDecisionTransformer:
        refuse_unknown(given, set(self.options) | FACTS)
        try:
            said = self.said_by_model(model)
        except (AttributeError, IndexError, KeyError, TypeError):
            said = {}  # another class with the same tensors; what is needed is asked for by name
        layout = self._layout(model.state_dict(), {**said, **given})
        return self._lens(model, layout, live=True)

    def _used(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: tensor for key, tensor in tensors.items() if not re.fullmatch(self.layout.unused, key)}

    def _layout(self, tensors: Mapping[str, Tensor], given: Mapping[str, Any]) -> Layout:
        used = self._used(tensors)
        require_computable(used)
        options = Options(given)
        layout = self.layout(Tensors(tensors, self.layout.kind), options)
        layout.assumed = options.assumed
        # Checked before a model is built.
        checked = Tensors(used, self.layout.kind)
        layout.canonical(checked)
        checked.require_all_taken()
        return layout

    def _lens(self, module: nn.Module, layout: Layout, live: bool) -> HookedDecisionTransformer:
        layout.facts.require_fit(layout.cfg.state_dim, layout.cfg.act_dim)
        with torch.device("meta"):
            hooked = HookedDecisionTransformer(layout.cfg, layout.state_encoder())
        shapes = {name: parameter.shape for name, parameter in hooked.named_parameters()}
        own: dict[str, Tensor] = {}

        def views() -> dict[str, Tensor]:
            weights = layout.canonical(Tensors(self._used(module.state_dict()), layout.kind))
            like = next(iter(weights.values()))
            for name, shape in shapes.items():
                # A bias that the code base lacks is the lens's own zeros, the same tensor as long as the model stays.
                if name not in weights and re.fullmatch(r"b|b_[A-Za-z]+", name.rpartition(".")[2]):
                    own[name] = own[name].to(like) if name in own else like.new_zeros(shape)
                    weights[name] = own[name]
            return weights

        hooked.look_at(module, views, _Reference(module, layout, self._used, live))
        hooked.facts, hooked.assumed = layout.facts, layout.assumed
        hooked.train(module.training)
        return hooked


class _FileTensors(nn.Module):
    """A file's tensors as parameters under the file's own keys, so that they are moved and cast together."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for key, tensor in tensors.items():
            *path, leaf = key.split(".")
            owner: nn.Module = self
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(leaf, nn.Parameter(tensor.detach(), requires_grad=False))
        self.eval()


class _Reference:
    """The code base's forward pass over the tensors; for a live model its predictions come from the model itself."""

    def __init__(
        self,
        module: nn.Module,
        layout: Layout,
        used: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
        live: bool,
    ) -> None:
        self.module, self.layout, self.used, self.live = module, layout, used, live

    def activations(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Every activation that ``certify`` compares, without dropout."""
        trace = Trace(self.used(self.module.state_dict()), batch, self.layout.cfg.n_heads)
        with torch.no_grad():
            self.layout.forward(trace, batch)
            predictions = self._predictions(batch, trace.seen) if self.live else {}
        return trace.seen | predictions

    def _predictions(self, batch: Mapping[str, Any], seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        made = {name: tensor.clone() for name, tensor in seen.items() if name.endswith("_preds")}
        mask = batch.get("attention_mask")
        real = torch.ones_like(batch["timesteps"]) if mask is None else mask
        training = self.module.training
        try:
            self.module.eval()
            for row, steps in enumerate(real != 0):
                # These models have no padding. Cutting it off changes nothing, unless positions in the window count.
                if self.layout.cfg.position != "none" and not steps.all():
                    continue
                # A whole window may lack its last action.
                kept = slice(None) if steps.all() else steps
                window = {name: x[row : row + 1, kept] for name, x in batch.items() if name != "attention_mask"}
                out = self.layout.call(self.module, window)
                for name in made.keys() & out.keys():
                    made[name][row, kept] = out[name][0].to(made[name])
        except DtLensError:
            raise
        except Exception as error:  # whatever the user's own code raises
            raise DtLensError(
                f"This model's own forward pass fails, so nothing can be certified against it: {because(error)}."
            ) from error
        finally:
            self.module.train(training)
        return made


def ask_for_heads(given: Mapping[str, Any], kind: str, usual: int) -> Any:
    """The number of attention heads, which shapes do not show: the user has to give it."""
    if "n_heads" not in given:
        raise DtLensError(
            f"{kind[0].upper()}{kind[1:]}'s file does not say how many attention heads it has; pass n_heads= "
            f"(the code base's default is n_heads={usual})."
        )
    return given["n_heads"]


def run_facts(usual: Mapping[str, Any], given: Mapping[str, Any]) -> RunFacts:
    """The facts of the run: those given, and for the rest those of every run of the code base.

    Of the context, the return scale and the normalisation of states, what neither says is assumed and listed as such.
    """
    options = given if isinstance(given, Options) else Options(given)
    return given_facts(None, options.over(from_file(usual)))


def steps_of_mask(tensors: Mapping[str, Tensor], key: str) -> dict[str, int]:
    """The context that a square causal mask was made for: a step is three tokens."""
    mask = tensors.get(key)
    width = mask.shape[-1] if mask is not None and mask.ndim else 0
    return {"context": width // 3} if width > 0 and width % 3 == 0 else {}
