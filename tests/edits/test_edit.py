"""Nothing is left broken: whatever happens during an edit, the weights come back bit for bit."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dt_lens
from dt_lens import DtLensError, SingularEdit
from dt_lens.edits import edit as changes
from dt_lens.edits.state import state_of
from dt_lens.lens.weights import weight_bytes

Make = Callable[..., Any]
W_IN = "blocks.0.mlp.W_in"


def bits(model: Any) -> dict[str, bytes]:
    return {name: weight_bytes(weight) for name, weight in model.weights.items()}


@contextmanager
def nothing_changes(model: Any) -> Iterator[None]:
    """Check that weights, hooks, modes and the edits in force are afterwards what they were before."""
    before, hooks = bits(model), hooked(model)
    modes = [module.training for module in model.modules()]
    active = list(getattr(model, "active_edits", []))
    handler = signal.getsignal(signal.SIGINT)
    yield
    assert bits(model) == before
    assert hooked(model) == hooks
    assert [module.training for module in model.modules()] == modes
    assert list(getattr(model, "active_edits", [])) == active
    assert signal.getsignal(signal.SIGINT) is handler
    if not active:
        assert not state_of(model).untouched


def hooked(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if getattr(module, "fwd_hooks", None)]


def outputs(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**model.probe()).action_preds.clone()


def test_an_exception_inside(make_dt: Make) -> None:
    model = make_dt()
    for error in (ValueError, KeyboardInterrupt, SystemExit, GeneratorExit):
        with nothing_changes(model), pytest.raises(error), SingularEdit(model, W_IN):
            raise error


def test_ctrl_c_inside(make_dt: Make) -> None:
    model = make_dt()
    with nothing_changes(model), pytest.raises(KeyboardInterrupt), SingularEdit(model, W_IN):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", [0, 1])
def test_ctrl_c_while_weights_are_written(make_dt: Make, monkeypatch: pytest.MonkeyPatch, when: str, call: int) -> None:
    """On the way in (call 0) the edit is taken back; on the way out (call 1) it is undone; both interrupt then."""
    model, calls = make_dt(), []

    def interrupted(write: Callable[..., Any], *args: Any) -> Any:
        calls.append(1)
        if len(calls) == call + 1 and when == "before":
            signal.raise_signal(signal.SIGINT)
        written = write(*args)
        if len(calls) == call + 1 and when == "after":
            signal.raise_signal(signal.SIGINT)
        return written

    for name in ("_write_one", "put_back"):  # on the way in, and on the way out
        monkeypatch.setattr(changes, name, partial(interrupted, getattr(changes, name)))
    entered = []
    with nothing_changes(model), pytest.raises(KeyboardInterrupt), SingularEdit(model, W_IN):
        entered.append(1)
    assert len(entered) == call
    with nothing_changes(model), SingularEdit(model, W_IN):  # and edits still work
        pass


def test_the_users_own_handler_gets_the_signal(make_dt: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model, received = make_dt(), []

    def interrupted(write: Callable[..., Any], *args: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        assert not received  # not in the middle of writing
        return write(*args)

    before = signal.signal(signal.SIGINT, lambda *_: received.append(1))
    try:
        for name in ("_write_one", "put_back"):
            monkeypatch.setattr(changes, name, partial(interrupted, getattr(changes, name)))
        with nothing_changes(model), SingularEdit(model, W_IN) as edit:
            assert edit.active  # the handler returned, so the edit goes ahead
            assert len(received) == 1
            received.clear()
        assert len(received) == 1
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_write_that_fails_midway(make_dt: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model, write = make_dt(), changes._write_one

    def failing(lens: Any, name: str) -> None:
        monkeypatch.setattr(changes, "_write_one", write)
        lens.weights[name][:3] = 7.0
        raise MemoryError

    monkeypatch.setattr(changes, "_write_one", failing)
    with nothing_changes(model), pytest.raises(MemoryError):
        SingularEdit(model, W_IN).apply()


def test_from_another_thread(make_dt: Make) -> None:
    model, errors = make_dt(), []
    before = bits(model)

    def work() -> None:
        try:
            with SingularEdit(model, W_IN):
                assert bits(model) != before
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    with nothing_changes(model):
        thread.start()
        thread.join()
    assert not errors


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("entered", [False, True])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_mode(make_dt: Make, built: bool, entered: bool, left: bool, dtype: torch.dtype) -> None:
    with torch.inference_mode(built):
        model = make_dt(dtype=dtype)
    assert next(iter(model.weights.values())).is_inference() == built
    before = outputs(model)
    with nothing_changes(model):
        with torch.inference_mode(entered):
            edit = SingularEdit(model, W_IN, [0, 1])
            edit.apply()
            assert not torch.equal(outputs(model), before)
        with torch.inference_mode(left):
            nested = SingularEdit(model, "blocks.0.attn.OV.1", side="read")
            nested.apply()
            edit.undo()
        nested.undo()
    assert torch.equal(outputs(model), before)


def test_training_continues_around_an_edit(make_dt: Make) -> None:
    model = make_dt().train()
    model.blocks[0].eval()  # a mode of its own
    loss = model(**model.probe()).action_preds.square().sum()
    with nothing_changes(model), SingularEdit(model, "blocks.1.mlp.W_out"):
        assert model.training
        assert not model.blocks[0].training
    # Autograd notices that a weight was written between forward and backward, rather than use the wrong one.
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    model(**model.probe()).action_preds.square().sum().backward()
    assert model.get_parameter("blocks.1.mlp.W_out").grad is not None


def test_a_hooked_model_keeps_its_hooks_and_gets_no_others(make_dt: Make) -> None:
    model = make_dt()
    seen: list[str] = []
    model.add_hook("blocks.0.mlp.hook_post", lambda x, hook: seen.append(hook.name))
    with nothing_changes(model):
        for name, side in ((W_IN, "read"), ("blocks.0.attn.QK.0", "key"), ("blocks.1.attn.OV.0", "write")):
            with SingularEdit(model, name, side=side):  # type: ignore[arg-type]
                assert hooked(model) == ["blocks.0.mlp.hook_post"]
    with model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", lambda x, hook: None)]):
        with nothing_changes(model), SingularEdit(model, W_IN):
            pass
        assert hooked(model) == ["blocks.0.mlp.hook_post", "blocks.1.hook_mlp_out"]
        outputs(model)


def test_an_edit_is_seen_by_the_hugging_face_model_and_leaves_it(make_hf: Callable[..., Any]) -> None:
    original = make_hf()
    model = dt_lens.wrap(original)
    batch = model.probe()

    def theirs() -> Tensor:
        with torch.no_grad():
            return original(**batch, return_dict=True).action_preds[batch["attention_mask"] != 0]

    before = theirs()
    state = {name: weight_bytes(weight) for name, weight in original.state_dict().items()}
    for name, side in ((W_IN, "read"), ("blocks.1.attn.OV.0", "read"), ("blocks.0.attn.QK.1", "key")):
        with nothing_changes(model):
            with SingularEdit(model, name, side=side, value="flip"):  # type: ignore[arg-type]
                edited = theirs()
                assert (edited - before).abs().max() > 1e-4
                torch.testing.assert_close(outputs(model)[batch["attention_mask"] != 0], edited, rtol=1e-4, atol=1e-5)
            assert torch.equal(theirs(), before)
    assert {name: weight_bytes(weight) for name, weight in original.state_dict().items()} == state
    # A model that was cast after wrapping has other weights: an edit would miss it.
    original.encoder.h[0].mlp.c_fc.weight = nn.Parameter(original.encoder.h[0].mlp.c_fc.weight.clone())
    with pytest.raises(DtLensError, match=r"no longer shares the weight 'blocks.0.mlp.W_in'"), nothing_changes(model):
        SingularEdit(model, W_IN).apply()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_edit_that_changes_nothing_is_an_error(make_dt: Make, dtype: torch.dtype) -> None:
    model = make_dt(dtype=dtype)
    for edit in (
        SingularEdit(model, W_IN, value=1.0),
        SingularEdit(model, W_IN, value=1 + 1e-12),  # rounds away
        SingularEdit(model, "blocks.0.attn.OV.0", 1, side="read", value=1.0),
        SingularEdit(model, W_IN, value=1.0).control(),
    ):
        with nothing_changes(model), pytest.raises(DtLensError, match="changes no bit of the weights"), edit:
            pass
    with SingularEdit(model, W_IN), nothing_changes(model), pytest.raises(DtLensError, match="changes no bit"):
        SingularEdit(model, W_IN, 1, value=1.0).apply()


def test_an_edit_that_hits_a_copy_is_an_error(make_dt: Make) -> None:
    model = make_dt()
    mlp, attn = model.blocks[0].mlp, model.blocks[0].attn
    used = {name: weight.clone() for name, weight in model.weights.items()}

    def forward(x: Tensor) -> Tensor:
        pre = mlp.hook_pre(x @ used[W_IN] + mlp.b_in)
        return torch.relu(mlp.hook_post(pre)) @ used["blocks.0.mlp.W_out"] + mlp.b_out

    project = attn._project
    mlp.forward = forward
    attn._project = lambda x, W, b: project(x, used["blocks.0.attn.W_Q"] if W is attn.W_Q else W, b)
    for name, side in ((W_IN, "read"), ("blocks.0.mlp.W_out", "write"), ("blocks.0.attn.QK.1", "query")):
        with nothing_changes(model), pytest.raises(DtLensError, match="does not reach the model's forward pass"):
            SingularEdit(model, name, side=side).apply()  # type: ignore[arg-type]
    for name, side in (("blocks.0.attn.QK.1", "key"), ("blocks.0.attn.OV.1", "read"), ("blocks.1.mlp.W_in", "read")):
        with nothing_changes(model), SingularEdit(model, name, side=side):  # type: ignore[arg-type]
            pass


def test_an_edit_too_faint_for_the_activations_is_distinguished_from_a_copy(make_dt: Make) -> None:
    """A direction so weak that the bias drowns it: the weights change, and no bit of what they compute."""
    model = make_dt(dtype=torch.bfloat16)
    model.weights[W_IN].zero_()[:2, :2] = torch.diag(torch.tensor([2.0, 1e-6]))
    model.weights["blocks.0.mlp.b_in"].fill_(3.0)
    edit = SingularEdit(model, W_IN, 1, value="flip", fold_layernorm=False)
    with nothing_changes(model), pytest.raises(DtLensError, match="moves no activation by a bit"):
        edit.apply()
    with nothing_changes(model), SingularEdit(model, W_IN, 0, value="flip", fold_layernorm=False):
        pass


def test_what_the_first_token_does_not_show_the_whole_sequence_does(
    make_lm: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = dt_lens.wrap(make_lm("gpt2"))
    shown, asked = SingularEdit._activation, []

    def hidden(edit: Any, tokens: int | None = None) -> Tensor:
        asked.append(tokens)
        seen = shown(edit, tokens)
        assert seen.shape[:2] == (1, tokens or 7)
        return torch.zeros(1) if tokens else seen

    monkeypatch.setattr(SingularEdit, "_activation", hidden)
    before = model.weights[W_IN].clone()
    with nothing_changes(model), SingularEdit(model, W_IN, sv=0) as edit:
        change = edit.delta[0] @ edit.delta[1]
        torch.testing.assert_close(model.weights[W_IN], (before.double() + change).float(), rtol=0, atol=0)
        assert model.active_edits == [edit]
    assert asked == [1, 1, None, None]


def test_a_probe_that_fails_while_the_edit_is_away_leaves_nothing_behind(
    make_lm: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = dt_lens.wrap(make_lm("gpt2"))
    left = iter([torch.zeros(1)] * 3)

    def failing(edit: Any, tokens: int | None = None) -> Tensor:
        return next(left)  # StopIteration at the whole sequence without the edit

    monkeypatch.setattr(SingularEdit, "_activation", failing)
    with nothing_changes(model), pytest.raises(StopIteration):
        SingularEdit(model, W_IN).apply()
    assert not state_of(model).untouched


def test_an_edit_of_one_weight_leaves_another_edited_weight_alone(make_dt: Make) -> None:
    """Only the weight that an edit changes is written when it comes and goes."""
    model = make_dt()
    other = "blocks.1.mlp.W_in"
    with nothing_changes(model), SingularEdit(model, other):
        edited, version = weight_bytes(model.weights[other]), model.weights[other]._version
        with SingularEdit(model, W_IN):
            pass
        assert weight_bytes(model.weights[other]) == edited and model.weights[other]._version == version


def test_the_check_that_an_edit_is_in_use_ends_where_it_shows(make_lm: Make) -> None:
    """Before the blocks behind, and with every hook and mode as they were."""
    model = dt_lens.wrap(make_lm("gpt2"))
    edit, ran = SingularEdit(model, W_IN, sv=0), []
    name = "blocks.1.hook_resid_post"
    model.add_hook(name, lambda x, hook: ran.append(hook.name))
    with nothing_changes(model), edit:
        pass
    assert not ran
    model(**model.probe())
    assert ran == [name]


def test_an_edit_of_weights_that_have_changed_is_refused(make_dt: Make) -> None:
    model = make_dt()
    edits = [SingularEdit(model, W_IN), SingularEdit(model, W_IN).control()]
    outer = SingularEdit(model, W_IN, 1)
    with outer, edits[0]:  # other edits in force do not change the weights that an edit is made from
        pass
    model.weights[W_IN][0, 0] += 1e-3
    for edit in edits:
        with nothing_changes(model), pytest.raises(DtLensError, match="have changed since this edit was made"), edit:
            pass
    model.weights["blocks.1.ln2.w"][0] += 1e-3  # another matrix's
    with SingularEdit(model, W_IN):
        pass


def test_an_edit_is_applied_once(make_dt: Make) -> None:
    model = make_dt()
    edit = SingularEdit(model, W_IN)
    with nothing_changes(model), edit:
        assert edit.active
        assert model.active_edits == [edit]
        with pytest.raises(DtLensError, match="already in force"):
            edit.apply()
        with pytest.raises(DtLensError, match="Direction 0 of"):
            SingularEdit(model, W_IN, value="flip").apply()
        assert edit.active
    edit.undo()
    with nothing_changes(model), edit:
        pass


def test_layers_that_share_their_memory(make_lm: Make) -> None:
    """Tied blocks: an edit of one edits both and says so, and does not change what the other's directions are."""
    original = make_lm("gpt2")
    original.transformer.h[1].mlp = original.transformer.h[0].mlp
    model = dt_lens.wrap(original, check=False)
    other = "blocks.1.mlp.W_in"
    alone, outside = SingularEdit(model, other, fold_layernorm=False), SingularEdit(model, other, 1)
    edit = SingularEdit(model, W_IN, value="zero", fold_layernorm=False)
    for noted in (edit, edit.control(), SingularEdit(model, "blocks.0.mlp.W_in", side="neuron")):
        assert "blocks.0.mlp.W_in shares its memory with blocks.1.mlp.W_in" in noted.note
    assert "memory" not in SingularEdit(model, "blocks.0.attn.W_Q").note
    with nothing_changes(model), edit:
        assert torch.equal(model.weights[other], model.weights[W_IN])
        inside = SingularEdit(model, other, fold_layernorm=False)
        assert inside.sigma == alone.sigma
        assert torch.equal(inside.delta[0] @ inside.delta[1], alone.delta[0] @ alone.delta[1])
        for second in (inside, outside):
            with pytest.raises(DtLensError, match="share their memory, and an edit of it is already in force"):
                second.apply()
    with nothing_changes(model), outside:
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_edit_too_large_for_the_weights_is_an_error(make_dt: Make, dtype: torch.dtype) -> None:
    model = make_dt(dtype=dtype)
    edits = [SingularEdit(model, W_IN, value=value) for value in (1e42, -1e300, [1e42, *[0.0] * 15])]
    for edit in (*edits, edits[0].control(), SingularEdit(model, "blocks.0.attn.OV.0", side="write", value=1e42)):
        with nothing_changes(model), pytest.raises(DtLensError, match=r"weights that \w+ cannot hold"), edit:
            pass


