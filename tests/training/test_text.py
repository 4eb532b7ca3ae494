"""A language model is trained exactly, resumed exactly, and on text that is not held out."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dt_lens
from dt_lens.errors import DtLensError
from dt_lens.training.settings import TextSettings
from dt_lens.training.text import TextProgress, train_text, unigram_loss
from dt_lens.training.text_sources import read_corpus


def small(**changes: Any) -> TextSettings:
    sizes = {"vocabulary": 300, "context": 16, "d_model": 16, "n_layers": 1, "n_heads": 2, "batch_size": 8}
    return TextSettings(**{**sizes, "warmup": 2, "held_out": 0.2, **changes})


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads on matrices this small spend their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences in which each word depends on the one before: a text that can be learned."""
    rng = np.random.default_rng(0)
    after = {
        "the": ["cat", "dog"],
        "cat": ["sat"],
        "dog": ["ran"],
        "sat": ["on"],
        "ran": ["to"],
        "on": ["the"],
        "to": ["the"],
    }
    paragraphs = []
    for i in range(150):
        words, word = [f"{i}:"], "the"
        for _ in range(40):
            words.append(word)
            word = str(rng.choice(after[word]))
        paragraphs.append(" ".join(words))
    file = tmp_path_factory.mktemp("text") / "story.txt"
    file.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return file


