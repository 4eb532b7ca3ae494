"""CORL's decision transformer, held against ``nn.MultiheadAttention`` itself."""

from __future__ import annotations

import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dt_lens
from dt_lens import WeightSVD
from dt_lens.errors import DtLensError
from dt_lens.lens.certification import certify
from dt_lens.lens.checkpoints import read_checkpoint
from dt_lens.lens.matrices import catalogue
from dt_lens_adapters.corl import CORLDecisionTransformer
from originals.corl import SAVED, SETTINGS, batch_of, lensed, make, original, saved


@settings(max_examples=8, deadline=None)
@given(
    heads=st.sampled_from([1, 2, 4]),
    width=st.sampled_from([1, 3, 4]),
    blocks=st.integers(1, 3),
    sizes=st.tuples(st.integers(1, 7), st.integers(1, 4)),
    steps=st.integers(1, 4),
    cut=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_the_same_predictions(
    heads: int, width: int, blocks: int, sizes: tuple[int, int], steps: int, cut: int, seed: int
) -> None:
    model = make(seed, state_dim=sizes[0], act_dim=sizes[1], d=4 * width, heads=heads, blocks=blocks)
    lens, batch = dt_lens.wrap(model), batch_of(model, steps=steps, seed=seed)
    torch.testing.assert_close(lensed(lens, batch), original(model, batch), rtol=1e-5, atol=1e-5)
    # It pads on the right; on the left nn.MultiheadAttention has nothing to look at and answers NaN.
    batch["attention_mask"] = torch.ones(3, steps, dtype=torch.long)
    batch["attention_mask"][1, max(1, steps - cut) :] = 0
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(lensed(lens, batch)[real], original(model, batch)[real], rtol=1e-5, atol=1e-5)
    assert lens.cfg.n_heads == heads and lens.cfg.n_ctx == 4


def test_left_padding_is_a_shorter_window() -> None:
    model = make()
    lens, batch = dt_lens.wrap(model, check=False), batch_of(model)
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1]])
    mine = lensed(lens, {**batch, "attention_mask": mask})
    for row, real in enumerate(mask.bool()):
        alone = {name: x[row : row + 1, real] for name, x in batch.items()}
        torch.testing.assert_close(mine[row, real], original(model, alone)[0], rtol=1e-5, atol=1e-5)


def test_what_the_script_saves(tmp_path: Path) -> None:
    model = make()
    file = saved(model, tmp_path)
    with pytest.raises(DtLensError, match=r"pass n_heads= \(the code base's default is n_heads=1\)\.$"):
        dt_lens.load(file)
    for given_heads in ({"n_heads": 2}, {}):
        lens = dt_lens.load(file, check=False, **given_heads)
        batch = batch_of(model)
        torch.testing.assert_close(lensed(lens, batch), original(model, batch), rtol=1e-5, atol=1e-5)
        assert lens.facts.context == 4 and lens.cfg.n_heads == 2 and lens.cfg.max_ep_len == 40
        assert lens.facts.state_mean == (0, 1, 2, 3, 4) and lens.facts.state_std == (2,) * 5
        (tmp_path / "config.yaml").write_text(SETTINGS)
    # The second time the settings lay beside it.
    assert lens.facts.return_scale == 100.0 and lens.facts.target_returns == (3600.0, 1800.0)
    assert lens.facts.about == {"dataset": "hopper-medium-v2"} and lens.facts.environment is None
    certificate = certify(lens, seed=3)
    assert set(catalogue(lens)) <= set(certificate.errors) and certificate.against == "the original model"
    assert set(lens.embeddings) == {"state_in", "action_in", "reward_in", "timestep_in", "action_out"}
    assert dt_lens.load(file, return_scale=1, target_returns=[5], check=False).facts.target_returns == (5.0,)
    lens.to(torch.float64)
    certify(lens)
    lens.require_shared(list(lens.weights))


