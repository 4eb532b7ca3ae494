"""Text in and out: tokens and strings, loss, and generation as Hugging Face's, also inside edits and hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dt_lens
from dt_lens import DtLensError, SingularEdit

TOKENS = torch.tensor([[3, 1, 4, 1, 5], [2, 7, 18, 2, 8]])


@pytest.fixture(scope="module")
def named() -> Any:
    return dt_lens.load("tiny-gpt2", check=False)


@pytest.fixture(scope="module", params=["gpt2", "gptj", "llama"])
def lens(request: pytest.FixtureRequest, make_lm: Any) -> Any:
    return dt_lens.wrap(make_lm(request.param), check=False)


def theirs(lens: Any, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    """The continuation by Hugging Face's own method."""
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    found: torch.Tensor = lens.model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    return found


def test_tokens_and_strings(named: Any) -> None:
    text = "Once upon a time"
    tokens = named.to_tokens(text)
    assert tokens.tolist() == [named.tokenizer.encode(text)]
    assert named.to_string(tokens[0]) == text and named.to_string(tokens) == [text]
    parts = named.to_str_tokens(text)
    assert "".join(parts) == text and len(parts) == tokens.shape[1] == len(named.to_str_tokens(tokens))
    assert named.to_str_tokens([text, "The dog"]) == [parts, named.to_str_tokens("The dog")]
    one = named.to_single_token(" the")
    assert named.to_single_str_token(one) == named.to_string(one) == named.labels[one] == " the"
    both = named.to_tokens([text, "The dog"])
    short = named.to_tokens("The dog")
    assert both.shape[0] == 2 and torch.equal(both[:1], tokens) and torch.equal(both[1, : short.shape[1]], short[0])


def test_texts_of_unequal_lengths_are_padded_and_masked(named: Any) -> None:
    texts = ["Once upon a time there was", "The dog"]
    with torch.no_grad():
        logits, loss = named(texts, return_type="both")
        alone = [named(text) for text in texts]
        for row, wanted in zip(logits, alone, strict=True):
            torch.testing.assert_close(row[: wanted.shape[1]], wanted[0], rtol=1e-4, atol=1e-4)
        each = [named(text, return_type="loss", loss_per_token=True)[0] for text in texts]
        torch.testing.assert_close(loss, torch.cat(each).mean(), rtol=1e-4, atol=1e-4)
        per_token = named(texts, return_type="loss", loss_per_token=True)
        assert per_token.shape == (2, logits.shape[1] - 1) and (per_token[1, len(each[1]) :] == 0).all()


def test_the_loss_is_hugging_faces(lens: Any) -> None:
    with torch.no_grad():
        wanted = lens.model(TOKENS, labels=TOKENS).loss
        torch.testing.assert_close(lens(TOKENS, return_type="loss"), wanted)
        assert torch.equal(lens(TOKENS, return_type="both")[0], lens(TOKENS))


def test_generation_is_hugging_faces(lens: Any) -> None:
    plain = lens.generate(TOKENS, max_new_tokens=6)
    assert torch.equal(plain, theirs(lens, TOKENS)) and torch.equal(plain[:, :5], TOKENS)
    with SingularEdit(lens, "blocks.0.mlp.W_in"):
        edited = lens.generate(TOKENS, max_new_tokens=6)
        assert torch.equal(edited, theirs(lens, TOKENS)) and not torch.equal(edited, plain)
    assert torch.equal(lens.generate(TOKENS, max_new_tokens=6), plain)
    state = torch.get_rng_state()
    first, again, other = (
        lens.generate(TOKENS, max_new_tokens=6, do_sample=True, temperature=2.0, top_k=9, seed=seed)
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(first, theirs(lens, TOKENS, do_sample=True, temperature=2.0, top_k=9, top_p=1.0))


def test_hooks_are_in_force_while_it_generates(lens: Any) -> None:
    """Every step sees the whole text, and the next token is that of a pass with the same hook."""
    seen: list[int] = []

    def zero(x: torch.Tensor, hook: Any) -> torch.Tensor:
        seen.append(x.shape[1])
        return torch.zeros_like(x)

    name = "blocks.1.hook_mlp_out"
    with lens.hooks(fwd_hooks=[(name, zero)]):
        found = lens.generate(TOKENS, max_new_tokens=3)
    assert seen == [5, 6, 7]
    tokens = TOKENS
    for _ in range(3):
        logits = lens.run_with_hooks(tokens, fwd_hooks=[(name, zero)])
        tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, tokens) and not torch.equal(found, lens.generate(TOKENS, max_new_tokens=3))


def test_texts_are_continued_as_if_alone(named: Any) -> None:
    texts = ["Once upon a time", "The dog"]
    together = named.generate(texts, max_new_tokens=5)
    assert together == [named.generate(text, max_new_tokens=5) for text in texts]
    assert all(found.startswith(text) and found != text for found, text in zip(together, texts, strict=True))
    assert torch.equal(named.generate(texts[0], 5, return_type="tokens")[:, :5], named.to_tokens(texts[0]))
    assert named.generate(named.to_tokens(texts[0]), 5, return_type="str") == together[0]


def test_it_ends_at_the_last_token(named: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, whole = (
        named.generate("Once upon a time", 5, return_type="tokens")[0],
        named.generate("Once upon a time", 5),
    )
    monkeypatch.setattr(named.model.generation_config, "eos_token_id", int(tokens[6]))
    assert named.generate("Once upon a time", 5, return_type="tokens")[0].tolist() == tokens[:7].tolist()
    assert torch.equal(named.generate("Once upon a time", 5, stop_at_eos=False, return_type="tokens")[0], tokens)
    assert named.generate("Once upon a time", 5, stop_at_eos=False) == whole


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: m.to_tokens(3), "text is 3; it must be a text, or several"),
        (lambda m: m.to_tokens([]), r"text is \[\]"),
        (lambda m: m.to_single_token("Once upon"), "'Once upon' is 3 tokens, "),
        (lambda m: m.to_single_token(5), "A token is named by text, not by an int"),
        (lambda m: m.to_string([5000]), "vocabulary is 0 to 3071"),
        (lambda m: m.to_string([0.5]), "must be whole numbers"),
        (lambda m: m.to_single_str_token(-1), "token is -1"),
        (lambda m: m("a", return_type="x"), "return_type is 'x'"),
        (lambda m: m.generate("a", 0), "max_new_tokens is 0"),
        (lambda m: m.generate("a", 500), "do not fit this model's context of 128"),
        (lambda m: m.generate("a", do_sample=True, temperature=0), "temperature is 0; it must be above 0"),
        (lambda m: m.generate("a", do_sample=True, top_p=2), "top_p is 2; it must be above 0 and at most 1"),
        (lambda m: m.generate("a", do_sample=True, top_k=0), "top_k is 0"),
        (lambda m: m.generate("a", do_sample="yes"), "do_sample is 'yes'"),
        (lambda m: m.generate("a", seed=-1), "seed is -1"),
        (lambda m: m.generate("a", return_type="x"), "return_type is 'x'"),
    ],
)
def test_mistakes_are_one_sentence(named: Any, call: Any, said: str) -> None:
    with pytest.raises(DtLensError, match=said):
        call(named)


def test_without_a_tokenizer(lens: Any) -> None:
    for call in (lambda: lens.to_tokens("a"), lambda: lens.generate("a"), lambda: lens.to_string([1])):
        with pytest.raises(DtLensError, match="wrapped without a tokenizer"):
            call()
