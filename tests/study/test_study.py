"""A study: its rows, its progress, its files, resuming, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dt_lens.behaviour.evaluation import Evaluation
from dt_lens.behaviour.tasks import task_of
from dt_lens.behaviour.texts.report import coloured
from dt_lens.decision_transformer.facts import RunFacts
from dt_lens.edits.singular import SingularEdit
from dt_lens.errors import DtLensError
from dt_lens.lens.loading import wrap
from dt_lens.study.page import sentences, write_study
from dt_lens.study.result import StudyResult
from dt_lens.study.study import Study
from dt_lens.study.trials import Trials, verdicts
from tests.behaviour.texts.test_texts import Bytes, hf_model
from tests.behaviour.toy import Points, sorter

OPTIONS: dict[str, Any] = {"episodes": 4, "edits": 1, "workers": 1, "video": False}


@pytest.fixture(scope="module")
def agent(make_dt: Callable[..., Any]) -> Any:
    model = make_dt(0, state_dim=4, act_dim=2, n_layers=1, max_ep_len=500, discrete_actions=True, action_tanh=False)
    model.facts = RunFacts(context=4, environment="CartPole-v1", target_returns=(100.0,), return_scale=100.0)
    return model


@pytest.fixture(scope="module")
def shares() -> list[float]:
    """The shares that ``studied`` reported."""
    return []


@pytest.fixture(scope="module")
def studied(agent: Any, shares: list[float], tmp_path_factory: pytest.TempPathFactory) -> StudyResult:
    study = Study(
        agent, tmp_path_factory.mktemp("study"), name="a <small> agent", command="dt-lens study it", **OPTIONS
    )
    return study.run(lambda _what, share: shares.append(share))


def test_a_study_and_its_result_are_printed_in_a_few_lines(studied: StudyResult, agent: Any, tmp_path: Path) -> None:
    before = repr(Study(agent, tmp_path, name="it", **OPTIONS))
    assert before.startswith("Study of it in CartPole-v1") and before.endswith("next      run()")
    text, page = repr(studied), studied._repr_html_()
    assert text.startswith("StudyResult of a <small> agent in CartPole-v1") and len(text.splitlines()) < 9
    assert f"mean return {studied.baseline.mean:.4g} over {len(studied.baseline)} episodes" in text
    assert "a &lt;small&gt; agent" in page and page.count("<tr>") >= 6 + len(studied.verdicts)
    assert studied.verdicts["verdict"].iloc[0] in page


def test_a_row_for_each_edit_beside_its_control(studied: StudyResult) -> None:
    rows = studied.verdicts
    assert list(rows["role"])[:2] == ["strong", "weak"] and set(rows["role"][2:]) == {"first"}
    kinds = {studied.svd[name].matrix.kind for name in studied.table["matrix"]}
    assert {studied.svd[row.matrix].matrix.kind for row in rows.itertuples() if row.sv == 0} == kinds
    assert [edit.matrix.name for edit in studied.edits] == list(rows["matrix"])
    for i, (edited, control) in enumerate(zip(studied.edited, studied.controls, strict=True)):
        assert list(edited.seeds) == list(control.seeds) == list(studied.baseline.seeds) == [0, 1, 2, 3]
        assert rows["difference"][i] == pytest.approx((edited.returns - studied.baseline.returns).mean())
        assert rows["damage_beyond_control"][i] == pytest.approx((control.returns - edited.returns).mean())
        assert edited.edits and control.edits and not studied.baseline.edits


def test_what_did_not_change_is_said_and_not_drawn(studied: StudyResult, tmp_path: Path) -> None:
    same = [replace(studied.baseline, edits=arm.edits) for arm in studied.edited]
    still = verdicts(studied.verdicts, studied.edits, studied.baseline, same, same)
    result = replace(studied, verdicts=still, edited=same, controls=same)
    said = sentences(result)
    assert len(said) == 2 and "**Nothing changed**: no edit and no control changed the return" in said[0]
    assert not any("+0" in sentence for sentence in said)
    page = write_study(result, tmp_path).read_text(encoding="utf-8")
    assert "Nothing changed" in page and "What each edit does, beside its control" not in page
    assert "What each edit does, beside its control" in studied.report.read_text(encoding="utf-8")


def test_equal_returns_do_not_hide_failures(studied: StudyResult) -> None:
    base = _evaluation(studied, np.full(12, 50.0)).with_failure("terminated")
    cut = {"terminated": np.zeros(12, bool), "truncated": np.ones(12, bool), "length": np.full(12, 90)}
    alive = replace(base, columns={**base.columns, **cut})
    n = len(studied.edits)
    edited, controls = [alive] + [base] * (n - 1), [base] * n
    table = verdicts(studied.verdicts, studied.edits, base, edited, controls)
    result = replace(studied, verdicts=table, edited=edited, controls=controls, baseline=base)
    said = sentences(result)
    assert "**No return changed**" in said[0] and "**100 %** of them fail unedited, and 0 % to 100 %" in said[1]
    assert "50.0 steps on average, and 50.0 to 90.0" in said[1]


def test_returns_below_one_keep_their_digits(studied: StudyResult, tmp_path: Path) -> None:
    n = len(studied.baseline)
    base = _evaluation(studied, np.linspace(0.85, 0.95, n))
    result = replace(studied, baseline=base)
    assert "mean return is **0.900** over" in sentences(result)[2]
    page = write_study(result, tmp_path).read_text(encoding="utf-8")
    assert ">0.900<" in page
    assert "interval may cover less than 95 %: fewer than 200 returns." in page


def test_an_edit_that_improves_the_agent_is_not_said_to_hurt_less(studied: StudyResult) -> None:
    base = _evaluation(studied, np.full(12, 50.0))
    better, worse = (_evaluation(studied, base.outcomes + gain + np.arange(12)) for gain in (90.0, -40.0))
    chosen, edits = studied.verdicts.head(2), studied.edits[:2]
    table = verdicts(chosen, edits, base, [better, better], [worse, base])
    assert list(table["verdict"]) == ["improves more than its control"] * 2
    said = " ".join(
        sentences(replace(studied, verdicts=table, edited=[better] * 2, controls=[worse, base], baseline=base))
    )
    assert "No edit lowers the mean return" in said and "**2** improve the agent more than a random" in said
    assert "gains **" in said and "hurts less" not in said and "costs **" not in said.split(";")[0]
    table = verdicts(chosen, edits, base, [worse, base], [base, better])
    assert list(table["verdict"]) == ["hurts more than its control", "leaves the mean as it is, unlike its control"]
    lower = _evaluation(studied, base.outcomes - 80.0 - np.arange(12))
    assert verdicts(chosen, edits, base, [worse] * 2, [lower] * 2)["verdict"][0] == "hurts less than its control"


def _evaluation(studied: StudyResult, returns: Any) -> Evaluation:
    """An evaluation in the study's setting whose episodes all end after 50 steps."""
    n = len(returns)
    flags = {"terminated": np.ones(n, bool), "truncated": np.zeros(n, bool)}
    columns = {"return": np.asarray(returns), "length": np.full(n, 50), **flags}
    return replace(studied.baseline, units=np.arange(n), columns=columns)


