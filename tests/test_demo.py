"""The page of `d3llm demo`: its handlers in this process, and (slow) the page itself in a browser."""

import importlib.util
import json
import shutil
import sys
import threading
import time

import pytest
from late import Late
from official import tiny_tokenizer
from recorded import checkpoint

from d3llm_hf import cli
from d3llm_hf.hub.loading import load
from d3llm_hf.models.methods import CACHES, METHODS


pytestmark = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed")
gr, demo = Late("gradio"), Late("d3llm_hf.demo")
TOKENIZER = tiny_tokenizer()
QUIET = {"eos_token_id": 300, "pad_token_id": 300}  # no stop token: an answer has its full length


@pytest.fixture(autouse=True)
def no_generation_is_left():
    yield
    for thread in generating():
        thread.join(timeout=30)  # one that was stopped ends with the forward that it is in
    assert not generating()


def generating() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "stream_generate" and thread.is_alive()]


@pytest.fixture
def handlers():
    return demo.Handlers(checkpoint("llada-tiny-a"), TOKENIZER, "tiny")


def slowly(**settings):
    """One token a forward."""
    return {"decoding_method": "llada", "max_new_tokens": 12, "block_length": 4} | QUIET | settings


def test_a_run_shows_each_method_while_it_works_and_both_at_the_end(handlers, monkeypatch):
    monkeypatch.setattr("d3llm_hf.demo.REDRAW", 0.0)
    runs = [slowly(), slowly(decoding_method="fast_dllm", confidence_threshold=0.1)]
    shown = list(handlers.run("a", "one two", True, runs))
    assert [over for _, over in shown[0]] == [False]
    assert [trace.forwards for trace, _ in shown[:12][-1]] == [12]
    assert [over for _, over in shown[-1]] == [True, True]
    assert [trace.settings["decoding_method"] for trace, _ in shown[-1]] == ["llada", "fast_dllm"]
    assert shown[-1][0][0].forwards == 12
    assert "deciding, forward 1" in demo.picture(*shown[0][0])
    assert "tokens per forward" in demo.picture(*shown[-1][1])


@pytest.mark.full
def test_the_embedded_block_causal_checkpoint_is_shown_with_its_cache(monkeypatch):
    monkeypatch.setattr("d3llm_hf.demo.REDRAW", 0.0)
    handlers = demo.Handlers(*load("d3llm-block", device="cpu"), "d3llm-block")
    assert handlers.defaults("d3llm")["kv_cache"] == "exact"
    runs = [{"decoding_method": method, "max_new_tokens": 32} for method in ("d3llm", "d2f")]
    *_, shown = handlers.run("a", "Tom has 8 apples. He buys 7 more. How many has he now?", True, runs)
    assert [over for _, over in shown] == [True, True] and all(trace.forwards < 32 for trace, _ in shown)


def test_stop_ends_the_run_of_its_session_alone_and_keeps_what_was_decided(handlers, monkeypatch):
    monkeypatch.setattr("d3llm_hf.demo.REDRAW", 0.0)
    runs = {name: handlers.run(name, f"prompt {name}", False, [slowly(), slowly()]) for name in "ab"}
    for run in runs.values():
        next(run)
    handlers.sessions.stop("a")
    *_, [(trace, over)] = runs["a"]  # the second method does not begin
    assert over and trace.positions_computed is None and trace.prompt == "prompt a"
    *_, [(first, _), (second, _)] = runs["b"]
    assert (first.forwards, second.forwards, first.prompt) == (12, 12, "prompt b")
    assert list(handlers.run("a", "x", False, [slowly()])) == []  # stopped while it waited
    handlers.sessions.begin("a")
    assert len(list(handlers.run("a", "x", False, [slowly()]))) > 1


def test_a_stop_between_two_methods_closes_the_one_that_begins(handlers):
    closed = []
    recording = type("Recording", (), {"close": lambda self: closed.append(self)})()
    handlers.sessions.stop("a")
    handlers.sessions.enter("a", recording)
    assert closed == [recording]


