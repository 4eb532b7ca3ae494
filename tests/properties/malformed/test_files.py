"""Files that are cut off, damaged, hostile, or not files: one sentence, nothing run, and never another model."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import dt_lens
from dt_lens import DtLensError

SIZES = (6, 80)  # examples of a property in every run, and in make fuzz
SETTINGS = settings(deadline=None, database=None, phases=[Phase.generate, Phase.shrink])


def weights(path: Path) -> list[Path]:
    """The files that hold numbers."""
    return [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix in (".safetensors", ".bin"))


def test_a_file_that_was_cut_off(made: Any, scratch: Any, law: Any, size: int) -> None:
    @settings(SETTINGS, max_examples=size)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        with scratch() as folder:
            file = data.draw(st.sampled_from(weights(path := made.write(folder, made.tensors))))
            whole = file.read_bytes()
            at = data.draw(st.one_of(st.integers(0, 400), st.integers(0, len(whole) - 1)))
            file.write_bytes(whole[: min(at, len(whole) - 1)])
            message = law(made, path)
            assert message is not None and str(file.name) in message, message

    check()


def test_damaged_bytes(made: Any, scratch: Any, law: Any, little_memory: Any, size: int) -> None:
    """A zip has checksums, so that it is refused or none the worse; safetensors is what its header says that it is."""

    @settings(SETTINGS, max_examples=2 * size)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        with scratch() as folder:
            file = data.draw(st.sampled_from(weights(path := made.write(folder, made.tensors))))
            whole = bytearray(file.read_bytes())
            head = struct.unpack("<Q", whole[:8])[0] + 8 if file.suffix == ".safetensors" else 3000
            if file.suffix == ".d3":  # its configuration has no checksum
                whole, rest = whole[: (end := whole.rindex(b"config\x94"))], whole[end:]
            else:
                rest = bytearray()
            for _ in range(data.draw(st.integers(1, 3))):
                near = data.draw(st.sampled_from([head, len(whole)] if made.zipped else [head]))
                at = data.draw(st.one_of(st.integers(0, near - 1), st.integers(len(whole) - 900, len(whole) - 1)))
                at = at if made.zipped else at % head
                whole[at] = data.draw(st.integers(0, 255))
            file.write_bytes(bytes(whole + rest))
            with little_memory():
                law(made, path)

    check()


def test_bytes_of_anything(made: Any, scratch: Any, law: Any, little_memory: Any, size: int) -> None:
    @settings(SETTINGS, max_examples=size)
    @given(data=st.data(), content=st.binary(max_size=400), start=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02"]))
    def check(data: st.DataObject, content: bytes, start: bytes) -> None:
        with scratch() as folder:
            file = data.draw(st.sampled_from(weights(path := made.write(folder, made.tensors))))
            file.write_bytes(start + content)
            with little_memory():
                assert law(made, path) is not None

    check()


class Hostile:
    """Leaves a folder behind when it is unpickled with code allowed."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return (self.call, self.arguments)


def hostile_file(kind: str, trace: Path, tensors: Mapping[str, Any]) -> bytes:
    """A file that would make ``trace`` if its pickle were obeyed."""
    calls = {
        "mkdir": Hostile(os.mkdir, str(trace)),
        "system": Hostile(os.system, f"mkdir {trace}"),
        "eval": Hostile(eval, f"__import__('os').mkdir({str(trace)!r})"),
        "getattr": Hostile(getattr, "text", "upper"),
        "torch.load": Hostile(torch.load, str(trace)),
        "numpy": Hostile(__import__("numpy").load, str(trace)),
    }
    name, _, how = kind.partition(" in ")
    call = calls[name]
    if how == "a protocol 0 pickle":
        return f"cos\nsystem\n(S'mkdir {trace}'\ntR.".encode()
    if how == "a plain pickle":
        return pickle.dumps({**{k: t.tolist() for k, t in list(tensors.items())[:1]}, "x": call})
    saved: dict[Any, Any] = {
        "a value": {**tensors, "x": call},
        "a nested value": {"model": dict(tensors), "optim": [{"x": call}]},
        "a tensor's place": {**tensors, next(iter(tensors)): call},
        "a d3 file": {"torch": b"", "config": call},
    }
    buffer = io.BytesIO()
    if how == "a d3 file":
        torch.save({"transformer": {**tensors, "x": call}}, buffer)
        return pickle.dumps({"torch": buffer.getvalue(), "config": "{}"})
    torch.save(saved[how], buffer, _use_new_zipfile_serialization=how != "a tensor's place")
    return buffer.getvalue()


