"""The page and the pictures: well-formed, self-contained, escaped, sortable, and shading what is counted."""

import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from boards import point, three_curves

from d3llm_hf.evaluation.leaderboard.document import Table, document
from d3llm_hf.evaluation.leaderboard.page import page
from d3llm_hf.evaluation.leaderboard.pictures import draw, weighted_outline
from d3llm_hf.evaluation.leaderboard.write import build_board


VOID = {"meta", "img"}
SCRIPT = '<script>alert("1")</script>'


class Reader(HTMLParser):
    """Keeps elements as `(tag, attributes)` and the text, and fails where tags do not nest."""

    def __init__(self):
        super().__init__()
        self.open, self.elements, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.elements.append(SimpleNamespace(tag=tag, inside=tuple(self.open), **{"attrs": dict(attrs)}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open[-1:] not in (["script"], ["style"]) else ""


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def drawn():
    """A board over three tasks, one of them with a name to escape, and its pictures."""
    tasks = ("sums", "words", f"$x$ {SCRIPT}")
    points = [p for task in tasks for p in (point("plain", 2, 90, task=task), point(f"d3 {SCRIPT}", 3, 80, task=task))]
    board = build_board(points, title=f"A & {SCRIPT}")
    return board, draw(board)


@pytest.fixture(scope="module")
def html(drawn):
    board, files = drawn
    return page(board.title, document(board, files), files)


@pytest.mark.full
def test_the_pictures_are_png_and_svg_for_each_task_and_a_radar_over_three(drawn):
    _, files = drawn
    slugs = ("sums", "words", "x-script-alert-1-script")
    names = [f"{kind}-{slug}" for kind in ("curves", "bars") for slug in slugs] + ["radar"]
    assert sorted(files) == sorted(f"{name}.{end}" for name in names for end in ("png", "svg"))
    assert all(content.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml") for name, content in files.items())


def test_the_page_is_well_formed_and_text_is_escaped_everywhere(html):
    reader = read(html)
    assert f"d3 {SCRIPT}" in reader.text and f"A & {SCRIPT}" in reader.text
    assert [element.tag for element in reader.elements].count("script") == 1  # the page's own


def test_the_page_fetches_nothing(drawn):
    board = build_board([], published=True)
    _, files = drawn
    some = {f"{name}-{task.slug}.svg": files["radar.svg"] for task in board.tasks for name in ("curves", "bars")}
    html = page("t", document(board, ()), some)
    reader = read(html)
    for element in reader.elements:
        addresses = {name: value for name, value in element.attrs.items() if "http" in (value or "")}
        assert element.tag == "a" or not addresses, element
        assert element.tag not in ("link", "iframe", "object", "base", "form")
        assert element.attrs.get("src", "data:").startswith("data:")
    assert not re.search(r"https?:|@import|url\(|fetch\(|import\(", re.sub(r'<a href="[^"]*">[^<]*</a>', "", html))
    assert "color-scheme: light dark" in html and "prefers-color-scheme: dark" in html


def test_pictures_are_data_of_the_page_and_have_a_text(html):
    images = [element.attrs for element in read(html).elements if element.tag == "img"]
    assert len(images) == 7
    assert all(image["src"].startswith("data:image/svg+xml;base64,") and len(image["alt"]) > 20 for image in images)


def test_every_table_can_be_sorted_by_keyboard_by_values_that_are_data(html, drawn):
    reader = read(html)
    heads = [element for element in reader.elements if element.tag == "th" and "thead" in element.inside]
    buttons = [element for element in reader.elements if element.tag == "button"]
    assert len(buttons) == len(heads) and all(button.attrs == {"type": "button"} for button in buttons)
    assert {head.attrs["data-kind"] for head in heads} == {"number", "text"}
    for table in (block for block in document(*drawn) if isinstance(block, Table)):
        for row in table.rows:
            for place, cell in enumerate(row):
                assert cell.value is None or isinstance(cell.value, (int, float)) == (place in table.numeric), cell
    rank = [head for head in heads if head.attrs.get("aria-sort")]
    assert {head.attrs["aria-sort"] for head in rank} == {"descending"} and len(rank) == 4
    values = re.findall(r'<tr><th scope="row"[^>]*>plain</th><td[^>]*>tiny</td><td[^>]*data-value="([\d.]+)"', html)
    assert float(values[0]) == 180.0


def test_the_shaded_area_is_what_is_counted():
    (task,) = build_board(three_curves()).tasks
    for entry in task.entries:
        x, y = weighted_outline(entry)
        area = sum((x[i + 1] - x[i]) * (y[i] + y[i + 1]) / 2 for i in range(len(x) - 1))
        assert area == pytest.approx(entry.common.aup)
        assert x[-1] == entry.fastest["tpf"]


@pytest.mark.full
def test_names_of_any_length_are_drawn():
    board = build_board([point("a method with quite a long name, " * 3, 2, 90), point("b", 3, 80, model="m" * 90)])
    assert set(draw(board)) == {f"{name}-sums.{kind}" for name in ("curves", "bars") for kind in ("png", "svg")}
