"""Scans under every null: the same columns, the null of each row, and what each null needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch

import dt_lens
from dt_lens import DtLensError, WeightSVD
from dt_lens.lens.activations import Activations, Moments
from dt_lens.lens.matrices import MatrixFactors, Snapshot, catalogue, find_matrix
from dt_lens.lens.watching import Watch
from dt_lens.lens.weights import fingerprint
from dt_lens.statistics.multiplicity import q_values
from dt_lens.statistics.nulls.kinds import NULLS
from dt_lens.statistics.nulls.pooled import PooledMaximum, ShuffledMaximum, UntrainedMaximum
from dt_lens.svd.drawn_models import Drawn, shuffled, untrained
from dt_lens.svd.null_sources import OF_THE_STREAM, side_covariance
from dt_lens.svd.scan import COLUMNS

Make = Callable[..., Any]
SMALL: dict[str, Any] = {"n_layers": 1, "n_heads": 2, "d_model": 16, "d_mlp": 24}


def moments(x: torch.Tensor) -> Moments:
    return Moments(len(x), x.mean(0), x.T @ x / len(x))


def activations_of(model: Any, seed: int = 0) -> tuple[Activations, torch.Tensor]:
    """Made-up activations of an uneven stream: every LayerNorm's output is computed by hand from the stream."""
    generator = torch.Generator().manual_seed(seed)
    d = model.cfg.d_model
    scales = torch.arange(1, d + 1, dtype=torch.float64) ** -1.0
    stream = torch.randn(4000, d, generator=generator, dtype=torch.float64) * scales + 0.5
    points, reads, residual = {}, {}, {}
    for layer in range(model.cfg.n_layers):
        for place in ("pre", "mid", "post"):
            residual[f"blocks.{layer}.hook_resid_{place}"] = moments(stream if place == "pre" else 2 * stream.flip(1))
    normalised = (stream - stream.mean(1, keepdim=True)) / stream.std(1, correction=0, keepdim=True)
    for name, matrix in catalogue(model, per_head=True).items():
        if matrix.left_norm is None:
            continue
        w, b = (model.weights[f"{matrix.left_norm}.{part}"].double() for part in "wb")
        points[name], reads[name] = moments(normalised * w + b), name
    made_of = {name: fingerprint(model, find_matrix(model, name)).hex() for name in reads}
    return Activations(points, reads, residual, {"model_id": "made up"}, made_of), normalised


def test_every_null_gives_the_same_table_with_other_p_values(make_dt: Make) -> None:
    model = make_dt(1, **SMALL)
    svd, (acts, _) = WeightSVD(model), activations_of(model)
    tables = {
        null: svd.scan(null=null, seed=2, draws=3, activations=acts if null in OF_THE_STREAM else None)
        for null in NULLS
    }
    same = [name for name in COLUMNS if name not in ("z", "p_value", "q_value")]
    for null, table in tables.items():
        assert list(table.columns) == COLUMNS
        pd.testing.assert_frame_equal(table[same], tables["haar"][same], check_like=False)
        assert table.attrs["null"] == null
        assert table.attrs["assumes"] == NULLS[null].assumes
        assert table.attrs["assumes"].endswith(".")
        assert table.attrs["seed"] == 2
        np.testing.assert_allclose(table["q_value"], q_values(table["p_value"]))
        assert table["p_value"].between(0, 1).all()
        assert np.isfinite(table["z"]).all()
    for null in OF_THE_STREAM:
        assert tables[null].attrs["activations"] == acts.digest
    assert tables["untrained"].attrs["draws"] == 3
    assert tables["untrained"]["p_value"].min() >= tables["untrained"].attrs["smallest_p"]
    assert len({round(float(table["p_value"].sum()), 6) for table in tables.values()}) == len(tables)
    # The same seed gives the same table.
    for null in ("untrained", "shuffled"):
        again = WeightSVD(model).scan(null=null, seed=2, draws=3)
        pd.testing.assert_frame_equal(again, tables[null])
        assert not again["p_value"].equals(WeightSVD(model).scan(null=null, seed=3, draws=3)["p_value"])


