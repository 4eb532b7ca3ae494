"""The acting model computes what the hooked model computes, for every configuration, window and padding."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from hypothesis import given, settings
from hypothesis import strategies as st

from dt_lens.behaviour.agents.windows import SlidingPolicy, WindowPolicy
from dt_lens.decision_transformer.acting_blocks import NEURONS
from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.decision_transformer.model import HookedDecisionTransformer
from dt_lens.decision_transformer.policy import ActingModel, acting_shapes, additive_mask
from dt_lens.errors import DtLensError

STEPS = 5


@st.composite
def configurations(draw: st.DrawFn) -> HookedDecisionTransformerConfig:
    heads = draw(st.sampled_from([1, 2, 3]))
    return HookedDecisionTransformerConfig(
        state_dim=draw(st.integers(1, 5)),
        act_dim=draw(st.integers(1, 4)),
        d_model=heads * draw(st.sampled_from([4, 7])),
        n_layers=draw(st.integers(1, 3)),
        n_heads=heads,
        d_mlp=draw(st.sampled_from([8, 20, 2 * NEURONS + 9])),
        n_ctx=STEPS,
        max_ep_len=40,
        act_fn=draw(st.sampled_from(["relu", "gelu", "gelu_tanh", "silu", "tanh"])),
        normalization=draw(st.sampled_from(["pre", "post", "none"])),
        final_ln=draw(st.booleans()),
        embed_ln=draw(st.booleans()),
        action_tanh=draw(st.booleans()),
        discrete_actions=draw(st.booleans()),
        position=draw(st.sampled_from(["none", "constant", "learned"])),
        n_position=3 * STEPS - draw(st.integers(0, 1)),  # the last action is yet to come and needs no position
        attn_scale_by_head=draw(st.booleans()),
        attn_scale_by_layer=draw(st.booleans()),
        eps=draw(st.sampled_from([1e-5, 1e-2])),
        embed_ln_eps=draw(st.sampled_from([1e-5, 1e-2])),
        gated_mlp=draw(st.booleans()),
        predicts=draw(st.sampled_from([("action",), ("action", "state"), ("action", "state", "return_to_go")])),
        embed_act=draw(st.sampled_from(["none", "tanh"])),
        action_padding=draw(st.booleans()),
    )


def _model(cfg: HookedDecisionTransformerConfig, seed: int) -> HookedDecisionTransformer:
    torch.manual_seed(seed)
    model = HookedDecisionTransformer(cfg).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # also biases and LayerNorms, whose initial values would hide mistakes
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.double()  # so that a difference is a mistake, not rounding


def _episode(cfg: HookedDecisionTransformerConfig, batch: int, steps: int) -> tuple[torch.Tensor, ...]:
    states, actions, returns = (torch.randn(batch, steps, n).double() for n in (cfg.state_dim, cfg.act_dim, 1))
    actions = actions.tanh()
    if cfg.discrete_actions:
        actions = torch.nn.functional.one_hot(actions.argmax(-1), cfg.act_dim).double()
    return states, actions, returns


def _last_action(
    model: HookedDecisionTransformer,
    states: torch.Tensor,
    actions: torch.Tensor,
    returns_to_go: torch.Tensor,
    timesteps: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the acting model makes of windows: ``model(...).action_preds[:, -1]``; the last action is not read."""
    acting = ActingModel(model.weights, model.cfg)
    actions = F.pad(actions, (0, 0, 0, timesteps.shape[1] - actions.shape[1]))
    embedded = acting.embed(returns_to_go, states, actions, timesteps)[..., [1, 2, 0], :]  # action first
    x = acting.place(rearrange(embedded, "batch step kind d -> batch (step kind) d")[:, :-1])
    real = torch.ones_like(timesteps) if attention_mask is None else attention_mask
    mask = additive_mask(repeat(real != 0, "batch step -> batch (step kind)", kind=3)[:, :-1], x.dtype)
    return acting.action(acting.hidden(x, acting.first(x), mask))


