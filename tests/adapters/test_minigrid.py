"""MiniGrid decision transformers: TransformerLens's blocks between embeddings without biases, padding that is seen."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from torch import Tensor, nn

import dt_lens
from dt_lens import SingularEdit, WeightSVD
from dt_lens.behaviour.agents.environment import make_environment
from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.decision_transformer.environment_labels import environment_labels
from dt_lens.errors import DtLensError
from dt_lens.lens.matrices import catalogue
from dt_lens_adapters.minigrid import COLOURS, OBJECTS, MiniGridLayout, view_factors, view_labels
from originals.minigrid import ACTIONS, CHANNELS, MLP, SIDE, Agent, D, agent, config, save

ENVIRONMENTS = "dt_lens_adapters.minigrid_environments"


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("n_ctx", [2, 5, 11])
def test_a_file_loads_to_the_same_outputs(gated: bool, normed: bool, n_ctx: int, tmp_path: Path) -> None:
    made = agent(gated, normed, n_ctx).double()
    lens = dt_lens.load(save(made, tmp_path / "agent.pt"), check=False)
    context = (n_ctx + 1) // 3
    assert lens.cfg.n_ctx == lens.facts.context == context and lens.cfg.n_position == n_ctx
    assert lens.cfg.gated_mlp == gated and (lens.cfg.normalization == "pre") == normed == lens.cfg.final_ln
    for steps, acted in ((context, context - 1), (context - 1, context - 1)):
        if not steps:
            continue
        images, returns = torch.randn(4, steps, SIDE, SIDE, CHANNELS).double(), torch.randn(4, steps, 1).double()
        ids, times = torch.randint(ACTIONS + 1, (4, acted)), torch.randint(21, (4, steps))
        with torch.no_grad():
            mine = lens(images.permute(0, 1, 4, 2, 3).flatten(2), ids, returns, times)
            theirs = made(images, ids[..., None] if acted else None, returns, times[..., None])
        for name, expected in zip(("state_preds", "action_preds", "return_preds"), theirs, strict=True):
            got = getattr(mine, name)
            if name != "action_preds":
                expected = got[:, :0] if expected is None else expected[:, :acted]
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    certificate = dt_lens.certify(lens, seed=3)
    assert certificate.against == "the original model" and set(catalogue(lens)) <= set(certificate.errors)
    dt_lens.certify(lens.float(), seed=4)


def test_a_bare_state_dict_says_all_but_where_it_acts(tmp_path: Path) -> None:
    made = agent(gated=True)
    old = {"state_embedding": "state_encoder", "_predictor": "s"}
    tensors = {}
    for key, tensor in made.state_dict().items():
        for head in ("action", "state", "reward"):
            key = key.replace(f"{head}_predictor", f"predict_{head}s")
        tensors[key.replace("state_embedding", old["state_embedding"])] = tensor
    torch.save(tensors, tmp_path / "agent.pt")
    lens = dt_lens.load(tmp_path / "agent.pt")
    assert lens.facts.environment is None and lens.facts.padding == "visible" and lens.cfg.act_fn == "relu"
    assert lens.embeddings["action_in"].labels == ["left", "right", "forward", "padding"]
    assert lens.embeddings["state_in"].labels[:4] == [
        f"object at ({x}, {y})" for x, y in ((0, 0), (0, 1), (0, 2), (1, 0))
    ]
    assert lens.embeddings["state_out"].labels[-1] == "state at (2, 2)" and not lens.embeddings["state_out"].trained
    with pytest.raises(DtLensError, match="does not say which environment"):
        dt_lens.evaluate(lens, episodes=1)
    assert (
        dt_lens.load(tmp_path / "agent.pt", act_fn="gelu", context=2, environment="E-v0", check=False).facts.context
        == 2
    )
    del tensors["predict_states.weight"], tensors["predict_states.bias"]
    torch.save(tensors, tmp_path / "agent.pt")
    assert "state_out" not in dt_lens.load(tmp_path / "agent.pt", check=False).embeddings


def test_what_the_file_says_of_its_run(tmp_path: Path) -> None:
    made = agent()
    world = {"env_id": "MiniGrid-Empty-5x5-v0", "one_hot_obs": True, "view_size": 3, "max_steps": 1000, "seed": 1}
    run = {"trajectory_path": "here.gz", "initial_rtg": ["0", "1", "-1"], "eval_max_time_steps": 70, "anything": 1}
    facts = dt_lens.load(save(made, tmp_path / "a.pt", environment_config=world, offline_config=run), check=False).facts
    assert facts.environment == "dt_lens_adapters.minigrid_environments:Flat/MiniGrid-Empty-5x5-v0"
    assert facts.environment_kwargs == {"one_hot": True, "view_size": 3, "max_steps": 70}
    assert facts.target_returns == (1.0, 0.0, -1.0) and facts.about == {"trajectories": "here.gz"}
    # What is given counts more, and the options of another environment are not this one's.
    other = dt_lens.load(tmp_path / "a.pt", environment="CartPole-v1", target_returns=[5], check=False).facts
    assert (other.environment, other.environment_kwargs, other.target_returns) == ("CartPole-v1", {}, (5.0,))


@pytest.mark.parametrize(
    ("beside", "given", "message"),
    [
        ({"model_config": config(agent(), n_heads=4)}, {}, r"says n_heads=4 and its tensors 2; .* not belong together"),
        ({"model_config": config(agent(), gated_mlp=True)}, {}, "says gated_mlp=True and its tensors False"),
        ({"model_config": config(agent(), layer_norm="LN")}, {}, "says layer_norm=True and its tensors False"),
        ({"model_config": config(agent(), layer_norm="LNPre")}, {}, "layer_norm='LNPre'; dt-lens reads 'LN' and none"),
        ({"model_config": config(agent(), layer_norm=[1])}, {}, r"layer_norm=\[1\]"),
        ({"model_config": config(agent(), activation_fn="solu")}, {}, "activation_fn='solu'; dt-lens knows relu"),
        ({"model_config": config(agent(), activation_fn=["relu"])}, {}, "activation_fn="),
        ({"model_config": config(agent(), time_embedding_type="linear")}, {}, "time_embedding_type='linear', which"),
        ({"model_config": config(agent(), state_embedding_type="CNN")}, {}, "state_embedding_type='CNN', which"),
        ({"model_config": config(agent(), rotary=1)}, {}, r"a field 'rotary' .* pass ignore_options=\['rotary'\]"),
        ({"environment_config": {"one_hot": True}}, {}, r"environment_config has a field 'one_hot' .* 'one_hot_obs'\?"),
        ({"model_config": "{"}, {}, "model_config is not JSON"),
        ({"model_config": "[1]"}, {}, "model_config holds a list"),
        ({"offline_config": {"initial_rtg": ["high"]}}, {}, r"initial_rtg=\['high'\], which are not numbers"),
        ({}, {"n_heads": 2}, "Unknown option 'n_heads'"),
        ({}, {"context": 5}, "context=5 does not fit this checkpoint, whose 11 positions hold 4 steps"),
        ({}, {"act_fn": "rely"}, r"act_fn is 'rely'; .* mean 'relu'\?"),
        ({}, {"padding": "none"}, "padding is 'none'; it must be 'mask' or 'visible'"),
    ],
)
def test_fields_that_do_not_fit(beside: dict[str, Any], given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DtLensError, match=message):
        dt_lens.load(save(agent(), tmp_path / "agent.pt", **beside), **given)


def test_a_field_that_does_nothing_can_be_ignored(tmp_path: Path) -> None:
    made = agent()
    save(made, tmp_path / "agent.pt", model_config=config(made, note="x"))
    assert dt_lens.load(tmp_path / "agent.pt", ignore_options=["note"], check=False).cfg.n_layers == 2


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("transformer.blocks.1.attn.b_O", None, r"no tensor 'transformer\.blocks\.1\.attn\.b_O'"),
        ("transformer.blocks.0.mlp.W_gate", None, r"no tensor 'transformer\.blocks\.0\.mlp\.W_gate'"),
        ("transformer.blocks.1.mlp.W_gate", None, r"no tensor 'transformer\.blocks\.1\.mlp\.W_gate'"),
        ("state_embedding.weight", None, r"no tensor 'state_embedding\.weight'"),
        ("state_predictor.bias", None, r"no tensor 'state_predictor\.bias'"),
        ("action_predictor.weight", lambda t: t.T, r"'action_predictor\.weight' has shape"),
        ("transformer.blocks.0.mlp.W_in", lambda t: t.T, "d_mlp=12 and its tensors 8"),
        ("transformer.blocks.1.mlp.W_out", lambda t: t.T, r"W_out' has shape \[8, 12\]; \[12, 8\] was expected"),
        ("transformer.blocks.0.attn.W_Q", lambda t: t[0], r"W_Q' has shape"),
        ("transformer.pos_embed.W_pos", lambda t: t[0], r"W_pos' has shape"),
        ("action_embedding.0.weight", lambda t: t[:1], "has 1 row"),
        ("time_embedding.bias", lambda t: torch.zeros(D), "linear time embedding"),
        ("transformer.blocks.0.mlp.b_gate", lambda t: torch.zeros(12), r"'transformer\.blocks\.0\.mlp\.b_gate' that"),
        ("transformer.blocks.7.ln1.w", lambda t: torch.zeros(D), "of block 7 but not of block 2"),
        ("transformer.unembed.W_U", lambda t: torch.zeros(D, D), r"'transformer\.unembed\.W_U' that .* no place for"),
        ("transformer.blocks.0.mlp.W_gate", lambda t: t / 0, r"W_gate' in .* holds NaN or infinite"),
        ("transformer.blocks.0.mlp.W_in", lambda t: t.long(), "holds int64 numbers"),
        ("transformer.blocks.0.mlp.W_in", lambda t: t.double(), "convert the model to one type"),
    ],
)
def test_damaged_files(key: str, change: Callable[[Any], Any] | None, message: str, tmp_path: Path) -> None:
    made = agent(gated=True)
    tensors = dict(made.state_dict())
    if change is None:
        del tensors[key]
    else:
        tensors[key] = change(tensors.get(key)).contiguous()
    with pytest.raises(DtLensError, match=message):
        dt_lens.load(save(made, tmp_path / "agent.pt", tensors))


@pytest.mark.parametrize("name", ["W_in", "W_gate", "W_out"])
def test_a_transposed_square_does_not_pass(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = agent(gated=True, d_mlp=D)
    file = save(made, tmp_path / "agent.pt", model_config=config(made, d_mlp=D))
    rightly = MiniGridLayout.canonical

    def wrongly(self: Any, tensors: Any) -> dict[str, Tensor]:
        weights = rightly(self, tensors)
        return {**weights, f"blocks.1.mlp.{name}": weights[f"blocks.1.mlp.{name}"].T}

    dt_lens.load(file)
    monkeypatch.setattr(MiniGridLayout, "canonical", wrongly)
    with pytest.raises(DtLensError, match=rf"blocks\.1\.mlp\.{name} .* it looks transposed"):
        dt_lens.load(file)


@pytest.mark.parametrize("n_ctx", [2, 11])
def test_a_live_model_shares_its_memory(n_ctx: int) -> None:
    made = agent(gated=True, normed=True, n_ctx=n_ctx)
    lens = dt_lens.wrap(made, check=False)
    assert lens.original is made
    images, returns, times = torch.randn(2, 1, SIDE, SIDE, CHANNELS), torch.randn(2, 1, 1), torch.tensor([[[3]], [[4]]])

    def run() -> Tensor:
        with torch.no_grad():
            prediction: Tensor = made(
                images.to(made.action_predictor.weight), None, returns.to(made.action_predictor.weight), times
            )[1]
        return prediction

    before = run()
    for matrix in ("blocks.0.mlp.W_gate", "blocks.1.attn.W_V", "blocks.1.attn.OV.1"):
        with SingularEdit(lens, matrix, side="read"):
            assert not torch.allclose(run(), before, atol=1e-6), matrix
        assert torch.equal(run(), before)
    lens.to(torch.float64)
    assert made.state_embedding.weight.dtype == torch.float64
    dt_lens.certify(lens)
    lens.require_shared(list(lens.weights))


def test_a_live_model_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = agent()
    monkeypatch.setattr(MLP, "forward", lambda self, x: torch.tanh(x @ self.W_in + self.b_in) @ self.W_out + self.b_out)
    with pytest.raises(DtLensError, match=r"certify: .* does not reproduce its activation in the original model"):
        dt_lens.wrap(made)
    monkeypatch.setattr(Agent, "forward", nn.Module.forward)
    assert dt_lens.wrap(made).original is made  # it holds weights and computes nothing


def test_the_view_is_labelled_as_it_lies() -> None:
    """At the fixed start the agent stands at (3, 6) of its view, and what it must remember is on its left."""
    env = gym.make(f"{ENVIRONMENTS}:Flat/MiniGrid-MemoryS7FixedStart-v0", one_hot=True)
    labels, seen = view_labels(980), set()
    assert labels is not None and len(labels) == len(set(labels)) == 980 == env.observation_space.shape[0]
    for seed in range(6):
        view, _ = env.reset(seed=seed)
        bare: Any = env.unwrapped
        assert tuple(bare.agent_pos) == (1, 3) and bare.agent_dir == 0 and bare.max_steps == 50
        there = [label for label, bit in zip(labels, view, strict=True) if bit and label.endswith("at (2, 6)")]
        remembered = bare.grid.get(1, 2).type
        assert there == [f"{remembered} at (2, 6)", "green at (2, 6)", "open at (2, 6)"]
        seen.add(remembered)
        image = bare.gen_obs()["image"]
        for x, y in ((3, 6), (3, 4), (4, 6), (0, 0), (6, 2)):
            assert view[labels.index(f"{OBJECTS[image[x, y, 0]]} at ({x}, {y})")] == 1
            assert view[labels.index(f"{COLOURS[image[x, y, 1]]} at ({x}, {y})")] == 1
    assert seen == {"key", "ball"}


def test_an_environment_brings_its_actions_and_its_own_time_limit() -> None:
    cfg = HookedDecisionTransformerConfig(147, 3, d_model=8, n_layers=1, discrete_actions=True, action_tanh=False)
    name = f"{ENVIRONMENTS}:Flat/MiniGrid-Dynamic-Obstacles-8x8-v0"
    assert environment_labels(name) == (None, ("left", "right", "forward"))
    assert [
        make_environment(name, {}, cfg).time_limit,
        make_environment(name, {"max_steps": 9}, cfg, 50).time_limit,
    ] == [256, 9]
    whole: Any = gym.make(f"{ENVIRONMENTS}:Flat/MiniGrid-Empty-5x5-v0", fully_observed=True, max_steps=4)
    assert whole.reset(seed=0)[0].shape == (75,)
    assert gym.make(f"{ENVIRONMENTS}:Flat/MiniGrid-Empty-5x5-v0", view_size=3).reset(seed=0)[0].shape == (27,)


def test_without_minigrid_a_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save(agent(), tmp_path / "agent.pt", environment_config={"env_id": "MiniGrid-Empty-5x5-v0", "view_size": 3})
    monkeypatch.setitem(sys.modules, "minigrid.envs", None)
    monkeypatch.delitem(sys.modules, ENVIRONMENTS, raising=False)
    lens = dt_lens.load(file, check=False)
    with pytest.raises(
        DtLensError, match=r"needs the package minigrid, which pip install 'dt-lens\[minigrid\]' brings\.$"
    ):
        dt_lens.evaluate(lens, target_return=1, episodes=1)


def test_the_agent_sees_its_padding_hooked_or_not(tmp_path: Path) -> None:
    world = {"env_id": "MiniGrid-Dynamic-Obstacles-5x5-v0", "view_size": 3}
    made = agent(gated=True, normed=True)
    file = save(made, tmp_path / "a.pt", environment_config=world, offline_config={"initial_rtg": [1]})
    lens = dt_lens.load(file, check=False)
    options: dict[str, Any] = {"episodes": 8, "max_steps": 12, "environment_kwargs": {"view_size": 3}, "workers": 1}
    lean = [outcome(lens, seed, **options) for seed in (0, 50)]
    with lens.hooks(fwd_hooks=[("hook_embed", lambda x, hook: x)]):
        assert [outcome(lens, seed, **options) for seed in (0, 50)] == lean
    lens.facts = replace(lens.facts, padding="mask")
    assert [outcome(lens, seed, **options) for seed in (0, 50)] != lean


def outcome(lens: Any, seed: int, **options: Any) -> list[tuple[Any, ...]]:
    frame = dt_lens.evaluate(lens, seed=seed, **options).to_frame()
    return list(frame.itertuples(index=False, name=None))


MEMORY, OBSTACLES, CONTROL = (
    "minigrid-memory/MemoryGatedMLP.pt",
    "minigrid-dynamic-obstacles/ReproduceOriginalPostShort.pt",
    "minigrid-memory-uncalibrated/DevModelNotCalibrated.pt",
)
# What was measured by another loader: the mean return of 40 episodes, seeds 0 to 39.
MEASURED = [
    (MEMORY, 1, 0.892), (MEMORY, 0, 0.0),
    (OBSTACLES, 1, 0.712), (OBSTACLES, 0, -0.254), (OBSTACLES, -1, -1.0),
    (CONTROL, 1, 0.437), (CONTROL, 0, 0.437),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (MEMORY, (2, 4, 980, 7, 26, 9, True, "pre")),
        (OBSTACLES, (1, 2, 147, 3, 2, 1, False, "none")),
        (CONTROL, (3, 4, 980, 7, 26, 9, False, "none")),
    ],
)
def test_real_agents(real_checkpoints: Callable[[str], Path], name: str, expected: tuple[Any, ...]) -> None:
    lens = dt_lens.load(real_checkpoints(name), check=False)
    cfg = lens.cfg
    assert expected == (
        cfg.n_layers, cfg.n_heads, cfg.state_dim, cfg.act_dim, cfg.n_position, cfg.n_ctx, cfg.gated_mlp,
        cfg.normalization,
    )  # fmt: skip
    certificate = dt_lens.certify(lens, seed=1)
    assert set(catalogue(lens)) <= set(certificate.errors) and certificate.worst < 2e-5
    table = WeightSVD(lens, rank=4).scan(matrices=["*.W_in", "*.W_gate"] if cfg.gated_mlp else ["*.W_in"])
    assert set(table["matrix"]) == {name for name in catalogue(lens) if name.endswith(("W_in", "W_gate"))}
    options: dict[str, Any] = {"episodes": 8, "max_steps": 30, "workers": 1}
    before = dt_lens.evaluate(lens, **options)
    for matrix in ("blocks.0.mlp.W_in", "blocks.0.mlp.W_gate")[: 1 + cfg.gated_mlp]:
        with SingularEdit(lens, matrix, sv=0, value="flip"):
            assert dt_lens.evaluate(lens, **options).model_id != before.model_id
    after = dt_lens.evaluate(lens, **options)
    assert after.model_id == before.model_id and after.to_frame().equals(before.to_frame())


def test_the_memory_agent_remembers(real_checkpoints: Callable[[str], Path]) -> None:
    lens = dt_lens.load(real_checkpoints(MEMORY), check=False)
    assert lens.facts.target_returns == (1.0, 0.0)
    run = {"episodes": 8, "workers": 1}
    assert dt_lens.evaluate(lens, **run).to_frame()["return"].tolist() == pytest.approx([0.892] * 8)
    assert dt_lens.evaluate(lens, target_return=0, **run).to_frame()["return"].tolist() == [0.0] * 8


@pytest.mark.acceptance(minutes=2)
@pytest.mark.parametrize(("name", "target", "measured"), MEASURED)
def test_real_agents_reach_what_was_measured(
    real_checkpoints: Callable[[str], Path], name: str, target: float, measured: float
) -> None:
    workers = 2 if target == 1 else 1  # that their number changes nothing is tested with the small agents
    lens = dt_lens.load(real_checkpoints(name), check=False)
    options = {**lens.facts.environment_kwargs, "max_steps": 200 if name == OBSTACLES else 50}
    found = dt_lens.evaluate(
        lens, episodes=40, seed=0, target_return=target, environment_kwargs=options, workers=workers
    )
    assert found.to_frame()["return"].mean() == pytest.approx(measured, abs=0.0006)


def test_one_hot_views_have_factors() -> None:
    """Each number's label is its object, colour or state, and its cell; whole numbers are no levels."""
    labels, factors = view_labels(3 * 3 * 20), view_factors(3 * 3 * 20)
    assert labels is not None and factors is not None and list(factors) == ["object", "colour", "state", "cell"]
    for number, label in enumerate(labels):
        named = [factors[kind][number] for kind in ("object", "colour", "state") if factors[kind][number] is not None]
        assert label == f"{named[0]} at {factors['cell'][number]}" and len(named) == 1
    assert view_factors(3 * 3 * 3) is None and view_factors(10) is None
