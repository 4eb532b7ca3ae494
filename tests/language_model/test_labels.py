"""Labels say what a token stands for, and no two are alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dt_lens
from dt_lens import DtLensError
from dt_lens.language_model.labels import token_labels


class Tokens:
    """A tokenizer of a few tokens."""

    def __init__(self, tokens: list[str], special: tuple[int, ...] = ()) -> None:
        self.tokens = tokens
        self.all_special_ids = list(special)

    def __len__(self) -> int:
        return len(self.tokens)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.tokens[i] for i in ids]


def test_bytes_are_characters_again() -> None:
    found = token_labels(Tokens(["Ġthe", "caf", "Ã©", "Ċ", "âĢ", "ĠĠ", "<|end|>"], (6,)), 8)
    assert found == [" the", "caf", "é", "\\n", "\\xe2\\x80", "  ", "<|end|>", "unused 7"]


def test_word_starts_of_sentencepiece() -> None:
    assert token_labels(Tokens(["▁the", "re", "<s>"], (2,)), 3) == [" the", "re", "<s>"]


def test_duplicates_are_numbered() -> None:
    labels = token_labels(Tokens(["a", "a", "a#1", "a"]), 4)
    assert labels[0] == "a"
    assert len(set(labels)) == 4
    assert labels[1].startswith("a#1")


def test_a_tokenizer_of_a_larger_model_is_refused(make_lm: Any) -> None:
    with pytest.raises(DtLensError, match="30 tokens and the model 29 rows"):
        dt_lens.wrap(make_lm("gpt2"), tokenizer=Tokens([str(i) for i in range(30)]))


def test_an_object_that_is_not_a_tokenizer(make_lm: Any) -> None:
    with pytest.raises(DtLensError, match="a dict, has no tokens"):
        dt_lens.wrap(make_lm("gpt2"), tokenizer={})
    with pytest.raises(DtLensError, match="an int, cannot say what its tokens stand for"):
        dt_lens.wrap(make_lm("gpt2"), tokenizer=3)


def test_labels_in_the_registry_and_in_tables(make_lm: Any) -> None:
    lens = dt_lens.wrap(make_lm("gpt2"), tokenizer=Tokens([f"Ġw{i}" for i in range(29)]), check=False)
    assert lens.embeddings["token_out"].index(" w7") == 7
    assert set(lens.embeddings) == {"token_in", "token_out", "position_in"}
    table = dt_lens.WeightSVD(lens, rank=2).scan("*.W_out", seed=0)
    assert table["label"].str.startswith(" w").all()
    lens.tokenizer = None
    assert lens.embeddings["token_in"].labels[3] == "token 3"


def test_the_published_vocabulary(real_checkpoints: Callable[[str], Path]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(real_checkpoints("gpt2-tokenizer")))
    assert tokenizer.encode("Hello world,") == [15496, 995, 11]
    labels = token_labels(tokenizer, 50304)
    assert (labels[15496], labels[995], labels[11], labels[198]) == ("Hello", " world", ",", "\\n")
    assert labels[50256:50258] == ["<|endoftext|>", "unused 50257"]
    assert len(set(labels)) == 50304
    assert all(label.isprintable() for label in labels)


def test_centred_over_the_vocabulary(make_lm: Any) -> None:
    lens = dt_lens.wrap(make_lm("gpt2"), check=False)
    registry = lens.embeddings
    centred = registry["token_out_centred"]
    rows = registry["token_out"].directions
    torch.testing.assert_close(centred.directions, rows - rows.mean(0))
    assert centred.layernorm is registry["token_out"].layernorm
    assert "token_out_centred" not in list(registry)  # large, so made when asked for
    # Softmax sees no difference: the logits that a direction writes differ by one number for all tokens.
    written = torch.randn(16)
    gap = (rows @ written).softmax(0) - (centred.directions @ written).softmax(0)
    assert gap.abs().max() < 1e-6
    table = dt_lens.WeightSVD(lens, rank=2).scan("*.W_out", embeddings=["token_out_centred"], seed=0)
    assert set(table["embedding"]) == {"token_out_centred"}


def test_directions_are_live(make_lm: Any) -> None:
    lens = dt_lens.wrap(make_lm("gptj"), check=False)
    with torch.no_grad():
        lens.model.lm_head.weight[5].fill_(2.0)
        lens.model.transformer.wte.weight[6].fill_(3.0)
    assert bool((lens.embeddings["token_out"].directions[5] == 2).all())
    assert bool((lens.embeddings["token_in"].directions[6] == 3).all())
    assert "position_in" not in lens.embeddings
