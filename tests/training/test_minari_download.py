"""Without a network a data set that is not stored here is one sentence at once; a hub that answers is asked as ever."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dt_lens.errors import DtLensError
from dt_lens.training.minari_episodes import open_dataset


class Answer(BaseHTTPRequestHandler):
    """A hub that takes a while, and answers with an error."""

    asked: list[str] = []  # noqa: RUF012

    def do_HEAD(self) -> None:
        self.asked.append(self.path)
        time.sleep(0.3)
        self.send_response(503)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def _empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.delenv("MINARI_REMOTE", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("dt_lens.training.minari_episodes.PAUSE", 0.0)


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The data sets that Minari was asked to download."""
    asked: list[str] = []

    def download(dataset_id: str) -> None:
        asked.append(dataset_id)
        raise ValueError("Couldn't find any version")

    monkeypatch.setattr("minari.storage.hosting.download_dataset", download)
    return asked


@pytest.fixture
def slow_hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_no_network_is_one_sentence_and_no_download(downloads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound and not listening: a connection is refused
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(DtLensError, match=r"'some/data-v0' is not stored locally, and .* cannot be reached"):
            open_dataset("some/data-v0")
    assert downloads == []


def test_a_slow_hub_and_one_with_an_error_are_left_to_minari(
    downloads: list[str], slow_hub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", slow_hub)
    Answer.asked.clear()
    with pytest.raises(DtLensError, match="Couldn't find any version"):
        open_dataset("some/data-v0")
    assert downloads == ["some/data-v0"] and len(Answer.asked) == 1
    monkeypatch.setattr("dt_lens.training.minari_episodes.CONNECT", 0.05)  # slower than that is no error either
    with pytest.raises(DtLensError, match="Couldn't find any version"):
        open_dataset("some/data-v0")
    assert len(downloads) == 2


def test_another_place_of_data_sets_is_left_to_minari(downloads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("MINARI_REMOTE", "gcp://elsewhere")
    with pytest.raises(DtLensError, match="Couldn't find any version"):
        open_dataset("some/data-v0")
    assert downloads == ["some/data-v0"]
