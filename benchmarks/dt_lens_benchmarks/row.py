"""``Row``: one measured figure beside that of its peer."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Row"]


class Row(NamedTuple):
    """One figure of ours and the peer's, measured in turn in one process tree.

    Attributes:
        what: what was measured.
        ours: our figure, in ``unit``.
        unit: such as ``"steps/s"``, ``"s"`` or ``"MB"``.
        peer: what it is compared with, by name.
        peer_value: the peer's figure, in the same unit.
        ratio: ours against the peer's, so that more is better: of times the peer's by ours, of rates ours by the
            peer's.
        wanted: what the ratio, or our figure, should be, as text, such as ``"at least 7.5"``; empty if nothing is
            asked.
        met: whether it is; ``None`` where nothing is asked.
        note: what a reader must know beside it.
    """

    what: str
    ours: float
    unit: str
    peer: str
    peer_value: float
    ratio: float
    wanted: str = ""
    met: bool | None = None
    note: str = ""
