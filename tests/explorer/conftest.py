"""A small random agent, explored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dt_lens.explorer.explored import Explored


@pytest.fixture(scope="session")
def explored(make_dt: Callable[..., Any]) -> Explored:
    return Explored.of("a random agent", make_dt(0))