@pytest.mark.parametrize("call", ["mkdir", "system", "eval", "getattr", "torch.load", "numpy"])
@pytest.mark.parametrize(
    "how",
    ["a value", "a nested value", "a tensor's place", "a plain pickle", "a protocol 0 pickle", "a d3 file"],
)
def test_nothing_in_a_pickle_is_run(formats: Any, call: str, how: str, tmp_path: Path, said: Any) -> None:
    for name in ("kzl", "Hugging Face DT .bin", "d3rlpy discrete .d3", "char-GPT"):
        made, trace = formats[name], tmp_path / "trace"
        folder = tmp_path / name
        folder.mkdir()
        path = made.write(folder, made.tensors)
        weights(path)[0].write_bytes(hostile_file(f"{call} in {how}", trace, made.tensors))
        with pytest.raises(DtLensError) as caught:
            made.load(path)
        assert "wants to run code when it is loaded" in said(caught.value), caught.value
        assert not trace.exists()


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def a_loop(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


def nowhere(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.parent / "nowhere")


def a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def no_end(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("turn", [a_folder, a_loop, nowhere, a_pipe, no_end, empty])
def test_paths_that_are_not_files(made: Any, scratch: Any, law: Any, said: Any, turn: Callable[[Path], None]) -> None:
    with scratch() as whole:
        made.write(whole, made.tensors)
        names = [file.name for file in whole.iterdir()]
    for name in names:
        with scratch() as folder:
            path = made.write(folder, made.tensors)
            turn(folder / name)
            assert law(made, path) is not None, name
            if made.opens:
                with pytest.raises(DtLensError) as caught:
                    dt_lens.open_checkpoint(path)
                said(caught.value)


def test_an_archive_within_which_records_are_exchanged(formats: Any, tmp_path: Path, law: Any) -> None:
    """Records of the same size under each other's name: each fits its checksum, so it is simply another model."""
    made = formats["min-DT"]
    path = made.write(tmp_path, made.tensors)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    a, b = [n for n in records if "/data/" in n and len(records[n]) == 16 * 16 * 4][:2]
    records[a], records[b] = records[b], records[a]
    with zipfile.ZipFile(path, "w") as archive:
        for name, record in records.items():
            archive.writestr(name, record)
    assert law(made, path, torch.load(path, weights_only=True)) is None


def test_a_record_that_is_marked_as_a_folder(formats: Any, tmp_path: Path, law: Any) -> None:
    """For one, torch hands out memory that nobody wrote to."""
    made = formats["d3rlpy continuous .pt"]
    path = made.write(tmp_path, made.tensors)
    whole = bytearray(path.read_bytes())
    entry = whole.rindex(b"PK\x01\x02", 0, whole.rindex(b"/data/7"))
    whole[entry + 38] |= 16
    path.write_bytes(bytes(whole))
    message = law(made, path)
    assert message is not None and "/data/7' does not fit" in message


def test_a_file_without_checksums(formats: Any, tmp_path: Path, law: Any) -> None:
    from torch.serialization import set_crc32_options

    made = formats["CORL"]
    set_crc32_options(False)
    try:
        path = made.write(tmp_path, made.tensors)
    finally:
        set_crc32_options(True)
    assert law(made, path) is None


def test_an_index_of_shards(opened: Any, scratch: Any, law: Any, said: Any, size: int) -> None:
    names = st.sampled_from(
        ["", ".", "..", "a\0b", "x" * 300, "\ud800", "/dev/zero", "../x.safetensors", "no.safetensors", "config.json",
         "model.safetensors", "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", 3, None, [], {}]
    )  # fmt: skip

    @settings(SETTINGS, max_examples=size)
    @given(data=st.data(), name=names, whole=st.booleans())
    def check(data: st.DataObject, name: Any, whole: bool) -> None:
        with scratch() as folder:
            path = opened.write(folder, opened.tensors)
            file = path / "model.safetensors.index.json"
            index = json.loads(file.read_text()) if file.exists() else {"weight_map": {}}
            here = sorted(f.name for f in weights(path))
            if not index["weight_map"]:
                index["weight_map"] = dict.fromkeys(opened.tensors, here[0])
            right = dict(index["weight_map"])
            index["weight_map"][data.draw(st.sampled_from([*sorted(opened.tensors), "a key"]))] = name
            if whole:
                index = data.draw(st.sampled_from([{"weight_map": {}}, {"weight_map": [name]}, [], {"weights": name}]))
            file.write_text(json.dumps(index))
            message = law(opened, path)
            same = not whole and index["weight_map"] == right
            assert (message is None) == same, message
            if not same:
                with pytest.raises(DtLensError) as caught:
                    dt_lens.open_checkpoint(path)
                said(caught.value)

    check()


def test_a_tensor_in_two_shards(formats: Any, tmp_path: Path, law: Any) -> None:
    from safetensors.torch import load_file, save_file

    made = formats["llama in 3"]
    path = made.write(tmp_path, made.tensors)
    first, second = weights(path)[:2]
    held = load_file(first)
    key = sorted(load_file(second))[0]
    save_file({**held, key: torch.zeros_like(made.tensors[key])}, first)
    message = law(made, path)
    assert message is not None and repr(key) in message and "keep one" in message
