"""d3rlpy's decision transformers, continuous and discrete: ``.d3`` files, ``.pt`` files of weights, and live modules.

Pre-LayerNorm blocks with an epsilon of 0.003 behind a state encoder of its own (by default two linear maps of 256, each
with an activation); the discrete one has a tanh over all three embeddings, no LayerNorm over them, and no biases at its
action table and its head. d3rlpy counts an episode's steps from 1; the lens counts from 0, on the same rows of the
table. A ``.d3`` file holds its configuration; weights alone (``save_model``) do not, unless the training run's
``params.json`` lies beside them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.decision_transformer.model import activation
from dt_lens.decision_transformer.state_dicts import (
    UNSCALED,
    Layout,
    Options,
    StateDictAdapter,
    Tensors,
    Trace,
    run_facts,
)
from dt_lens.errors import DtLensError, nearest
from dt_lens.lens.checkpoints import Checkpoint, read_json
from dt_lens_adapters.d3rlpy_settings import ACTIVATIONS, DIVIDED, said_by_settings, settings_in
from dt_lens_adapters.state_encoders import ConvStack, LinearStack, image_side

__all__ = ["D3rlpyDecisionTransformer"]

TABLE = "_position_encoding._embed.weight"
GLOBAL = "_position_encoding._global_position_embedding.weight"
WINDOW = "_position_encoding._block_position_embedding._parameter"
EPS = 0.003
# What holds of a model whose configuration does not say otherwise.
USUAL: dict[str, Any] = {**UNSCALED, "embed_act": "tanh", "strides": (4, 2, 1)}
NATURE = ((8, 4, 3), (4, 2, 1))  # kernels and strides of d3rlpy's reader of images, unless somebody chose others
# Torch's names of activations, lower case, and d3rlpy's own class.
MODULES = {"relu": "relu", "gelu": "gelu", "tanh": "tanh", "swish": "silu", "silu": "silu", "identity": "none"}


class _Layout(Layout):
    kind = "a d3rlpy decision transformer"
    unused = r"_gpt2\._transformer\.\d+\._attention\._mask"

    def __init__(self, tensors: Tensors, given: Options) -> None:
        act_dim, d = tensors.size("_output.weight")
        # Any of them, so that a missing one is reported as missing.
        self.discrete = not any(key in tensors for key in ("_action_embed.bias", "_output.bias", "_embed_ln.weight"))
        by_window = GLOBAL in tensors or WINDOW in tensors
        self.table = GLOBAL if by_window else TABLE
        rows = tensors.size(self.table)[0]
        mask = tensors.tensors.get("_gpt2._transformer.0._attention._mask")
        context = {"context": mask.shape[-1] // 3} if mask is not None and mask.ndim else {}
        self.facts = run_facts(context, given)
        for name in ("n_heads", "act_fn"):
            if name not in given:
                raise DtLensError(
                    f"d3rlpy's weights alone do not say what {name} is; pass n_heads= and act_fn= (unless chosen, 1 "
                    "and 'relu' with continuous actions, 8 and 'gelu' with discrete ones), or give the .d3 file."
                )
        # Row 0 is padding's, and there is one more than the longest episode needs.
        longest = given.get("max_timestep", rows - 2)
        if not isinstance(longest, int) or not 1 <= longest < rows:
            raise DtLensError(
                f"The configuration's max_timestep is {longest!r}; the checkpoint's timestep table has {rows} rows, "
                f"which allow 1 to {rows - 1}."
            )
        self.embed_act = _act(given.assume("embed_act", "tanh"), "embed_act") if self.discrete else "none"
        self._read_encoder(tensors, given, d)
        self.cfg = HookedDecisionTransformerConfig(
            state_dim=self.state_dim,
            act_dim=act_dim,
            d_model=d,
            n_layers=tensors.count(r"_gpt2\._transformer\.(\d+)\."),
            n_heads=given["n_heads"],
            d_mlp=tensors.size("_gpt2._transformer.0._mlp._l1.weight")[0],
            n_ctx=self.facts.context,
            max_ep_len=longest,
            act_fn=_act(given["act_fn"], "act_fn"),  # type: ignore[arg-type]
            embed_ln=not self.discrete,
            eps=EPS,
            action_tanh=not self.discrete,
            discrete_actions=self.discrete,
            position="step" if by_window else "none",
            n_position=tensors.size(WINDOW, 3)[1] if by_window else 1,
            timestep_of="window" if by_window else "step",
            embed_act=self.embed_act,  # type: ignore[arg-type]
            predicts=("action",),
        )

    def _read_encoder(self, tensors: Tensors, given: Options, d: int) -> None:
        """The layers of the state encoder: their keys, their sizes, and the activations behind them."""
        act = _act(given.assume("encoder_act", "relu"), "encoder_act")
        last = _act(given.get("encoder_last_act", act), "encoder_last_act")
        self.last_acts = tuple(name for name in (last, self.embed_act) if name != "none")
        self.inner_acts = () if act == "none" else (act,)
        self.convs = _numbered(tensors, r"_encoder\._cnn_layers\.(\d+)\.", 4)
        if not self.convs:
            self.linears = _numbered(tensors, r"_encoder\._layers\.(\d+)\.", 2)
            if not self.linears:
                tensors.size("_encoder._layers.0.weight")
            self.widths = [tensors.size(f"{self.linears[0]}.weight")[1]]
            self.widths += [tensors.size(f"{key}.weight")[0] for key in self.linears]
            self.state_dim = self.widths[0]
            return
        self.linears = ["_encoder._last_layers.0"]
        shapes = [tensors.size(f"{key}.weight", 4) for key in self.convs]
        self.pixels = float(given.get("pixels", 1.0))
        self.channels = [shapes[0][1], *(shape[0] for shape in shapes)]
        self.kernels = tuple(shape[-1] for shape in shapes)
        strides = given.assume("strides", NATURE[1]) if self.kernels == NATURE[0] else given.get("strides", ())
        self.strides = tuple(strides) if isinstance(strides, (list, tuple)) else ()
        fit = all(isinstance(stride, int) and stride > 0 for stride in self.strides)
        if not fit or len(self.strides) != len(self.kernels):
            raise DtLensError(
                f"d3rlpy's weights alone do not say the strides of these {len(shapes)} convolutions; pass strides= "
                "with one number for each, or give the .d3 file."
            )
        left = math.isqrt(tensors.size(f"{self.linears[0]}.weight")[1] // self.channels[-1])
        least = image_side(left, self.kernels, self.strides)
        self.side = given.assume("image_side", least)
        if not isinstance(self.side, int) or not least <= self.side < image_side(left + 1, self.kernels, self.strides):
            raise DtLensError(
                f"image_side is {self.side!r}; this checkpoint's layers fit images of {least} pixels or a few more."
            )
        self.state_dim = self.channels[0] * self.side**2

    def state_encoder(self) -> nn.Module:
        if not self.convs:
            behind = [self.inner_acts] * (len(self.linears) - 1) + [self.last_acts]
            return LinearStack(self.widths, behind)
        d = self.cfg.d_model
        acts = (self.inner_acts, self.last_acts)
        return ConvStack(self.channels, self.kernels, self.strides, self.side, d, *acts, self.pixels)

    def canonical(self, tensors: Tensors) -> dict[str, Tensor]:
        cfg, d = self.cfg, self.cfg.d_model
        weights = tensors.linear("_rtg_embed", "embed.return_to_go", 1, d)
        weights |= tensors.norm("_gpt2._layer_norm", "ln_final", d)
        rows = tensors.size(self.table)[0]
        # The lens's first step is d3rlpy's number 1.
        weights["embed.timestep.W"] = tensors.take(self.table, rows, d)[1 : 1 + cfg.max_ep_len]
        if cfg.position == "step":
            weights["embed.position.W"] = tensors.take(WINDOW, 1, cfg.n_position, d)[0]
        if self.discrete:
            weights["embed.action.W"] = tensors.take("_action_embed.weight", cfg.act_dim, d)
            weights["predict.action.W"] = tensors.take("_output.weight", cfg.act_dim, d).T
        else:
            weights |= tensors.linear("_action_embed", "embed.action", cfg.act_dim, d)
            weights |= tensors.linear("_output", "predict.action", d, cfg.act_dim)
            weights |= tensors.norm("_embed_ln", "embed_ln", d)
        weights |= self._encoder_weights(tensors)
        for layer in range(cfg.n_layers):
            t, b = f"_gpt2._transformer.{layer}", f"blocks.{layer}"
            for letter in "QKV":
                net = f"{t}._attention._{letter.lower()}"
                weights |= tensors.projection(net, f"{b}.attn", letter, cfg.n_heads, d)
            weights |= tensors.output(f"{t}._attention._proj", f"{b}.attn", cfg.n_heads, d)
            weights |= tensors.mlp(f"{t}._mlp._l1", f"{t}._mlp._l2", f"{b}.mlp", d, cfg.d_mlp)
            for norm in "12":
                weights |= tensors.norm(f"{t}._layer_norm{norm}", f"{b}.ln{norm}", d)
        return weights

    def _encoder_weights(self, tensors: Tensors) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = {}
        if self.convs:
            parts = [(f"convs.{i}", key) for i, key in enumerate(self.convs)] + [("linear", self.linears[0])]
        else:
            parts = [(f"layers.{i}", key) for i, key in enumerate(self.linears)]
        shapes = {name: parameter.shape for name, parameter in self.state_encoder().named_parameters()}
        for part, key in parts:
            for leaf in ("weight", "bias"):
                weights[f"embed.state.{part}.{leaf}"] = tensors.take(f"{key}.{leaf}", *shapes[f"{part}.{leaf}"])
        return weights

    def forward(self, trace: Trace, batch: Mapping[str, Any]) -> None:
        note, linear, w = trace.note, trace.linear, trace.tensors
        count = batch["timesteps"] + 1
        steps = count.shape[1]
        if self.cfg.position == "step":
            time = note("hook_embed_timestep", F.embedding(count[:, -1:], w[self.table]).expand(-1, steps, -1))
            time = time + w[WINDOW][0, :steps]
        else:
            time = note("hook_embed_timestep", F.embedding(count, w[self.table]))
        if self.discrete:
            ids = batch["actions"].argmax(-1) if batch["actions"].is_floating_point() else batch["actions"]
            actions = F.embedding(ids, w["_action_embed.weight"])
        else:
            actions = linear("_action_embed", batch["actions"])
        returns = linear("_rtg_embed", batch["returns_to_go"])
        if self.embed_act != "none":
            returns, actions = (activation(self.embed_act, x) for x in (returns, actions))
        returns, actions = note("hook_embed_return_to_go", returns), note("hook_embed_action", actions)
        states = note("hook_embed_state", self._read(trace, batch["states"]))
        x = trace.tokens(returns + time, states + time, actions + time)
        if not self.discrete:
            x = trace.norm("_embed_ln", x)
        for layer in range(self.cfg.n_layers):
            x = self._block(trace, f"_gpt2._transformer.{layer}", f"blocks.{layer}", x)
        note(f"blocks.{self.cfg.n_layers - 1}.hook_resid_post", x)
        x = note("hook_final", trace.norm("_gpt2._layer_norm", x, EPS))
        action = note("hook_action_pre", linear("_output", x[:, 1::3]))
        note("action_preds", action if self.discrete else torch.tanh(action))

    def _read(self, trace: Trace, states: Tensor) -> Tensor:
        x = states.flatten(0, 1)
        if self.convs:
            x = x.reshape(-1, self.channels[0], self.side, self.side)
            for key, stride in zip(self.convs, self.strides, strict=True):
                x = F.conv2d(x, trace.tensors[f"{key}.weight"], trace.tensors[f"{key}.bias"], stride)
                for name in self.inner_acts:
                    x = activation(name, x)
            x = x.flatten(1)
        for i, key in enumerate(self.linears):
            x = trace.linear(key, x)
            for name in self.last_acts if i == len(self.linears) - 1 else self.inner_acts:
                x = activation(name, x)
        return torch.unflatten(x, 0, states.shape[:2])

    def _block(self, trace: Trace, t: str, b: str, x: Tensor) -> Tensor:
        note, linear = trace.note, trace.linear
        normed = note(f"{b}.attn_in", trace.norm(f"{t}._layer_norm1", note(f"{b}.hook_resid_pre", x), EPS))
        q, k, v = (linear(f"{t}._attention._{letter}", normed) for letter in "qkv")
        z = trace.attend(f"{b}.attn", q, k, v)
        x = note(f"{b}.hook_resid_mid", x + note(f"{b}.hook_attn_out", linear(f"{t}._attention._proj", z)))
        normed = note(f"{b}.mlp_in", trace.norm(f"{t}._layer_norm2", x, EPS))
        hidden = activation(self.cfg.act_fn, note(f"{b}.mlp.hook_pre", linear(f"{t}._mlp._l1", normed)))
        return x + note(f"{b}.hook_mlp_out", linear(f"{t}._mlp._l2", note(f"{b}.mlp.hook_post", hidden)))

    def call(self, model: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        states, actions = batch["states"], batch["actions"]
        if self.convs:
            states = states.unflatten(-1, (self.channels[0], self.side, self.side))
        if self.discrete:
            actions = actions.argmax(-1, keepdim=True)
        nothing = torch.zeros_like(batch["returns_to_go"][..., 0])  # of the steps is padding
        out = model(states, actions, batch["returns_to_go"], batch["timesteps"] + 1, nothing)
        return {"action_preds": out[1] if self.discrete else out}


class D3rlpyDecisionTransformer(StateDictAdapter):
    """The adapter: a ``.d3`` or ``.pt`` file, or the live module ``algo.impl.modules.transformer``."""

    name = "d3rlpy"
    suffixes = (".d3",)
    layout = _Layout
    marks = frozenset({"_rtg_embed.weight", "_gpt2._transformer.0._attention._q.weight", "_output.weight"})
    options = frozenset(
        {"n_heads", "act_fn", "encoder_act", "encoder_last_act", "embed_act", "strides", "image_side", "ignore_options"}
    )

    def unpack(self, values: Mapping[str, Any], file: Path) -> tuple[bytes, Mapping[str, Any]] | None:
        """The file of torch's and the configuration that a ``.d3`` file, a pickled dict, holds."""
        weights = values.get("torch")
        return (weights, settings_in(values.get("config"), file)) if isinstance(weights, bytes) else None

    def said_by_file(self, checkpoint: Checkpoint, given: Mapping[str, Any]) -> dict[str, Any]:
        beside = (checkpoint.folder / "params.json") if checkpoint.folder else None
        settings = checkpoint.config or (read_json(beside) if beside and beside.is_file() else {})
        # Other programs write a params.json too.
        ours = {"observation_shape", "config"} <= set(settings)
        if not ours:
            return {}
        ignored = given.get("ignore_options", ())
        usual = {
            name: value for name, value in USUAL.items() if name != "return_scale" or "reward_scaler" not in ignored
        }
        said = said_by_settings(settings, ignored)
        # Apart from the facts: a user's own ``about`` takes the place of the settings'.
        divided = said.get("about", {}).get("observations") == DIVIDED
        return usual | said | ({"pixels": 255.0} if divided else {})

    def said_by_model(self, model: Any) -> dict[str, Any]:
        block = model._gpt2._transformer[0]
        said: dict[str, Any] = {"n_heads": block._attention._num_heads, "act_fn": _of(block._mlp._activation)}
        if hasattr(model, "_embed_activation"):
            said["embed_act"] = _of(model._embed_activation)
        return said | _of_encoder(model._encoder)


