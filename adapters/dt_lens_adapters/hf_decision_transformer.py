"""Hugging Face's ``DecisionTransformerModel``: a live one, or a folder or hub id of one."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from dt_lens.arguments import refuse_unknown
from dt_lens.decision_transformer.config import HEADS, HookedDecisionTransformerConfig
from dt_lens.decision_transformer.facts import FACTS, RunFacts, given_facts
from dt_lens.decision_transformer.hf_layout import (
    HEAD_KEYS,
    canonical_from_hf,
    config_from_hf,
    heads_in,
)
from dt_lens.decision_transformer.model import HookedDecisionTransformer
from dt_lens.errors import DtLensError, as_written, because, nearest
from dt_lens.language_model.original import IGNORED_FIELDS
from dt_lens.lens.assumed import Options
from dt_lens.lens.checkpoints import Checkpoint
from dt_lens.lens.forward_mode import uncompiled
from dt_lens.lens.protocol import Reference
from dt_lens.lens.weights import require_computable

__all__ = ["HFDecisionTransformer"]

# What the files hold and the model does not use: GPT-2's token table, and the causal masks of older releases. The
# patterns are whole keys: a suffix match on "attn.bias" would match "attn.c_attn.bias" too.
UNUSED = re.compile(r"encoder\.wte\.weight|encoder\.h\.\d+\.attn\.(masked_)?bias")
# What a file without its config.json leaves out.
SHAPE_OPTIONS = {"n_heads", "act_fn", "action_tanh", "max_ep_len"}
NAMES = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new", "silu": "silu", "tanh": "tanh"}
OPTIONS = {"discrete_actions", "ignore_options", *FACTS}
# What config.json states for the sake of Hugging Face's class, though it was only assumed when the model was saved.
REPLACED = {"act_fn": "activation_function", "action_tanh": "action_tanh"}
# What older releases wrote into every configuration and a decision transformer does not use: options for generating
# text, for pooling and for files, and other names of options that it has.
OLD_OPTIONS = {
    "bad_words_ids", "begin_suppress_tokens", "cross_attention_hidden_size", "decoder_start_token_id",
    "discrete_actions", "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id",
    "gradient_checkpointing", "is_decoder", "length_penalty", "max_length", "max_position_embeddings", "min_length",
    "n_ctx", "n_embd", "no_repeat_ngram_size", "num_attention_heads", "num_beam_groups", "num_beams",
    "num_hidden_layers", "num_return_sequences", "output_scores", "pad_token_id", "prefix", "pruned_heads",
    "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "sep_token_id", "suppress_tokens",
    "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tie_word_embeddings",
    "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript", "typical_p", "use_bfloat16", "use_return_dict",
}  # fmt: skip


class HFDecisionTransformer:
    """The adapter; the lens's weights are views of the file's or the live model's tensors."""

    name = "hf_decision_transformer"

    def recognises(self, source: Checkpoint | nn.Module) -> bool:
        if isinstance(source, nn.Module):
            # A subclass too: adding a loss to the model is how Hugging Face teaches to train it.
            return _hf_class(source) is not None and hasattr(source, "encoder")
        return {"embed_return.weight", "encoder.h.0.attn.c_attn.weight"} <= set(source.tensors)

    def load(self, checkpoint: Checkpoint, **given: Any) -> HookedDecisionTransformer:
        tensors = dict(checkpoint.tensors)
        config = checkpoint.config or _ours(checkpoint.config_beside())
        # What lies beside a file without its configuration may belong to another one.
        kept = RunFacts.load(checkpoint.folder) if config and checkpoint.folder else None
        noted = _assumed_before(kept)
        _refuse_what_is_gone(given, noted - REPLACED.keys())
        refuse_unknown(given, OPTIONS | noted if config else OPTIONS | SHAPE_OPTIONS)
        checkpoint.require_finite(used(tensors))
        options = Options(given)
        if not config:
            if "n_heads" not in given:
                raise DtLensError(
                    f"{checkpoint.path} has no config.json beside it, which gives the number of heads and the options; "
                    "give the folder that holds both, or pass n_heads=."
                )
            config = config_from_shapes(tensors, options, "Hugging Face's decision transformer")
        elif replaced := noted & given.keys() & REPLACED.keys():
            config = {**config, **{REPLACED[name]: _replacement(name, given[name]) for name in replaced}}
        if checkpoint.bundled:
            return self._bundled(tensors, config, kept, options)
        model = original(tensors, config, given.get("ignore_options", ()))
        return self._lens(model, _config(model), lambda: used(model.state_dict()), heads_in(tensors), kept, options)

    def wrap(self, model: nn.Module, **given: Any) -> HookedDecisionTransformer:
        kept = _facts_beside(model)
        for name in _assumed_before(kept) & given.keys() & REPLACED.keys():
            raise DtLensError(
                f"A live model's own configuration says what {name} is; load its folder with {name}={given[name]!r}."
            )
        refuse_unknown(given, OPTIONS)
        return self._lens(model, _config(model), lambda: used(model.state_dict()), HEADS, kept, Options(given))

    def _bundled(
        self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], kept: RunFacts | None, given: Options
    ) -> HookedDecisionTransformer:
        """The lens on the tensors of a bundled agent; Hugging Face's class is imported and made when it is asked for.

        Importing it takes longer than all else that loading does.
        """
        made: list[nn.Module] = []

        def make() -> nn.Module:
            made.append(original(tensors, config))
            return made[0].train(hooked.training)

        def live() -> dict[str, Tensor]:
            return used(made[0].state_dict() if made else tensors)

        hooked = self._lens(make, config, live, heads_in(tensors), kept, given)
        return hooked

    def _lens(
        self,
        model: nn.Module | Callable[[], nn.Module],
        config: Mapping[str, Any],
        tensors: Callable[[], Mapping[str, Tensor]],
        predicts: tuple[str, ...],
        kept: RunFacts | None,
        given: Options,
    ) -> HookedDecisionTransformer:
        facts = given_facts(kept, given)
        cfg = config_from_hf(config, facts.context, given.get("discrete_actions"), predicts)
        facts.require_fit(cfg.state_dim, cfg.act_dim)
        hooked = lens_on(model, tensors, cfg, facts, HFReference(lambda: hooked.original, cfg))
        hooked.assumed = given.assumed
        return hooked


