"""The app that holds all commands, and its entry point: an error is one sentence and exit status 2.

Commands import torch, pandas and the like in their bodies, so that ``--help`` does not wait for them.
"""

from __future__ import annotations

import _thread
import functools
import inspect
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer

from dt_lens.cli.commands.activations import activations
from dt_lens.cli.commands.atlas import atlas
from dt_lens.cli.commands.bench import bench
from dt_lens.cli.commands.certify import certify
from dt_lens.cli.commands.clusters import clusters
from dt_lens.cli.commands.compare import compare
from dt_lens.cli.commands.court import court
from dt_lens.cli.commands.evaluate import evaluate
from dt_lens.cli.commands.explore import explore
from dt_lens.cli.commands.record import record
from dt_lens.cli.commands.scan import scan
from dt_lens.cli.commands.steer import steer
from dt_lens.cli.commands.study import study
from dt_lens.cli.commands.sweep import sweep
from dt_lens.cli.commands.top import top
from dt_lens.cli.commands.train import train
from dt_lens.cli.commands.train_text import train_text
from dt_lens.cli.commands.video import video
from dt_lens.cli.options import Quiet
from dt_lens.cli.output import say, usual_output
from dt_lens.errors import DtLensError
from dt_lens.version import __version__

__all__ = ["app", "main"]

app = typer.Typer(
    name="dt-lens",
    help="What the weights of a decision transformer do: singular directions, honest nulls, edits, paired rollouts.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's boxes cut words at 80 columns, and leave 19 to the explanations
    context_settings={"help_option_names": ["-h", "--help"]},
)
_COMMANDS: list[Callable[..., None]] = [
    study,
    explore,
    scan,
    top,
    clusters,
    compare,
    evaluate,
    video,
    sweep,
    atlas,
    court,
    steer,
    activations,
    certify,
    train,
    train_text,
    record,
    bench,
]  # in the order of --help


def _with_usual_output(command: Callable[..., None]) -> Callable[..., None]:
    """The command with ``--quiet``, which all have, and with nothing but JSON on standard output after ``--json``."""

    @functools.wraps(command)
    def run(*args: Any, quiet: bool = False, **kwargs: Any) -> None:
        with usual_output(quiet, kwargs.get("as_json", False)):
            command(*args, **kwargs)

    own = inspect.signature(command, eval_str=True)
    option = inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Quiet)
    run.__signature__ = own.replace(parameters=[*own.parameters.values(), option])  # type: ignore[attr-defined]
    return run


def examples_of(command: Callable[..., Any]) -> tuple[str, ...]:
    """The commands that ``--help`` shows: ``EXAMPLES`` in the command's file."""
    return getattr(sys.modules[command.__module__], "EXAMPLES", ())


for _command in _COMMANDS:
    _shown = "\n\n".join(("Examples:", *(f"  {example}" for example in examples_of(_command))))
    _line = (_command.__doc__ or "").partition("\n")[0]  # given by itself, it is not cut in the list of commands
    app.command(epilog=_shown, short_help=_line)(_with_usual_output(_command))


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        say(f"dt-lens {__version__}")
        raise typer.Exit


# What a command keeps when it is stopped, and how to go on. Some stop with a sentence of their own that says more.
_FOLDER = "Stopped; what is finished is kept in its folder, and the same command resumes from there."
_TRAINING = (
    "Stopped; a checkpoint, if there is one in its folder, is kept, and the same command, without --fresh, resumes "
    "from there."
)
_KEPT = {
    "study": _FOLDER,
    "sweep": _FOLDER,
    "court": _FOLDER,
    "steer": _FOLDER,
    "record": _FOLDER,
    "train": _TRAINING,
    "train-text": _TRAINING,
}
_NOTHING = "Stopped; this command keeps nothing that is unfinished, so give it again to start from the beginning."
_RESUMES = "Stopped; finished work is kept in the folder of --resume, and the same command resumes from there."


def main() -> None:
    """Run the command that ``sys.argv`` names: the entry point ``dt-lens``."""
    try:
        with _no_interrupt_lost():
            app(standalone_mode=True)
    except DtLensError as error:
        say(f"dt-lens: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        _leave(stop)
    except SystemExit as left:
        if left.code == 130:  # typer has turned Ctrl-C into this status, and has printed nothing
            _leave(left)
        raise
    except BrokenPipeError:
        # The reader of the output has closed it, as in `dt-lens scan hopper | head`.
        sys.stderr.close()
        sys.exit(141)


@contextmanager
def _no_interrupt_lost() -> Iterator[None]:
    """Raise Ctrl-C again where Python drops it: in the middle of a finalizer, an exception is only reported."""
    before = sys.unraisablehook
    again: list[threading.Timer] = []

    def report(dropped: sys.UnraisableHookArgs) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            before(dropped)
            return
        # From another thread and later: raised here, inside the report, it would be dropped as well.
        again.append(threading.Timer(0.02, _thread.interrupt_main))
        again[-1].daemon = True
        again[-1].start()

    sys.unraisablehook = report
    try:
        yield
    except SystemExit as left:
        if again and left.code in (0, None):  # the command ended before it came again
            raise KeyboardInterrupt from None
        raise
    finally:
        sys.unraisablehook = before
        for timer in again:
            timer.cancel()


def _leave(stop: BaseException) -> NoReturn:
    """Say what is kept and how to go on, and exit with status 130."""
    said: BaseException | None = stop
    while said is not None and not (isinstance(said, KeyboardInterrupt) and said.args):
        said = said.__cause__ or said.__context__
    words = sys.argv[1:]
    usual = _RESUMES if any(word.startswith("--resume") for word in words) else _NOTHING
    say(f"\ndt-lens: {said or _KEPT.get(words[0] if words else '', usual)}", err=True)
    if getattr(sys.excepthook, "__module__", "") == "dt_lens":  # this process is the command, and has nothing to do
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(130)
