"""``evaluate`` for language models: how well they predict texts, and what edits do to the predictions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dt_lens.arguments import whole_number
from dt_lens.behaviour.texts.evaluation import TextEvaluation
from dt_lens.behaviour.texts.losses import Moved
from dt_lens.behaviour.texts.windows import Texts, Windows, cut, read_texts
from dt_lens.edits.edit import suspended
from dt_lens.edits.state import state_of
from dt_lens.errors import DtLensError
from dt_lens.lens.forward_mode import evaluating, one_thread
from dt_lens.lens.token_text import spelled
from dt_lens.lens.weights import weight_bytes
from dt_lens.progress import Count, counting

__all__ = ["HELD_OUT", "base_and_model_id", "evaluate_text"]

HELD_OUT = "heldout.txt"  # a text in the model's folder that it was not trained on
CONTEXT = 128  # the default: shorter windows are more units, and a long window's later tokens are easier
AT_ONCE = 2**28  # bytes of logits to keep between running without edits and with them
MOVED = 50  # how many tokens to keep of those that gained, and of those that lost


def evaluate_text(
    model: Any,
    texts: Texts | None = None,
    *,
    context: int | None = None,
    windows: int | None = None,
    progress: bool | Count = False,
) -> TextEvaluation:
    """Predict texts with ``model`` as it is now (edits included); return the loss of each window of tokens.

    Every window is run by itself, on one torch thread, so that its result depends on the model and its tokens alone, to
    the last bit on a CPU. If edits are in force, the windows also run with them suspended: KL and the tokens that moved
    compare the model with itself without its edits. Dropout is off.

    Args:
        model: a wrapped language model, with its tokenizer.
        texts: the path of a text file, a text, or a list of texts; the held-out text in the model's folder by default.
        context: tokens of a window, at most the model's own; 128 by default.
        windows: the most windows, from the first on; all by default.
        progress: ``True`` for a progress bar on standard error, or a function of (windows done, windows).

    Raises:
        DtLensError: for texts that cannot be read or are too short, a context that does not fit, a model without a
            tokenizer, or one whose predictions are not finite.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise DtLensError(
            "The model has no tokenizer to read texts with; wrap it with one: dt_lens.wrap(model, tokenizer=...)."
        )
    longest = int(model.cfg.n_ctx)
    context = min(longest, CONTEXT) if context is None else context
    for name, value, least in (("context", context, 2), ("windows", windows, 1)):
        if value is not None:
            whole_number(value, name, least)
    if context > longest:
        raise DtLensError(
            f"context is {context}, and the model reads no more than {longest} tokens; give at most that."
        )
    texts = _held_out(model) if texts is None else texts
    read = read_texts(texts)
    cut_up = cut(read, tokenizer, int(context), windows)
    base_id, model_id = base_and_model_id(model)
    with counting(progress, len(cut_up), "windows") as report, one_thread(), evaluating(model), torch.no_grad():
        rows, moved = _run(model, cut_up, report)
    return TextEvaluation(
        tokens=np.array([len(window) - cut_up.unpredicted for window in cut_up.tokens], dtype=np.int64),
        loss=np.array([loss for loss, _ in rows], dtype=np.float64),
        kl=np.array([kl for _, kl in rows], dtype=np.float64),
        moved=moved,
        text=_in_words(texts, read),
        text_id=cut_up.text_id,
        context=int(context),
        bytes_per_token=cut_up.bytes_per_token,
        model_id=model_id,
        base_id=base_id,
        edits=tuple(edit.to_dict() for edit in getattr(model, "active_edits", ())),
    )


def _run(
    model: Any, windows: Windows, report: Callable[[float], None] | None
) -> tuple[list[tuple[float, float]], tuple[Moved, ...]]:
    """(loss, KL) of every window, and the tokens that moved most."""
    edited = bool(state_of(model).edits)
    rows: list[tuple[float, float]] = []
    before = after = torch.zeros((), dtype=torch.float64)  # sums over positions, then [d_vocab]
    positions = done = 0
    for group in _groups(windows, int(model.cfg.d_vocab)):
        bare: list[Tensor] = []
        if edited:
            with suspended(model):
                bare = [_logits(model, window, windows.unpredicted) for window in group]
        for i, window in enumerate(group):
            logits = _logits(model, window, windows.unpredicted)
            log_p = logits.double().log_softmax(-1)
            target = torch.from_numpy(window[windows.unpredicted :]).to(log_p.device)
            loss = float(-log_p.gather(-1, target[:, None]).mean())
            kl = 0.0
            if edited:
                log_q = bare[i].double().log_softmax(-1)
                p, q = log_p.exp(), log_q.exp()
                # Rounding may leave a little less than zero where the two are nearly the same.
                kl = float((q * (log_q - log_p)).sum(-1).clamp(min=0).mean())
                before, after, positions = before + q.sum(0), after + p.sum(0), positions + len(p)
            rows.append((loss, kl))
            done += 1
            if report is not None:
                report(done)
    return rows, _moved(before / positions, after / positions, model) if edited else ()


