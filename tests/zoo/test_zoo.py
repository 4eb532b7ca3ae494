"""The bundled models are complete, and do what their cards say."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

import dt_lens
from dt_lens.zoo.models import bundled


@pytest.mark.parametrize("name", sorted(bundled()))
def test_a_bundled_model_is_whole_small_and_carded(name: str) -> None:
    folder = bundled()[name]
    reads = (folder / "tokenizer.json").exists()
    carried = {"training.json", "heldout.txt"} if reads else {"dt_lens.json"}
    assert {"config.json", "model.safetensors", "CARD.md"} | carried <= {file.name for file in folder.iterdir()}
    assert sum(file.stat().st_size for file in folder.iterdir()) < 8_000_000
    card = (folder / "CARD.md").read_text(encoding="utf-8")
    assert "dt-lens train-text" in card if reads else "dt-lens record" in card and "dt-lens train" in card


def test_hopper_is_what_it_should_be() -> None:
    model = dt_lens.load("hopper")
    cfg, facts = model.cfg, model.facts
    assert (cfg.n_layers, cfg.d_model, cfg.n_ctx, cfg.act_fn) == (3, 128, 20, "relu")
    assert (cfg.state_dim, cfg.act_dim, cfg.max_ep_len) == (11, 3, 1000)
    assert facts.environment == "Hopper-v5" and facts.context == 20 and facts.return_scale == 1000
    assert len(facts.target_returns) == 5 and facts.target_returns[0] == max(facts.target_returns)
    assert facts.trained_heads == ("action",)


def test_tiny_gpt2_predicts_as_its_card_says() -> None:
    import json

    folder = bundled()["tiny-gpt2"]
    card = (folder / "CARD.md").read_text(encoding="utf-8")
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))["held_out"]
    model = dt_lens.load("tiny-gpt2")
    assert (model.cfg.n_layers, model.cfg.d_model, model.cfg.n_ctx, model.cfg.d_vocab) == (4, 128, 128, 3072)
    found = dt_lens.evaluate(model)
    assert found.text == "heldout.txt" and len(found) == record["windows"] == 184
    losses = record["nats_per_token"]
    assert found.mean == pytest.approx(losses["model"], abs=1e-4)
    assert found.mean < 0.6 * losses["unigram"]
    for name, loss in losses.items():
        row = next(line for line in card.splitlines() if line.startswith(f"| {name.replace('model', 'tiny-gpt2')}"))
        assert f"| {loss:.3f} | {record['bits_per_byte'][name]:.3f} |" in row
    assert model.tokenizer.decode(model.tokenizer.encode("naïve ☃")) == "naïve ☃"


@pytest.mark.acceptance(minutes=5)
def test_hopper_hops_as_its_card_says() -> None:
    from dt_lens import evaluate

    model = dt_lens.load("hopper")
    outcome = evaluate(model, episodes=40, seed=0)
    assert outcome.mean >= 2_700
    assert (outcome.lengths == 1000).mean() >= 0.95
    card = (bundled()["hopper"] / "CARD.md").read_text(encoding="utf-8")
    first = re.search(r"^\| ([\d,]+) \| ([\d,]+) ", card, re.MULTILINE)
    assert first and float(first[1].replace(",", "")) == model.facts.target_returns[0]
    # Floating-point sums differ from machine to machine, and hopping amplifies them.
    assert abs(outcome.mean - float(first[2].replace(",", ""))) < 100
    others = model.facts.target_returns[1:]
    means = [outcome.mean, *(evaluate(model, episodes=8, seed=0, target_return=t).mean for t in others)]
    rising = sum(better > worse for better, worse in pairwise(means))
    assert rising >= 3
