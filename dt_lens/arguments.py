"""Check what a caller passed in: numbers, names, paths, models, activations; and write files whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import operator
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any, TypeGuard

from dt_lens.errors import DtLensError, a_type, as_written, nearest, unwritable

__all__ = [
    "LAST_SEED",
    "as_json",
    "as_list",
    "atomic_write",
    "finite_numbers",
    "is_finite_number",
    "local_path",
    "names",
    "read_checked_json",
    "refuse_unknown",
    "require_activations",
    "require_offers",
    "require_wrapped",
    "require_writable",
    "truth_value",
    "whole_number",
    "whole_numbers",
    "write_checked_json",
]


LAST_SEED = 2**63 - 1  # seeds are kept in arrays and in SQLite, whose integers have 64 bits


def whole_number(value: Any, name: str, least: int | None = None, most: int | None = None) -> int:
    """``value`` as an int from ``least`` to ``most``, or to the last of 64 bits; NumPy's integers are accepted.

    Raises:
        DtLensError: for anything else, under its ``name``.

    >>> whole_number(3, "k", 1)
    3
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is not None and most is None and number > LAST_SEED:
        most = LAST_SEED
    if number is None or (least is not None and number < least) or (most is not None and number > most):
        lower = "" if least is None else f" of at least {least}"
        upper = "" if most is None else f"{' and' if lower else ' of'} at most {most}"
        raise DtLensError(f"{name} is {as_written(value)}; it must be a whole number{lower}{upper}.")
    return number


def truth_value(value: Any, name: str) -> bool:
    """``value`` as a bool.

    Raises:
        DtLensError: for anything but ``True`` and ``False``, under its ``name``.

    >>> truth_value(True, "fold_layernorm")
    True
    """
    if type(value).__name__ != "bool":  # Python's or NumPy's
        raise DtLensError(f"{name} is {as_written(value)}; it must be True or False.")
    return bool(value)


def whole_numbers(value: Any, name: str, least: int | None = None) -> list[int]:
    """One whole number or several, in a list, an array or a tensor; raises as ``whole_number`` does.

    >>> whole_numbers(3, "k"), whole_numbers(range(2), "k")
    ([3], [0, 1])
    """
    plain = value.tolist() if hasattr(value, "tolist") else value
    several = isinstance(plain, Sequence) and not isinstance(plain, str | bytes)
    return [whole_number(one, name, least) for one in (plain if several else [plain])]


def is_finite_number(value: Any) -> TypeGuard[float]:
    """Whether ``value`` is a number that a float can hold: no truth value, NaN or infinity, and no ``10**400``.

    >>> is_finite_number(1), is_finite_number(10**400), is_finite_number(True)
    (True, False, False)
    """
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(float(value))
    except OverflowError:
        return False


def finite_numbers(value: Any, name: str) -> list[float]:
    """Several numbers, in a list, an array or a tensor, none of them NaN or infinite.

    Raises:
        DtLensError: for anything else, under its ``name``.

    >>> finite_numbers((1, 2.5), "doses")
    [1.0, 2.5]
    """
    plain = value.tolist() if hasattr(value, "tolist") else value
    several = plain if isinstance(plain, Iterable) and not isinstance(plain, str | bytes) else [None]
    found: list[float] = []
    for one in several:
        if not is_finite_number(one):
            raise DtLensError(f"{name} is {as_written(value, 200)}; it must be several finite numbers.")
        found.append(float(one))
    return found


def names(value: Any, name: str) -> list[str]:
    """One name (or pattern of names) or several.

    Raises:
        DtLensError: if it is not text or there is none, under its ``name``.

    >>> names("*.W_in", "matrices")
    ['*.W_in']
    """
    if isinstance(value, str):
        return [value]
    try:
        several = list(value)
    except TypeError:
        several = [None]
    if not all(isinstance(one, str) for one in several):
        raise DtLensError(f"{name} is {value!r}; it must be a name or pattern, as text, or several.")
    if not several:
        raise DtLensError(f"{name} is empty; give at least one name or pattern, or None for all.")
    return several


def local_path(value: Any, name: str) -> Path:
    """``value`` as the path of a file or folder, which need not exist.

    Raises:
        DtLensError: for something that cannot be a path, under its ``name``.

    >>> local_path("runs/sweep", "out").name
    'sweep'
    """
    try:
        text = os.fspath(value)
    except TypeError:
        text = None
    if not isinstance(text, str) or "\0" in text:
        raise DtLensError(
            f"{name} is {str(value)[:200]!r}; it must be the path of a file or folder, as text or a Path."
        )
    return Path(text)


@contextmanager
def atomic_write(file: Path, *errors: type[Exception]) -> Iterator[Path]:
    """Write ``file`` whole or not at all: yields a path to write to, which replaces ``file`` when the block ends.

    The path lies in the same folder and ends with the file's name, so that libraries that go by the suffix write the
    right format. The folder is made if it does not exist. If the block raises anything, what was written is removed and
    an old ``file`` stays as it was. A device or a pipe, such as ``/dev/stdout``, is written to directly.

    Args:
        file: where the contents should be.
        errors: what the block raises for a file that cannot be written, besides ``OSError``.

    Raises:
        DtLensError: when the file cannot be written, with the reason.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "made" / "numbers.csv"
    >>> with atomic_write(file) as part:
    ...     _ = part.write_text("1,2")
    >>> file.read_text(), len(list(file.parent.iterdir()))
    ('1,2', 1)
    """
    refused: tuple[type[Exception], ...] = (OSError, *errors)
    try:
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if file.exists() and not file.is_file():
            yield file
            return
        target = file.resolve()  # a link stays a link
        part = target.with_name(f".part-{os.getpid()}-{threading.get_ident()}-{target.name[-50:]}")
        if not target.parent.exists():  # where it is a file, the next step says so
            target.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.touch()
            mode = part.stat().st_mode
            yield part
            part.chmod(mode)  # safetensors makes a file that only its owner may read
            with part.open("rb+") as written:
                os.fsync(written.fileno())  # some disks report that they are full only now
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    except refused as error:
        raise unwritable(file, error) from error


