"""Traces as one HTML file that needs nothing else: it can be sent by mail, and asks no server for anything."""

from collections.abc import Sequence
from html import escape

from .trace import Trace
from .trace_html import CANVAS_CSS, DARK_CSS, trace_html


# Nothing may be fetched, whatever the text of the page holds.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; form-action 'none'"

PAGE_CSS = """
:root { color-scheme: light dark; }
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body { margin: 0; font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; background: #f6f7f9;
  color: #1d2330; }
main { max-width: 76rem; margin: 0 auto; padding: 1rem; }
h1 { margin: 0; font-size: 1.3rem; }
.model { margin: 0 0 .9rem; color: #5b6475; overflow-wrap: anywhere; }
.card { background: #fff; border: 1px solid #dde1e8; border-radius: 10px; padding: 1rem; }
.prompt { margin-bottom: 1rem; }
.prompt h2 { margin: 0 0 .2rem; font-size: .78rem; font-weight: 400; color: #5b6475; }
.prompt p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 12rem; overflow-y: auto; }
.controls { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .4rem .8rem;
  align-items: center; padding: .6rem 1rem; margin-bottom: 1rem; }
.controls button { font: inherit; min-width: 6.5rem; min-height: 2.5rem; border-radius: 8px; border: 1px solid #3a5bd0;
  background: #3a5bd0; color: #fff; cursor: pointer; }
.controls input { flex: 1 1 9rem; min-width: 0; height: 2.5rem; accent-color: #3a5bd0; }
.controls output { flex: 0 0 auto; min-width: 11.5rem; font-variant-numeric: tabular-nums; }
.controls :focus-visible { outline: 3px solid #e8a33d; outline-offset: 2px; }
.traces { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.now { margin: .3rem 0 0; font-size: .85rem; color: #5b6475; min-height: 1.3em; font-variant-numeric: tabular-nums; }
footer { margin-top: 1rem; font-size: .8rem; color: #5b6475; }
@media (prefers-color-scheme: dark) {
  body { background: #14171d; color: #e8ebf1; }
  .card { background: #1d2129; border-color: #343a46; }
  .model, .now, .prompt h2, footer { color: #a4adbd; }
  .d3-trace DARK
}
""".replace("DARK", DARK_CSS)

# `show(k)` draws what `canvas_html` draws of forward k; a trace with fewer forwards keeps its last canvas.
SCRIPT = """
"use strict";
const traces = [...document.querySelectorAll(".d3-canvas")].map((canvas) => ({
  lengths: canvas.dataset.lengths.split(" ").map(Number),
  seconds: canvas.dataset.seconds.split(" ").map(Number),
  now: canvas.closest("article").querySelector(".now"),
  pieces: [...canvas.children].map((node) => ({
    node, text: node.textContent, at: Number(node.dataset.at), steps: node.dataset.steps.split(" ").map(Number),
    style: node.getAttribute("style") || "", special: node.classList.contains("d3-special"),
  })),
}));
const slider = document.getElementById("forward");
const button = document.getElementById("play");
const said = document.getElementById("said");
const last = Number(slider.max);
let timer = null;

function draw(trace, k) {
  const end = trace.lengths.length - 1, forward = Math.min(k, end), length = trace.lengths[forward];
  let open = false, decided = 0;
  for (const piece of trace.pieces) {
    const done = piece.steps.map((step) => step > 0 && step <= forward), all = done.every(Boolean);
    piece.node.hidden = piece.at >= length;
    if (!piece.node.hidden) decided += done.filter(Boolean).length;
    open = open || !all;
    const isNew = all && Math.max(...piece.steps) === k && k < last;
    piece.node.className = [piece.special && "d3-special", all && open && "d3-draft", isNew && "d3-new"]
      .filter(Boolean).join(" ");
    piece.node.setAttribute("style", all ? piece.style : "");
    if (all) { piece.node.textContent = piece.text; continue; }
    piece.node.replaceChildren(...done.map((part) => {
      const box = document.createElement("i");
      if (part) box.className = "d3-part";
      return box;
    }));
  }
  trace.now.textContent = `forward ${forward} of ${end}, ${trace.seconds[forward].toFixed(3)} s, ` +
    `${decided} of ${length} positions decided` + (forward === end ? ", finished" : "");
}

function show(k) {
  slider.value = k;
  for (const trace of traces) draw(trace, k);
  said.textContent = `forward ${k} of ${last}`;
  slider.setAttribute("aria-valuetext", said.textContent);
}

function stop() {
  clearInterval(timer);
  timer = null;
  button.textContent = "▶ Play";
}

function play() {
  if (timer !== null) return stop();
  button.textContent = "❚❚ Pause";
  show(Number(slider.value) >= last ? 0 : Number(slider.value));
  timer = setInterval(() => {
    if (Number(slider.value) < last) show(Number(slider.value) + 1);
    if (Number(slider.value) >= last) stop();
  }, Math.min(700, Math.max(70, 9000 / last)));
}

slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
button.addEventListener("click", play);
document.getElementById("controls").hidden = false;
show(last);
"""


def page(traces: Sequence[Trace]) -> str:
    """One or two traces of a prompt as a complete HTML document, with a slider over the forwards.

    Without JavaScript it shows the finished canvases.

    Args:
        traces: of the same prompt; they lie side by side where there is room.

    Raises:
        ValueError: for none or more than two, for traces of different prompts, or one without a forward.
    """
    if not 1 <= len(traces) <= 2:
        raise ValueError(
            f"`traces` must be one or two (got {len(traces)}). Write further ones to a page of their own."
        )
    if len({trace.prompt for trace in traces}) > 1:
        raise ValueError(f"`traces` must be of one prompt (got {[trace.prompt[:40] for trace in traces]}).")
    last = max(trace.forwards for trace in traces)
    if not all(trace.forwards for trace in traces):
        raise ValueError("`traces` must have at least one forward (got one without). Record it again.")
    names = escape(", ".join(dict.fromkeys(trace.model for trace in traces)))
    articles = "".join(f'<article class="card">{trace_html(trace)}<p class="now"></p></article>' for trace in traces)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{names}: how the answer was decided</title>
<style>{CANVAS_CSS}{PAGE_CSS}</style>
</head>
<body>
<main>
<h1>How the answer was decided</h1>
<p class="model">{names}</p>
<section class="card prompt"><h2>Prompt</h2><p>{escape(traces[0].prompt)}</p></section>
<div class="card controls" id="controls" role="group" aria-label="Steps" hidden>
<button type="button" id="play">▶ Play</button>
<input type="range" id="forward" min="0" max="{last}" value="{last}" step="1" aria-label="Forward">
<output id="said" for="forward"></output>
</div>
<div class="traces">{articles}</div>
<noscript><p>The finished canvas is shown; going through the forwards needs JavaScript.</p></noscript>
<footer>Each colour is the forward in which a token was decided. Text from the first stop token on is not part of the
answer: what was decided there is shown until that token is.</footer>
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""
