"""The tokenizer whose files are beside a model's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dt_lens.errors import DtLensError

__all__ = ["tokenizer_in"]

NAMES = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model", "tokenizer_config.json")
# Spaces, lines, digits, capitals, accents, quotes, and a script without spaces: where tokenizers differ.
PROBE = " Hello  world,\n\tit's 1234.5 naïve “cafés” — don't_stop(x+=1)! 東京 🙂 "


def tokenizer_in(folder: Path) -> Any:
    """The tokenizer whose files are beside the weights, or ``None``.

    ``AutoTokenizer`` reads a ``tokenizer.json`` for some classes of tokenizers, and for others (GPT-2's, Qwen2's) takes
    no more than its vocabulary, and builds the steps before and after it anew. Where the result does not encode a text
    as ``tokenizer.json`` does, that file's own tokenizer is used, with the special tokens of ``AutoTokenizer``'s.

    Raises:
        DtLensError: for files that cannot be read.
    """
    if not any((folder / name).is_file() for name in NAMES):
        return None
    from transformers import AutoTokenizer

    try:
        made = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        return _as_in_the_file(made, folder / "tokenizer.json")
    except Exception as error:  # each kind of damage has an exception of its own
        raise DtLensError(
            f"The tokenizer in {folder} cannot be read ({' '.join(str(error).split())[:200]}); pass tokenizer=None to "
            "go without labels, or the tokenizer itself."
        ) from error


def _as_in_the_file(made: Any, file: Path) -> Any:
    """``made`` if it encodes and decodes a text as the file's tokenizer does, and that one otherwise."""
    if not file.is_file():
        return made
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer.from_file(str(file))
    ids = own.encode(PROBE, add_special_tokens=False).ids
    text = own.decode(ids, skip_special_tokens=False)
    # Without special tokens: whether a text begins with one is a choice that tokenizer_config.json may make.
    if made.encode(PROBE, add_special_tokens=False) == ids and (
        made.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == text
    ):
        return made
    # One that the file does not know was added by the class, for a model that has no row for it.
    special = {name: str(token) for name, token in made.special_tokens_map.items() if isinstance(token, str)}
    kept = {name: token for name, token in special.items() if own.token_to_id(token) is not None}
    # Special tokens without a name of their own, which special_tokens_map does not have.
    others = [token for token in made.all_special_tokens if token not in special.values()]
    others = [token for token in others if own.token_to_id(token) is not None]
    return PreTrainedTokenizerFast(
        tokenizer_object=own, name_or_path=str(file.parent), extra_special_tokens=others, **kept
    )
