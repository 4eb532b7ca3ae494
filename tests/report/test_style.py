"""The light and the dark template."""

from __future__ import annotations

from dt_lens.report import style


def test_light_and_dark_differ_only_in_colours() -> None:
    light, dark = style.light().to_plotly_json(), style.dark().to_plotly_json()
    assert light["layout"]["paper_bgcolor"] != dark["layout"]["paper_bgcolor"]
    assert light["layout"]["colorway"] == dark["layout"]["colorway"]
    assert light["layout"].keys() == dark["layout"].keys()
