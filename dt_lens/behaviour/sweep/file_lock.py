"""Who may write a sweep's file: one process at a time."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Self

from dt_lens.errors import DtLensError, unwritable

__all__ = ["Lock"]


class Lock:
    """Held by the one driver of a file, and by the system for it: it ends with the process, however that ends."""

    def __init__(self, file: Path) -> None:
        self.file = file.with_name(f"{file.name}.lock")
        self._sweep = file

    def __enter__(self) -> Self:
        while True:
            try:
                self._handle = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                raise unwritable(self._sweep, error) from error
            try:
                _lock(self._handle)
                # The last driver may have removed the file between the two lines above.
                if os.fstat(self._handle).st_ino == self.file.stat().st_ino:
                    return self
            except FileNotFoundError:
                pass
            except OSError as error:
                os.close(self._handle)
                if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                    raise unwritable(self._sweep, error) from error
                raise DtLensError(
                    f"Another process is running the sweep in {self._sweep}; wait for it, or give another folder."
                ) from None
            os.close(self._handle)

    def __exit__(self, *_: object) -> None:
        if os.name == "posix":
            self.file.unlink(missing_ok=True)  # while it is still held, so that nobody holds a file that is gone
            os.close(self._handle)
        else:
            os.close(self._handle)
            with contextlib.suppress(OSError):
                self.file.unlink()


def _lock(handle: int) -> None:
    if os.name == "posix":
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        import msvcrt

        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
