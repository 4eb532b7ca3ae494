"""The facts of a training run, which a checkpoint needs to be run and usually lacks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from dt_lens.arguments import LAST_SEED, atomic_write, is_finite_number, whole_numbers
from dt_lens.decision_transformer.environment_wrappers import APART, check_environment_kwargs
from dt_lens.errors import DtLensError, a_type, because, nearest
from dt_lens.lens.assumed import Options
from dt_lens.lens.checkpoints import read_json
from dt_lens.lens.environment_names import FileKeywords, same_environment

__all__ = ["FACTS", "FACTS_FILE", "Factors", "Padding", "RunFacts", "from_file", "given_facts"]

FACTS_FILE = "dt_lens.json"
Padding = Literal["mask", "visible"]
Factors = Mapping[str, Mapping[str, tuple[str | int | None, ...]]]
"""By embedding and factor, the level of every label; ``None`` where the factor does not apply to a label."""
USUAL = {"context": 20, "return_scale": 1.0, "state_mean": None}  # where nobody says; 20 is the paper's
HEADS = ("action", "state", "return_to_go", "reward")  # the last two are one head


@dataclass(frozen=True)
class RunFacts:
    """The facts of a training run, stored as ``dt_lens.json`` beside the weights.

    States are fed as ``(observation - state_mean) / state_std`` and returns-to-go as ``return / return_scale``;
    ``target_returns`` are in the environment's own units; the first is the default. Labels name the coordinates of the
    state and action vectors. ``trained_heads`` names the output heads that had a loss: the usual recipe trains only
    ``action``, and a comparison with any other head is a comparison with noise. ``padding`` says what fills the window
    before the first step of an episode: masked steps (``"mask"``), or steps that the model sees (``"visible"``: states
    of zero as the model reads them, no action, the first return-to-go, timestep 0), as some code bases train.
    ``failure`` says which episodes count as failed in ``environment``: those that it ended (``"terminated"``: a fall),
    those that the time limit cut (``"truncated"``: a goal not reached), or those with a return below a number.

    ``factors`` say what the labels of an embedding consist of, such as the row and the column of a state: by embedding
    and factor, the level of each label in their order, and ``None`` where a factor does not apply to a label.

    ``environment_kwargs`` are the keywords of ``gymnasium.make``. Among them, ``max_episode_steps`` is a time limit in
    place of the registered one (-1 for none), and ``wrappers`` lists what is put around the environment, the innermost
    first: ``{"name": "gymnasium.wrappers.RescaleAction", "kwargs": {"min_action": -1, "max_action": 1}}``, by the names
    of ``gymnasium.wrappers`` and ``minigrid.wrappers``. ``evaluation_environment`` is where the agent is evaluated, if
    that is not the environment of the training data.

    ``ignores`` names the parts of an observation that the model does not read, such as MiniGrid's ``("mission",)``: a
    key of a ``Dict``, a place in a ``Tuple``, or several joined by points. ``texts`` has, for each part that is a text
    and that the model reads, the texts that it may be, in the order of its one-hot numbers: ``{"mission": ("get the red
    key", "get the blue key")}``. A text that is in neither is refused where the agent is run.

    ``deterministic`` says how an agent of discrete actions acts: it takes the largest logit, or it samples from their
    softmax, as its episode's seed decides. ``choices`` are the sizes of several choices that it makes at once, such as
    ``(2, 3)`` for the five logits of ``MultiDiscrete([2, 3])``; ``None`` for one choice, or where it is not known.
    """

    context: int  # steps the agent looks back
    environment: str | None = None  # a Gymnasium id; "module:Id" where the module is imported
    environment_kwargs: dict[str, Any] = field(default_factory=dict)  # with the time limit and the wrappers
    state_mean: tuple[float, ...] | None = None
    state_std: tuple[float, ...] | None = None
    return_scale: float = 1.0
    target_returns: tuple[float, ...] = ()
    state_labels: tuple[str, ...] | None = None
    action_labels: tuple[str, ...] | None = None
    trained_heads: tuple[str, ...] = ("action",)
    padding: Padding = "mask"
    failure: str | float | None = None  # what counts as failing; see ``Evaluation``
    about: dict[str, Any] = field(default_factory=dict)  # anything else: dataset, recipe, scores
    evaluation_environment: dict[str, Any] | None = None  # {"id": ..., "kwargs": {...}}, if it is another one
    factors: Factors | None = None  # {"state_in": {"row": (0, 0, ...), ...}}
    ignores: tuple[str, ...] | None = None  # parts of an observation that are not read
    texts: Mapping[str, tuple[str, ...]] | None = None  # parts that are texts, one-hot among these
    deterministic: bool = True  # the largest logit is taken; False: actions are sampled, by the episode's seed
    choices: tuple[int, ...] | None = None  # sizes of several choices made at once

    left_out: ClassVar[Mapping[str, Any]] = {}  # of a file: what it does not say, and what is taken for it

    def __post_init__(self) -> None:
        _require(type(self.context) is int and 1 <= self.context <= LAST_SEED,
                 "context", self.context, "a positive number of steps")  # fmt: skip
        _require(
            self.environment is None or isinstance(self.environment, str),
            "environment",
            self.environment,
            "a Gymnasium id",
        )
        for name in ("environment_kwargs", "about"):
            value = getattr(self, name)
            _require(
                isinstance(value, Mapping) and all(isinstance(key, str) for key in value),
                name,
                value,
                "a mapping of names",
            )
        check_environment_kwargs(self.environment_kwargs, "the run facts' environment_kwargs")
        if (other := self.evaluation_environment) is not None:
            _require(
                isinstance(other, Mapping)
                and set(other) == {"id", "kwargs"}
                and isinstance(other["id"], str)
                and isinstance(other["kwargs"], Mapping),
                "evaluation_environment",
                other,
                "None, or an environment such as {'id': 'Hopper-v5', 'kwargs': {}}",
            )
            check_environment_kwargs(other["kwargs"], "the run facts' evaluation_environment")
        for name in ("state_mean", "state_std", "target_returns"):
            self._freeze(name, _numbers, "finite numbers")
        for name in ("state_labels", "action_labels", "trained_heads", "ignores"):
            self._freeze(name, _names, "strings")
        if self.factors is not None:
            object.__setattr__(self, "factors", _factors(self.factors))
        _require(isinstance(self.deterministic, bool), "deterministic", self.deterministic, "true or false")
        if self.texts is not None:
            object.__setattr__(self, "texts", _texts(self.texts))
        if self.choices is not None:
            sizes = whole_numbers(self.choices, "choices of the run facts", 1)
            object.__setattr__(self, "choices", tuple(sizes))
        scale = self.return_scale
        _require(is_finite_number(scale) and scale > 0, "return_scale", scale, "a positive number")
        _require(self.padding in get_args(Padding), "padding", self.padding, "'mask' or 'visible'")
        ends = ("terminated", "truncated")
        _require(
            self.failure is None or self.failure in ends or is_finite_number(self.failure),
            "failure",
            self.failure,
            "'terminated', 'truncated' or a return to fall below",
        )
        if (self.state_mean is None) != (self.state_std is None):
            raise DtLensError("The run facts give only one of state_mean and state_std; give both or neither.")
        if self.state_mean is not None and self.state_std is not None:
            if len(self.state_mean) != len(self.state_std):
                raise DtLensError(
                    f"The run facts' state_mean has {len(self.state_mean)} entries and state_std "
                    f"{len(self.state_std)}; give one of each for every coordinate of the state."
                )
            _require(all(s > 0 for s in self.state_std), "state_std", min(self.state_std), "positive in every entry")
        for head in self.trained_heads:
            if head not in HEADS:
                raise DtLensError(
                    f"The run facts' trained_heads names {head!r}; the heads are {', '.join(HEADS)}."
                    + nearest(head, HEADS)
                )

    def _freeze(self, name: str, convert: Callable[[Any], tuple[Any, ...] | None], wanted: str) -> None:
        value = getattr(self, name)
        if value is not None or name in ("target_returns", "trained_heads"):  # may be empty, but not None
            frozen = convert(value)
            _require(frozen is not None, name, value, f"a list of {wanted}")
            object.__setattr__(self, name, frozen)

    def require_fit(self, state_dim: int, act_dim: int) -> None:
        """Raise ``DtLensError`` if statistics or labels are of another size than the model's states or actions."""
        for name, size in (("state_mean", state_dim), ("state_labels", state_dim), ("action_labels", act_dim)):
            value = getattr(self, name)
            if value is not None and len(value) != size:
                kind = "action" if name.startswith("action") else "state"
                raise DtLensError(f"The run facts' {name} has {len(value)} entries; the model's {kind} has {size}.")
        if self.choices is not None and sum(self.choices) != act_dim:
            raise DtLensError(
                f"The run facts' choices are of {_sizes(self.choices)}, {sum(self.choices)} logits together; the model "
                f"has {act_dim}."
            )
        for embedding, named in (self.factors or {}).items():
            size = {"state": state_dim, "action": act_dim}.get(embedding.partition("_")[0], 0)
            for factor, levels in named.items():
                if size and len(levels) != size:
                    raise DtLensError(
                        f"The run facts' factor {factor!r} of {embedding} has {len(levels)} levels; give one for each "
                        f"of its {size} labels."
                    )

    def require_choices(self, sizes: Sequence[int], environment: str) -> None:
        """Raise ``DtLensError`` unless an environment's choices at each step are those that the model makes."""
        if self.choices is not None and self.choices != tuple(sizes):
            raise DtLensError(
                f"This model makes choices of {_sizes(self.choices)} at once and {environment} takes "
                f"{'choices' if len(sizes) > 1 else 'one choice'} of {_sizes(sizes)}; evaluate it in the environment "
                "it was trained in."
            )

    @property
    def notes(self) -> tuple[str, ...]:
        """A sentence if ``train`` wrote the model before its last step, and no sentence otherwise."""
        recipe, done = self.about.get("recipe"), self.about.get("trained_steps")
        planned = recipe.get("steps") if isinstance(recipe, Mapping) else None
        if type(done) is not int or type(planned) is not int or done >= planned:
            return ()
        return (f"Half-trained: these are the weights after {done:,} of {planned:,} training steps.",)

    def environment_for(
        self, environment: str | None = None, kwargs: Mapping[str, Any] | None = None
    ) -> tuple[str | None, Mapping[str, Any], str]:
        """The environment that the agent runs in when ``environment`` and ``kwargs`` are asked for.

        Without an id it is the evaluation environment, if there is one, and else the environment of the training data.
        An id that both have means the evaluation environment. ``kwargs`` replace the keywords of an environment that
        the facts know, but not its ``max_episode_steps`` and ``wrappers``, unless they name them.

        Returns:
            Its id (``None`` if none is known), its ``environment_kwargs``, and, where there are two, which it is:
            ``"training"``, ``"evaluation"``, or ``""`` for neither.
        """
        known: list[tuple[str | None, Mapping[str, Any], str]] = [(self.environment, self.environment_kwargs, "")]
        if (other := self.evaluation_environment) is not None:
            known = [(other["id"], other["kwargs"], "evaluation"), (*known[0][:2], "training")]
        environment = known[0][0] if environment is None else environment
        same = [one for one in known if same_environment(one[0], environment)]
        for _, own, role in same:
            if kwargs is None or dict(own) == dict(kwargs):
                return environment, own if kwargs is None else kwargs, role
        apart = {name: same[0][1][name] for name in APART if name in same[0][1]} if same else {}
        return environment, {**apart, **(kwargs or {})}, ""

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values; of those that older files do not have, the ones that are not ``None``."""
        values = asdict(self)
        for name in ("evaluation_environment", "failure", "factors", "ignores", "texts", "choices"):
            if values[name] is None:
                del values[name]
        if self.deterministic:
            del values["deterministic"]
        return values

    def to_json(self) -> str:
        """The facts as the text of ``dt_lens.json``; a value that JSON cannot hold is a ``DtLensError``."""
        try:
            return json.dumps(self.to_dict(), indent=1)
        except (TypeError, ValueError) as error:
            raise DtLensError(
                f"The run facts cannot be written as JSON: {because(error)}; use plain values."
            ) from error

    def save(self, folder: Path) -> None:
        """Write ``dt_lens.json`` into ``folder``; a value that JSON cannot hold is a ``DtLensError``."""
        text = self.to_json()
        with atomic_write(folder / FACTS_FILE) as part:
            part.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> RunFacts | None:
        """Read ``dt_lens.json`` from ``folder``; ``None`` if there is no such file.

        Its ``left_out`` says what the file leaves out of the return scale and the normalisation of states.

        Raises:
            DtLensError: for a file that is not JSON, or a field that is unknown or of the wrong kind.
        """
        file = folder / FACTS_FILE
        if not file.exists() and not file.is_symlink():  # a broken link is an error, not a lack of facts
            return None
        values = read_json(file)
        facts = cls.from_dict(values, str(file))
        left_out = {name: USUAL[name] for name in ("return_scale", "state_mean") if name not in values}
        object.__setattr__(facts, "left_out", left_out)
        return facts

    @classmethod
    def from_dict(cls, values: Any, source: str = "the run facts") -> RunFacts:
        """Facts from plain JSON values; lists become tuples. ``environment_kwargs`` are a file's: not confirmed."""
        if not isinstance(values, dict):
            raise DtLensError(f"{source} holds {a_type(values)}; expected an object with named fields.")
        known = {f.name for f in fields(cls)}
        for name in values:
            if name not in known:
                raise DtLensError(
                    f"{source} has an unknown field {name!r}; it takes {', '.join(sorted(known))}."
                    + nearest(str(name), known)
                )
        if "context" not in values:
            raise DtLensError(f"{source} lacks the field 'context', the number of steps that the agent looks back.")
        return cls(**from_file(values))


FACTS = {f.name for f in fields(RunFacts)}  # keywords that every decision transformer's ``load`` and ``wrap`` take


def from_file(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values that a file gives, its keywords of the environment marked as such; see ``require_registered``."""
    marked, other = dict(values), values.get("evaluation_environment")
    if isinstance(values.get("environment_kwargs"), dict):
        marked["environment_kwargs"] = FileKeywords(values["environment_kwargs"])
    if isinstance(other, dict) and isinstance(other.get("kwargs"), dict):
        marked["evaluation_environment"] = {**other, "kwargs": FileKeywords(other["kwargs"])}
    return marked


def given_facts(kept: RunFacts | None, given: Mapping[str, Any]) -> RunFacts:
    """The checkpoint's facts, overridden by the user's.

    Without facts of the checkpoint, what the user does not give of the context (20, as in the paper), the return scale
    (1) and the normalisation of states (none) is assumed; ``Options`` keep that.
    """
    chosen: dict[str, Any] = {name: value for name, value in given.items() if name in FACTS}
    options = given if isinstance(given, Options) else Options(given)
    if kept is not None:
        noted = kept.about.get("assumed")  # by an earlier load, before the model was saved
        for name, value in {**kept.left_out, **(noted if isinstance(noted, Mapping) else {})}.items():
            options.assume(str(name), value)
        return replace(kept, **_in_environment(kept, chosen))
    return RunFacts(**chosen, **{name: options.assume(name, USUAL[name]) for name in USUAL if name not in chosen})


def _in_environment(kept: RunFacts, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """What the user chose; an environment of his is the only one, with what the checkpoint knows of it.

    Keywords without an environment are of the one that the agent runs in, and leave the training data's as it is.
    """
    environment, kwargs = chosen.get("environment"), chosen.get("environment_kwargs")
    if (environment, kwargs) == (None, None):
        return dict(chosen)
    if not isinstance(environment, str | None) or not isinstance(kwargs, Mapping | None):
        return dict(chosen)  # refused by their checks
    if "evaluation_environment" in chosen:
        kept = replace(kept, evaluation_environment=None)  # the other keywords are of the training data's
    place, known, role = kept.environment_for(environment, kwargs)
    if environment is None and kept.evaluation_environment is not None and role != "training":
        other = {name: value for name, value in chosen.items() if name not in ("environment", "environment_kwargs")}
        return {"evaluation_environment": {"id": place, "kwargs": known}, **other}
    return {"evaluation_environment": None, **chosen, "environment": place, "environment_kwargs": known}


def _sizes(sizes: Sequence[int]) -> str:
    return " and ".join(map(str, sizes))


def _require(holds: bool, name: str, value: Any, wanted: str) -> None:
    if not holds:
        shown = repr(value)
        shown = shown if len(shown) <= 80 else f"{shown[:80]}..."
        raise DtLensError(f"The run facts' {name} is {shown}; it must be {wanted}.")


def _factors(value: Any) -> Factors:
    """``value`` with its levels as tuples.

    Raises:
        DtLensError: unless each embedding has factors, and each factor of it a level (text, whole number or ``None``)
            for every label: as many as the other factors of the embedding, and not all ``None``.
    """
    wanted = "by embedding and factor the level of each label, such as {'state_in': {'row': [0, 0, 1, 1]}}"
    named = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    _require(named and len(value) > 0, "factors", value, wanted)
    frozen: dict[str, dict[str, tuple[str | int | None, ...]]] = {}
    for embedding, factors in value.items():
        where = f"factors of {embedding}"
        named = isinstance(factors, Mapping) and all(isinstance(key, str) for key in factors)
        _require(named and len(factors) > 0, where, factors, "a list of levels for each factor, by its name")
        frozen[embedding] = {
            name: _levels(f"factor {name!r} of {embedding}", levels) for name, levels in factors.items()
        }
        sizes = {name: len(levels) for name, levels in frozen[embedding].items()}
        _require(len(set(sizes.values())) == 1, where, sizes, "lists of one length, a level for every label")
    return frozen


def _levels(name: str, value: Any) -> tuple[str | int | None, ...]:
    listed = value.tolist() if hasattr(value, "tolist") else value
    right = isinstance(listed, list | tuple) and all(level is None or type(level) in (str, int) for level in listed)
    _require(right, name, value, "a list of levels: texts, whole numbers, or None where it does not apply")
    _require(any(level is not None for level in listed), name, value, "a level for at least one label")
    return tuple(listed)


def _numbers(value: Any) -> tuple[float, ...] | None:
    """Plain floats of a list, a tuple, an array or a tensor of numbers; ``None`` for anything else."""
    listed = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(listed, (list, tuple)) or not all(is_finite_number(v) for v in listed):
        return None
    return tuple(float(v) for v in listed)


def _names(value: Any) -> tuple[str, ...] | None:
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
        return None
    return tuple(value)


def _texts(value: Any) -> dict[str, tuple[str, ...]]:
    wanted = "None, or for each part the different texts that it may be, such as {'mission': ['get the red key']}"
    _require(isinstance(value, Mapping) and all(isinstance(name, str) for name in value), "texts", value, wanted)
    found = {name: _names(some) for name, some in value.items()}
    for some in found.values():
        _require(some is not None and 0 < len(some) == len(set(some)), "texts", value, wanted)
    return {name: some or () for name, some in found.items()}
