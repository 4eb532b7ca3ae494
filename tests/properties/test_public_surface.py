"""Wrong values for every argument of every public function: one sentence, or an answer, and nothing else.

The names are those of the rooms' ``__init__.pyi``. For each of them ``CALLS`` has right arguments, as small as can be;
the walk puts a wrong value in the place of one of them. What it allows is an answer or a ``DtLensError``.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dt_lens
from dt_lens.behaviour.agents.evaluation import AgentEvaluation
from dt_lens.behaviour.agents.rollouts import Outcome
from dt_lens.errors import DtLensError

ROOT = Path(dt_lens.__file__).parent
WRONG: list[Any] = [
    None, True, 0, -1, 3, 2**63, 2**70, 0.5, math.nan, -math.inf, 1j, "", "nonsense", "x\0y", b"bytes", [], [None], {},
    {"a": 1}, object(), int, print, np.array(["a"]), np.zeros((0, 3)), torch.zeros(2, 2, dtype=torch.complex64),
    pd.DataFrame(),
    pd.DataFrame({"x": [1.0]}), Path("/nowhere/at/all"), range(3), ("a", "b"), [math.nan, 1.0],
]  # fmt: skip
# Classes and protocols that users receive or write and do not call, constants, and rooms.
NOT_CALLED = {
    "ActivationCache", "Adapter", "AgentEvaluation", "AgentTask", "Atlas",
    "BandMaximum", "CLAIMS", "SpectrumMaximum", "Certificate", "Checkpoint",
    "Claim", "Comparison", "Control", "CourtResult",
    "CovarianceMaximum", "Decomposition", "DecisionTransformerOutput", "DtLensError", "Edit", "Engine", "Evaluation",
    "Event", "Explored", "Explorer", "Family", "Finding", "HaarMaximum", "HookedLanguageModel", "Interval",
    "LabelBlocks",
    "LanguageModelAdapter", "LanguageModelConfig", "Lens", "LocalEngine", "Matrix", "ModelChanges", "Modules", "NULLS",
    "Null", "Options", "Outcome",
    "PooledMaximum", "PromptTask", "RayEngine", "Readout", "Reference", "Ruling", "ScoreReference", "ShuffledMaximum",
    "SteeringResult", "Structure", "StudyResult", "SubspaceOverlap", "SurvivalCurve", "Task", "Terms", "TextComparison",
    "TextEvaluation", "TextTask",
    "TokenTable", "UntrainedMaximum", "Value", "WeightsOnly", "__version__", "ascii_only", "main",
    "whole_words",
}  # fmt: skip


def public() -> dict[str, Any]:
    """Every name in an ``__init__.pyi``, once, with what it is; rooms left out."""
    found: dict[str, Any] = {}
    for stub in ROOT.rglob("__init__.pyi"):
        room = ".".join(("dt_lens", *stub.parent.relative_to(ROOT).parts))
        for node in ast.parse(stub.read_text()).body:
            assert isinstance(node, ast.ImportFrom)
            for alias in node.names:
                value = getattr(importlib.import_module(room), alias.name)
                if not inspect.ismodule(value):
                    found[alias.name] = value
    return found


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some values are names of folders to write to, here."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def calls(make_dt: Callable[..., Any], make_lm: Callable[..., Any], tmp_path_factory: Any) -> dict[str, Any]:
    """For every public function what it is called with: the function, and right arguments by name."""
    from dt_lens.decision_transformer.facts import RunFacts

    folder = tmp_path_factory.mktemp("surface")
    model, other = make_dt(0, n_layers=1), make_dt(1, n_layers=1)
    agent = make_dt(2, n_layers=1, state_dim=3, act_dim=1)
    agent.facts = RunFacts(context=4, environment="Pendulum-v1", target_returns=(-200.0, -900.0))
    svd, d = dt_lens.WeightSVD(model), model.cfg.d_model
    table = svd.scan("*.W_in", embeddings="action_out")
    count = model.cfg.state_dim
    places = {"row": [i // 2 for i in range(count)], "column": [i % 2 for i in range(count)]}
    halves = pd.DataFrame({"half": ["a", "b"] * 3}).head(count).set_axis(model.embeddings["state_in"].labels)
    sorted_by = dt_lens.clusters(model, halves, matrices="*.W_in", embeddings="state_in", draws=20, beside=False)
    changes = dt_lens.compare(model, other, "*.W_in")
    outcomes = [Outcome(seed, float(seed % 3), 5, False, True) for seed in range(6)]
    evaluation = AgentEvaluation.from_outcomes(outcomes, environment="Pendulum-v1", target_return=1.0, time_limit=5)
    x, ended = [1.0, 2.0, 3.0, 5.0], [True, False, True, True]
    edit = dt_lens.SingularEdit(model, "blocks.0.mlp.W_in")
    drawn: dict[str, Any] = {"title": None, "width": None, "height": None}
    few: dict[str, Any] = {"episodes": 2, "seed": 0, "max_steps": 3}
    rows = {name: public()[name] for name in public()}
    say: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "load": (dt_lens.load, {"source": "nowhere", "adapter": None, "check": False}),
        "wrap": (dt_lens.wrap, {"model": model, "adapter": None, "check": False}),
        "open_checkpoint": (dt_lens.open_checkpoint, {"source": "nowhere", "adapter": None}),
        "certify": (dt_lens.certify, {"model": model, "seed": 0}),
        "WeightSVD": (dt_lens.WeightSVD, {"model": model, "rank": None, "embeddings": None, "fold_layernorm": True,
                                          "resume": None, "activations": None}),
        "WeightSVD.scan": (svd.scan, {"matrices": "*.W_in", "null": "haar", "seed": 0, "embeddings": "action_out"}),
        "WeightSVD.decompose": (svd.decompose, {"matrices": "*.W_in", "progress": False}),
        "WeightSVD.top": (svd.top, {"matrix": "blocks.0.mlp.W_in", "embedding": "action_out", "k": 2, "side": None}),
        "WeightSVD.tokens": (svd.tokens, {"matrices": "blocks.0.mlp.W_in", "embeddings": "action_out", "k": 2, "n": 2}),
        "WeightSVD.cosines": (svd.cosines, {"matrix": "blocks.0.mlp.W_in", "embedding": "action_out", "side": None,
                                            "k": 2}),
        "WeightSVD.subspaces": (svd.subspaces, {"matrices": "*.W_in", "embeddings": "action_out", "k": 2, "seed": 0}),
        "WeightSVD.strongest": (svd.strongest, {"matrices": "*.W_in", "embeddings": "action_out", "samples": 3,
                                                "seed": 0}),
        "SingularEdit": (dt_lens.SingularEdit, {"model": model, "matrix": "blocks.0.mlp.W_in", "sv": 0, "side": None,
                                                "value": "constant", "seed": 0, "fold_layernorm": True}),
        "SingularEdit.control": (edit.control, {"seed": 0, "activations": None}),
        "load_edit": (rows["load_edit"], {"model": model, "record": edit.to_dict()}),
        "suspended": (rows["suspended"], {"model": model}),
        "Embedding": (dt_lens.Embedding, {"directions": torch.eye(d), "labels": (), "kind": "user", "side": "in",
                                          "layernorm": None, "owner": None, "name": ""}),
        "EmbeddingRegistry": (lambda name, value: model.embeddings.__class__.__setitem__(model.embeddings, name, value),
                              {"name": "mine", "value": dt_lens.Embedding(torch.eye(d))}),
        "evaluate": (dt_lens.evaluate, {"model": agent, "environment": None, "target_return": None, "workers": 1,
                                        "environment_kwargs": None, "failure": None, "lanes": None, **few}),
        "collect_activations": (dt_lens.collect_activations, {"model": agent, "environment": None,
                                                              "target_return": None, "matrices": "*.W_in", **few}),
        "Activations": (dt_lens.Activations.load, {"path": folder / "none"}),
        "save_pretrained": (dt_lens.save_pretrained, {"model": model, "folder": folder / "saved"}),
        "compare": (dt_lens.compare, {"a": model, "b": other, "matrices": "*.W_in", "k": 2, "names": ("a", "b")}),
        "ModelChanges.most_changed": (changes.most_changed, {"count": 2}),
        "ModelChanges.directions": (changes.directions, {"matrix": "blocks.0.mlp.W_in", "least": 0.5, "rank": 2}),
        "ModelChanges.change": (changes.change, {"matrix": "blocks.0.mlp.W_in", "k": 2}),
        "ModelChanges.plot": (changes.plot, {"what": "change", "value": "relative_change", "n": 2, **drawn}),
        "write_page": (rows["write_page"], {"changes": changes, "folder": folder / "page", "command": ""}),
        "plot_spectrum": (dt_lens.plot_spectrum, {"svd": svd, "matrices": "*.W_in", "k": 3, "scale": "log",
                                                  "tolerance": 1e-6, **drawn}),
        "plot_heatmap": (dt_lens.plot_heatmap, {"svd": svd, "matrix": "blocks.0.mlp.W_in", "embedding": "action_out",
                                                "side": None, "k": 4, "n": 2, "q_values": None, "alpha": 0.05,
                                                "limit": None, **drawn}),
        "plot_overview": (dt_lens.plot_overview, {"table": table, "value": "z", "alpha": 0.05, **drawn}),
        "plot_sigma_against_cosine": (dt_lens.plot_sigma_against_cosine, {"table": table, "colour": "kind",
                                                                          "alpha": 0.05, **drawn}),
        "clusters": (dt_lens.clusters, {"model": model, "factors": halves, "matrices": "*.W_in", "sv": "0-1",
                                        "embeddings": "state_in", "only": None, "strata": None, "null": "haar",
                                        "activations": None, "draws": 20, "alpha": 0.05, "seed": 0, "beside": False}),
        "plot_factors": (dt_lens.plot_factors, {"table": sorted_by, "alpha": 0.05, "most": 3, **drawn}),
        "plot_grid": (dt_lens.plot_grid, {"svd": svd, "matrix": "blocks.0.mlp.W_in", "sv": 0, "side": None,
                                          "embedding": "state_in", "factors": places, "limit": None, **drawn}),
        "epsilon_squared": (rows["epsilon_squared"], {"values": x, "levels": "aabb"}),
        "two_sided_auc": (rows["two_sided_auc"], {"values": x, "levels": "aabb"}),
        "RankEffects": (rows["RankEffects"], {"factors": {"a": "xxyy"}}),
        "SmallestP.of": (rows["SmallestP"].of, {"drawn": [[1.0, 2.0], [2.0, 1.0]]}),
        "bundled": (rows["bundled"], {}),
        "adapter_names": (rows["adapter_names"], {}),
        "named_adapter": (rows["named_adapter"], {"adapter": "kzl"}),
        "catalogue": (rows["catalogue"], {"lens": model}),
        "find_matrix": (rows["find_matrix"], {"lens": model, "name": "blocks.0.mlp.W_in"}),
        "select_matrices": (rows["select_matrices"], {"lens": model, "patterns": "*.W_in"}),
        "make_environment": (rows["make_environment"], {"environment": "Pendulum-v1", "kwargs": {}, "cfg": agent.cfg}),
        "score_reference": (rows["score_reference"], {"environment": "Hopper-v5"}),
        "model_id": (rows["model_id"], {"model": model}),
        "film": (rows["film"], {"model": agent, "file": folder / "x.gif", "environment": "NoSuch-v0", "steps": 1}),
        "record_actions": (rows["record_actions"], {"model": agent, "evaluation": evaluation, "seed": 0}),
        "side_by_side": (rows["side_by_side"], {"environment": "NoSuch-v0", "left": [0], "right": [0], "seed": 0,
                                                "file": folder / "x.mp4"}),
        "Sweep": (rows["Sweep"], {"model": agent, "out": folder / "sweep", "settings": None, "workers": 1}),
        "SweepSettings": (rows["SweepSettings"], {name: None for name in rows["SweepSettings"].__dataclass_fields__
                                                  if name in ("matrices", "sides", "halving", "units")}
                          | {"sv": 0, "edits": "zero", "controls": 1, "seed": 0,
                             "control_match": "frobenius", "directions": "plain"}),
        "save_edits": (rows["save_edits"], {"edits": [], "file": folder / "edits.json"}),
        "load_edits": (rows["load_edits"], {"model": agent, "file": folder / "edits.json", "activations": None}),
        "SweepResults": (rows["SweepResults"], {"source": folder}),
        "holm": (rows["holm"], {"p_values": [0.1, 0.2]}),
        "q_values": (rows["q_values"], {"p_values": [0.1, 0.2]}),
        "tail_or_share": (rows["tail_or_share"], {"bound": [0.1], "share": [0.2], "draws": 5}),
        "bootstrap_interval": (rows["bootstrap_interval"], {"values": x}),
        "cohen_dz": (rows["cohen_dz"], {"differences": x}),
        "iqm": (rows["iqm"], {"values": x}),
        "kaplan_meier": (rows["kaplan_meier"], {"times": x, "ended": ended, "confidence": 0.95}),
        "logrank": (rows["logrank"], dict(zip(inspect.signature(rows["logrank"]).parameters, (x, ended, x, ended),
                                              strict=False))),
        "mcnemar": (rows["mcnemar"], {"first": ended, "second": ended}),
        "interval_note": (rows["interval_note"], {"values": x, "what": "outcomes"}),
        "mean_test": (rows["mean_test"], {"differences": x, "seed": 0}),
        "sign_flip": (rows["sign_flip"], {"differences": x, "seed": 0}),
        "wilson": (rows["wilson"], {"successes": 1, "n": 3, "confidence": 0.95}),
        "cap_probability": (rows["cap_probability"], {"cosine": 0.5, "dimension": 4, "span": 1}),
        "frame_maximum": (rows["frame_maximum"], dict(zip(inspect.signature(rows["frame_maximum"]).parameters,
                                                          (np.eye(4), 2), strict=False))),
        "at_least": (rows["at_least"], {"counts": {"a": 1}, "minimum": 1}),
        "write_report": (rows["write_report"], {"path": folder / "r.html", "title": "t", "sections": []}),
        "table_html": (rows["table_html"], {"frame": table}),
        "save_figure": (rows["save_figure"], {"figure": dt_lens.plot_overview(table), "file": folder / "figure.json",
                                              "width": None, "height": None, "scale": None}),
        "Study": (lambda **given: rows["Study"](**given).run(),
                  {"model": make_lm("gpt2"), "out": folder / "study", "episodes": 2, "edits": 1, "seed": 0}),
        "steer": (rows["steer"], {"model": agent, "out": Path("/dev/null/steer"), "episodes": 2, "choosing": 2,
                                  "candidates": 1, "doses": (0.0, 2.0), "targets": None, "seed": 0, "edits": None,
                                  "readout": None}),
        "readout_of": (rows["readout_of"], {"model": agent, "what": None, "task": None, "units": 2, "choosing": 2,
                                            "seed": 0, "targets": None, "prompts": None, "answers": None}),
        "of_task": (rows["of_task"], {"task": rows["readout_of"](agent).task, "units": 2, "choosing": 2, "seed": 0}),
        "make_atlas": (rows["make_atlas"], {"model": agent, "results": None}),
        "write_atlas": (rows["write_atlas"], {"atlas": None, "folder": folder}),
        "write_court": (rows["write_court"], {"result": None, "folder": folder}),
        "write_steering": (rows["write_steering"], {"result": None, "folder": folder}),
        "train": (rows["train"], {"dataset_id": "no/such-v0", "out": Path("/dev/null/x"), "settings": None,
                                  "eval_every": 0, "eval_episodes": 1, "max_steps": 1, "checkpoint_every": 1}),
        "train_text": (rows["train_text"], {"sources": [folder / "no.txt"], "out": folder / "text", "settings": None,
                                            "eval_every": 0, "checkpoint_every": 1}),
        "record": (rows["record"], {"environment_id": "Hopper-v5", "dataset_id": "test/x-v0", "steps": 1, "seed": 0,
                                    "paces": (), "noises": (0.0,), "workers": 1, "folder": Path("/dev/null/x")}),
        "record_planned": (rows["record_planned"], {"environment_id": "FrozenLake-v1", "dataset_id": "test/x-v0",
                                                    "environment_kwargs": None, "seed": 0, "episodes": 1,
                                                    "noises": (0.0,), "waiting": 0.0, "longest_wait": 0.5,
                                                    "scattered": 0.0, "workers": 1, "folder": Path("/dev/null/x")}),
        "AgentSettings": (rows["AgentSettings"], {"steps": 1, "lr": 1e-3, "targets": (), "seed": 0, "dropout": 0.1}),
        "TextSettings": (rows["TextSettings"], {"steps": 1, "lr": 1e-3, "vocabulary": 300, "seed": 0}),
        "HookedDecisionTransformerConfig": (rows["HookedDecisionTransformerConfig"],
                                            {"state_dim": 2, "act_dim": 2, "d_model": 8, "n_heads": 2, "eps": 1e-5,
                                             "act_fn": "relu", "predicts": ("action",)}),
        "HookedDecisionTransformer": (dt_lens.HookedDecisionTransformer, {"cfg": model.cfg}),
        "RunFacts": (rows["RunFacts"], {"context": 4, "environment": "X-v0", "state_mean": (0.0,), "state_std": (1.0,),
                                        "return_scale": 1.0, "target_returns": (1.0,)}),
    }  # fmt: skip
    return say


LONG = 20.0  # seconds


class StillRunning(BaseException):
    """Not an ``Exception``, which what is called may catch."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Stop what runs longer: a drawn number may be a sound request for a billion episodes."""

    def stop(*_: Any) -> None:
        raise StillRunning

    before = signal.signal(signal.SIGALRM, stop)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)  # of whoever limits the whole test
    begun = time.monotonic()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, max(0.01, left - (time.monotonic() - begun)) if left else 0)
        signal.signal(signal.SIGALRM, before)


