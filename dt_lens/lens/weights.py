"""Hashes of weights, and checks that they are finite and that a forward pass can use them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dt_lens.errors import DtLensError
from dt_lens.lens.matrices import Matrix, Weighted

__all__ = [
    "CHUNK",
    "DTYPES",
    "all_finite",
    "checksum",
    "checksum_of",
    "require_computable",
    "fingerprint",
    "hash_of",
    "memory_of",
    "memory_order",
    "replaced",
    "same_bits",
    "weight_bytes",
]

CHUNK = 2**17  # entries of a weight that are converted to float64 at a time, so that memory never holds all of it twice
COLUMNS = 4096  # of the table in which a weight's bits are summed
PIECE = 2**20  # entries that are compared at a time
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def fingerprint(lens: Weighted, matrix: Matrix) -> bytes:
    """A hash of every bit of the weights that a matrix is computed from, its LayerNorm's scale included."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in _parts(lens, matrix):
        digest.update(name.encode())
        digest.update(hash_of(weight))
    return digest.digest()


def _parts(lens: Weighted, matrix: Matrix) -> list[tuple[str, Tensor]]:
    """The weights that a matrix is computed from, by name and head."""
    weights, parts = lens.weights, []
    for factor in matrix.factors:
        weight = weights[factor.weight]
        parts.append((f"{factor.weight} {factor.head}", weight if factor.head is None else weight[factor.head]))
    norms = dict.fromkeys(norm for norm in (matrix.left_norm, matrix.right_norm) if norm is not None)
    return parts + [(f"{norm}.w", weights[f"{norm}.w"]) for norm in norms]


def checksum(lens: Weighted, matrix: Matrix) -> tuple[Any, ...]:
    """``fingerprint`` at a fraction of its time: sums of the bits along rows and columns, and a hash of these.

    Any change of one weight shows, and any exchange of two. For comparisons within a process; what is kept on disk goes
    by ``fingerprint``.
    """
    return tuple(checksum_of(weight) for _, weight in _parts(lens, matrix))


def checksum_of(tensor: Tensor) -> tuple[Any, ...]:
    """What ``checksum`` says of one tensor."""
    tensor = tensor.detach()
    return _sums(tensor), tensor.dtype, tuple(tensor.shape), tuple(memory_order(tensor))


def _sums(tensor: Tensor) -> bytes:
    """A hash of the sums of a tensor's bits, taken as whole numbers of 8 bytes, along rows and columns of a table."""
    flat = tensor.permute(memory_order(tensor)).contiguous().reshape(-1).view(torch.uint8)
    end = len(flat) // (8 * COLUMNS) * (8 * COLUMNS)
    digest = hashlib.blake2b(_memory(flat[end:]), digest_size=16)
    if end:
        if flat.storage_offset() % 8:  # whole numbers of 8 bytes begin at multiples of 8
            flat = flat.clone()
        table = flat[:end].view(torch.int64).view(-1, COLUMNS)
        columns, rows = table.new_zeros(COLUMNS), []
        for piece in torch.split(table, 64):  # that fits into the processor's cache is read twice
            columns += piece.sum(0)
            rows.append(piece.sum(1))
        for sums in (columns, torch.cat(rows)):
            digest.update(_memory(sums))
    return digest.digest()


def hash_of(tensor: Tensor) -> bytes:
    """A hash of every bit of a tensor, its type and its shape."""
    digest = hashlib.blake2b(f"{tensor.dtype} {list(tensor.shape)} {memory_order(tensor)}".encode(), digest_size=16)
    digest.update(_memory(tensor))
    return digest.digest()


def memory_order(tensor: Tensor) -> list[int]:
    """The axes of a tensor in the order in which they lie in memory, the slowest first."""
    strides: Sequence[int] = tensor.stride()
    return sorted(range(tensor.ndim), key=lambda axis: (-strides[axis], axis))


def _memory(tensor: Tensor) -> memoryview:
    """A tensor's bits in memory order, so that a large transposed weight is not copied."""
    flat = tensor.detach().permute(memory_order(tensor)).contiguous().cpu().reshape(-1)
    return flat.view(torch.uint8).numpy().data


@contextmanager
def replaced(weights: Mapping[str, Tensor], change: Mapping[str, Tensor]) -> Iterator[None]:
    """Write other values into live weights, and put their own back, bit for bit. Called without gradients."""
    before = {name: weights[name].clone() for name in change}
    try:
        for name, value in change.items():
            weights[name].copy_(value)
        yield
    finally:
        for name, value in before.items():
            weights[name].copy_(value)


def memory_of(weight: Tensor) -> tuple[Any, ...]:
    """A key that is equal for two names of one weight: layers may share their memory."""
    return weight.data_ptr(), weight.device, weight.shape, weight.stride()


def weight_bytes(weight: Tensor) -> bytes:
    """The bits of a tensor, in the order of its entries."""
    return weight.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit: -0.0 differs from 0.0, and a NaN equals itself."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    a, b = a.detach(), b.detach()
    if a.ndim and a.stride() == b.stride():  # in memory order, so that neither is copied
        order = memory_order(a)
        a, b = a.permute(order), b.permute(order)
    step = max(1, PIECE // max(1, a[0].numel())) if a.ndim and len(a) else 1
    if not a.ndim:
        return bool(a.reshape(1).view(bits) == b.reshape(1).view(bits))
    for some, others in zip(torch.split(a, step), torch.split(b, step), strict=True):
        x, y = some.contiguous().reshape(-1), others.contiguous().reshape(-1)
        places = len(x), x.storage_offset(), y.storage_offset()
        wide = all(place * x.element_size() % 8 == 0 for place in places)  # as many bits in fewer numbers
        if not torch.equal(*(piece.view(torch.int64 if wide else bits) for piece in (x, y))):
            return False
    return True


def require_computable(weights: Mapping[str, Tensor]) -> None:
    """Raise ``DtLensError`` for weights that cannot run: not floating-point, or of several types or devices."""
    for name, weight in weights.items():
        if weight.dtype not in DTYPES:
            raise DtLensError(
                f"The weight {name!r} holds {str(weight.dtype).removeprefix('torch.')} numbers; weights must be "
                "float64, float32, bfloat16 or float16."
            )
        if weight.is_meta:
            raise DtLensError(f"The weight {name!r} is on the meta device and holds no numbers; load the model first.")
    kinds = {(str(weight.dtype), str(weight.device)): name for name, weight in weights.items()}
    if len(kinds) > 1:
        (kind, name), (other, second) = list(kinds.items())[:2]
        raise DtLensError(
            f"The weight {name!r} is {kind[0]} on {kind[1]} and {second!r} is {other[0]} on {other[1]}; convert "
            "the model to one type and one device with .to()."
        )


def all_finite(weight: Tensor) -> bool:
    """Whether every entry is finite, without the copies that ``isfinite`` makes of a large weight."""
    outer = max(range(weight.ndim), key=weight.stride)
    step = max(1, CHUNK * weight.shape[outer] // max(1, weight.numel()))
    return all(bool(torch.isfinite(end)) for part in torch.split(weight, step, outer) for end in part.aminmax())
