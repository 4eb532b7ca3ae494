"""Environment steps per second of ``evaluate``, beside the machine's own limit and beside the usual loop.

The limit is what two processes at once could do if nothing but the policy's products and the physics took time: a fixed
number of operations a step at the best rate of float32 products, plus bare ``mj_step`` (for worlds without MuJoCo:
Gymnasium's own ``step``). The usual loop is the one published with Hugging Face's decision transformer: one
environment, the whole model at every step; with one thread or all, whichever is faster here. All three run in turn,
round by round, and the median of the rounds' ratios is reported. Hopper runs without termination
(``terminate_when_unhealthy=False``), so that all run the same number of steps.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import gymnasium as gym
import torch
from torch import Tensor

import dt_lens
from dt_lens.behaviour.agents import rollouts
from dt_lens.behaviour.agents.physics import Physics, physics_of
from dt_lens.behaviour.agents.recording import actions_of_episode
from dt_lens.behaviour.agents.rollouts import Policy
from dt_lens.behaviour.agents.running import Setting, run, setting_of
from dt_lens_benchmarks.row import Row

__all__ = ["Limit", "limits", "measure", "operations"]

WORKERS = 2
EPISODES = 16 * WORKERS
HOPPER = 48.5e6  # floating-point operations a step: fixed, so that operations that are saved count
SHARE, TIMES = 0.85, 7.5  # wanted
WIDTHS = (8, 16, 32, 64, 128)  # rows of a batch
SECONDS = 0.2  # of products at each width, and of physics


class Limit(NamedTuple):
    """What a process of the machine could do at most, while as many others as it is measured with do the same."""

    products: float  # float32 operations a second
    physics: float  # steps a second

    def steps(self, operations: float) -> float:
        """Steps a second of a process whose policy takes ``operations`` a step."""
        return 1 / (operations / self.products + 1 / self.physics)


def operations(cfg: Any, context: int) -> float:
    """Floating-point operations that a step of the policy takes at least: its products, each token embedded once.

    The first block's keys, queries and values do not change as the window moves, and of the last block only keys and
    values of all tokens are needed.
    """
    d, tokens, layers = cfg.d_model, 3 * context - 1, cfg.n_layers
    mlp = 2 * 2 * d * cfg.d_mlp * (1.5 if cfg.gated_mlp else 1)
    attention = 2 * 2 * tokens * d  # of one query
    token = 2 * d * d + mlp + attention
    first = 3 * 2 * d * (3 * d) + 2 * d * (1 + cfg.state_dim + cfg.n_actions)
    last = 2 * d * d + tokens * 2 * d * (2 * d) + token if layers > 1 else 0
    middle = max(layers - 2, 0) * tokens * (2 * d * 3 * d + token)
    return float(first + (tokens if layers > 1 else 1) * token + middle + last + 2 * d * cfg.act_dim)


def measure(quick: bool) -> Iterator[Row]:
    """The rows of this subject; ``quick`` takes fewer rounds and shorter episodes."""
    rounds, steps = (3, 200) if quick else (5, 1000)
    kwargs = {"terminate_when_unhealthy": False}
    model = dt_lens.load("hopper", check=False)
    setting = setting_of(model, "Hopper-v5", kwargs, None, steps)
    loop = _loop_of(model, setting)

    def ours(steps: int) -> float:
        given: dict[str, Any] = {"environment_kwargs": kwargs, "max_steps": steps, "workers": WORKERS}
        return _rate(lambda: int(dt_lens.evaluate(model, "Hopper-v5", episodes=EPISODES, **given).lengths.sum()))

    with limits(model, setting) as limit:
        ours(2)  # the workers start, once per session
        loop(20)
        found = [(ours(steps), WORKERS * limit().steps(HOPPER), loop(150 if quick else 300)) for _ in range(rounds)]
    what = f"evaluate, Hopper-v5, {WORKERS} workers"
    shares = _shares(model, setting)
    for peer, place, wanted, note in (
        ("the machine's limit", 1, SHARE, shares),
        ("a one-environment Hugging Face loop", 2, TIMES, "the faster of one thread and all"),
    ):
        ratio = statistics.median(row[0] / row[place] for row in found)
        fast, slow = (statistics.median(row[i] for row in found) for i in (0, place))
        yield Row(what, fast, "steps/s", peer, slow, ratio, f"at least {wanted:g}", ratio >= wanted, note)
    for name in ("taxi", "doorkey"):
        yield _discrete(name, 1 if quick else 3)


def _discrete(name: str, rounds: int) -> Row:
    """A bundled agent of a world without MuJoCo."""
    model = dt_lens.load(name, check=False)
    setting = setting_of(model, None, None, None, None)
    needs = operations(model.cfg, model.facts.context)

    def ours() -> float:
        return _rate(lambda: int(dt_lens.evaluate(model, episodes=4 * EPISODES, workers=WORKERS).lengths.sum()))

    with limits(model, setting) as limit:
        ours()
        found = [(ours(), WORKERS * limit().steps(needs)) for _ in range(rounds)]
    fast, most = (statistics.median(row[i] for row in found) for i in (0, 1))
    ratio = statistics.median(row[0] / row[1] for row in found)
    what = f"evaluate, {setting.environment}, {WORKERS} workers"
    peer = "products and Gymnasium's own step, nothing else"
    note = f"{needs / 1e6:.1f} MFLOP a step; {_shares(model, setting)}"
    return Row(what, fast, "steps/s", peer, most, ratio, note=note)


class limits:
    """``with limits(model, setting) as limit: limit()``: the mean of ``WORKERS`` processes that measure at once."""

    def __init__(self, model: Any, setting: Setting) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pool = spawn.Pool(WORKERS, _begin, (spawn.Barrier(WORKERS),))
        cfg = model.cfg
        self._sizes = (cfg.d_model, cfg.d_mlp, 3 * model.facts.context - 1)
        self._setting, self._actions = setting, actions_of_episode(model, setting, 0)

    def __enter__(self) -> Callable[[], Limit]:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.terminate()
        self._pool.join()

    def __call__(self) -> Limit:
        work = (self._sizes, self._setting.made, self._actions)
        found = self._pool.starmap(_limit, [work] * WORKERS, chunksize=1)
        return Limit(statistics.fmean(f.products for f in found), statistics.fmean(f.physics for f in found))


_together: Any = None


def _begin(barrier: Any) -> None:
    global _together
    _together = barrier
    torch.set_num_threads(1)


def _limit(sizes: tuple[int, int, int], made: Any, actions: Sequence[Any]) -> Limit:
    env = made.make()
    try:
        _together.wait()
        products = max(_products(rows, *sizes) for rows in WIDTHS)
        _together.wait()
        return Limit(products, _physics(env, made, actions))
    finally:
        env.close()


@torch.inference_mode()
def _products(rows: int, d: int, d_mlp: int, tokens: int) -> float:
    """Operations a second in the products of one block, of ``rows`` windows, into memory that is there."""
    shapes = ((d, 3 * d), (d, d), (d, d_mlp), (d_mlp, d))
    parts = [(torch.randn(rows * tokens, a), torch.randn(a, b), torch.empty(rows * tokens, b)) for a, b in shapes]
    done, end = 0, time.perf_counter() + SECONDS
    begin = time.perf_counter()
    while time.perf_counter() < end or not done:
        for x, weight, out in parts:
            torch.mm(x, weight, out=out)
        done += 1
    flops = sum(2 * rows * tokens * a * b for a, b in shapes)
    return done * flops / (time.perf_counter() - begin)


def _physics(env: Any, made: Any, actions: Sequence[Any]) -> float:
    """Steps a second of the bare world, with the agent's own actions: ``mj_step``, or Gymnasium's ``step``."""
    base = env.unwrapped
    if hasattr(base, "frame_skip"):
        from mujoco import mj_step

        def step(action: Any) -> bool:
            base.data.ctrl[:] = action
            mj_step(base.model, base.data, base.frame_skip)
            return False
    else:

        def step(action: Any) -> bool:
            _, _, terminated, truncated, _ = env.step(action)
            return bool(terminated or truncated)

    done, taken = 0, 0.0
    while taken < SECONDS:
        env.reset(seed=0)
        begin = time.perf_counter()
        for action in actions:
            done += 1
            if step(action):
                break
        taken += time.perf_counter() - begin
    return done / taken


class _Timed:
    """A policy, or the physics, that adds up how long it takes."""

    def __init__(self, inner: Any, method: str) -> None:
        self._inner, self.seconds, work = inner, 0.0, getattr(inner, method)

        def timed(*args: Any) -> Any:
            begin = time.perf_counter()
            found = work(*args)
            self.seconds += time.perf_counter() - begin
            return found

        setattr(self, method, timed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _shares(model: Any, setting: Setting) -> str:
    """How a process spends its time: in the policy, in the physics, and in all other Python."""
    timed: dict[str, _Timed] = {}

    def watched(policy: Policy) -> Policy:
        timed["policy"] = _Timed(policy, "act")
        return timed["policy"]

    def stepped(*args: Any) -> Physics:
        timed["physics"] = _Timed(physics_of(*args), "step")
        return timed["physics"]  # type: ignore[return-value]

    with mock.patch.object(rollouts, "physics_of", stepped):
        short = setting._replace(made=replace(setting.made, time_limit=1))
        run(model, short, range(16), workers=1, watch=watched)  # the widths of a batch are tried once per process
        begin = time.perf_counter()
        outcomes = run(model, setting, range(16), workers=1, watch=watched)
        total = time.perf_counter() - begin
    steps = sum(outcome.length for outcome in outcomes)
    shares = {name: part.seconds / total for name, part in timed.items()}
    shares["Python and start"] = 1 - sum(shares.values())
    parts = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    return f"{parts} of {1e6 * total / steps:.0f} us a step in one process"


def _loop_of(model: Any, setting: Setting) -> Callable[[int], float]:
    """Steps a second of the usual loop, for an episode of so many steps.

    The first call finds out whether one thread or all are faster, and the others use as many: with all threads a step
    can take a hundred times as long where something else runs.
    """
    from transformers import DecisionTransformerModel

    with tempfile.TemporaryDirectory() as folder:
        dt_lens.save_pretrained(model, Path(folder))
        peer = DecisionTransformerModel.from_pretrained(folder).eval()
    threads = torch.get_num_threads()
    tried = sorted({1, threads})

    def loop(steps: int) -> float:
        rates = {}
        for n in tried:
            torch.set_num_threads(n)
            try:
                rates[n] = _rate(lambda: _usual_loop(peer, model.facts, setting, steps))
            finally:
                torch.set_num_threads(threads)
        tried[:] = [max(rates, key=lambda n: rates[n])]
        return max(rates.values())

    return loop


def _usual_loop(model: Any, facts: Any, setting: Setting, steps: int) -> int:
    """Run one episode with the loop that Hugging Face published; returns its number of steps."""
    env = gym.make(setting.environment, **setting.environment_kwargs)
    mean, std = (torch.tensor(a, dtype=torch.float32) for a in (facts.state_mean, facts.state_std))
    scale, act_dim, n = facts.return_scale, setting.made.act_dim, facts.context
    observation, _ = env.reset(seed=0)
    states = torch.from_numpy(observation).float().reshape(1, -1)
    actions = torch.zeros(0, act_dim)
    to_go = torch.tensor([[facts.target_returns[0] / scale]])
    times = torch.zeros(1, 1, dtype=torch.long)
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
        action: Tensor = out.action_preds[0, -1]
        actions[-1] = action
        observation, reward, terminated, truncated, _ = env.step(action.numpy())
        if terminated or truncated:
            break
        states = torch.cat([states, torch.from_numpy(observation).float().reshape(1, -1)])
        to_go = torch.cat([to_go, to_go[:, -1:] - float(reward) / scale], dim=1)
        times = torch.cat([times, torch.full((1, 1), t + 1)], dim=1)
    env.close()
    return t + 1


def _rate(run: Callable[[], int]) -> float:
    """Steps per second of ``run()``, which returns its number of steps."""
    begin = time.perf_counter()
    steps = run()
    return float(steps / (time.perf_counter() - begin))
