"""The commands ``train``, ``train-text`` and ``record`` pass their options to the functions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dt_lens.training.settings import AgentSettings, TextSettings

Run = Callable[..., Any]
Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]


@pytest.fixture
def calls() -> Calls:
    return []


def test_train_passes_its_options_on(dt_lens: Run, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    from dt_lens.training import agent as module

    def fake(*words: Any, report: Callable[[Any], None], **options: Any) -> None:
        calls.append((words, options))
        report(module.AgentProgress(1, 2, 0.25, {30.0: 12345.0, 20.0: 7.0}))

    monkeypatch.setattr(module, "train", fake)
    sizes = ["--steps", 2, "--batch-size", 3, "--context", 4, "--d-model", 8, "--layers", 5, "--heads", 2]
    others = ["--lr", 0.5, "--seed", 9, "--targets", "30,20", "--eval-every", 6, "--eval-episodes", 7]
    kwargs = ["--environment-kwargs", '{"sab": true}', "--max-ep-len", 11, "--max-steps", 5, "--failure", "50"]
    kwargs += ["--warmup", 3, "--no-bf16"]
    done = dt_lens("train", "a/b-v0", "--out", "somewhere", *sizes, *others, "--env", "CartPole-v1", "--fresh", *kwargs)
    assert done.returncode == 0, done.stderr
    reached = "step 1 of 2  loss 0.2500  target → return 30 → 12,345, 20 → 7"
    assert done.stdout == f"Trained to {reached}\nThe model: somewhere\n"
    assert f"[ 50%] {reached}\n" in done.stderr and done.stderr.endswith("Next: dt-lens study somewhere\n")
    settings = AgentSettings(
        steps=2, batch_size=3, context=4, d_model=8, n_layers=5, n_heads=2, lr=0.5, seed=9, targets=(30.0, 20.0),
        max_ep_len=11, warmup=3, bf16=False,
    )  # fmt: skip
    rest = {"eval_every": 6, "eval_episodes": 7, "environment": "CartPole-v1", "device": "cpu", "resume": False}
    rest |= {"environment_kwargs": {"sab": True}, "max_steps": 5, "failure": 50.0, "ignores": None}
    assert calls == [(("a/b-v0", Path("somewhere"), settings), rest)]


def test_train_refuses_bad_settings_in_one_sentence(dt_lens: Run) -> None:
    done = dt_lens("train", "a/b-v0", "--d-model", 10, "--heads", 3)
    assert done == (2, "", "dt-lens: d_model is 10; it must be a multiple of n_heads, 3.\n")
    done = dt_lens("train", "a/b-v0", "--targets", "30,x")
    assert done == (2, "", "dt-lens: --targets holds 'x'; expected numbers separated by commas.\n")
    done = dt_lens("train", "a/b-v0", "--environment-kwargs", "[1]")
    assert done.returncode == 2 and "--environment-kwargs is '[1]'; expected a JSON object" in done.stderr


def test_train_text_trains_with_its_options(dt_lens: Run, tmp_path: Path) -> None:
    text = tmp_path / "story.txt"
    text.write_text("\n\n".join(f"Paragraph {i} of a story that has no end." * 5 for i in range(60)))
    sizes = ["--batch-size", 2, "--context", 8, "--vocabulary", 300, "--d-model", 8, "--layers", 1, "--heads", 2]
    others = ["--dropout", 0.1, "--lr", 0.01, "--unwrap", "--held-out", 0.25, "--seed", 3, "--eval-every", 1]
    done = dt_lens("train-text", text, "--out", tmp_path / "out", "--steps", 2, *sizes, *others)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    assert done.stdout.startswith("Trained to step 2 of 2  loss ") and "  held out " in done.stdout
    assert done.stdout.endswith(f"\nThe model: {out}\n") and f"Next: dt-lens study {out}\n" in done.stderr
    again = dt_lens("train-text", text, "--out", out, "--steps", 2, *sizes, *others, "--quiet")
    assert again == (0, f"All steps were done already.\nThe model: {out}\n", "")
    settings = TextSettings(
        steps=2, batch_size=2, context=8, vocabulary=300, d_model=8, n_layers=1, n_heads=2, dropout=0.1, lr=0.01,
        unwrap=True, held_out=0.25, seed=3,
    )  # fmt: skip
    kept = json.loads((tmp_path / "out" / "training.json").read_text())["settings"]
    assert TextSettings(**kept) == settings
    assert len((tmp_path / "out" / "curve.jsonl").read_text().splitlines()) == 2


def test_record_passes_its_options_on(dt_lens: Run, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    from dt_lens.training import recording as module

    def fake(*words: Any, report: Callable[..., None], **options: Any) -> str:
        calls.append((words, options))
        report("expert", 1, 2, "score 3")
        return words[1]

    monkeypatch.setattr(module, "record", fake)
    counts = ["--steps", 1, "--pace-steps", 2, "--candidates", 3, "--episodes", 4, "--seed", 5, "--workers", 1]
    done = dt_lens("record", "Walker2d-v5", "--dataset", "a/b-v0", "--paces", "0.7,0.4", "--folder", "there", *counts)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The data set: a/b-v0\n" and "] expert  1 of 2: score 3\n" in done.stderr
    assert done.stderr.endswith("Next: dt-lens train a/b-v0 --out runs/a-b-v0\n")
    rest = {"steps": 1, "pace_steps": 2, "candidates": 3, "episodes": 4, "seed": 5, "workers": 1}
    assert calls == [(("Walker2d-v5", "a/b-v0"), {**rest, "paces": [0.7, 0.4], "folder": Path("there")})]


def test_record_of_a_planner_passes_its_options_on(dt_lens: Run, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    from dt_lens.training import planned as module

    def fake(*words: Any, report: Callable[..., None], **options: Any) -> str:
        calls.append((words, options))
        report("episodes", 1, 2, "return 3")
        return words[1]

    monkeypatch.setattr(module, "record_planned", fake)
    shares = ["--noises", "0,0.5", "--waiting", 0.25, "--longest-wait", 0.5, "--scattered", 0.75]
    others = ["--episodes", 4, "--seed", 5, "--workers", 1, "--folder", "there"]
    kwargs = ["--environment-kwargs", '{"is_slippery": false}']
    done = dt_lens("record", "FrozenLake-v1", "--dataset", "a/b-v0", *shares, *others, *kwargs)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The data set: a/b-v0\n" and "[ 50%] episodes  1 of 2: return 3" in done.stderr
    rest = {"episodes": 4, "seed": 5, "workers": 1, "folder": Path("there"), "noises": [0.0, 0.5], "waiting": 0.25}
    rest |= {"longest_wait": 0.5, "scattered": 0.75, "environment_kwargs": {"is_slippery": False}}
    assert calls == [(("FrozenLake-v1", "a/b-v0"), rest)]
    calls.clear()
    assert dt_lens("record", "FrozenLake-v1", "--max-steps", 30, "--quiet").stderr == ""
    assert calls[0][1]["environment_kwargs"] == {"max_episode_steps": 30}
    done = dt_lens("record", "FrozenLake-v1", "--max-steps", 30, "--environment-kwargs", '{"max_episode_steps": 9}')
    assert done.returncode == 2 and "are the same; give one" in done.stderr
    done = dt_lens("record", "FrozenLake-v1", "--pace-steps", 4)
    said = "dt-lens: --pace-steps is an option of a search, and FrozenLake-v1 is recorded by a planner; leave it out.\n"
    assert done == (2, "", said)
    done = dt_lens("record", "Pendulum-v1", "--max-steps", 5)
    assert done.returncode == 2 and "--max-steps is an option of a planner" in done.stderr
    done = dt_lens("record", "Pendulum-v1", "--waiting", 0.5)
    said = "dt-lens: --waiting is an option of a planner, and Pendulum-v1 is recorded by a search; leave it out.\n"
    assert done == (2, "", said)


def test_the_phases_of_a_recording_are_one_progress(
    dt_lens: Run, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dt_lens.cli.commands.record import _in_order
    from dt_lens.training import recording as module

    told: list[float] = []
    report = _in_order(lambda _, share: told.append(share), {"expert": 200, "pace 0.5": 100, "episodes": 300})
    for phase in ("expert", "pace 0.5", "episodes", "store"):
        for done in range(3):
            report(phase, done, 2, "")
    assert told == sorted(told) and told[0] == 0.0 and told[-1] == pytest.approx(1.0)
    assert told[3] == pytest.approx(200 / 606) and told[6] == pytest.approx(300 / 606)
    phases: list[str] = []
    monkeypatch.setattr("dt_lens.cli.commands.record._in_order", lambda tell, sizes: phases.extend(sizes))
    monkeypatch.setattr(module, "record", lambda *words, **options: words[1])
    assert dt_lens("record", "Walker2d-v5", "--paces", "0.75,0.5").returncode == 0
    assert phases == ["expert", "pace 0.75", "pace 0.5", "episodes"]