def test_a_reader_who_leaves_ends_the_generation(handlers):
    run = handlers.run("a", "one two", False, [slowly(max_new_tokens=200)])
    next(run)
    run.close()
    assert not generating()


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        (" ", {}, "`prompt` must not be empty"),
        ("one", {"block_length": 2.5}, "`block_length` must be a positive integer (got 2.5)"),
        ("one", {"max_new_tokens": 0}, "`max_new_tokens`"),
        ("one", {"max_new_tokens": 10**6}, "must fit into"),
        ("one", {"remasking": "<b>"}, "(got '&lt;b&gt;')"),
    ],
)
def test_what_the_library_refuses_is_shown_in_its_words(handlers, prompt, settings, message):
    with pytest.raises(gr.Error) as caught:
        list(handlers.run("a", prompt, False, [slowly(**settings)]))
    assert message in caught.value.message
    assert not caught.value.print_exception


def test_settings_are_those_that_differ_from_what_goes_without_saying(handlers):
    for method in METHODS:
        for cache in CACHES:
            usual = handlers.defaults(method, cache)
            values = {name: demo._on_page(name, usual.get(name)) for name in demo.FIELDS}
            own = {} if cache == handlers.defaults(method)["kv_cache"] else {"kv_cache": cache}
            assert handlers.settings(method, cache, values) == {"decoding_method": method} | own
    given = dict.fromkeys(demo.FIELDS) | {"entropy_threshold": 1, "block_length": 8.0, "steps": 4, "early_stop": False}
    chosen = handlers.settings("d3llm", "none", given)
    assert chosen == {
        "decoding_method": "d3llm",
        "entropy_threshold": 1.0,
        "block_length": 8,
        "early_stop": False,
    }
    assert isinstance(chosen["entropy_threshold"], float) and isinstance(chosen["block_length"], int)
    assert handlers.shared(None, 0, None) == {"max_new_tokens": handlers.usual_length(), "do_sample": False}
    assert handlers.shared(5, 0.5, 3) == {"max_new_tokens": 5, "seed": 3, "do_sample": True, "temperature": 0.5}


def test_defaults_are_the_checkpoint_s_for_its_method_and_the_method_s_else(monkeypatch):
    model = checkpoint("dream-tiny-a")
    monkeypatch.setattr(model.generation_config, "decoding_method", "dparallel", raising=False)
    monkeypatch.setattr(model.generation_config, "block_length", 7, raising=False)
    monkeypatch.setattr(model.generation_config, "kv_cache", "delayed", raising=False)
    monkeypatch.setattr(model.generation_config, "cache_delay", 5, raising=False)
    handlers = demo.Handlers(model, TOKENIZER, "tiny")
    own = handlers.defaults("dparallel")
    assert (own["block_length"], own["entropy_threshold"], own["kv_cache"], own["cache_delay"]) == (
        7,
        0.45,
        "delayed",
        5,
    )
    other = handlers.defaults("d3llm")
    assert (other["block_length"], other["entropy_threshold"], other["kv_cache"]) == (32, 0.4, "none")
    assert handlers.defaults("d3llm", "delayed")["cache_delay"] == CACHES["delayed"]["cache_delay"]


