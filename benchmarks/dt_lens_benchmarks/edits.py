"""Entering and leaving an edit of a large matrix, beside copying the matrix and beside rebuilding it.

The model has one block of width 4096 with an MLP of 16384, and the edited direction is known. Entering checks that the
weights are those the edit was made from, that the change can be held and that it reaches the forward pass, which costs
two passes of one token; leaving checks every bit. A copy is ``weight.clone()``, into memory of its own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from dt_lens_benchmarks.row import Row

__all__ = ["measure"]

MATRIX, ROUNDS = "blocks.0.mlp.W_in", 5


def measure(quick: bool) -> Iterator[Row]:
    """The rows of this subject; ``quick`` has float32 only, and scales the time of rebuilding a smaller matrix up."""
    for dtype in (torch.float32,) if quick else (torch.float32, torch.float16):
        yield from _edits(dtype, quick)


def _edits(dtype: torch.dtype, quick: bool) -> Iterator[Row]:
    from transformers import GPT2Config, GPT2LMHeadModel

    import dt_lens

    sizes = {"n_embd": 4096, "n_inner": 16384, "n_head": 32, "n_layer": 1, "vocab_size": 64, "n_positions": 32}
    with torch.device("meta"):
        bare = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    bare = bare.to(dtype).to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in bare.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator).mul_(0.02))
    model: Any = dt_lens.wrap(bare, check=False)
    live = model.weights[MATRIX]
    edit = dt_lens.SingularEdit(model, MATRIX, sv=0)
    copies, edits = [], []
    for _ in range(ROUNDS):
        copies.append(_seconds(live.clone))
        edits.append(_seconds(lambda: _enter_and_leave(edit)))
    copy, entered = statistics.median(copies), statistics.median(edits)
    name = str(dtype).removeprefix("torch.")
    what = f"entering and leaving an edit of 4096 x 16384, {name}"
    probe = _seconds(lambda: edit._activation(tokens=1))
    note = f"{entered / copy:.1f} copies; of them {2 * probe / copy:.1f} are the two forward passes of the check"
    yield Row(what, entered, "s", "a copy of it", copy, copy / entered, "at most 4 copies", entered <= 4 * copy, note)
    short = 1024 if quick else 4096
    rebuilt = _seconds(lambda: _rebuilt(live[:short, : 4 * short].float())) * (4096 / short) ** 3
    note = f"from {short} x {4 * short}, by its arithmetic" if quick else ""
    wanted = "at least 100"
    met = rebuilt >= 100 * entered
    yield Row(what, entered, "s", "decompose and rebuild", rebuilt, rebuilt / entered, wanted, met, note)


def _enter_and_leave(edit: Any) -> None:
    with edit:
        pass


def _rebuilt(weight: torch.Tensor) -> torch.Tensor:
    """What an edit costs without its low-rank form: all directions, one of them changed, multiplied out again."""
    left, sigma, right = torch.linalg.svd(weight, full_matrices=False)
    right[0] = 1 / len(right[0])
    made: torch.Tensor = (left * sigma) @ right
    return made


def _seconds(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
