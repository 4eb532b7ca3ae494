"""Files that are not a checkpoint, or a broken or hostile one: one error sentence, no code run, nothing else raised."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import dt_lens
from dt_lens.errors import DtLensError
from dt_lens.lens.checkpoints import read_checkpoint


def refusal(path: Path | str) -> str:
    """The error of reading a file, which must be one sentence of dt-lens's own; loading must give the same one."""
    with pytest.raises(DtLensError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message and len(message) < 500, message
    with pytest.raises(DtLensError):
        dt_lens.load(path)
    return message


class Hostile:
    """Leaves a file behind when it is unpickled with code allowed."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.trace),))


def write_text(file: Path) -> None:
    file.write_text("These are the notes of a training run.\n" * 20)


def write_nothing(file: Path) -> None:
    file.touch()


def write_picture(file: Path) -> None:
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + np.random.default_rng(0).bytes(3000))


def write_zeros(file: Path) -> None:
    file.write_bytes(bytes(4096))


def write_archive(file: Path) -> None:
    import zipfile

    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("letter.txt", "hello")


def truncated(write: Callable[[Path], object], share: float) -> Callable[[Path], None]:
    def make(file: Path) -> None:
        write(file)
        whole = file.read_bytes()
        file.write_bytes(whole[: int(len(whole) * share)])

    return make


def save_zip(file: Path) -> None:
    torch.save({"a": torch.randn(500), "b": torch.randn(500)}, file)


def save_legacy(file: Path) -> None:
    torch.save({"a": torch.randn(500), "b": torch.randn(500)}, file, _use_new_zipfile_serialization=False)


def save_tensors(file: Path) -> None:
    save_file({"a": torch.randn(500), "b": torch.randn(500)}, file)


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".bin", ".safetensors", ""])
@pytest.mark.parametrize("write", [write_text, write_nothing, write_picture, write_zeros, write_archive])
def test_a_file_that_is_not_a_checkpoint(tmp_path: Path, suffix: str, write: Callable[[Path], None]) -> None:
    file = tmp_path / f"agent{suffix}"
    write(file)
    expected = "not a complete safetensors file" if suffix == ".safetensors" else "cannot be read as a checkpoint"
    assert expected in refusal(file)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("write", [save_zip, save_legacy, save_tensors])
def test_a_truncated_file(tmp_path: Path, share: float, write: Callable[[Path], None]) -> None:
    file = tmp_path / ("agent.safetensors" if write is save_tensors else "agent.pt")
    truncated(write, share)(file)
    message = refusal(file)
    assert "wants to run code" not in message and ("truncated" in message or "whole" in message)


@pytest.mark.parametrize("how", ["torch", "torch legacy", "pickle 2", "pickle 4", "pickle 5", "hidden"])
def test_a_pickle_that_wants_to_run_code_does_not(tmp_path: Path, how: str) -> None:
    file, trace = tmp_path / "agent.pt", tmp_path / "trace"
    hostile = {"a": torch.zeros(2), "b": Hostile(trace)} if how == "hidden" else {"b": Hostile(trace)}
    if how.startswith("pickle"):
        file.write_bytes(pickle.dumps(hostile, protocol=int(how[-1])))
    else:
        torch.save(hostile, file, _use_new_zipfile_serialization=how != "torch legacy")
    message = refusal(file)
    assert "is a pickle that wants to run code when it is loaded (" in message and "mkdir" in message
    assert "save its state_dict() and give that file" in message
    assert not trace.exists()
    assert pickle.loads(pickle.dumps(Hostile(trace))) is None and trace.exists()  # it would have


def test_a_whole_module_is_refused_with_its_name(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "agent.pt")
    assert "(torch.nn.modules.linear.Linear)" in refusal(tmp_path / "agent.pt")


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ([torch.zeros(2)], "holds a list; expected a state dict"),
        (torch.zeros(2), "holds a Tensor; expected a state dict"),
        (3, "holds an int; expected a state dict"),
        ({}, "holds no tensors; expected the weights of a model"),
        ({"a": torch.zeros(2), "epoch": 3}, "holds 'epoch', which is not a tensor; expected a state dict"),
        ({"state_dict": {"a": torch.zeros(2), "b": "x"}}, "holds 'b', which is not a tensor"),
        ({"a": torch.eye(3).to_sparse()}, "The tensor 'a' in"),
    ],
)
def test_a_file_with_something_else_in_it(tmp_path: Path, saved: Any, message: str) -> None:
    torch.save(saved, tmp_path / "agent.pt")
    assert message in refusal(tmp_path / "agent.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_numbers_are_refused_where_they_are_used(tmp_path: Path, value: float) -> None:
    torch.save({"mask": torch.tensor(float("-inf")), "a": torch.tensor([1.0, value])}, tmp_path / "agent.pt")
    checkpoint = read_checkpoint(tmp_path / "agent.pt")
    with pytest.raises(DtLensError, match=r"The tensor 'a' in .*agent\.pt holds NaN or infinite values; .*\.$"):
        checkpoint.require_finite(key for key in checkpoint.tensors if key != "mask")
    checkpoint.require_finite([])


def test_state_dicts_are_found_where_code_bases_put_them(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3), "b": torch.ones(2, dtype=torch.uint8)}
    for name in (None, "model_state_dict", "state_dict", "model_state", "model", "transformer"):
        torch.save({name: tensors, "epoch": 3} if name else tensors, tmp_path / "agent.tar")
        checkpoint = read_checkpoint(tmp_path / "agent.tar")
        assert {key: value.tolist() for key, value in checkpoint.tensors.items()} == {
            key: value.tolist() for key, value in tensors.items()
        }
        assert checkpoint.extra == ({"epoch": 3} if name else {}) and checkpoint.config == {}
        assert checkpoint.folder == tmp_path


def test_arrays_of_numbers_in_a_pickle_with_the_weights(tmp_path: Path) -> None:
    arrays = {"mean": np.ones((1, 3), np.float32), "scale": np.float64(2.0), "ids": np.arange(3, dtype=np.int64)}
    torch.save({"model_state": {"a": torch.zeros(2)}, **arrays}, tmp_path / "agent.pt")
    extra = read_checkpoint(tmp_path / "agent.pt").extra
    assert all(np.array_equal(extra[name], array) for name, array in arrays.items())
    torch.save({"model_state": {"a": torch.zeros(2)}, "x": np.array([Hostile(tmp_path / "trace")])}, tmp_path / "b.pt")
    assert refusal(tmp_path / "b.pt") and not (tmp_path / "trace").exists()


def as_bytes(saved: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    return buffer.getvalue()


class Unpacks:
    """A third party's adapter: a file of torch's under ``"weights"``, and notes; it loads nothing."""

    name = "unpacks"

    def recognises(self, source: Any) -> bool:
        return True

    def load(self, checkpoint: Any, **given: Any) -> Any:
        return checkpoint

    wrap = load

    def unpack(self, values: Any, file: Path) -> Any:
        weights = values.get("weights")
        return (weights, {"notes": values["notes"], "file": file.name}) if isinstance(weights, bytes) else None


def test_an_adapter_unpacks_a_pickle_of_plain_values(tmp_path: Path) -> None:
    inside = as_bytes({"model": {"a": torch.arange(3.0)}, "optim": {"state": {}}})
    file = tmp_path / "agent.xyz"
    for protocol in (3, 4, 5):
        file.write_bytes(pickle.dumps({"weights": inside, "notes": "mine"}, protocol=protocol))
        checkpoint = dt_lens.load(file, adapter=Unpacks, check=False)
        assert checkpoint.tensors["a"].tolist() == [0, 1, 2] and checkpoint.extra == {"optim": {"state": {}}}
        assert checkpoint.config == {"notes": "mine", "file": "agent.xyz"} and checkpoint.path == file
        assert "cannot be read as a checkpoint" in refusal(file)  # no other adapter's


def test_bad_files_in_a_pickle_of_plain_values(tmp_path: Path) -> None:
    good, trace, file = as_bytes({"a": torch.zeros(2)}), tmp_path / "trace", tmp_path / "agent.pt"
    for values, message in (
        ({"weights": good[:50], "notes": ""}, "cannot be read as a checkpoint"),
        ({"weights": b"", "notes": ""}, "cannot be read as a checkpoint"),
        ({"weights": "text"}, "cannot be read as a checkpoint"),
        ([good], "cannot be read as a checkpoint"),
        ({"weights": as_bytes({"a": Hostile(trace)}), "notes": ""}, "wants to run code"),
        ({"weights": good, "notes": Hostile(trace)}, "wants to run code"),
    ):
        file.write_bytes(pickle.dumps(values))
        with pytest.raises(DtLensError, match=message):
            dt_lens.load(file, adapter=Unpacks, check=False)
    assert not trace.exists()


def test_a_folder_without_weights(tmp_path: Path) -> None:
    assert "holds no model.safetensors or pytorch_model.bin" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "holds no model.safetensors or pytorch_model.bin" in refusal(tmp_path)
    (tmp_path / "model.safetensors").mkdir()
    assert "is not a complete safetensors file" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "not json", "[1]", "3", "null", '"x"', "[" * 100_000, "\x00"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_invalid_json(tmp_path: Path, name: str, text: str) -> None:
    save_tensors(tmp_path / "model.safetensors")
    (tmp_path / name).write_text(text)
    assert name in refusal(tmp_path)


def test_json_that_is_not_text(tmp_path: Path) -> None:
    save_tensors(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00{}")
    assert "config.json cannot be read as JSON" in refusal(tmp_path)


@pytest.mark.parametrize("index", [{}, {"weight_map": 3}, {"weight_map": {"a": 3}}, {"weight_map": ["a"]}])
def test_an_index_that_names_no_shards(tmp_path: Path, index: Any) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "has no weight_map; it should name the shard of every tensor" in refusal(tmp_path)


def test_an_index_of_missing_shards(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "one.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "one.safetensors', though model.safetensors.index.json names it" in refusal(tmp_path)
    save_tensors(tmp_path / "one.safetensors")
    assert set(read_checkpoint(tmp_path).tensors) == {"a", "b"}


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nowhere.pt", "There is no file or folder 'nowhere.pt'; give the path of a checkpoint."),
        ("no/where/at/all.ckpt", "There is no file or folder 'no/where/at/all.ckpt'; give the path of a checkpoint."),
        ("x" * 5000, "cannot be accessed: "),
        ("nul\0character.pt", "it must be the path of a file or folder"),
    ],
)
def test_a_path_that_does_not_exist(path: str, said: str) -> None:
    assert said in refusal(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    save_zip(tmp_path / "agent.pt")
    (tmp_path / "agent.pt").chmod(0)
    refusal(tmp_path / "agent.pt")
