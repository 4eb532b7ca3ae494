"""``evaluate``: its arguments, its errors, and that the same call always gives the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import dt_lens
from dt_lens.behaviour.agents.identity import model_id
from dt_lens.behaviour.evaluate import evaluate
from dt_lens.errors import DtLensError

Make = Callable[..., Any]


def test_the_same_bits_whatever_the_workers_and_the_number_of_episodes(make_model: Make) -> None:
    model = make_model("Hopper-v5", d_model=64, n_heads=1)
    alone = evaluate(model, episodes=13, workers=1, max_steps=60).to_frame()
    together = evaluate(model, episodes=13, workers=2, max_steps=60).to_frame()
    more = evaluate(model, episodes=30, workers=2, lanes=9, max_steps=60).to_frame()
    fewer = evaluate(model, episodes=5, workers=1, max_steps=60).to_frame()
    later = evaluate(model, episodes=8, seed=5, workers=1, max_steps=60).to_frame()
    assert together.equals(alone)
    assert more.head(13).equals(alone)
    assert fewer.equals(alone.head(5))
    assert later.equals(alone.tail(8).reset_index(drop=True))
    assert alone["terminated"].any()  # some were replaced, so that rows and ages mixed


def test_environment_and_target_come_from_the_models_facts(make_model: Make) -> None:
    model = make_model("CartPole-v1")
    result = evaluate(model, episodes=9, workers=1)
    assert result.environment == "CartPole-v1"
    assert result.target_return == 200.0
    assert result.seeds.tolist() == list(range(9))
    assert result.time_limit == 500
    assert evaluate(model, target_return=7, episodes=1, workers=1).target_return == 7.0
    assert list(result.to_frame()) == ["seed", "return", "length", "terminated", "truncated"]


def test_the_facts_kwargs_go_with_the_facts_environment(make_model: Make) -> None:
    model = make_model("Hopper-v5", spread=1.0)
    model.facts = replace(model.facts, environment_kwargs={"terminate_when_unhealthy": False})
    assert not evaluate(model, episodes=3, workers=1, max_steps=60).terminated.any()
    assert evaluate(model, "Hopper-v4", episodes=3, workers=1, max_steps=60).terminated.any()
    assert evaluate(model, environment_kwargs={}, episodes=3, workers=1, max_steps=60).terminated.any()
    assert list(evaluate(model, episodes=1, workers=1, max_steps=5).to_frame())[-1] == "score"


def test_what_counts_as_failing_is_a_fact_an_argument_or_a_guess(make_model: Make) -> None:
    model = make_model("CartPole-v1")
    options = {"episodes": 3, "workers": 1, "max_steps": 4}  # the pole still stands: every episode is cut
    guessed, before = evaluate(model, **options), model_id(model)
    assert (guessed.failed.sum(), guessed.failure_guessed) == (0, True)
    for said in (str(guessed), str(guessed.compare(guessed))):
        rule, note = said[said.index("failed (") :].splitlines()[:2]
        assert "a guess" in note and "--failure" in note and "ended before" in rule
    model.facts = replace(model.facts, failure="truncated")
    known = evaluate(model, **options)
    assert (known.failed.sum(), known.failure_guessed) == (3, False) and "a guess" not in str(known)
    assert model_id(model) == before  # it says how episodes are judged, not what the agent does
    assert evaluate(model, failure="terminated", **options).failed.sum() == 0
    assert type(known).from_dict(known.to_dict()).failure_guessed is False
    assert type(known).from_dict(guessed.to_dict()).failure_guessed is True


def test_a_limit_may_be_numpys(make_model: Make) -> None:
    model = make_model("Pendulum-v1")
    assert evaluate(model, episodes=1, workers=1, max_steps=np.int64(5)).lengths.tolist() == [5]


@pytest.mark.parametrize(
    ("arguments", "facts", "sentence"),
    [
        ({}, {"environment": None}, "give evaluate an environment"),
        ({}, {"target_returns": ()}, "give evaluate a target_return"),
        ({"episodes": 0}, {}, "episodes is 0"),
        ({"seed": -1}, {}, "seed is -1"),
        ({"seed": 2**63 - 3}, {}, "below 2..63, so give a smaller one"),
        (
            {"episodes": 2**63},
            {},
            "episodes is 9223372036854775808; it must be a whole number of at least 1 and at most",
        ),
        ({"workers": 0}, {}, "workers is 0"),
        ({"lanes": 4}, {}, "lanes is 4"),
        ({"max_steps": 2.5}, {}, "max_steps is 2.5"),
        ({"target_return": "high"}, {}, "target_return is 'high'"),
        ({"environment": 3}, {}, "environment is 3; it must be"),
        ({"target_return": float("nan")}, {}, "target_return is nan"),
        ({"target_return": 10**400}, {}, "target_return is 1000"),
        ({"environment": "Hopper-v5"}, {}, "gives states of 11 numbers and this model reads 4"),
        ({"failure": "fell"}, {}, "failure is 'fell'"),
        ({"failure": float("nan")}, {}, "failure is nan; it must be"),
        ({"failure": 10**400}, {}, "failure is 1000"),
    ],
)
def test_bad_input_is_one_sentence(
    make_model: Make, arguments: dict[str, Any], facts: dict[str, Any], sentence: str
) -> None:
    model = make_model("CartPole-v1")
    model.facts = replace(model.facts, **facts)
    with pytest.raises(DtLensError, match=sentence) as caught:
        evaluate(model, **({"episodes": 8, "workers": 1, "max_steps": 3} | arguments))
    assert "\n" not in str(caught.value)


def test_another_kind_of_model_must_be_wrapped() -> None:
    with pytest.raises(DtLensError, match=r"evaluate takes a wrapped model, not a Linear; call dt_lens.wrap"):
        evaluate(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


def test_only_an_agent_has_a_model_id() -> None:
    with pytest.raises(DtLensError, match=r"takes a decision transformer .*, not a language model; "):
        model_id(dt_lens.load("tiny-gpt2", check=False))


def test_weights_that_are_not_finite_are_refused_in_workers_too(make_model: Make) -> None:
    model = make_model("CartPole-v1")
    model.weights["blocks.0.mlp.W_in"][0, 0] = float("nan")
    for workers in (1, 2):
        with pytest.raises(DtLensError, match="not finite"):
            evaluate(model, episodes=20, workers=workers)


def test_hooks_act(make_model: Make) -> None:
    model = make_model("Pendulum-v1").train()
    plain = evaluate(model, episodes=4, workers=1, max_steps=15)

    def zero(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.zeros_like(x)

    def same(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return x

    with model.hooks([("blocks.1.hook_mlp_out", same)]):
        np.testing.assert_allclose(evaluate(model, episodes=4, max_steps=15).returns, plain.returns, atol=1e-3)
    with model.hooks([("blocks.1.hook_mlp_out", zero)]):
        hooked = evaluate(model, episodes=4, max_steps=15)
        again = evaluate(model, episodes=12, max_steps=15)
    assert model.training  # left as it was found
    assert not np.allclose(hooked.returns, plain.returns, atol=1e-3)
    assert again.returns[:4].tolist() == hooked.returns.tolist()
    model.weights["blocks.1.mlp.W_out"].zero_()
    model.weights["blocks.1.mlp.b_out"].zero_()
    np.testing.assert_allclose(evaluate(model, episodes=4, max_steps=15).returns, hooked.returns, atol=1e-3)


def test_a_model_with_its_own_state_encoder_acts(make_model: Make) -> None:
    from dt_lens.decision_transformer.model import HookedDecisionTransformer

    model = make_model("Pendulum-v1")
    linear = model.embed["state"]
    own = HookedDecisionTransformer(model.cfg, torch.nn.Sequential(torch.nn.Linear(3, 16)))
    own.facts = model.facts
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            if not name.startswith("embed.state."):
                parameter.copy_(model.get_parameter(name))
        own.embed["state"][0].weight.copy_(linear.W.T)
        own.embed["state"][0].bias.copy_(linear.b)
    expected = evaluate(model, episodes=3, max_steps=15, workers=1).returns
    np.testing.assert_allclose(evaluate(own, episodes=3, max_steps=15).returns, expected, atol=1e-3)


def test_edits_in_place_act_and_change_the_id(make_model: Make) -> None:
    model = make_model("Pendulum-v1")
    before = evaluate(model, episodes=2, max_steps=9, workers=1)
    model.weights["blocks.0.mlp.W_in"].mul_(-1)
    edited = evaluate(model, episodes=2, max_steps=9, workers=1)
    assert (edited.returns != before.returns).all()
    assert edited.model_id != before.model_id
    model.weights["blocks.0.mlp.W_in"].mul_(-1)
    assert evaluate(model, episodes=2, max_steps=9, workers=1).to_dict() == before.to_dict()
    facts = model.facts
    model.facts = replace(facts, return_scale=2.0)
    assert model_id(model) != before.model_id


def test_the_last_row_of_the_timestep_table_is_used_and_repeated(make_model: Make) -> None:
    model = make_model("Pendulum-v1", max_ep_len=6)

    def returns(steps: int) -> list[float]:
        found: list[float] = evaluate(model, episodes=2, workers=1, max_steps=steps).returns.tolist()
        return found

    before = {steps: returns(steps) for steps in (5, 6, 9)}
    model.weights["embed.timestep.W"][-1] += 3.0
    after = {steps: returns(steps) for steps in (5, 6, 9)}
    assert after[5] == before[5]
    assert not set(after[6]) & set(before[6])
    assert not set(after[9]) & set(before[9])


def test_active_edits_are_recorded(make_model: Make) -> None:
    class Edit:
        def to_dict(self) -> dict[str, Any]:
            return {"matrix": "blocks.0.mlp.W_in", "sv": 0}

    model = make_model("Pendulum-v1")
    model.active_edits = [Edit()]
    result = evaluate(model, episodes=1, max_steps=2, workers=1)
    assert result.edits == ({"matrix": "blocks.0.mlp.W_in", "sv": 0},)
    assert "1 edit" in str(result)


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_ends_at_the_number_of_episodes(make_model: Make, workers: int) -> None:
    seen: list[tuple[float, int]] = []
    evaluate(
        make_model("CartPole-v1"), episodes=20, workers=workers, progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (20.0, 20)
    assert all(0 <= done <= total == 20 for done, total in seen)


def test_the_thread_count_is_left_as_it_was(make_model: Make) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        evaluate(make_model("CartPole-v1"), episodes=1, workers=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# What follows runs in a script of its own, read from standard input, with an environment that only the script knows.
SCRIPT = """
import sys
from functools import partial
import gymnasium as gym, numpy as np, torch
from safetensors.torch import save
from dt_lens.behaviour.agents.environment import make_environment
from dt_lens.behaviour.agents.rollouts import Conditions
from dt_lens.behaviour.agents.running import Job, run_job
from dt_lens.behaviour.agents import workers
from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.decision_transformer.policy import acting_shapes
from dt_lens.errors import DtLensError

