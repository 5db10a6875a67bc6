# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""The page as HTML: one file that loads nothing."""

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np

from numpyro_bdl._report.figures import Picture
from numpyro_bdl._report.run import Finding, Gap
from numpyro_bdl._report.tables import Table

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5a6068; --line: #d9dce1; --paper: #fff; --card: #f5f6f8;
  --warn: #b34700; --warn-paper: #fff4e8; --good: #00694b; --good-paper: #e8f6f0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #a3a9b2; --line: #3a3f47; --paper: #16181b;
  --card: #202327; --warn: #ffb070; --warn-paper: #33261a; --good: #6fd3ae; --good-paper: #17302a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .75rem; font-size: 1.25rem; border-bottom: 1px solid var(--line); padding-bottom: .25rem; }
h3 { margin: 0; font-size: 1rem; }
p { margin: .35rem 0; overflow-wrap: anywhere; }
.lead { color: var(--soft); }
.box { margin-top: 1.25rem; padding: .25rem 1rem 1rem; border-left: .35rem solid; border-radius: .4rem; }
.box h2 { border: 0; margin: .75rem 0 .25rem; padding: 0; }
.box ul { margin: 0; padding: 0; list-style: none; }
.box li { margin-top: .75rem; }
.warn { border-color: var(--warn); background: var(--warn-paper); }
.warn h2, .warn h3 { color: var(--warn); }
.good { border-color: var(--good); background: var(--good-paper); }
.good h2 { color: var(--good); }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .35rem; }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; vertical-align: top; border-top: 1px solid var(--line); }
thead th { border-top: 0; color: var(--soft); font-weight: 500; }
tbody th { font-weight: 500; }
.number { text-align: right; white-space: nowrap; }
figure { margin: 1.5rem 0; }
img { display: block; max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: .4rem; padding: .5rem; }
figcaption { margin-top: .4rem; color: var(--soft); font-size: .92rem; max-width: 46rem; }
dt { font-weight: 500; margin-top: .75rem; }
dd { margin: 0; color: var(--soft); overflow-wrap: anywhere; }
@media print { .wide { overflow: visible; } figure, .box { break-inside: avoid; } }
"""


class Section(NamedTuple):
    """A part of the page; one without content is left out."""

    title: str
    intro: str
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()


def render(
    title: str, lead: Sequence[str], findings: Sequence[Finding], sections: Sequence[Section], gaps: Sequence[Gap]
):
    """The whole page."""
    body = [f"<h1>{escape(title)}</h1>", *(f'<p class="lead">{escape(line)}</p>' for line in lead), _box(findings)]
    body += [_section(section) for section in sections if section.tables or section.pictures]
    if gaps:
        items = "\n".join(f"<dt>{escape(what)}</dt><dd>{escape(why)}</dd>" for what, why in dict.fromkeys(gaps))
        body.append(f"<section><h2>What is not here</h2>\n<dl>\n{items}\n</dl></section>")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def _box(findings: Sequence[Finding]) -> str:
    if not findings:
        return (
            '<section class="box good"><h2>No warnings</h2>\n<p>None of the checks on this page found anything to worry'
            " about. They see what the tree holds, and no more.</p></section>"
        )
    items = "\n".join(f"<li><h3>{escape(title)}</h3><p>{escape(text)}</p></li>" for title, text in findings)
    count = f"{len(findings)} warning{'s' * (len(findings) > 1)}"
    return f'<section class="box warn"><h2>{count}</h2>\n<ul>\n{items}\n</ul></section>'


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>", f"<p>{escape(section.intro)}</p>" if section.intro else ""]
    parts += [_table(table) for table in section.tables] + [_figure(picture) for picture in section.pictures]
    return "<section>" + "\n".join(filter(None, parts)) + "</section>"


def _table(table: Table) -> str:
    numeric = [all(_is_number(row[n]) for row in table.rows) for n in range(len(table.header))]
    head = "".join(
        f'<th scope="col"{_class(n)}>{escape(name)}</th>' for name, n in zip(table.header, numeric, strict=True)
    )
    rows = [
        f'<tr><th scope="row">{escape(_text(row[0]))}</th>'
        + "".join(f"<td{_class(n)}>{escape(_text(v))}</td>" for v, n in zip(row[1:], numeric[1:], strict=True))
        + "</tr>"
        for row in table.rows
    ]
    caption = f"<caption>{escape(table.caption)}</caption>"
    return (
        f'<div class="wide"><table>{caption}\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + "\n</tbody></table></div>"
    )


def _figure(picture: Picture) -> str:
    data = b64encode(picture.png).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{escape(picture.alt)}">'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def _class(numeric: bool) -> str:
    return ' class="number"' * numeric


def _is_number(value: Any) -> bool:
    try:
        float(value or "nan")
    except ValueError:
        return False
    return True


def _text(value: Any) -> str:
    if isinstance(value, Integral):
        return f"{int(value):,}"
    if isinstance(value, Real):
        return f"{float(value):.4g}" if np.isfinite(float(value)) else str(float(value))
    return str(value)
