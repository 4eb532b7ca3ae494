"""A token table as HTML: for a notebook, whose theme may be light or dark, and as a page."""

from __future__ import annotations

import html
from pathlib import Path

import pandas as pd

from dt_lens.arguments import atomic_write, require_writable
from dt_lens.errors import DtLensError
from dt_lens.lens.token_text import spelled, texts

__all__ = ["require_token_file", "save_tokens", "token_html"]

# Colours with an alpha keep text readable on light and dark pages. Blue away, orange towards, as in the heatmaps.
_TOWARDS, _AWAY, _STRONGEST = "213,94,0", "0,114,178", 0.55
_UNTRAINED = "128,128,128"
_STYLE = """
.dtl-tokens { font-size: 13px; line-height: 1.5; overflow-x: auto; }
.dtl-tokens table { border-collapse: collapse; width: 100%; min-width: 40em; margin: 0 0 1.4em; font-size: inherit;
  table-layout: fixed; }
.dtl-tokens caption { text-align: left; padding: 0.2em 0; caption-side: top; color: inherit; }
.dtl-tokens caption code { font-weight: 600; }
.dtl-tokens th, .dtl-tokens td { text-align: left !important; vertical-align: top; padding: 0.35em 0.6em; border: 0;
  border-top: 1px solid rgba(128,128,128,0.35); background: none; position: static; white-space: normal; }
.dtl-tokens th { font-weight: 600; }
.dtl-tokens .sv { width: 7.5em; white-space: nowrap; font-variant-numeric: tabular-nums; }
.dtl-tokens .first { border-left: 1px solid rgba(128,128,128,0.35); }
.dtl-tokens .quiet { opacity: 0.7; font-weight: 400; }
.dtl-tokens .t { display: inline-block; border-radius: 3px; padding: 0 0.35em; margin: 0 0.15em 0.2em 0;
  max-width: 100%; overflow-wrap: anywhere; white-space: pre-wrap; }
.dtl-tokens .t bdi { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.dtl-tokens .t small { opacity: 0.75; font-size: 0.82em; font-variant-numeric: tabular-nums; }
"""


def token_html(rows: pd.DataFrame, labels: dict[str, tuple[int, int]], limit: int | None = None) -> str:
    """A table for each matrix side: a row per direction with its sigma, two columns per embedding, one for each pole.

    A label's colour shows its cosine, on one scale for the whole table; hovering shows its exact text, row and cosine.

    Args:
        rows: a ``TokenTable``'s rows.
        labels: for each embedding how many labels passed the filter, and how many there are.
        limit: show only so many matrix sides, and say how many more there are.
    """
    top = float(rows["cosine"].abs().max()) if len(rows) else 1.0
    sides = list(rows.groupby(["matrix", "side"], sort=False))
    shown = sides if limit is None else sides[:limit]
    parts = [_side(part, labels, top or 1.0) for _, part in shown]
    if len(shown) < len(sides):
        parts.append(
            f'<p class="quiet">{len(sides) - len(shown)} more are in the table; choose matrices, or use to_html().</p>'
        )
    return f'<div class="dtl-tokens"><style>{_STYLE}</style>{"".join(parts)}</div>'


def _side(part: pd.DataFrame, shown: dict[str, tuple[int, int]], top: float) -> str:
    first = part.iloc[0]
    place = f"layer {first['layer']}" + ("" if pd.isna(first["head"]) else f", head {first['head']}")
    embeddings = list(dict.fromkeys(part["embedding"]))
    trained = dict(zip(part["embedding"], part["trained"], strict=True))
    heads = "".join(
        f'<th scope="colgroup" colspan="2" class="first">{_counted(e, *shown[e])}{"" if trained[e] else _NO_LOSS}</th>'
        for e in embeddings
    )
    poles = '<th scope="col" class="first quiet">towards</th><th scope="col" class="quiet">away</th>' * len(embeddings)
    body = []
    for (sv, block, sigma), one in part.groupby(["sv", "block", "sigma"], sort=False):
        span = "" if block == 1 else f'<br><span class="quiet" title="{_SPAN}">one of {block}</span>'
        cells = [f'<th scope="row" class="sv">{sv} <span class="quiet">σ {sigma:.4g}</span>{span}</th>']
        for embedding in embeddings:
            for pole in "+-":
                found = one[(one["embedding"] == embedding) & (one["pole"] == pole)]
                kind = ' class="first"' if pole == "+" else ""
                head = f"{html.escape(embedding)} {'towards' if pole == '+' else 'away'}"
                cells.append(f'<td{kind} data-head="{head}">{"".join(_chips(found, top))}</td>')
        body.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f"<table><caption><code>{html.escape(str(first['matrix']))}</code> "
        f'<span class="quiet">{place} · {html.escape(str(first["side"]))} side</span></caption>'
        f'<thead><tr><th scope="col" rowspan="2" class="sv">direction</th>{heads}</tr><tr>{poles}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>"
    )


_NO_LOSS = ' <span class="quiet" title="This head had no loss: what it matches is chance.">untrained head</span>'
_SPAN = (
    "The weights' precision cannot distinguish it from these: sigmas too close, where only the span means anything, or "
    "directions that the matrix does not have."
)


def _counted(embedding: str, passed: int, of: int) -> str:
    few = "" if passed == of else f' <span class="quiet">{passed:,} of {of:,} labels</span>'
    return html.escape(embedding) + few


def _chips(found: pd.DataFrame, top: float) -> list[str]:
    chips = []
    columns = (found[name] for name in ("label", "index", "cosine", "trained"))
    for text, label, index, cosine, trained in zip(texts(list(found["label"])), *columns, strict=True):
        colour = (_TOWARDS if cosine > 0 else _AWAY) if trained else _UNTRAINED
        alpha = _STRONGEST * min(abs(cosine) / top, 1.0)
        exact = html.escape(f"{label!r}, row {index}, cosine {cosine:+.6f}", quote=True)
        value = f"{cosine:+.2f}".replace("-", "−")
        chips.append(
            f'<span class="t" style="background:rgba({colour},{alpha:.2f})" title="{exact}">'
            f"<bdi>{html.escape(spelled(text))}</bdi> <small>{value}</small></span> "
        )
    return chips


def require_token_file(file: Path) -> None:
    """Raise ``DtLensError`` unless a token table can be written to ``file``."""
    if file.suffix not in (".csv", ".html"):
        raise DtLensError(f"A token table is written to a .csv or .html file, not to {file.name!r}.")
    require_writable(file)


def save_tokens(rows: pd.DataFrame, labels: dict[str, tuple[int, int]], folded: bool, file: Path) -> Path:
    """Write a token table's rows to a ``.csv`` or ``.html`` file; see ``TokenTable.save``."""
    require_token_file(file)
    if file.suffix == ".csv":
        with atomic_write(file) as part:
            rows.to_csv(part, index=False)
        return file
    from dt_lens.report.page import Markup, Section, write_report

    how = "LayerNorms folded in" if folded else "raw weights and labels"
    note = (
        f"Each row is a singular direction, largest σ first, {how}; a label's number is its cosine with it. "
        "A direction's sign is a convention: towards and away could change places. ␣ is a space. Grey labels are those "
        "of an untrained head."
    )
    return write_report(
        file, "Token table", [Section("Directions and their labels", [note, Markup(token_html(rows, labels))])]
    )
