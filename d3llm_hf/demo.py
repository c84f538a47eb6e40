"""The page of `d3llm demo`: answers while they are decided, two methods side by side, a slider over the steps, forms.

All state of a user lies in the session: traces in a `gr.State`, the generation at work in [`Sessions`] under the
session's name, so that Stop and leaving the page reach it and nobody else's.
"""

import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

from .evaluation.tasks.word_problems import generate_problems
from .forms.filling import fill
from .forms.schema import form_of_schema
from .models.generation_config_d3llm import DEFAULT_METHOD
from .models.methods import (
    ALLOWED_REMASKING,
    CACHE_FIELDS,
    CACHES,
    COMMON,
    DECODERS,
    LENGTH_FIELDS,
    WINDOWS,
    caches_of,
    defaults_of,
    methods_of,
)
from .settings import SETTINGS
from .text import encode_chat, encode_text
from .watch.trace import Recording, Trace
from .watch.trace_html import CANVAS_CSS, DARK_CSS, trace_html


try:
    import gradio as gr
except ImportError as error:
    raise ImportError("`d3llm demo` needs gradio (got none installed). Run pip install 'd3llm-hf[demo]'.") from error


REDRAW = 0.05  # seconds between two pictures: a fast model decides faster than a browser draws
NEW_TOKENS = 64
# Settings that a method or a cache may have, in the order of the page; the seed is one for both methods.
# What an adaptive length follows stays as it is: its rule has settings that the other lengths do not have.
FIELDS = tuple(
    name for name in SETTINGS if name not in ("decoding_method", "kv_cache", "seed") and name not in LENGTH_FIELDS
)
CHOICES = {"window": WINDOWS, "length": ("fixed", "adaptive"), "decoder": tuple(DECODERS)}
SCHEMA = {
    "type": "object",
    "properties": {
        "steps": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
        "answer": {"type": "integer", "minimum": 0, "maximum": 999},
    },
}
NO_CANVAS = '<div class="d3-trace"><p>The answer appears here.</p></div>'
CSS = CANVAS_CSS + ".dark .d3-trace " + DARK_CSS + ".d3-trace { padding: .4rem .2rem; } footer { display: none; }"
FONTS, MONO = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")  # gradio's own would come from a server


class Sessions:
    """The generation at work in each session."""

    def __init__(self):
        self._lock = threading.Lock()
        self._running: dict[str | None, Recording] = {}
        self._stopped: set[str | None] = set()

    def begin(self, session: str | None) -> None:
        """A run of this session was asked for; a Stop counts from here on."""
        with self._lock:
            self._stopped.discard(session)

    def enter(self, session: str | None, recording: Recording) -> None:
        """A generation of this session works now."""
        with self._lock:
            self._running[session] = recording
            stopped = session in self._stopped
        if stopped:
            recording.close()

    def leave(self, session: str | None) -> None:
        """It does not any more."""
        with self._lock:
            self._running.pop(session, None)

    def stop(self, session: str | None) -> None:
        """Stops what works or waits for this session, and only that."""
        with self._lock:
            self._stopped.add(session)
            recording = self._running.get(session)
        if recording is not None:
            recording.close()

    def is_stopped(self, session: str | None) -> bool:
        """Whether Stop was pressed since the run was asked for."""
        return session in self._stopped


