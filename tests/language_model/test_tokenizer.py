"""The tokenizer in a model's folder encodes as its ``tokenizer.json`` does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import dt_lens
from dt_lens import DtLensError
from dt_lens.language_model.tokenizer import tokenizer_in

LETTERS = [*"abcdehlnorstw▁Ġ<>|", "lo", "▁w"]
TEXT = "hello world  to the north"


def a_tokenizer(kind: str, special: str = "<|endoftext|>") -> Tokenizer:
    """A byte-pair tokenizer of 25 tokens that marks the beginnings of words in one of two ways."""
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([special, *LETTERS]))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("l", "o"), ("▁", "w")]))
    if kind == "metaspace":
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([special])
    return tokenizer


def folder_of(path: Path, tokenizer: Tokenizer, model_type: str, **config: Any) -> Path:
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    if not (path / "config.json").exists():
        (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    return path


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neo", "gptj", "qwen2", "llama"])
@pytest.mark.parametrize("kind", ["metaspace", "bytes"])
def test_it_encodes_as_its_file_does(tmp_path: Path, model_type: str, kind: str) -> None:
    own = a_tokenizer(kind)
    folder = folder_of(tmp_path, own, model_type)
    found = tokenizer_in(folder)
    assert found.encode(TEXT, add_special_tokens=False) == own.encode(TEXT, add_special_tokens=False).ids
    assert found.decode(found.encode(TEXT, add_special_tokens=False)).split() == TEXT.split()


def test_it_is_autotokenizers_where_that_is_right(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, a_tokenizer("bytes"), "gpt2")
    assert type(tokenizer_in(folder)) is type(AutoTokenizer.from_pretrained(str(folder)))


def test_special_tokens_stay(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, a_tokenizer("metaspace", "<end>"), "gpt2", eos_token="<end>")
    found = tokenizer_in(folder)
    assert found.eos_token == "<end>" and found.eos_token_id == 0 and found.name_or_path == str(folder)
    assert len(found) == a_tokenizer("metaspace").get_vocab_size()  # GPT-2's class would add one of its own
    assert found("hello", return_tensors=None)["input_ids"] == found.encode("hello")


def test_special_tokens_without_a_name_stay(tmp_path: Path) -> None:
    own = a_tokenizer("metaspace", "<end>")
    own.add_special_tokens(["<one>", "<two>"])
    folder = folder_of(tmp_path, own, "gpt2", eos_token="<end>", additional_special_tokens=["<one>", "<two>"])
    found = tokenizer_in(folder)
    assert sorted(found.all_special_tokens) == ["<end>", "<one>", "<two>"] and len(found) == own.get_vocab_size()
    assert found.decode(found.encode("hello<one>"), skip_special_tokens=True).split() == ["hello"]


def test_a_loaded_model_has_it(tmp_path: Path, make_lm: Any) -> None:
    make_lm("gpt2").save_pretrained(tmp_path)
    folder_of(tmp_path, own := a_tokenizer("metaspace"), "gpt2")
    lens = dt_lens.load(tmp_path, check=False)
    assert lens.to_tokens(TEXT)[0].tolist() == own.encode(TEXT).ids
    assert " w" in lens.labels and lens.labels[-1].startswith("unused")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DtLensError, match=r"The tokenizer in .* cannot be read"):
        dt_lens.load(tmp_path, check=False)


def test_a_token_that_was_added_has_no_row(make_lm: Any) -> None:
    """Many add a padding token before they batch texts, and never one row to the model."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=a_tokenizer("bytes"), eos_token="<|endoftext|>")
    n = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    lens = dt_lens.wrap(make_lm("gpt2", vocab_size=n), tokenizer=tokenizer, check=False)
    assert len(lens.labels) == n and len(lens.embeddings["token_in"].labels) == n and "[PAD]" not in lens.labels
    lens(lens.to_tokens("hello"))
    said = rf"tokens run from 1 to {n} \({n} is '\[PAD\]', which was added to the tokenizer and has no row\)"
    with pytest.raises(DtLensError, match=said):
        lens(torch.tensor([[1, n]]))
    with pytest.raises(DtLensError, match=said.replace("from 1", r"from \d+")):
        lens("he[PAD]")
    with pytest.raises(DtLensError, match=f"{n + 1} tokens and the model {n - 1} rows"):
        dt_lens.wrap(make_lm("gpt2", vocab_size=n - 1), tokenizer=tokenizer, check=False)