def _assumed_before(kept: RunFacts | None) -> set[str]:
    """Options that were assumed when the model was saved, so that its config.json states them and nobody knows them."""
    noted = kept.about.get("assumed") if kept else None
    return {str(name) for name in noted if name not in FACTS} if isinstance(noted, Mapping) else set()


def _refuse_what_is_gone(given: Mapping[str, Any], names: set[str]) -> None:
    for name in names & given.keys():
        raise DtLensError(
            f"{name} was assumed before this model was saved in Hugging Face's form, which does not hold it; load the "
            f"original file again with {name}={as_written(given[name])}."
        )


def _replacement(name: str, value: Any) -> Any:
    return NAMES[_activation(value)] if name == "act_fn" else value


def _activation(act_fn: Any) -> str:
    if not isinstance(act_fn, str) or act_fn not in NAMES:
        raise DtLensError(
            f"act_fn is {as_written(act_fn)}; it must be one of {', '.join(NAMES)}." + nearest(str(act_fn)[:80], NAMES)
        )
    return act_fn


def lens_on(
    model: nn.Module | Callable[[], nn.Module],
    tensors: Callable[[], Mapping[str, Tensor]],
    cfg: HookedDecisionTransformerConfig,
    facts: RunFacts,
    reference: Reference,
) -> HookedDecisionTransformer:
    """The lens on a model, or what makes it, whose tensors ``tensors()`` gives under Hugging Face's keys."""
    # Hugging Face's class has every head; one that the file lacks is not part of the lens.
    absent = {f"{HEAD_KEYS[head]}.{leaf}" for head in HEADS if head not in cfg.predicts for leaf in ("weight", "bias")}

    def views() -> dict[str, Tensor]:
        return canonical_from_hf({key: tensor for key, tensor in tensors().items() if key not in absent}, cfg)

    with torch.device("meta"):
        hooked = HookedDecisionTransformer(cfg)
    hooked.look_at(model, views, reference)
    hooked.facts = facts
    hooked.train(isinstance(model, nn.Module) and model.training)
    return hooked


