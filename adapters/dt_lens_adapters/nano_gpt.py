"""State dicts of small GPTs written after Karpathy's nanoGPT: GPT-2 with ``nn.Linear`` for ``Conv1D``.

They are GPT-2 in every part, so Hugging Face's class runs them: it gets each matrix transposed, without a copy. So are
those of build-nanogpt, whose settings are an object, ``GPTConfig``; its fields are read without its class.
Two spellings are known, ``transformer.h.{l}.`` with ``wte`` and ``wpe``, and ``blocks.{l}.`` with ``tok_emb`` and
``pos_emb``. Where the file holds the characters of its vocabulary (``stoi``, ``itos``), they name the tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dt_lens.arguments import refuse_unknown
from dt_lens.errors import DtLensError, nearest
from dt_lens.language_model.config import LanguageModelConfig
from dt_lens.language_model.model import HookedLanguageModel
from dt_lens.language_model.original import fill
from dt_lens.lens.assumed import Options
from dt_lens.lens.checkpoints import Checkpoint
from dt_lens.lens.weights import require_computable
from dt_lens_adapters.gpt2 import FAMILY

__all__ = ["CharacterTokenizer", "NanoGPT"]

OPTIONS = {"n_heads", "act_fn", "tokenizer"}
# The files' keys to GPT-2's; each pattern is a whole key.
RENAMED = (
    (re.compile(r"(?:transformer\.wte|tok_emb)\.weight"), "transformer.wte.weight"),
    (re.compile(r"(?:transformer\.wpe|pos_emb)\.weight"), "transformer.wpe.weight"),
    (re.compile(r"(?:transformer\.)?ln_f\.(weight|bias)"), r"transformer.ln_f.\1"),
    (re.compile(r"(?:lm_head|head)\.weight"), "lm_head.weight"),
    (
        re.compile(
            r"(?:transformer\.h|blocks)\.(\d+)\.(ln_[12]|attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.(weight|bias)"
        ),
        r"transformer.h.\1.\2.\3",
    ),
)
LINEAR = re.compile(r"transformer\.h\.\d+\.(attn|mlp)\.c_\w+\.weight")
MASK = re.compile(r"(?:transformer\.h|blocks)\.\d+\.attn\.(?:bias|mask)")


class CharacterTokenizer:
    """A vocabulary of single characters.

    Args:
        characters: the character of each token, in the order of their numbers.
    """

    def __init__(self, characters: Sequence[str]) -> None:
        self.characters = list(characters)
        self.numbers = {character: i for i, character in enumerate(self.characters)}

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> list[int]:
        """The number of each character; ``DtLensError`` for one that is not in the vocabulary."""
        for character in text:
            if character not in self.numbers:
                raise DtLensError(f"The character {character!r} is not in this model's vocabulary of {len(self)}.")
        return [self.numbers[character] for character in text]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens."""
        return "".join(self.characters[int(token)] for token in tokens)


class NanoGPT:
    """The adapter: renames to Hugging Face's keys, reads sizes off shapes, and asks for the heads if need be."""

    name = "nano_gpt"

    def recognises(self, source: Checkpoint | nn.Module) -> bool:
        if isinstance(source, nn.Module) or source.config:
            return False
        keys = {_renamed(key) for key in source.tensors}
        attn = next((t for k, t in source.tensors.items() if _renamed(k) == "transformer.h.0.attn.c_attn.weight"), None)
        # nn.Linear's (out, in): three times as high as wide. Conv1D's would be wider than high.
        linear = attn is not None and attn.ndim == 2 and attn.shape[0] == 3 * attn.shape[1]
        return linear and {"transformer.wte.weight", "transformer.wpe.weight"} <= keys

    def load(self, checkpoint: Checkpoint, **given: Any) -> HookedLanguageModel:
        """The lens over Hugging Face's GPT-2.

        Args:
            given: ``n_heads=``, where the file does not say; ``act_fn=`` (when omitted exact GELU, or its tanh form in
                files of build-nanogpt); ``tokenizer=``.
        """
        refuse_unknown(given, OPTIONS)
        with _in_the_files_words(checkpoint):
            return self._load(checkpoint, given)

    def _load(self, checkpoint: Checkpoint, given: Mapping[str, Any]) -> HookedLanguageModel:
        tensors = _tensors(checkpoint)
        require_computable(tensors)
        options = Options(given)
        cfg, values = _config(checkpoint, tensors, options)
        layout = FAMILY.layout(cfg)
        tensors = {**_missing_biases(tensors, layout), **tensors}
        layout.require({key: tensor.shape for key, tensor in tensors.items()})
        from transformers import GPT2Config, GPT2LMHeadModel

        tensors.setdefault("lm_head.weight", tensors["transformer.wte.weight"])
        model = fill(GPT2LMHeadModel, GPT2Config(**values), tensors)
        tokenizer = given["tokenizer"] if "tokenizer" in given else _tokenizer(checkpoint.extra, cfg.d_vocab)
        lens = HookedLanguageModel(model, FAMILY, cfg, tokenizer)
        lens.assumed = options.assumed
        return lens

    def wrap(self, model: nn.Module, **given: Any) -> HookedLanguageModel:
        raise DtLensError("A live model of this kind cannot be wrapped; save its state_dict() and load that file.")


