"""The pieces of a self-contained HTML page: escaped text, tables, figures as data, a style sheet.

Well-formed as XML too, so that a page cut short or an unescaped name is found by any parser.
"""

from __future__ import annotations

import base64
import html
import io
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from jaxfi.report._style import print_style

# What XML does not allow, and the invisible characters that reorder a line.
_UNPRINTABLE = re.compile(
    "[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]|[\u202a-\u202e\u2066-\u2069]"
)
STYLE_SHEET = """
:root { color-scheme: light; }
body { max-width: 66rem; margin: 2rem auto; padding: 0 1.5rem; color: #1a1a1a; background: #fff;
  font: 15px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
header { border-bottom: 2px solid #12466b; margin-bottom: 1.5rem; }
h1 { font-size: 1.7rem; margin: 0; color: #12466b; overflow-wrap: anywhere; }
header p { margin: .2rem 0 .8rem; color: #555; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; color: #12466b; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; overflow-wrap: anywhere; }
p { margin: .6rem 0; max-width: 52rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: .4rem 0 1rem; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; color: #555; padding-top: .45rem;
  font-size: .87rem; }
th, td { padding: .28rem .7rem; text-align: right; vertical-align: top; white-space: nowrap; }
th.text, td.text { text-align: left; white-space: normal; overflow-wrap: break-word; }
.wrapped td { overflow-wrap: anywhere; white-space: normal; }
.wrapped td:first-child { min-width: 9rem; }
thead th { border-top: 1.5px solid #1a1a1a; border-bottom: 1px solid #1a1a1a; font-weight: 600;
  vertical-align: bottom; white-space: normal; }
tbody tr:last-child td { border-bottom: 1.5px solid #1a1a1a; }
tbody tr:nth-child(even) { background: #f4f7fa; }
small { display: block; color: #555; font-size: .8rem; }
figure { margin: 1rem 0; break-inside: avoid; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { color: #555; font-size: .87rem; max-width: 52rem; }
@page { size: A4 landscape; margin: 14mm; }
@media print {
  html { font-size: 12.5px; }
  body { max-width: none; margin: 0; padding: 0; font-size: 1rem;
    print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .wide { overflow: visible; }
  h2, h3 { break-after: avoid; }
  tr { break-inside: avoid; }
  thead { display: table-header-group; }
}
"""


def document(title: str, body: Iterable[str]) -> str:
    """A whole page.

    Args:
      title: plain text.
      body: the page's elements, in order, as markup.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        # Whatever a file might smuggle in: nothing is loaded, and no script runs.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\"/>\n"
        f"<title>{escape(title)}</title>\n<style>{STYLE_SHEET}</style>\n</head>\n"
        "<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def escape(text: Any) -> str:
    """Any text as markup that shows it; what cannot be shown becomes U+FFFD.

    >>> escape('<b> & "\\x00"')
    '&lt;b&gt; &amp; &quot;\ufffd&quot;'
    """
    return html.escape(_UNPRINTABLE.sub("\ufffd", str(text)))


def heading(text: str, level: int = 2) -> str:
    """A heading of plain text."""
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    caption: str = "",
    num_text_columns: int = 1,
    wrapped: bool = False,
) -> str:
    """A table of plain text; a line break in a cell begins its small print.

    Args:
      headings: one a column.
      rows: texts of the cells.
      caption: printed below.
      num_text_columns: the first columns, aligned left; the others, numbers, are aligned right.
      wrapped: break words that are too long, such as hashes, anywhere.
    """

    def cells(tag: str, texts: Sequence[str]) -> str:
        kinds = [' class="text"' if i < num_text_columns else "" for i in range(len(texts))]
        pairs = zip(kinds, texts, strict=True)
        return "".join(f"<{tag}{kind}>{_cell(text)}</{tag}>" for kind, text in pairs)

    kind = ' class="wrapped"' if wrapped else ""
    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f'<div class="wide"><table{kind}>\n'
        f"<caption>{escape(caption)}</caption>\n"
        f"<thead><tr>{cells('th', headings)}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def picture(figure: Figure, caption: str) -> str:
    """A figure as vector graphics within the page, with its caption, plain text.

    The letters are drawn as outlines: the page looks the same where their font is missing.
    """
    content = io.BytesIO()
    with print_style(), matplotlib.rc_context({"svg.fonttype": "path"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box is drawn
        figure.draw_without_rendering()  # the layout takes two passes to settle
        figure.savefig(content, format="svg", metadata={"Date": None})
    data = base64.b64encode(content.getvalue()).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/svg+xml;base64,{data}"/>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def literal(text: str) -> str:
    """`text` as a figure prints it literally, cut to 48 characters.

    Matplotlib takes dollars for formulas.
    """
    text = _UNPRINTABLE.sub("\ufffd", text)
    return (text if len(text) <= 48 else f"{text[:47]}…").replace("$", r"\$")


def _cell(text: str) -> str:
    first, _, small = text.partition("\n")
    return escape(first) + (f"<small>{escape(small)}</small>" if small else "")
