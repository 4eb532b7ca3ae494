"""Everything on a CUDA card: load, certify, scan, edit, evaluate; steps a second, and the policy's share of the peak.

    python -m dt_lens_benchmarks.cuda [--model hopper] [--episodes 256] [--steps 200] [--device cuda]

The card's peak is measured, not read from a data sheet: the best rate of float32 products of large square matrices, as
torch computes them here (``torch.get_float32_matmul_precision()`` is left as it is). ``evaluate`` runs the physics on
the host's cores and the policy on the card, in batches of one width; the policy alone is timed on the same batches.
The exit status is 2 where there is no card, and 1 where a result on the card differs from the CPU's by more than
rounding.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import dt_lens
from dt_lens.behaviour.agents.arms import acting_weights
from dt_lens.behaviour.agents.lanes import CUDA_LANES
from dt_lens.behaviour.agents.windows import SlidingPolicy
from dt_lens.decision_transformer.policy import ActingModel
from dt_lens.lens.weights import same_bits

MATRIX, FLOP = "blocks.0.mlp.W_in", 48.5e6  # a step of hopper's policy


def seconds(run: Callable[[], object]) -> float:
    """Of wall time that ``run()`` takes, with what it has started on the card."""
    wait: Any = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    begin = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - begin


def peak(device: str, rounds: int = 10) -> float:
    """The best rate of float32 products on this device, in operations a second."""
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device) for _ in range(2))
    return max(2 * n**3 / seconds(lambda: a @ b) for _ in range(rounds))


def policy_rate(model: Any, lanes: int, steps: int) -> float:
    """Steps a second of the policy alone, ``lanes`` rows at a time, on the card, once its windows are full."""
    policy = SlidingPolicy(ActingModel(acting_weights(model), model.cfg), model.facts.context, lanes)
    cfg = model.cfg

    def act(t: int) -> None:
        policy.act(
            torch.zeros(lanes, cfg.state_dim),
            torch.ones(lanes, 1),
            torch.full((lanes,), t),
            torch.zeros(lanes, cfg.act_dim),
        )

    for row in range(lanes):
        policy.restart(row)
    for t in range(model.facts.context):
        act(t)

    def run() -> None:
        for t in range(steps):
            act(model.facts.context + t)

    return lanes * steps / seconds(run)


def main() -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default="hopper")
    parser.add_argument("--episodes", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200, help="where episodes are cut")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: to try this program itself")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA card here.", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name() if given.device == 'cuda' else 'the CPU'}, torch {torch.__version__}")
    host = dt_lens.load(given.model)
    card = dt_lens.load(given.model).to(given.device)
    certificate: Any = None

    def certify() -> None:
        nonlocal certificate
        certificate = dt_lens.certify(card)

    print(f"certify: {seconds(certify):.2f} s, worst relative error {certificate.worst:.1e}")
    tables = [dt_lens.WeightSVD(model).scan() for model in (host, card)]
    apart = float((tables[0]["cosine"].abs() - tables[1]["cosine"].abs()).abs().max(skipna=False))
    print(
        f"scan: {seconds(lambda: dt_lens.WeightSVD(card).scan()):.2f} s; cosines differ from the CPU's by {apart:.1e}"
    )
    edit = dt_lens.SingularEdit(card, MATRIX, 0)
    weight = card.weights[MATRIX].clone()
    with edit:
        changed = bool((card.weights[MATRIX] != weight).any())
    restored = same_bits(card.weights[MATRIX], weight)
    print(f"edit: {'changed' if changed else 'NOT changed'}, {'restored' if restored else 'NOT restored'} to the bit")
    kwargs: dict[str, Any] = {"episodes": given.episodes, "seed": 0, "max_steps": given.steps}
    with edit:
        edited = dt_lens.evaluate(card, **kwargs)
    evaluation: Any = None

    def evaluate() -> None:
        nonlocal evaluation
        evaluation = dt_lens.evaluate(card, **kwargs)

    taken = seconds(evaluate)
    usual = dt_lens.evaluate(host, **kwargs)
    rate, most = policy_rate(card, CUDA_LANES, 200), peak(given.device)
    print(
        f"evaluate: {evaluation.lengths.sum() / taken:.0f} steps/s; mean return {evaluation.returns.mean():.1f}, "
        f"on the CPU {usual.returns.mean():.1f}, edited {edited.returns.mean():.1f}"
    )
    print(
        f"policy alone: {rate:.0f} steps/s, {rate * FLOP / most:.0%} of the peak, {most / 1e12:.3g} TFLOP/s "
        f"({CUDA_LANES} rows at a time)"
    )
    return int(not apart <= 1e-6 or not changed or not restored)


if __name__ == "__main__":
    sys.exit(main())
