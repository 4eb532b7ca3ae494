"""Time a full scan of a synthetic checkpoint of GPT-J-6B's shape, in fp16 (12 GB), without loading it whole.

    python benchmarks/large_scan.py make DIR [--flat]   writes the checkpoint, in shards
    python benchmarks/large_scan.py make DIR2 --changed-from DIR
    python benchmarks/large_scan.py scan DIR [--kept DIR3]
    python benchmarks/large_scan.py compare DIR DIR2 [--kept DIR3]  what changed, as dt-lens compare --weights-only
    python benchmarks/large_scan.py peer DIR            one W_in by torch.linalg.svd, and by dt-lens

``scan`` compares the ten leading directions of every ``W_in``, ``W_out`` and OV circuit with both token embeddings,
and prints seconds and peak resident memory (including mapped pages of the files). Ctrl-C stops it; with ``--kept`` the
same command resumes. The exit status is 1 if it took more than 5 minutes (7 with ``--flat``) or 3 GiB, or missed a
direction that ``make`` planted; ``compare`` may take 15 minutes and 4 GiB. ``--blocks 2`` makes a small checkpoint, and
the minutes are then those of a whole one, in proportion.

The weights are noise with a spectrum on top that decays as trained ones do: sigma_i proportional to 1/sqrt(i) for 64
directions, the largest about four times the edge of the noise; with ``--flat`` noise alone. One direction that
``W_out`` of block 1 writes is the token_out direction of one token. The second checkpoint of a comparison is the first
plus a change of rank 8 in ``W_in`` and ``W_out`` of every fourth block, and noise of the size of fp16's rounding in the
``v_proj`` of every fourth one; the rest is the same to the bit.
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
from safetensors.torch import load_file, save_file
from torch import Tensor

D, MLP, HEADS, VOCAB = 4096, 16384, 16, 50400
SHARD = 2 * 2**30  # bytes
TOKEN, LAYER = 12345, 1
MINUTES = {"decaying": 5.0, "flat": 7.0, "compare": 15.0}
GIB = {"decaying": 3.0, "flat": 3.0, "compare": 4.0}
BLOCKS = 28


def drawn(generator: torch.Generator, rows: int, columns: int, flat: bool) -> Tensor:
    """Noise, with a decaying spectrum on top unless ``flat``, ``[rows, columns]``, in fp16."""
    noise = 0.02
    W = torch.randn(rows, columns, generator=generator).mul_(noise)
    if flat:
        return W.half()
    edge = noise * (rows**0.5 + columns**0.5)
    left, right = (torch.linalg.qr(torch.randn(n, 64, generator=generator))[0] for n in (rows, columns))
    W.addmm_(left * (4 * edge / torch.arange(1.0, 65).sqrt()), right.T)
    return W.half()


def tensors(blocks: int, flat: bool) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint, in ``GPTJForCausalLM``'s names: ``nn.Linear`` stores (out, in)."""
    generator = torch.Generator().manual_seed(0)
    unembed = drawn(generator, VOCAB, D, flat)
    yield "transformer.wte.weight", drawn(generator, VOCAB, D, flat)
    for layer in range(blocks):
        h = f"transformer.h.{layer}"
        yield f"{h}.ln_1.weight", 1 + 0.1 * torch.randn(D, generator=generator).half()
        yield f"{h}.ln_1.bias", 0.1 * torch.randn(D, generator=generator).half()
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield f"{h}.attn.{name}.weight", drawn(generator, D, D, flat)
        yield f"{h}.mlp.fc_in.weight", drawn(generator, MLP, D, flat)
        yield f"{h}.mlp.fc_in.bias", torch.zeros(MLP).half()
        W_out = drawn(generator, D, MLP, flat)
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


