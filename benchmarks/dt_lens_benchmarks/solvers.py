"""Singular directions beside TransformerLens's ``SVDInterpreter`` and ``torch.linalg.svd``, by shape and spectrum.

Models have GPT-2-small's shape and random weights: i.i.d. (a flat spectrum), or with a spectrum on top that decays as
trained ones do. Both sides get the same tensors, and take turns; the fewest seconds of several rounds count.
``SVDInterpreter`` always multiplies what it finds with the unembedding; where only directions are compared it gets one
of 64 tokens, so that this costs nothing. Ours are measured against the matrix, in the time given; the peers measure
nothing. Each of our rounds begins with nothing cached. A scan is of a whole model in any case: its null costs the same
for two blocks as for twelve.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dt_lens_benchmarks.row import Row

__all__ = ["measure"]

D, MLP, HEADS, VOCAB = 768, 3072, 12, 50257
BLOCKS = 12
K = 10
KINDS = ("decaying", "flat")


def measure(quick: bool) -> Iterator[Row]:
    """The rows of this subject; ``quick`` takes models of fewer blocks, and leaves the largest matrices out."""
    blocks, rounds = (2, 2) if quick else (BLOCKS, 3)
    for kind in KINDS:
        yield _directions(kind, blocks, rounds)
    yield from _scan(quick)
    yield from _shapes()
    if not quick:
        yield from _large()


def _model(kind: str, blocks: int, vocabulary: int) -> Any:
    """A wrapped GPT-2 with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    import dt_lens

    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(n_layer=blocks, vocab_size=vocabulary, **ends)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and ".h." in name:
                weight.copy_(matrix(kind, len(weight), len(weight.T), generator))
            elif "ln_" in name and name.endswith("weight"):
                weight.copy_(1 + 0.1 * torch.randn(len(weight), generator=generator))
    return dt_lens.wrap(model, check=False)