def test_a_bare_state_dict_and_settings_of_another_model(tmp_path: Path) -> None:
    model = make(heads=4)
    torch.save(model.state_dict(), tmp_path / "dt.pt")
    for text in (SETTINGS.replace("embedding_dim: 16", "embedding_dim: 32"), "num_heads: 2\n", "\x00", ""):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(DtLensError, match="pass n_heads="):
            dt_lens.load(tmp_path / "dt.pt")
    lens = dt_lens.load(tmp_path / "dt.pt", n_heads=4, check=False)
    assert lens.facts.return_scale == 1000.0 and lens.facts.state_mean is None
    (tmp_path / "config.yaml").write_text(SETTINGS.replace("max_action: 1.0", "max_action: 2.0"))
    with pytest.raises(DtLensError, match=r"multiplies its actions by max_action=2\.0"):
        dt_lens.load(tmp_path / "dt.pt")


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        (SETTINGS.replace("\n- 3600.0\n- 1800.0", " [3600, 1.8e+3]  # in the environment's units"), (3600.0, 1800.0)),
        (SETTINGS.replace("- 1800.0", "- 0\n- -1e3"), (3600.0, 0.0, -1000.0)),
        (SETTINGS.replace("reward_scale: 0.01", "'reward_scale': 1e-2").replace("\n- 1800.0", ""), (3600.0,)),
        ("{" + SETTINGS.split("target", 1)[0].rstrip().replace("\n", ", ") + "}", ()),
    ],
)
def test_settings_in_any_form_of_yaml(tmp_path: Path, text: str, targets: tuple[float, ...]) -> None:
    (tmp_path / "config.yaml").write_text(text)
    facts = dt_lens.load(saved(make(), tmp_path), check=False).facts
    assert (facts.target_returns, facts.return_scale, facts.context) == (targets, 100.0, 4)


HUGE = "9" * 4000
MERGES = "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12))


@pytest.mark.parametrize(
    "text",
    {
        "too long": SETTINGS + "#" * 20_000,
        "merges of merges": f"a0: &a0 {{x: 1}}\n{MERGES}{SETTINGS}",
        "an alias": f"a: &a 1\nb: *a\n{SETTINGS}",
        "too deep": "[" * 3_000,
        "another tag": f"{SETTINGS}x: !!python/object/apply:os.mkdir [trace]\n",
        "two documents": f"{SETTINGS}---\n{SETTINGS}",
        "no such day": f"{SETTINGS}day: 2001-99-99\n",
        "text for a size": SETTINGS.replace("seq_len: 4", "seq_len: four"),
        "truth for a size": SETTINGS.replace("seq_len: 4", "seq_len: true"),
        "a huge size": SETTINGS.replace("num_heads: 2", f"num_heads: 0x{HUGE}"),
        "a list for a scale": SETTINGS.replace("max_action: 1.0", "max_action: [1.0]"),
        "a scale of 0": SETTINGS.replace("reward_scale: 0.01", "reward_scale: 0"),
        "no number": SETTINGS.replace("reward_scale: 0.01", "reward_scale: .nan"),
        "a list": "- 1\n",
    }.items(),
    ids=lambda item: item[0],
)
def test_what_is_not_corls_settings_is_left_alone(tmp_path: Path, text: tuple[str, str]) -> None:
    (tmp_path / "config.yaml").write_text(text[1])
    began = time.process_time()
    with pytest.raises(DtLensError, match=r"pass n_heads= .*\.$"):
        dt_lens.load(saved(make(), tmp_path))
    assert time.process_time() - began < 10 and not (tmp_path / "trace").exists()


@settings(max_examples=15, deadline=None)
@given(
    text=st.one_of(
        st.text(max_size=60),
        st.lists(st.sampled_from([*SETTINGS.splitlines(), "- 1", " x: [", "a: &a", "b: *a", "? ", "}", "'"])).map(
            "\n".join
        ),
    )
)
def test_no_settings_raise_anything_but_a_sentence(text: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
        file = folder / "dt_checkpoint.pt"
        torch.save(SAVED, file)
        with suppress(DtLensError):
            assert dt_lens.load(file, check=False).cfg.n_heads == 2


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("blocks.1.norm2.bias", None, r"no tensor 'blocks\.1\.norm2\.bias'"),
        ("blocks.0.attention.in_proj_bias", None, r"no tensor 'blocks\.0\.attention\.in_proj_bias'"),
        ("out_norm.weight", None, r"no tensor 'out_norm\.weight'"),
        ("blocks.0.attention.in_proj_weight", lambda t: t.T, r"shape \[16, 48\]; \[48, 16\] was expected"),
        ("state_emb.weight", lambda t: t[0], r"'state_emb\.weight' has shape \[5\]"),
        (
            "blocks.0.attention.bias_k",
            lambda t: torch.zeros(1, 1, 16),
            r"'blocks\.0\.attention\.bias_k' .* no place for",
        ),
        ("blocks.2.causal_mask", lambda t: torch.zeros(12, 12), r"no tensor 'blocks\.2\.attention\.in_proj_weight'"),
        ("blocks.987654321.norm1.bias", lambda t: torch.zeros(16), "of block 987654321 but not of block 2"),
        ("emb_norm", lambda t: torch.zeros(16), "'emb_norm' .* no place for"),
        ("emb_norm.weight..x", lambda t: torch.zeros(16), r"'emb_norm\.weight\.\.x' .* no place for"),
        ("emb_norm.weight", lambda t: t.long(), "holds int64 numbers"),
        ("blocks.1.norm1.weight", lambda t: t / 0, r"'blocks\.1\.norm1\.weight' in .* holds NaN or infinite"),
    ],
)
def test_damaged_files(tmp_path: Path, key: str, change: Any, message: str) -> None:
    tensors = dict(make().state_dict())
    if change is None:
        del tensors[key]
    else:
        tensors[key] = change(tensors.get(key)).contiguous()
    torch.save({"model_state": tensors}, tmp_path / "agent.pt")
    with pytest.raises(DtLensError, match=message):
        dt_lens.load(tmp_path / "agent.pt", n_heads=2)


