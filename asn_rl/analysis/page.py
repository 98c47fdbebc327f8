"""What the HTML reports share: style, tables and figures. A page is one file that needs nothing else."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from typing import Any

from asn_rl.errors import ConfigError

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}
h1,h2{line-height:1.2} table{border-collapse:collapse;margin:1rem 0;font-size:.85rem}
td,th{padding:.3rem .5rem;border-bottom:1px solid #ddd;text-align:right;vertical-align:top}
td{white-space:nowrap} .text td{white-space:normal}
td:first-child,th:first-child,.text td,.text th{text-align:left} .note{color:#555}
pre{background:#f6f6f6;padding:1rem;overflow-x:auto;font-size:.85rem} svg{max-width:100%;height:auto}
mark{background:#ffe08a}
"""


def table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table; header cells are escaped here, the others are HTML."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table class='{kind}'><tr>{head}</tr>{body}</table>"


def figure(rows: int, columns: int, width: float, height: float = 3.0) -> tuple[Any, list[Any]]:
    """A matplotlib figure and its axes, row by row; inches an axis.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("the report needs matplotlib; run: pip install 'asn_rl[report]'") from error
    made = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = made.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.title.set_fontsize(9)
        axis.tick_params(labelsize=8)
    return made, list(axes.flat)


def svg(figure: Any) -> str:
    """The figure as an element of the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
