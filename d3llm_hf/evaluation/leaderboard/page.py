"""The leaderboard's page: one HTML file that holds its style, its script and its pictures, and fetches nothing."""

import base64
import html
import re
from collections.abc import Mapping, Sequence

from .document import Block, Bullets, Cell, Fold, Heading, Paragraph, Picture, Table


_STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --soft: #565656; --page: #ffffff; --band: #f4f5f7; --line: #d5d8dd;
  --link: #00579c; }
@media (prefers-color-scheme: dark) { :root { --text: #e8e8e8; --soft: #a9adb3; --page: #16181c; --band: #20242a;
  --line: #3a4048; --link: #7cc0ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; font: 1rem/1.5 system-ui, sans-serif; color: var(--text);
  background: var(--page); overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.5rem 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 0.75rem; padding-top: 0.75rem; border-top: 1px solid var(--line); }
p, ul { max-width: 46rem; }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; padding: 0; max-width: none; list-style: none; }
nav a { display: inline-block; padding: 0.25rem 0; }
.scroll { overflow-x: auto; margin: 1rem 0; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: 0.875rem; }
caption { position: sticky; left: 0; padding: 0.5rem 0.75rem; text-align: left; color: var(--soft); }
th, td { padding: 0.4rem 0.6rem; text-align: left; vertical-align: top; border-top: 1px solid var(--line); }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.short { white-space: nowrap; }
.long { min-width: 14rem; }
thead th { padding: 0; background: var(--band); vertical-align: bottom; }
tbody th { font-weight: 600; }
tbody th, thead th:first-child { position: sticky; left: 0; background: var(--page); }
thead th:first-child { background: var(--band); }
thead th.number { white-space: normal; }
th button { width: 100%; min-height: 2.75rem; padding: 0.4rem 0.6rem; border: 0; background: none; color: inherit;
  font: inherit; font-weight: 600; text-align: inherit; cursor: pointer; }
th button::after { content: "\\2195"; margin-left: 0.35em; color: var(--soft); }
th[aria-sort="ascending"] button::after { content: "\\2191"; color: inherit; }
th[aria-sort="descending"] button::after { content: "\\2193"; color: inherit; }
button:focus-visible, summary:focus-visible, a:focus-visible, .scroll:focus-visible { outline: 3px solid var(--link);
  outline-offset: -3px; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem;
  align-items: start; margin: 1rem 0; }
figure { margin: 0; padding: 0.5rem; border: 1px solid var(--line); border-radius: 6px; background: #ffffff; }
figure img { display: block; width: 100%; max-width: 38rem; height: auto; margin: 0 auto; }
details { margin: 1rem 0; }
summary { padding: 0.5rem 0; cursor: pointer; font-weight: 600; }
code { font-size: 0.9em; }
"""

_SCRIPT = """
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, body = head.closest("table").tBodies[0], column = head.cellIndex;
    const number = head.dataset.kind === "number", before = head.getAttribute("aria-sort");
    const down = before ? before === "ascending" : number;
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = row => row.cells[column].dataset.value;
    const order = (a, b) => number ? a - b : a.localeCompare(b);
    const rows = Array.from(body.rows).sort((left, right) => {
      const a = value(left), b = value(right);
      if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
      return down ? order(b, a) : order(a, b);
    });
    body.append(...rows);
  });
}
"""


def page(title: str, blocks: Sequence[Block], files: Mapping[str, bytes]) -> str:
    """The page of these blocks. `files` holds each picture's SVG under its name; `title` is that of the window."""
    headings = [block for block in blocks if isinstance(block, Heading) and block.name]
    links = "".join(f'<li><a href="#{_attribute(h.name)}">{_text(h.text)}</a></li>' for h in headings)
    nav = f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n' if len(headings) > 1 else ""
    parts = _blocks(blocks, files)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"{parts[0]}\n{nav}" + "\n".join(parts[1:]) + f"\n</main>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _blocks(blocks: Sequence[Block], files: Mapping[str, bytes]) -> list[str]:
    """One piece of HTML for each block; pictures that follow each other stand side by side."""
    parts: list[str] = []
    for place, block in enumerate(blocks):
        part = _block(block, files)
        if isinstance(block, Picture):
            first = place == 0 or not isinstance(blocks[place - 1], Picture)
            last = place == len(blocks) - 1 or not isinstance(blocks[place + 1], Picture)
            part = '<div class="pictures">\n' * first + part + "\n</div>" * last
        parts.append(part)
    return parts


def _block(block: Block, files: Mapping[str, bytes]) -> str:
    if isinstance(block, Heading):
        name = f' id="{_attribute(block.name)}"' if block.name else ""
        return f"<h{block.level}{name}>{_text(block.text)}</h{block.level}>"
    if isinstance(block, Paragraph):
        return f"<p>{_text(block.text)}</p>"
    if isinstance(block, Bullets):
        items = (_text(t) if u is None else f'<a href="{_attribute(u)}">{_text(t)}</a>' for t, u in block.items)
        return "<ul>\n" + "\n".join(f"<li>{item}</li>" for item in items) + "\n</ul>"
    if isinstance(block, Picture):
        data = base64.b64encode(files[f"{block.name}.svg"]).decode()
        return f'<figure><img alt="{_attribute(block.alt)}" src="data:image/svg+xml;base64,{data}"></figure>'
    if isinstance(block, Fold):
        inner = "\n".join(_blocks(block.blocks, files))
        return f"<details>\n<summary>{_text(block.summary)}</summary>\n{inner}\n</details>"
    return _table(block)


def _table(table: Table) -> str:
    heads = []
    for place, head in enumerate(table.heads):
        order = ' aria-sort="descending"' if place == table.sorted_by else ""
        kind, look = ("number", ' class="number"') if place in table.numeric else ("text", "")
        heads.append(
            f'<th scope="col" data-kind="{kind}"{look}{order}><button type="button">{_text(head)}</button></th>'
        )
    rows = [
        "<tr>" + "".join(_cell(cell, place, place in table.numeric) for place, cell in enumerate(row)) + "</tr>"
        for row in table.rows
    ]
    label = _attribute(table.caption)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{label}">\n<table>\n'
        f"<caption>{_text(table.caption)}</caption>\n<thead><tr>{''.join(heads)}</tr></thead>\n<tbody>\n"
        + "\n".join(rows)
        + "\n</tbody>\n</table>\n</div>"
    )


def _cell(cell: Cell, place: int, number: bool) -> str:
    value = "" if cell.value is None else f' data-value="{_attribute(str(cell.value))}"'
    look = "number" if number else "short" if len(cell.text) < 28 else "long"
    tag = "th" if place == 0 else "td"
    scope = ' scope="row"' if place == 0 else ""
    return f'<{tag}{scope} class="{look}"{value}>{_text(cell.text)}</{tag}>'


def _text(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))


def _attribute(text: str) -> str:
    return html.escape(text.replace("`", ""))
