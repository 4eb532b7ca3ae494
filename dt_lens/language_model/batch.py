"""The inputs of a language model: tokens, which of them are padding, and their positions."""

from __future__ import annotations

from typing import Any

from jaxtyping import Int
from torch import Tensor

from dt_lens.errors import DtLensError, a_type
from dt_lens.language_model.config import LanguageModelConfig

__all__ = ["positions_of", "require_tokens"]


def positions_of(mask: Tensor) -> Int[Tensor, "batch pos"] | None:
    """The positions of the tokens of a batch, padding left out; ``None`` where they are 0, 1, 2, ... in every row.

    Hugging Face's ``generate`` counts the same way, and gives padding the position 0.
    """
    real = mask != 0
    counted = real.long().cumsum(-1)
    ahead = counted[:, -1:] - counted  # real tokens that follow
    # Padding that no real token follows shifts nothing.
    if not bool((~real & (ahead > 0)).any()):
        return None
    positions: Tensor = (counted - 1).masked_fill(~real, 0)
    return positions


def require_tokens(
    cfg: LanguageModelConfig, tokens: Tensor, mask: Tensor | None, positions: Tensor | None, tokenizer: Any = None
) -> None:
    """Raise ``DtLensError`` unless a batch fits the model; ``tokenizer`` says what a token without a row is."""
    if not _whole(tokens) or tokens.ndim != 2 or not tokens.numel():
        raise DtLensError(
            f"tokens are {_kind(tokens)} of shape {list(tokens.shape)}; this model wants whole numbers of shape "
            "[batch, pos]."
        )
    for name, given in (("attention_mask", mask), ("position_ids", positions)):
        if given is not None and not isinstance(given, Tensor):
            raise DtLensError(f"{name} is {a_type(given)}; it must be a tensor of shape {list(tokens.shape)}.")
    if mask is not None and mask.shape != tokens.shape:
        raise DtLensError(
            f"attention_mask has shape {list(mask.shape)}; with tokens of shape {list(tokens.shape)} it must have "
            "the same."
        )
    if tokens.shape[1] > cfg.n_ctx:
        raise DtLensError(f"{tokens.shape[1]} tokens do not fit this model's context of {cfg.n_ctx}.")
    low, high = (int(end) for end in tokens.aminmax())
    if low < 0 or high >= cfg.d_vocab:
        named = getattr(tokenizer, "added_tokens_decoder", {}).get(high)
        added = f" ({high} is {str(named)!r}, which was added to the tokenizer and has no row)" if named else ""
        raise DtLensError(f"tokens run from {low} to {high}{added}; this model's vocabulary is 0 to {cfg.d_vocab - 1}.")
    if positions is None:
        return
    if not _whole(positions) or tuple(positions.shape) not in {tuple(tokens.shape), (1, tokens.shape[1])}:
        raise DtLensError(
            f"position_ids are {_kind(positions)} of shape {list(positions.shape)}; with tokens of shape "
            f"{list(tokens.shape)} they must be whole numbers of the same shape, or of one row."
        )
    if cfg.position == "alibi":
        raise DtLensError(
            "position_ids have no meaning for this model: with ALiBi, scores go by distances, which attention_mask "
            "gives; leave position_ids out."
        )
    low, high = (int(end) for end in positions.aminmax())
    if low < 0 or high >= cfg.n_ctx:
        raise DtLensError(f"position_ids run from {low} to {high}; this model's positions are 0 to {cfg.n_ctx - 1}.")


def _whole(x: Tensor) -> bool:
    return not x.is_floating_point() and not x.is_complex() and str(x.dtype) != "torch.bool"


def _kind(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