def test_the_first_sentence_names_what_was_changed_and_what_it_is_compared_with(studied: StudyResult) -> None:
    base = _evaluation(studied, np.full(12, 50.0))
    lost, less, same = (_evaluation(studied, base.outcomes - loss - np.arange(12) / 4) for loss in (30.0, 20.0, 0.0))
    rows = studied.verdicts.head(2).assign(label="thigh torque", q_value=[0.001, 0.9])
    rows["role"], rows["matrix"], rows["side"] = ["strong", "weak"], "blocks.0.mlp.W_out", "write"

    def said(edited: list[Evaluation], controls: list[Evaluation], chosen: pd.DataFrame = rows) -> str:
        table = verdicts(chosen, studied.edits[:2], base, edited, controls)
        return sentences(replace(studied, verdicts=table, edited=edited, controls=controls, baseline=base))[0]

    both = said([lost, less], [base, base])
    assert "Changing the direction that writes **thigh torque** (block 0 `W_out`, sv" in both
    assert "costs **31** of 50; a random change of equal size in the same place does not change the mean return" in both
    assert "matches nothing well (sv" in both and "costs **21**" in both and "does not explain it" in both
    alone = said([lost, base], [base, base])
    assert "a sign that the match matters" in alone and "explain" not in alone
    neither = said([same, base], [same, base])
    assert "no difference between the two is shown" in neither and "sign that" not in neither
    chance = said([lost, less], [base, base], rows.assign(q_value=0.5))
    assert "a direction that matches no label better than chance does" in chance and "thigh" not in chance