@pytest.mark.parametrize("null", ["haar", "untrained", "shuffled"])
def test_what_is_planted_is_found_under_every_null(make_dt: Make, null: str) -> None:
    model = make_dt(4, d_model=48, d_mlp=48, n_layers=1, n_heads=1)
    W = model.weights["blocks.0.mlp.W_out"]
    W += 30 * torch.outer(
        torch.randn(48), torch.nn.functional.normalize(model.embeddings["action_out"].effective[1], dim=0)
    )
    table = WeightSVD(model).scan("*.W_out", null, embeddings="action_out", draws=30)
    best = table.sort_values("p_value", kind="stable").iloc[0]
    assert (best["sv"], best["label"]) == (0, model.embeddings["action_out"].labels[1])
    assert best["q_value"] < 0.05
    assert (table["q_value"] < 0.05).sum() <= 3
    whole = WeightSVD(model).strongest("*.W_out", "action_out", samples=400, null=null, draws=60).iloc[0]
    assert whole["sv"] == 0
    assert whole["p_value"] < 0.02
    assert whole["null_median"] < 0.8 * abs(whole["cosine"])


def test_the_covariance_on_each_side(make_dt: Make) -> None:
    model = make_dt(2, **SMALL)
    acts, normalised = activations_of(model)
    lens = Snapshot.of(model)

    def close(found: Any, wanted: torch.Tensor) -> None:
        wanted = wanted.numpy()
        np.testing.assert_allclose(found, wanted, atol=2e-3 * np.abs(wanted).max())

    stream = torch.cov(normalised.T, correction=0)
    w = model.weights["blocks.0.ln2.w"].double()
    for name, side in (("blocks.0.mlp.W_in", "read"), ("blocks.0.attn.QK.1", "key"), ("blocks.0.attn.OV.0", "read")):
        close(side_covariance(MatrixFactors.of(lens, find_matrix(lens, name)), side, acts), stream)
    raw = side_covariance(MatrixFactors.of(lens, find_matrix(lens, "blocks.0.mlp.W_in"), False), "read", acts)
    close(raw, w[:, None] * stream * w)
    for name, place in (("blocks.0.attn.OV.0", "pre"), ("blocks.0.attn.W_O", "pre"), ("blocks.0.mlp.W_out", "mid")):
        found = side_covariance(MatrixFactors.of(lens, find_matrix(lens, name)), "write", acts)
        close(found, acts.stream[f"blocks.0.hook_resid_{place}"].covariance)
        assert np.linalg.eigvalsh(found)[0] > 0
    # A scale of zero is not divided by, and a plain array is used unchanged.
    model.weights["blocks.0.ln2.w"][3] = 0
    fresh, _ = activations_of(model)
    assert np.isfinite(
        side_covariance(MatrixFactors.of(model, find_matrix(model, "blocks.0.mlp.W_in")), "read", fresh)
    ).all()
    given = np.eye(16)
    assert side_covariance(MatrixFactors.of(lens, find_matrix(lens, "blocks.0.mlp.W_in")), "read", given) is given
    with pytest.raises(DtLensError, match="of another model, whose"):
        side_covariance(MatrixFactors.of(model, find_matrix(model, "blocks.0.mlp.W_in")), "read", acts)


@pytest.mark.parametrize("patterns", [None, ["*.QK.*", "*.attn.W_O"]])
def test_in_the_last_block_keys_are_of_all_tokens_and_outputs_of_the_one_used(make_dt: Make, patterns: Any) -> None:
    model = make_dt(2, **{**SMALL, "n_layers": 2})
    watch, batch = Watch(model, patterns, last_narrows=True), model.probe()
    with torch.no_grad():
        cache = model.run_with_cache(**batch)[1]
    real = batch["attention_mask"].bool().repeat_interleave(3, 1)
    used = torch.zeros_like(real)
    used[:, -2] = True
    watch.add(cache, real, used)
    acts, lens = Activations(*_parts(watch)), Snapshot.of(model)

    def covariance(x: torch.Tensor) -> Any:
        return np.cov(x.double().numpy().T, bias=True)

    for block, rows in (0, real), (1, used):
        read = cache[f"blocks.{block}.ln1.hook_normalized"]
        written = cache[f"blocks.{block}.hook_resid_pre"]
        for name, side, wanted in (
            (f"blocks.{block}.attn.QK.0", "query", read[rows]),
            (f"blocks.{block}.attn.QK.0", "key", read[real]),
            (f"blocks.{block}.attn.W_O", "write", written[rows]),
        ):
            S = side_covariance(MatrixFactors.of(lens, find_matrix(lens, name)), side, acts)  # type: ignore[arg-type]
            S = S - np.eye(len(S)) * np.trace(covariance(wanted)) / (len(S) * (len(wanted) + 1))
            np.testing.assert_allclose(S, covariance(wanted), rtol=0, atol=1e-5)


def _parts(watch: Watch) -> tuple[Any, ...]:
    points, stream = watch.moments()
    return points, watch.reads, stream, {}, watch.made_of