@settings(max_examples=50, deadline=None)
@given(
    cfg=configurations(),
    seed=st.integers(0, 2**16),
    padding=st.lists(st.integers(0, STEPS - 1), min_size=3, max_size=3),
)
def test_the_last_action_is_the_models_prediction(
    cfg: HookedDecisionTransformerConfig, seed: int, padding: list[int]
) -> None:
    model = _model(cfg, seed)
    states, actions, returns = _episode(cfg, 3, STEPS)
    timesteps = torch.randint(0, cfg.max_ep_len, (3, STEPS))
    mask = torch.stack([(torch.arange(STEPS) >= n).long() for n in padding])
    for given_mask in (mask, None):
        with torch.no_grad():
            expected = model(
                states=states, actions=actions[:, :-1], returns_to_go=returns, timesteps=timesteps,
                attention_mask=given_mask,
            ).action_preds[:, -1]  # fmt: skip
        got = _last_action(model, states, actions, returns, timesteps, given_mask)
        torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)
        short = _last_action(model, states, actions[:, :-1], returns, timesteps, given_mask)
        assert torch.equal(short, got)


@settings(max_examples=25, deadline=None)
@given(cfg=configurations(), seed=st.integers(0, 2**16), restart=st.integers(1, 7))
def test_sliding_policy_is_the_model_on_padded_windows(
    cfg: HookedDecisionTransformerConfig, seed: int, restart: int
) -> None:
    """Row 0 restarts at ``restart``; the rows are reordered once; every action is still the model's."""
    model = _model(cfg, seed)
    steps = 9
    states, actions, returns = _episode(cfg, 3, steps)
    begin = [restart, 0, 0]
    order = [0, 1, 2]
    policy = SlidingPolicy(ActingModel(model.weights, cfg), STEPS, 3)
    for t in range(steps):
        if t == restart:
            policy.restart(0)
        if t == 8:
            order = [2, 0]
            policy.keep(order)
        ages = torch.tensor([t - begin[row] if t >= begin[row] else t for row in order])
        previous = actions[order, t - 1] if t else torch.zeros(3, cfg.act_dim).double()
        got = policy.act(states[order, t], returns[order, t], ages, previous)
        for i, row in enumerate(order):
            age = int(ages[i])
            n = min(age + 1, STEPS)
            window = slice(t + 1 - n, t + 1)
            pad = STEPS - n
            padded = [
                torch.nn.functional.pad(a[row : row + 1, window], (0, 0, pad, 0)) for a in (states, actions, returns)
            ]
            times = torch.nn.functional.pad(torch.arange(age + 1 - n, age + 1), (pad, 0))[None]
            mask = (torch.arange(STEPS) >= pad).long()[None]
            with torch.no_grad():
                expected = model(
                    states=padded[0], actions=padded[1][:, :-1], returns_to_go=padded[2], timesteps=times,
                    attention_mask=mask,
                ).action_preds[0, -1]  # fmt: skip
            torch.testing.assert_close(got[i], expected, atol=1e-9, rtol=1e-9)


@settings(max_examples=25, deadline=None)
@given(
    cfg=configurations(),
    seed=st.integers(0, 2**16),
    restart=st.integers(1, 7),
    later=st.integers(0, 1),
    whole=st.booleans(),
)
def test_visible_padding(
    cfg: HookedDecisionTransformerConfig, seed: int, restart: int, later: int, whole: bool
) -> None:
    """Before the first step: states of zero, no action, the first return-to-go, timestep 0, and no mask."""
    model = _model(cfg, seed)
    steps = 9
    states, actions, returns = _episode(cfg, 3, steps)
    begin, order = [restart, 0, 0], [0, 1, 2]
    acting = ActingModel(model.weights, cfg)
    policy: SlidingPolicy | WindowPolicy = SlidingPolicy(acting, STEPS, 3, padding="visible")
    if whole:
        policy = WindowPolicy(model, cfg, STEPS, 3, states, padding="visible")
    taken = torch.nn.functional.pad(actions, (0, cfg.action_padding))
    none = torch.zeros(cfg.n_actions).double()
    if cfg.action_padding:
        none[-1] = 1
    for t in range(steps):
        if t == restart:
            policy.restart(0)
        if t == restart + later:  # before the episode's first action, and before its second
            order = [2, 0]
            policy.keep(order)
        starts = [begin[row] if t >= begin[row] else 0 for row in order]
        ages = torch.tensor([t - start for start in starts])
        previous = actions[order, t - 1] if t else torch.full((3, cfg.act_dim), 7.0).double()
        got = policy.act(states[order, t], returns[order, t], ages, previous)
        for i, (row, start) in enumerate(zip(order, starts, strict=True)):
            times = [j if j >= start else None for j in range(t + 1 - STEPS, t + 1)]
            window = {
                "states": torch.stack([states[row, 0] * 0 if j is None else states[row, j] for j in times]),
                "returns_to_go": torch.stack([returns[row, start if j is None else j] for j in times]),
                "timesteps": torch.tensor([0 if j is None else j - start for j in times]),
                "actions": torch.stack([none if j is None else taken[row, j] for j in times[:-1]]),
            }
            with torch.no_grad():
                expected = model(**{name: x[None] for name, x in window.items()}).action_preds[0, -1]
            torch.testing.assert_close(got[i], expected, atol=1e-9, rtol=1e-9)


