"""Labels that a reader can tell apart, and the filters on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from dt_lens import DtLensError
from dt_lens.lens.token_text import spelled, texts
from dt_lens.svd.label_filters import ascii_only, at_least, passing_labels, whole_words


def test_gpt2s_tokens_are_readable(real_checkpoints: Callable[[str], Path]) -> None:
    """Every token of the real vocabulary: its text is what the tokenizer decodes, on one line, nothing invisible."""
    folder = real_checkpoints("gpt2-tokenizer")
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    meant = dict(zip(tokens, texts(tokens), strict=True))
    assert meant["Ġthe"] == " the" and meant["Ċ"] == "\n" and meant["Ã©"] == "é" and meant["âĢĶ"] == "—"
    assert meant["<|endoftext|>"] == "<|endoftext|>"
    assert spelled(meant["Ġthe"]) == "␣the" and spelled(meant["ĊĊ"]) == "\\n\\n" and spelled(meant["Ġ"]) == "␣"
    assert spelled(meant["âĢ"]) == "\\xe2\\x80"  # bytes that are not a character
    shown = [spelled(text) for text in meant.values()]
    assert all(word.isprintable() and word for word in shown)
    # What looks the same is the same: a real backslash before the letters of an escape is all that could be confused.
    assert len(set(shown)) >= len(tokens) - 5
    from transformers import GPT2Tokenizer

    tokenizer = GPT2Tokenizer.from_pretrained(folder)
    for number in range(0, len(tokens), 97):
        decoded = tokenizer.decode([number], clean_up_tokenization_spaces=False)
        if "�" not in decoded:
            assert meant[tokens[number]] == decoded
    words = [tokens[i] for i in passing_labels(tokens, [ascii_only, whole_words]) or []]
    assert 20_000 < len(words) < 40_000
    assert {"Ġthe", "ĠParis"} <= set(words) and not {"the", "Ġ42", "ing", "Ġ,"} & set(words)


def test_decoded_labels_stand_for_themselves() -> None:
    labels = [" the", "Ġ", "é", "thigh position"]
    assert texts(labels) == labels
    assert texts(["▁the", "re", "▁"]) == [" the", "re", " "]
    assert texts(["Ġorġ", "kelb il-baħar"]) == ["Ġorġ", "kelb il-baħar"]  # Maltese, not bytes


@pytest.mark.parametrize(
    ("text", "shown"), [("a\tb", "a\\tb"), ("", "∅"), ("\u202e", "\\u202e"), ("日本", "日本"), ("a b", "a b")]
)
def test_nothing_is_invisible(text: str, shown: str) -> None:
    assert spelled(text) == shown


def test_filters_all_must_pass() -> None:
    labels = [" the", "the", " été", " 42", " of", " don't", "\n", " a b"]
    assert passing_labels(labels, None) is None
    assert passing_labels(labels, ascii_only) == [0, 1, 3, 4, 5, 7]
    assert passing_labels(labels, whole_words) == [0, 2, 4, 5, 7]
    assert passing_labels(labels, [ascii_only, whole_words]) == [0, 4, 5, 7]
    assert passing_labels(labels, lambda text: text.endswith("e")) == [0, 1]
    counts = {" the": 100, " of": 9.5, "the": 5}
    assert passing_labels(labels, at_least(counts, 5)) == [0, 1, 4]
    assert passing_labels(labels, at_least(pd.Series(counts), 10)) == [0]
    assert passing_labels(["Ġthe", "Ġof"], at_least({"Ġthe": 3, " of": 3}, 3)) == [0, 1]  # by label, or by its text
    assert passing_labels(["walk", "##ing", "leg position", "x2"], whole_words) == [0, 2]


@pytest.mark.parametrize("bad", [3, ["ascii"], "ascii"])
def test_an_object_that_is_not_a_filter_is_refused(bad: object) -> None:
    with pytest.raises(DtLensError, match="filter"):
        passing_labels([" the"], bad)  # type: ignore[arg-type]
    with pytest.raises(DtLensError, match="Series"):
        at_least([1, 2])  # type: ignore[arg-type]