def _groups(windows: Windows, vocabulary: int) -> Iterator[tuple[np.ndarray[Any, Any], ...]]:
    size = max(1, AT_ONCE // (4 * vocabulary * max(len(window) for window in windows.tokens)))
    for i in range(0, len(windows), size):
        yield windows.tokens[i : i + size]


def _logits(model: Any, window: np.ndarray[Any, Any], unpredicted: int) -> Tensor:
    """The logits of each predicted token from the tokens before it, ``[predicted, d_vocab]``."""
    device = next(iter(model.weights.values())).device
    out = model(torch.from_numpy(window)[None].to(device))
    logits: Tensor = getattr(out, "logits", out)[0, unpredicted - 1 : -1]
    if not bool(torch.isfinite(logits).all()):
        raise DtLensError(
            "The model predicts a logit that is NaN or infinite; its weights, or an edit of them, are too large for "
            "its precision."
        )
    return logits


def _moved(before: Tensor, after: Tensor, model: Any) -> tuple[Moved, ...]:
    change = (after - before).cpu()
    order = change.argsort(descending=True, stable=True).tolist()
    chosen = [i for i in order[:MOVED] if change[i] > 0] + [i for i in order[: -MOVED - 1 : -1] if change[i] < 0]
    labels = getattr(model, "labels", None)
    names = {i: labels[i] if labels else model.tokenizer.decode([i]) for i in chosen}
    return tuple(Moved(i, spelled(names[i]), float(before[i]), float(after[i])) for i in chosen)


def _held_out(model: Any) -> Path:
    """The held-out text in the folder that the model, or its tokenizer, was loaded from."""
    config = getattr(getattr(model, "original", None), "config", None)
    named = (
        getattr(model, "folder", None),
        getattr(config, "_name_or_path", None),
        getattr(model.tokenizer, "name_or_path", None),
    )
    for folder in named:
        if folder and (Path(folder) / HELD_OUT).is_file():
            return Path(folder) / HELD_OUT
    raise DtLensError(
        f"The model's folder holds no {HELD_OUT}; give evaluate a text: a file, a string, or a list of strings."
    )


def _in_words(texts: Texts, read: list[str]) -> str:
    if len(read) > 1:
        return f"{len(read)} texts"
    one = texts if isinstance(texts, str | Path) else texts[0]
    if isinstance(one, Path) or one != read[0]:
        return Path(one).name
    return f"a text of {len(one):,} characters"


def base_and_model_id(model: Any) -> tuple[str, str]:
    """Sixteen hexadecimal digits each: of the weights and configuration without edits, and as they are now.

    The first 64 bits of a SHA-256. Without edits in force the two are the same.
    """
    digests = {name: _digest(weight) for name, weight in model.weights.items()}
    untouched = {name: _digest(weight) for name, weight in state_of(model).untouched.items()}
    about = json.dumps(_plain(model.cfg), sort_keys=True)
    return _joined(about, digests | untouched), _joined(about, digests)


def _digest(weight: Tensor) -> bytes:
    digest = hashlib.sha256(f"{weight.dtype} {list(weight.shape)} ".encode())
    digest.update(weight_bytes(weight))
    return digest.digest()


def _joined(about: str, digests: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256(about.encode())
    for name in sorted(digests):
        digest.update(name.encode() + digests[name])
    return digest.hexdigest()[:16]


def _plain(cfg: Any) -> dict[str, Any]:
    """The plain values of a configuration; the text of others, such as functions, holds an address."""
    values = cfg.to_dict() if hasattr(cfg, "to_dict") else vars(cfg)
    return {str(k): v for k, v in values.items() if isinstance(v, str | int | float | bool | list | None)}
