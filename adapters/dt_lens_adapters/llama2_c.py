"""Checkpoints of karpathy's llama2.c: what its train.py saves, and state dicts with the same keys, Meta's own of Llama.

They are Llama in every part, so Hugging Face's class runs them. It rotates the first half of a head's features against
the second, and these files hold the two of each pair side by side: queries and keys get another order within each head,
which changes no score. Every other tensor is used as it lies.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from dt_lens.arguments import refuse_unknown
from dt_lens.errors import DtLensError
from dt_lens.language_model.layout import At
from dt_lens.language_model.model import HookedLanguageModel
from dt_lens.language_model.original import fill
from dt_lens.lens.assumed import Options
from dt_lens.lens.checkpoints import Checkpoint
from dt_lens.lens.weights import require_computable
from dt_lens_adapters.llama import LLAMA
from dt_lens_adapters.llama2_c_export import read_export

__all__ = ["Llama2C"]

OPTIONS = {"n_heads", "n_ctx", "eps", "rope_theta", "tokenizer"}
# What ModelArgs and model.py say where the saved arguments do not.
USUAL = {"n_ctx": 2048, "eps": 1e-5, "rope_theta": 1e4}
SAVED = {"n_heads": "n_heads", "n_ctx": "max_seq_len", "eps": "norm_eps"}
WHOLE = {"embed.W_E": "tok_embeddings", "ln_final.w": "norm", "unembed.W_U": "output"}
BLOCK = {
    "ln1.w": "attention_norm",
    "attn.W_Q": "attention.wq",
    "attn.W_K": "attention.wk",
    "attn.W_V": "attention.wv",
    "attn.W_O": "attention.wo",
    "ln2.w": "ffn_norm",
    "mlp.W_gate": "feed_forward.w1",
    "mlp.W_in": "feed_forward.w3",
    "mlp.W_out": "feed_forward.w2",
}


def _as_stored(rules: Mapping[str, At], names: Mapping[str, str]) -> dict[str, At]:
    return {name: rules[name]._replace(key=f"{key}.weight") for name, key in names.items()}


# Llama under the files' names, which says what they must hold.
FILE = replace(
    LLAMA,
    whole=_as_stored(LLAMA.whole, WHOLE),
    block_key="layers.{l}.",
    block=_as_stored(LLAMA.block, BLOCK),
    ignored=(r"freqs_(cos|sin)", r"rope\.freqs"),
    prefix="",
)
# What errors about the configuration call these.
WORDS = {
    "config.json says": "the checkpoint, or what was given, says",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "max_position_embeddings": "n_ctx",
}


class Llama2C:
    """The adapter: renames to Hugging Face's keys, reads sizes off shapes, and asks for the heads if need be."""

    name = "llama2_c"

    def recognises(self, source: Checkpoint | nn.Module) -> bool:
        if isinstance(source, nn.Module) or source.config:
            return False
        return {"tok_embeddings.weight", "norm.weight", "layers.0.attention.wq.weight"} <= set(source.tensors)

    def read(self, file: Path) -> tuple[Mapping[str, Tensor], Mapping[str, Any]] | None:
        """The tensors and sizes of a ``model.bin`` of export.py."""
        return read_export(file)

    def load(self, checkpoint: Checkpoint, **given: Any) -> HookedLanguageModel:
        """The lens over Hugging Face's Llama.

        Args:
            given: where the file does not say it ``n_heads=``, ``n_ctx=`` (2048), ``eps=`` (1e-5) and ``rope_theta=``
                (10,000); ``tokenizer=``.
        """
        refuse_unknown(given, OPTIONS)
        with _in_the_files_words():
            return self._load(checkpoint, given)

    def _load(self, checkpoint: Checkpoint, given: Mapping[str, Any]) -> HookedLanguageModel:
        held, options = dict(checkpoint.tensors), Options(given)
        values = _config(checkpoint, options)
        cfg = LLAMA.config(values)
        stored = FILE.layout(cfg)
        own = stored.require({key: tensor.shape for key, tensor in held.items()})
        checkpoint.require_finite(own.values())
        require_computable({key: held[key] for key in own.values()})
        named = LLAMA.layout(cfg)
        tensors = {named.entries[name].key: held[own[entry.key]] for name, entry in stored.entries.items()}
        for key in tensors:
            if re.search(r"\.[qk]_proj\.", key):
                tensors[key] = rearrange(tensors[key], "(h pair two) d -> (h two pair) d", two=2, pair=cfg.d_head // 2)
        tensors["lm_head.weight"] = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
        from transformers import LlamaConfig, LlamaForCausalLM

        lens = HookedLanguageModel(
            fill(LlamaForCausalLM, LlamaConfig(**values), tensors), LLAMA, cfg, given.get("tokenizer")
        )
        lens.assumed = options.assumed
        return lens

    def wrap(self, model: nn.Module, **given: Any) -> HookedLanguageModel:
        raise DtLensError("A live model of this kind cannot be wrapped; save its state_dict() and load that file.")


@contextmanager
def _in_the_files_words() -> Iterator[None]:
    """Use the files' names of options in errors."""
    try:
        yield
    except DtLensError as error:
        said = str(error)
        for ours, theirs in WORDS.items():
            said = said.replace(ours, theirs)
        raise DtLensError(said) from error


def _config(checkpoint: Checkpoint, options: Options) -> dict[str, Any]:
    """The values of a ``config.json``: from the shapes, the saved arguments, and what was given."""
    tensors, arguments = checkpoint.tensors, checkpoint.extra.get("model_args")
    saved = arguments if isinstance(arguments, Mapping) else {}
    known = {name: saved[key] for name, key in SAVED.items() if saved.get(key) is not None}
    # The saved arguments are llama2.c's, whose code says the rest.
    options = options.over({**USUAL, **known} if saved else known)
    if "n_heads" not in options:
        raise DtLensError("This checkpoint does not say how many attention heads it has; pass n_heads=.")

    def height(key: str) -> int:
        if key not in tensors or tensors[key].ndim != 2 or not tensors[key].numel():
            raise DtLensError(f"The checkpoint has no matrix {key!r}, which a model of llama2.c has.")
        return tensors[key].shape[0]

    vocabulary, head = height("tok_embeddings.weight"), tensors.get("output.weight")
    table = tensors["tok_embeddings.weight"]
    d, heads = height("layers.0.attention.wq.weight"), options["n_heads"]
    if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1 or d % (2 * heads):
        raise DtLensError(
            f"n_heads is {heads!r}; it must be a whole number, and divide the {d} features of all queries into an even "
            "number each, which are rotated in pairs."
        )
    layers = {int(found[1]) for key in tensors if (found := re.match(r"layers\.([0-9]{1,6})\.", key))}
    return {
        "vocab_size": vocabulary,
        "hidden_size": table.shape[-1],
        "intermediate_size": height("layers.0.feed_forward.w1.weight"),
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, height("layers.0.attention.wk.weight") // (d // heads)),
        "head_dim": d // heads,
        "max_position_embeddings": options.assume("n_ctx", USUAL["n_ctx"]),
        "rms_norm_eps": options.assume("eps", USUAL["eps"]),
        "rope_parameters": {"rope_type": "default", "rope_theta": options.assume("rope_theta", USUAL["rope_theta"])},
        "tie_word_embeddings": head is None or _same(head, table),
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
