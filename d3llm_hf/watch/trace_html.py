"""A trace as HTML: the canvas of a forward as coloured tokens, its legend, and what it took.

The file of `d3llm trace` and the page of `d3llm demo` show the same picture. Everything that a user or a model wrote
is escaped.
"""

from html import escape

from .trace import Trace


# viridis: lightness rises with the value, and the order survives every kind of colour blindness
SCALE = ("#440154", "#482475", "#414487", "#355f8d", "#2a788e", "#21918c", "#22a884", "#44bf70", "#7ad151", "#fde725")

CANVAS_CSS = """
.d3-trace { --d3-ink: #1d2330; --d3-faint: #5b6475; --d3-line: #8a93a5; --d3-ring: #d1242f; color: var(--d3-ink);
  min-width: 0; }
.d3-trace h3 { margin: 0; font-size: 1.05rem; color: inherit; }
.d3-trace .d3-settings { margin: .1rem 0 .7rem; font-size: .85rem; color: var(--d3-faint); overflow-wrap: anywhere; }
.d3-canvas { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.85; font-size: 1rem;
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; min-height: 1.85em; }
.d3-canvas span { border-radius: 3px; padding: .12em 0; margin-right: 1px; box-decoration-break: clone;
  -webkit-box-decoration-break: clone; }
.d3-canvas .d3-draft, .d3-key .d3-draft { font-style: italic; text-decoration: underline dashed 1px;
  text-underline-offset: .22em; }
.d3-canvas .d3-special { font-size: .8em; }
.d3-canvas .d3-new, .d3-key .d3-new { outline: 2px solid var(--d3-ring); outline-offset: -1px; }
.d3-canvas i, .d3-key i.d3-box { display: inline-block; box-sizing: border-box; width: .85em; height: 1.15em;
  margin-right: 2px; vertical-align: -.22em; border: 2px dotted var(--d3-line); border-radius: 3px; }
.d3-canvas i.d3-part { border-style: solid; background: var(--d3-line); }
.d3-key { display: flex; flex-wrap: wrap; gap: .3rem 1rem; align-items: center; margin: .8rem 0 .6rem; padding: 0;
  font-size: .82rem; color: var(--d3-faint); list-style: none; }
.d3-key li { display: inline-flex; align-items: center; gap: .4rem; margin: 0; }
.d3-key .d3-bar { display: inline-block; width: 6.5rem; height: .8rem; border-radius: 3px; }
.d3-key .d3-new, .d3-key .d3-draft { padding: 0 .3em; border-radius: 3px; }
.d3-stats { display: flex; flex-wrap: wrap; gap: .5rem 1.4rem; margin: .4rem 0 0; }
.d3-stats div { margin: 0; }
.d3-stats dt { font-size: .78rem; color: var(--d3-faint); margin: 0; }
.d3-stats dd { margin: 0; font-size: 1.05rem; font-variant-numeric: tabular-nums; font-weight: 600; }
"""
DARK_CSS = "{ --d3-ink: #e8ebf1; --d3-faint: #a4adbd; --d3-line: #7a8496; --d3-ring: #ff7b72; }"


def colour(step: int, forwards: int) -> tuple[str, str]:
    """Background of a token by the forward that decided it, and the colour in which its text is readable there."""
    place = min(max(step - 1, 0) / max(forwards - 1, 1), 1.0) * (len(SCALE) - 1)
    low = min(int(place), len(SCALE) - 2)
    ends = [[int(SCALE[i][c : c + 2], 16) for c in (1, 3, 5)] for i in (low, low + 1)]
    mixed = [round(a + (b - a) * (place - low)) for a, b in zip(*ends, strict=True)]
    # Relative luminance as in WCAG: of white and black, the better one has a contrast of at least 4.5.
    linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in (part / 255 for part in mixed)]
    luminance = sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return "#{:02x}{:02x}{:02x}".format(*mixed), "#000" if luminance > 0.179 else "#fff"


