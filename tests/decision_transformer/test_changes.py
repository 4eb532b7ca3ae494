"""Low-rank changes of rows: each row of a batch acts as the hooked model does with that edit in force."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dt_lens import SingularEdit
from dt_lens.behaviour.agents.arms import Arm, arm_of, packed_arm
from dt_lens.behaviour.agents.packed_arms import unpacked
from dt_lens.behaviour.agents.windows import SlidingPolicy
from dt_lens.decision_transformer import acting_blocks
from dt_lens.decision_transformer.changes import Change, RowChanges, Term
from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.decision_transformer.model import HookedDecisionTransformer
from dt_lens.decision_transformer.policy import ActingModel, acting_shapes
from dt_lens.edits.edit import Edit
from dt_lens.lens.matrices import catalogue

STEPS = 4
SHAPES: dict[str, dict[str, Any]] = {
    "one head": {"n_heads": 1, "n_layers": 2},
    "heads": {"n_heads": 2, "n_layers": 2},
    "post": {"n_heads": 1, "n_layers": 2, "normalization": "post", "gated_mlp": True, "act_fn": "silu"},
}


def _model(**options: Any) -> HookedDecisionTransformer:
    torch.manual_seed(0)
    cfg = HookedDecisionTransformerConfig(3, 2, d_model=8, d_mlp=12, n_ctx=STEPS, max_ep_len=30, **options)
    model = HookedDecisionTransformer(cfg).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # also biases and LayerNorms, whose initial values would hide mistakes
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.double()


def _edits(model: HookedDecisionTransformer) -> list[Edit]:
    """An edit of every matrix, of both sides of circuits, of two directions of one, and its control."""
    found: list[Edit] = []
    for matrix in catalogue(model, per_head=True).values():
        if matrix.kind[0] == "W" and matrix.head == 0:
            continue
        for side in (matrix.left, matrix.right) if matrix.kind in ("OV", "QK") else (matrix.residual_sides[0],):
            found.append(SingularEdit(model, matrix.name, side=side, value="random", seed=len(found)))
    several = SingularEdit(model, "blocks.0.attn.W_V", [0, 2], side="read", value="flip")
    return [*found, several, several.control(1)]


def _episode(model: HookedDecisionTransformer) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    sizes = {"states": model.cfg.state_dim, "actions": model.cfg.act_dim, "returns_to_go": 1}
    return {name: torch.randn(1, STEPS, n, generator=generator).double() for name, n in sizes.items()}


def _act(acting: ActingModel, arms: list[Arm], episode: dict[str, torch.Tensor], alone: bool = False) -> torch.Tensor:
    """The last action of the episode in every arm, ``[arm, act_dim]``."""
    rows = len(arms)
    policy = SlidingPolicy(acting, STEPS, rows, alone=alone, arms={i: arm.changes for i, arm in enumerate(arms)})
    for row in range(rows):
        policy.restart(row, row)
    for t in range(STEPS):
        states, returns = (episode[name][:, t].expand(rows, -1) for name in ("states", "returns_to_go"))
        before = episode["actions"][:, max(t - 1, 0)].expand(rows, -1)
        got = policy.act(states, returns, torch.full((rows,), t), before)
    return got


def _hooked(model: HookedDecisionTransformer, episode: dict[str, torch.Tensor]) -> torch.Tensor:
    given = {**episode, "actions": episode["actions"][:, :-1]}
    with torch.no_grad():
        return model(**given, timesteps=torch.arange(STEPS)[None]).action_preds[0, -1]


class Case(NamedTuple):
    model: HookedDecisionTransformer
    edits: list[Edit]
    arms: list[Arm]  # the unedited model's, then those of the edits
    expected: list[torch.Tensor]  # the hooked model's last action in each


@functools.cache
def _case(shape: str) -> Case:
    model = _model(**SHAPES[shape])
    case, episode = Case(model, _edits(model), [arm_of(model)], []), _episode(model)
    case.expected.append(_hooked(model, episode))
    for edit in case.edits:
        with edit:
            case.arms.append(arm_of(model))
            case.expected.append(_hooked(model, episode))
    return case


@pytest.mark.parametrize("shape", SHAPES)
def test_each_row_is_the_model_with_that_edit_in_force(shape: str) -> None:
    model, edits, arms, expected = _case(shape)
    base, episode = expected[0], _episode(model)
    got = _act(ActingModel(arms[0].weights, model.cfg), arms, episode)
    torch.testing.assert_close(got, torch.stack(expected), atol=1e-11, rtol=1e-9)
    moved = (torch.stack(expected[1:]) - base).abs().amax(1)
    assert float(moved.median()) > 1e-4  # not that nothing is compared
    # Those of several edits in force, of both weights of each circuit; and what a sweep sends.
    q, k, v, o = (next(e for e in edits if e.matrix.name == f"blocks.0.attn.W_{kind}") for kind in "QKVO")
    with q, k, v, o:
        both, arm = _hooked(model, episode), arm_of(model)
    changes, own = unpacked(packed_arm(arm))
    assert not own and {change.weight[-1] for change in changes} == set("QKVO")
    got = _act(ActingModel(arms[0].weights, model.cfg), [Arm(arm.weights, changes)], episode)
    torch.testing.assert_close(got[0], both, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("shape", ["one head", "post"])
def test_changes_reach_every_part_of_an_mlp(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acting_blocks, "NEURONS", 5)  # of 12 neurons: three parts
    model, _, arms, expected = _case(shape)
    acting = ActingModel(arms[0].weights, model.cfg)
    assert [len(block.mlp) for block in acting.blocks] == [3, 1]  # the last block has one token
    torch.testing.assert_close(_act(acting, arms, _episode(model)), torch.stack(expected), atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("alone", [False, True])
def test_rows_at_once_are_rows_one_by_one(alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where all rows' changes are stacked; and with each row computed by itself."""
    model, _, arms, _ = _case("heads")
    episode = _episode(model)
    acting = ActingModel(arms[0].weights, model.cfg)
    expected = _act(acting, arms, episode)
    module = "dt_lens.behaviour.agents.windows.RowChanges"
    monkeypatch.setattr(module, lambda rows, stacked: RowChanges(rows, stacked=True))
    torch.testing.assert_close(_act(acting, arms, episode, alone), expected, atol=1e-12, rtol=1e-10)


