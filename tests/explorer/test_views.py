"""What the pages show is what the Python API gives, and clicks on nothing change nothing."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from dt_lens import SingularEdit
from dt_lens.edits.several import load_edits
from dt_lens.errors import DtLensError
from dt_lens.explorer import edit, matrix, overview
from dt_lens.explorer.app import page_of
from dt_lens.explorer.explored import ALPHA, Explored
from dt_lens.explorer.held_edits import make_edits

NONSENSE: list[Any] = [
    None, {}, {"points": []}, {"points": [{}]}, {"points": [{"x": "a", "y": 0}]}, {"points": [{"x": 10**9, "y": 0}]},
    {"points": [{"x": 0, "y": -1}]}, "text", 3,
]  # fmt: skip


def test_each_cell_of_the_overview_is_the_best_match_of_the_scan(explored: Explored) -> None:
    shown, t = overview.overview_figure(explored), explored.table
    rows, columns = overview.places_of(explored)
    grid = np.full((len(rows), len(columns)), np.nan)
    for trace in shown.data:
        z = np.asarray(trace.z, dtype=float)
        grid[~np.isnan(z)] = z[~np.isnan(z)]
    assert len(rows) > 10 and np.isfinite(grid).sum() > 20
    for at, (name, side) in enumerate(rows):
        for column, embedding in enumerate(columns):
            own = t[(t["matrix"] == name) & (t["side"] == side) & (t["embedding"] == embedding)]
            assert len(own) == 0 if np.isnan(grid[at, column]) else grid[at, column] == own["cosine"].abs().max()
            found = overview.cell_at(explored, {"points": [{"x": column, "y": at}]})
            assert found == {"matrix": name, "side": side, "embedding": embedding}
    assert [tick.split(" ")[1] for tick in shown.layout.yaxis.ticktext] == [
        name.rpartition(".attn.")[2].rpartition(".mlp.")[2] for name, _ in rows
    ]


def test_the_overview_counts_discoveries(explored: Explored) -> None:
    table = explored.table.copy()
    table.attrs = explored.table.attrs
    table.loc[table.index[:3], "q_value"] = 0.001
    planted = Explored(explored.source, explored.model, table, explored.svd)
    z = np.concatenate(
        [np.ravel(np.asarray(t.z, float)) for t in overview.overview_figure(planted, "discoveries").data]
    )
    assert np.nansum(z) == (table["q_value"] < ALPHA).sum() >= 3


@pytest.mark.parametrize("clicked", NONSENSE)
def test_a_click_on_nothing_leads_nowhere(explored: Explored, clicked: Any) -> None:
    assert overview.cell_at(explored, clicked) is None


@pytest.mark.parametrize(
    ("path", "search"),
    [
        ("/", ""), ("/", "?show=nonsense"), ("/matrix", ""),
        ("/matrix", "?matrix=blocks.0.attn.OV.1&embedding=action_out"),
        ("/matrix", "?matrix=blocks.1.mlp.W_out&sv=99999"), ("/edit", "?matrix=blocks.0.attn.QK.0&sv=2"), ("/live", ""),
        ("/matrix", "?matrix=blocks.0.mlp.W_in&embedding=action_out"),
    ],
)  # fmt: skip
def test_every_page_is_made_light_and_dark(explored: Explored, path: str, search: str) -> None:
    for dark in (False, True):
        assert "H1" in json.dumps(page_of(explored, path, search, dark).to_plotly_json(), default=_plain)


def _plain(part: Any) -> Any:
    return part.to_plotly_json() if hasattr(part, "to_plotly_json") else str(part)


@pytest.mark.parametrize(
    ("path", "search", "needed"),
    [
        ("/nowhere", "", "no page"),
        (None, "", "no page"),
        ("/matrix", "?matrix=nonsense", "no matrix"),
        ("/matrix", "?embedding=nonsense", "no embedding"),
        ("/matrix", "?matrix=blocks.0.mlp.W_in&side=write", "has no 'write' side"),
        ("/edit", "?matrix=<script>", "no matrix"),
        ("/sweep", "", "no page"),
    ],
)
def test_an_address_that_leads_nowhere_is_a_sentence(explored: Explored, path: Any, search: str, needed: str) -> None:
    said = json.dumps(page_of(explored, path, search, False).to_plotly_json(), default=_plain)
    assert needed in said and "warning" in said


def test_a_direction_is_shown_as_the_api_gives_it(explored: Explored) -> None:
    name, sv = "blocks.0.mlp.W_in", 2
    rows = matrix.poles_rows(explored, name, "read", sv)
    t = explored.table[(explored.table["matrix"] == name) & (explored.table["sv"] == sv)]
    assert [row[0] for row in rows] == list(t["embedding"])
    top = explored.svd.top(name, "state_in", k=3, n=6)
    top = top[top["sv"] == sv]
    shown = [span.children[0] for cell in rows[0][1:3] for span in cell]
    assert shown == list(top["label"])


def test_a_dot_of_the_heatmap_stands_at_the_best_label(explored: Explored) -> None:
    """Also where the labels are cut: the best one of each direction is among those that are shown."""
    name, side, embedding = "blocks.0.mlp.W_in", "read", "timestep_in"
    assert len(explored.model.embeddings[embedding].labels) > matrix.LABELS
    table = explored.table.copy()
    table["q_value"] = 0.0
    planted = Explored(explored.source, explored.model, table, explored.svd)
    drawn = matrix.heatmap(planted, name, side, embedding).data[0]  # type: ignore[arg-type]
    rows = explored.rows(name, side, embedding).set_index("sv")
    for sv, dots in enumerate(np.asarray(drawn.text)):
        (at,) = np.flatnonzero(dots == "●")
        assert drawn.hovertext[sv][at] == rows.loc[sv, "label"]
        assert drawn.z[sv][at] == pytest.approx(rows.loc[sv, "cosine"], abs=1e-9)


def test_the_line_of_the_null_is_where_p_is_five_percent(explored: Explored) -> None:
    name = "blocks.0.mlp.W_out"
    line = explored.threshold(name, "write", "action_out")
    rows = explored.rows(name, "write", "action_out")
    above = rows["cosine"].abs() > line
    assert 0 < line < 1
    assert ((rows["p_value"] < 0.05) == above).mean() > 0.95  # the grid has steps of 0.0005


def test_who_else_reads_or_writes_a_direction(explored: Explored) -> None:
    """Each row's cosine is that of the two directions, where a LayerNorm removes constants without them."""
    found = explored.others("blocks.0.attn.OV.0", "write", 0)
    assert len(found) == 12 and not ((found["matrix"] == "blocks.0.attn.OV.0") & (found["side"] == "write")).any()
    assert {"write", "read"} <= set(found["side"])
    ours = explored.svd["blocks.0.attn.OV.0"].side("write")[0]
    for row in found.to_dict("records"):
        m, d = explored.matrix(row["matrix"]), ours
        if m.centred(m.side(row["side"])):
            d = (ours - ours.mean()) / (ours - ours.mean()).norm()
        cosines = explored.svd[row["matrix"]].side(row["side"]) @ d
        assert int(cosines.abs().argmax()) == row["sv"]
        assert float(cosines[row["sv"]]) == pytest.approx(row["cosine"], abs=1e-9)
    assert "this direction" not in explored.model.embeddings