def test_the_page_shows_the_settings_of_its_method_and_a_change_of_method_shows_others():
    page = demo.build(checkpoint("llada-tiny-a"), TOKENIZER, name="tiny")
    fields = {}
    for block in page.blocks.values():
        if getattr(block, "label", None) in demo.FIELDS:
            fields.setdefault(block.label, []).append(block)
    assert set(fields) == set(demo.FIELDS)
    assert [field.visible for field in fields["entropy_threshold"]] == [True, False]  # d3llm beside llada
    assert [field.visible for field in fields["cache_delay"]] == [False, False]
    functions = {}
    for function in page.fns.values():
        functions.setdefault(function.name, []).append(function.fn)
    cache, *updates = functions["on_method"][0]("dkv")
    shown = {name for name, update in zip(demo.FIELDS, updates, strict=True) if update["visible"]}
    assert cache["value"] == "dkv" and "exact" not in cache["choices"]
    common = {"early_stop", "cfg_scale", "suffix_length", "lookahead", "lookahead_threshold", "length"}
    assert shown == {"block_length", "steps", "remasking", "cache_delay", "cache_refresh_interval"} | common
    updates = functions["on_cache"][0]("d3llm", "vicinity")
    assert [update["visible"] for update in updates] == [False, True, True, True]
    request = type("Request", (), {"session_hash": "a"})()
    functions["begin"][0](False, request)
    box = ["llada", "none", *({"block_length": 4}.get(name) for name in demo.FIELDS)]
    *_, (found, slider, *_) = functions["decode"][0](request, "one", False, 6, 0, None, True, *box, *box)
    assert [trace.settings["block_length"] for trace in found] == [4, 4]
    assert slider["maximum"] == max(trace.forwards for trace in found)
    drawn = functions["step"][0](found, 1)
    assert all(text.count("<i></i>") == 5 for text in drawn)
    functions["begin"][0](False, request)
    bad = ["llada", "none", *({"block_length": -4}.get(name) for name in demo.FIELDS)]
    with pytest.warns(UserWarning, match="`block_length` must be a positive integer"):  # of gradio, without a browser
        *_, first, last = functions["decode"][0](request, "one", False, 6, 0, None, True, *box, *bad)
    assert "tokens per forward" in first[2] and 'role="alert">`block_length` must be' in first[3]
    assert len(last[0]) == 1
    functions["halt"][0](request)
    assert [update["interactive"] for update in functions["end"][0]()] == [True, False]


def test_the_command_builds_the_page_and_serves_it(official, monkeypatch, capsys):
    served = {}
    monkeypatch.setattr("gradio.Blocks.launch", lambda page, **options: served.update(options, page=page))
    monkeypatch.setattr("d3llm_hf.commands.demo.check_address", lambda *address: None)  # whatever listens there now
    argv = ["demo", str(official["llada"]), "--port", "7999", "--host", "0.0.0.0", "--concurrency", "3"]
    assert cli.main(argv) == 0
    assert (served["server_name"], served["server_port"], served["share"]) == ("0.0.0.0", 7999, False)
    assert [f.concurrency_limit for f in served["page"].fns.values() if f.name == "decode"] == [3]
    assert cli.main([*argv[:-1], "0"]) == 2
    assert "`--concurrency` must be a positive integer (got 0)" in capsys.readouterr().err


def test_without_gradio_the_command_says_how_to_get_it(official, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "d3llm_hf.demo")
    assert cli.main(["demo", str(official["llada"])]) == 2
    assert "needs gradio (got none installed). Run pip install 'd3llm-hf[demo]'" in capsys.readouterr().err


# ---- in a browser --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    own = shutil.which("chromium") or shutil.which("google-chrome")
    with api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=own, args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"no browser: {error.message.splitlines()[0]}")
        yield browser
        browser.close()


PACE = {"seconds": 0.02}  # that a forward takes at least, so that Stop and leaving come in time


@pytest.fixture(scope="module")
def address():
    """The page of the embedded checkpoint."""
    from d3llm_hf.hub.loading import load

    model, tokenizer = load("d3llm-llada", device="cpu")
    forward = type(model).forward

    def slow_forward(self, *args, **kwargs):
        time.sleep(PACE["seconds"])
        return forward(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "forward", slow_forward)
        patch.setenv("GRADIO_HEARTBEAT_INTERVAL", "0.5")
        page = demo.build(model, tokenizer, name="d3llm-llada")
        _, local, _ = demo.launch(page, quiet=True, prevent_thread_lock=True)
        yield local
        page.close()