def changed(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint, some of them changed, in the order of its files."""
    generator = torch.Generator().manual_seed(1)
    for file in sorted(folder.glob("*.safetensors")):
        for key, tensor in load_file(file).items():
            words = key.split(".")
            layer = int(words[2]) if words[1] == "h" else 0
            if layer % 4 == 1 and words[-2] in ("fc_in", "fc_out") and tensor.ndim == 2:
                left, right = (torch.randn(side, 8, generator=generator) for side in tensor.shape)
                # 2 % of the matrix's norm.
                size = 0.02 * float(tensor.float().norm()) / (8 * len(left) * len(right)) ** 0.5
                tensor = torch.addmm(tensor.float(), left, right.T, alpha=size).half()
            elif layer % 4 == 2 and words[-2] == "v_proj":
                tensor = (tensor.float() * (1 + 5e-4 * torch.randn(tensor.shape, generator=generator))).half()
            yield key, tensor


def make(folder: Path, made: Iterator[tuple[str, Tensor]], config: dict[str, object]) -> None:
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

    for key, tensor in made:
        shard[key] = tensor
        if sum(t.nbytes for t in shard.values()) > SHARD:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "config.json").write_text(json.dumps(config))
    print(f"\nWritten: {sum(file.stat().st_size for file in folder.iterdir()) / 1e9:.1f} GB in {folder}")


def config_of(blocks: int, flat: bool) -> dict[str, object]:
    """``config.json``, with whether the spectra are flat."""
    sizes = {"n_embd": D, "n_layer": blocks, "n_head": HEADS, "n_inner": MLP, "vocab_size": VOCAB, "n_positions": 2048}
    return {"model_type": "gptj", "architectures": ["GPTJForCausalLM"], "rotary_dim": 64, "flat_spectra": flat, **sizes}


def within_limits(kind: str, begin: float, blocks: int) -> bool:
    """Print what was used beside the limits, and whether it is within them."""
    minutes = (time.perf_counter() - begin) / 60
    used = resource.getrusage(resource.RUSAGE_SELF)
    peak, cpu = used.ru_maxrss / 2**20, (used.ru_utime + used.ru_stime) / 60
    whole = minutes * BLOCKS / blocks
    print(f"{minutes:.1f} minutes, {cpu:.1f} of the processor; {BLOCKS} blocks: {whole:.1f} (wanted {MINUTES[kind]:g})")
    print(f"peak resident memory {peak:.2f} GiB (wanted {GIB[kind]:g})")
    return whole <= MINUTES[kind] and peak <= GIB[kind]


def compared(a: Path, b: Path, kept: Path | None) -> int:
    """Compare two checkpoints, and measure; returns the exit status."""
    from dt_lens import compare, open_checkpoint

    begin = time.perf_counter()
    one, two = open_checkpoint(a), open_checkpoint(b)
    found = compare(one, two, progress=True, resume=kept)
    print(repr(found))
    return int(not within_limits("compare", begin, one.cfg.n_layers))


def scan(folder: Path, kept: Path | None) -> int:
    """Scan, measure, and compare with the limits; returns the exit status."""
    from dt_lens import WeightSVD, open_checkpoint

    config = json.loads((folder / "config.json").read_text())
    begin = time.perf_counter()
    resumed = kept is not None and kept.is_dir() and any(kept.iterdir())
    svd = WeightSVD(open_checkpoint(folder), rank=10, resume=kept)
    table = svd.scan(["*.W_in", "*.W_out", "*.OV.*"], embeddings=["token_in", "token_out"], progress=True)
    strongest = table.sort_values("p_value", kind="stable").iloc[0]
    print(f"{len(table):,} comparisons of {table['matrix'].nunique()} matrices; the strongest:")
    print(strongest.to_string())
    fine = within_limits("flat" if config.get("flat_spectra") else "decaying", begin, config["n_layer"])
    if resumed:
        print(f"A part was finished before and lies in {kept}: this run's minutes say nothing of a whole scan.")
        fine = True
    found = (strongest["matrix"], strongest["label"]) == (f"blocks.{LAYER}.mlp.W_out", f"token {TOKEN}")
    if not found:
        print(f"The planted direction (blocks.{LAYER}.mlp.W_out, token {TOKEN}) was missed.")
    return int(not fine or not found)


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
    parser.add_argument("what", choices=("make", "scan", "compare", "peer"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("second", type=Path, nargs="?")
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--flat", action="store_true")
    parser.add_argument("--changed-from", type=Path)
    parser.add_argument("--kept", type=Path)
    given = parser.parse_args()
    if given.what == "make":
        if given.changed_from is not None:
            config = json.loads((given.changed_from / "config.json").read_text())
            make(given.folder, changed(given.changed_from), config)
        else:
            make(given.folder, tensors(given.blocks, given.flat), config_of(given.blocks, given.flat))
        return 0
    if given.what == "compare":
        if given.second is None:
            parser.error("compare takes two folders")
        return compared(given.folder, given.second, given.kept)
    return scan(given.folder, given.kept) if given.what == "scan" else peer(given.folder)


if __name__ == "__main__":
    sys.exit(main())
