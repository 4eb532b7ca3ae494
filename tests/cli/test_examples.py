"""Every command's ``--help`` ends with examples, and they run: all reach their command, and most are run to the end."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from dt_lens.cli.app import app

Run = Callable[..., Any]
GROUP: Any = typer.main.get_command(app)
# What an example ends in: patched, a command of hours is known to have begun.
WORK = (
    "lens.loading.load",
    "lens.loading.open_checkpoint",
    "training.agent.train",
    "training.text.train_text",
    "training.recording.record",
    "training.planned.record_planned",
    "behaviour.sweep.results.SweepResults",
    "cli.commands.bench._measured",
)


def examples(name: str) -> list[str]:
    """The commands that the help of the command ``name`` shows."""
    return [line.strip() for line in (GROUP.commands[name].epilog or "").split("\n\n")[1:]]


EXAMPLES = [example for name in GROUP.commands for example in examples(name)]
# One after the other in one folder, as a reader would give them: seconds each, and a study or a court takes minutes.
IN_ORDER = [
    "dt-lens bench --list",
    "dt-lens scan hopper --top 10",
    "dt-lens scan tiny-gpt2 --matrices 'blocks.0.mlp.*' --out scan.csv",
    "dt-lens scan hopper --matrices '*.W_in' --json",
    "dt-lens top hopper blocks.0.mlp.W_in action_out",
    "dt-lens top tiny-gpt2 blocks.3.mlp.W_out token_out -k 4 --words",
    "dt-lens clusters taxi --matrices '*.W_in' --sv 0-3",
    "dt-lens compare doorkey unlockpickup --top 5",
    "dt-lens certify hopper",
    "dt-lens certify tiny-gpt2",
    "dt-lens evaluate hopper --edit blocks.0.mlp.W_in --sv 0 --episodes 20",
    "dt-lens evaluate tiny-gpt2 --edit blocks.3.mlp.W_out --value zero --json",
    "dt-lens activations tiny-gpt2 --windows 16 --out tiny.safetensors",
    "dt-lens sweep tiny-gpt2 --matrices '*.W_in' --sv 0 --value zero --controls 1",
    "dt-lens atlas tiny-gpt2 --sweep dt-lens-sweep/tiny-gpt2 --json",
]
QUICK = IN_ORDER[0], IN_ORDER[4]


class Reached(Exception):
    """The command has begun its work."""


@pytest.mark.parametrize("name", GROUP.commands)
def test_every_command_has_examples(name: str) -> None:
    found = examples(name)
    assert 1 <= len(found) <= 3, (
        f"dt-lens {name} --help shows {len(found)} examples; write one to three, that run, as EXAMPLES in the "
        f"command's file, dt_lens/cli/commands/{name.replace('-', '_')}.py: EXAMPLES = ('dt-lens {name} ...',)."
    )
    for example in found:
        assert example.startswith(f"dt-lens {name}") and len(example) <= 76, f"{example}: help is 80 columns wide"


def test_help_shows_them(dt_lens: Run) -> None:
    done = dt_lens("scan", "--help")
    lines = [line.strip() for line in done.stdout.splitlines()]
    at = lines.index("Examples:")
    assert [line for line in lines[at + 1 :] if line] == examples("scan")


def test_help_cuts_nothing_at_80_columns(dt_lens: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    overview = dt_lens("--help").stdout
    assert "what they match" in overview and "..." not in overview.partition("Commands:")[2]
    for name, command in GROUP.commands.items():
        said = dt_lens(name, "--help").stdout
        assert max(map(len, said.splitlines())) <= 80 and "…" not in said, name
        words = " ".join(said.replace("-\n", "-").split())
        for parameter in command.params:
            assert getattr(parameter, "hidden", False) or all(option in words for option in parameter.opts), name
        for example in examples(name):
            assert example in [line.strip() for line in said.splitlines()], example


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_reaches_its_command(
    dt_lens: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, example: str
) -> None:
    def reached(*_: object, **__: object) -> None:
        raise Reached

    monkeypatch.chdir(tmp_path)
    for name in WORK:
        monkeypatch.setattr(f"dt_lens.{name}", reached)
    try:
        done = dt_lens(*shlex.split(example)[1:])
    except Reached:
        return
    assert done.returncode == 0, f"{example}: {done.stderr}"


def test_the_examples_that_are_run_are_examples() -> None:
    assert set(IN_ORDER) <= set(EXAMPLES)


@pytest.mark.parametrize("example", QUICK)
def test_a_quick_example_runs(dt_lens: Run, example: str) -> None:
    done = dt_lens(*shlex.split(example)[1:])
    assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.acceptance(minutes=2)
def test_examples_run(dt_lens: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for example in IN_ORDER:
        done = dt_lens(*shlex.split(example)[1:])
        assert done.returncode == 0 and done.stdout, f"{example}: {done.stderr}"
        assert all(line.startswith(("[", "Written: ", "Next: ")) for line in done.stderr.splitlines()), done.stderr


def test_quiet_is_an_option_of_all_and_says_nothing(dt_lens: Run, cartpole: Path) -> None:
    for name, command in GROUP.commands.items():
        assert any("--quiet" in parameter.opts for parameter in command.params), name
    done = dt_lens("top", cartpole, "blocks.0.mlp.W_in", "--quiet")
    assert done.returncode == 0 and done.stderr == ""
    assert "[  0%] loading\n" in dt_lens("top", cartpole, "blocks.0.mlp.W_in").stderr


def test_a_warning_of_ours_is_a_sentence(dt_lens: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    from dt_lens.cli.output import usual_output

    monkeypatch.setattr("sys.warnoptions", [])
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("always")
        said: list[str] = []
        patch.setattr("builtins.print", lambda text, **_: said.append(text))
        with usual_output(quiet=True):
            warnings.warn("The data\n set is old.", stacklevel=1)
    assert said == ["Warning: The data set is old."]


def test_the_wrapped_commands_are_still_called_as_functions() -> None:
    for command in GROUP.commands.values():
        assert "quiet" not in inspect.signature(inspect.unwrap(command.callback)).parameters
