"""Streamers for people and programs: what they give out is final, whole, in order, and it always ends."""

import gc
import io
import re
import threading

import pytest
import torch
from official import tiny_tokenizer
from recorded import checkpoint
from terminals import Terminal
from thin import some_of
from tiny import ScriptedModel, attributes, same_attributes
from transformers import TextStreamer

import d3llm_hf
from d3llm_hf import BatchTextStreamer, CanvasIterator, CanvasUpdate, stream_generate
from d3llm_hf.watch.row_text import RowText
from d3llm_hf.watch.streamers import StreamClosed, _leave


TOKENIZER = tiny_tokenizer()  # one token a byte
MASK, END = 511, 510
PATIENCE = 60  # seconds after which a test fails rather than hangs
TEXTS = [
    "One line",
    "né 中文 👩\u200d💻\na  b\n",
    "",
    "日本語\n\nend ",
]
ORDERS = {
    "left to right": lambda count: torch.arange(count, 0, -1),
    "right to left": lambda count: torch.arange(count),
    "anyhow": lambda count: torch.randperm(count, generator=torch.Generator().manual_seed(0)),
}


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors are slower on many threads, and sums in one order are the same in every thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not generating()


def generating() -> list[threading.Thread]:
    """Threads that were started here or by `stream_generate`, and live."""
    return [thread for thread in threading.enumerate() if thread.name in ("stream_generate", "test_streamers")]


class Writer(ScriptedModel):
    """Writes `texts[r]` after the prompt `[r]`, one token a forward; `on_call(n)` runs in forward n."""

    def __init__(self, texts: list[str], order: str = "anyhow", on_call=None):
        tokens = [TOKENIZER(text)["input_ids"] for text in texts]
        self.length = max(map(len, tokens)) + 1
        answers = torch.tensor([row + [END] * (self.length - len(row)) for row in tokens])
        sureness = 5 + ORDERS[order](self.length) / self.length

        def script(ids: torch.Tensor) -> torch.Tensor:
            if on_call is not None:
                on_call(self.calls)
            logits = torch.nn.functional.one_hot(answers[ids[:, 0]], 512) * sureness[:, None]
            return torch.cat([torch.zeros(len(ids), 1, 512), logits], dim=1)[:, : ids.shape[1]]

        super().__init__(script, vocab_size=512)
        self.prompts = torch.arange(len(texts))[:, None]

    def settings(self, **chosen) -> dict:
        defaults = {
            "inputs": self.prompts,
            "max_new_tokens": self.length,
            "decoding_method": "llada",
            "steps": self.length,
            "block_length": self.length,
            "early_stop": True,
            "eos_token_id": END,
            "pad_token_id": END,
        }
        return defaults | chosen

    def write(self, **chosen):
        return self.generate(**self.settings(**chosen))

    def stream(self, **chosen):
        return stream_generate(self, TOKENIZER, **({"timeout": PATIENCE} | self.settings(**chosen)))


