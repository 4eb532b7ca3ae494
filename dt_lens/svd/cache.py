"""A folder in which finished pieces of a long computation wait for the next time it is started."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dt_lens.arguments import atomic_write
from dt_lens.version import __version__

__all__ = ["KeptResults"]


class KeptResults:
    """Named tensors by key, a safetensors file each; a key says everything that the tensors depend on.

    A file that was cut off, or that somebody damaged, counts as not there.

    Args:
        folder: made when it is not there; nothing is kept when ``None``.

    Raises:
        DtLensError: when the folder cannot be made or written to.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder)

    def get(self, key: str, make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """What is kept under ``key``, or else what ``make`` gives, which is kept from then on."""
        if self.folder is None:
            return make()
        digest = hashlib.blake2b(f"{__version__} {key}".encode(), digest_size=16).hexdigest()
        file = self.folder / f"{digest}.safetensors"
        if file.is_file():
            try:
                kept: Mapping[str, Tensor] = load_file(file)
                return kept
            except (SafetensorError, OSError, ValueError):
                pass  # cut off: made again
        made = make()
        with atomic_write(file, SafetensorError) as part:
            save_file({name: tensor.contiguous() for name, tensor in made.items()}, part)
        return made