def test_edits_as_code_and_as_a_file_are_the_edits(explored: Explored, tmp_path: Any) -> None:
    model = explored.model
    written = [
        {"matrix": "blocks.0.mlp.W_in", "sv": "0-1", "side": "read", "value": "zero", "seed": 0},
        {"matrix": "blocks.0.attn.OV.1", "sv": "2", "side": "write", "value": 0.5, "seed": 0},
        {
            "matrix": "blocks.1.mlp.W_out",
            "sv": "0",
            "side": "write",
            "value": "replace:action_out:0",
            "seed": 0,
        },
    ]
    edits = make_edits(model, written, True)
    (tmp_path / "edit.json").write_text(edit.records_of(edits))
    again = load_edits(model, tmp_path / "edit.json")
    lines = edit.code_of(edits).splitlines()
    built = [eval(line, {"model": model, "SingularEdit": SingularEdit}) for line in lines]
    for one, two, three in zip(edits, again, built, strict=True):
        assert one.to_dict() == two.to_dict() == three.to_dict() and one.energy == two.energy == three.energy
        assert abs(one.control(0).energy - one.energy) < 1e-6 * one.energy
    assert not model.active_edits


def test_the_edit_panel_shows_energies(explored: Explored) -> None:
    held = [{"matrix": "blocks.0.mlp.W_in", "sv": "0", "side": "read", "value": "zero", "seed": 0}]
    energy = SingularEdit(explored.model, "blocks.0.mlp.W_in", 0, value="zero").energy
    said = json.dumps(edit.edits_panel(explored, held).to_plotly_json(), default=_plain)
    assert f"{energy:.4g}" in said and "SingularEdit(model" in said
    for wrong in (
        ["x"],
        "text",
        [{}],
        [{"matrix": "nonsense"}],
        [{**held[0], "sv": "9999"}],
        [{**held[0], "value": "x"}],
    ):
        said = json.dumps(edit.edits_panel(explored, wrong).to_plotly_json(), default=_plain)
        assert "warning" in said


@pytest.mark.parametrize(
    ("form", "needed"),
    [
        (("dose", None, "", ""), "number"), (("towards", "x", "", "a"), "number"),
        (("replace", 1, "action_out", " "), "label"), ((None, 1, "", ""), "Choose"),
    ],
)  # fmt: skip
def test_a_form_that_is_not_filled_in_is_a_sentence(form: Any, needed: str) -> None:
    with pytest.raises(DtLensError, match=needed):
        edit.value_of(*form)


@pytest.mark.parametrize("nonsense", [None, True, 2.5, float("inf"), [], {}])
def test_an_address_of_another_type_is_a_sentence(explored: Explored, nonsense: Any) -> None:
    assert "There is no page" in json.dumps(page_of(explored, nonsense, nonsense, False), default=_plain)
    assert matrix._index(float("inf"), 4, -1) == -1