def test_statistics_that_are_not_numbers(tmp_path: Path) -> None:
    for mean, message in (
        ("zero", "state_mean or state_std in .* is not an array of numbers"),
        (np.zeros(3), "state_mean has 3 entries"),
        (np.full(5, np.nan), "state_mean is"),
    ):
        size = np.ones(3 if message.endswith("entries") else 5)
        torch.save({"model_state": make().state_dict(), "state_mean": mean, "state_std": size}, tmp_path / "a.pt")
        with pytest.raises(DtLensError, match=message):
            dt_lens.load(tmp_path / "a.pt", n_heads=2)


def test_a_class_that_does_not_say_its_heads() -> None:
    model = make()
    for block in model.blocks:
        attention = block.attention
        block.attention = nn.Module()
        for name, parameter in attention.named_parameters(recurse=False):
            block.attention.register_parameter(name, parameter)
        block.attention.out_proj = attention.out_proj
    with pytest.raises(DtLensError, match="pass n_heads="):
        dt_lens.wrap(model)
    with pytest.raises(DtLensError, match="own forward pass fails"):
        dt_lens.wrap(model, n_heads=2)


def test_nobody_else_recognises_it(recognised_by: Any, tmp_path: Path) -> None:
    model = make()
    assert recognised_by(model) == recognised_by(read_checkpoint(saved(model, tmp_path))) == ["corl"]


def test_a_wrong_map_is_noticed(mistaken: Any) -> None:
    model = make()
    mistaken(CORLDecisionTransformer.layout, lambda: dt_lens.wrap(model))


def test_edits_reach_the_live_model(edits_reach: Any) -> None:
    model = make()
    lens, batch = dt_lens.wrap(model, check=False), batch_of(model)
    edits_reach(lens, lambda: original(model, batch), lambda: lensed(lens, batch))


def test_a_live_model_that_computes_something_else_is_refused() -> None:
    model = make()
    model.factor = 1.01
    with pytest.raises(DtLensError, match=r"certify: .* does not reproduce its activation in the original model"):
        dt_lens.wrap(model)
    model.factor, model.max_action = 1.0, 0.4
    with pytest.raises(DtLensError, match=r"multiplies its actions by max_action=0\.4"):
        dt_lens.wrap(model)


def test_a_planted_direction_is_found() -> None:
    model = make(d=32)
    with torch.no_grad():
        state = model.state_emb.weight[:, 2] * model.emb_norm.weight  # what arrives in the stream, but for its mean
        value = model.blocks[1].attention.in_proj_weight[64:80]  # of the first head, (out, in)
        value.mul_(0.01)
        # Behind the block's own LayerNorm, whose scale folding multiplies by.
        planted = (state - state.mean()) / model.blocks[1].norm1.weight
        value += torch.outer(torch.nn.functional.normalize(torch.randn(16), dim=0), 9.0 * planted)
    lens = dt_lens.wrap(model, state_labels=["a", "b", "height", "d", "e"], check=False)
    table = WeightSVD(lens).scan(matrices=["blocks.1.attn.W_V"], embeddings=["state_in"], null="haar", seed=0)
    best = table.sort_values("cosine", key=np.abs, ascending=False).iloc[0]
    assert best["sv"] == 0 and best["label"] == "height" and abs(best["cosine"]) > 0.99
