"""What an adapter assumes is listed: on the model, in its ``repr``, in what certifies it, and by every command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dt_lens
from dt_lens.cli import main
from dt_lens.decision_transformer.checkpoint import save_pretrained
from dt_lens.decision_transformer.facts import RunFacts
from originals.formats import Format, agents, hugging_face, minigrids
from originals.kzl import OPTIONS, LiveKZL, renamed
from originals.nano_gpt import as_nano

NO_STATISTICS = {"state_mean": None}
ALL_FACTS = {"context": 20, "return_scale": 1.0, **NO_STATISTICS}
# The options that each kind of file leaves open, with the keywords that its tests give it anyway left out here.
EXPECTED: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "min-DT": (("n_heads",), {"return_scale": 1000.0, "action_tanh": True, **NO_STATISTICS}),
    "CORL": (("n_heads",), {"return_scale": 1000.0, "max_action": 1.0}),
    "d3rlpy continuous .pt": (("n_heads", "act_fn"), {"encoder_act": "relu", "return_scale": 1.0, **NO_STATISTICS}),
    "d3rlpy continuous .d3": ((), {}),
    "d3rlpy discrete .pt": (
        ("n_heads", "act_fn"),
        {"encoder_act": "relu", "embed_act": "tanh", "return_scale": 1.0, **NO_STATISTICS},
    ),
    "d3rlpy discrete .d3": ((), {}),
    "kzl Atari": (("n_heads",), {}),
    "MiniGrid": ((), {}),
    "MiniGrid bare": ((), {"act_fn": "relu"}),
    "kzl": (
        ("n_heads",),
        {"act_fn": "relu", "action_tanh": True, "return_scale": 1000.0, **NO_STATISTICS},
    ),
}


@pytest.fixture(scope="session")
def formats(make_hf: Any, make_batch: Any) -> dict[str, Format]:
    return {made.name: made for made in (*agents(), *minigrids(), *hugging_face(make_hf, make_batch))}


@pytest.mark.parametrize("name", EXPECTED)
def test_every_adapter_lists_what_it_assumes(name: str, formats: dict[str, Format], tmp_path: Path) -> None:
    made, (needed, expected) = formats[name], EXPECTED[name]
    given = {option: made.given[option] for option in needed}
    lens = dt_lens.load(made.write(tmp_path, made.tensors), check=False, **given)
    assert lens.assumed == expected
    # What is given is not assumed, and has its effect as before.
    known = {option: value for option, value in expected.items() if option != "state_mean"}
    size = lens.cfg.state_dim
    known |= {"state_mean": [0.0] * size, "state_std": [1.0] * size} if "state_mean" in expected else {}
    told = dt_lens.load(made.write(tmp_path, made.tensors), check=False, **given, **known)
    assert told.assumed == {} and told.cfg == lens.cfg and told.facts.return_scale == lens.facts.return_scale
    assert "assumed" not in repr(told)


def test_assumptions_are_said_wherever_the_model_goes(
    make_hf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = make_hf(**OPTIONS)
    hf.encoder.wpe.weight.data.zero_()
    file = tmp_path / "agent.pt"
    torch.save(renamed(hf), file)
    lens = dt_lens.load(file, n_heads=2, check=False, state_mean=[0.0] * 5, state_std=[1.0] * 5)
    listed = "act_fn='relu', action_tanh=True, return_scale=1000.0"
    assert f"  {listed}\n" in repr(lens)
    certificate = dt_lens.certify(lens)
    assert certificate.assumed == lens.assumed and str(certificate).endswith(f"not proven, because assumed: {listed}")
    # Saved in Hugging Face's form, the file would state what was assumed.
    saved = save_pretrained(lens, tmp_path / "saved")
    again = dt_lens.load(saved, check=False)
    assert again.assumed == lens.assumed
    assert dt_lens.load(saved, check=False, return_scale=10).assumed == {"act_fn": "relu", "action_tanh": True}
    # What was assumed can still be said, as the note advises, and what the configuration knows cannot.
    told = dt_lens.load(saved, check=False, act_fn="gelu", action_tanh=False)
    direct = dt_lens.load(file, n_heads=2, check=False, act_fn="gelu", action_tanh=False)
    assert told.cfg == direct.cfg and told.assumed == {"return_scale": 1000.0}
    probe = told.probe()
    assert torch.equal(told(**probe).action_preds, direct(**probe).action_preds)
    assert not torch.equal(told(**probe).action_preds, again(**probe).action_preds)
    with pytest.raises(dt_lens.DtLensError, match=r"act_fn is 'gello'; .* mean 'gelu'"):
        dt_lens.load(saved, check=False, act_fn="gello")
    with pytest.raises(dt_lens.DtLensError, match="Unknown option 'n_heads'"):
        dt_lens.load(saved, check=False, n_heads=2)
    live = type(make_hf()).from_pretrained(saved)
    with pytest.raises(dt_lens.DtLensError, match="load its folder with act_fn='gelu'"):
        dt_lens.wrap(live, check=False, act_fn="gelu")
    again.assumed = {"strides": [4]}
    with pytest.raises(dt_lens.DtLensError, match=r"load the original file again with strides=\[2\]"):
        dt_lens.load(save_pretrained(again, saved), check=False, strides=[2])
    again.assumed = {}
    assert "assumed" not in json.loads((save_pretrained(again, saved) / "dt_lens.json").read_text())["about"]
    assert lens.untrained().assumed == lens.assumed
    # Every command loads through one function.
    monkeypatch.setattr(sys, "argv", ["dt-lens", "top", str(file), "blocks.0.mlp.W_in", "-g", "n_heads=2"])
    with pytest.raises(SystemExit):
        main()
    assert f"agent.pt: The checkpoint does not say these, so they are assumed: {listed}," in capsys.readouterr().err


def test_a_live_model_says_more_than_its_file(make_hf: Any) -> None:
    live = LiveKZL(make_hf(**OPTIONS))
    assert set(dt_lens.wrap(live, check=False).assumed) == {"return_scale", "state_mean"} | (
        set() if hasattr(live, "max_length") else {"context"}
    )
    assert dt_lens.wrap(make_hf(), check=False).assumed == ALL_FACTS


def test_facts_that_a_file_leaves_out_are_assumed(make_hf: Any, tmp_path: Path) -> None:
    make_hf().save_pretrained(tmp_path)
    facts = tmp_path / "dt_lens.json"
    facts.write_text('{"context": 20, "environment": "Hopper-v5"}')
    lens = dt_lens.load(tmp_path, check=False)
    assert lens.assumed == {"return_scale": 1.0, **NO_STATISTICS}
    assert lens.facts == RunFacts(20, "Hopper-v5")  # the model's identity is that of before
    assert dt_lens.load(save_pretrained(lens, tmp_path / "new"), check=False).assumed == lens.assumed
    assert dt_lens.load(tmp_path, check=False, return_scale=10).assumed == NO_STATISTICS
    facts.write_text('{"context": 20, "return_scale": 10, "state_mean": null, "state_std": null}')
    assert dt_lens.load(tmp_path, check=False).assumed == {}


def test_hugging_faces_tensors_without_their_configuration(make_hf: Any, tmp_path: Path) -> None:
    torch.save(make_hf().state_dict(), tmp_path / "bare.pt")
    lens = dt_lens.load(tmp_path / "bare.pt", n_heads=2, check=False)
    assert lens.assumed == {"act_fn": "relu", "action_tanh": True, **ALL_FACTS}


def test_a_small_gpt(make_lm: Callable[..., Any], tmp_path: Path) -> None:
    model = make_lm("gpt2", activation_function="gelu")
    torch.save({"model": as_nano(model, "blocks")}, tmp_path / "ckpt.pt")
    lens = dt_lens.load(tmp_path / "ckpt.pt", n_heads=4, check=False)
    assert lens.assumed == {"act_fn": "gelu"} and "act_fn='gelu'" in repr(lens)
    assert dt_lens.load(tmp_path / "ckpt.pt", n_heads=4, act_fn="gelu", check=False).assumed == {}