def test_a_model_cast_inside_an_edit_cannot_be_restored_and_says_so(make_dt: Make) -> None:
    model = make_dt()
    with pytest.raises(DtLensError, match="could not be restored bit for bit"), SingularEdit(model, W_IN):
        model.half()
    assert not model.active_edits
    with SingularEdit(model, "blocks.1.mlp.W_in"):  # nothing stays behind
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_edits_come_and_go_in_any_order(make_dt: Make, dtype: torch.dtype) -> None:
    """The weights are the same to the bit: in float64 too, where a sum in another order rounds differently."""
    model = make_dt(dtype=dtype)
    edits = [SingularEdit(model, W_IN, sv, value="flip") for sv in range(3)]
    states = []
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        with nothing_changes(model):
            for i in order:
                edits[i].apply()
            states.append(bits(model))
            edits[1].undo()
            states.append(bits(model))
            edits[0].undo()
            edits[2].undo()
    assert states[0] == states[2] == states[4]  # whichever came first
    assert states[1] == states[3] == states[5]
    # The sum is rounded once: three flips together are three flips one by one.
    with ExitStack() as stack:
        for edit in edits:
            stack.enter_context(edit)
        together = model.weights[W_IN].double()
    with SingularEdit(model, W_IN, [0, 1, 2], value="flip"):
        torch.testing.assert_close(model.weights[W_IN].double(), together, rtol=0, atol=1e-6)


def test_evaluate_sees_the_edit_and_writes_it_down(make_dt: Make) -> None:
    import gymnasium as gym

    space = gym.make("InvertedPendulum-v5").observation_space.shape[0]
    model = make_dt(state_dim=space, act_dim=1, size=0.5, max_ep_len=40)
    run = {"environment": "InvertedPendulum-v5", "episodes": 8, "target_return": 10.0, "max_steps": 30, "workers": 1}
    base = dt_lens.evaluate(model, **run)
    edit = SingularEdit(model, "blocks.1.mlp.W_out", value=-3.0)
    with nothing_changes(model), edit, edit.control(1) as control:
        edited = dt_lens.evaluate(model, **run)
        assert edited.edits == (edit.to_dict(), control.to_dict())
    assert base.edits == ()
    assert edited.model_id != base.model_id
    assert dt_lens.evaluate(model, **run).model_id == base.model_id