def test_a_covariance_from_an_array_and_from_a_file(make_dt: Make, tmp_path: Path) -> None:
    model = make_dt(3, **SMALL)
    svd, (acts, _) = WeightSVD(model), activations_of(model)
    round_one = svd.scan("*.W_out", "covariance", embeddings="reward_out", activations=np.eye(16))
    haar = svd.scan("*.W_out", embeddings="reward_out")
    np.testing.assert_allclose(round_one["p_value"], haar["p_value"], rtol=1e-3)
    acts.save(tmp_path / "acts.safetensors")
    pd.testing.assert_frame_equal(
        svd.scan("*.W_*", "covariance", embeddings="action_*", activations=tmp_path / "acts.safetensors"),
        svd.scan("*.W_*", "covariance", embeddings="action_*", activations=acts),
    )
    for wrong, needed in (
        (None, "needs activations"),
        ("nowhere.safetensors", "nowhere"),
        ([["a"]], "expected activations"),
    ):
        with pytest.raises(DtLensError, match=needed):
            svd.scan(null="covariance", activations=wrong)
    with pytest.raises(DtLensError, match="does not fit"):
        svd.scan(null="covariance", activations=np.eye(5))
    with pytest.raises(DtLensError, match="leave them out"):
        svd.scan(activations=acts)
    for null in OF_THE_STREAM:
        with pytest.raises(DtLensError, match="whole matrix"):
            svd.strongest(null=null)


def test_blocks_are_compared_with_blocks_of_their_size(make_dt: Make) -> None:
    model = make_dt(5, d_model=16, d_mlp=24, n_layers=1, n_heads=1, normalization="none", embed_ln=False)
    rng = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 16, generator=rng, dtype=torch.float64))[0] for n in (16, 24))
    sigma = torch.tensor([3.0] * 3 + [2.0] * 5 + [1.5, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4], dtype=torch.float64)
    model.weights["blocks.0.mlp.W_in"].copy_(u * sigma @ v.T)
    svd = WeightSVD(model)
    for null, options in (
        ("untrained", {"draws": 8}),
        ("shuffled", {"draws": 8}),
        ("covariance", {"activations": np.eye(16)}),
        ("bands", {"activations": np.eye(16)}),  # one band: any rotation
    ):
        table = svd.scan("*.W_in", null, embeddings="state_in", **options)
        haar = svd.scan("*.W_in", embeddings="state_in")
        assert table["block"].tolist()[:2] == [3, 5]
        # Spans match better than directions, which does not make them discoveries.
        assert table["cosine"][1] > 0.5
        np.testing.assert_allclose(table["p_value"][:2], haar["p_value"][:2], atol=0.35)
    pools = svd.pools("untrained", "*.W_in", "state_in", draws=8)
    assert {span for *_, span in pools.single} == {1, 3, 5}
    assert len(pools.single["W_in", "read", "state_in", 5].drawn) == 8 * 3
    with pytest.raises(DtLensError, match="same matrices and embeddings"):
        svd.scan("*.W_out", pools)
    with pytest.raises(DtLensError, match="Only 'untrained'"):
        svd.pools("haar")
    with pytest.raises(DtLensError, match="draws is 0; it must be a whole number of at least 1"):
        svd.pools("shuffled", draws=0)


def test_shuffled_weights_keep_their_entries_and_everything_else(make_dt: Make) -> None:
    model = make_dt(6, **SMALL)
    found = shuffled(model, model.embeddings, 7)
    W, before = found.weights["blocks.0.attn.W_Q"], model.weights["blocks.0.attn.W_Q"]
    assert W.shape == before.shape
    assert not torch.equal(W, before)
    assert torch.equal(W.flatten().sort()[0], before.flatten().sort()[0])
    assert torch.equal(W, shuffled(model, model.embeddings, 7).weights["blocks.0.attn.W_Q"])
    assert not torch.equal(W, shuffled(model, model.embeddings, 8).weights["blocks.0.attn.W_Q"])

    def order(name: str) -> torch.Tensor:
        """Which entry of the weight each entry of the shuffled one was."""
        old, new = (weights[name].flatten().argsort() for weights in (model.weights, found.weights))
        return torch.empty_like(old).index_put((new,), old)

    assert not torch.equal(order("blocks.0.attn.W_Q"), order("blocks.0.attn.W_K"))
    for name in ("blocks.0.ln1.w", "embed.state.W", "blocks.0.mlp.b_in"):
        assert torch.equal(found.weights[name], model.weights[name])
    assert found.embeddings is model.embeddings
    assert set(found.weights) == set(model.weights)


