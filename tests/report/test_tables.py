"""Tables are readable, sort by what they hold, and let nothing from the data become markup."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest

from dt_lens.errors import DtLensError
from dt_lens.report.tables import number_format, table_html


def cells(made: str) -> list[str]:
    return [re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", made)]


@pytest.mark.parametrize(
    ("name", "values", "written"),
    [
        ("return", [2896.4, -12.0], ["2,896", "−12"]),
        ("episodes", [1000, 50], ["1,000", "50"]),
        ("sigma", [3.14159, 0.5], ["3.14", "0.50"]),
        ("sigma", [31.4159, 0.5], ["31.4", "0.5"]),
        ("small", [0.01234, np.nan], ["0.012", "–"]),
        ("p_value", [0.5, 1e-9], ["0.500", "< 0.001"]),
        ("q", [0.04999, np.nan], ["0.050", "–"]),
        ("control_failure_rate", [0.125, 1.0], ["12 %", "100 %"]),
        ("cosine", [0.5, -0.25], ["+0.50", "−0.25"]),
        ("whole", [2.0, np.inf], ["2", "inf"]),
    ],
)
def test_numbers_are_written_by_name_and_size(name: str, values: list[float], written: list[str]) -> None:
    column = pd.Series(values)
    assert [number_format(name, column)(value) for value in column] == written


def test_intervals_join_their_middle() -> None:
    frame = pd.DataFrame({"difference": [-2400.0], "difference_low": [-2500.0], "difference_high": [-2300.0]})
    assert cells(table_html(frame)) == ["−2,400 [−2,500, −2,300]"]
    other = pd.DataFrame({"damage": [10.0], "beyond_low": [1.0], "beyond_high": [200.0]})
    made = table_html(other, intervals={"damage": ("beyond_low", "beyond_high")})
    assert cells(made) == ["10 [1, 200]"]


def test_headings_and_formats_are_the_callers() -> None:
    made = table_html(pd.DataFrame({"q": [0.12345]}), headings={"q": "q & a"}, formats={"q": ".4f"})
    assert "q &amp; a" in made and cells(made) == ["0.1235"]
    assert cells(table_html(pd.DataFrame({"q": [0.5]}), formats={"q": lambda v: f"<{v}>"})) == ["&lt;0.5&gt;"]


def test_the_sorting_key_is_the_exact_value() -> None:
    made = table_html(pd.DataFrame({"q": [1.5e-7, np.nan], "name": ["b<", None]}))
    assert re.findall(r'data-value="([^"]*)"', made) == ["1.5e-07", "b&lt;", "", ""]


def test_words_truth_and_what_is_missing() -> None:
    frame = pd.DataFrame({"a": [True, False], "b": ["x", None], "c": [1, 2]})
    assert cells(table_html(frame)) == ["yes", "x", "1", "no", "–", "2"]


def test_nothing_from_the_data_becomes_markup() -> None:
    hostile = '"><script>alert(1)</script>'
    made = table_html(pd.DataFrame({hostile: [hostile]}))
    assert "<script" not in made and made.count("<td") == 1 and 'data-value="&quot;&gt;&lt;script' in made


def test_an_unknown_column_is_named() -> None:
    with pytest.raises(DtLensError, match=r"no column 'sigmas'.*'sigma'"):
        table_html(pd.DataFrame({"sigma": [1.0]}), formats={"sigmas": ".1f"})
