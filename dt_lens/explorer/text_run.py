"""A language model with edits beside itself without: next tokens after a prompt, a continuation, the loss on a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from dt_lens.arguments import whole_number
from dt_lens.behaviour.evaluate import evaluate
from dt_lens.behaviour.texts.reading import token_losses
from dt_lens.behaviour.texts.task import TextTask
from dt_lens.edits.several import in_force
from dt_lens.errors import DtLensError
from dt_lens.explorer.held_edits import Say, make_edits
from dt_lens.explorer.live_run import summary
from dt_lens.lens.forward_mode import measuring
from dt_lens.lens.token_text import spelled

__all__ = ["next_tokens", "read"]

SHOWN = 10  # tokens of the table
MOST = 200  # tokens of a continuation
WINDOWS = 64  # of a text: the first ones
COLOURED = 400  # tokens whose loss is shown one by one


def read(model: Any, wanted: Mapping[str, Any], fold_layernorm: bool, say: Say, check: Callable[[], None]) -> None:
    """Read a prompt and a text with the edits and without.

    Args:
        model: this process's own.
        wanted: ``edits``, ``prompt``, ``tokens`` (how many to add), ``text`` (empty for none).
        fold_layernorm: of the edits.
        say: receives the events.
        check: raises when the run is to stop.

    Raises:
        DtLensError: for edits that cannot be made, or texts that the model cannot read.
    """
    edits = make_edits(model, wanted["edits"], fold_layernorm)
    arms: dict[str, list[Any]] = {"unedited": [], "edited": edits} if edits else {"unedited": []}
    prompt, text = str(wanted.get("prompt") or ""), str(wanted.get("text") or "")
    if not prompt and not text:
        raise DtLensError("There is nothing to read; write a prompt, or a text.")
    if prompt:
        count = whole_number(wanted.get("tokens"), "tokens to add", 1, MOST)
        found = {}
        for name, these in arms.items():
            check()
            with in_force(these):
                found[name] = next_tokens(model, prompt)
        say("next", arms=found)
        for name, these in arms.items():
            check()
            with in_force(these):
                whole = model.generate(prompt, max_new_tokens=count)
            say("continued", arm=name, prompt=prompt, text=whole[len(prompt) :] if whole.startswith(prompt) else whole)
    if text:
        measured = {}
        task = TextTask.of(model, [text])
        units = len(task.units(WINDOWS))
        for name, these in arms.items():
            check()
            with in_force(these):
                measured[name] = evaluate(model, task, units=units)
        values = {name: {"loss": one.mean, "kl": float(one.columns["kl"].mean())} for name, one in measured.items()}
        compared = summary(measured)["compared"] if len(measured) > 1 and units > 1 else []
        say("losses", arms=values, windows=units, compared=compared, context=task.context)
        check()
        say("coloured", **_coloured(model, task, arms))


def next_tokens(model: Any, prompt: str, n: int = SHOWN) -> list[tuple[str, float]]:
    """The likeliest next tokens after a prompt, with their probabilities, for ``model`` as it is now."""
    tokens = model.to_tokens(prompt)
    if tokens.shape[1] > int(model.cfg.n_ctx):
        raise DtLensError(f"The prompt has {tokens.shape[1]} tokens, and the model reads {model.cfg.n_ctx} at most.")
    with measuring(model):
        out = model(tokens)
    p = getattr(out, "logits", out)[0, -1].double().softmax(-1)
    if not bool(p.isfinite().all()):
        raise DtLensError("The next token has no probabilities: an edit is too large for the model's precision.")
    best = p.topk(min(n, len(p)))
    return [
        (spelled(model.to_single_str_token(int(token))), float(value))
        for value, token in zip(best.values, best.indices, strict=True)
    ]


def _coloured(model: Any, task: TextTask, arms: Mapping[str, list[Any]]) -> dict[str, Any]:
    """The tokens of the first windows, and the loss of each under each arm, in nats."""
    shown, losses = list[str](), {name: list[float]() for name in arms}
    for unit in range(len(task.windows)):
        ids = torch.from_numpy(task.windows.tokens[unit])
        first = task.windows.unpredicted
        shown += [model.to_single_str_token(int(token)) for token in ids[first:]]
        for name, these in arms.items():
            with in_force(these), measuring(model):
                losses[name] += [float(loss) for loss in token_losses(model, task.windows, unit)]
        if len(shown) >= COLOURED:
            break
    return {"tokens": shown[:COLOURED], "losses": {name: one[:COLOURED] for name, one in losses.items()}}
