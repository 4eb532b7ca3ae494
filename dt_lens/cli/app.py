"""The app that holds all commands, and its entry point: an error is one sentence and exit status 2.

Commands import torch, pandas and the like in their bodies, so that ``--help`` does not wait for them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from dt_lens.cli.commands.activations import activations
from dt_lens.cli.commands.atlas import atlas
from dt_lens.cli.commands.certify import certify
from dt_lens.cli.commands.compare import compare
from dt_lens.cli.commands.court import court
from dt_lens.cli.commands.evaluate import evaluate
from dt_lens.cli.commands.record import record
from dt_lens.cli.commands.scan import scan
from dt_lens.cli.commands.steer import steer
from dt_lens.cli.commands.study import study
from dt_lens.cli.commands.sweep import sweep
from dt_lens.cli.commands.top import top
from dt_lens.cli.commands.train import train
from dt_lens.cli.commands.train_text import train_text
from dt_lens.errors import DtLensError
from dt_lens.version import __version__

__all__ = ["app", "main"]

app = typer.Typer(
    name="dt-lens",
    help="What the weights of a decision transformer do: singular directions, honest nulls, edits, paired rollouts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_COMMANDS: list[Callable[..., None]] = [
    study,
    scan,
    top,
    compare,
    evaluate,
    sweep,
    atlas,
    court,
    steer,
    activations,
    certify,
    train,
    train_text,
    record,
]  # in the order of --help
for _command in _COMMANDS:
    app.command()(_command)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(f"dt-lens {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command that ``sys.argv`` names: the entry point ``dt-lens``."""
    try:
        app(standalone_mode=True)
    except DtLensError as error:
        print(f"dt-lens: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("dt-lens: stopped.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of the output has closed it, as in `dt-lens scan hopper | head`.
        sys.stderr.close()
        sys.exit(141)