class Handlers:
    """What the page does, without its components: each method takes and gives plain values.

    Args:
        model, tokenizer: shared by all sessions.
        name (`str`): of the model, for people.
    """

    def __init__(self, model, tokenizer, name: str):
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.sessions = Sessions()

    def defaults(self, method: str, cache: str | None = None) -> dict[str, Any]:
        """Setting -> value where nothing else is said, of a method with a cache: the checkpoint's or the method's."""
        own = self.model.generation_config
        values = defaults_of(method, self.model.traits)
        is_own = (getattr(own, "decoding_method", None) or self.model.traits.method or DEFAULT_METHOD) == method
        stated = {key: getattr(own, key, None) for key in values} if is_own else {}
        values |= {key: value for key, value in stated.items() if value is not None}
        cache = values["kv_cache"] if cache is None else cache
        known = CACHES[cache]
        if is_own and cache == values["kv_cache"]:
            known = {key: getattr(own, key, None) or value for key, value in known.items()}
        return values | known | {"kv_cache": cache}

    def settings(self, method: str, cache: str, values: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `generate`: of what the page shows, all that differs from what goes without saying."""
        chosen: dict[str, Any] = {"decoding_method": method}
        if cache != self.defaults(method)["kv_cache"]:
            chosen["kv_cache"] = cache
        usual = self.defaults(method, cache)
        for key, value in values.items():
            if key in usual and value is not None and value != _on_page(key, usual[key]):
                chosen[key] = _typed(key, value)
        return chosen

    def usual_length(self) -> int:
        """New tokens where nothing else is said."""
        return self.model.generation_config.max_new_tokens or NEW_TOKENS

    def shared(self, length: int | None, temperature: float | None, seed: int | None) -> dict[str, Any]:
        """Arguments of `generate` that two methods have in common; an empty field says nothing."""
        chosen = {"max_new_tokens": self.usual_length() if length is None else length}
        chosen |= {} if seed is None else {"seed": seed}
        return chosen | ({"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False})

    def run(
        self, session: str | None, prompt: str, chat: bool, runs: list[dict[str, Any]]
    ) -> Iterator[list[tuple[Trace, bool]]]:
        """Decodes the prompt with one method after the other.

        Yields:
            each method's trace so far, and whether it is over; now and then, and at the end.

        Raises:
            gr.Error: for a prompt or settings that the library refuses, with its message.
        """
        done: list[tuple[Trace, bool]] = []
        for settings in runs:
            if self.sessions.is_stopped(session):
                break
            try:
                with self._record(prompt, chat, settings) as recording:
                    self.sessions.enter(session, recording)
                    drawn = -REDRAW
                    for _ in recording:
                        if time.monotonic() - drawn >= REDRAW:
                            yield [*done, (recording.trace(), False)]
                            drawn = time.monotonic()
                    done.append((recording.trace(), True))
            except (ValueError, TypeError) as error:
                # The message is shown as HTML, and may quote what the user wrote.
                text = escape(str(error), quote=False)
                raise gr.Error(text, title="This cannot run", print_exception=False) from error
            finally:
                self.sessions.leave(session)
            yield list(done)

    def fill(self, prompt: str, schema: str, method: str) -> tuple[str, str]:
        """The filled form of a JSON schema, and what it took.

        Raises:
            gr.Error: for a schema, prompt or method that the library refuses, with its message.
        """
        try:
            try:
                read = json.loads(schema or "")
            except ValueError as error:
                raise ValueError(f"`schema` must be JSON (got {error}). Correct it there.") from None
            form = form_of_schema(read)
            asked: Any = prompt
            if (prompt or "").strip() and getattr(self.tokenizer, "chat_template", None):
                asked = [{"role": "user", "content": prompt}]
            found = fill(self.model, self.tokenizer, form, prompt=asked, decoding_method=method)
        except (ValueError, TypeError) as error:
            text = escape(str(error), quote=False)
            raise gr.Error(text, title="This cannot be filled in", print_exception=False) from error
        return found.text, f"{found.num_tokens} tokens in {found.num_forwards} forwards"

    def _record(self, prompt: str, chat: bool, settings: dict[str, Any]) -> Recording:
        if not (prompt or "").strip():
            raise ValueError("`prompt` must not be empty (got nothing). Write one, or choose an example.")
        if chat:
            inputs = encode_chat(self.tokenizer, [{"role": "user", "content": prompt}])
        else:
            inputs = encode_text(self.tokenizer, prompt)
        return Recording(self.model, self.tokenizer, prompt, inputs, name=self.name, **settings)


def _on_page(key: str, value: Any) -> Any:
    """A field for numbers cannot be empty from the start. Where nothing is a value, 0 is none, so it stands for it."""
    return 0 if value is None and SETTINGS[key][0] in (int, float) else value


def _typed(key: str, value: Any) -> Any:
    """A number of the page as the type of its setting; a fraction is left for the library to refuse."""
    kind = SETTINGS[key][0]
    if kind is float:
        return float(value)
    return int(value) if kind is int and float(value).is_integer() else value


def picture(trace: Trace, over: bool) -> str:
    """The canvas as it looks now. While nobody knows the last forward, the colours' scale ends at a power of two."""
    if over:
        return trace_html(trace)
    scale = max(8, 1 << (trace.forwards - 1).bit_length())
    return trace_html(trace, forwards=scale, status=f"deciding, forward {trace.forwards} ...")


def refusal(error: gr.Error) -> str:
    """The message of an error, which is escaped already, in place of an answer."""
    return f'<div class="d3-trace"><p role="alert">{error.message}</p></div>'


# ---- the page ------------------------------------------------------------------------------------------------------


@dataclass
class MethodBox:
    """Components that choose a method and its settings."""

    method: gr.Dropdown
    cache: gr.Dropdown
    fields: dict[str, gr.components.Component]

    @property
    def inputs(self) -> list[gr.components.Component]:
        """In the order in which a handler gets them."""
        return [self.method, self.cache, *self.fields.values()]


def build(model, tokenizer, *, name: str, concurrency: int = 2) -> gr.Blocks:
    """The page.

    Args:
        model, tokenizer: shared by all users.
        name (`str`): of the model, for people.
        concurrency (`int`): answers decided at a time; others wait in a queue.

    Raises:
        ImportError: without gradio, when this module is imported.
    """
    handlers = Handlers(model, tokenizer, name)
    own_method = getattr(model.generation_config, "decoding_method", None) or model.traits.method or DEFAULT_METHOD
    with gr.Blocks(title="d3llm: watch it think", analytics_enabled=False) as page:
        gr.Markdown(f"# Watch it think\n`{name}` decides several tokens at a time, in the order of its certainty.")
        with gr.Tab("Answer"):
            _answer_tab(page, handlers, own_method, concurrency)
        with gr.Tab("Form"):
            _form_tab(handlers, own_method, concurrency)
    return page


def _answer_tab(page: gr.Blocks, handlers: Handlers, own_method: str, concurrency: int) -> None:
    traces = gr.State([])
    prompt = gr.Textbox(label="Prompt", lines=2, elem_id="prompt", placeholder="Write a prompt, or choose one below")
    examples = [[problem.question] for problem in generate_problems(3, split="test", seed=7, max_steps=3)]
    gr.Examples(
        examples, inputs=[prompt], label="Word problems of the kind that the embedded checkpoints were trained on"
    )
    with gr.Row():
        length = gr.Number(handlers.usual_length(), label="New tokens", precision=0, min_width=110)
        temperature = gr.Number(0, label="Temperature (0: greedy)", min_width=110)
        seed = gr.Number(0, label="Seed", precision=0, min_width=110)
        has_template = bool(getattr(handlers.tokenizer, "chat_template", None))
        chat = gr.Checkbox(has_template, label="Chat template", visible=has_template, min_width=110)
    with gr.Row():
        with gr.Column(min_width=300), gr.Group():
            first = _method_box(handlers, "Method", own_method)
        with gr.Column(min_width=300):
            compare = gr.Checkbox(False, label="Compare with a second method", elem_id="compare")
            with gr.Group(visible=False) as second_group:
                second = _method_box(handlers, "Second method", "llada" if own_method != "llada" else "d3llm")
    with gr.Row():
        run = gr.Button("Run", variant="primary", elem_id="run", min_width=110)
        stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop", min_width=110)
    slider = gr.Slider(0, 1, 1, step=1, label="Forward", visible=False, elem_id="forward", buttons=[])
    with gr.Row():
        with gr.Column(min_width=300):
            canvas = gr.HTML(NO_CANVAS, elem_id="canvas")
        with gr.Column(min_width=300, visible=False) as second_column:
            other = gr.HTML(NO_CANVAS, elem_id="second-canvas")

    hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    quick: dict[str, Any] = {"queue": False} | hidden

    def begin(compares: bool, request: gr.Request):
        handlers.sessions.begin(request.session_hash)
        shown = gr.update(visible=compares)
        return (
            gr.update(interactive=False),
            gr.update(interactive=True),
            gr.update(visible=False),
            shown,
            [],
            "",
            "",
        )

    def decode(request: gr.Request, prompt, chat, length, temperature, seed, compares, *values):
        boxes = [values[: len(first.inputs)], values[len(first.inputs) :]][: 1 + bool(compares)]
        shared = handlers.shared(length, temperature, seed)
        runs = [shared | handlers.settings(m, c, dict(zip(FIELDS, v, strict=True))) for m, c, *v in boxes]
        shown: list[tuple[Trace, bool]] = []
        drawn: list[str] = []
        try:
            for shown in handlers.run(request.session_hash, prompt, chat, runs):
                drawn = [picture(trace, over) for trace, over in shown]
                yield [gr.skip(), gr.skip(), *[*drawn, NO_CANVAS][:2]]
        except gr.Error as error:  # a warning, since the page must come to its end; it stays where the answer goes
            gr.Warning(error.message, title=error.title)
            drawn = [picture(trace, True) for trace, _ in shown]
            yield [gr.skip(), gr.skip(), *[*drawn, refusal(error), NO_CANVAS][:2]]
        found = [trace for trace, _ in shown if trace.forwards]
        last = max((trace.forwards for trace in found), default=1)
        yield [found, gr.update(maximum=last, value=last, visible=bool(found)), gr.skip(), gr.skip()]

    def end():
        return gr.update(interactive=True), gr.update(interactive=False)

    def halt(request: gr.Request):
        handlers.sessions.stop(request.session_hash)

    def step(found: list[Trace], forward: float):
        drawn = [trace_html(trace, min(int(forward), trace.forwards)) for trace in found]
        return [*drawn, gr.skip(), gr.skip()][:2]

    inputs = [prompt, chat, length, temperature, seed, compare, *first.inputs, *second.inputs]
    started = gr.on(
        [run.click, prompt.submit],
        begin,
        [compare],
        [run, stop, slider, second_column, traces, canvas, other],
        **quick,
    )
    decided = started.then(decode, inputs, [traces, slider, canvas, other], concurrency_limit=concurrency, **hidden)
    decided.then(end, None, [run, stop], **quick)
    stop.click(halt, None, None, **quick)
    slider.input(step, [traces, slider], [canvas, other], trigger_mode="always_last", **quick)
    compare.input(lambda shown: gr.update(visible=shown), [compare], [second_group], **quick)
    page.unload(halt)


def _form_tab(handlers: Handlers, own_method: str, concurrency: int) -> None:
    """A JSON schema that is filled in: valid whatever the model, for what is fixed stands there from the start."""
    prompt = gr.Textbox(label="Prompt", lines=2, elem_id="form-prompt", placeholder="What the form is about")
    gr.Examples([[generate_problems(1, split="test", seed=7, max_steps=3)[0].question]], inputs=[prompt])
    schema = gr.Textbox(json.dumps(SCHEMA, indent=2), label="JSON schema", lines=8, elem_id="form-schema")
    method = gr.Dropdown(
        methods_of(handlers.model.traits), value=own_method, label="Method", filterable=False, elem_id="form-method"
    )
    button = gr.Button("Fill in", variant="primary", elem_id="fill")
    filled = gr.Textbox(label="Filled form", lines=4, interactive=False, elem_id="filled")
    counts = gr.Markdown(elem_id="form-counts")

    def on_fill(prompt: str, schema: str, method: str):
        try:
            return handlers.fill(prompt, schema, method)
        except gr.Error as error:
            gr.Warning(error.message, title=error.title)
            return gr.skip(), error.message

    button.click(
        on_fill,
        [prompt, schema, method],
        [filled, counts],
        concurrency_limit=concurrency,
        api_visibility="private",
    )


def _method_box(handlers: Handlers, label: str, method: str) -> MethodBox:
    usual, traits = handlers.defaults(method), handlers.model.traits
    with gr.Row():
        chooser = gr.Dropdown(methods_of(traits), value=method, label=label, filterable=False, min_width=150)
        cache = gr.Dropdown(
            caches_of(method, traits), value=usual["kv_cache"], label="Cache", filterable=False, min_width=150
        )
    own = [name for name in FIELDS if name not in COMMON and name not in CACHE_FIELDS]
    with gr.Row():
        fields = {name: _field(name, usual, method) for name in own}
    with gr.Accordion("More settings", open=False), gr.Row():
        fields |= {name: _field(name, usual, method) for name in FIELDS if name not in own}
    fields = {name: fields[name] for name in FIELDS}
    quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}

    def on_method(method: str):
        usual = handlers.defaults(method)
        kept = gr.update(choices=caches_of(method, traits), value=usual["kv_cache"])
        return [kept, *(gr.update(**_shown(name, usual, method)) for name in FIELDS)]

    def on_cache(method: str, cache: str):
        usual = handlers.defaults(method, cache)
        return [gr.update(**_shown(name, usual, method)) for name in sorted(CACHE_FIELDS)]

    chooser.input(on_method, [chooser], [cache, *fields.values()], **quick)
    cache.input(on_cache, [chooser, cache], [fields[name] for name in sorted(CACHE_FIELDS)], **quick)
    return MethodBox(chooser, cache, fields)


