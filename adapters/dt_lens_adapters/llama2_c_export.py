"""The ``model.bin`` that llama2.c's export.py writes for its run.c: a header of sizes, and float32 tensors behind it.

The oldest form, version 0, begins with seven whole numbers: width, width of the MLP, blocks, heads, heads of keys and
values, vocabulary (negative where the unembedding is not the token table), and context. Later ones begin with a magic
number, the version and the same seven, in 256 bytes. Each kind of tensor stands together for all blocks.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dt_lens.errors import DtLensError, because

__all__ = ["read_export"]

MAGIC = 0x616B3432
HEADER = {0: 28, 1: 256}  # bytes before the tensors, by version
SIZES = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
# More than any model has; other files do not begin with seven numbers below these.
MOST = (2**17, 2**20, 10_000, 2**12, 2**12, 2**22, 2**22)
ATTENTION = ("attention.wq", "attention.wk", "attention.wv", "attention.wo")
# The order of the kinds; a name with a dot, or a norm of the two, is of every block.
ORDER = {
    0: ("tok_embeddings", "attention_norm", *ATTENTION, "ffn_norm", "feed_forward.w1", "feed_forward.w2",
        "feed_forward.w3", "norm", "freqs", "freqs", "output"),
    1: ("attention_norm", "ffn_norm", "norm", "tok_embeddings", *ATTENTION, "feed_forward.w1", "feed_forward.w2",
        "feed_forward.w3", "output"),
}  # fmt: skip
WHOLE = ("tok_embeddings", "norm", "freqs", "output")


def read_export(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors under the names of llama2.c's model.py, and its ``model_args``; ``None`` for a file of another form.

    Raises:
        DtLensError: for quantised weights, sizes that no model can have, or another number of bytes than they ask for.
    """
    try:
        with file.open("rb") as stream:
            found = _sizes(file, stream.read(256))
            if found is None:
                return None
            version, sizes, tied = found
            shapes = _shapes(sizes)
            names = [kind for kind in ORDER[version] if not (tied and kind == "output")]
            places = [
                (f"layers.{layer}.{kind}.weight" if layer is not None else f"{kind}.weight", shapes[kind])
                for kind in names
                for layer in ([None] if kind in WHOLE else range(sizes["n_layers"]))
            ]
            wanted = HEADER[version] + 4 * sum(math.prod(shape) for _, shape in places)
            held = file.stat().st_size
            if held != wanted:
                raise DtLensError(
                    f"{file} begins like a model.bin of llama2.c, whose sizes ask for {wanted} bytes, and it has "
                    f"{held}; it may be truncated or another kind of file, so fetch it again."
                )
            stream.seek(HEADER[version])
            tensors = {
                key: torch.from_numpy(np.fromfile(stream, "<f4", math.prod(shape)).reshape(shape))
                for key, shape in places
            }
    except (OSError, ValueError) as error:
        raise DtLensError(f"{file} cannot be read: {because(error)}.") from error
    tensors.pop("freqs.weight", None)
    return tensors, {"model_args": sizes}


def _sizes(file: Path, head: bytes) -> tuple[int, dict[str, int], bool] | None:
    """The version, the sizes by name, and whether the unembedding is the token table."""
    if len(head) < HEADER[0]:
        return None
    version = 0
    if struct.unpack_from("<I", head)[0] == MAGIC:
        version = struct.unpack_from("<i", head, 4)[0]
        if version != 1:
            quantised = "holds 8-bit numbers" if version == 2 else "is not known here"
            raise DtLensError(
                f"{file} is a model.bin of llama2.c in version {version}, which {quantised}; export version 0 or 1, "
                "with float32 numbers."
            )
        if len(head) < HEADER[1]:
            raise DtLensError(f"{file} is a model.bin of llama2.c that ends within its header; fetch it again.")
    values = list(struct.unpack_from("<7i", head, 8 if version else 0))
    tied = bool(head[36]) if version else values[5] > 0
    if not version:
        values[5] = abs(values[5])
    sizes = dict(zip(SIZES, values, strict=True))
    possible = all(0 < value <= most for value, most in zip(values, MOST, strict=True))
    if not version and not possible:
        return None  # this form has no magic number
    dim, heads, kv = sizes["dim"], sizes["n_heads"], sizes["n_kv_heads"]
    if not possible or dim % heads or heads % kv:
        said = ", ".join(f"{name} {value}" for name, value in sizes.items())
        raise DtLensError(f"{file} begins like a model.bin of llama2.c with {said}, which no model can have.")
    return version, sizes, tied


def _shapes(sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The shape of each kind of tensor."""
    d, hidden, size = sizes["dim"], sizes["hidden_dim"], sizes["dim"] // sizes["n_heads"]
    kv, table = size * sizes["n_kv_heads"], (sizes["vocab_size"], d)
    return {
        "tok_embeddings": table,
        "output": table,
        "norm": (d,),
        "attention_norm": (d,),
        "ffn_norm": (d,),
        "attention.wq": (d, d),
        "attention.wk": (kv, d),
        "attention.wv": (kv, d),
        "attention.wo": (d, d),
        "feed_forward.w1": (hidden, d),
        "feed_forward.w2": (d, hidden),
        "feed_forward.w3": (hidden, d),
        "freqs": (sizes["max_seq_len"], size // 2),
    }
