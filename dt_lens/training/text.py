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

from dt_lens.arguments import atomic_write, local_path, require_writable, whole_number
from dt_lens.behaviour.texts.windows import cut
from dt_lens.errors import DtLensError, a_type, unwritable
from dt_lens.training.run import CHECKPOINT, TrainingRun
from dt_lens.training.settings import TextSettings
from dt_lens.training.text_sources import Corpus, read_corpus

__all__ = ["TextProgress", "make_tokenizer", "train_text", "unigram_loss"]

RECORD = "training.json"
HELD_OUT = "heldout.txt"
END = "<|endoftext|>"


@dataclass(frozen=True)
class TextProgress:
    """What ``report`` is called with after every step; losses are in nats per token."""

    step: int
    steps: int
    loss: float  # mean of the steps since the last row of the curve; just after a row, the row's own
    held_out: float | None  # the newest; None before the first


def train_text(
    sources: Iterable[str | Path],
    out: str | Path,
    settings: TextSettings | None = None,
    *,
    eval_every: int = 250,
    checkpoint_every: int = 100,
    resume: bool = True,
    device: str | torch.device = "cpu",
    report: Callable[[TextProgress], None] | None = None,
) -> nn.Module:
    """Train a ``GPT2LMHeadModel`` and its byte-level BPE tokenizer; the defaults are the bundled ``tiny-gpt2``'s.

    ``out`` ends up with the files that ``AutoModelForCausalLM`` and ``AutoTokenizer`` read, and with ``heldout.txt``
    (the text that was not trained on: ``evaluate``'s default text), ``training.json`` (settings, sources, held-out
    losses of this model, a uniform and a unigram model), ``curve.jsonl`` (a row for every ``eval_every`` steps) and
    ``checkpoint.pt``, from which the same call resumes after an interruption. A resumed run ends with the same bits as
    an uninterrupted one on the same machine with the same number of threads.

    Args:
        sources: text files; see ``read_corpus``.
        out: the folder to write.
        settings: everything else that decides what training ends with; ``TextSettings()`` by default.
        eval_every: steps between held-out losses; 0 for the last step only.
        checkpoint_every: steps between checkpoints.
        resume: whether to resume an unfinished run in ``out``.
        device: where the model trains.
        report: called after every step.

    Returns:
        The trained model in evaluation mode.

    Raises:
        DtLensError: if a source cannot be read, the settings do not make a model, ``out`` holds a checkpoint of another
            run, or the folder cannot be written.
    """
    eval_every = whole_number(eval_every, "eval_every", 0)
    checkpoint_every = whole_number(checkpoint_every, "checkpoint_every", 1)
    settings = TextSettings() if settings is None else settings
    if not isinstance(settings, TextSettings):
        raise DtLensError(f"settings is {a_type(settings)}; it must be a TextSettings.")
    require_writable(local_path(out, "out") / CHECKPOINT)
    corpus = read_corpus(sources, unwrap=settings.unwrap, held_out=settings.held_out, seed=settings.seed)
    with torch.random.fork_rng(devices=[]):
        run = _TextRun(settings, corpus, local_path(out, "out"), torch.device(device))
        if resume:
            run.resume()
        run.finish(eval_every, checkpoint_every, report or (lambda _: None))
    model: nn.Module = run.model
    return model


def make_tokenizer(segments: Iterable[str], vocabulary: int, context: int) -> Any:
    """Train a byte-level BPE tokenizer like GPT-2's on these texts: any text round-trips, no token is unknown.

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
    """The loss of a unigram model, in nats per predicted token.

    The model gives each token its frequency in the training text, with one added to every count (Laplace).

    Args:
        trained: token ids of the training text.
        predicted: token ids that are predicted.
        vocabulary: number of tokens.
    """
    counts = np.bincount(trained, minlength=vocabulary) + 1.0
    return float(-np.log(counts / counts.sum())[predicted].mean())


@contextmanager
def _no_bars() -> Iterator[None]:
    """Turn off transformers' own progress bars: writing five megabytes does not need one."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class _TextRun(TrainingRun):
    """Trains a GPT-2 to predict windows of a text."""

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
            raise DtLensError(
                f"The text has {len(self.tokens)} tokens; it must have more than context, {settings.context}."
            )
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

    def loss(self) -> Tensor:
        settings = self.settings
        starts = torch.randint(len(self.tokens) - settings.context, (settings.batch_size, 1)).to(self.device)
        batch = self.tokens[starts + torch.arange(settings.context + 1, device=self.device)]
        with self.autocast():
            logits = self.model(batch[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    def measure(self) -> dict[str, Any]:
        return {"held_out": self.held_out_loss()}

    def progress(self) -> TextProgress:
        held_out = self.curve[-1]["held_out"] if self.curve else None
        return TextProgress(self.step, self.settings.steps, self.mean_loss, held_out)

    def held_out_loss(self) -> float:
        """The mean over the held-out windows, in nats per token; equals what ``evaluate`` gives for ``heldout.txt``."""
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

    def write(self) -> None:
        """Write the model, its tokenizer, the held-out text and ``training.json``."""
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