def _shown(name: str, usual: dict[str, Any], method: str) -> dict[str, Any]:
    """Value, choices and visibility of a setting's component."""
    shown: dict[str, Any] = {"visible": name in usual, "value": _on_page(name, usual.get(name))}
    if name == "remasking":
        shown["choices"] = list(ALLOWED_REMASKING.get(method, ()))
    return shown


def _field(name: str, usual: dict[str, Any], method: str) -> gr.components.Component:
    kind, text = SETTINGS[name]
    info = re.split(r" \(|:|;", text)[0]
    width = max(150, 9 * len(name))  # pixels in which the label is not cut off on a phone
    shown: dict[str, Any] = {"label": name, "info": info, "min_width": width} | _shown(name, usual, method)
    if kind is bool:
        return gr.Checkbox(**shown | {"value": bool(shown["value"])})
    if kind is str:
        shown = {"choices": list(CHOICES.get(name, ()))} | shown | {"min_width": 200}
        return gr.Dropdown(**shown, filterable=False)
    return gr.Number(**shown)


def launch(
    page: gr.Blocks, *, host: str = "127.0.0.1", port: int | None = None, share: bool = False, **options
) -> Any:
    """Serves the page until it is interrupted, or as `options` of gradio's `launch` say."""
    theme = gr.themes.Default(font=FONTS, font_mono=MONO)
    return page.launch(
        server_name=host,
        server_port=port,
        share=share,
        theme=theme,
        css=CSS,
        footer_links=[],
        run_history=False,
        **options,
    )
