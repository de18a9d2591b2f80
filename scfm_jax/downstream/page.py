"""One HTML page that holds its tables and figures and needs nothing else, and the same tables in Markdown."""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Cell(NamedTuple):
    """A cell of a table that stands out: set in bold, or with marks behind its text."""

    text: object
    bold: bool = False
    marks: Sequence[str] = ()


class Table(NamedTuple):
    """A table of a page: numbers are rounded to four digits, columns of numbers stand right.

    A cell whose text starts as a number (``0.71 ± 0.02``) counts as one.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]


class Drawing(NamedTuple):
    """A PNG file and what is said below it; `width`, in rem, is the widest it is shown."""

    path: Path
    caption: str
    width: float


class Section(NamedTuple):
    """A heading, paragraphs, tables, and panels of figures that stand side by side where there is room."""

    heading: str
    paragraphs: Sequence[str] = ()
    tables: Sequence[Table] = ()
    panels: Sequence[Sequence[Drawing]] = ()


def write_page(path: Path, title: str, paragraphs: Sequence[str], sections: Sequence[Section]) -> Path:
    """Write the page, UTF-8, with every figure inside it; all text is escaped. Returns `path`."""
    page = _PAGE.format(
        title=html.escape(title),
        paragraphs=_paragraphs(paragraphs),
        sections="\n".join(map(_section_html, sections)),
    )
    path.write_text(page, encoding="utf-8")
    return path


def markdown(title: str, paragraphs: Sequence[str], sections: Sequence[Section]) -> str:
    """Paragraphs and tables of a page in Markdown; sections of nothing but figures are left out."""
    parts = [f"# {_plain(title)}", *map(_plain, paragraphs)]
    for section in sections:
        if section.paragraphs or section.tables:
            parts += [f"## {_plain(section.heading)}", *map(_plain, section.paragraphs)]
            parts += map(_table_markdown, section.tables)
    return "\n\n".join(parts) + "\n"


def _section_html(section: Section) -> str:
    heading = f"<h2>{html.escape(section.heading)}</h2>" if section.heading else ""
    panels = "".join(
        f'<div class="panels">{"".join(map(_figure_html, row))}</div>' for row in section.panels if row
    )
    tables = "".join(map(_table_html, section.tables))
    return f"<section>{heading}{_paragraphs(section.paragraphs)}{tables}{panels}</section>"


def _paragraphs(texts: Sequence[str]) -> str:
    return "".join(f"<p>{html.escape(text)}</p>" for text in texts)


def _figure_html(drawing: Drawing) -> str:
    data = base64.b64encode(drawing.path.read_bytes()).decode("ascii")
    text = html.escape(drawing.caption)
    return (
        f'<figure style="max-width:{drawing.width:.0f}rem">'
        f'<img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'
    )


def _table_html(table: Table) -> str:
    numeric = _numeric(table)

    def line(tag: str, cells: Sequence[object]) -> str:
        kinds = (' class="number"' if number else "" for number in numeric)
        return (
            "<tr>"
            + "".join(f"<{tag}{kind}>{_cell_html(cell)}</{tag}>" for kind, cell in zip(kinds, cells))
            + "</tr>"
        )

    return (
        f'<div class="table"><table><caption><span>{html.escape(table.caption)}</span></caption>'
        f"<thead>{line('th', table.header)}</thead>"
        f"<tbody>{''.join(line('td', row) for row in table.rows)}</tbody></table></div>"
    )


def _cell_html(value: object) -> str:
    cell = value if isinstance(value, Cell) else Cell(value)
    text = html.escape(_cell_text(cell.text))
    marks = "".join(f' <span class="mark">{html.escape(mark)}</span>' for mark in cell.marks)
    return (f"<strong>{text}</strong>" if cell.bold else text) + marks


def _table_markdown(table: Table) -> str:
    def line(cells: Sequence[object]) -> str:
        return f"| {' | '.join(map(_cell_markdown, cells))} |"

    rule = ["---:" if number else "---" for number in _numeric(table)]
    rows = [line(table.header), f"| {' | '.join(rule)} |", *map(line, table.rows)]
    return f"{_plain(table.caption)}\n\n" + "\n".join(rows)


def _cell_markdown(value: object) -> str:
    cell = value if isinstance(value, Cell) else Cell(value)
    text = _plain(_cell_text(cell.text)).replace("|", "\\|")
    marks = f" ({', '.join(map(_plain, cell.marks))})" if cell.marks else ""
    return (f"**{text}**" if cell.bold else text) + marks


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_<>\[\]#])", r"\\\1", " ".join(text.split()))


def _numeric(table: Table) -> list[bool]:
    if not table.rows:
        return [False] * len(table.header)
    return [all(map(_is_number, column)) for column in zip(*table.rows)]


def _is_number(value: object) -> bool:
    if isinstance(value, Cell):
        value = value.text
    if isinstance(value, str):
        return re.match(r"[+−-]?\d|–$", value) is not None
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _cell_text(value: object) -> str:
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return f"{int(value):,}"
    if isinstance(value, float | np.floating):
        return "–" if math.isnan(value) else f"{float(value):.4g}".replace("-", "−")
    return str(value)


# Without min-width: 0 a grid's column is as wide as the widest table in it, and the whole page scrolls.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light; }}
body {{ margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 74rem; background: #fff; color: #22282e;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: break-word; }}
h1 {{ font-size: 1.7rem; line-height: 1.25; font-weight: 650; margin: 0 0 1rem; }}
h2 {{ font-size: 1.1rem; font-weight: 650; margin: 2.75rem 0 .75rem; }}
p {{ max-width: 42rem; margin: 0 0 .75rem; }}
.panels {{ display: flex; flex-wrap: wrap; gap: 1.5rem; margin-top: 1.5rem; }}
figure {{ margin: 0; flex: 1 1 16rem; min-width: 0; }}
img {{ display: block; width: 100%; height: auto; }}
figcaption {{ max-width: 42rem; margin-top: .5rem; font-size: .9rem; color: #5b646c; }}
.table {{ overflow-x: auto; margin-top: 1.5rem; }}
table {{ border-collapse: collapse; font-size: .88rem; min-width: 60%; }}
caption {{ text-align: left; padding-bottom: .5rem; font-weight: 600; }}
caption span {{ display: inline-block; position: sticky; left: 0; max-width: calc(100vw - 2rem); }}
th, td {{ text-align: left; padding: .4rem 1rem .4rem 0; border-bottom: 1px solid #e3e8ec;
  white-space: nowrap; }}
th {{ border-bottom: 1.5px solid #8a939b; font-weight: 600; font-size: .85rem; color: #5b646c;
  vertical-align: bottom; }}
tr > :first-child {{ position: sticky; left: 0; background: #fff; }}
.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
.mark {{ font-size: .85em; white-space: nowrap; padding: 0 .3em; border: 1px solid #8a939b;
  border-radius: .25rem; }}
@media (max-width: 36rem) {{ body {{ padding: 1.5rem 1rem 3rem; }} h1 {{ font-size: 1.4rem; }}
  th, td {{ padding-right: .9rem; }}
  tr > :first-child {{ white-space: normal; min-width: 8rem; max-width: 9.5rem; }} }}
@media print {{ body {{ max-width: none; padding: 0; font-size: 10pt; }} .table {{ overflow: visible; }}
  table {{ font-size: 7.5pt; }} th, td {{ white-space: normal; padding-right: .5rem; }}
  td.number {{ white-space: nowrap; }} th {{ font-size: 7pt; }} caption span {{ max-width: none; }}
  thead {{ display: table-header-group; }}
  tr > :first-child {{ position: static; }}
  .panels {{ display: block; }} figure {{ display: inline-block; width: 48%; vertical-align: top; }}
  figure:only-child {{ width: 100%; }}
  figure:first-child:nth-last-child(3), figure:first-child:nth-last-child(3) ~ figure {{ width: 32%; }}
  img {{ width: auto; max-width: 100%; max-height: 20cm; }}
  tr, figure {{ break-inside: avoid; }} h2, caption {{ break-after: avoid; }} }}
</style>
</head>
<body>
<h1>{title}</h1>
{paragraphs}
{sections}
</body>
</html>
"""