def test_the_first_sentence_of_losses_that_do_not_vary_and_of_contrasts_of_other_kinds(studied: StudyResult) -> None:
    base = _evaluation(studied, np.full(12, 3000.0))
    rows = studied.verdicts.head(2).assign(label="thigh torque", q_value=[0.001, 0.9])
    rows["role"], rows["matrix"], rows["side"] = ["strong", "weak"], "blocks.0.mlp.W_out", "write"

    def said(first: Evaluation, second: Evaluation, energies: tuple[float, float] = (1.0, 1.0)) -> list[str]:
        table = verdicts(rows, studied.edits[:2], base, [first, second], [base, base]).assign(energy=energies)
        return sentences(
            replace(studied, verdicts=table, edited=[first, second], controls=[base] * 2, baseline=base,
                    edits=studied.edits[:2])
        )  # fmt: skip

    def moved(by: float, spread: float = 0.0) -> Evaluation:
        return _evaluation(studied, base.outcomes + by + spread * np.arange(12) / 12)

    # All episodes lose as much: there is no interval, and it is not nothing.
    equal = said(moved(-5.0), base)
    assert "costs **5** of 3,000 (no interval); a random" in equal[0] and "nan" not in equal[0]
    assert "costs **0.2** of 3,000 (no interval)" in said(moved(-0.2), base)[0], "a small loss is not 0"
    assert "a sign that the match matters" in equal[0]
    below = _evaluation(studied, np.full(12, -13.0))
    table = verdicts(rows, studied.edits[:2], below, [base] * 2, [below] * 2)
    shown = replace(studied, verdicts=table, edited=[base] * 2, controls=[below] * 2, baseline=below)
    assert "gains **3,013** from −13 (no interval)" in sentences(shown)[0], "a part of nothing below 0"
    smaller = said(moved(-5.0), base, (1.0, 0.3))[0]
    assert "with a change 30 % as large" in smaller and "size may explain" in smaller and "sign that" not in smaller
    better = said(moved(-5.0), moved(9.0, 1.0))[0]
    assert "gains **9** of 3,000" not in better and "gains **9**: it improves more than its control (q" in better
    assert "no difference from its control is shown" not in better and "sign that" not in better


def test_the_page_says_what_given_edits_do(agent: Any, studied: StudyResult, tmp_path: Path) -> None:
    matrix = "blocks.0.mlp.W_out"
    own = [SingularEdit(agent, matrix, [0, 1], value=2.0), SingularEdit(agent, matrix, 2, value="zero")]
    result = Study(agent, tmp_path, **{**OPTIONS, "edits": own}).run()
    page = result.report.read_text(encoding="utf-8")
    assert "sigma is multiplied by 2; the singular vector becomes &#x27;zero&#x27;" in page
    assert "The study took 2 edits that were given, changed each" in page and "constant" not in page.split("<main>")[0]
    rows = result.verdicts.assign(verdict=["hurts more than its control", "no difference from its control shown"])
    assert "given" not in page.split("<table")[1].split("</table>")[0], "what it does is said, not that it was given"
    assert "energy" in page and "sigma is multiplied by 2</small>" in page and "[+nan" not in page
    twice = verdicts(pd.concat([result.verdicts.head(1)] * 4), [own[0]] * 4, result.baseline, [result.edited[0]] * 4,
                     [result.controls[0]] * 4)  # fmt: skip
    same = replace(result, verdicts=twice, edits=[own[0]] * 4, edited=[result.edited[0]] * 4,
                   controls=[result.controls[0]] * 4)  # fmt: skip
    said = write_study(same, tmp_path / "same").read_text(encoding="utf-8")
    assert all(
        f'"control of {matrix} sv=0 (given){more}"' in said
        for more in ("", " write", *(f" write, edit {n}" for n in (3, 4)))
    )
    assert "and 1 more direction of the matrix" in sentences(replace(result, verdicts=rows))[0]


def test_survival_that_says_nothing_is_a_sentence(studied: StudyResult, tmp_path: Path) -> None:
    def lasting(ended: int) -> Evaluation:
        base = _evaluation(studied, np.arange(20.0))
        cut = np.arange(20) >= ended
        return replace(base, columns={**base.columns, "terminated": ~cut, "truncated": cut})

    n = len(studied.edits)
    base, all_last = lasting(0), lasting(0)
    for one, words in ((all_last, "arms last to the limit"), (lasting(1), "Hardly any episode ends before the limit")):
        edited, controls = [one] * n, [base] * n
        moved = [replace(arm, columns={**arm.columns, "return": arm.outcomes - 1.0}) for arm in edited]
        table = verdicts(studied.verdicts, studied.edits, base, moved, controls)
        result = replace(studied, verdicts=table, edited=moved, controls=controls, baseline=base)
        page = write_study(result, tmp_path).read_text(encoding="utf-8")
        assert words in page and ("The survival curves" in page) == (one is not all_last)


def test_progress_rises_from_nothing_to_everything(studied: StudyResult, shares: list[float]) -> None:
    assert shares[0] == 0 and shares[-1] == 1 and len(shares) > 8
    assert np.diff(shares).min() > -1e-9