def test_a_row_without_a_change_keeps_its_bits() -> None:
    model, _, arms, _ = _case("one head")
    episode = {name: x.float() for name, x in _episode(model).items()}
    acting = ActingModel({name: weight.float() for name, weight in arms[0].weights.items()}, model.cfg)
    bare = arms[:1]
    expected = _act(acting, bare * 16, episode)[0]
    mixed = _act(acting, [*arms[1:8], *bare, *arms[8:16]], episode)
    assert torch.equal(mixed[7], expected) and not torch.equal(mixed[6], expected)


def test_stacked_rows_have_the_bits_that_they_have_alone() -> None:
    """Float32 sums depend on their order, so it must not be that in which the batch's rows name their terms."""
    generator, e, d = torch.Generator().manual_seed(0), 4, 8

    def term(head: int, rank: int) -> Term:
        left, right = (torch.randn(n, m, generator=generator) for n, m in ((e, rank), (rank, d)))
        return Term(left, torch.randn(rank, generator=generator), right, source=slice(head * e, head * e + e))

    product, several = (0, "out"), {(0, "out"): [term(0, 1), term(1, 2), term(1, 1)]}
    x, y = (torch.randn(2, 5, n, generator=generator) for n in (2 * e, d))
    x, y = x[:1].expand(2, -1, -1).contiguous(), y[:1].expand(2, -1, -1).contiguous()
    alone = y[:1].clone()
    RowChanges([several], stacked=True).add(product, x[:1], alone)
    for first in ([term(1, 2)], [term(1, 1)], [term(1, 1), term(1, 2)]):
        beside = y.clone()
        RowChanges([{product: first}, several], stacked=True).add(product, x, beside)
        assert torch.equal(beside[1], alone[0])
        assert not torch.equal(beside[0], y[0])


@pytest.mark.parametrize("heads", [1, 2])
def test_changes_go_to_the_models_device(heads: int) -> None:
    """Edits come on the CPU. Fake tensors check devices without a card; "lazy" is one that every build of torch has."""
    cfg = HookedDecisionTransformerConfig(3, 2, d_model=8, d_mlp=12, n_ctx=STEPS, n_heads=heads, n_layers=2)
    with FakeTensorMode():
        weights = {name: torch.empty(shape, device="lazy") for name, shape in acting_shapes(cfg).items()}
        changes = []
        for kind in ("attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O", "mlp.W_in", "mlp.W_out"):
            n, m = weights[f"blocks.0.{kind}"].shape[-2:]
            left, right = torch.empty(n, 1, dtype=torch.double), torch.empty(1, m, dtype=torch.double)
            changes += [Change(f"blocks.{l}.{kind}", 0 if "attn" in kind else None, left, right) for l in range(2)]
        terms = ActingModel(weights, cfg).terms(changes)
        assert {part.device.type for found in terms.values() for term in found for part in term[:3]} == {"lazy"}
    assert len(terms) == 8  # of each block the MLP's two and "qk" and "ov", or "qkv" and "out"
