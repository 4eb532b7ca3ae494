"""MiniGrid decision transformers as jbloomAus/DecisionTransformerInterpretability trains and saves them.

The blocks are TransformerLens's, so they have canonical names already. Around them stand ``nn.Embedding`` and
``nn.Linear`` layers, most of them without a bias. Positions are learned, one for each token that acting reads (the
context without its last action), besides a table of timesteps. Before an episode's first step the window holds steps of
padding that the model sees.

A file holds, beside the state dict, what it was trained with as JSON; or it is the state dict alone, from whose shapes
all but the activation function can be read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from dt_lens.decision_transformer.config import HEADS, Activation, HookedDecisionTransformerConfig
from dt_lens.decision_transformer.state_dicts import (
    UNSCALED,
    Layout,
    Options,
    StateDictAdapter,
    Tensors,
    Trace,
    run_facts,
)
from dt_lens.errors import DtLensError, a_type, because, nearest
from dt_lens.lens.checkpoints import Checkpoint

__all__ = ["MiniGridDecisionTransformer", "view_factors", "view_labels"]

ENVIRONMENTS = "dt_lens_adapters.minigrid_environments:Flat/"
POSITION = "transformer.pos_embed.W_pos"
BLOCK = r"transformer\.blocks\.(\d+)\."
# What the heads and the state embedding have been called, newest first.
CALLED = {
    "state_in": ("state_embedding", "state_encoder"),
    "action": ("action_predictor", "predict_actions"),
    "state": ("state_predictor", "predict_states"),
    "return_to_go": ("reward_predictor", "predict_rewards"),
}
ACTIVATIONS: dict[str, Activation] = {
    "relu": "relu", "gelu": "gelu", "silu": "silu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
}  # fmt: skip
EPS = 1e-5  # TransformerLens's default
# Fields of the JSON beside the state dict that do not change what is computed.
UNUSED_FIELDS = {
    "model_config": {"seed", "device", "d_head"},
    "environment_config": {
        "seed", "device", "capture_video", "video_dir", "video_frequency", "render_mode", "action_space",
        "observation_space", "id", "run_name", "num_parallel_envs",
    },
}  # fmt: skip
USED_FIELDS = {
    "model_config": {
        "d_model", "n_heads", "d_mlp", "n_layers", "n_ctx", "layer_norm", "gated_mlp", "activation_fn",
        "state_embedding_type", "time_embedding_type",
    },
    "environment_config": {"env_id", "one_hot_obs", "img_obs", "fully_observed", "max_steps", "view_size"},
}  # fmt: skip
OBJECTS = ("unseen", "empty", "wall", "floor", "door", "key", "ball", "box", "goal", "lava", "agent")
COLOURS = ("red", "green", "blue", "purple", "yellow", "grey")
CHANNELS = {3: ("object", "colour", "state"), 20: (*OBJECTS, *COLOURS, "open", "closed", "locked")}
ACTIONS = ("left", "right", "forward", "pickup", "drop", "toggle", "done")


class MiniGridLayout(Layout):
    """One model: its sizes off the shapes, checked against what the file says of itself."""

    kind = "a MiniGrid decision transformer"
    unused = r"transformer\.blocks\.\d+\.attn\.(mask|IGNORE)"

    def __init__(self, tensors: Tensors, given: Options) -> None:
        said: Mapping[str, Any] = given.get("said", {})
        stated: Mapping[str, Any] = said.get("model_config", {})
        self.keys = {part: _called(tensors, names) for part, names in CALLED.items()}
        n_position, d = tensors.size(POSITION)
        heads = tensors.size("transformer.blocks.0.attn.W_Q", 3)[0]
        n_actions = tensors.size("action_embedding.0.weight")[0]
        if n_actions < 2:
            raise DtLensError("The tensor 'action_embedding.0.weight' has 1 row; it holds an action and the padding.")
        if "time_embedding.bias" in tensors:
            raise DtLensError(
                "This model has a linear time embedding ('time_embedding.bias'); dt-lens reads those that have a table."
            )
        # A part that one block has, all must have, so that a missing one is reported.
        self.normed = tensors.holds(r"transformer\.(blocks\.\d{1,6}\.ln[12]|ln_final)\.[wb]")
        self.gated = tensors.holds(BLOCK + r"mlp\.W_gate")
        self.n_layers = tensors.count(BLOCK)
        tensors.size(self.keys["action"])
        state_dim, d_mlp = tensors.size(self.keys["state_in"])[1], tensors.size("transformer.blocks.0.mlp.W_in")[1]
        sizes = {"d_model": d, "n_heads": heads, "d_mlp": d_mlp, "n_layers": self.n_layers, "n_ctx": n_position}
        _require_agreement(stated, sizes, self.normed, self.gated)
        self.facts = run_facts(_usual_facts(said, state_dim, n_actions - 1, n_position, given), given)
        if 3 * self.facts.context - 1 > n_position:
            raise DtLensError(
                f"context={self.facts.context} does not fit this checkpoint, whose {n_position} positions hold "
                f"{(n_position + 1) // 3} steps; give a shorter one."
            )
        self.cfg = HookedDecisionTransformerConfig(
            state_dim=state_dim,
            act_dim=n_actions - 1,
            d_model=d,
            n_layers=self.n_layers,
            n_heads=heads,
            d_mlp=d_mlp,
            n_ctx=self.facts.context,
            max_ep_len=tensors.size("time_embedding.weight")[0],
            act_fn=_act_fn(stated, given),
            normalization="pre" if self.normed else "none",
            final_ln=self.normed,
            embed_ln=False,
            eps=EPS,
            action_tanh=False,
            discrete_actions=True,
            position="learned",
            n_position=n_position,
            gated_mlp=self.gated,
            predicts=tuple(head for head in HEADS if tensors.holds(_either(self.keys[head]))),
            action_padding=True,
            embed_dropout=0.0,
            attn_dropout=0.0,
            resid_dropout=0.0,
        )

    def canonical(self, tensors: Tensors) -> dict[str, Tensor]:
        cfg = self.cfg
        d, e, heads = cfg.d_model, cfg.d_head, cfg.n_heads
        weights = {
            "embed.return_to_go.W": tensors.take("reward_embedding.0.weight", d, 1).T,
            "embed.state.W": tensors.take(self.keys["state_in"], d, cfg.state_dim).T,
            "embed.action.W": tensors.take("action_embedding.0.weight", cfg.n_actions, d),
            "embed.timestep.W": tensors.take("time_embedding.weight", cfg.max_ep_len, d),
            "embed.position.W": tensors.take(POSITION, cfg.n_position, d),
        }
        shapes: dict[str, tuple[int, ...]] = {"ln_final.w": (d,), "ln_final.b": (d,)} if self.normed else {}
        for layer in range(self.n_layers):
            block, attn, mlp = (f"blocks.{layer}{part}" for part in ("", ".attn", ".mlp"))
            for letter in "QKV":
                shapes |= {f"{attn}.W_{letter}": (heads, d, e), f"{attn}.b_{letter}": (heads, e)}
            shapes |= {f"{attn}.W_O": (heads, e, d), f"{attn}.b_O": (d,)}
            shapes |= {f"{mlp}.W_in": (d, cfg.d_mlp), f"{mlp}.b_in": (cfg.d_mlp,)}
            shapes |= {f"{mlp}.W_out": (cfg.d_mlp, d), f"{mlp}.b_out": (d,)}
            if self.gated:
                shapes[f"{mlp}.W_gate"] = (d, cfg.d_mlp)
            if self.normed:
                shapes |= {f"{block}.ln{i}.{leaf}": (d,) for i in (1, 2) for leaf in "wb"}
        weights |= {name: tensors.take(f"transformer.{name}", *shape) for name, shape in shapes.items()}
        for head, size in (("action", cfg.act_dim), ("state", cfg.state_dim), ("return_to_go", 1)):
            if head in cfg.predicts:
                weights |= tensors.linear(self.keys[head].removesuffix(".weight"), f"predict.{head}", d, size)
        return weights

    def forward(self, trace: Trace, batch: Mapping[str, Any]) -> None:
        held, actions = trace.tensors, batch["actions"]
        time = trace.note("hook_embed_timestep", held["time_embedding.weight"][batch["timesteps"]])
        table, acted = held["action_embedding.0.weight"], actions.shape[1]
        returns = trace.note("hook_embed_return_to_go", trace.linear("reward_embedding.0", batch["returns_to_go"]))
        states = trace.linear(self.keys["state_in"].removesuffix(".weight"), batch["states"])
        trace.note("hook_embed_state", states)
        rows = table[actions] if not actions.is_floating_point() else actions @ table[: actions.shape[-1]]
        if acted:  # else there is nothing to compare
            trace.note("hook_embed_action", rows)
        # A window may end before its last action, which is still to be chosen.
        tokens = returns.new_zeros(len(returns), 2 * time.shape[1] + acted, time.shape[-1])
        tokens[:, 0::3], tokens[:, 1::3], tokens[:, 2::3] = returns + time, states + time, rows + time[:, :acted]
        trace.note("hook_embed", tokens)
        n = tokens.shape[1]
        allowed = trace.allowed[:, 0, :n, :n]
        x = tokens + held[POSITION][:n]
        for layer in range(self.n_layers):
            x = self._block(trace, layer, x, allowed)
        trace.note(f"blocks.{self.n_layers - 1}.hook_resid_post", x)
        x = trace.note("hook_final", _norm(held, "transformer.ln_final", x) if self.normed else x)
        trace.note("action_preds", self._predict(trace, "action", x[:, 1::3]))
        for head, name in (("state", "state_preds"), ("return_to_go", "return_preds")):
            if head in self.cfg.predicts and acted:
                trace.note(name, self._predict(trace, head, x[:, 2::3]))
        trace.note("hook_action_pre", trace.seen["action_preds"])

    def _predict(self, trace: Trace, head: str, x: Tensor) -> Tensor:
        return trace.linear(self.keys[head].removesuffix(".weight"), x)

    def _block(self, trace: Trace, layer: int, x: Tensor, allowed: Tensor) -> Tensor:
        held, b, t = trace.tensors, f"blocks.{layer}", f"transformer.blocks.{layer}"
        trace.note(f"{b}.hook_resid_pre", x)
        seen = _norm(held, f"{t}.ln1", x) if self.normed else x
        if self.normed:
            trace.note(f"{b}.attn_in", seen)
        q, k, v = (
            trace.note(
                f"{b}.attn.hook_{letter.lower()}",
                einsum(seen, held[f"{t}.attn.W_{letter}"], "n t d, h d e -> n t h e") + held[f"{t}.attn.b_{letter}"],
            )
            for letter in "QKV"
        )
        scores = einsum(q, k, "n q h e, n k h e -> n h q k") / math.sqrt(q.shape[-1])
        weights = scores.masked_fill(~allowed[:, None], -math.inf).softmax(-1)
        pattern = trace.note(f"{b}.attn.hook_pattern", weights)
        z = trace.note(f"{b}.attn.hook_z", einsum(pattern, v, "n h q k, n k h e -> n q h e"))
        out = einsum(z, held[f"{t}.attn.W_O"], "n t h e, h e d -> n t d") + held[f"{t}.attn.b_O"]
        x = trace.note(f"{b}.hook_resid_mid", x + trace.note(f"{b}.hook_attn_out", out))
        seen = _norm(held, f"{t}.ln2", x) if self.normed else x
        if self.normed:
            trace.note(f"{b}.mlp_in", seen)
        linear = einsum(seen, held[f"{t}.mlp.W_in"], "n t d, d m -> n t m")
        if self.gated:
            trace.note(f"{b}.mlp.hook_pre_linear", linear)
            pre = trace.note(f"{b}.mlp.hook_pre", einsum(seen, held[f"{t}.mlp.W_gate"], "n t d, d m -> n t m"))
            post = _activated(self.cfg.act_fn, pre) * linear + held[f"{t}.mlp.b_in"]
        else:
            post = _activated(self.cfg.act_fn, trace.note(f"{b}.mlp.hook_pre", linear + held[f"{t}.mlp.b_in"]))
        trace.note(f"{b}.mlp.hook_post", post)
        out = einsum(post, held[f"{t}.mlp.W_out"], "n t m, m d -> n t d") + held[f"{t}.mlp.b_out"]
        return x + trace.note(f"{b}.hook_mlp_out", out)

    def call(self, model: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The predictions of the code base's own class; none for a module that only holds the weights."""
        if type(model).forward is nn.Module.forward:
            return {}
        side = self._side()
        states = batch["states"]
        if side is not None:
            states = rearrange(states, "n t (c x y) -> n t x y c", x=side, y=side)
        actions = batch["actions"]
        ids = actions.argmax(-1) if actions.is_floating_point() else actions
        out = model(
            states=states,
            actions=ids[..., None] if ids.shape[1] else None,
            rtgs=batch["returns_to_go"],
            timesteps=batch["timesteps"][..., None],
        )
        named = dict(zip(("state_preds", "action_preds", "return_preds"), out, strict=True))
        # Without a last action its class fills in predictions from another token.
        acted = ids.shape[1]
        return {
            name: prediction if name == "action_preds" else prediction[:, :acted]
            for name, prediction in named.items()
            if prediction is not None
        }

    def _side(self) -> int | None:
        shape = _view(self.cfg.state_dim)
        return None if shape is None else shape[0]


