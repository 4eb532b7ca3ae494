"""Every format in turn, and what holds of all: a file ends in one sentence or in the right answer."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dt_lens import DtLensError
from originals.formats import FOLDERS, NAMES, Format, every_format


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A property's number of examples: few in every run, which draws the same ones each time, all in ``make fuzz``."""
    if "size" in metafunc.fixturenames:
        few, all_of_them = metafunc.module.SIZES
        sizes = [pytest.param(few, id="short")]
        if os.environ.get("HYPOTHESIS_PROFILE") == "random":
            sizes.append(pytest.param(all_of_them, id="long", marks=pytest.mark.acceptance))
        metafunc.parametrize("size", sizes)


@pytest.fixture(scope="session")
def formats(make_hf: Any, make_batch: Any, make_lm: Any) -> dict[str, Format]:
    """All of them by name."""
    return every_format(make_hf, make_batch, make_lm)


@pytest.fixture(params=NAMES)
def made(request: pytest.FixtureRequest, formats: dict[str, Format]) -> Format:
    """Each in turn."""
    return formats[request.param]


@pytest.fixture(params=FOLDERS)
def opened(request: pytest.FixtureRequest, formats: dict[str, Format]) -> Format:
    """Each that ``open_checkpoint`` reads, in turn."""
    return formats[request.param]


@pytest.fixture
def scratch(tmp_path: Path) -> Callable[[], Any]:
    """A new empty folder each time, gone again afterwards: hypothesis runs a test's body many times."""
    numbers = iter(range(10**9))

    @contextmanager
    def fresh() -> Iterator[Path]:
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder)

    return fresh


def sentence(error: DtLensError) -> str:
    """What an error says, which must be one sentence."""
    message = str(error)
    assert message and message[-1] in ".?" and "\n" not in message and len(message) < 1500, message
    return message


@pytest.fixture(scope="session")
def law() -> Callable[..., str | None]:
    """A file ends in one sentence, which is returned, or in the right answer: ``None``."""

    def check(
        made: Format, path: Path, tensors: Mapping[str, Tensor] | None = None, given: Mapping[str, Any] | None = None,
        expected: Callable[[], Tensor] | None = None,
    ) -> str | None:  # fmt: skip
        try:
            lens = made.load(path, **(given or {}))
        except DtLensError as error:
            return sentence(error)
        wanted = made.theirs(path, made.tensors if tensors is None else tensors) if expected is None else expected()
        if not bool(torch.isfinite(wanted).all()):
            return None  # the code base itself has no answer
        try:
            got = made.mine(lens)
        except DtLensError as error:
            # max_position_embeddings below the question's length: rotary models of transformers answer all the same.
            message = sentence(error)
            assert "context" in message, message
            return message
        assert got.shape == wanted.shape
        off, size = float((got - wanted).abs().max()), max(1.0, float(wanted.abs().max()))
        assert off <= 1e-4 * size, f"a wrong answer: off by {off}, of {size}"
        return None

    return check


@contextmanager
def in_little_memory(most: int = 2**28) -> Iterator[None]:
    """Whatever is done here, the process does not grow by more than a quarter of a gigabyte."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < most, f"{grown / 2**20:.0f} MiB"


@pytest.fixture(scope="session")
def little_memory() -> Callable[[], Any]:
    """Inside it the process does not grow by more than a quarter of a gigabyte."""
    return in_little_memory


@pytest.fixture(scope="session")
def said() -> Callable[[DtLensError], str]:
    """What an error says, which must be one sentence."""
    return sentence