def foreign(function: Callable[..., Any], right: dict[str, Any], name: str, wrong: Any) -> str | None:
    """What a call with one wrong value raises besides ``DtLensError``; ``None`` if nothing."""
    try:
        with at_most(LONG):
            function(**{**right, name: wrong})
    except StillRunning:
        return None
    except DtLensError as error:
        return None if str(error) else "a DtLensError without a sentence"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:90]}"
    return None


def test_what_runs_on_is_stopped() -> None:
    outer = signal.setitimer(signal.ITIMER_REAL, 1000)
    try:
        assert foreign(lambda count: time.sleep(count), {}, "count", 0) is None
        with pytest.raises(StillRunning), at_most(0.05):
            time.sleep(60)
        assert 900 < signal.getitimer(signal.ITIMER_REAL)[0] < 1000
    finally:
        signal.setitimer(signal.ITIMER_REAL, *outer)


def test_every_public_name_is_walked(calls: dict[str, Any]) -> None:
    assert set(public()) - NOT_CALLED - {name.partition(".")[0] for name in calls} == set()
    assert set(public()) >= NOT_CALLED


@pytest.mark.filterwarnings("ignore")
def test_wrong_values_are_one_sentence(calls: dict[str, Any]) -> None:
    """Two wrong values for each argument, drawn; the long form takes them all."""
    rng, found = np.random.default_rng(0), []
    for name, (function, right) in calls.items():
        for argument in right:
            for number in rng.choice(len(WRONG), 2, replace=False):
                said = foreign(function, right, argument, WRONG[number])
                if said is not None:
                    found.append(f"{name}({argument}={WRONG[number]!r:.40}) -> {said}")
    assert not found, "\n".join(found)