@contextmanager
def _in_the_files_words(checkpoint: Checkpoint) -> Iterator[None]:
    """Use the file's names of tensors in errors, and do not mention a config.json."""
    try:
        yield
    except DtLensError as error:
        said = str(error).replace("config.json says", f"{checkpoint.path} or what was given says")
        for key in checkpoint.tensors:
            said = said.replace(repr(_renamed(key)), repr(key))
        raise DtLensError(said) from error


def _renamed(key: str) -> str | None:
    """Hugging Face's key for the file's, or ``None``."""
    for pattern, name in RENAMED:
        found = pattern.fullmatch(key)
        if found:
            return found.expand(name)
    return None


def _tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for key, tensor in checkpoint.tensors.items():
        name = _renamed(key)
        if name is None:
            if MASK.fullmatch(key):
                continue
            raise DtLensError(f"The checkpoint has a tensor {key!r} that a small GPT has no place for.")
        if name in tensors:
            raise DtLensError(f"The checkpoint has {key!r} twice, under two spellings; keep one.")
        checkpoint.require_finite([key])
        tensors[name] = tensor.T if LINEAR.fullmatch(name) and tensor.ndim == 2 else tensor
    return tensors


def _missing_biases(tensors: Mapping[str, Tensor], layout: Any) -> dict[str, Tensor]:
    """Zeros for the biases of a model that was built without any."""
    if any(key.endswith(".bias") for key in tensors):
        return {}
    like = next(iter(tensors.values()))
    absent = {entry.key: entry.shape for entry in layout.entries.values() if entry.key.endswith(".bias")}
    return {key: like.new_zeros(shape) for key, shape in absent.items()}


def _config(
    checkpoint: Checkpoint, tensors: Mapping[str, Tensor], given: Options
) -> tuple[LanguageModelConfig, dict[str, Any]]:
    said: dict[str, Any] = {}
    for name in ("model_args", "config"):
        if isinstance(checkpoint.extra.get(name), Mapping):
            said = {**checkpoint.extra[name], **said}
    heads = given.get("n_heads", said.get("n_head", said.get("n_heads")))
    if heads is None:
        raise DtLensError("This checkpoint does not say how many attention heads it has; pass n_heads=.")

    def shape(key: str) -> torch.Size:
        if key not in tensors or tensors[key].ndim != 2 or not tensors[key].numel():
            raise DtLensError(f"The checkpoint has no matrix {key!r} (as GPT-2 calls it), which a small GPT has.")
        return tensors[key].shape

    vocabulary, d = shape("transformer.wte.weight")
    layers = {int(m[1]) for key in tensors if (m := re.match(r"transformer\.h\.([0-9]{1,6})\.", key))}
    absent = next(layer for layer in range(len(layers) + 1) if layer not in layers)
    if absent <= max(layers, default=0):
        raise DtLensError(f"The checkpoint has no tensors of block {absent}, which a small GPT has.")
    head = tensors.get("lm_head.weight")
    # build-nanogpt saves its settings as an object, with these beside it, and has the tanh form of GELU, as GPT-2.
    built = "model_args" not in checkpoint.extra and {"config", "step", "val_loss"} <= set(checkpoint.extra)
    act_fn = given.assume("act_fn", "gelu_new" if built else "gelu")
    known = ("gelu", "gelu_new", "relu")
    if act_fn not in known:
        raise DtLensError(f"act_fn is {act_fn!r}; it must be one of {', '.join(known)}." + nearest(str(act_fn), known))
    values: dict[str, Any] = {
        "vocab_size": vocabulary,
        "n_positions": shape("transformer.wpe.weight")[0],
        "n_embd": d,
        "n_layer": absent,
        "n_head": heads,
        "n_inner": shape("transformer.h.0.mlp.c_fc.weight")[1],
        "activation_function": act_fn,
        "tie_word_embeddings": head is None or _one_memory(head, tensors["transformer.wte.weight"]),
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return FAMILY.config(values), values


def _one_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() or (a.shape == b.shape and torch.equal(a, b))


def _tokenizer(extra: Mapping[str, Any], d_vocab: int) -> CharacterTokenizer | None:
    """A tokenizer of the file's characters, if it has one for each token."""
    itos, stoi = extra.get("itos"), extra.get("stoi")
    if isinstance(stoi, Mapping):
        named = {number: character for character, number in stoi.items() if isinstance(number, int)}
    elif isinstance(itos, (list, tuple)):
        named = dict(enumerate(itos))
    else:
        # JSON's keys are strings.
        spelled = {str(i): c for i, c in itos.items()} if isinstance(itos, Mapping) else {}
        named = {int(i): c for i, c in spelled.items() if re.fullmatch(r"[0-9]{1,9}", i)}
    if set(named) != set(range(d_vocab)):
        return None
    return CharacterTokenizer([str(named[i]) for i in range(d_vocab)])
