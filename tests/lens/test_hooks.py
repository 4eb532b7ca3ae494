"""A hook runs, or it is an error: misspelt, of a compiled model, or on a pass that never came."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import dt_lens
from dt_lens import DtLensError
from dt_lens.lens.forward_mode import uncompiled

TOKENS = torch.tensor([[3, 1, 4, 1, 5]])
OUT = "blocks.0.hook_mlp_out"
POST = "blocks.0.mlp.hook_post"


@pytest.fixture(params=["agent", "gpt2"])
def model(request: pytest.FixtureRequest, make_dt: Any, make_lm: Any) -> Any:
    return make_dt() if request.param == "agent" else dt_lens.wrap(make_lm("gpt2"), check=False)


@pytest.fixture
def compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def run(model: Any, **batch: Any) -> Tensor:
    out = model(**(batch or model.probe()))
    found: Tensor = getattr(out, "action_preds", out)
    return found.detach()


def zero(x: Tensor, hook: Any) -> Tensor:
    return torch.zeros_like(x)


def same(x: Tensor, hook: Any) -> Tensor:
    return x


def test_hooks_on_a_model_that_was_compiled_after_wrapping(make_lm: Any, compiler: None) -> None:
    """One sublayer is compiled; the whole model would take a minute, and the hooks do not know the difference."""
    theirs = make_lm("gpt2", n_layer=1)
    lens = dt_lens.wrap(theirs, check=False)
    with torch.no_grad():
        plain = lens(TOKENS)
        wanted = lens.run_with_hooks(TOKENS, fwd_hooks=[(POST, zero)])
        assert (wanted - plain).abs().max() > 1e-3
        theirs.transformer.h[0].mlp.compile(backend="eager")
        torch.testing.assert_close(lens(TOKENS), plain)  # compiled now
        assert torch.equal(lens.run_with_hooks(TOKENS, fwd_hooks=[(POST, zero)]), wanted)
        _, cache = lens.run_with_cache(TOKENS, names_filter=POST)
        assert list(cache) == [POST]
        dt_lens.certify(lens)
        with dt_lens.SingularEdit(lens, "blocks.0.mlp.W_in"):
            assert (lens(TOKENS) - plain).abs().max() > 1e-4  # compiled code sees edits


def test_passes_of_several_threads_leave_the_compiler_as_it_was(compiler: None) -> None:
    import torch._dynamo.eval_frame as frames

    start, stop = threading.Event(), threading.Event()

    def other() -> None:
        with uncompiled():
            start.set()
            stop.wait(10)

    before = frames._stance.stance
    thread = threading.Thread(target=other)
    with uncompiled():
        thread.start()
        start.wait(10)
    assert frames._stance.stance == "force_eager"  # the other pass still runs
    stop.set()
    thread.join()
    assert frames._stance.stance == before


def test_a_misspelt_name_is_an_error_with_the_nearest(model: Any) -> None:
    wrong = "blocks.0.mlp.hook_pst"
    said = re.escape(f"The model has no hook point {wrong!r}.") + ".*blocks.0.mlp.hook_post"
    for attempt in (
        lambda: model.run_with_cache(**model.probe(), names_filter=wrong),
        lambda: model.run_with_cache(**model.probe(), names_filter=[OUT, wrong]),
        lambda: model.run_with_hooks(**model.probe(), fwd_hooks=[(wrong, same)]),
        lambda: model.run_with_hooks(**model.probe(), bwd_hooks=[(wrong, same)]),
        lambda: model.add_hook(wrong, same),
        lambda: model.add_perma_hook(wrong, same),
        lambda: model.add_caching_hooks(wrong),
    ):
        with pytest.raises(DtLensError, match=said):
            attempt()
    for attempt in (
        lambda: model.run_with_cache(**model.probe(), names_filter=lambda name: "hook_nothing" in name),
        lambda: model.run_with_hooks(**model.probe(), fwd_hooks=[(lambda name: False, same)]),
        lambda: model.add_hook(lambda name: False, same),
    ):
        with pytest.raises(DtLensError, match="chooses none of the model's"):
            attempt()
    for no_name, said in ((3, "names_filter is an int"), ([3], "no hook point 3"), ("blocks.0.mlp", "no hook point")):
        with pytest.raises(DtLensError, match=said):
            model.run_with_cache(**model.probe(), names_filter=no_name)
    assert not any(point.has_hooks() for point in model.hook_dict.values())


def test_a_hook_that_never_runs_is_an_error(model: Any) -> None:
    with pytest.raises(DtLensError, match=f"hooks at '{OUT}' never ran: inside"), model.hooks([(OUT, zero)]):
        pass
    with pytest.raises(ValueError, match="own"), model.hooks([(OUT, zero)]):
        raise ValueError("own")  # an error of the user's comes first
    with pytest.raises(DtLensError, match=r"backward hooks at .* never ran; call backward"):
        model.run_with_hooks(**model.probe(), bwd_hooks=[(OUT, lambda grad, hook: None)])
    with model.hooks([(OUT, same), (lambda name: name.endswith("hook_resid_post"), same)]):
        run(model)
    assert not any(point.has_hooks() for point in model.hook_dict.values())


def test_hooks_of_two_threads_are_told_of_each_other(make_dt: Any) -> None:
    model = make_dt()
    one, other = model.hooks([(OUT, same)]), model.hooks([(POST, same)])
    one.__enter__()
    run(model)
    other.__enter__()
    one.__exit__(None, None, None)  # takes the other's hooks along
    run(model)
    with pytest.raises(DtLensError, match=f"hooks at '{POST}' never ran: .* one thread at a time"):
        other.__exit__(None, None, None)
    # With reset_hooks_end=False they stay, and may run later.
    with model.hooks([(OUT, zero)], reset_hooks_end=False):
        pass
    assert model.hook_dict[OUT].has_hooks()


def test_a_pass_that_does_not_come_by_a_hook_is_an_error(make_dt: Any) -> None:
    model = make_dt()
    model.blocks[1].forward = lambda x, allowed: x
    for attempt in (
        lambda: model.run_with_cache(**model.probe(), names_filter="blocks.1.mlp.hook_post"),
        lambda: model.run_with_hooks(**model.probe(), fwd_hooks=[("blocks.1.mlp.hook_post", zero)]),
    ):
        with pytest.raises(DtLensError, match=r"hooks at 'blocks\.1\.mlp\.hook_post' did not run"):
            attempt()
    model.add_hook("blocks.1.attn.hook_z", zero)
    with pytest.raises(DtLensError, match="did not run"):
        run(model)


def test_every_hook_point_runs(model: Any) -> None:
    for choose in (model.set_use_attn_result, model.set_use_attn_in, model.set_use_hook_mlp_in):
        choose(True)
    with torch.no_grad():
        _, cache = model.run_with_cache(**model.probe())
    assert set(cache) == set(model.hook_dict)
