"""Train a small GPT-2 with a tokenizer of its own on text files, stoppable at any time and resumed exactly."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dt_lens.arguments import atomic_write, local_path
from dt_lens.behaviour.texts.windows import cut
from dt_lens.errors import DtLensError, unwritable
from dt_lens.training.run import Schedule, TrainingRun
from dt_lens.training.text_sources import Corpus, read_corpus

__all__ = ["Progress", "TextSettings", "train_text"]

RECORD = "training.json"
HELD_OUT = "heldout.txt"
END = "<|endoftext|>"


@dataclass(frozen=True)
class TextSettings(Schedule):
    """Everything that decides what a training run ends with, beside the text."""

    vocabulary: int
    context: int
    d_model: int
    n_layers: int
    n_heads: int
    dropout: float
    steps: int
    batch_size: int
    lr: float
    warmup: int
    weight_decay: float
    clip: float
    bf16: bool
    unwrap: bool
    held_out: float
    seed: int


@dataclass(frozen=True)
class Progress:
    """What ``report`` is told after every step; losses are in nats per token."""

    step: int
    steps: int
    loss: float  # mean of the steps since the last row of the curve
    held_out: float | None  # the newest; None before the first


def train_text(
    sources: Iterable[str | Path],
    out: str | Path,
    *,
    vocabulary: int = 3_072,
    context: int = 128,
    d_model: int = 128,
    n_layers: int = 4,
    n_heads: int = 4,
    dropout: float = 0.0,
    steps: int = 4_000,
    batch_size: int = 16,
    lr: float = 2e-3,
    warmup: int = 200,
    weight_decay: float = 0.1,
    clip: float = 1.0,
    bf16: bool = True,
    unwrap: bool = False,
    held_out: float = 0.015,
    seed: int = 0,
    eval_every: int = 250,
    checkpoint_every: int = 100,
    resume: bool = True,
    device: str | torch.device = "cpu",
    report: Callable[[Progress], None] | None = None,
) -> nn.Module:
    """Train a ``GPT2LMHeadModel`` and its byte-level BPE tokenizer; the defaults are the bundled ``tiny-gpt2``'s.

    ``out`` ends up with what ``AutoModelForCausalLM`` and ``AutoTokenizer`` read, and with ``heldout.txt`` (what was
    not trained on: ``evaluate``'s default text), ``training.json`` (settings, sources, held-out losses beside those of
    a uniform and a unigram model), ``curve.jsonl`` (a row for every ``eval_every`` steps) and ``checkpoint.pt``, from
    which the same call goes on after an interruption: what it ends with is the same to the bit on the same machine
    with the same number of threads.

    Args:
        sources: text files; see ``read_corpus``.
        out: the folder to write.
        vocabulary: tokens, the 256 bytes and the end of text among them.
        context: tokens of a window.
        d_model, n_layers, n_heads: the shape of the transformer.
        dropout: in training only.
        steps: gradient steps.
        batch_size: windows in a batch, each from anywhere in the text.
        lr: of AdamW, reached after ``warmup`` steps and taken down half a cosine to a hundredth of it.
        weight_decay: of the matrices.
        clip: the largest gradient norm.
        bf16: whether matrix products run in bfloat16 (weights, sums and the optimizer stay in float32).
        unwrap: whether lines of a plain text's paragraphs are joined.
        held_out: the share of the text to hold out.
        seed: of the held-out choice, the initial weights, the windows and dropout.
        eval_every: steps between held-out losses; 0 for the last step only.
        checkpoint_every: steps between checkpoints.
        resume: whether to go on from ``out`` where it holds an unfinished run.
        device: where the model trains.
        report: called after every step.

    Returns:
        The trained model in evaluation mode.

    Raises:
        DtLensError: for a source that cannot be read, settings that make no model, a checkpoint of another run in
            ``out``, or a folder that cannot be written.
    """
    settings = TextSettings(
        vocabulary, context, d_model, n_layers, n_heads, dropout, steps, batch_size, lr, warmup, weight_decay, clip,
        bf16, unwrap, held_out, seed,
    )  # fmt: skip
    _check(settings, eval_every, checkpoint_every)
    corpus = read_corpus(sources, unwrap=unwrap, held_out=held_out, seed=seed)
    with torch.random.fork_rng(devices=[]):
        run = _Run(settings, corpus, local_path(out, "out"), torch.device(device))
        if resume:
            run.resume()
        run.finish(eval_every, checkpoint_every, report or (lambda _: None))
    model: nn.Module = run.model
    return model


def _check(settings: TextSettings, eval_every: int, checkpoint_every: int) -> None:
    least = {"steps": 1, "batch_size": 1, "n_layers": 1, "n_heads": 1, "d_model": 1, "context": 2, "vocabulary": 257}
    for name, value in least.items():
        if getattr(settings, name) < value:
            raise DtLensError(f"{name} is {getattr(settings, name)}; it must be at least {value}.")
    if settings.d_model % settings.n_heads:
        raise DtLensError(f"d_model is {settings.d_model}; it must be a multiple of n_heads, {settings.n_heads}.")
    if not 0 <= settings.dropout < 1 or not 0 < settings.held_out < 1:
        raise DtLensError("dropout must be at least 0, held_out above 0, and both below 1.")
    if not settings.lr > 0 or not settings.clip > 0 or min(settings.warmup, settings.weight_decay, eval_every) < 0:
        raise DtLensError("lr and clip must be positive, and warmup, weight_decay and eval_every not negative.")
    if checkpoint_every < 1:
        raise DtLensError(f"checkpoint_every is {checkpoint_every}; it must be at least 1.")


def make_tokenizer(segments: Iterable[str], vocabulary: int, context: int) -> Any:
    """A byte-level BPE tokenizer of these texts, as GPT-2's: any text round-trips, nothing is unknown.

    Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units" (2016); bytes as by Radford et al.,
    "Language Models are Unsupervised Multitask Learners" (2019).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(segments, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def unigram_loss(trained: np.ndarray[Any, Any], predicted: np.ndarray[Any, Any], vocabulary: int) -> float:
    """Nats per predicted token of the model that knows each token's frequency in the training text, each counted
    once more than it was seen (Laplace)."""
    counts = np.bincount(trained, minlength=vocabulary) + 1.0
    return float(-np.log(counts / counts.sum())[predicted].mean())


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without transformers' own progress bars: a file of five megabytes needs none."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class _Run(TrainingRun):
    """Learns to predict windows of a text."""

    settings: TextSettings

    def __init__(self, settings: TextSettings, corpus: Corpus, out: Path, device: torch.device) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        self.corpus = corpus
        self.tokenizer = make_tokenizer(corpus.segments, settings.vocabulary, settings.context)
        end = self.tokenizer.eos_token_id
        encoded = self.tokenizer(list(corpus.segments), add_special_tokens=False, verbose=False)["input_ids"]
        ids = [np.asarray([*segment, end], dtype=np.int64) for segment in encoded]
        self.tokens = torch.from_numpy(np.concatenate(ids)).to(device)
        if len(self.tokens) <= settings.context:
            raise DtLensError(f"The text has {len(self.tokens)} tokens; it must have more than context has.")
        self.windows = cut([corpus.held_out], self.tokenizer, settings.context)
        torch.manual_seed(settings.seed)
        drop = settings.dropout
        model: Any = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(self.tokenizer),
                n_positions=settings.context,
                n_embd=settings.d_model,
                n_layer=settings.n_layers,
                n_head=settings.n_heads,
                embd_pdrop=drop,
                attn_pdrop=drop,
                resid_pdrop=drop,
                bos_token_id=end,
                eos_token_id=end,
            )
        ).to(device)
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim <= 1]
        optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=settings.lr,
            betas=(0.9, 0.95),
            fused=True,
        )
        super().__init__(settings, {"text": self._text_id()}, out, model, optimizer)

    def finish(self, eval_every: int, checkpoint_every: int, report: Callable[[Progress], None]) -> None:
        """Train to the last step, measuring and saving on the way."""
        steps = self.settings.steps
        while self.step < steps:
            self.learn()
            last = self.step == steps
            if last or (eval_every and self.step % eval_every == 0):
                self.note(held_out=self.held_out_loss())
            if last or self.step % checkpoint_every == 0:
                self.save()
            held_out = self.curve[-1]["held_out"] if self.curve else None
            report(Progress(self.step, steps, self.mean_loss, held_out))
        self.model.eval()
        self._write()

    def loss(self) -> Tensor:
        settings = self.settings
        starts = torch.randint(len(self.tokens) - settings.context, (settings.batch_size, 1)).to(self.device)
        batch = self.tokens[starts + torch.arange(settings.context + 1, device=self.device)]
        with self.autocast():
            logits = self.model(batch[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    def held_out_loss(self) -> float:
        """Mean over the held-out windows, in nats per token: what ``evaluate`` finds for ``heldout.txt``."""
        self.model.eval()
        total, count = 0.0, 0
        windows = self.windows.tokens
        with torch.inference_mode():
            for i in range(0, len(windows), 16):
                batch: Tensor = torch.from_numpy(np.stack(windows[i : i + 16])).to(self.device)
                logits = self.model(batch, use_cache=False).logits[:, :-1].double()
                total += float(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
                count += batch[:, 1:].numel()
        return total / count

    def _text_id(self) -> str:
        digest = hashlib.sha256(self.tokens.cpu().numpy().astype("<i8").tobytes())
        digest.update(self.corpus.held_out.encode())
        return digest.hexdigest()[:16]

    def _record(self) -> dict[str, Any]:
        predicted = np.concatenate([window[self.windows.unpredicted :] for window in self.windows.tokens])
        vocabulary = len(self.tokenizer)
        losses = {
            "model": self.curve[-1]["held_out"],
            "unigram": unigram_loss(self.tokens.cpu().numpy(), predicted, vocabulary),
            "uniform": math.log(vocabulary),
        }
        return {
            "settings": asdict(self.settings),
            "sources": self.corpus.characters,
            "training": {
                "tokens": len(self.tokens),
                "characters": sum(map(len, self.corpus.segments)),
                "bytes": sum(len(segment.encode()) for segment in self.corpus.segments),
            },
            "held_out": {
                "windows": len(self.windows),
                "predicted_tokens": len(predicted),
                "bytes_per_token": self.windows.bytes_per_token,
                "nats_per_token": losses,
                "bits_per_byte": {
                    name: loss / math.log(2) / self.windows.bytes_per_token for name, loss in losses.items()
                },
            },
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "seconds": self.curve[-1]["seconds"],
        }

    def _write(self) -> None:
        """What is read by others: model, tokenizer, held-out text, record."""
        try:
            with _no_bars():
                self.model.save_pretrained(self.out)
            self.tokenizer.save_pretrained(self.out)
        except (OSError, RuntimeError) as error:
            raise unwritable(self.out, error) from error
        with atomic_write(self.out / HELD_OUT) as part:
            part.write_text(self.corpus.held_out, encoding="utf-8", newline="\n")
        with atomic_write(self.out / RECORD) as part:
            part.write_text(json.dumps(self._record(), indent=2) + "\n", encoding="utf-8")
