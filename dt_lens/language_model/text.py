"""Text in and out of a language model, under TransformerLens's names: tokens, their strings, and generation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dt_lens.arguments import LAST_SEED, truth_value, whole_number
from dt_lens.errors import DtLensError, a_type, as_written
from dt_lens.language_model.batch import require_tokens
from dt_lens.language_model.config import LanguageModelConfig

__all__ = ["TextMethods"]


class TextMethods:
    """What a language model with a tokenizer does with text; the tokenizer adds special tokens if it usually does."""

    if TYPE_CHECKING:
        cfg: LanguageModelConfig
        model: Any
        tokenizer: Any

        def _hooked(self) -> AbstractContextManager[bool]: ...
        def all_hooks_run(self) -> Any: ...

    def to_tokens(self, text: str | Sequence[str], prepend_bos: bool = False) -> Tensor:
        """Tokens ``[batch, pos]`` of a text, or of several; shorter ones are padded on the right.

        Args:
            text: a text or several.
            prepend_bos: begin with the tokenizer's first token of a text, as TransformerLens does by default, where the
                tokenizer does not do so itself.

        Raises:
            DtLensError: without a tokenizer, for what is not text, or without a first token that was asked for.
        """
        return self._encoded(text, prepend_bos)[0]

    def to_string(self, tokens: Any) -> str | list[str]:
        """The text of tokens ``[pos]``, or the texts of ``[batch, pos]``; special tokens are shown.

        Raises:
            DtLensError: without a tokenizer, or for what are not tokens of this model.
        """
        ids = self._ids(tokens)
        if ids.ndim > 1:
            return [self._decoded(row) for row in ids.tolist()]
        return self._decoded([int(ids.item())] if ids.ndim == 0 else ids.tolist())

    def to_str_tokens(self, text: Any, prepend_bos: bool = False) -> list[str] | list[list[str]]:
        """Each token as text, of one text or of tokens ``[pos]`` or ``[1, pos]``; of several texts a list for each.

        Raises:
            DtLensError: as ``to_tokens`` and ``to_string`` do.
        """
        if isinstance(text, Sequence) and not isinstance(text, str) and all(isinstance(one, str) for one in text):
            return [self._strings(self.to_tokens(one, prepend_bos)[0].tolist()) for one in text]
        ids = self.to_tokens(text, prepend_bos) if isinstance(text, str) else self._ids(text)
        ids = ids[0] if ids.ndim == 2 and len(ids) == 1 else ids
        if ids.ndim > 1:
            return [self._strings(row) for row in ids.tolist()]
        return self._strings([int(ids.item())] if ids.ndim == 0 else ids.tolist())

    def to_single_token(self, text: str) -> int:
        """The number of the one token that a text is, special tokens aside.

        Raises:
            DtLensError: for a text of several tokens, or of none.
        """
        if not isinstance(text, str):
            raise DtLensError(f"A token is named by text, not by {a_type(text)}.")
        found = list(self._tokenizer_or_raise().encode(text, add_special_tokens=False))
        if len(found) != 1:
            raise DtLensError(
                f"{as_written(text)} is {len(found)} tokens, {as_written(self._strings(found), 200)}; "
                "give a single one."
            )
        return int(found[0])

    def to_single_str_token(self, token: int) -> str:
        """The text of one token."""
        return self._strings([whole_number(token, "token", 0, self.cfg.d_vocab - 1)])[0]

    def output_ids(self, tokens: Any) -> Any:
        """The number of a token given as text, or of several."""
        if isinstance(tokens, str):
            return self.to_single_token(tokens)
        if isinstance(tokens, Sequence):
            return torch.tensor([self.to_single_token(one) if isinstance(one, str) else one for one in tokens])
        return tokens

    @torch.no_grad()
    def generate(
        self,
        input: str | Sequence[str] | Tensor,  # noqa: A002 -- TransformerLens's name
        max_new_tokens: int = 10,
        *,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop_at_eos: bool = True,
        seed: int = 0,
        return_type: str = "input",
    ) -> Any:
        """Continue a text, or each of several, by Hugging Face's ``generate``; edits and hooks are in force.

        With hooks every step runs the whole text again, so that a hook sees all positions; without, keys and values are
        cached.

        Args:
            input: a text, several (padded on the left), or tokens ``[batch, pos]``.
            max_new_tokens: how many tokens to add.
            do_sample: sample; the most probable token by default (TransformerLens samples by default).
            temperature, top_k, top_p: of the samples; no limits by default.
            stop_at_eos: end at the model's last token of a text, where it has one.
            seed: of the samples. The global random state stays as it is.
            return_type: ``"input"`` (text for text, tokens for tokens), ``"str"`` or ``"tokens"``. The input is part of
                the answer.

        Raises:
            DtLensError: for an argument out of range, a text that is longer than the context with its continuation, or
                a model that Hugging Face cannot continue.
        """
        if return_type not in ("input", "str", "tokens"):
            raise DtLensError(f"return_type is {as_written(return_type)}; it must be 'input', 'str' or 'tokens'.")
        seed, count = whole_number(seed, "seed", 0, LAST_SEED), whole_number(max_new_tokens, "max_new_tokens", 1)
        if isinstance(input, Tensor):
            ids, mask = input, torch.ones_like(input)
        else:
            ids, mask = self._encoded(input, padding_side="left")
        from transformers import GenerationConfig

        require_tokens(self.cfg, ids, mask, None, self.tokenizer)
        if ids.shape[1] + count > self.cfg.n_ctx:
            raise DtLensError(
                f"{ids.shape[1]} tokens and {count} more do not fit this model's context of {self.cfg.n_ctx}; give "
                "fewer."
            )
        options = self._options(do_sample, temperature, top_k, top_p, stop_at_eos)
        devices = [ids.device] if ids.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), self.all_hooks_run(), self._hooked() as hooked:
            torch.manual_seed(seed)
            config = GenerationConfig(max_new_tokens=count, use_cache=not hooked, **options)
            found: Tensor = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        if return_type == "tokens" or (return_type == "input" and isinstance(input, Tensor)):
            return found
        texts = [
            self._decoded(row[~pad].tolist())
            for row, pad in zip(found, _padding(found, mask, options["eos_token_id"]), strict=True)
        ]
        return texts[0] if isinstance(input, str) or (isinstance(input, Tensor) and len(texts) == 1) else texts

    def _options(
        self, do_sample: bool, temperature: float, top_k: int | None, top_p: float | None, stop: bool
    ) -> dict[str, Any]:
        """Hugging Face's names and values of these options."""
        if not hasattr(self.model, "generate"):
            raise DtLensError(f"{type(self.model).__name__} has no generate, so this model cannot continue a text.")
        end = getattr(self.model.generation_config, "eos_token_id", None)
        if not truth_value(stop, "stop_at_eos"):
            end = self.cfg.d_vocab  # no token has this number; for None Hugging Face takes the model's own
        options = {"do_sample": truth_value(do_sample, "do_sample"), "eos_token_id": end, "pad_token_id": self._pad()}
        if not do_sample:
            return options
        for name, value, most in (("temperature", temperature, math.inf), ("top_p", top_p, 1.0)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float | np.number)):
                raise DtLensError(f"{name} is {as_written(value)}; it must be a number.")
            if value is not None and not 0 < value <= most:
                limit = f" and at most {most:g}" if most < math.inf else ""
                raise DtLensError(f"{name} is {value}; it must be above 0{limit}.")
        k = 0 if top_k is None else whole_number(top_k, "top_k", 1)
        temperature = 1.0 if temperature is None else float(temperature)
        return options | {"temperature": temperature, "top_p": 1.0 if top_p is None else float(top_p), "top_k": k}

    def _encoded(self, text: Any, prepend_bos: bool = False, padding_side: str = "right") -> tuple[Tensor, Tensor]:
        """Tokens and mask ``[batch, pos]``, 0 for padding."""
        tokenizer = self._tokenizer_or_raise()
        several = [text] if isinstance(text, str) else text
        if not (isinstance(several, Sequence) and several and all(isinstance(one, str) for one in several)):
            raise DtLensError(f"text is {as_written(text)}; it must be a text, or several.")
        rows = [list(tokenizer.encode(one)) for one in several]
        if truth_value(prepend_bos, "prepend_bos"):
            first = getattr(tokenizer, "bos_token_id", None)
            if first is None:
                raise DtLensError("The tokenizer has no first token of a text (bos_token), so none can be prepended.")
            rows = [row if row[:1] == [first] else [first, *row] for row in rows]
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self._pad(), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            where = slice(longest - len(row), longest) if padding_side == "left" else slice(len(row))
            ids[i, where], mask[i, where] = torch.tensor(row, dtype=torch.long), 1
        device = next(self.model.parameters()).device
        return ids.to(device), mask.to(device)

    def _pad(self) -> int:
        """A token that the model has a row for; it is masked, so any serves."""
        for name in ("pad_token_id", "eos_token_id"):
            found = getattr(self.tokenizer, name, None)
            if isinstance(found, int) and 0 <= found < self.cfg.d_vocab:
                return found
        return 0

    def _ids(self, tokens: Any) -> Tensor:
        """Tokens given as a number, a list, an array or a tensor."""
        try:
            ids = tokens if isinstance(tokens, Tensor) else torch.as_tensor(tokens)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise DtLensError(f"tokens are {as_written(tokens)}; they must be whole numbers.") from None
        if ids.ndim > 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise DtLensError(
                f"tokens are {str(ids.dtype)[6:]} of shape {list(ids.shape)}; they must be whole numbers."
            )
        if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < self.cfg.d_vocab):
            raise DtLensError(
                f"tokens run from {int(ids.min())} to {int(ids.max())}; this model's vocabulary is 0 to "
                f"{self.cfg.d_vocab - 1}."
            )
        return ids

    def _decoded(self, ids: list[int]) -> str:
        return str(self._tokenizer_or_raise().decode(ids, clean_up_tokenization_spaces=False))

    def _strings(self, ids: list[int]) -> list[str]:
        return [self._decoded([token]) for token in ids]

    def _tokenizer_or_raise(self) -> Any:
        if self.tokenizer is None:
            raise DtLensError("This model was wrapped without a tokenizer; pass tokenizer= to dt_lens.wrap or load.")
        return self.tokenizer


def _padding(found: Tensor, mask: Tensor, end: int | list[int] | None) -> Tensor:
    """Where an answer ``[batch, pos]`` is padding: before its text, and after the token that ended it."""
    pad = torch.zeros_like(found, dtype=torch.bool)
    pad[:, : mask.shape[1]] = mask == 0
    if end is not None:
        ends = torch.isin(found, torch.as_tensor(end, device=found.device))
        ends[:, : mask.shape[1]] = False
        pad |= (ends.long().cumsum(-1) - ends.long()) > 0
    return pad
