"""Labels of a vocabulary's tokens: what each stands for, on one line, no two alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dt_lens.errors import DtLensError, a_type, because
from dt_lens.lens.token_text import byte_alphabet, from_bytes

__all__ = ["token_labels"]


def token_labels(tokenizer: Any, d_vocab: int) -> list[str]:
    """``d_vocab`` labels: the text of each token, a leading space kept, control characters and broken bytes escaped.

    ``" the"`` is a token that begins a word. Where two tokens stand for the same text, the later ones get their number:
    ``"the#1820"``. Rows beyond the tokenizer's own (a table is often padded to a round size) are ``"unused 50300"``.
    Tokens that were added to a tokenizer, such as ``[PAD]``, may have no row; those get no label.

    Raises:
        DtLensError: when the tokenizer's own vocabulary is larger than the model's, so that they do not belong
            together, or it cannot say what its tokens are.
    """
    try:
        texts = _texts(tokenizer, d_vocab)
    except DtLensError:
        raise
    except Exception as error:  # any tokenizer may raise anything
        raise DtLensError(
            f"The tokenizer, {a_type(tokenizer)}, cannot say what its tokens stand for: {because(error)}."
        ) from error
    labels, taken = [], set[str]()
    for i, text in enumerate(texts):
        label = f"unused {i}" if text is None else _on_one_line(text)
        if label in taken:
            label = f"{label}#{i}"
        while label in taken:
            label += "'"
        taken.add(label)
        labels.append(label)
    return labels


def _texts(tokenizer: Any, d_vocab: int) -> list[str | None]:
    known = len(tokenizer)
    if not known:
        raise DtLensError(
            f"The tokenizer, {a_type(tokenizer)}, has no tokens; pass the model's own, or tokenizer=None."
        )
    special = set(getattr(tokenizer, "all_special_ids", ())) | set(getattr(tokenizer, "added_tokens_decoder", ()))
    if not special >= set(range(d_vocab, known)):
        raise DtLensError(
            f"The tokenizer has {known} tokens and the model {d_vocab} rows for them, so the two do not belong "
            "together; pass the model's own tokenizer, or tokenizer=None."
        )
    known = min(known, d_vocab)
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        found: list[str | None] = [str(tokenizer.decode([i])) for i in range(known)]
        return found + [None] * (d_vocab - known)
    tokens: Sequence[str | None] = tokenizer.convert_ids_to_tokens(list(range(known)))
    plain = [token for i, token in enumerate(tokens) if token is not None and i not in special]
    byte_level = _is_byte_level(plain)
    found = []
    for i, token in enumerate(tokens):
        if token is None or i in special:
            found.append(token)
        else:
            found.append(from_bytes(token) if byte_level else token.replace("▁", " "))
    return found + [None] * (d_vocab - known)


def _is_byte_level(tokens: Sequence[str]) -> bool:
    """Whether each character of each token stands for a byte (Radford et al., GPT-2, 2019, section 2.2)."""
    return any(token.startswith("Ġ") for token in tokens) and all(
        character in byte_alphabet() for token in tokens for character in token
    )


def _on_one_line(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