def matrix(kind: str, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Random weights ``[rows, columns]``, float32, whose spectrum is of a kind."""

    def normal(*shape: int) -> Tensor:
        drawn: Tensor = torch.randn(*shape, generator=generator)
        return drawn

    noise, short = 0.02 * normal(rows, columns), min(rows, columns)
    if kind == "flat":
        return noise
    edge = 0.02 * (rows**0.5 + columns**0.5)
    if kind == "decaying":  # above the noise, as trained ones
        sigma = 4 * edge / torch.arange(1.0, 65).sqrt()
    elif kind == "clustered":  # many near-equal ones
        sigma = edge * torch.tensor([3.0, 2.0, 1.0, 0.5]).repeat_interleave(short // 4)
        sigma *= 1 + 1e-6 * normal(len(sigma))
    else:  # rank-deficient
        sigma = edge * torch.linspace(2, 1, short // 4)
    left, right = (torch.linalg.qr(normal(side, len(sigma)))[0] for side in (rows, columns))
    top: Tensor = (left * sigma) @ right.T
    return noise + top if kind == "decaying" else top


class _Peer:
    """A wrapped model's tensors as ``SVDInterpreter`` takes them."""

    def __init__(self, model: Any) -> None:
        from transformer_lens.config import TransformerLensConfig

        cfg = model.cfg
        self.cfg = TransformerLensConfig(
            d_model=D, d_head=D // HEADS, n_heads=HEADS, n_layers=cfg.n_layers, n_ctx=1024, d_vocab=cfg.d_vocab
        )
        unembed = model.embeddings["token_out"].directions.detach().T.contiguous()
        self._weights = {name: weight.detach() for name, weight in model.weights.items()} | {"unembed.W_U": unembed}

    def tl_parameters(self) -> dict[str, Tensor]:
        return self._weights

    def _not_used(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    run_with_cache = run_with_hooks = to_tokens = _not_used


def _interpreter(model: Any) -> Callable[[int], None]:
    """What finds the leading directions of one block with TransformerLens."""
    from transformer_lens import SVDInterpreter

    peer = SVDInterpreter(_Peer(model))

    def block(layer: int) -> None:
        for name in ("w_in", "w_out"):
            peer.get_singular_vectors(name, layer, K)
        for head in range(HEADS):
            peer.get_singular_vectors("OV", layer, K, head)

    return block


def _patterns(layer: int | str) -> list[str]:
    return [f"blocks.{layer}.mlp.W_in", f"blocks.{layer}.mlp.W_out", f"blocks.{layer}.attn.OV.*"]


def _directions(kind: str, blocks: int, rounds: int) -> Row:
    import dt_lens

    model = _model(kind, blocks, 64)
    theirs = _interpreter(model)
    _warm(kind)
    patterns = [pattern for layer in range(blocks) for pattern in _patterns(layer)]
    ours, peer = _best(
        lambda: dt_lens.WeightSVD(model, rank=K).decompose(patterns),
        lambda: [theirs(layer) for layer in range(blocks)],
        rounds,
    )
    what = f"best {K} directions of W_in, W_out and {HEADS} OV circuits in each of {blocks} blocks, {kind} spectra"
    note = "without SVDInterpreter's product with the unembedding; float64 and measured, the peer float32"
    return _times(what, ours, "SVDInterpreter", peer, 15, note)


def _warm(kind: str) -> None:
    """Import what both sides import, and start their threads, on a model that is thrown away."""
    import dt_lens

    model = _model(kind, 1, 64)
    dt_lens.WeightSVD(model, rank=K).decompose(_patterns(0))
    _interpreter(model)(0)


def _scan(quick: bool) -> Iterator[Row]:
    import dt_lens

    _warm("decaying")
    model = _model("decaying", BLOCKS, VOCAB)
    theirs = _interpreter(model)
    patterns = [pattern for layer in range(BLOCKS) for pattern in _patterns(layer)]
    ours, peer = _best(
        lambda: dt_lens.WeightSVD(model, rank=K).scan(patterns),
        lambda: [theirs(layer) for layer in range(BLOCKS)],
        1 if quick else 3,
    )
    what = f"scan of {BLOCKS} blocks with {VOCAB:,} tokens, null and q"
    note = (
        "input embeddings with what reads, token_out with what writes; SVDInterpreter has the unembedding and no null"
    )
    yield _times(what, ours, "SVDInterpreter", peer, 5, note)
    if not quick:
        both = _seconds(lambda: dt_lens.WeightSVD(model, rank=K).scan(patterns, embeddings=["token_in", "token_out"]))
        note = "nearly four times the comparisons of SVDInterpreter, and four nulls in place of two"
        what = f"{what}, both embeddings with both sides"
        yield Row(what, both, "s", "SVDInterpreter", peer, peer / both, note=note)


def _shapes() -> Iterator[Row]:
    from dt_lens.svd.solvers import decompose

    generator, decaying = torch.Generator().manual_seed(1), 0.0
    for kind in ("decaying", "flat", "clustered", "rank-deficient"):
        M = matrix(kind, D, MLP, generator).double()
        ours, peer = _best(lambda M=M: decompose([M], K), lambda M=M: torch.linalg.svd(M, full_matrices=False))  # type: ignore[misc]
        decaying = decaying or ours
        note = "" if kind == "decaying" else f"{ours / decaying:.1f} times the decaying one; wanted at most 2"
        yield _times(f"best {K} of {D} x {MLP}, {kind}", ours, "torch.linalg.svd", peer, 1, note, ours <= 2 * decaying)
    shapes: list[tuple[str, list[Tensor], int | None]] = [
        (f"best {K} of {D} x {D}, flat", [matrix("flat", D, D, generator)], K),
        (f"all of {D} x {MLP}, flat", [matrix("flat", D, MLP, generator)], None),
        (f"best {K} of an OV circuit {D} x 64 x {D}", [torch.randn(D, 64), torch.randn(64, D)], K),
        (f"all of an OV circuit {D} x 64 x {D}", [torch.randn(D, 64), torch.randn(64, D)], None),
    ]
    for what, factors, rank in shapes:
        factors = [factor.double() for factor in factors]
        M = factors[0] if len(factors) == 1 else factors[0] @ factors[1]
        ours, peer = _best(
            lambda f=factors, k=rank: decompose(f, k),  # type: ignore[misc]
            lambda M=M: torch.linalg.svd(M, full_matrices=False),  # type: ignore[misc]
        )
        yield _times(what, ours, "torch.linalg.svd", peer, 1)
    M = matrix("flat", D, D, generator).double()
    ours, peer = _best(lambda: decompose([M]), lambda: torch.linalg.svd(M, full_matrices=False))
    yield _times(f"all of {D} x {D}, flat", ours, "torch.linalg.svd", peer, 0.95, "the same routine, and measured")


def _large() -> Iterator[Row]:
    from dt_lens.svd.solvers import decompose

    generator, decaying = torch.Generator().manual_seed(1), 0.0
    for kind in KINDS:
        M = matrix(kind, 4096, 16384, generator).half().double()
        ours = _seconds(lambda M=M: decompose([M], K))  # type: ignore[misc]
        decaying = decaying or ours
        peer = _seconds(lambda M=M: np.matmul(M.float().numpy(), M.float().numpy().T))  # type: ignore[misc]
        what, wanted = f"best {K} of 4096 x 16384, {kind}", "at most 2 times the decaying one"
        yield Row(what, ours, "s", "its Gram matrix, float32", peer, peer / ours, wanted, ours <= 2 * decaying)


def _best(ours: Callable[[], Any], peer: Callable[[], Any], rounds: int = 3) -> tuple[float, float]:
    """The fewest seconds that each of two took, in turn."""
    pairs = [(_seconds(ours), _seconds(peer)) for _ in range(rounds)]
    first, second = (min(column) for column in zip(*pairs, strict=True))
    return first, second


def _seconds(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _times(what: str, ours: float, name: str, peer: float, least: float, note: str = "", also: bool = True) -> Row:
    ratio = peer / ours
    return Row(what, ours, "s", name, peer, ratio, f"at least {least:g}", ratio >= least and also, note)
