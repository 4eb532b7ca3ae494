"""The embeddings of a language model: its tokens, and its positions where they are learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from dt_lens.lens.embeddings import Embedding, EmbeddingRegistry
from dt_lens.lens.matrices import Structure

__all__ = ["CENTRED", "TokenEmbeddings", "language_model_embeddings"]

CENTRED = "token_out_centred"


@dataclass(eq=False, repr=False)
class TokenEmbeddings(EmbeddingRegistry):
    """A language model's embeddings, and ``token_out_centred``, which is computed on access and not listed.

    Each row of ``token_out`` less their mean over the vocabulary: the mean raises all logits alike, which the softmax
    does not see. The table is as large as ``token_out``. It is computed from the current weights and not kept, so only
    a scan that names it uses it.
    """

    def __getitem__(self, name: str) -> Embedding:
        if name == CENTRED and name not in self._sets and "token_out" in self._sets:
            out = self._sets["token_out"]
            rows = out.directions.detach()
            # In float32 at least: the mean of fifty thousand rows is small beside them.
            wide = rows if rows.element_size() > 2 else rows.float()
            return replace(out, directions=wide - wide.mean(0, keepdim=True), name=name)
        return super().__getitem__(name)


def language_model_embeddings(
    weights: Mapping[str, Tensor],
    d_model: int,
    owner: str,
    labels: Sequence[str] = (),
    structure: Structure | None = None,
) -> TokenEmbeddings:
    """``token_in`` (rows of ``embed.W_E``), ``token_out`` (columns of ``unembed.W_U``), ``position_in``, as live views.

    ``token_out`` comes after ``ln_final``, and ``token_in`` before ``embed_ln`` where there is one; their ``effective``
    directions include it.

    Args:
        weights: canonical weights; those of the embeddings, ``ln_final.w`` and ``embed_ln.w`` are enough.
        d_model: the stream's dimension.
        owner: the model's identity.
        labels: of the tokens; numbered when omitted.
        structure: says what kind of norms there are; LayerNorms when omitted.
    """
    registry = TokenEmbeddings(d_model, owner)
    rms, unit_offset = (False, False) if structure is None else (structure.rms, structure.unit_offset)
    registry["token_in"] = Embedding(
        weights["embed.W_E"],
        labels,
        kind="token",
        side="in",
        layernorm=weights.get("embed_ln.w"),
        rms=rms,
        unit_offset=unit_offset,
    )
    registry["token_out"] = Embedding(
        weights["unembed.W_U"].T,
        labels,
        kind="token",
        side="out",
        layernorm=weights.get("ln_final.w"),
        rms=rms,
        unit_offset=unit_offset,
    )
    if "pos_embed.W_pos" in weights:
        rows = weights["pos_embed.W_pos"]
        registry["position_in"] = Embedding(rows, [f"pos={i}" for i in range(len(rows))], kind="position", side="in")
    return registry