def test_an_interrupted_run_ends_with_the_same_bits(story: Path, tmp_path: Path) -> None:
    settings, often = small(steps=20, dropout=0.1), {"checkpoint_every": 4, "eval_every": 6}
    whole = train_text([story], tmp_path / "whole", settings, **often)

    def stop(progress: TextProgress) -> None:
        if progress.step == 11:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_text([story], tmp_path / "parts", settings, **often, report=stop)
    seen: list[TextProgress] = []
    parts = train_text([story], tmp_path / "parts", settings, **often, report=seen.append)
    assert [p.step for p in seen] == list(range(9, 21))  # from the last checkpoint
    assert seen[-1].held_out is not None
    theirs = parts.state_dict()
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, theirs[name]), name
    for file in ("tokenizer.json", "heldout.txt"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()
    curves = [
        [
            (row["step"], row["loss"], row["held_out"])
            for row in map(json.loads, (tmp_path / run / "curve.jsonl").open())
        ]
        for run in ("whole", "parts")
    ]
    assert curves[0] == curves[1] and [step for step, *_ in curves[0]] == [6, 12, 18, 20]


def test_what_follows_is_learned_and_hugging_face_reads_it(story: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained = train_text([story], tmp_path, small(steps=150, lr=1e-2), eval_every=0)
    assert not trained.training
    record = json.loads((tmp_path / "training.json").read_text())
    losses = record["held_out"]["nats_per_token"]
    assert losses["model"] < 0.6 * losses["unigram"] < losses["uniform"]
    assert losses["uniform"] == pytest.approx(math.log(300))
    assert record["sources"] == {"story.txt": len(story.read_text())}

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    held_out = (tmp_path / "heldout.txt").read_text()
    assert tokenizer.decode(tokenizer.encode(held_out)) == held_out
    assert tokenizer.decode(tokenizer.encode("naïve ☃\n")) == "naïve ☃\n"  # bytes that the text has none of
    for name, weight in trained.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name

    lens = dt_lens.load(tmp_path)
    found = dt_lens.evaluate(lens)
    assert found.mean == pytest.approx(losses["model"], rel=1e-5)
    assert found.bits_per_byte == pytest.approx(record["held_out"]["bits_per_byte"]["model"], rel=1e-5)
    assert int(found.tokens.sum()) == record["held_out"]["predicted_tokens"]


def test_the_seed_decides_and_the_callers_generator_is_left_alone(story: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = (
        train_text([story], tmp_path / str(i), small(steps=2, seed=s), eval_every=0) for i, s in enumerate((0, 0, 1))
    )
    assert torch.equal(torch.get_rng_state(), before)
    name = "transformer.h.0.mlp.c_fc.weight"
    assert torch.equal(a.state_dict()[name], b.state_dict()[name])
    assert not torch.equal(a.state_dict()[name], c.state_dict()[name])


def test_another_run_in_the_folder_is_not_resumed(story: Path, tmp_path: Path) -> None:
    train_text([story], tmp_path, small(steps=1), eval_every=0)
    with pytest.raises(DtLensError, match="another lr"):
        train_text([story], tmp_path, small(steps=1, lr=0.5), eval_every=0)
    other = tmp_path / "other.txt"
    other.write_text(story.read_text().replace("dog", "pig"))
    with pytest.raises(DtLensError, match="another text"):
        train_text([other], tmp_path, small(steps=1), eval_every=0)
    held_out = (tmp_path / "heldout.txt").read_text()
    paragraph = next(p for p in story.read_text().split("\n\n") if p not in held_out)
    other.write_text(story.read_text().replace(paragraph, paragraph.upper()))  # what is held out stays the same
    with pytest.raises(DtLensError, match="another text"):
        train_text([other], tmp_path, small(steps=1), eval_every=0)
    train_text([other], tmp_path, small(steps=1), eval_every=0, resume=False)
    assert (tmp_path / "heldout.txt").read_text() == held_out
    (tmp_path / "checkpoint.pt").write_bytes(b"half")
    with pytest.raises(DtLensError, match=r"checkpoint\.pt is damaged"):
        train_text([story], tmp_path, small(steps=1), eval_every=0)


def test_a_text_shorter_than_the_context_is_one_sentence(story: Path, tmp_path: Path) -> None:
    with pytest.raises(DtLensError, match=r"The text has .* tokens; it must have more than context, 100000\."):
        train_text([story], tmp_path, small(steps=1, context=100_000))


@pytest.mark.parametrize(("name", "least"), [("eval_every", 0), ("checkpoint_every", 1)])
def test_bad_intervals_are_one_sentence(story: Path, tmp_path: Path, name: str, least: int) -> None:
    with pytest.raises(DtLensError, match=f"{name} is -1; it must be a whole number of at least {least}"):
        train_text([story], tmp_path, small(), **{name: -1})


def test_the_unigram_model_counts() -> None:
    trained = np.array([0, 0, 0, 1])
    assert unigram_loss(trained, np.array([0]), 2) == pytest.approx(-math.log(4 / 6))
    assert unigram_loss(trained, np.array([1, 2]), 3) == pytest.approx(-(math.log(2 / 7) + math.log(1 / 7)) / 2)


def test_held_out_text_is_not_trained_on(story: Path) -> None:
    corpus = read_corpus([story], unwrap=False, held_out=0.25, seed=0)
    everything = story.read_text().split("\n\n")
    held = corpus.held_out.strip().split("\n\n")
    trained = [paragraph for segment in corpus.segments for paragraph in segment.split("\n\n")]
    assert sorted(held + trained) == sorted(everything) and not set(held) & set(trained)
    assert 0.15 < len(held) / len(everything) < 0.35
    assert len(corpus.segments) > 1  # no segment runs across what was taken out
    for segment in corpus.segments:
        assert segment in story.read_text()
    assert read_corpus([story], unwrap=False, held_out=0.25, seed=1).held_out != corpus.held_out


def test_repeats_menus_and_markup_are_left_out(tmp_path: Path) -> None:
    filler = "\n\n".join(f"Paragraph {i} " + "x" * 80 for i in range(60))
    page = (
        "<html><head><title>no</title></head><body><script>no()</script><div>A menu that every page has</div>"
        "<p>One &amp; two\n three</p><pre>a = 1\nb = 2</pre><svg><text>no</text></svg><p>{}</p></body></html>"
    )
    (tmp_path / "a.html").write_text(page.format("first"))
    (tmp_path / "b.html").write_text(page.format("second"))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(f"Lines of\na page.\n\n{filler}".encode()))
    files = [tmp_path / name for name in ("a.html", "b.html", "c.txt.gz")]
    corpus = read_corpus(files, unwrap=True, held_out=0.01, seed=0)
    text = "\n\n".join(corpus.segments) + corpus.held_out
    assert text.count("A menu that every page has") == 1 and "no" not in text
    assert "One & two three" in text and "a = 1\nb = 2" in text and "second" in text and "first" in text
    assert "Lines of a page." in text
    assert list(corpus.characters) == ["a.html", "b.html", "c.txt.gz"]
    assert "Lines of\na page." in "\n\n".join(read_corpus(files, unwrap=False, held_out=0.01, seed=0).segments)


def test_sources_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "half.gz").write_bytes(gzip.compress(b"x" * 100)[:20])
    (tmp_path / "no.gz").write_bytes(b"plain")
    (tmp_path / "short.txt").write_text("short")
    for name, words in (
        ("latin.txt", "UTF-8"), ("half.gz", "half.gz"), ("no.gz", "no.gz"), ("short.txt", "5 characters"),
        ("none.txt", "does not exist; check the path"),
    ):  # fmt: skip
        with pytest.raises(DtLensError, match=words):
            read_corpus([tmp_path / name], unwrap=False, held_out=0.1, seed=0)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "short.txt").write_text("other")
    with pytest.raises(DtLensError, match="Two of the sources"):
        read_corpus([tmp_path / "short.txt", tmp_path / "d" / "short.txt"], unwrap=False, held_out=0.1, seed=0)