class Own(gym.Env):
    observation_space = gym.spaces.Box(-9, 9, (2,))
    action_space = gym.spaces.Box(-1, 1, (1,))
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.normal(size=2).astype(np.float32), {{}}
    def step(self, action):
        {step}
        heavy = [m for m in ("transformer_lens", "transformers", "pandas") if m in sys.modules]
        return self.np_random.normal(size=2).astype(np.float32), float(action[0]), bool(heavy), False, {{}}

gym.register("Own-v0", entry_point=Own, max_episode_steps={steps})
torch.manual_seed(0)
cfg = HookedDecisionTransformerConfig(2, 1, d_model=8, d_mlp=8, max_ep_len=9)
weights = save({{name: torch.randn(shape) for name, shape in acting_shapes(cfg).items()}})
conditions = Conditions(1.0, 1.0, np.zeros(2), np.ones(2), 8)
job = Job(weights, cfg.to_dict(), 3, make_environment("Own-v0", {{}}, cfg), conditions, 8)

def run_in_workers(job, count):
    return workers.run_in_workers(partial(run_job, job), range(20), count)
"""


def _script(body: str, *, step: str = "pass", steps: int = 12) -> str:
    return SCRIPT.format(step=step, steps=steps) + textwrap.dedent(body)


def test_a_script_without_main_guard() -> None:
    """Read from standard input: workers know its environment, survive one that kills them, and stay light."""
    body = """
    one, two = sorted(run_job(job, iter(range(20)))), sorted(run_in_workers(job, 2))
    assert one == two and len(two) == 20 and all(o.truncated for o in two), two
    class Deadly(Own):
        def step(self, action):
            import os
            os._exit(3)
    gym.register("Deadly-v0", entry_point=Deadly, max_episode_steps=9)
    from dataclasses import replace
    try:
        run_in_workers(replace(job, made=make_environment("Deadly-v0", {}, cfg)), 2)
    except DtLensError as error:
        print(error)
    print(len(run_in_workers(job, 2)))
    """
    done = subprocess.run([sys.executable, "-"], input=_script(body), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    sentence, number = done.stdout.splitlines()
    assert sentence.startswith("A rollout worker died")
    assert number == "20"


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.acceptance)])
def test_stopping_the_run_stops_its_workers(tmp_path: Any, how: signal.Signals) -> None:
    """In the middle of endless episodes: at once after Ctrl-C, and soon after the run is killed outright."""
    pids = tmp_path / "pids"
    pids.mkdir()
    step = f"import os; open(os.path.join({str(pids)!r}, str(os.getpid())), 'w').close()"
    body = """
    try:
        run_in_workers(job, 2)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    """
    file = tmp_path / "script.py"
    file.write_text(_script(body, step=step, steps=10**9))
    process = subprocess.Popen(
        [sys.executable, str(file)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert _wait(lambda: len(list(pids.iterdir())) == 2)
        process.send_signal(how)
        assert process.wait(timeout=20) == (0 if how == signal.SIGINT else -signal.SIGKILL)
    finally:
        process.kill()
    assert process.stdout is not None
    assert process.stdout.readline() == ("interrupted\n" if how == signal.SIGINT else "")
    assert _wait(lambda: not any(_alive(int(pid.name)) for pid in pids.iterdir()))


def _wait(condition: Callable[[], bool], seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
