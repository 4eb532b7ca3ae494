"""The lens on a language model: Hugging Face's own model runs, and its weights and activations have canonical names."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dt_lens.errors import DtLensError, as_written
from dt_lens.language_model.batch import positions_of, require_tokens
from dt_lens.language_model.config import LanguageModelConfig
from dt_lens.language_model.embeddings import language_model_embeddings
from dt_lens.language_model.family import Family
from dt_lens.language_model.labels import token_labels
from dt_lens.language_model.parts import Blocks
from dt_lens.language_model.passage import hook_names, passing
from dt_lens.language_model.reference import LanguageModelReference
from dt_lens.language_model.stopping import entering
from dt_lens.language_model.text import TextMethods
from dt_lens.lens.assumed import assumed_text
from dt_lens.lens.embeddings import EmbeddingRegistry
from dt_lens.lens.hooks import HookedModule, HookPoint, copy_edits
from dt_lens.lens.matrices import Structure
from dt_lens.lens.placement import Configured
from dt_lens.lens.printing import Printed, Rows, Weights, listed, size_of
from dt_lens.lens.weights import require_computable

__all__ = ["HookedLanguageModel"]

TABLES = ("embed.W_E", "unembed.W_U", "pos_embed.W_pos", "ln_final.w", "embed_ln.w")


class HookedLanguageModel(Printed, Configured[LanguageModelConfig], TextMethods, HookedModule):
    """A language model whose every activation can be read and replaced, and whose weights are the wrapped model's own.

    ``model(tokens)`` gives logits; ``run_with_cache``, ``run_with_hooks`` and ``hooks`` are TransformerLens's, and so
    are the names (``passage.hook_names`` lists them). Without hooks a call is the wrapped model's own forward pass.
    With hooks it still is, uncompiled; only one on the pattern, or on rotated queries and keys, has it compute
    attention with Hugging Face's eager code for that call.

    Args:
        model: a model of Hugging Face's class.
        family: the declaration that fits it.
        cfg: its configuration.
        tokenizer: names the tokens, and turns text into them; numbered tokens without.
        original: the user's own model, if ``model`` merely shares its memory.
        check_shared: raises when ``original`` no longer shares the weights of these names.

    Attributes:
        original: the user's own model: an edit made here is seen there.
        assumed: the options that neither the checkpoint nor the user said, and what was taken for them.
        reference: its activations under canonical names, against which ``certify`` checks the weights.
        identity: unique to this model, so that embeddings of two models are never mixed.

    Raises:
        DtLensError: for a model that has a weight too many or too few for its configuration, or weights that no forward
            pass can use.
    """

    kind = "language model"
    can_run, can_act = True, False

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        cfg: LanguageModelConfig,
        tokenizer: Any = None,
        *,
        original: nn.Module | None = None,
        check_shared: Callable[[Sequence[str]], None] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        # Not registered as a submodule, which would list every module twice.
        object.__setattr__(self, "original", model if original is None else original)
        self.cfg = cfg
        self.family = family
        self.identity = uuid.uuid4().hex
        # A live model has its unembedding under a key of its own, tied or not.
        self._layout = family.layout(cfg.replace(tied=False))
        self._check_shared = check_shared
        self.assumed: Mapping[str, Any] = {}
        self._embeddings: EmbeddingRegistry | None = None
        self._standard: dict[str, Tensor] = {}
        self._tables: tuple[Any, ...] = ()
        self._labels: list[str] | None = None
        # The hooks of each ``with lens.hooks(...)`` that is open, and what has put those of the last one in place.
        self._open: list[frozenset[str]] = []
        self._standing: ExitStack | None = None
        self.tokenizer = tokenizer
        self.reference = LanguageModelReference(model, family, cfg)
        require_computable(self.weights)
        if tokenizer is not None:
            _ = self.labels  # refuses a tokenizer of another model now
        self.setup()

    def setup(self) -> None:
        """Make the hook points; the wrapped model's modules are left without names."""
        self.mod_dict: dict[str, Any] = {}
        self.hook_dict = {}
        for name in hook_names(self.cfg):
            point: Any = HookPoint()
            point.name = name
            self.mod_dict[name] = self.hook_dict[name] = point

    @property
    def training(self) -> bool:
        """The wrapped model's mode, whoever set it."""
        model: nn.Module | None = self._modules.get("model") if "_modules" in self.__dict__ else None
        return model is not None and model.training

    @training.setter
    def training(self, mode: bool) -> None:
        pass  # train() and eval() set the wrapped model's mode, which is read above

    @property
    def tokenizer(self) -> Any:
        """Turns text into tokens and names them, or ``None``. Setting another one changes the labels."""
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._tokenizer, self._labels, self._tables = tokenizer, None, ()

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """Every weight by its canonical name, a view of the wrapped model's own: writing into one edits that."""
        views = self._layout.views(self.model.state_dict())
        return Weights((name, view.detach()) for name, view in views.items())

    @property
    def embeds_plainly(self) -> bool:
        """Whether what enters the first block is ``hook_embed``, plus ``hook_pos_embed``."""
        return not self.cfg.embed_ln and self.cfg.embed_scale == 1

    @property
    def blocks(self) -> Blocks:
        """The weights of each block as attributes: ``model.blocks[0].attn.W_O``; live, as those of ``weights``."""
        return Blocks(self.cfg.n_layers, tuple(self._layout.entries), self._weight)

    def _weight(self, name: str) -> Tensor:
        """One weight, without making the views of all."""
        entry = self._layout.entries[name]
        try:
            return entry.view(self.model.get_parameter(entry.key)).detach()
        except AttributeError:
            return self.weights[name]

    @property
    def ln_final(self) -> nn.Module:
        """The wrapped model's last norm, which may be called."""
        found: nn.Module = self.model.get_submodule(self.family.modules.ln_final)
        return found

    @property
    def unembed(self) -> nn.Module:
        """The wrapped model's unembedding, which may be called: ``x @ W_U + b_U``."""
        found: nn.Module = self.model.get_submodule(self.family.modules.unembed)
        return found

    @property
    def arithmetic(self) -> torch.dtype | None:
        """The type that the forward pass computes in, where it is not the weights' own."""
        wide = self.weights["embed.W_E"].dtype == torch.float64
        return torch.float32 if wide and self.family.single_inside else None

    @property
    def structure(self) -> Structure:
        """Blocks, heads, and which norm stands before which matrix."""
        return self.cfg.structure

    @property
    def labels(self) -> list[str]:
        """The label of each token; numbered without a tokenizer."""
        if self._labels is None:
            n = self.cfg.d_vocab
            self._labels = [f"token {i}" for i in range(n)]
            if self.tokenizer is not None:
                self._labels = token_labels(self.tokenizer, n)
        return self._labels

    @property
    def embeddings(self) -> EmbeddingRegistry:
        """``token_in``, ``token_out`` and ``position_in`` where positions are learned; you may add sets.

        ``embeddings["token_out_centred"]`` is computed on access: ``token_out`` less its mean over the vocabulary.
        """
        tables = {name: weight for name, weight in self.weights.items() if name in TABLES}
        place = tuple((weight.data_ptr(), weight.dtype, weight.device) for weight in tables.values())
        if self._embeddings is None or place != self._tables:
            fresh = language_model_embeddings(tables, self.cfg.d_model, self.identity, self.labels, self.structure)
            # Keep the sets that the user added; the standard ones are views of weights that have moved.
            for name, own in ({} if self._embeddings is None else self._embeddings).items():
                if own.directions is not self._standard.get(name):
                    fresh[name] = own
            self._embeddings, self._tables = fresh, place
            self._standard = {name: fresh[name].directions for name in fresh}
        return self._embeddings

    def probe(self, seed: int = 0) -> dict[str, Any]:
        """Two random texts of up to seven tokens: ``{"tokens": [2, 7]}``."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(self.cfg.d_vocab, (2, min(7, self.cfg.n_ctx)), generator=generator)
        return {"tokens": tokens.to(next(self.model.parameters()).device)}

    @property
    def table_scale(self) -> Tensor | float:
        """What a row of ``embed.W_E`` is multiplied by when it enters the stream, in the table's type.

        Raises:
            DtLensError: when the model multiplies by another number than its configuration says.
        """
        name = self.family.modules.embed_scale
        if name is None:
            return 1.0
        embed = self.model.get_submodule(self.family.modules.embed)
        scale: Tensor = getattr(embed, name).to(next(embed.parameters()).dtype)
        # In bfloat16 the number is rounded, and stays so where the model is widened later.
        if abs(float(scale) / self.cfg.embed_scale - 1) > torch.finfo(torch.bfloat16).eps:
            raise DtLensError(
                f"The model multiplies its token embeddings by {float(scale):g}, and its configuration says "
                f"{self.cfg.embed_scale:g}; the adapter declares embed_scale wrongly."
            )
        return scale

    def rows_read(self, batch: Mapping[str, Any]) -> dict[str, tuple[str, Tensor]]:
        """For each table the hook that shows what is looked up on ``batch``, and the rows that this should be."""
        tokens = batch["tokens"]
        read = {"embed.W_E": ("hook_embed", tokens)}
        learned = self.cfg.position == "learned"
        return {**read, "pos_embed.W_pos": ("hook_pos_embed", torch.arange(tokens.shape[1]))} if learned else read

    def forward(
        self,
        tokens: Tensor | str | Sequence[str],
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool = False,
        stop_at_layer: int | None = None,
    ) -> Any:
        """Logits ``[batch, pos, d_vocab]`` of the next token, for tokens ``[batch, pos]`` or text.

        Args:
            tokens: whole numbers below ``cfg.d_vocab``; or a text or several, given a tokenizer. Shorter texts are
                padded on the right, and the padding is masked.
            attention_mask: ``[batch, pos]``, 0 for padding; all real when omitted.
            position_ids: ``[batch, pos]`` or ``[1, pos]``, each below ``cfg.n_ctx``. When omitted, the real tokens of
                each row are numbered from 0, as Hugging Face's ``generate`` numbers them, so that padding on the left
                changes no logit of a real token. Hugging Face's own forward pass numbers padding too. With ALiBi the
                mask alone says the distances, and there are no positions to give.
            return_type: ``"logits"``; ``"loss"``, the mean cross-entropy of every real token that follows a real one,
                in nats; ``"both"``, logits and loss; or ``None``, which does not unembed and gives nothing.
            loss_per_token: the loss of each instead, ``[batch, pos - 1]``, 0 for padding.
            prepend_bos: as for ``to_tokens``; of text only.
            stop_at_layer: end before this block, and give the stream ``[batch, pos, d_model]`` that enters it. A
                negative number counts from the last; the number of blocks ends after the last one.

        Raises:
            DtLensError: for tokens of another shape, beyond the vocabulary or more than the context holds, or a mask or
                positions that do not fit them.
        """
        if return_type not in ("logits", "loss", "both", None):
            raise DtLensError(f"return_type is {as_written(return_type)}; it must be 'logits', 'loss', 'both' or None.")
        stop = self._block(stop_at_layer)
        if stop is not None and return_type in ("loss", "both"):
            raise DtLensError(
                f"A pass with stop_at_layer={stop} has no logits, so return_type={return_type!r} is none."
            )
        if isinstance(tokens, Tensor):
            ids = tokens
        else:
            ids, mask = self._encoded(tokens, prepend_bos)
            if attention_mask is None and not bool(mask.all()):
                attention_mask = mask
        require_tokens(self.cfg, ids, attention_mask, position_ids, self.tokenizer)
        if position_ids is None and attention_mask is not None and self.cfg.position != "alibi":
            position_ids = positions_of(attention_mask)

        def run() -> Any:
            return self.model(
                input_ids=ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=False,
                return_dict=True,
            )

        with self._hooked():
            if stop is not None:
                return entering(self._module_at(stop), run)
            if return_type is None:
                entering(self.unembed, run)
                return None
            logits: Tensor = run().logits
        if return_type == "logits":
            return logits
        loss = _loss(logits, ids, attention_mask, loss_per_token)
        return loss if return_type == "loss" else (logits, loss)

    def _module_at(self, layer: int) -> nn.Module:
        """The block of this number, or what follows the last one."""
        at, n = self.family.modules, self.cfg.n_layers
        return self.ln_final if layer == n else self.model.get_submodule(at.block.replace("{l}", str(layer)))

    @contextmanager
    def _hooked(self) -> Iterator[bool]:
        """The wrapped model's own passes with the hooks that there are; whether there are any."""
        hooked = self._names_hooked()
        if self._open and self._open[-1] == hooked:  # inside ``with lens.hooks(...)`` they are in place already
            yield bool(hooked)
            return
        # Attention that is always eager needs a mask that its arithmetic holds, hooks or not.
        remasked = self.family.modules.core_kind == "dropout" and self.arithmetic is not None
        self._close()
        try:
            if hooked or remasked:
                with self._passing(hooked):
                    yield bool(hooked)
            else:
                yield False
        finally:
            self._reopen()

    def _names_hooked(self) -> frozenset[str]:
        return frozenset(name for name, point in self.hook_dict.items() if point.has_hooks())

    def _passing(self, hooked: frozenset[str]) -> Any:
        return passing(self.model, self.family, self.cfg, lambda name, x: self.hook_dict[name](x), hooked.__contains__)

    def _close(self) -> None:
        """Take the hooks off the wrapped model, if ``_reopen`` put them there."""
        standing, self._standing = self._standing, None
        if standing is not None:
            standing.close()

    def _reopen(self) -> None:
        """Put the hooks of the innermost ``with lens.hooks(...)`` on the wrapped model, for calls of its own."""
        self._close()
        if self._open:
            standing = ExitStack()
            standing.enter_context(self._passing(self._open[-1]))
            self._standing = standing

    @contextmanager
    def _throughout(self) -> Iterator[None]:
        """Hooks also act when the user calls the wrapped model itself."""
        mine = self._names_hooked()
        if not mine:
            yield
            return
        self._open.append(mine)
        try:
            with super()._throughout():
                self._reopen()
                yield
        finally:
            self._open.remove(mine)
            self._reopen()

    def require_shared(self, names: Sequence[str]) -> None:
        """Check that the user's own model still shares these weights' memory.

        Raises:
            DtLensError: naming the first that it does not, so that an edit would miss it.
        """
        if self._check_shared is not None:
            self._check_shared(names)

    def untrained(self, seed: int = 0) -> HookedLanguageModel:
        """A model of the same class and configuration before any training, repeatable by ``seed``."""
        model: Any = self.model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh = type(model)(copy.deepcopy(model.config)).eval()
        return HookedLanguageModel(fresh, self.family, self.cfg)

    def __deepcopy__(self, memo: dict[int, Any]) -> HookedLanguageModel:
        """A lens on a copy of the model, on memory of its own; edits in force are in force on the copy too."""
        copied = HookedLanguageModel(copy.deepcopy(self.model, memo), self.family, self.cfg, self.tokenizer)
        copy_edits(self, copied, memo)
        copied.assumed = self.assumed
        return copied

    def _shown(self) -> tuple[str, Rows]:
        cfg, active = self.cfg, getattr(self, "active_edits", ())
        title = (
            f"{type(self).__name__}: {cfg.family}, {cfg.n_layers} layers x {cfg.n_heads} heads, d_model {cfg.d_model}, "
            f"d_mlp {cfg.d_mlp}, vocabulary {cfg.d_vocab:,}, context {cfg.n_ctx}"
        )
        # Making the embeddings would look at every row of a large table.
        known = ["token_in", "token_out", *(["position_in"] if cfg.position == "learned" else [])]
        rows = [
            ("weights", size_of(self.weights)),
            ("embeddings", listed(known if self._embeddings is None else self._embeddings)),
            ("tokenizer", "none: tokens are numbers" if self.tokenizer is None else type(self.tokenizer).__name__),
        ]
        rows += [("in force", listed([f"{edit.matrix.name} sv={edit.sv}" for edit in active], 3))] if active else []
        rows += [("assumed", assumed_text(self.assumed))] if self.assumed else []
        return title, [*rows, ("next", "dt_lens.WeightSVD(model), dt_lens.evaluate(model), model.weights")]


def _loss(logits: Tensor, ids: Tensor, mask: Tensor | None, per_token: bool) -> Tensor:
    """Cross-entropy of each token given those before it, in float32 at least; means are over the real ones."""
    wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    found = -wide.log_softmax(-1).gather(-1, ids[:, 1:, None].to(wide.device))[..., 0]
    if mask is None:
        return found if per_token else found.mean()
    real = (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    found = found * real.to(found)
    return found if per_token else found.sum() / real.sum()
