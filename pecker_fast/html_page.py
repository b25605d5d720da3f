"""Self-contained pages: no network, no script, no other file. Standard library only."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from pecker_fast.errors import FileFormatError


def write_page(path: str | os.PathLike[str], title: str, body: str) -> None:
    """Write one page.

    Args:
        path: Where to.
        title: Text.
        body: HTML.

    Raises:
        FileFormatError: It cannot be written.
    """
    try:
        Path(path).write_text(_PAGE.format(title=escape(title), style=_STYLE, body=body), encoding="utf-8")
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be written ({error.strerror})") from error


def table_of(cells: Sequence[Sequence[str]]) -> str:
    """Heading and rows of text as a table; each row has its first cell as its class."""
    head, *rows = cells
    lines = ["<tr>" + "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head) + "</tr>"]
    for name, *values in rows:
        data = "".join(f"<td>{escape(value)}</td>" for value in values)
        lines.append(f'<tr class="{escape(name)}"><th scope="row">{escape(name)}</th>{data}</tr>')
    return f"<table>\n<thead>{lines[0]}</thead>\n<tbody>\n" + "\n".join(lines[1:]) + "\n</tbody>\n</table>"


def figure_of(heading: str, picture: Path, caption: str = "") -> str:
    """A PNG file, copied into the page.

    Raises:
        FileFormatError: It cannot be read.
    """
    try:
        data = base64.b64encode(picture.read_bytes()).decode("ascii")
    except OSError as error:
        raise FileFormatError(f"{picture}: cannot be read ({error.strerror})") from error
    name = escape(heading)
    return (
        f'<h2>{name}</h2>\n<figure><img alt="{name}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #222; background: #fff; max-width: 60rem;
  margin: 0 auto; padding: 1rem; }
h1 { line-height: 1.2; }
h2 { margin-top: 2.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .6rem; text-align: right; border-bottom: 1px solid #ddd; }
td { white-space: nowrap; }
thead th { vertical-align: bottom; border-bottom: 2px solid #888; }
tbody th, thead th:first-child { text-align: left; }
tr.masked { background: #eaf3f9; }
figure { margin: 0; break-inside: avoid; }
img { max-width: 100%; height: auto; }
figcaption, footer { color: #666; font-size: .85rem; }
dt { font-weight: 600; margin-top: .6rem; }
dd { margin: 0; }
pre { overflow-x: auto; background: #f6f6f6; padding: 1rem; font-size: .8rem; }
@media print { body { max-width: none; } .wide { overflow: visible; } table { font-size: .6rem; }
  th, td { padding: .2rem; } }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