def test_a_context_of_one_step_needs_two_positions() -> None:
    cfg = HookedDecisionTransformerConfig(
        4, 2, d_model=8, n_heads=2, d_mlp=12, n_ctx=1, position="learned", n_position=2, action_padding=True
    )
    model = _model(cfg, 0)
    states, _, returns = _episode(cfg, 3, 1)
    with torch.no_grad():
        expected = model(states, torch.zeros(3, 0, 2).double(), returns, torch.zeros(3, 1).long()).action_preds[:, 0]
    zero = torch.zeros(3, dtype=torch.long)
    for policy in (
        SlidingPolicy(ActingModel(model.weights, cfg), 1, 3),
        SlidingPolicy(ActingModel(model.weights, cfg), 1, 3, padding="visible"),
        WindowPolicy(model, cfg, 1, 3, states),
        WindowPolicy(model, cfg, 1, 3, states, padding="visible"),
    ):
        for _ in range(2):
            got = policy.act(states[:, 0], returns[:, 0], zero, torch.ones(3, 2).double())
            torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)


def test_single_precision_at_the_bundled_shape() -> None:
    cfg = HookedDecisionTransformerConfig(11, 3)
    torch.manual_seed(0)
    model = HookedDecisionTransformer(cfg).eval()
    states, actions, returns = (a.float() for a in _episode(cfg, 6, 20))
    timesteps = torch.arange(20).expand(6, 20)
    with torch.no_grad():
        expected = model(states=states, actions=actions, returns_to_go=returns, timesteps=timesteps).action_preds[:, -1]
    got = _last_action(model, states, actions, returns, timesteps)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("gated", [False, True])
def test_acting_shapes_are_the_models(gated: bool) -> None:
    options = {"gated_mlp": True, "action_padding": True} if gated else {}
    cfg = HookedDecisionTransformerConfig(
        4, 2, d_model=8, n_heads=2, d_mlp=12, position="learned", n_position=60, **options
    )
    model = HookedDecisionTransformer(cfg)
    own = {name: tuple(weight.shape) for name, weight in model.weights.items()}
    left_out = {"predict.state.W", "predict.state.b", "predict.return_to_go.W", "predict.return_to_go.b"}
    assert acting_shapes(cfg) == {name: shape for name, shape in own.items() if name not in left_out}


def test_half_precision_acts_in_its_own_type() -> None:
    cfg = HookedDecisionTransformerConfig(4, 2, d_model=8, n_heads=2, d_mlp=12)
    policy = SlidingPolicy(ActingModel(_model(cfg, 0).bfloat16().weights, cfg), 3, 2)
    action = policy.act(torch.randn(2, 4), torch.randn(2, 1), torch.zeros(2, dtype=torch.long), torch.zeros(2, 2))
    assert action.dtype == torch.bfloat16


def test_missing_weight_is_named() -> None:
    cfg = HookedDecisionTransformerConfig(4, 2, d_model=8, n_heads=2, d_mlp=12)
    weights = dict(_model(cfg, 0).weights)
    del weights["blocks.1.mlp.W_in"]
    with pytest.raises(DtLensError, match=r"blocks\.1\.mlp\.W_in"):
        ActingModel(weights, cfg)


def test_window_longer_than_the_position_table() -> None:
    cfg = HookedDecisionTransformerConfig(4, 2, d_model=8, n_heads=2, d_mlp=12, position="learned", n_position=12)
    with pytest.raises(DtLensError, match="29 tokens does not fit this model's 12 positions"):
        SlidingPolicy(ActingModel(_model(cfg, 0).weights, cfg), 10, 2)


def test_acting_needs_no_transformer_library() -> None:
    code = (
        "import sys, dt_lens.decision_transformer.policy, dt_lens.behaviour.agents.running\n"
        "print([m for m in ('transformer_lens', 'transformers', 'pandas', 'minari', 'plotly') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