def test_the_files_are_written_from_the_result_alone(studied: StudyResult, tmp_path: Path) -> None:
    page = write_study(studied, tmp_path / "again")
    folder = studied.report.parent
    assert page == tmp_path / "again" / "report.html"
    for name in ("report.html", "scan.csv", "verdicts.csv"):
        assert (folder / name).read_bytes() == (page.parent / name).read_bytes()
    assert pd.read_csv(folder / "verdicts.csv")["matrix"].tolist() == studied.verdicts["matrix"].tolist()
    text = page.read_text()
    assert "What the weights of a &lt;small&gt; agent do" in text and "dt-lens study it" in text
    assert "There is no video: it was switched off." in text
    assert len(sentences(studied)) == 3
    hurt = int((studied.verdicts["verdict"] == "hurts more than its control").sum())
    assert f"Of {len(studied.verdicts)} edits **{hurt}** hurt more than a random change" in sentences(studied)[1]
    (tmp_path / "file").write_text("")
    with pytest.raises(DtLensError, match="cannot be written"):
        write_study(studied, tmp_path / "file" / "x")


def test_a_finished_study_runs_nothing_again(agent: Any, studied: StudyResult, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished trial was run again")

    monkeypatch.setattr("dt_lens.behaviour.agents.task.AgentTask.evaluate", never)
    again = Study(agent, studied.report.parent, **OPTIONS).run()
    pd.testing.assert_frame_equal(again.verdicts, studied.verdicts)
    with pytest.raises(AssertionError, match="run again"):
        Trials(agent, task_of(agent)[0], studied.report.parent / "trials", 1).run(range(1, 5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"episodes": 1}, "episodes is 1; it must be a whole number of at least 2"),
        ({"edits": 0}, "edits is 0; it must be a whole number of at least 1"),
    ],
)
def test_too_few_are_refused(agent: Any, tmp_path: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(DtLensError, match=message):
        Study(agent, tmp_path / "out", **{**OPTIONS, **options}).run()
    assert not (tmp_path / "out").exists()


def test_a_language_model_in_its_text(tmp_path: Path) -> None:
    """The same study of windows of text: the loss is what counts, and less of it is better."""
    model = wrap(hf_model(0), tokenizer=Bytes(), check=False)
    told: list[str] = []
    study = Study(model, tmp_path, texts="The quick brown fox jumps over the lazy dog. " * 8, context=16, edits=1)
    found = study.run(lambda what, _share: told.append(what))
    table, base = found.verdicts, found.baseline
    assert base.terms.outcome == "loss" and len(base) == len(study.units) > 10
    for i, (edited, control) in enumerate(zip(found.edited, found.controls, strict=True)):
        assert table["difference"][i] == pytest.approx((edited.outcomes - base.outcomes).mean())
        assert table["damage_beyond_control"][i] == pytest.approx((edited.outcomes - control.outcomes).mean())
        hurt = table["verdict"][i] == "hurts more than its control"
        assert not hurt or edited.mean > max(control.mean, base.mean)
    assert "failure_rate" not in table and "loss_mean" in table
    page = found.report.read_text(encoding="utf-8")
    for words in ("The unedited model", "Loss and KL, window by window", "The tokens that moved", "nats per token"):
        assert words in page
    read = re.sub(r"<(script|style).*?</\1>", "", page, flags=re.DOTALL)
    assert "nats per token" in read and not re.search(r"\bagent|episode|\breturn", read)
    assert "lasts" not in " ".join(section.title for section in found.sections)
    assert any("of blocks." in what for what in told) and not found.missing


def test_a_third_partys_task(tmp_path: Path) -> None:
    found = Study(sorter(), tmp_path, Points(), units=6, edits=1, name="a sorter", value="zero").run()
    assert found.baseline.terms.task == "points" and list(found.baseline.units) == [0, 1, 2, 3, 4, 5]
    assert "The unedited sorter" in found.report.read_text(encoding="utf-8") and "failure_rate" in found.verdicts
    assert "Unedited, the sorter's mean score is **" in sentences(found)[2]


def test_a_text_is_coloured_by_its_change_of_loss() -> None:
    found = coloured(["<s>", "a", "b&"], np.array([1.0, 2.0]), np.array([0.5, 4.0]))
    first, second, third = found.split("<span")[1:]
    assert "not predicted" in first and "&lt;s&gt;" in first and "background" not in first
    assert "0,114,178,0.15" in second and "1.000 to 0.500 nats, -0.500" in second
    assert "213,94,0,0.60" in third and "b&amp;</span>" in third


def test_edits_that_are_given_are_studied_as_they_are(tmp_path: Path) -> None:
    model = sorter()
    edits = [SingularEdit(model, "blocks.1.mlp.W_out", 2, value="zero"), SingularEdit(model, "blocks.0.mlp.W_in", 1)]
    found = Study(model, tmp_path, Points(), units=4, edits=edits).run()
    assert list(found.verdicts["role"]) == ["given"] * 2 and found.edits == edits
    assert list(found.verdicts["sv"]) == [2, 1] and any("Of 2 edits **" in line for line in sentences(found))
