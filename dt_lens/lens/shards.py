"""Read a safetensors checkpoint one tensor at a time: the files are mapped into memory, not loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dt_lens.arguments import local_path
from dt_lens.errors import DtLensError, because
from dt_lens.lens.checkpoints import read_index, read_json
from dt_lens.lens.printing import listed
from dt_lens.lens.remedies import refuse_pointer

__all__ = ["LazyTensors", "Shards"]

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class Shards:
    """The tensors in a folder in Hugging Face's form (one ``model.safetensors``, or shards and their index).

    Attributes:
        folder: where the files are.
        config: the values of ``config.json``; empty where there is none.
        files: the file of every tensor, by its key.
        shapes: the shape of every tensor, by its key.

    Raises:
        DtLensError: for a folder without safetensors, a shard that is missing or cut off, or an index that names a
            tensor that its shard does not hold.
    """

    def __init__(self, path: str | Path) -> None:
        path = local_path(path, "path")
        try:
            (path / "config.json").exists()
        except OSError as error:  # a folder that may not be entered
            raise DtLensError(f"{str(path)[:200]!r} cannot be accessed: {because(error)}.") from error
        single = path if path.is_file() else path / SINGLE
        self.folder = path.parent if path.is_file() else path
        if not self.folder.is_dir():
            raise DtLensError(f"There is no folder {str(path)!r}; give the folder of a checkpoint.")
        config, index = self.folder / "config.json", self.folder / INDEX
        self.config: Mapping[str, Any] = read_json(config) if config.exists() else {}
        named: Mapping[str, str] | None = None
        if path.is_dir() and index.exists():
            named = read_index(index)
            found = [self.folder / name for name in sorted(set(named.values()))]
        elif single.is_file() and single.suffix == ".safetensors":
            found = [single]
        else:
            raise DtLensError(
                f"The folder {self.folder} holds no {SINGLE} and no {INDEX}; only safetensors can be read in place, so "
                "use dt_lens.load, or save the model with save_pretrained."
            )
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in found:
            for key, shape in _header(file).items():
                if key in self.files:
                    raise DtLensError(f"The tensor {key!r} is in {self.files[key].name} and in {file.name}; keep one.")
                self.files[key], self.shapes[key] = file, shape
        for key, name in (named or {}).items():
            if self.files.get(key) != self.folder / name:
                raise DtLensError(f"{INDEX} says that {name} holds the tensor {key!r}, and it does not.")

    def read(self, key: str, take: Callable[[Any], Tensor]) -> Tensor:
        """Open the file that holds ``key``, and return what ``take`` reads from it.

        A tensor stays mapped as long as something refers to it; after that it takes no memory.
        """
        file = self.files[key]
        try:
            with safe_open(file, framework="pt") as opened:
                return take(opened)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise DtLensError(f"The tensor {key!r} cannot be read from {file}: {because(error)}.") from error


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    if file.exists() and not file.is_file():  # opening a pipe may never end
        raise DtLensError(f"{file} is not a file; fetch it again.")
    refuse_pointer(file)
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        missing = "is missing" if not file.exists() else f"is not a complete safetensors file ({because(error)})"
        raise DtLensError(f"{file} {missing}; fetch it again.") from error


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each read from its file at every access; nothing is kept.

    Args:
        readers: a function for each name.
    """

    def __init__(self, readers: Mapping[str, Callable[[], Tensor]]) -> None:
        self._readers = readers

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def __contains__(self, name: object) -> bool:
        return name in self._readers

    def __repr__(self) -> str:
        return f"{len(self)} weights, each read from its file at every access: {listed(self)}"
