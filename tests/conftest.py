"""Shapes in signatures are checked at run time wherever the tests run (jaxtyping with beartype)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from beartype import beartype
from jaxtyping import install_import_hook

# The modules whose signatures tell shapes.
CHECKED = [
    "dt_lens.behaviour.windows",
    "dt_lens.decision_transformer.model",
    "dt_lens.decision_transformer.policy",
    "dt_lens.decompose",
    "dt_lens.directions",
    "dt_lens.edits",
    "dt_lens.embeddings",
    "dt_lens.matrices",
    "dt_lens.nulls",
    "dt_lens.svd",
]
SHAPED = re.compile(r"\b(Float|Int|Bool|Shaped|Num)\[")


def shapes_only(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check the annotations that tell shapes; mypy has checked the others."""
    function.__annotations__ = {
        name: hint for name, hint in function.__annotations__.items() if SHAPED.search(str(hint))
    }
    return beartype(function)


# Before anything imports them: the hook rewrites modules as they are read.
install_import_hook(CHECKED, f"{__name__}.shapes_only")
