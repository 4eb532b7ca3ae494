"""Environment steps per second: ``dt_lens.evaluate`` against the usual loop, on this machine, in this run.

The usual loop is the one published with Hugging Face's decision transformer: one environment, the whole model at every
step, a context of 20 steps. It gets the same weights, and one thread or torch's default number, whichever is faster
here. Both run Hopper-v5 without termination (``terminate_when_unhealthy=False``), and so the same number of steps. They
take turns, and the median of the rounds' ratios is printed.

    python benchmarks/rollouts.py [--rounds 3] [--steps 1000] [--workers 2] [--model hopper]

The exit status is 1 if the ratio is below 6. Timings are only meaningful on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

import dt_lens
from dt_lens.behaviour.agents.environment import make_environment
from dt_lens.decision_transformer.facts import RunFacts

WANTED = 6.0
ENVIRONMENT, KWARGS = "Hopper-v5", {"terminate_when_unhealthy": False}
PER_WORKER = 16  # episodes: a batch as full as evaluate makes it


def published_loop(model: Any, facts: RunFacts, steps: int) -> int:
    """Run one episode with the usual loop; returns its number of steps."""
    env = gym.make(ENVIRONMENT, **KWARGS)
    mean, std = (torch.tensor(a, dtype=torch.float32) for a in (facts.state_mean, facts.state_std))
    scale, act_dim = facts.return_scale, env.action_space.shape[0]
    observation, _ = env.reset(seed=0)
    states = torch.from_numpy(observation).float().reshape(1, -1)
    actions = torch.zeros(0, act_dim)
    to_go = torch.tensor([[facts.target_returns[0] / scale]])
    times = torch.zeros(1, 1, dtype=torch.long)
    n = facts.context
    for t in range(steps):
        actions = torch.cat([actions, torch.zeros(1, act_dim)])
        with torch.no_grad():
            out = model(
                states=((states[-n:] - mean) / std)[None],
                actions=actions[-n:][None],
                rewards=None,
                returns_to_go=to_go[:, -n:, None],
                timesteps=times[:, -n:],
                attention_mask=torch.ones(1, min(n, t + 1)),
                return_dict=True,
            )
        action = out.action_preds[0, -1]
        actions[-1] = action
        observation, reward, terminated, truncated, _ = env.step(action.numpy())
        if terminated or truncated:
            break
        states = torch.cat([states, torch.from_numpy(observation).float().reshape(1, -1)])
        to_go = torch.cat([to_go, to_go[:, -1:] - float(reward) / scale], dim=1)
        times = torch.cat([times, torch.full((1, 1), t + 1)], dim=1)
    env.close()
    return t + 1


def a_model(name: str) -> Any:
    """Load the bundled model ``name``, or make one of its shape with random weights."""
    try:
        return dt_lens.load(name)
    except dt_lens.DtLensError as error:
        print(f"{error} Measuring a random model of the same shape.", file=sys.stderr)
    from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig

    torch.manual_seed(0)
    model = dt_lens.HookedDecisionTransformer(HookedDecisionTransformerConfig(11, 3)).eval()
    model.facts = RunFacts(20, ENVIRONMENT, {}, (0.0,) * 11, (1.0,) * 11, 1000.0, (3600.0,))
    return model


def rate(run: Any) -> float:
    """Steps per second of ``run()``, which returns its number of steps."""
    begin = time.perf_counter()
    steps = run()
    return float(steps / (time.perf_counter() - begin))


def main() -> int:
    """Measure, print, and compare with the limit; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000, help="length of an episode")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--model", default="hopper")
    given = parser.parse_args()

    from transformers import DecisionTransformerModel

    model = a_model(given.model)
    with tempfile.TemporaryDirectory() as folder:
        dt_lens.save_pretrained(model, Path(folder))
        peer = DecisionTransformerModel.from_pretrained(folder).eval()
    assert make_environment(ENVIRONMENT, KWARGS, model.cfg).time_limit >= given.steps, (
        "the environment cuts episodes earlier"
    )
    threads = torch.get_num_threads()

    def usual(n: int, steps: int) -> float:
        torch.set_num_threads(n)
        try:
            return rate(lambda: published_loop(peer, model.facts, steps))
        finally:
            torch.set_num_threads(threads)

    def ours(steps: int, episodes: int) -> float:
        settings = {"environment_kwargs": KWARGS, "episodes": episodes, "max_steps": steps, "workers": given.workers}
        return rate(lambda: int(dt_lens.evaluate(model, ENVIRONMENT, **settings).lengths.sum()))

    cold = time.perf_counter()
    ours(2, PER_WORKER * given.workers)
    cold = time.perf_counter() - cold
    usual(threads, 20)
    print(f"starting {given.workers} workers, once per session: {cold:.1f} s; left out below")
    ratios = []
    for number in range(given.rounds):
        best_of = {n: usual(n, min(given.steps, 300)) for n in sorted({1, threads})}
        fast = ours(given.steps, PER_WORKER * given.workers)
        ratios.append(fast / max(best_of.values()))
        loops = ", ".join(f"{r:.0f} with {n} thread{'s' * (n > 1)}" for n, r in best_of.items())
        print(f"round {number + 1}: usual loop {loops}; evaluate {fast:.0f} steps/s; {ratios[-1]:.1f} times")
    ratio = statistics.median(ratios)
    print(f"evaluate does {ratio:.1f} times the usual loop's steps per second (median; wanted {WANTED:g})")
    return int(not np.isfinite(ratio) or ratio < WANTED)


if __name__ == "__main__":
    sys.exit(main())
