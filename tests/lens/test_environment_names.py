"""What a file may say of its environment, and what only the user may."""

from __future__ import annotations

import shutil
import site
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

import dt_lens
from dt_lens.behaviour.agents.evaluation import AgentEvaluation
from dt_lens.behaviour.agents.recording import record_actions
from dt_lens.cli import main
from dt_lens.decision_transformer.checkpoint import save_pretrained
from dt_lens.decision_transformer.environment_labels import environment_labels
from dt_lens.decision_transformer.facts import RunFacts
from dt_lens.errors import DtLensError
from dt_lens.lens import environment_names as module

EVIL = """
from pathlib import Path
import gymnasium as gym
Path(__file__).with_name("imported").touch()
gym.register("Evil-v0", entry_point="gymnasium.envs.classic_control:CartPoleEnv", max_episode_steps=3)
"""


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_dt: Callable[..., Any]) -> Iterator[Path]:
    """A folder with an agent of ``evil:Evil-v0``, from which ``python -m`` would import ``evil.py``."""
    (tmp_path / "evil.py").write_text(EVIL)
    model = make_dt(n_layers=1, state_dim=4, act_dim=2, discrete_actions=True, action_tanh=False)
    model.facts = RunFacts(context=4, environment="evil:Evil-v0", target_returns=(9.0,))
    save_pretrained(model, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    yield tmp_path
    sys.modules.pop("evil", None)
    gym.registry.pop("Evil-v0", None)


def test_a_name_from_a_file_imports_nothing(beside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = beside / "imported"
    model = dt_lens.load(beside, check=False)
    assert model.embeddings["action_out"].labels  # labels come from the environment, if it can be made
    with pytest.raises(
        DtLensError, match=r"'evil:Evil-v0' comes from a file.*import it yourself, or pass environment="
    ):
        dt_lens.evaluate(model, episodes=1)
    said = {"environment": "evil:Evil-v0", "environment_kwargs": {}, "target_return": 1.0, "time_limit": 3}
    steps = {"seed": [0], "return": [1.0], "length": [3], "terminated": [False], "truncated": [True]}
    kept = AgentEvaluation.from_dict(
        {**said, "model_id": "", "failure": "terminated", "edits": [], "per_episode": steps}
    )
    with pytest.raises(DtLensError, match="comes from a file"):
        record_actions(model, kept, 0)
    # Under ``python -m dt_lens`` the working directory is the first place to import from.
    monkeypatch.setattr(sys, "argv", ["dt-lens", "evaluate", str(beside), "--episodes", "1"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2 and not imported.exists() and "evil" not in sys.modules
    # The user's own argument imports, as Gymnasium does, and so does what he says on loading.
    assert dt_lens.evaluate(model, "evil:Evil-v0", episodes=1, workers=1).time_limit == 3
    assert imported.exists()
    assert dt_lens.evaluate(model, episodes=1, workers=1).time_limit == 3  # imported by now
    sys.modules.pop("evil")
    gym.registry.pop("Evil-v0")
    imported.unlink()
    dt_lens.load(beside, check=False, environment="evil:Evil-v0")
    assert imported.exists()


def test_keywords_from_a_file_are_those_of_the_registered_environment(
    tmp_path: Path, make_dt: Callable[..., Any]
) -> None:
    model = make_dt(n_layers=1, state_dim=16, act_dim=4, discrete_actions=True, action_tanh=False)
    options = {"episodes": 1, "workers": 1, "max_steps": 2}

    def loaded(kwargs: dict[str, Any], **given: Any) -> Any:
        model.facts = RunFacts(4, "FrozenLake-v1", kwargs, target_returns=(1.0,))
        return dt_lens.load(save_pretrained(model, tmp_path), check=False, **given)

    assert dt_lens.evaluate(loaded({"map_name": "4x4"}), **options).environment_kwargs == {"map_name": "4x4"}
    agent = loaded({"desc": ["SFFF"] * 4})
    with pytest.raises(DtLensError, match=r"'FrozenLake-v1' the keyword desc=.*pass environment_kwargs= yourself"):
        dt_lens.evaluate(agent, **options)
    confirmed = {"desc": ["SFFF"] * 4}
    result = dt_lens.evaluate(agent, environment_kwargs=confirmed, **options)
    again = AgentEvaluation.from_dict(result.to_dict())
    with pytest.raises(DtLensError, match="the keyword desc="):
        record_actions(agent, again, 0)
    agent = loaded({}, environment_kwargs=confirmed)
    assert dt_lens.evaluate(agent, **options).environment_kwargs == confirmed
    assert len(record_actions(agent, again, 0)) == 2
    # What a file says of one environment is not said of another that the user chooses.
    assert loaded({"desc": ["SFFF"] * 4}, environment="FrozenLake8x8-v1").facts.environment_kwargs == {}
    assert loaded({"map_name": "4x4"}, environment="gymnasium:FrozenLake-v1").facts.environment_kwargs
    agent.facts = replace(agent.facts, environment="gymnasium:FrozenLake-v1")
    assert dt_lens.evaluate(agent, "FrozenLake-v1", **options).environment_kwargs == confirmed


def test_a_package_that_announces_adapters_may_be_named(beside: Path) -> None:
    pytest.importorskip("minigrid")
    name = "dt_lens_adapters.minigrid_environments:Flat/MiniGrid-Empty-5x5-v0"
    assert environment_labels(name, {"max_steps": 4})[1] is not None
    # An option of such an environment may name another one, and imports nothing either.
    assert environment_labels(name, {"env_id": "evil:Evil-v0"}) == (None, None)
    assert not (beside / "imported").exists() and "evil" not in sys.modules


@pytest.mark.parametrize("metadata", ["beside", "installed"])
def test_a_folder_with_an_extras_name_is_not_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metadata: str
) -> None:
    """Beside the weights, with metadata of its own; or "editable", whose metadata alone lie where packages do."""
    beside, installed = tmp_path / "beside", tmp_path / "installed"
    for folder in (beside, installed):
        (folder / "minigrid").mkdir(parents=True)
        (folder / "minigrid" / "__init__.py").write_text(EVIL)
    told = tmp_path / metadata / "minigrid-9.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: minigrid\nVersion: 9\n")
    monkeypatch.delitem(sys.modules, "minigrid", raising=False)
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(installed)])
    monkeypatch.chdir(beside)
    monkeypatch.syspath_prepend(str(installed))
    assert module._brought_by_an_extra("minigrid", "MiniGrid-Empty-5x5-v0")
    shutil.rmtree(installed / "minigrid")
    monkeypatch.syspath_prepend("")
    with pytest.raises(DtLensError, match=r"'minigrid:MiniGrid-Empty-5x5-v0' comes from a file, .*import it yourself"):
        module.specification("minigrid:MiniGrid-Empty-5x5-v0")
    assert not list(tmp_path.rglob("imported"))
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    with pytest.raises(DtLensError, match=r"not installed; pip install 'dt-lens\[minigrid\]'"):
        module.specification("minigrid:MiniGrid-Empty-5x5-v0")


def test_an_environment_to_evaluate_in_that_the_user_names_is_imported(beside: Path) -> None:
    model = dt_lens.load(
        beside, check=False, evaluation_environment={"id": "evil:Evil-v0", "kwargs": {"max_episode_steps": 2}}
    )
    assert (beside / "imported").exists()
    assert dt_lens.evaluate(model, episodes=1, workers=1).time_limit == 2
