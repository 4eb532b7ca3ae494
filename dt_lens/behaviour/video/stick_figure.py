"""A MuJoCo agent as a stick figure, drawn from the positions of its bodies: where there is no OpenGL library."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["stick_figure"]

_PAGE, _GROUND, _LIMB, _JOINT = (238, 241, 244), (150, 158, 168), (0, 90, 143), (213, 94, 0)
_TALL = 2.4  # metres that the picture shows from top to bottom, at least
_FINER = 2  # pixels drawn for each that is kept, so that lines are smooth
_TURN = np.deg2rad(20.0)  # how far the view of an agent that moves in space is turned from its side
_SPHERE, _CAPSULE = 2, 3  # MuJoCo's mjGEOM_SPHERE and mjGEOM_CAPSULE


def stick_figure(env: Any, size: int) -> npt.NDArray[np.uint8]:
    """The agent from its side, ``[size, size, 3]``; the view follows it.

    Capsules are drawn as thick lines and spheres as discs, each as large as it is; a body with other shapes is joined
    with its parent by a line.

    Raises:
        RuntimeError: for an environment without MuJoCo's bodies.
    """
    from PIL import Image, ImageDraw

    model, data = getattr(env.unwrapped, "model", None), getattr(env.unwrapped, "data", None)
    if model is None or data is None or not hasattr(data, "xpos") or not hasattr(model, "body_parentid"):
        raise RuntimeError(f"{env.spec.id} has no bodies to draw as a stick figure")
    across = _across(model)
    positions = np.asarray(data.xpos, dtype=np.float64)
    moving = np.array([bool(_root(model, body)) for body in range(model.nbody)])
    if not moving.any():
        moving[1:] = True
    extent = float(np.ptp(positions[moving] @ across)) if moving.any() else 0.0
    tall = max(_TALL, 1.3 * float(positions[moving, 2].max(initial=0.0)), 1.2 * extent)
    middle = float((positions[moving] @ across).mean())
    pixels = size * _FINER
    scale = pixels / tall
    floor = pixels * 0.86

    def at(point: npt.NDArray[np.float64]) -> tuple[float, float]:
        return pixels / 2 + (float(point @ across) - middle) * scale, floor - float(point[2]) * scale

    image = Image.new("RGB", (pixels, pixels), _PAGE)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, floor, pixels, pixels), fill=(222, 226, 231))
    draw.line((0, floor, pixels, floor), fill=_GROUND, width=2 * _FINER)
    for metre in range(int(np.floor(middle - tall)), int(np.ceil(middle + tall)) + 1):  # marks that show the way made
        x = pixels / 2 + (metre - middle) * scale
        draw.line((x, floor, x, floor + 7 * _FINER), fill=_GROUND, width=_FINER)
    for one, other, radius in _limbs(model, data):
        ends = at(one), at(other)
        width = max(2.0 * _FINER, 2 * radius * scale)
        draw.line((*ends[0], *ends[1]), fill=_LIMB, width=round(width))
        for x, y in ends:
            draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=_LIMB)
    for joint in range(model.njnt):
        if int(model.jnt_type[joint]) == 3:  # a hinge
            x, y = at(np.asarray(data.xanchor[joint], dtype=np.float64))
            dot = 2.2 * _FINER
            draw.ellipse((x - dot, y - dot, x + dot, y + dot), fill=_JOINT)
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS), dtype=np.uint8)


def _across(model: Any) -> npt.NDArray[np.float64]:
    """The direction in space that goes from left to right in the picture, ``[3]``."""
    # An agent that moves in a plane does not move along y; one that moves in space has a free joint (type 0).
    free = any(int(kind) == 0 for kind in model.jnt_type)
    turn = _TURN if free else 0.0
    return np.array([np.cos(turn), np.sin(turn), 0.0])


def _root(model: Any, body: int) -> int:
    """The body below the world that ``body`` hangs from, if a joint moves it; else 0."""
    root = int(model.body_rootid[body])
    return root if root and int(model.body_jntnum[root]) else 0


def _limbs(model: Any, data: Any) -> list[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], float]]:
    """Both ends and the radius of what is drawn as a line, in metres; the ends of a sphere are equal."""
    found: list[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], float]] = []
    drawn = set[int]()
    for geom in range(model.ngeom):
        body, kind = int(model.geom_bodyid[geom]), int(model.geom_type[geom])
        centre = np.asarray(data.geom_xpos[geom], dtype=np.float64)
        if body == 0 or kind not in (_SPHERE, _CAPSULE):
            continue
        radius, half = float(model.geom_size[geom][0]), float(model.geom_size[geom][1])
        along = np.asarray(data.geom_xmat[geom], dtype=np.float64).reshape(3, 3)[:, 2] * (half * (kind == _CAPSULE))
        found.append((centre - along, centre + along, radius))
        drawn.add(body)
    for body in range(1, model.nbody):
        parent = int(model.body_parentid[body])
        if body not in drawn and parent:
            one, other = (np.asarray(data.xpos[i], dtype=np.float64) for i in (parent, body))
            found.append((one, other, 0.0))
    return found
