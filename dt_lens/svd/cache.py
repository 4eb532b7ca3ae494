"""On-disk cache of results that take long to compute, so that interrupted runs resume."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dt_lens.arguments import atomic_write
from dt_lens.version import __version__

__all__ = ["ResultCache"]


class ResultCache:
    """Named tensors by key, one safetensors file each; a key names everything that the tensors depend on.

    The version of dt-lens is part of every key. A truncated or damaged file is computed again.

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
        if file.is_file():
            try:
                stored: Mapping[str, Tensor] = load_file(file)
                return stored
            except (SafetensorError, OSError, ValueError):
                pass  # truncated: computed again
        made = make()
        with atomic_write(file, SafetensorError) as part:
            save_file({name: tensor.contiguous() for name, tensor in made.items()}, part)
        return made
