"""``evaluate``: what a model does in its task, hundreds of paired units at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

from dt_lens.arguments import whole_number
from dt_lens.behaviour.evaluation import Evaluation
from dt_lens.behaviour.task import Task
from dt_lens.behaviour.tasks import task_of
from dt_lens.edits.edit import Edit
from dt_lens.errors import DtLensError, a_type, as_written
from dt_lens.progress import Count, counting

if TYPE_CHECKING:
    from dt_lens.behaviour.agents.environment import Named
    from dt_lens.behaviour.agents.evaluation import AgentEvaluation
    from dt_lens.behaviour.terms import FailureRule
    from dt_lens.behaviour.texts.evaluation import TextEvaluation
    from dt_lens.behaviour.texts.windows import Texts
    from dt_lens.decision_transformer.model import HookedDecisionTransformer
    from dt_lens.language_model.model import HookedLanguageModel

__all__ = [
    "evaluate",
]


@overload
def evaluate(
    model: HookedDecisionTransformer,
    what: Named | None = None,
    *,
    edits: None = None,
    units: int | None = None,
    seed: int = 0,
    failure: FailureRule | None = None,
    workers: int | None = None,
    progress: bool | Count | None = None,
    environment: Named | None = None,
    episodes: int | None = None,
    target_return: float | None = None,
    environment_kwargs: Mapping[str, Any] | None = None,
    max_steps: int | None = None,
    deterministic: bool | None = None,
    lanes: int | None = None,
) -> AgentEvaluation: ...


@overload
def evaluate(
    model: HookedDecisionTransformer,
    what: Named | None = None,
    *,
    edits: Iterable[Edit | None],
    units: int | None = None,
    seed: int = 0,
    failure: FailureRule | None = None,
    workers: int | None = None,
    progress: bool | Count | None = None,
    environment: Named | None = None,
    episodes: int | None = None,
    target_return: float | None = None,
    environment_kwargs: Mapping[str, Any] | None = None,
    max_steps: int | None = None,
    deterministic: bool | None = None,
    lanes: int | None = None,
) -> list[AgentEvaluation]: ...


@overload
def evaluate(
    model: HookedLanguageModel,
    what: Texts | None = None,
    *,
    edits: None = None,
    units: int | None = None,
    progress: bool | Count | None = None,
    texts: Texts | None = None,
    context: int | None = None,
    windows: int | None = None,
) -> TextEvaluation: ...


@overload
def evaluate(
    model: HookedLanguageModel,
    what: Texts | None = None,
    *,
    edits: Iterable[Edit | None],
    units: int | None = None,
    progress: bool | Count | None = None,
    texts: Texts | None = None,
    context: int | None = None,
    windows: int | None = None,
) -> list[TextEvaluation]: ...


@overload
def evaluate(
    model: Any,
    what: Any = None,
    *,
    edits: None = None,
    task: Task | None = None,
    units: int | None = None,
    seed: int = 0,
    failure: FailureRule | None = None,
    workers: int | None = None,
    progress: bool | Count | None = None,
    environment: Any = None,
    episodes: int | None = None,
    target_return: float | None = None,
    environment_kwargs: Mapping[str, Any] | None = None,
    max_steps: int | None = None,
    deterministic: bool | None = None,
    lanes: int | None = None,
    texts: Texts | None = None,
    context: int | None = None,
    windows: int | None = None,
) -> Evaluation: ...


@overload
def evaluate(
    model: Any,
    what: Any = None,
    *,
    edits: Iterable[Edit | None],
    task: Task | None = None,
    units: int | None = None,
    seed: int = 0,
    failure: FailureRule | None = None,
    workers: int | None = None,
    progress: bool | Count | None = None,
    environment: Any = None,
    episodes: int | None = None,
    target_return: float | None = None,
    environment_kwargs: Mapping[str, Any] | None = None,
    max_steps: int | None = None,
    deterministic: bool | None = None,
    lanes: int | None = None,
    texts: Texts | None = None,
    context: int | None = None,
    windows: int | None = None,
) -> list[Evaluation]: ...


def evaluate(
    model: Any,
    what: Any = None,
    *,
    edits: Iterable[Edit | None] | None = None,
    task: Task | None = None,
    units: int | None = None,
    seed: int = 0,
    failure: FailureRule | None = None,
    workers: int | None = None,
    progress: bool | Count | None = None,
    environment: Any = None,
    episodes: int | None = None,
    target_return: float | None = None,
    environment_kwargs: Mapping[str, Any] | None = None,
    max_steps: int | None = None,
    deterministic: bool | None = None,
    lanes: int | None = None,
    texts: Texts | None = None,
    context: int | None = None,
    windows: int | None = None,
) -> Evaluation | Sequence[Evaluation]:
    """Run units of ``model`` as it is now (edits included) and return how each one went.

    What a unit is, its task says: an episode of an agent in an environment, a window of text of a language model, or
    whatever a ``Task`` of your own counts. What happens in it depends on the model, the setting and the unit's number
    alone, to the last bit (on a CPU): not on how many there are, on ``workers`` or on the order. So two evaluations of
    the same units are paired, and ``edited.compare(baseline)`` compares them. Dropout is off.

    An agent's episode ``i`` starts from ``env.reset(seed=seed + i)``. An agent on the CPU runs in worker processes. One
    with hooks, with a state encoder of its own, or on another device runs in this process, on one torch thread; what
    its hooks do is part of the behaviour. A language model predicts each window by itself; if edits are in force, also
    with them suspended: KL and the tokens that moved compare the model with itself without its edits.

    Args:
        model: what ``dt_lens.load`` and ``dt_lens.wrap`` return.
        what: of an agent the environment: a Gymnasium id, ``"module:Id"`` to import a package that registers it, an
            ``EnvSpec``, or a function that makes one. By default the model's own: the evaluation environment of its
            data, if they have one, else that of the data themselves; the result says which. Of a language model the
            texts: the path of a text file, a text, or a list of texts; the held-out text in the model's folder by
            default. Of any model a ``Task``.
        edits: evaluate the model under each of these instead, over the same units: edits that are not in force, or
            ``None`` for none. The results are those of ``with edit: evaluate(model, ...)``, to the bit. An agent runs
            them side by side in one batch, each row with its edit's low-rank change, from one copy of the weights: 64
            edits take little longer than one evaluation of 64 times as many episodes. Another model, or an agent with
            hooks, runs them one after another. Edits in force meanwhile stay in force.
        task: a ``Task``, in place of ``what``.
        units: how many; 100 episodes, or all windows, by default. ``episodes`` and ``windows`` are other names for it.
        seed: of the first episode, not negative.
        failure: what counts as failing; by default what the model's facts say for their environment, else a guess; see
            ``terms_of_episodes``.
        workers: processes; as many as there are processor cores to use by default; 1 runs in this process.
        progress: ``True`` for a bar, ``False`` for none, or a function of (units done, units), which counts running
            episodes by their share of the time limit; by default a bar in a notebook and none elsewhere.
        environment, episodes: other names for ``what`` and ``units`` of an agent.
        target_return: what the agent is asked for, in the environment's units; the model's first one by default.
        environment_kwargs: for ``gymnasium.make``; by default those of the model's facts, with the model's environment.
            ``max_episode_steps`` and ``wrappers`` (see ``RunFacts``) of that environment stay unless they are named:
            ``{"wrappers": []}`` takes it without any.
        max_steps: cut episodes after this many steps, where the environment's time limit does not do so earlier.
        deterministic: whether an agent of discrete actions takes the largest logit; ``False`` samples from their
            softmax with random numbers that the episode's seed gives, the same for an edited agent and the unedited
            one. What the model's facts say by default, which is ``True`` where they say nothing.
        lanes: episodes side by side in a process, at least 8; chosen by the number of episodes by default.
        texts, windows: other names for ``what`` and ``units`` of a language model.
        context: tokens of a window, at most the model's own; 128 by default.

    Returns:
        an ``Evaluation``: of an agent an ``AgentEvaluation``, of a language model a ``TextEvaluation``. With ``edits``
        a list of them, one for each edit, in their order.

    Raises:
        DtLensError: for arguments that do not fit the model, when the environment or the target return is neither given
            nor among the model's facts, for texts that cannot be read or are too short, when the model predicts
            something that is not finite, or when a worker dies.
    """
    if workers is not None:
        whole_number(workers, "workers", 1)
    chosen = None if edits is None else _edits_of(model, edits)
    found, numbers = task_of(
        model,
        what,
        task=task,
        units=units,
        seed=seed,
        failure=failure,
        environment=environment,
        episodes=episodes,
        target_return=target_return,
        environment_kwargs=environment_kwargs,
        max_steps=max_steps,
        deterministic=deterministic,
        lanes=lanes,
        texts=texts,
        context=context,
        windows=windows,
    )
    with counting(progress, len(numbers) * (1 if chosen is None else len(chosen)), found.terms.units) as count:
        report = None if count is None else lambda done, total: count(done)
        if chosen is None:
            return found.evaluate(model, numbers, workers=workers, progress=report)
        return found.evaluate_each(model, chosen, numbers, workers=workers, progress=report)


def _edits_of(model: Any, edits: Any) -> list[Edit | None]:
    """The edits as a list.

    Raises:
        DtLensError: for an empty list, and for what is no edit of this model.
    """
    if not isinstance(edits, Iterable) or isinstance(edits, str | Mapping):
        raise DtLensError(f"edits is {a_type(edits)}; it must be a list of edits, and None for the unedited model.")
    chosen: list[Edit | None] = list(edits)
    if not chosen:
        raise DtLensError("edits is empty; give at least one edit, or None for the unedited model.")
    for edit in chosen:
        if edit is not None and not isinstance(edit, Edit):
            raise DtLensError(
                f"edits holds {a_type(edit)}; each must be an edit, such as SingularEdit makes, or None for the "
                "unedited model."
            )
        if edit is not None and edit.model is not model:
            raise DtLensError(f"edits holds {as_written(edit)}, which was made on another model; make it on this one.")
    return chosen