def require_writable(*files: Path | None) -> None:
    """Raise ``DtLensError`` now, before long work, for a file that could not be written at its end; skips ``None``.

    Nothing is left behind and no folder is made: a file without a name is written to the nearest folder that exists.

    >>> require_writable(Path("/dev/null/table.csv"))
    Traceback (most recent call last):
    dt_lens.errors.DtLensError: /dev/null/table.csv cannot be written: Not a directory; choose another folder or ...
    """
    for file in files:
        try:
            if file is None or (file.exists() and not (file.is_file() or file.is_dir())):
                continue  # a device or a pipe
            if file.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            folder = Path(os.path.realpath(file)).parent
            while not folder.exists() and folder != folder.parent:
                folder = folder.parent
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(bytes(4096))
        except OSError as error:
            raise unwritable(file, error) from error


def write_checked_json(file: Path, value: Any) -> None:
    """Write plain JSON values with a checksum, for ``read_checked_json``; raises as ``atomic_write`` does.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "kept.json"
    >>> write_checked_json(file, {"sigma": 3.05})
    >>> read_checked_json(file)
    {'sigma': 3.05}
    >>> _ = file.write_text(file.read_text().replace("3.05", "6.11"))
    >>> read_checked_json(file) is None
    True
    """
    value = json.loads(json.dumps(value))  # as it will be read
    with atomic_write(file) as part:
        part.write_text(json.dumps({"checksum": _checksum(value), "value": value}) + "\n", encoding="utf-8")


def read_checked_json(file: Path) -> Any:
    """What ``write_checked_json`` wrote to ``file``; ``None`` if there is no such file or any bit of it has changed."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        return kept["value"] if kept["checksum"] == _checksum(kept["value"]) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _checksum(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def refuse_unknown(given: Mapping[str, Any], known: set[str]) -> None:
    """Raise ``DtLensError`` for a keyword of ``load`` or ``wrap`` that the model's adapter does not know.

    Also for an ``ignore_options`` that is not a list of names.
    """
    for name in given:
        if name not in known:
            raise DtLensError(
                f"Unknown option {name!r} for this model; it takes {', '.join(sorted(known))}." + nearest(name, known)
            )
    ignored = given.get("ignore_options", ())
    if not isinstance(ignored, (list, tuple, set, frozenset)) or not all(isinstance(name, str) for name in ignored):
        raise DtLensError(f"ignore_options is {str(ignored)[:80]!r}; it must be a list of names of options.")


def require_wrapped(model: Any, caller: str, *offers: str) -> None:
    """Raise ``DtLensError`` unless ``model`` has the attributes of a wrapped model that ``caller`` needs."""
    if not all(hasattr(model, name) for name in offers):
        raise not_wrapped(model, caller)


def not_wrapped(model: Any, caller: str) -> DtLensError:
    """The error of ``caller`` for something that is not a wrapped model."""
    return DtLensError(f"{caller} takes a wrapped model, not {a_type(model)}; call dt_lens.wrap or dt_lens.load first.")


def require_offers(value: Any, name: str, wanted: str, *offers: str) -> None:
    """Raise ``DtLensError`` unless ``value`` has all of these attributes, which makes it ``wanted``.

    >>> require_offers(3, "table", "a table of a scan", "columns")
    Traceback (most recent call last):
    dt_lens.errors.DtLensError: table is an int; it must be a table of a scan.
    """
    if isinstance(value, type) or not all(hasattr(value, offer) for offer in offers):
        raise DtLensError(f"{name} is {a_type(value)}; it must be {wanted}.")


def require_activations(given: Any) -> None:
    """Raise ``DtLensError`` unless ``given`` is a result of ``dt_lens.collect_activations``."""
    require_offers(given, "activations", "a result of collect_activations", "inputs")


def as_json(value: Any) -> Any:
    """As JSON gives it back; what has no form there, such as a function, becomes its ``repr``."""

    def listed(other: Any) -> Any:
        import numpy as np

        if isinstance(other, np.dtype) or (isinstance(other, type) and issubclass(other, np.generic)):
            return np.dtype(other).name
        return other.tolist() if hasattr(other, "tolist") and not isinstance(other, type) else repr(other)

    return json.loads(json.dumps(value, default=listed))


def as_list(given: Any) -> list[Any]:
    """``given`` as a list; text, a mapping or a single value becomes a list of one.

    >>> as_list("zero"), as_list(("zero", 2)), as_list(None)
    (['zero'], ['zero', 2], [None])
    """
    try:
        return [given] if isinstance(given, str | Mapping) else list(given)
    except TypeError:  # not iterable
        return [given]
