"""On-disk cache of results that take long to compute, so that interrupted runs resume."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dt_lens.arguments import atomic_write
from dt_lens.lens.weights import hash_of
from dt_lens.version import __version__

__all__ = ["ResultCache"]

CHECKSUM = "dt_lens.checksum"  # in the file's metadata


class ResultCache:
    """Named tensors by key, one safetensors file each; a key names everything that the tensors depend on.

    The version of dt-lens is part of every key. Each file holds a checksum of its tensors: one that is damaged, if only
    in a single bit, is computed again.

    Args:
        folder: created if missing; ``None`` turns the cache off.

    Raises:
        DtLensError: when the folder cannot be created or written to.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder)

    def get(self, key: str, make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """The tensors stored under ``key``; if there are none, those that ``make`` returns, which are then stored."""
        if self.folder is None:
            return make()
        digest = hashlib.blake2b(f"{__version__} {key}".encode(), digest_size=16).hexdigest()
        file = self.folder / f"{digest}.safetensors"
        stored = _read(file, digest)
        if stored is not None:
            return stored
        made = {name: tensor.contiguous() for name, tensor in make().items()}
        with atomic_write(file, SafetensorError) as part:
            save_file(made, part, {CHECKSUM: _checksum(digest, made)})
        return made


def _read(file: Path, digest: str) -> Mapping[str, Tensor] | None:
    """The tensors in ``file``; ``None`` if it does not exist or is damaged."""
    try:
        with safe_open(file, "pt") as opened:
            said = (opened.metadata() or {}).get(CHECKSUM)
            stored = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError):
        return None
    return stored if said == _checksum(digest, stored) else None


def _checksum(digest: str, tensors: Mapping[str, Tensor]) -> str:
    """A hash of every bit of the tensors, and of the key that they belong to."""
    whole = hashlib.blake2b(digest.encode(), digest_size=16)
    for name in sorted(tensors):
        whole.update(name.encode() + hash_of(tensors[name]))
    return whole.hexdigest()
