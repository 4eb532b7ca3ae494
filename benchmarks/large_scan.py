"""Time a full scan of a synthetic checkpoint of GPT-J-6B's shape, in fp16 (12 GB), without loading it whole.

    python benchmarks/large_scan.py make DIR            writes the checkpoint, in shards
    python benchmarks/large_scan.py scan DIR [--kept DIR2]
    python benchmarks/large_scan.py peer DIR            one W_in by torch.linalg.svd, and by dt-lens

``scan`` compares the ten leading directions of every ``W_in``, ``W_out`` and OV circuit with both token embeddings,
and prints seconds and peak resident memory (including mapped pages of the files). Ctrl-C stops it; with ``--kept`` the
same command resumes. The exit status is 1 if it took more than 12 minutes or 4 GiB, or missed a direction that ``make``
planted. ``--blocks 2`` makes a small checkpoint.

The weights are noise with a spectrum on top that decays as trained ones do: sigma_i proportional to 1/sqrt(i) for 64
directions, the largest about four times the edge of the noise. One direction that ``W_out`` of block 1 writes is the
token_out direction of one token.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

D, MLP, HEADS, VOCAB = 4096, 16384, 16, 50400
SHARD = 2 * 2**30  # bytes
TOKEN, LAYER = 12345, 1
MINUTES, GIB = 12.0, 4.0


def drawn(generator: torch.Generator, rows: int, columns: int) -> Tensor:
    """Noise with a decaying spectrum on top, ``[rows, columns]``, in fp16."""
    noise = 0.02
    W = torch.randn(rows, columns, generator=generator).mul_(noise)
    edge = noise * (rows**0.5 + columns**0.5)
    left, right = (torch.linalg.qr(torch.randn(n, 64, generator=generator))[0] for n in (rows, columns))
    W.addmm_(left * (4 * edge / torch.arange(1.0, 65).sqrt()), right.T)
    return W.half()


def tensors(blocks: int) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint, in ``GPTJForCausalLM``'s names: ``nn.Linear`` stores (out, in)."""
    generator = torch.Generator().manual_seed(0)
    unembed = drawn(generator, VOCAB, D)
    yield "transformer.wte.weight", drawn(generator, VOCAB, D)
    for layer in range(blocks):
        h = f"transformer.h.{layer}"
        yield f"{h}.ln_1.weight", 1 + 0.1 * torch.randn(D, generator=generator).half()
        yield f"{h}.ln_1.bias", 0.1 * torch.randn(D, generator=generator).half()
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield f"{h}.attn.{name}.weight", drawn(generator, D, D)
        yield f"{h}.mlp.fc_in.weight", drawn(generator, MLP, D)
        yield f"{h}.mlp.fc_in.bias", torch.zeros(MLP).half()
        W_out = drawn(generator, D, MLP)
        if layer == LAYER:
            target = unembed[TOKEN].float() - unembed[TOKEN].float().mean()
            neurons = torch.randn(MLP, generator=generator)
            W_out = (W_out.float() + 60 * torch.outer(target / target.norm(), neurons / neurons.norm())).half()
        yield f"{h}.mlp.fc_out.weight", W_out
        yield f"{h}.mlp.fc_out.bias", torch.zeros(D).half()
    yield "transformer.ln_f.weight", torch.ones(D).half()
    yield "transformer.ln_f.bias", torch.zeros(D).half()
    yield "lm_head.weight", unembed
    yield "lm_head.bias", torch.zeros(VOCAB).half()


def make(folder: Path, blocks: int) -> None:
    """Write the checkpoint, a shard at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, str] = {}
    shard: dict[str, Tensor] = {}

    def flush() -> None:
        name = f"model-{len(set(files.values())) + 1:05}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        files.update(dict.fromkeys(shard, name))
        shard.clear()
        print(f"\r{len(files)} tensors", end="", file=sys.stderr, flush=True)

    for key, tensor in tensors(blocks):
        shard[key] = tensor
        if sum(t.nbytes for t in shard.values()) > SHARD:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    sizes = {"n_embd": D, "n_layer": blocks, "n_head": HEADS, "n_inner": MLP, "vocab_size": VOCAB, "n_positions": 2048}
    config = {"model_type": "gptj", "architectures": ["GPTJForCausalLM"], "rotary_dim": 64, **sizes}
    (folder / "config.json").write_text(json.dumps(config))
    print(f"\nWritten: {sum(file.stat().st_size for file in folder.iterdir()) / 1e9:.1f} GB in {folder}")


def scan(folder: Path, kept: Path | None) -> int:
    """Scan, measure, and compare with the limits; returns the exit status."""
    from dt_lens import WeightSVD, open_checkpoint

    begin = time.perf_counter()
    svd = WeightSVD(open_checkpoint(folder), rank=10, resume=kept)
    table = svd.scan(["*.W_in", "*.W_out", "*.OV.*"], embeddings=["token_in", "token_out"], progress=True)
    minutes = (time.perf_counter() - begin) / 60
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    strongest = table.sort_values("p_value", kind="stable").iloc[0]
    print(f"{len(table):,} comparisons of {table['matrix'].nunique()} matrices; the strongest:")
    print(strongest.to_string())
    print(f"{minutes:.1f} minutes (wanted {MINUTES:g}), peak resident memory {peak:.2f} GiB (wanted {GIB:g})")
    found = (strongest["matrix"], strongest["label"]) == (f"blocks.{LAYER}.mlp.W_out", f"token {TOKEN}")
    if not found:
        print(f"The planted direction (blocks.{LAYER}.mlp.W_out, token {TOKEN}) was missed.")
    return int(minutes > MINUTES or peak > GIB or not found)


def peer(folder: Path) -> int:
    """Time the ten leading directions of one ``W_in``: torch's full SVD in float32, and dt-lens's in float64."""
    from dt_lens import WeightSVD, open_checkpoint

    model = open_checkpoint(folder)
    begin = time.perf_counter()
    WeightSVD(model, rank=10)["blocks.0.mlp.W_in"]
    ours = time.perf_counter() - begin
    W = model.weights["blocks.0.mlp.W_in"].float()
    begin = time.perf_counter()
    torch.linalg.svd(W, full_matrices=False)
    theirs = time.perf_counter() - begin
    print(f"W_in {D} x {MLP}: torch.linalg.svd {theirs:.1f} s, dt-lens {ours:.1f} s, {theirs / ours:.1f} times")
    return 0


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("what", choices=("make", "scan", "peer"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=28)
    parser.add_argument("--kept", type=Path)
    given = parser.parse_args()
    if given.what == "make":
        make(given.folder, given.blocks)
        return 0
    return scan(given.folder, given.kept) if given.what == "scan" else peer(given.folder)


if __name__ == "__main__":
    sys.exit(main())