@pytest.mark.skipif(not hasattr(os, "seteuid") or os.geteuid() != 0, reason="only root may become somebody else")
@pytest.mark.parametrize("opens", ["load", "open_checkpoint", "SweepResults"])
def test_a_folder_that_may_not_be_entered_is_one_sentence(opens: str, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("closed")
    for above in (*folder.parents[:3], folder):
        if above.name.startswith("pytest") or above == folder:
            above.chmod(0o755)
    folder.chmod(0o644)
    function = public()[opens]
    os.seteuid(65534)
    try:
        with pytest.raises(DtLensError, match=r"cannot be accessed: .*Permission denied"):
            function(folder)
    finally:
        os.seteuid(0)


@pytest.mark.acceptance(minutes=3)
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=int(os.environ.get("DT_LENS_EXAMPLES", "1500")), deadline=None)
@given(data=st.data())
def test_any_wrong_value_is_one_sentence(calls: dict[str, Any], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(calls)))
    function, right = calls[name]
    if not right:
        return
    argument = data.draw(st.sampled_from(sorted(right)))
    wrong = data.draw(
        st.one_of(st.sampled_from(WRONG), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers()))
    )
    said = foreign(function, right, argument, wrong)
    assert said is None, f"{name}({argument}={wrong!r:.60}) -> {said}"
