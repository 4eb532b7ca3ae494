"""An agent's activations are those of the windows that it saw in the episodes that ``evaluate`` runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dt_lens import DtLensError, SingularEdit, collect_activations, evaluate
from dt_lens.behaviour.agents import windows as windows_module
from dt_lens.behaviour.agents.task import AgentTask
from dt_lens.behaviour.collect_activations import kept_activations
from dt_lens.lens.activations import Activations

Make = Callable[..., Any]


def watched(model: Any, **options: Any) -> list[tuple[dict[str, Tensor], Any]]:
    """Every window that the full model is shown while it plays, one episode after the other, with its activations."""
    seen: list[tuple[dict[str, Tensor], Any]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Tensor]) -> None:
        seen.append(({name: x.clone() for name, x in kwargs.items()}, None))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)  # a hooked model runs as a whole
    try:
        evaluate(model, episodes=options.pop("episodes"), workers=1, **options)
    finally:
        handle.remove()
    return seen


@pytest.mark.parametrize(
    ("environment", "options"),
    [
        ("CartPole-v1", {}),
        ("Pendulum-v1", {"position": "learned", "n_position": 11}),
        ("CartPole-v1", {"normalization": "post"}),
    ],
)
@pytest.mark.parametrize("padding", ["mask", "visible"])
def test_the_windows_are_those_that_the_agent_saw(
    make_model: Make, environment: str, options: dict[str, Any], padding: str
) -> None:
    from dataclasses import replace

    discrete = {"action_padding": padding == "visible"} if environment.startswith("CartPole") else {}
    model = make_model(environment, **options, **discrete).double()
    model.facts = replace(model.facts, padding=padding)
    settings: dict[str, Any] = {"episodes": 8, "seed": 3, "max_steps": 12}
    acts = collect_activations(model, **settings)
    lengths = [int(n) for n in evaluate(model, workers=1, **settings).to_frame()["length"]]
    assert acts.record["steps"] == sum(lengths)
    assert acts.record["episodes"] == 8
    assert acts.record["seed"] == 3
    assert acts.record["environment"] == environment
    # The naive way: all windows kept, all activations at once. In double precision both act the same.
    shown = watched(model, **settings)
    rows: dict[str, list[Tensor]] = {}
    for step, (batch, _) in enumerate(shown):
        running = [i for i, n in enumerate(lengths) if n > step]
        batch = {name: x[running] for name, x in batch.items()}
        with torch.no_grad():
            cache = model.run_with_cache(**batch)[1]
        real = batch["attention_mask"].bool().repeat_interleave(3, 1)[:, :11]
        assert padding == "mask" or bool(real.all())
        for name in ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre", "blocks.0.mlp.hook_post"):
            rows.setdefault(name, []).append(cache[name][:, :11][real])
        # In the last block only the last state's token is read.
        for name in ("blocks.1.mlp.hook_post", "blocks.1.hook_resid_mid", "blocks.1.hook_resid_post"):
            rows.setdefault(name, []).append(cache[name][:, 10])
    for name, parts in rows.items():
        x = torch.cat(parts)
        layer = name.split(".")[1]
        moments = acts.stream[name] if name in acts.stream else acts.inputs[f"blocks.{layer}.mlp.W_out"]
        assert moments.count == len(x)
        torch.testing.assert_close(moments.mean, x.mean(0), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(moments.second, x.T @ x / len(x), rtol=1e-6, atol=1e-8)
    last = {kind: acts.inputs[f"blocks.1.attn.{kind}"].count for kind in ("W_Q", "W_K", "W_V", "W_O", "OV.0", "QK.1")}
    assert {last[kind] for kind in ("W_Q", "W_O", "OV.0", "QK.1")} == {sum(lengths)}
    assert last["W_K"] == last["W_V"] == acts.stream["blocks.0.hook_resid_pre"].count == acts.record["tokens"]


def test_tokens_that_cannot_reach_the_action_do_not_count(make_model: Make) -> None:
    """Replacing the activations of tokens that do not count leaves the action unchanged."""
    model = make_model("CartPole-v1").double()
    batch = {name: x for name, x in model.probe().items() if name != "attention_mask"}
    last = 3 * batch["states"].shape[1] - 2

    def elsewhere(x: Tensor, hook: Any) -> Tensor:
        changed = torch.randn_like(x)
        changed[:, last] = x[:, last]
        return changed

    with torch.no_grad():
        plain = model(**batch).action_preds[:, -1]
        for name in ("attn.hook_q", "attn.hook_z", "hook_resid_mid", "mlp.hook_post"):
            with model.hooks(fwd_hooks=[(f"blocks.1.{name}", elsewhere)]):
                torch.testing.assert_close(model(**batch).action_preds[:, -1], plain)
        with model.hooks(fwd_hooks=[("blocks.1.attn.hook_k", elsewhere)]):
            assert not torch.allclose(model(**batch).action_preds[:, -1], plain)


def test_the_same_seed_gives_the_same_bits_with_an_edit_in_force(make_model: Make) -> None:
    model = make_model("Pendulum-v1")
    options: dict[str, Any] = {"episodes": 3, "seed": 1, "max_steps": 10}
    first = collect_activations(model, **options)
    assert collect_activations(model, **options).digest == first.digest
    assert collect_activations(model, episodes=3, seed=2, max_steps=10).digest != first.digest
    edit = SingularEdit(model, "blocks.0.mlp.W_in", value="zero")
    model.train()
    with edit:
        again = collect_activations(model, **options)
        assert edit.active
    assert model.training
    assert (again.digest, again.record) == (first.digest, first.record)


def test_ctrl_c_leaves_the_model_as_it_was(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("Pendulum-v1")
    calls = []

    class Stopping(windows_module.WindowPolicy):
        def act(self, *args: Any) -> Any:
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return super().act(*args)

    monkeypatch.setattr("dt_lens.behaviour.agents.played.WindowPolicy", Stopping)
    edit = SingularEdit(model, "blocks.0.mlp.W_in", value="zero")
    with edit:
        before = {name: weight.clone() for name, weight in model.weights.items()}
        with pytest.raises(KeyboardInterrupt):
            collect_activations(model, episodes=2, max_steps=10)
        assert all(torch.equal(weight, before[name]) for name, weight in model.weights.items())
        assert edit.active
    assert not any(point.has_hooks() for point in model.hook_dict.values())


def test_kept_activations_are_collected_again_in_another_setting(make_model: Make, tmp_path: Path) -> None:
    """Another time limit, seed or environment gives other inputs; what an older file lacks is not compared."""
    model, file = make_model("CartPole-v1"), tmp_path / "kept.safetensors"

    def kept(max_steps: int = 4, seed: int = 0, kwargs: dict[str, Any] | None = None) -> str:
        task = AgentTask.of(model, environment_kwargs=kwargs, max_steps=max_steps)
        return kept_activations(model, file, task, seed).digest

    first = kept()
    written = file.stat().st_mtime_ns
    assert kept() == first
    assert file.stat().st_mtime_ns == written
    for change in ({"max_steps": 6}, {"seed": 5}, {"kwargs": {"sutton_barto_reward": True}}):
        kept()
        was = file.stat().st_mtime_ns
        kept(**change)
        assert file.stat().st_mtime_ns != was, change
    kept()
    older = Activations.load(file)
    silent = {name: value for name, value in older.record.items() if name not in ("time_limit", "seed")}
    dataclasses.replace(older, record=silent).save(file)
    written = file.stat().st_mtime_ns
    assert kept(max_steps=6, seed=5) == first
    assert file.stat().st_mtime_ns == written


def test_progress_and_bad_settings(make_model: Make) -> None:
    model, calls = make_model("CartPole-v1"), []
    collect_activations(model, episodes=1, max_steps=5, progress=lambda what, share: calls.append((what, share)))
    assert {what for what, _ in calls} == {"running episodes", "running windows"}
    shares = [share for _, share in calls]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    for options in ({"episodes": 0}, {"episodes": 2**63}, {"seed": -1}, {"max_steps": 0}, {"episodes": 1.5}):
        with pytest.raises(DtLensError, match="must be a whole number"):
            collect_activations(model, **options)  # type: ignore[arg-type]
    with pytest.raises(DtLensError, match="gives states of"):
        collect_activations(model, environment="Pendulum-v1")