def _ours(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration of another file's model, in the same folder, is none of this one's."""
    named = config.get("architectures")
    ours = isinstance(named, list) and "DecisionTransformerModel" in named
    return config if ours or config.get("model_type") == "decision_transformer" else {}


def _hf_class(model: nn.Module) -> Any:
    """Hugging Face's class among the ancestors of a model's class, or ``None``."""
    return next((base for base in type(model).__mro__ if base.__name__ == "DecisionTransformerModel"), None)


def _config(model: nn.Module) -> dict[str, Any]:
    config: dict[str, Any] = model.config.to_dict()  # type: ignore[union-attr, operator]
    return config


def used(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state dict that the model computes with."""
    return {key: tensor for key, tensor in tensors.items() if not UNUSED.fullmatch(key)}


def _facts_beside(model: nn.Module) -> RunFacts | None:
    """The run facts of the folder that ``from_pretrained`` read, if the model came from one."""
    folder = Path(str(getattr(model, "name_or_path", "") or "?"))
    return RunFacts.load(folder) if folder.is_dir() else None


def original(tensors: Mapping[str, Tensor], config: Mapping[str, Any], ignored: Collection[str] = ()) -> nn.Module:
    """Hugging Face's own class over ``tensors``, which become its parameters without a copy.

    It has zeros for the heads of states and returns where the file has none.

    Raises:
        DtLensError: for tensors or options that do not fit, before anything is built.
    """
    cfg = config_from_hf(config, predicts=heads_in(tensors))
    kept = used(tensors)
    canonical_from_hf(kept, cfg)
    require_computable(kept)
    _refuse_foreign_options(config, ignored)
    from transformers import DecisionTransformerConfig, DecisionTransformerModel

    # The model reads no tokens: its token table, which is never read, gets one row, and the special ids are unset:
    # their defaults lie outside that table and make the class warn.
    plain = {name: value for name, value in config.items() if name not in IGNORED_FIELDS}
    # A few of 2022 call the width n_embd, as GPT-2's do.
    plain = {**plain, "hidden_size": cfg.d_model}
    values = {**plain, "vocab_size": 1, "bos_token_id": None, "eos_token_id": None}
    try:
        with torch.device("meta"):
            model: nn.Module = DecisionTransformerModel(DecisionTransformerConfig(**values))
        like = next(iter(kept.values()))
        kept["encoder.wte.weight"] = like.new_zeros(1, cfg.d_model)
        for head, size in (("state", cfg.state_dim), ("return_to_go", 1)):
            if head not in cfg.predicts:
                kept[f"{HEAD_KEYS[head]}.weight"] = like.new_zeros(size, cfg.d_model)
                kept[f"{HEAD_KEYS[head]}.bias"] = like.new_zeros(size)
        model.load_state_dict(kept, strict=True, assign=True)
    except Exception as error:  # its validation may raise anything
        raise DtLensError(f"Hugging Face's class refuses this configuration: {because(error)}.") from error
    return model.eval()


def _refuse_foreign_options(config: Mapping[str, Any], ignored: Collection[str]) -> None:
    """Raise for an option that neither Hugging Face's class nor dt-lens knows: it may change what is computed."""
    from transformers import DecisionTransformerConfig

    known = {*DecisionTransformerConfig(bos_token_id=None, eos_token_id=None).to_dict(), *OLD_OPTIONS, *ignored}
    for name in config:
        if name not in known and not name.startswith(("_", "summary_")):
            raise DtLensError(
                f"config.json has an option {name!r} that Hugging Face's decision transformer does not have, so its "
                f"effect would be lost; if it has none, pass ignore_options=[{name!r}]." + nearest(name, known)
            )


def config_from_shapes(tensors: Mapping[str, Tensor], given: Options, kind: str) -> dict[str, Any]:
    """What Hugging Face's configuration would say, from shapes and from what was given (``SHAPE_OPTIONS``).

    Args:
        tensors: under Hugging Face's keys.
        given: ``n_heads``, and what else the shapes do not say.
        kind: of the model, for messages.
    """

    def shape(key: str) -> torch.Size:
        if key not in tensors or tensors[key].ndim != 2:
            raise DtLensError(f"The checkpoint has no matrix {key!r}, which {kind} has.")
        return tensors[key].shape

    layers = {int(m[1]) for key in tensors if (m := re.match(r"encoder\.h\.([0-9]{1,6})\.", key))}
    act_fn = _activation(given.assume("act_fn", "relu"))  # the authors' default; the file does not say
    rows = shape("embed_timestep.weight")[0]
    longest = given.get("max_ep_len", rows)
    if not isinstance(longest, int) or longest != rows:
        raise DtLensError(
            f"max_ep_len={given['max_ep_len']} does not fit the checkpoint, whose timestep table has {rows} rows."
        )
    d_model, state_dim = shape("embed_state.weight")
    return {
        "hidden_size": d_model,
        "state_dim": state_dim,
        "act_dim": shape("embed_action.weight")[1],
        "max_ep_len": rows,
        "n_layer": max(layers, default=0) + 1,
        "n_head": given["n_heads"],
        "n_inner": shape("encoder.h.0.mlp.c_fc.weight")[1],
        "n_positions": shape("encoder.wpe.weight")[0] if "encoder.wpe.weight" in tensors else 1,
        "activation_function": NAMES[act_fn],
        "action_tanh": given.assume("action_tanh", True),
    }


class HFReference:
    """Hugging Face's own forward pass, read through torch hooks on its modules and named canonically."""

    def __init__(self, model: Callable[[], Any], cfg: HookedDecisionTransformerConfig) -> None:
        self.model = model
        self.cfg = cfg

    def activations(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Everything ``certify`` compares, from one evaluation-mode pass of the original model."""
        model: Any = self.model()
        seen: dict[str, Tensor] = {}
        handles = list(self._hooks(model, seen))
        training, attention = model.training, model.config._attn_implementation
        try:
            model.eval()
            model.config._attn_implementation = "eager"  # only this one returns the pattern
            with torch.no_grad(), uncompiled():
                # A subclass may return a loss; its modules are the same.
                out = _hf_class(model).forward(model, **batch, return_dict=True)
        finally:
            for handle in handles:
                handle.remove()
            model.config._attn_implementation = attention
            model.train(training)
        seen |= {"action_preds": out.action_preds, "state_preds": out.state_preds, "return_preds": out.return_preds}
        return {name: tensor.detach() for name, tensor in seen.items()}

    def _hooks(self, model: Any, seen: dict[str, Tensor]) -> Any:
        def output(module: nn.Module, name: str) -> Any:
            return module.register_forward_hook(lambda _m, _i, out: seen.__setitem__(name, out))

        def entry(module: nn.Module, name: str, pattern: str = "... -> ...", **sizes: int) -> Any:
            return module.register_forward_pre_hook(
                lambda _m, inputs: seen.__setitem__(name, rearrange(inputs[0], pattern, **sizes))
            )

        for key, name in (("embed_return", "return_to_go"), ("embed_state", "state"), ("embed_action", "action")):
            yield output(getattr(model, key), f"hook_embed_{name}")
        yield output(model.embed_timestep, "hook_embed_timestep")
        if self.cfg.position == "learned":  # GPT2Model's own way; Hugging Face's decision transformer asks for row 0
            yield model.encoder.register_forward_pre_hook(
                lambda _m, inputs, named: (inputs, {**named, "position_ids": None}), with_kwargs=True
            )
        yield entry(model.embed_ln, "hook_embed")
        yield entry(model.encoder.ln_f, f"blocks.{self.cfg.n_layers - 1}.hook_resid_post")
        yield output(model.encoder.ln_f, "hook_final")
        yield output(model.predict_action[0], "hook_action_pre")
        heads = self.cfg.n_heads
        for layer, block in enumerate(model.encoder.h):
            b = f"blocks.{layer}"
            yield entry(block.ln_1, f"{b}.hook_resid_pre")
            yield output(block.ln_1, f"{b}.attn_in")
            yield block.attn.c_attn.register_forward_hook(
                lambda _m, _i, out, b=b: seen.update(
                    zip(
                        (f"{b}.attn.hook_q", f"{b}.attn.hook_k", f"{b}.attn.hook_v"),
                        rearrange(out, "n t (which head e) -> which n t head e", which=3, head=heads),
                        strict=True,
                    )
                )
            )
            yield block.attn.register_forward_hook(
                lambda _m, _i, out, b=b: seen.__setitem__(f"{b}.attn.hook_pattern", out[1])
            )
            yield entry(block.attn.c_proj, f"{b}.attn.hook_z", "n t (head e) -> n t head e", head=heads)
            yield output(block.attn.c_proj, f"{b}.hook_attn_out")
            yield entry(block.ln_2, f"{b}.hook_resid_mid")
            yield output(block.ln_2, f"{b}.mlp_in")
            yield output(block.mlp.c_fc, f"{b}.mlp.hook_pre")
            yield entry(block.mlp.c_proj, f"{b}.mlp.hook_post")
            yield output(block.mlp.c_proj, f"{b}.hook_mlp_out")
