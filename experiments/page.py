"""Pieces of a page: sections, tables, pictures, and the style sheet. All text is escaped here."""

import base64
import html
from collections.abc import Iterable, Sequence


class Html(str):
    """Text that is HTML already; any other string is escaped."""


def escaped(text: str) -> str:
    """Return `text` as HTML."""
    return text if isinstance(text, Html) else html.escape(text)


def document(title: str, lead: str, sections: Iterable[str]) -> str:
    """Return a whole page."""
    head = f"<meta charset=utf-8><title>{escaped(title)}</title><style>{STYLE}</style>"
    head += "<meta name=viewport content='width=device-width, initial-scale=1'>"
    body = f"<h1>{escaped(title)}</h1><p class=lead>{escaped(lead)}</p>{''.join(sections)}"
    page = f"<!doctype html><html lang=en><head>{head}</head><body><main>{body}"
    return f"{page}</main></body></html>\n"


def section(title: str, content: str, note: str = "") -> str:
    """Return a titled section around HTML, nothing if there is no content."""
    if not content:
        return ""
    note = f"<p class=note>{escaped(note)}</p>" if note else ""
    return f"<section><h2>{escaped(title)}</h2>{content}{note}</section>"


def picture(svg: str, words: str) -> str:
    """Return an SVG as an image of its own, so that names inside two of them cannot meet."""
    data = base64.b64encode(svg.encode()).decode()
    return f"<img alt='{escaped(words)}' src='data:image/svg+xml;base64,{data}'>"


def table(head: Sequence[str], lines: Iterable[Sequence[str]], kind: str = "") -> str:
    """Return a table of the class `kind`; a cell is made by `td` or is text."""
    top = "".join(f"<th>{escaped(h)}" for h in head)
    top = f"<thead><tr>{top}" if any(head) else ""
    cells = ["".join(c if isinstance(c, Html) else td(c) for c in line) for line in lines]
    body = "".join(f"<tr>{line}" for line in cells)
    return f"<div class=scroll><table class='{kind}'>{top}<tbody>{body}</table></div>"


def td(content: str, kind: str = "", style: str = "") -> Html:
    """Return one cell of a table."""
    return Html(f"<td class='{kind}' style='{style}'>{escaped(content)}")


def cell(value: float | None, spread: float | None = None, kind: str = "") -> Html:
    """Return the cell of an accuracy in [0, 1]; its blue grows with it."""
    depth = 0.0 if value is None else 0.42 * value**2
    return td(percent(value, spread), kind, f"background:rgba(0,114,178,{depth:.3f})")


def percent(value: float | None, spread: float | None = None) -> Html:
    """Return "93.4 ± 1.2", in percent, or a dash."""
    if value is None:
        return Html("–")
    tail = "" if spread is None else f" <small>± {100 * spread:.1f}</small>"
    return Html(f"{100 * value:.1f}{tail}")


def size_words(count: float) -> str:
    """Return a number of bytes in words: "3.4 MB"."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


STYLE = """
:root { color-scheme: light; --ink: #1f2733; --soft: #667085; --line: #e4e7ec; --blue: #0072b2 }
* { box-sizing: border-box }
body { margin: 0; background: #f6f7f9; color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif }
main { max-width: 1040px; margin: 0 auto; padding: 40px 20px 64px }
h1 { margin: 0; font-size: 30px; letter-spacing: -.02em }
h2 { margin: 0 0 14px; font-size: 17px; letter-spacing: -.01em }
.lead { margin: 4px 0 24px; color: var(--soft) }
.note { margin: 12px 0 0; color: var(--soft); font-size: 13px }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px;
  padding: 20px 24px; margin: 16px 0 }
img { display: block; width: 100%; height: auto }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 16px;
  margin-top: 16px }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); gap: 12px }
.cards div { background: #fff; border: 1px solid var(--line); border-radius: 10px;
  padding: 14px 16px }
.cards b { display: block; font-size: 22px; letter-spacing: -.01em; white-space: nowrap }
.cards small { font-size: 13px; font-weight: 500; color: var(--soft) }
.cards span { color: var(--soft); font-size: 13px }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th { font-weight: 600; font-size: 13px; color: var(--soft); text-align: left; padding: 6px 10px;
  border-bottom: 1px solid var(--line) }
td { padding: 7px 10px; border-bottom: 1px solid var(--line) }
tr:last-child td { border-bottom: 0 }
.scores th:not(:first-child), .scores td:not(:first-child), .number { text-align: right }
.scores td { white-space: nowrap }
.scores th:not(:first-child) { width: 12.5% }
.scores small { color: var(--soft) }
.top { font-weight: 700 }
.own { box-shadow: inset 0 0 0 2px var(--blue) }
.label { font-weight: 500 }
.files td { font-size: 13px; vertical-align: top }
code { font: 12px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  overflow-wrap: anywhere; color: #475467 }
summary { cursor: pointer; color: var(--soft) }
@media print { body { background: #fff } section { break-inside: avoid } }
"""