def trace_html(trace: Trace, forward: int | None = None, *, forwards: int | None = None, status: str = "") -> str:
    """The canvas after a forward, its legend and the statistics.

    Args:
        trace: of one answer.
        forward: the last one when unset.
        forwards: where the colour scale ends; at the trace's last forward when unset.
        status: a line in place of the statistics, while there are none.
    """
    method = escape(str(trace.settings.get("decoding_method", "")))
    rest = ", ".join(f"{key}={value}" for key, value in trace.settings.items() if key != "decoding_method")
    return (
        f'<div class="d3-trace"><h3>{method}</h3><p class="d3-settings">{escape(rest)}</p>'
        f"{canvas_html(trace, forward, forwards=forwards)}{legend_html(forwards or trace.forwards)}"
        f"{f'<p>{escape(status)}</p>' if status else statistics_html(trace)}</div>"
    )


def canvas_html(trace: Trace, forward: int | None = None, *, forwards: int | None = None) -> str:
    """The canvas after a forward.

    That of the last forward holds what a script needs to show the others: each piece says where it lies and when its
    tokens were decided, the canvas how long it was and when.
    """
    forward = trace.forwards if forward is None else forward
    length, shown, at, is_open = trace.length(forward), [], 0, False
    for piece in trace.pieces:
        steps = trace.step_map[at : at + piece.tokens]
        decided = [0 < step <= forward for step in steps]
        is_open = is_open or not all(decided)
        classes = ["d3-special"] * (piece.special and all(decided))
        data = f'data-at="{at}" data-steps="{" ".join(map(str, steps))}"' + " hidden" * (at >= length)
        if all(decided):
            classes += ["d3-draft"] * is_open + ["d3-new"] * (max(steps) == forward < trace.forwards)
            paper, ink = colour(max(steps), forwards or trace.forwards)
            data += f' title="forward {max(steps)}" style="background:{paper};color:{ink}"'
            content = escape(piece.text.replace("\n", "↵\n"))
        else:
            content = "".join('<i class="d3-part"></i>' if part else "<i></i>" for part in decided)
        shown.append(f'<span class="{" ".join(classes)}" {data}>{content}</span>')
        at += piece.tokens
    lengths = " ".join(map(str, [trace.length(0), *trace.lengths]))
    seconds = " ".join(f"{value:g}" for value in [0.0, *trace.seconds])
    return f'<p class="d3-canvas" data-lengths="{lengths}" data-seconds="{seconds}">{"".join(shown)}</p>'


def legend_html(forwards: int) -> str:
    """What colours, boxes and slanted text mean."""
    first, last = (colour(step, forwards) for step in (1, forwards))
    return (
        f'<ul class="d3-key" aria-label="Legend"><li>decided in forward 1 <span class="d3-bar" '
        f'style="background:linear-gradient(90deg,{",".join(SCALE)})"></span> {forwards}</li>'
        f'<li><i class="d3-box"></i> undecided</li>'
        f'<li><span class="d3-draft" style="background:{first[0]};color:{first[1]}">draft</span> decided behind an '
        f'undecided position</li><li><span class="d3-new" style="background:{last[0]};color:{last[1]}">new</span> '
        f"decided in the forward shown</li></ul>"
    )


def statistics_html(trace: Trace) -> str:
    """Tokens, forwards, their ratio, time and positions."""
    entries = [
        ("tokens per forward", f"{trace.tokens_per_forward:.2f}"),
        ("forwards", f"{trace.forwards}"),
        ("tokens", f"{trace.answer_tokens}"),
        ("time", f"{trace.seconds[-1] if trace.seconds else 0:.3f} s"),
        ("tokens per second", f"{trace.tokens_per_second:.1f}"),
    ]
    if trace.positions_computed is None:
        entries.append(("state", "stopped"))
    else:
        entries.append(("positions computed", f"{trace.positions_computed}"))
    shown = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in entries)
    return f'<dl class="d3-stats">{shown}</dl>'