QUESTION = "Tom has {} apples. He buys 7 more. He gives 4 to a friend. How many apples does Tom have now?"


def opened(browser, address: str, width: int = 1280):
    """The page in a session of its own; nothing may be asked of another server."""
    page = browser.new_context(viewport={"width": width, "height": 900}).new_page()
    page.set_default_timeout(120_000)
    page.foreign = []
    page.on("request", lambda request: None if is_local(request.url, address) else page.foreign.append(request.url))
    page.goto(address)
    page.wait_for_selector("#prompt textarea")
    return page


def is_local(url: str, address: str) -> bool:
    return url.startswith((address, "data:", "blob:", address.replace("http", "ws")))


def answer_of(page, which: str = "#canvas") -> str:
    page.wait_for_selector(f"{which} .d3-stats")
    return page.inner_text(f"{which} .d3-canvas")


def set_number(page, label: str, value: str) -> None:
    field = page.get_by_label(label, exact=False).first
    field.fill(value)
    field.press("Tab")


@pytest.mark.slow
def test_in_a_browser_a_user_types_runs_compares_slides_and_is_told_of_errors(browser, address):
    page = opened(browser, address)
    page.fill("#prompt textarea", QUESTION.format(8))
    page.click("label:has-text('Compare with')")
    page.click("#run")
    assert "11" in answer_of(page)
    assert "11" in answer_of(page, "#second-canvas")
    slider = page.locator("#forward input[type=range]")
    slider.wait_for()
    last = int(slider.get_attribute("max"))
    assert last > 7
    slider.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("#second-canvas i")
    assert page.locator("#second-canvas i:visible").count() > 20
    page.wait_for_selector("#run:enabled")
    set_number(page, "entropy_threshold", "-1")
    set_number(page, "New tokens", "0")
    page.click("#run")
    page.wait_for_selector("#canvas [role=alert]")
    assert "max_new_tokens" in page.inner_text("#canvas [role=alert]")
    page.wait_for_selector("#run:enabled")
    assert page.foreign == []
    page.context.close()


@pytest.mark.slow
def test_two_users_at_once_do_not_mix_and_who_leaves_or_stops_ends_only_his_own(browser, address, monkeypatch):
    pages = [opened(browser, address, width) for width in (390, 1280)]
    for count, page in zip((8, 20), pages, strict=True):
        page.fill("#prompt textarea", QUESTION.format(count))
    for page in pages:
        page.click("#run")
    answers = [answer_of(page) for page in pages]
    assert [(right in answer) for answer in answers for right in ("11", "23")] == [True, False, False, True]
    assert pages[0].evaluate("document.documentElement.scrollWidth") <= 390
    for page in pages:
        page.wait_for_selector("#run:enabled")
        set_number(page, "entropy_threshold", "-1")  # one token a forward
    monkeypatch.setitem(PACE, "seconds", 2.0)
    for page in pages:
        page.click("#run")
        page.get_by_text("deciding, forward").wait_for()
    pages[0].context.close()
    deadline = time.monotonic() + 60
    while len(generating()) > 1 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert len(generating()) == 1
    pages[1].click("#stop")
    answer_of(pages[1])
    assert "stopped" in pages[1].inner_text("#canvas .d3-stats")
    pages[1].context.close()


def test_the_form_tab_fills_a_schema_and_says_what_is_wrong_with_one(handlers):
    schema = '{"type": "object", "properties": {"a": {"type": "integer", "minimum": 3, "maximum": 12}}}'
    for prompt in ("one", ""):
        text, counts = handlers.fill(prompt, schema, "d3llm")
        assert 3 <= json.loads(text)["a"] <= 12
        assert counts.endswith(" forwards")
    for wrong, message in ((schema[:-1], "`schema` must be JSON"), ("{}", "`schema.type` must be one of")):
        with pytest.raises(gr.Error, match=message):
            handlers.fill("one", wrong, "d3llm")
