"""Which of a model's embeddings are what it puts out and what it is given: chosen by their kinds and sides."""

from __future__ import annotations

from collections.abc import Mapping

from dt_lens.lens.embeddings import Embedding

__all__ = ["inputs_of", "outputs_of", "tried_on"]

PUT_OUT = ("action", "token")  # kinds of what a model is for, where it has other heads as well
GIVEN = ("state", "token")
NOT_PUT_OUT = ("state", "reward")  # heads that an agent may have beside that of its actions
NOT_GIVEN = ("timestep", "position", "action", "reward")  # where a token stands; what an agent did and is asked for


def outputs_of(embeddings: Mapping[str, Embedding]) -> list[str]:
    """The names of the embeddings that are read out of the stream and hold what the model is for.

    >>> eye = __import__("torch").eye(2)
    >>> outputs_of({"a": Embedding(eye, side="out"), "b": Embedding(eye, kind="token", side="out")})
    ['b', 'a']
    """
    found = [name for name, e in embeddings.items() if e.side == "out" and e.kind not in NOT_PUT_OUT]
    return sorted(found, key=lambda name: (embeddings[name].kind not in PUT_OUT, not embeddings[name].trained))


def inputs_of(embeddings: Mapping[str, Embedding]) -> list[str]:
    """The names of the embeddings that are put into the stream and hold what the model is given.

    States or tokens come first.
    """
    found = [name for name, e in embeddings.items() if e.side == "in" and e.kind not in NOT_GIVEN]
    return sorted(found, key=lambda name: embeddings[name].kind not in GIVEN)


def tried_on(embeddings: Mapping[str, Embedding], side: str) -> list[str]:
    """The embeddings whose match may predict what a direction does, by the side on which it faces the stream.

    The output embedding on either side, and on the read side what the model is given too. Where the outputs are
    actions they are alone: that is the claim to be tested, of W_in, which reads, as well.
    """
    outputs, inputs = outputs_of(embeddings)[:1], inputs_of(embeddings)
    alone = side != "read" or any(embeddings[name].kind == "action" for name in outputs)
    return outputs if alone else [*outputs, *inputs]