def _numbered(tensors: Tensors, pattern: str, ndim: int) -> list[str]:
    """Keys of layers, without what follows their number, in the order of their numbers.

    A layer has a weight of ``ndim`` sizes, or a bias without a weight.
    """
    found: dict[int, str] = {}
    for key in tensors.tensors:
        match = re.fullmatch(pattern + "(?:weight|bias)", key, re.ASCII)
        layer = key.rpartition(".")[0]
        weight = tensors.tensors.get(f"{layer}.weight")
        if match and len(match[1]) < 10 and (weight is None or weight.ndim == ndim):
            found[int(match[1])] = layer
    return [found[number] for number in sorted(found)]


def _act(name: Any, argument: str) -> str:
    """dt-lens's name of an activation of d3rlpy's."""
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise DtLensError(
            f"{argument} is {name!r}; of d3rlpy's activations dt-lens knows {', '.join(ACTIVATIONS)}."
            + nearest(str(name), ACTIVATIONS)
        )
    return ACTIVATIONS[name]


def _of(module: nn.Module) -> str:
    """The name of a live activation."""
    name = type(module).__name__.lower()
    return MODULES.get(name, name)


def _of_encoder(encoder: Any) -> dict[str, Any]:
    """The activations and strides of a live state encoder."""
    convs = [m for m in getattr(encoder, "_cnn_layers", ()) if isinstance(m, nn.Conv2d)]
    stacks = [getattr(encoder, name, ()) for name in ("_cnn_layers", "_layers", "_last_layers")]
    layers = [m for stack in stacks for m in stack if not isinstance(m, (nn.Dropout, nn.Dropout2d))]
    acts = _acts_behind(layers)
    said: dict[str, Any] = {"encoder_last_act": acts[-1]} if acts else {}
    if acts and len(set(acts[:-1])) <= 1:  # of a single layer there is only the last
        said["encoder_act"] = acts[0]
    return said | ({"strides": [conv.stride[0] for conv in convs]} if convs else {})


def _acts_behind(layers: Sequence[nn.Module]) -> list[str]:
    """For every linear map or convolution the activation behind it."""
    acts: list[str] = []
    for layer in layers:
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            acts.append("none")
        elif acts:
            acts[-1] = _of(layer)
    return acts
