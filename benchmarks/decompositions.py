"""Time dt_lens's singular value decompositions, which use a matrix's structure, against ``torch.linalg.svd``.

Both sides get the same float64 matrices of GPT-2's shapes (or ``--d-model``'s) and must agree on the sigmas to 1e-9.
Only dt_lens measures its error, which its time includes. The two take turns, and the median of the rounds' ratios is
printed.

    python benchmarks/decompositions.py [--rounds 3] [--d-model 768] [--heads 12]

Timings are only meaningful on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from dt_lens.svd.solvers import decompose

LEADING = 12  # directions, if not all are computed


def seconds(work: Callable[[], list[Tensor]]) -> tuple[float, list[Tensor]]:
    start = time.perf_counter()
    made = work()
    return time.perf_counter() - start, made


def cases(d: int, heads: int) -> dict[str, tuple[list[list[Tensor]], int | None]]:
    """Lists of factors to decompose one by one, and the number of directions of each."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inner = d // heads
    steep = torch.arange(1, d + 1, dtype=torch.float64)[:, None] ** -0.5
    return {
        f"{heads} OV circuits {d} x {inner} x {d}": (
            [[random(d, inner), random(inner, d)] for _ in range(heads)],
            None,
        ),
        f"W_in {d} x {4 * d}, all directions": ([[random(d, 4 * d)]], None),
        f"W_in {d} x {4 * d}, the first {LEADING}": ([[steep * random(d, 4 * d)]], LEADING),
        f"W_Q {d} x {d}, all directions": ([[random(d, d)]], None),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads; seconds of the fastest round, and the median ratio")
    print(f"{'':40}{'torch.linalg.svd':>18}{'dt_lens':>10}{'ratio':>8}")
    for name, (matrices, rank) in cases(options.d_model, options.heads).items():

        def plain(matrices: list[list[Tensor]] = matrices, rank: int | None = rank) -> list[Tensor]:
            dense = [factors[0] if len(factors) == 1 else factors[0] @ factors[1] for factors in matrices]
            return [torch.linalg.svd(M, full_matrices=False)[1][:rank] for M in dense]

        def ours(matrices: list[list[Tensor]] = matrices, rank: int | None = rank) -> list[Tensor]:
            return [decompose(factors, rank).sigma for factors in matrices]

        rounds = []
        for _ in range(options.rounds):
            (slow, theirs), (fast, mine) = seconds(plain), seconds(ours)
            rounds.append((slow, fast))
            for a, b in zip(theirs, mine, strict=True):
                torch.testing.assert_close(a[: len(b)], b, rtol=1e-9, atol=1e-9)
        best = [min(column) for column in zip(*rounds, strict=True)]
        ratio = statistics.median(slow / fast for slow, fast in rounds)
        print(f"{name:40}{best[0]:>18.3f}{best[1]:>10.3f}{ratio:>8.1f}")


if __name__ == "__main__":
    main()
