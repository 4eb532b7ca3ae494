"""The command `train`: a decision transformer from a Minari data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dt_lens.arguments import require_writable
from dt_lens.cli.options import Device, Fresh, Seed, failure_rule, json_object, split, to_float
from dt_lens.cli.output import print_next, progress, say, training_in
from dt_lens.training.settings import AgentSettings

if TYPE_CHECKING:
    from dt_lens.training.agent import AgentProgress

EXAMPLES = (
    "dt-lens train hopper/climb-v0 --out runs/hopper",
    "dt-lens train taxi/mixed-v0 --steps 200 --d-model 32 --out runs/taxi",
)


def train(
    dataset: Annotated[str, typer.Argument(help="A Minari data set id, local or downloadable.")] = "hopper/climb-v0",
    out: Annotated[Path, typer.Option(help="The folder to write; an interrupted run in it is resumed.")] = Path(
        "runs/hopper"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Gradient steps.")] = AgentSettings.steps,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows in a batch.")] = AgentSettings.batch_size,
    context: Annotated[int, typer.Option(min=1, help="Steps the agent looks back.")] = AgentSettings.context,
    d_model: Annotated[int, typer.Option(min=1, help="Width of the residual stream.")] = AgentSettings.d_model,
    layers: Annotated[int, typer.Option(min=1, help="Number of blocks.")] = AgentSettings.n_layers,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads in each block.")] = AgentSettings.n_heads,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = AgentSettings.lr,
    warmup: Annotated[
        int, typer.Option(min=0, help="Steps in which the learning rate rises to --lr.")
    ] = AgentSettings.warmup,
    bf16: Annotated[
        bool,
        typer.Option(
            help="Matrix products in bfloat16; a processor without such instructions is several times slower with it."
        ),
    ] = AgentSettings.bf16,
    seed: Seed = AgentSettings.seed,
    targets: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated target returns to evaluate at, the agent's default first; quantiles of the data's "
            "returns by default."
        ),
    ] = None,
    max_ep_len: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Rows of the timestep table; as many as the longest episode has steps by default. Later steps have "
            "the last row.",
        ),
    ] = AgentSettings.max_ep_len,
    eval_every: Annotated[int, typer.Option(min=0, help="Steps between evaluations; 0 for none.")] = 2_000,
    eval_episodes: Annotated[int, typer.Option(min=1, help="Episodes at each target.")] = 8,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Cut the episodes of the evaluations after this many steps.")
    ] = None,
    environment: Annotated[
        str | None,
        typer.Option(
            "--environment",
            "--env",
            help="The Gymnasium id to evaluate in; by default the data set's evaluation environment, else its own.",
        ),
    ] = None,
    environment_kwargs: Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            help="The environment's keyword arguments; the data set's own by default.",
        ),
    ] = None,
    failure: Annotated[
        str | None,
        typer.Option(
            metavar="RULE",
            help="What counts as failing in the data's environment, kept in dt_lens.json: terminated, truncated, or a "
            "return to fall below.",
        ),
    ] = None,
    ignores: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Comma-separated parts of the observations that the model does not read, such as mission of "
            "MiniGrid's; texts that are always the same by default.",
        ),
    ] = None,
    device: Device = "cpu",
    fresh: Fresh = False,
) -> None:
    """Train a decision transformer on a Minari data set and write it in Hugging Face's format."""
    require_writable(out / "checkpoint.pt")
    from dt_lens.behaviour.printing import places
    from dt_lens.training.agent import train as fit

    settings = AgentSettings(
        steps=steps,
        batch_size=batch_size,
        context=context,
        d_model=d_model,
        n_layers=layers,
        n_heads=heads,
        lr=lr,
        warmup=warmup,
        bf16=bf16,
        seed=seed,
        max_ep_len=max_ep_len,
        targets=() if targets is None else tuple(to_float(t, "targets") for t in targets.split(",")),
    )
    reached = ""
    with progress() as tell, training_in(out):

        def report(p: AgentProgress) -> None:
            nonlocal reached
            digits = places(*p.returns.values())
            returns = ", ".join(f"{target:,.10g} → {got:,.{digits}f}" for target, got in p.returns.items())
            reached = f"step {p.step:,} of {p.steps:,}  loss {p.loss:.4f}"
            reached += f"  target → return {returns}" if returns else ""
            tell(reached, p.step / p.steps)

        tell("reading the data", 0.0)

        fit(
            dataset,
            out,
            settings,
            eval_every=eval_every,
            eval_episodes=eval_episodes,
            max_steps=max_steps,
            environment=environment,
            environment_kwargs=None
            if environment_kwargs is None
            else json_object(environment_kwargs, "environment-kwargs"),
            failure=failure_rule(failure),
            ignores=split(ignores, "ignores"),
            device=device,
            resume=not fresh,
            report=report,
        )
    say(f"Trained to {reached}" if reached else "All steps were done already.")
    say(f"The model: {out}")
    print_next("study", out)
