"""Configurations, facts and options of any value: a sentence, or what the code base itself makes of them."""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import dt_lens
from dt_lens import DtLensError
from dt_lens.language_model.original import IGNORED_FIELDS
from dt_lens.lens.adapters import adapter_names

SIZES = (12, 120)  # examples of a property in every run, and in make fuzz
SETTINGS = settings(deadline=None, database=None, phases=[Phase.generate, Phase.shrink])
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 10**9, 10**30, 0.5, 2.0, -1e-5, 1e300, math.nan, math.inf, "", "x", "2", "relu",
    "gelu_new", [], [1], [None], [[["global"], 10**9]], [{}], {}, {"a": 1}, {"type": "none"}, "\ud800", "x" * 300,
]  # fmt: skip
TEXTS = ["", "{", "[1]", "3", "null", '"x"', "[" * 100_000, '{"a":' * 50_000, "\x00", '{"n_head": 1e999}', "{}"]
# Names that a configuration may hold besides those that are there.
NAMES = [
    "n_head", "n_layer", "num_labels", "id2label", "pruned_heads", "_attn_implementation", "attn_implementation",
    "quantization_config", "dtype", "torch_dtype", "rope_parameters", "rope_scaling", "rotary_dim", "head_dim",
    "sliding_window", "layer_types", "auto_map", "_name_or_path", "add_cross_attention", "is_encoder_decoder",
    "output_attentions", "return_dict", "pad_token_id", "attention_types", "window_size", "unheard_of", "self",
    "n_inner", "discrete_actions", "scale_attn_weights", "reorder_and_upcast_attn", "architectures", "model_type",
]  # fmt: skip


def little(before: int, most: int = 2**28) -> None:
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < most, f"{grown / 2**20:.0f} MiB"


def as_they_read_it(made: Any, path: Path) -> Any:
    """What the code base's own class answers; nothing to hold against where it refuses what does not matter here."""
    try:
        return made.theirs(path, made.tensors)
    except Exception:  # their refusals are theirs
        return torch.tensor(math.nan)


@pytest.mark.parametrize("name", ["config.json", "dt_lens.json"])
def test_fields_of_any_value(made: Any, scratch: Any, law: Any, said: Any, name: str, size: int) -> None:
    with scratch() as folder:
        if not (made.write(folder, made.tensors) / name).exists():
            return

    @settings(SETTINGS, max_examples=size)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with scratch() as folder:
            path = made.write(folder, made.tensors)
            values = json.loads((path / name).read_text())
            key = data.draw(st.sampled_from(sorted(values) + (NAMES if name == "config.json" else ["unheard_of"])))
            # What is not of the numbers changes no answer; to write out 10**9 labels is their class's own affair.
            known = made.theirs(path, made.tensors) if key in IGNORED_FIELDS else None
            if data.draw(st.integers(0, 9)):
                values[key] = data.draw(st.sampled_from(ODD))
            else:
                values.pop(key, None)
            (path / name).write_text(json.dumps(values))
            law(made, path, expected=lambda: as_they_read_it(made, path) if known is None else known)
            if made.opens:
                try:
                    opened = dt_lens.open_checkpoint(path)
                except DtLensError as error:
                    said(error)
                else:
                    held = {weight.shape for weight in opened.weights.values()}
                    assert all(math.prod(shape) for shape in held)
        little(before)

    check()


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["config.json", "dt_lens.json", "model.safetensors.index.json", "tokenizer.json"])
def test_texts_that_are_not_a_configuration(
    formats: Any, scratch: Any, law: Any, said: Any, name: str, text: str
) -> None:
    for kind in ("Hugging Face DT", "gpt2", "llama in 3"):
        made = formats[kind]
        with scratch() as folder:
            path = made.write(folder, made.tensors)
            used = (path / name).exists() or name != "dt_lens.json"
            (path / name).write_text(text)
            message = law(made, path)
            assert message is not None or not used or kind == "Hugging Face DT", (kind, name)


def test_settings_inside_a_file(formats: Any, scratch: Any, law: Any, size: int) -> None:
    """The JSON in MiniGrid's files, the arrays in CORL's, the vocabulary in a small GPT's."""
    beside: dict[str, tuple[str, ...]] = {
        "MiniGrid": ("model_config", "environment_config", "offline_config"),
        "CORL": ("state_mean", "state_std"),
        "char-GPT": ("stoi", "itos", "config", "model_args"),
        "nanoGPT": ("model_args", "config", "itos"),
    }
    tensors = [torch.zeros(2), torch.zeros(5), torch.full((5,), math.nan), torch.eye(3).to_sparse()]
    odd = st.sampled_from([*ODD, *tensors, *TEXTS, {"d_model": torch.zeros(2)}, {"a": [1], "b": {}}, {"²": "a"}])

    @settings(SETTINGS, max_examples=2 * size)
    @given(data=st.data(), kind=st.sampled_from(sorted(beside)))
    def check(data: st.DataObject, kind: str) -> None:
        made = formats[kind]
        with scratch() as folder:
            path = made.write(folder, made.tensors)
            saved = torch.load(path, weights_only=False)
            name = data.draw(st.sampled_from(beside[kind]))
            inside = json.loads(saved[name]) if kind == "MiniGrid" and name in saved else None
            if inside and data.draw(st.booleans()):
                inside[data.draw(st.sampled_from([*sorted(inside), "unheard_of"]))] = data.draw(st.sampled_from(ODD))
                saved[name] = json.dumps(inside)
            else:
                saved[name] = data.draw(odd)
            torch.save(saved, path)
            law(made, path)

    check()


def test_options_of_any_value(made: Any, scratch: Any, law: Any, size: int) -> None:
    names = [
        "n_heads", "act_fn", "action_tanh", "max_ep_len", "discrete_actions", "context", "environment", "state_mean",
        "state_std", "target_returns", "return_scale", "trained_heads", "ignore_options", "max_action", "strides",
        "image_side", "encoder_act", "encoder_last_act", "embed_act", "tokenizer", "unheard_of", "padding", "about",
        "adapter", "environment_kwargs", "state_labels",
    ]  # fmt: skip

    @settings(SETTINGS, max_examples=size)
    @given(name=st.sampled_from(names), value=st.sampled_from([*ODD, (), torch.zeros(2), object, print, b"x"]))
    def check(name: str, value: Any) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with scratch() as folder:
            path = made.write(folder, made.tensors)
            # Heads and activations are the user's word: another one is another model.
            another_model = name in ("n_heads", "act_fn", "encoder_act", "encoder_last_act", "embed_act", "action_tanh")
            expected: Callable[[], Any] | None = (lambda: torch.tensor(math.nan)) if another_model else None
            law(made, path, given={name: value}, expected=expected)
        little(before)

    check()


def test_an_adapter_of_another_format(made: Any, scratch: Any, law: Any, tmp_path: Path) -> None:
    with scratch() as folder:
        path = made.write(folder, made.tensors)
        for adapter in adapter_names():
            if adapter != made.adapter:
                same = {made.adapter, adapter} <= {"llama", "mistral", "qwen2"}
                assert law(made, path, given={"adapter": adapter}) is not None or same, adapter