class Pieces(BatchTextStreamer):
    """Keeps what is final instead of printing it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.pieces: list[tuple[str, int, bool]] = []

    def on_finalized_text(self, text, row, row_end=False):
        self.pieces.append((text, row, row_end))

    def of(self, row: int) -> list[str]:
        return [text for text, index, _ in self.pieces if index == row]


def own_length(text: str) -> int:
    """Tokens of a text before its stop token."""
    return len(TOKENIZER(text)["input_ids"])


def printed_rows(shown: str, count: int) -> list[str]:
    """The text of each row, put together again from the printed lines by their marks."""
    rows = [[] for _ in range(count)]
    for line in shown.splitlines():
        index, mark, text = re.fullmatch(r"\[(\d)\]([ +])(.*)", line).groups()
        lines = rows[int(index)]
        if mark == "+":
            lines[-1] += text
        else:
            lines.append(text)
    return ["\n".join(lines) for lines in rows]


# ---- text in pieces ------------------------------------------------------------------------------------------------


class StubTokenizer:
    """Decodes ids to `pieces`, then rewrites the text as some tokenizers do."""

    mask_token_id = pad_token_id = None

    def __init__(self, pieces: list[str], rewrite=lambda text: text, clean_up: bool = False):
        self.pieces, self.rewrite, self.clean_up_tokenization_spaces = pieces, rewrite, clean_up

    def decode(self, ids, **kwargs):
        return self.rewrite("".join(self.pieces[index] for index in ids))


def pieces_of(tokenizer, ids: list[int], **kwargs) -> list[str]:
    text = RowText(tokenizer, {}, **kwargs)
    return [*(text.add([token]) for token in ids), text.finish()]


@pytest.mark.parametrize("by_word", [False, True])
def test_pieces_never_hold_half_a_character_and_join_to_the_text(by_word):
    for text in TEXTS:
        pieces = pieces_of(TOKENIZER, TOKENIZER(text)["input_ids"], by_word=by_word)
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_never_become_a_character_are_shown_at_the_end_or_when_another_character_follows():
    half = TOKENIZER("中")["input_ids"][:2]
    letter = TOKENIZER("a")["input_ids"]
    assert pieces_of(TOKENIZER, half, by_word=False) == ["", "", "\ufffd"]
    assert pieces_of(TOKENIZER, half + letter, by_word=False) == ["", "", "\ufffda", ""]


def test_words_are_given_whole_and_lines_and_wide_letters_at_once():
    stub = StubTokenizer(["He", "llo", " wor", "ld", "\n", "中", "a", " b"])
    assert pieces_of(stub, range(8), by_word=True) == ["", "", "Hello", "", " world\n", "中", "", "a", " b"]
    assert pieces_of(stub, range(8), by_word=False) == ["He", "llo", " wor", "ld", "\n", "中", "a", " b", ""]


def test_a_space_that_clean_up_takes_back_was_not_given():
    def clean_up(text: str) -> str:
        return text.replace(" .", ".").replace(" ' ", "'")

    stub = StubTokenizer(["Yes", " ", ".", " It", " '", " s", " fine", " ."], clean_up)
    pieces = pieces_of(stub, range(8), by_word=True)
    assert "".join(pieces) == "Yes. It's fine." == stub.decode(range(8))


def test_a_decoder_that_shows_a_whole_run_of_bytes_as_unfinished_waits_for_the_run():
    def fallback(text: str) -> str:
        try:
            return text.encode("latin-1").decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(text)

    stub = StubTokenizer([chr(byte) for byte in range(256)], fallback)
    pieces = pieces_of(stub, list("né中".encode()), by_word=False)
    assert pieces == ["n", "", "é", "", "", "中", ""]


# ---- people --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_the_printed_text_of_each_row_is_its_decoded_answer(order):
    streamer, out = Pieces(TOKENIZER, skip_special_tokens=True), io.StringIO()
    model = Writer(TEXTS, order)
    model.write(streamer=streamer)
    model.write(streamer=BatchTextStreamer(TOKENIZER, stream=out, skip_special_tokens=True))
    assert ["".join(streamer.of(row)) for row in range(4)] == TEXTS
    assert printed_rows(out.getvalue(), 4) == [text.removesuffix("\n") for text in TEXTS]
    ends = [row for _, row, row_end in streamer.pieces if row_end]
    assert sorted(ends) == [0, 1, 2, 3]
    assert all(text or row_end for text, _, row_end in streamer.pieces)


def test_special_tokens_are_printed_unless_they_are_skipped():
    streamer = Pieces(TOKENIZER)
    Writer(TEXTS).write(streamer=streamer)
    assert ["".join(streamer.of(row)) for row in range(4)] == [text + "<|end|>" for text in TEXTS]


@pytest.mark.every(3)
@pytest.mark.parametrize("skip_prompt", [True, False])
@pytest.mark.parametrize("row", [0, 1, 3])
def test_one_row_is_printed_as_the_streamer_of_transformers_does(row, skip_prompt, capsys):
    model = Writer(TEXTS, "left to right")
    printed = []
    for kind in (TextStreamer, BatchTextStreamer):
        streamer = kind(TOKENIZER, skip_prompt=skip_prompt, skip_special_tokens=True)
        model.write(inputs=torch.tensor([[row]]), streamer=streamer)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert printed[0].endswith(TEXTS[row] + "\n")


def test_a_printed_line_holds_one_row_and_says_whether_it_goes_on():
    out = io.StringIO()
    streamer = BatchTextStreamer(
        StubTokenizer(["First", " we", " add\n", "Tom", " has", " 8", "\n", "So"]), stream=out
    )
    streamer.put(torch.tensor([[0], [0]]))
    for row, tokens in [(0, [0, 1]), (1, [3, 4, 5]), (0, [2]), (1, [6, 6]), (0, [7])]:
        streamer.put(torch.tensor(tokens), row=row)
    streamer.end_row(1)
    streamer.end()
    assert out.getvalue() == "[0] First\n[1] Tom has\n[0]+ we add\n[1]+ 8\n[1] \n[0] So\n"


def test_prompts_of_a_batch_are_printed_without_their_padding():
    streamer = Pieces(TOKENIZER, skip_prompt=False)
    a, b = TOKENIZER("a")["input_ids"][0], TOKENIZER("b")["input_ids"][0]
    streamer.put(torch.tensor([[END, END, a], [b, END, b]]))
    streamer.end()
    assert ["".join(streamer.of(row)) for row in range(2)] == ["a", "b<|end|>b"]
    streamer.put(torch.tensor([[END, a]]))  # one row as transformers' streamer has it
    streamer.end()
    assert "".join(streamer.of(0)) == "a<|end|>a"


def test_a_terminal_is_not_steered_by_what_a_model_writes():
    for out, shown in ((Terminal(), "a[2Jb\n"), (io.StringIO(), "a\x1b[2Jb\n")):
        streamer = BatchTextStreamer(TOKENIZER, stream=out)
        streamer.put(torch.tensor([[0]]))
        streamer.put(torch.tensor(TOKENIZER("a\x1b[2Jb")["input_ids"]), row=0)
        streamer.end()
        assert out.getvalue() == shown


def test_what_was_held_back_is_printed_when_the_generation_fails_and_the_streamer_serves_the_next_call():
    def on_call(count: int) -> None:
        if count == 10:
            raise RuntimeError("out of luck")

    out = io.StringIO()
    streamer = BatchTextStreamer(TOKENIZER, stream=out, skip_special_tokens=True)
    with pytest.raises(RuntimeError, match="out of luck"):
        Writer(["words and more", "other words"], "left to right", on_call).write(streamer=streamer)
    assert printed_rows(out.getvalue(), 2) == ["words and", "other wor"]
    out.truncate(out.seek(0))
    Writer(TEXTS[:2]).write(streamer=streamer)
    assert printed_rows(out.getvalue(), 2) == ["One line", TEXTS[1][:-1]]


@pytest.mark.parametrize("make", [BatchTextStreamer, CanvasIterator])
def test_tokens_without_their_row_are_refused(make):
    streamer = make(TOKENIZER)
    streamer.put(torch.tensor([[1], [2]]))
    with pytest.raises(ValueError, match="`row` must be given"):
        streamer.put(torch.tensor([1, 2]))


# ---- programs ------------------------------------------------------------------------------------------------------


@pytest.mark.every(3)
@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_updates_join_to_the_answers_and_drafts_show_every_undecided_position(order, early_stop):
    stream = Writer(TEXTS, order).stream(early_stop=early_stop, mask_text="_")
    updates, drafts = list(stream), 0
    for row, text in enumerate(TEXTS):
        own = [update for update in updates if update.row == row]
        assert "".join(update.text for update in own) == text
        assert [t for update in own for t in update.tokens] == [*TOKENIZER(text)["input_ids"], END]
        assert [update.finished for update in own] == [False] * (len(own) - 1) + [True]
        assert own[-1].draft is None
        for step, update in enumerate(own, start=1):
            if update.draft is None:
                break
            drafts += 1
            undecided = [not 0 < decided <= step for decided in stream.output.step_map[row].tolist()]
            ends = [index for index in range(own_length(text), len(undecided)) if not undecided[index]]
            assert update.draft.count("_") == sum(undecided[: min(ends, default=len(undecided))])
    assert drafts


def test_a_draft_is_the_text_that_would_follow_if_the_canvas_stayed_as_it_is():
    updates = CanvasIterator(TOKENIZER, mask_text="_", timeout=PATIENCE)
    [n, first, second, e, t] = TOKENIZER("néet")["input_ids"]
    updates.put(torch.tensor([[7]]))
    updates.put(torch.tensor([n, first]), row=0)
    updates.put_draft(torch.tensor([second, MASK, MASK, e, MASK, t]), row=0)
    updates.end_step()
    updates.put_draft(value=torch.tensor([MASK, first, MASK]), row=0)
    updates.end_step()
    updates.put(torch.tensor([second, e]), row=0)
    updates.end_row(0)
    updates.end_step()
    updates.end()
    assert list(updates) == [
        CanvasUpdate(0, "n", "é__e_t", [n, first], False, [second, MASK, MASK, e, MASK, t]),
        CanvasUpdate(0, "", "\ufffd_\ufffd_", [], False, [MASK, first, MASK]),
        CanvasUpdate(0, "ée", None, [second, e], True),
    ]


def test_a_draft_behind_text_that_was_rewritten_is_decoded_by_itself():
    stub = StubTokenizer(["Yes", "!", "\x00"], lambda text: text.replace("s!", "S!"))
    text = RowText(stub, {}, by_word=False)
    assert text.add([0]) == "Yes"
    assert text.draft([1, 2, 1], 2, "_") == "!_!"


def test_a_tokenizer_that_cleans_up_spaces_gets_whole_words():
    stub = StubTokenizer(["Yes", " ", "."], lambda text: text.replace(" .", "."), clean_up=True)
    for kwargs, texts in (({}, ["", "Yes", "."]), ({"clean_up_tokenization_spaces": False}, ["Yes", " ", ""])):
        updates = CanvasIterator(stub, mask_token_id=9, timeout=PATIENCE, **kwargs)
        updates.put(torch.tensor([[0]]))
        for token in range(3):
            updates.put(torch.tensor([token]), row=0)
            if token == 2:
                updates.end_row(0)
            updates.end_step()
        updates.end()
        assert [update.text for update in updates] == texts


def test_updates_wait_for_their_reader_who_may_come_late_and_ask_again():
    updates = CanvasIterator(TOKENIZER, timeout=PATIENCE, skip_special_tokens=True)
    Writer(TEXTS).write(streamer=updates)  # nobody reads meanwhile
    assert "".join(update.text for update in updates if update.row == 1) == TEXTS[1]
    assert list(updates) == []


def run_in_thread(function) -> tuple[threading.Thread, list[BaseException]]:
    """Runs `function` as a reader of the documentation would; keeps what it raises."""
    raised: list[BaseException] = []

    def guarded() -> None:
        try:
            function()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=guarded, name="test_streamers", daemon=True)
    thread.start()
    return thread, raised


@pytest.mark.parametrize(
    "wrong",
    [{"block_lenght": 4}, {"max_new_tokens": 10**6}, {"steps": 0}, {"num_beams": 3}],
    ids=["unknown", "long", "value", "mode"],
)
def test_the_reader_gets_the_error_of_a_generation_in_a_thread_that_never_started(wrong):
    model, updates = Writer(TEXTS), CanvasIterator(TOKENIZER, timeout=PATIENCE)
    thread, raised = run_in_thread(lambda: model.write(streamer=updates, **wrong))
    with pytest.raises(ValueError) as error:
        next(updates)
    thread.join(PATIENCE)
    assert raised == [error.value] and model.calls == 0
    assert list(updates) == []


def test_a_reader_that_closes_stops_the_generation_at_its_next_forward_and_the_model_works_on():
    reached, go_on = threading.Event(), threading.Event()

    def on_call(count: int) -> None:
        if count == 3:
            reached.set()
            assert go_on.wait(PATIENCE)

    model = Writer(TEXTS, on_call=on_call)
    before = attributes(model)
    with CanvasIterator(TOKENIZER, timeout=PATIENCE) as updates:
        thread, raised = run_in_thread(lambda: model.write(streamer=updates))
        next(updates)
        assert reached.wait(PATIENCE)
    go_on.set()
    thread.join(PATIENCE)
    assert [type(error) for error in raised] == [StreamClosed]
    assert model.calls == 3
    assert list(updates) == []
    model.calls = 0
    assert same_attributes(before, attributes(model))
    assert torch.equal(model.write(), Writer(TEXTS).write())


def test_a_reader_that_closes_first_stops_the_generation_before_its_first_forward():
    model, updates = Writer(TEXTS), CanvasIterator(TOKENIZER)
    updates.close()
    updates.close()
    with pytest.raises(StreamClosed, match="has closed it"):
        model.write(streamer=updates)
    assert model.calls == 0 and list(updates) == []


def test_closing_wakes_a_reader_in_another_thread():
    updates = CanvasIterator(TOKENIZER, timeout=PATIENCE)
    thread, raised = run_in_thread(lambda: list(updates))
    updates.close()
    thread.join(PATIENCE)
    assert not thread.is_alive() and not raised


def test_a_reader_that_waits_too_long_is_told_and_may_go_on():
    updates = CanvasIterator(TOKENIZER, timeout=0.01)
    with pytest.raises(TimeoutError, match=r"`timeout` must be longer .*got 0\.01 s"):
        next(updates)
    updates.end()
    assert list(updates) == []


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "5"])
def test_a_timeout_that_is_no_time_is_refused(timeout):
    with pytest.raises(ValueError, match="`timeout` must be a positive number"):
        CanvasIterator(TOKENIZER, timeout=timeout)


def test_a_canvas_without_a_mask_token_is_refused():
    with pytest.raises(ValueError, match="`mask_token_id` must be given"):
        CanvasIterator(StubTokenizer(["a"]))


# ---- a thread of its own -------------------------------------------------------------------------------------------


@pytest.mark.every(3)
@pytest.mark.parametrize("chosen", [{}, {"kv_cache": "delayed", "cache_delay": 1}, {"decoding_method": "dparallel"}])
def test_a_streamed_generation_is_the_unstreamed_one(chosen):
    model = checkpoint("llada-tiny-a")
    ids = torch.tensor([TOKENIZER(text)["input_ids"] for text in ("abcdef", "uvwxyz", "012345")])
    settings = {"inputs": ids, "max_new_tokens": 24, "block_length": 8, "eos_token_id": END, "pad_token_id": END}
    expected = model.generate(**settings, **chosen, return_dict_in_generate=True)
    stream = stream_generate(model, TOKENIZER, timeout=PATIENCE, **settings, **chosen)
    assert stream.output is None
    updates = list(stream)
    for name in ("sequences", "step_map", "num_forwards"):
        assert torch.equal(stream.output[name], expected[name])
    for row in range(3):
        text = "".join(update.text for update in updates if update.row == row)
        assert text == TOKENIZER.decode(expected.sequences[row, 6:], skip_special_tokens=True)
    tensor = stream_generate(model, TOKENIZER, timeout=PATIENCE, return_dict_in_generate=False, **settings, **chosen)
    assert list(tensor) == updates and torch.equal(tensor.output, expected.sequences)


def test_the_reader_gets_the_error_of_refused_arguments_and_no_thread_is_left():
    model = Writer(TEXTS)
    stream = model.stream(block_lenght=4)
    with pytest.raises(ValueError, match="block_length"):
        next(stream)
    assert list(stream) == [] and stream.output is None and model.calls == 0


def test_the_reader_gets_an_error_behind_the_updates_before_it():
    def on_call(count: int) -> None:
        if count == 4:
            raise RuntimeError("out of luck")

    updates = []
    with pytest.raises(RuntimeError, match="out of luck"):
        for update in Writer(["some words"], on_call=on_call).stream():
            updates.append(update)
    assert len(updates) == 3


def test_a_model_whose_generate_fails_by_itself_does_not_leave_the_reader_waiting():
    class Other:
        config = generation_config = None

        def generate(self, **kwargs):
            raise KeyError("no such thing")

    with pytest.raises(KeyError, match="no such thing"):
        next(stream_generate(Other(), TOKENIZER, timeout=PATIENCE))


def leave_by_break(model):
    for _ in model.stream():
        break


def leave_by_exception(model):
    with pytest.raises(RuntimeError, match="the reader has enough"):
        for _ in model.stream():
            raise RuntimeError("the reader has enough")


def leave_by_with(model):
    with model.stream() as stream:
        next(stream)
    assert list(stream) == [] and stream.output is None


def leave_by_close(model):
    stream = model.stream()
    next(stream)
    stream.close()
    stream.close()


def leave_in_a_cycle(model):
    holder = [model.stream()]
    holder.append(holder)
    next(holder[0])


WAYS = [leave_by_break, leave_by_exception, leave_by_with, leave_by_close, leave_in_a_cycle]


@pytest.mark.every(2)
@pytest.mark.parametrize("leave", some_of(WAYS, every=4))
def test_a_reader_that_leaves_ends_the_thread_and_the_model_is_as_it_was(leave):
    # Forwards wait for the reader, who takes one update: what comes after it is stopped.
    seen = threading.Semaphore(3)
    model = Writer(TEXTS, on_call=lambda count: seen.acquire(timeout=0.2))
    expected, before = Writer(TEXTS).write(), attributes(model)
    leave(model)
    gc.collect()  # pytest's own traceback, or a cycle, may still hold the stream
    assert not generating()
    assert model.calls < model.length
    model.calls = 0
    assert same_attributes(before, attributes(model))
    seen.release(10_000)
    assert torch.equal(model.write(), expected)


def test_garbage_that_is_collected_in_the_thread_itself_does_not_wait_for_itself():
    updates = CanvasIterator(TOKENIZER)
    _leave(updates, threading.current_thread())
    assert list(updates) == []


def test_reading_goes_on_after_a_timeout():
    go_on = threading.Event()
    stream = Writer(["words"], on_call=lambda count: go_on.wait(PATIENCE)).stream(timeout=0.05)
    with pytest.raises(TimeoutError):
        next(stream)
    go_on.set()
    text = ""
    while stream.output is None:
        try:
            text += next(stream, CanvasUpdate(0, "", None, [], True)).text
        except TimeoutError:
            continue
    assert text == "words"


def test_stop_strings_find_the_tokenizer():
    stream = Writer(["one two three"], "left to right").stream(stop_strings=["two"])
    assert "".join(update.text for update in stream) == "one two"


@pytest.mark.parametrize("place", ["argument", "generation config", "model"])
def test_the_mask_token_is_the_one_that_generate_finds(place):
    tokenizer = tiny_tokenizer()
    tokenizer.mask_token = None
    model, chosen = Writer(["words"], "right to left"), {}
    if place != "model":
        model.config.mask_token_id = None
        config = d3llm_hf.D3LLMGenerationConfig(mask_token_id=MASK)
        chosen = {"mask_token_id": MASK} if place == "argument" else {"generation_config": config}
    updates = list(stream_generate(model, tokenizer, timeout=PATIENCE, mask_text="_", **model.settings(**chosen)))
    assert [update.draft for update in updates][:3] == ["_____", "____s", "___ds"]


def test_a_streamer_besides_its_own_is_refused():
    with pytest.raises(ValueError, match=r"`streamer` is what `stream_generate` makes itself \(got TextStreamer\)"):
        Writer(TEXTS).stream(streamer=TextStreamer(TOKENIZER))