class MiniGridDecisionTransformer(StateDictAdapter):
    """The adapter. A live model without a forward pass is compared with this file's, over the model's tensors."""

    name = "minigrid_decision_transformer"
    layout = MiniGridLayout
    marks = frozenset({"action_embedding.0.weight", "time_embedding.weight", "reward_embedding.0.weight", POSITION})
    options = frozenset({"act_fn", "ignore_options"})

    def said_by_file(self, checkpoint: Checkpoint, given: Mapping[str, Any]) -> dict[str, Any]:
        said = {}
        for name in ("model_config", "environment_config", "offline_config"):
            if name in checkpoint.extra:
                said[name] = _read(name, checkpoint.extra[name])
        return {"said": said}

    def said_by_model(self, model: Any) -> dict[str, Any]:
        said = {}
        for name, attribute in (("model_config", "transformer_config"), ("environment_config", "environment_config")):
            config = getattr(model, attribute, None)
            if config is not None and hasattr(config, "__dict__"):
                said[name] = dict(vars(config))
        return {"said": said}


def _called(tensors: Tensors, names: tuple[str, ...]) -> str:
    keys = [f"{name}.weight" for name in names]
    return next((key for key in keys if tensors.holds(_either(key))), keys[0])


def _either(key: str) -> str:
    """A weight's key or its bias's, as a pattern."""
    return re.escape(key.removesuffix("weight")) + "(weight|bias)"