def test_untrained_models_are_initialised_as_the_architecture_is(make_dt: Make, make_lm: Make) -> None:
    model = make_dt(8, **SMALL)
    fresh = untrained(model, model.embeddings, 3)
    assert {name: weight.shape for name, weight in fresh.weights.items()} == {
        name: weight.shape for name, weight in model.weights.items()
    }
    assert (fresh.weights["blocks.0.ln1.w"] == 1).all()
    assert float(fresh.weights["blocks.0.mlp.W_in"].std()) == pytest.approx(0.02, rel=0.15)
    assert set(fresh.embeddings) == set(model.embeddings)
    assert not torch.equal(fresh.embeddings["state_in"].directions, model.embeddings["state_in"].directions)
    before = torch.random.get_rng_state()
    assert torch.equal(model.untrained(3).weights["embed.state.W"], fresh.weights["embed.state.W"])
    assert torch.equal(torch.random.get_rng_state(), before)  # the global random state is not used
    lm = dt_lens.wrap(make_lm("gpt2"))
    drawn = untrained(lm, lm.embeddings, 0)
    assert drawn.weights["blocks.0.mlp.W_in"].shape == lm.weights["blocks.0.mlp.W_in"].shape
    assert float(drawn.weights["blocks.0.mlp.W_in"].std()) == pytest.approx(0.02, rel=0.1)
    table = WeightSVD(lm).scan(["*.W_in", "*.OV.*"], "untrained", draws=2)
    assert {"token_in", "token_out"} <= set(table["embedding"])


def test_a_covariance_that_a_gradient_flows_to(make_dt: Make) -> None:
    svd, S = WeightSVD(make_dt(9, **SMALL)), torch.eye(16)
    taken = svd.scan("*.0.mlp.W_in", "covariance", activations=S.clone().requires_grad_())
    pd.testing.assert_frame_equal(taken, svd.scan("*.0.mlp.W_in", "covariance", activations=S.numpy()))


def test_a_model_without_an_initialisation_has_gaussian_entries(make_dt: Make) -> None:
    model = make_dt(9, **SMALL)
    bare = Drawn(
        {**model.weights, "blocks.0.mlp.W_in": model.weights["blocks.0.mlp.W_in"] * 5 + 2},
        *(model.structure, model.embeddings),
    )
    fresh = untrained(bare, bare.embeddings, 1)
    W, before = fresh.weights["blocks.0.mlp.W_in"], bare.weights["blocks.0.mlp.W_in"]
    assert float(W.std()) == pytest.approx(float(before.std()), rel=0.1)
    assert float(W.mean()) == pytest.approx(2, abs=0.3)
    assert (fresh.weights["blocks.0.ln1.w"] == 1).all()
    assert fresh.embeddings is bare.embeddings
    assert len(WeightSVD(bare).scan("*.W_in", "untrained", draws=2))


def test_embeddings_of_the_users_own_stay_as_they_are(make_dt: Make) -> None:
    from dt_lens import Embedding

    model = make_dt(10, **SMALL)
    mine = torch.randn(4, 16)
    model.embeddings["mine"] = Embedding(mine, list("abcd"))
    fresh = untrained(model, model.embeddings, 0)
    assert torch.equal(fresh.embeddings["mine"].directions, mine)
    assert "mine" in set(
        WeightSVD(model).scan("*.W_in", "untrained", embeddings=["mine", "state_in"], draws=2)["embedding"]
    )


class TestPooledMaximum:
    """The smoothed share of draws."""

    draws: ClassVar[list[float]] = [0.2, 0.4, 0.4, 0.6]

    def test_p_counts_the_match_itself(self) -> None:
        null = ShuffledMaximum.of(self.draws)
        np.testing.assert_allclose(null.p_value([0.7, 0.6, 0.5, 0.4, 0.1, -0.7]), [0.2, 0.4, 0.4, 0.8, 1.0, 0.2])
        assert null.smallest == 0.2
        assert (null.mean, null.std) == (pytest.approx(0.4), pytest.approx(np.std(self.draws)))
        assert float(null.z(0.4)) == pytest.approx(0)
        assert float(UntrainedMaximum.of([0.3]).z(0.9)) == 0.0

    def test_it_is_valid_whatever_the_number_of_draws(self) -> None:
        rng = np.random.default_rng(0)
        p = [float(PooledMaximum.of(x[1:]).p_value(x[0])) for x in rng.random((4000, 10))]
        for level in (0.1, 0.2, 0.5):
            assert np.mean(np.asarray(p) <= level + 1e-12) == pytest.approx(level, abs=0.03)

    def test_nothing_to_pool(self) -> None:
        with pytest.raises(DtLensError, match="at least one"):
            PooledMaximum.of([])
        with pytest.raises(DtLensError, match="finite"):
            PooledMaximum.of([0.1, np.nan])
