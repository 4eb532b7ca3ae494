"""What an environment looks like now, as a few numbers that a browser draws: bodies from the side, or a grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["picture_of"]

_SPHERE, _CAPSULE, _ELLIPSOID, _CYLINDER, _BOX = 2, 3, 4, 5, 6  # MuJoCo's kinds of shapes


def picture_of(env: Any) -> dict[str, Any] | None:
    """A picture of an environment: MuJoCo's bodies, a MiniGrid, or Gymnasium's Taxi; ``None`` for any other.

    Bodies: ``{"kind": "body", "parts": [[x1, z1, x2, z2, radius], ...], "at": x}`` in metres, from the side.
    Grids: ``{"kind": "grid", "width", "height", "cells": [[x, y, what, colour], ...], "walls": [[x, y1, y2], ...],
    "agent": [x, y, direction]}``; ``direction`` is 0 for right, then clockwise, or ``None``.
    """
    base = env.unwrapped
    if hasattr(base, "model") and hasattr(getattr(base, "data", None), "geom_xpos"):
        return _bodies(base.model, base.data)
    if hasattr(base, "grid") and hasattr(base, "agent_pos"):
        return _minigrid(base)
    if type(base).__name__ == "TaxiEnv" and hasattr(base, "decode"):
        return _taxi(base)
    return None


def _bodies(model: Any, data: Any) -> dict[str, Any]:
    parts = []
    for geom in np.flatnonzero(model.geom_bodyid > 0):  # body 0 is the world: the floor
        kind, size, centre = int(model.geom_type[geom]), model.geom_size[geom], data.geom_xpos[geom]
        half = 0.0
        if kind in (_CAPSULE, _CYLINDER):
            half = size[1]
        elif kind not in (_SPHERE, _ELLIPSOID, _BOX):
            continue
        axis = half * data.geom_xmat[geom].reshape(3, 3)[:, 2]
        # Seen from the side and a little from the front and above, so that legs that stand abreast are apart.
        ends = [_seen(centre - axis), _seen(centre + axis)]
        parts.append([*ends[0], *ends[1], round(float(size[0]), 3)])
    return {"kind": "body", "parts": parts, "at": round(float(data.xpos[1][0]), 3)}


def _seen(point: Sequence[float]) -> tuple[float, float]:
    return round(float(point[0] - 0.35 * point[1]), 3), round(float(point[2] + 0.12 * point[1]), 3)


def _minigrid(base: Any) -> dict[str, Any]:
    cells = []
    for x in range(base.grid.width):
        for y in range(base.grid.height):
            found = base.grid.get(x, y)
            if found is not None:
                what = found.type
                if what == "door":
                    what = "door open" if found.is_open else "door locked" if found.is_locked else "door"
                cells.append([x, y, what, found.color])
    carried = base.carrying
    return {
        "kind": "grid",
        "width": base.grid.width,
        "height": base.grid.height,
        "cells": cells,
        "walls": [],
        "agent": [int(base.agent_pos[0]), int(base.agent_pos[1]), int(base.agent_dir)],
        "carries": None if carried is None else f"{carried.color} {carried.type}",
    }


def _taxi(base: Any) -> dict[str, Any]:
    row, column, passenger, destination = base.decode(base.s)
    cells = []
    for number, (r, c) in enumerate(base.locs):
        cells.append([c, r, "destination" if number == destination else "stand", "RGYB"[number]])
        if number == passenger:
            cells.append([c, r, "passenger", "RGYB"[number]])
    # In the map a colon between two cells is a way and a bar is a wall.
    walls = [[c + 1, r, r + 1] for r in range(5) for c in range(4) if base.desc[1 + r][2 * c + 2] in (b"|", "|")]
    return {
        "kind": "grid",
        "width": 5,
        "height": 5,
        "cells": cells,
        "walls": walls,
        "agent": [int(column), int(row), None],
        "carries": "the passenger" if passenger == 4 else None,
    }