def _read(name: str, value: Any) -> dict[str, Any]:
    try:
        # A mapping must hold plain values too.
        values = json.loads(value if isinstance(value, str) else json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise DtLensError(f"The checkpoint's {name} is not JSON: {because(error)}.") from error
    if not isinstance(values, Mapping):
        raise DtLensError(f"The checkpoint's {name} holds {a_type(values)}; expected named fields.")
    return dict(values)


def _refuse_unknown_fields(said: Mapping[str, Any], ignored: Any) -> None:
    for name, used in USED_FIELDS.items():
        known = used | UNUSED_FIELDS[name]
        for field in said.get(name, {}):
            if field not in known and field not in ignored:
                raise DtLensError(
                    f"The checkpoint's {name} has a field {field!r} that dt-lens does not know, so its effect would "
                    f"be lost; if it has none, pass ignore_options=[{field!r}]." + nearest(str(field), known)
                )


def _require_agreement(stated: Mapping[str, Any], sizes: Mapping[str, int], normed: bool, gated: bool) -> None:
    """Raise unless what the file says of its sizes agrees with its tensors."""
    norms: dict[Any, bool] = {"LN": True, True: True, False: False, None: False}
    norm = stated.get("layer_norm", normed)
    if not isinstance(norm, (str, bool, type(None))) or norm not in norms:
        raise DtLensError(f"The checkpoint's model_config has layer_norm={norm!r}; dt-lens reads 'LN' and none.")
    for name, wanted in (("time_embedding_type", "linear"), ("state_embedding_type", "CNN")):
        if stated.get(name) == wanted:
            raise DtLensError(f"The checkpoint's model_config has {name}={wanted!r}, which dt-lens does not read.")
    found = {**sizes, "layer_norm": normed, "gated_mlp": gated}
    for name, value in {**stated, "layer_norm": norms[norm]}.items():
        if name in found and value != found[name]:
            raise DtLensError(
                f"The checkpoint's model_config says {name}={value!r} and its tensors {found[name]!r}; the two do not "
                "belong together."
            )


def _act_fn(stated: Mapping[str, Any], given: Options) -> Any:
    if "act_fn" in given or not stated:
        return given.assume("act_fn", "relu")
    name = stated.get("activation_fn", "relu")  # what the code base had before it was an option
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise DtLensError(
            f"The checkpoint's model_config has activation_fn={name!r}; dt-lens knows {', '.join(ACTIVATIONS)}."
            + nearest(str(name), ACTIVATIONS)
        )
    return ACTIVATIONS[name]


def _usual_facts(
    said: Mapping[str, Any], state_dim: int, act_dim: int, n_position: int, given: Mapping[str, Any]
) -> dict[str, Any]:
    """What the file says of the run, and what holds of every run of the code base."""
    _refuse_unknown_fields(said, given.get("ignore_options", ()))
    facts: dict[str, Any] = {**UNSCALED, "context": (n_position + 1) // 3, "padding": "visible"}
    if act_dim <= len(ACTIONS):
        facts["action_labels"] = ACTIONS[:act_dim]
    facts["state_labels"] = view_labels(state_dim)
    factors = view_factors(state_dim)
    if factors is not None:
        facts["factors"] = {"state_in": factors}
    run, world = said.get("offline_config", {}), said.get("environment_config", {})
    env_id = world.get("env_id")
    if isinstance(env_id, str) and not world.get("img_obs"):
        facts["environment"] = ENVIRONMENTS + env_id
        if given.get("environment", facts["environment"]) == facts["environment"]:
            facts["environment_kwargs"] = _environment_options(world, run)
    targets = run.get("initial_rtg")
    if isinstance(targets, (list, tuple)):
        try:
            facts["target_returns"] = sorted({float(target) for target in targets}, reverse=True)
        except (TypeError, ValueError) as error:
            raise DtLensError(
                f"The checkpoint's offline_config has initial_rtg={targets!r}, which are not numbers."
            ) from error
    if isinstance(run.get("trajectory_path"), str):
        facts["about"] = {"trajectories": run["trajectory_path"]}
    return facts


def _environment_options(world: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """The options with which the code base makes its environment to evaluate."""
    options: dict[str, Any] = {}
    for name, option in (("one_hot_obs", "one_hot"), ("fully_observed", "fully_observed")):
        if world.get(name):
            options[option] = True
    if world.get("view_size", 7) != 7:
        options["view_size"] = world["view_size"]
    steps = run.get("eval_max_time_steps", world.get("max_steps"))
    if steps:
        options["max_steps"] = steps
    return options


def view_labels(state_dim: int) -> tuple[str, ...] | None:
    """Names such as ``"key at (2, 6)"`` for the numbers of a flat view; ``None`` for any other state.

    ``x`` runs from left to right and ``y`` towards the agent, who stands in the middle of the last row.
    """
    shape = _view(state_dim)
    if shape is None:
        return None
    side, channels = shape
    return tuple(f"{what} at ({x}, {y})" for what in CHANNELS[channels] for x in range(side) for y in range(side))


def view_factors(state_dim: int) -> dict[str, tuple[str | None, ...]] | None:
    """What each number of a flat one-hot view is about: an object, a colour or a state, and its cell.

    ``None`` for any other state, also for views of three whole numbers a cell, which are no levels.
    """
    shape = _view(state_dim)
    if shape is None or shape[1] == 3:
        return None
    side, channels = shape
    cells = [f"({x}, {y})" for x in range(side) for y in range(side)]
    kinds = {"object": OBJECTS, "colour": COLOURS, "state": CHANNELS[channels][-3:]}
    found: dict[str, tuple[str | None, ...]] = {
        kind: tuple(name if name in names else None for name in CHANNELS[channels] for _ in cells)
        for kind, names in kinds.items()
    }
    return {**found, "cell": tuple(cells) * channels}


def _view(state_dim: int) -> tuple[int, int] | None:
    """The side of a square view and its channels; ``None`` for any other state."""
    for channels in sorted(CHANNELS, reverse=True):
        side = math.isqrt(state_dim // channels)
        if side >= 3 and side % 2 and channels * side * side == state_dim:
            return side, channels
    return None


def _norm(held: Mapping[str, Tensor], key: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * held[f"{key}.w"] + held[f"{key}.b"]


def _activated(name: str, x: Tensor) -> Tensor:
    match name:
        case "relu":
            return x.clamp_min(0)
        case "silu":
            return x * torch.sigmoid(x)
        case "tanh":
            return torch.tanh(x)
        case "gelu":
            return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
