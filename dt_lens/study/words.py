"""What the words of a study's report mean, in the terms of a task."""

from __future__ import annotations

from dt_lens.behaviour.terms import Terms

__all__ = ["words_of"]


def words_of(terms: Terms) -> dict[str, str]:
    """Words and their meanings, for a reader who has not read the docs."""
    worse = f"the {terms.lost}"
    return {
        "residual stream": "the vector that the blocks of the model read from and write to, one for each position",
        "direction, sv": (
            "a matrix is a sum of directions, each of which reads one vector, multiplies by its sigma and writes "
            "another; sv numbers them from 0 on, the largest sigma first"
        ),
        "read and write": (
            "the side on which a direction faces the stream: W_in reads from it, W_out writes to it, OV does both"
        ),
        "embedding, label": (
            "a named set of vectors in the stream, one for each label: what the model is given (`_in`) or puts out "
            "(`_out`)"
        ),
        "match, cosine": (
            "how closely a direction points along a label's vector: 1 or \u22121 is exact, 0 is nothing. With this "
            "many labels some cosine is always large, so it is compared with that of random directions"
        ),
        "edit": "one singular vector is replaced by another, or its sigma is changed; everything else stays",
        "energy": "the size of the change to the weights (Frobenius norm)",
        "control": "a random change of the same energy and rank in the same matrix",
        "contrast": "a direction of the same matrix, similar in size, that matches nothing well",
        "first direction": "the direction of largest sigma in the first matrix of its kind, whatever it matches",
        "arm": f"the {terms.units} of one version of the model: unedited, under an edit, or under a control",
        "beyond the control": f"{worse} under an edit less {worse} under its control",
        "p": "how often chance alone would give a difference as large as this",
        "q": (
            "p, corrected for how many were tested: among those with q below 0.05 about one in twenty is expected to "
            "be chance"
        ),
        "interval": "the 95 % bootstrap interval of the mean",
    }
