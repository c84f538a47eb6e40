"""Draws `decoding.svg`: what each forward of a decoding sees and decides.

    python docs/draw_decoding.py [FILE]

The embedded checkpoint decodes one question; the picture is drawn from the step map alone.
"""

import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

from d3llm_hf import encode_chat
from d3llm_hf.hub.sources import embedded_checkpoints


QUESTION = "Tom has 8 apples. He buys 7 more. He gives 4 to a friend. How many apples does Tom have now?"
SETTINGS = {"decoding_method": "d3llm", "block_length": 16, "entropy_threshold": 0.3, "max_new_tokens": 48}
HEIGHT, CHARACTER, LEFT, TOP = 22, 7, 90, 48

# Colours follow the reader's setting where it is known; the background is drawn, so that they hold on any page.
STYLE = """
    .page { fill: #ffffff } .text { fill: #1f2328 } .quiet { fill: #59636e }
    .mask { fill: none; stroke: #d1d9e0 } .before { fill: #ddf4ff } .now { fill: #0969da } .on-now { fill: #ffffff }
    .block { stroke: #59636e; stroke-dasharray: 3 3 }
    text { font: 11px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; text-anchor: middle }
    .left { text-anchor: start }
    @media (prefers-color-scheme: dark) {
      .page { fill: #0d1117 } .text { fill: #e6edf3 } .quiet { fill: #9198a1 }
      .mask { stroke: #3d444d } .before { fill: #12314f } .now { fill: #4493f8 } .on-now { fill: #0d1117 }
      .block { stroke: #9198a1 }
    }"""


def decode() -> tuple[list[str], list[int]]:
    """The answer's tokens as text, to the stop token, and the forward that decided each of them."""
    folder = embedded_checkpoints()["d3llm-llada"]
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, dtype=torch.float32)
    inputs = encode_chat(tokenizer, [{"role": "user", "content": QUESTION}])
    output = model.generate(**inputs, **SETTINGS, return_dict_in_generate=True)
    answer = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    steps = output.step_map[0].tolist()
    texts = ["■" if i in tokenizer.all_special_ids else tokenizer.decode([i]) for i in answer]
    length = texts.index("■") + 1 if "■" in texts else len(texts)
    return texts[:length], steps[:length]


def draw(texts: Sequence[str], steps: Sequence[int], block_length: int) -> str:
    """The SVG. A column is as wide as its token."""
    shown = [text.strip(" ").replace("\n", "↵") for text in texts]
    widths = [max(HEIGHT, CHARACTER * len(text) + 10) for text in shown]
    lefts = [LEFT + sum(widths[:column]) for column in range(len(widths) + 1)]
    forwards = max(steps)
    bottom = TOP + HEIGHT * forwards
    width, height = lefts[-1] + 12, bottom + 40
    parts = [
        f'<rect class="page" width="{width}" height="{height}"/>',
        f'<text class="quiet left" x="12" y="18">{escape(QUESTION)}</text>',
    ]
    for start in range(0, len(texts), block_length):
        x = lefts[start]
        parts.append(f'<text class="quiet left" x="{x + 3}" y="{TOP - 8}">block {start // block_length + 1}</text>')
        parts.append(f'<line class="block" x1="{x}" x2="{x}" y1="{TOP - 20}" y2="{bottom}"/>')
    for forward in range(1, forwards + 1):
        y = TOP + HEIGHT * (forward - 1)
        parts.append(f'<text class="quiet left" x="12" y="{y + 15}">forward {forward}</text>')
        for column, step in enumerate(steps):
            kind = "mask" if step > forward else "now" if step == forward else "before"
            parts.append(_cell(kind, lefts[column], y, widths[column], shown[column]))
    x = 12
    for kind, told in (("mask", "mask token"), ("now", "decided by this forward"), ("before", "decided before")):
        parts.append(_cell(kind, x, bottom + 10, HEIGHT, ""))
        parts.append(f'<text class="quiet left" x="{x + 28}" y="{bottom + 25}">{told}</text>')
        x += 48 + CHARACTER * len(told)
    told = "■ stop token, ↵ new line"
    parts.append(f'<text class="quiet left" x="{x + 8}" y="{bottom + 25}">{told}</text>')
    body = "\n".join(f"  {part}" for part in parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">\n'
        f"  <title>A canvas is decided, forward by forward</title>\n  <style>{STYLE}\n  </style>\n{body}\n</svg>\n"
    )


def _cell(kind: str, x: int, y: int, width: int, text: str) -> str:
    """A position of the canvas; a mask token shows no text."""
    box = f'<rect class="{kind}" x="{x + 1}" y="{y + 1}" width="{width - 2}" height="{HEIGHT - 2}" rx="3"/>'
    if kind == "mask" or not text:
        return box
    css = "on-now" if kind == "now" else "text"
    return f'{box}<text class="{css}" x="{x + width // 2}" y="{y + 15}">{escape(text)}</text>'


def main(argv: Sequence[str]) -> None:
    """Writes the picture to the file that is named, or beside this script."""
    file = Path(argv[0]) if argv else Path(__file__).parent / "decoding.svg"
    file.write_text(draw(*decode(), SETTINGS["block_length"]), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
