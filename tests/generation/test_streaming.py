"""Streamed text is the final text, piece by piece, whatever order the tokens were decided in."""

import asyncio
import inspect
import sys
import threading

import pytest
import torch
from official import tiny_tokenizer
from recorded import checkpoint, recorded_cases
from thin import covering
from tiny import (
    EOS,
    MASK,
    PAD,
    ScriptedModel,
    answer,
    attributes,
    left_padded,
    same_attributes,
    tables,
    tiny_model,
    tiny_prompt,
    trained_like,
)
from transformers import TextIteratorStreamer, TextStreamer
from transformers.generation import GenerationMixin, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import AsyncTextIteratorStreamer, BaseStreamer, TextDiffusionStreamer

from d3llm_hf.models.streaming import Stream


METHODS = {
    "d3llm": {"decoding_method": "d3llm", "block_length": 5, "entropy_threshold": 0.8},
    "d3llm, delayed cache": {"decoding_method": "d3llm", "block_length": 4, "kv_cache": "delayed", "cache_delay": 1},
    "dparallel": {"decoding_method": "dparallel", "block_length": 5, "entropy_threshold": 0.8},
    "llada": {"decoding_method": "llada", "block_length": 5, "steps": 8},
    "dream": {"decoding_method": "dream", "steps": 8},
}
PROMPTS = {
    family: [list(case.prompt) for case in recorded_cases() if case.model == f"{family}-tiny-a"][:1]
    for family in ("llada", "dream")
}


class Recorder(BaseStreamer):
    """Keeps what it is given; `fail_at` makes the put of that number raise."""

    def __init__(self, fail_at: int | None = None):
        self.pieces: list[list[int]] = []
        self.ends = 0
        self.fail_at = fail_at

    def put(self, value):
        self.pieces.append(value.flatten().tolist())
        if len(self.pieces) == self.fail_at:
            raise RuntimeError("the reader is gone")

    def end(self):
        self.ends += 1

    @property
    def text(self) -> list[int]:
        return [token for piece in self.pieces for token in piece]


class DraftRecorder(Recorder):
    """Also keeps drafts, each with the tokens that were confirmed before it."""

    def __init__(self):
        super().__init__()
        self.drafts: list[tuple[list[int], list[int]]] = []

    def put_draft(self, value, **kwargs):
        self.drafts.append((self.text, value.flatten().tolist()))


def final_text(output, prompt: list[int]) -> list[int]:
    """Prompt and answer up to and with the first stop token: what was decided, not what was filled in."""
    tokens = output.sequences[0].tolist()
    stop = [index for index, token in enumerate(tokens) if index >= len(prompt) and token == 30]
    return tokens[: stop[0] + 1] if stop else tokens


@pytest.mark.every(6)
@pytest.mark.parametrize("family, method, early_stop", covering(["llada", "dream"], METHODS, [True, False]))
def test_the_streamed_pieces_are_the_prompt_and_then_the_answer_up_to_its_stop_token(family, method, early_stop):
    for seed in range(4):
        prompt, streamer = tiny_prompt(seed, 4), Recorder()
        output = answer(
            trained_like(family),
            prompt,
            streamer=streamer,
            early_stop=early_stop,
            max_new_tokens=13,
            **METHODS[method],
        )
        assert streamer.pieces[0] == prompt
        assert streamer.text == final_text(output, prompt)
        assert streamer.ends == 1


@pytest.mark.every(6)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_a_draft_never_takes_back_a_decided_token(family, method):
    for seed in range(4):
        prompt, streamer = tiny_prompt(seed, 4), DraftRecorder()
        output = answer(trained_like(family), prompt, streamer=streamer, early_stop=True, **METHODS[method])
        final = final_text(output, prompt)
        assert streamer.text == final and streamer.drafts
        for confirmed, draft in streamer.drafts:
            assert len(confirmed) + len(draft) == len(prompt) + 16
            shown = (confirmed + draft)[: len(final)]
            assert all(token in (MASK, decided) for token, decided in zip(shown, final, strict=False))


def test_streaming_does_not_change_the_answer():
    for method in METHODS.values():
        with_streamer = answer(trained_like("dream"), [1, 2, 3], streamer=DraftRecorder(), **method)
        without = answer(trained_like("dream"), [1, 2, 3], **method)
        assert torch.equal(with_streamer.sequences, without.sequences)
        assert torch.equal(with_streamer.step_map, without.step_map)


def test_a_streamer_is_refused_for_a_batch_before_any_forward():
    model, streamer = ScriptedModel(lambda ids: tables(1, ids.shape[1])), Recorder()
    for call in (model.generate, lambda *args, **kwargs: GenerationMixin.generate(model, *args, **kwargs)):
        with pytest.raises(ValueError, match=r"one row \(got 3 with Recorder\)\. Pass `d3llm_hf\.BatchTextStreamer`"):
            call(torch.tensor([[1], [2], [3]]), streamer=streamer, max_new_tokens=4)
    assert model.calls == 0 and streamer.ends == 1


@pytest.mark.parametrize("fail_at", [1, 2, 3])
def test_an_exception_of_the_streamer_passes_through_and_the_next_call_works(fail_at):
    model = trained_like("llada")
    chosen = {"block_length": 4, "block_add_threshold": 1.0, "entropy_threshold": 0.0}
    expected = answer(model, [1, 2, 3], **chosen).sequences
    before, streamer = attributes(model), Recorder(fail_at)
    with pytest.raises(RuntimeError, match="the reader is gone"):
        answer(model, [1, 2, 3], streamer=streamer, **chosen)
    assert len(streamer.pieces) == fail_at and streamer.ends <= 1
    assert same_attributes(before, attributes(model))
    assert torch.equal(answer(model, [1, 2, 3], **chosen).sequences, expected)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_text_streamers_print_the_decoded_answer(family, capsys):
    model, tokenizer, prompt = checkpoint(f"{family}-tiny-a"), tiny_tokenizer(), PROMPTS[family][0]
    output = answer(
        model,
        prompt,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        eos_token_id=510,
        pad_token_id=510,
    )
    expected = tokenizer.decode(output.sequences[0, len(prompt) :], skip_special_tokens=True)
    assert expected and capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_a_text_iterator_yields_the_answer_to_another_thread_and_ends(family):
    model, tokenizer, prompt = checkpoint(f"{family}-tiny-a"), tiny_tokenizer(), PROMPTS[family][0]
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    outputs = []
    thread = threading.Thread(
        target=lambda: outputs.append(answer(model, prompt, streamer=streamer, eos_token_id=510, pad_token_id=510))
    )
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(outputs[0].sequences[0, len(prompt) :], skip_special_tokens=True)


def test_a_text_iterator_ends_when_decoding_fails():
    model = ScriptedModel(lambda ids: torch.full((*ids.shape, 32), float("nan")))
    streamer = TextIteratorStreamer(tiny_tokenizer(), skip_prompt=True, timeout=60)
    with pytest.raises(ValueError, match="finite"):
        answer(model, [1, 2], streamer=streamer)
    assert "".join(streamer) == ""


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_the_diffusion_streamer_shows_drafts_and_leaves_the_answer(family, capsys):
    model, tokenizer, prompt = checkpoint(f"{family}-tiny-a"), tiny_tokenizer(), PROMPTS[family][0]
    streamer = TextDiffusionStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = answer(model, prompt, streamer=streamer, eos_token_id=510, pad_token_id=510, entropy_threshold=0.0)
    shown = capsys.readouterr().out
    assert "\033[33m" in shown  # a draft, in yellow
    kept = "".join(part.split("\033[J")[-1] for part in shown.split("\0337"))
    expected = tokenizer.decode(output.sequences[0, len(prompt) :], skip_special_tokens=True)
    assert kept.strip("\n") == expected


@pytest.mark.skipif(sys.version_info < (3, 11), reason="transformers' streamer uses asyncio.timeout")
def test_an_asynchronous_iterator_yields_the_answer():
    model, tokenizer, prompt = checkpoint("llada-tiny-a"), tiny_tokenizer(), PROMPTS["llada"][0]
    outputs = []

    async def read() -> str:
        streamer = AsyncTextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
        thread = threading.Thread(
            target=lambda: outputs.append(answer(model, prompt, streamer=streamer, eos_token_id=510, pad_token_id=510))
        )
        thread.start()
        text = "".join([piece async for piece in streamer])
        thread.join()
        return text

    text = asyncio.run(read())
    assert text and text == tokenizer.decode(outputs[0].sequences[0, len(prompt) :], skip_special_tokens=True)


# ---- batches -------------------------------------------------------------------------------------------------------


class BatchRecorder:
    """Keeps every call in order, as `(method, row, tokens or error)`; `fail_in` names a method that raises."""

    supports_batch = True

    def __init__(self, fail_in: str | None = None):
        self.calls: list[tuple[str, int | None, object]] = []
        self.fail_in = fail_in

    def note(self, method: str, row: int | None = None, value=None) -> None:
        self.calls.append((method, row, value))
        if method == self.fail_in:
            raise RuntimeError("the reader is gone")

    def put(self, value, row=None):
        self.note("prompts" if row is None else "put", row, value.tolist())

    def put_draft(self, value, row):
        self.note("draft", row, value.tolist())

    def end_row(self, row):
        self.note("end_row", row)

    def end_step(self):
        self.note("end_step")

    def fail(self, error):
        self.note("fail", None, error)

    def end(self):
        self.note("end")

    def of(self, row: int) -> list[tuple[str, object]]:
        return [(method, value) for method, index, value in self.calls if index == row]

    def names(self) -> list[str]:
        return [method for method, _, _ in self.calls]


class Plain:
    """The least that a batch-aware streamer must have."""

    supports_batch = True

    def __init__(self):
        self.rows: dict[int | None, list[int]] = {}
        self.ends = 0

    def put(self, value, row=None):
        self.rows.setdefault(row, []).extend(value.flatten().tolist())

    def end(self):
        self.ends += 1


STOPS = [EOS, 4, 8, 12, 16]  # several, so that rows end at unequal lengths
BATCH = [tiny_prompt(1, 2), tiny_prompt(2, 7), tiny_prompt(3, 4)]


def generate(model, prompts=BATCH, **chosen):
    defaults = {"max_new_tokens": 13, "return_dict_in_generate": True, "eos_token_id": STOPS, "pad_token_id": PAD}
    return model.generate(**left_padded(prompts), **(defaults | chosen))


def final_rows(output, width: int) -> list[list[int]]:
    """Each row's answer up to and with its first stop token."""
    rows = []
    for tokens in output.sequences[:, width:].tolist():
        stop = next((index for index, token in enumerate(tokens) if token in STOPS), len(tokens))
        rows.append(tokens[: stop + 1])
    return rows


@pytest.mark.every(3)
@pytest.mark.parametrize("family, method, early_stop", covering(["llada", "dream"], METHODS, [True, False]))
def test_every_row_of_a_batch_is_streamed_as_its_final_text_and_ended_once(family, method, early_stop):
    lengths = set()
    for seed in range(2):
        model, streamer = trained_like(family, seed), BatchRecorder()
        output = generate(model, streamer=streamer, early_stop=early_stop, **METHODS[method])
        assert streamer.calls[0] == ("prompts", None, left_padded(BATCH)["input_ids"].tolist())
        assert streamer.calls[-1][0] == "end" and streamer.names().count("end") == 1
        assert streamer.names().count("end_step") == int(output.num_forwards.max())
        assert "fail" not in streamer.names()
        for row, final in enumerate(final_rows(output, 7)):
            assert [token for method, value in streamer.of(row) if method == "put" for token in value] == final
            assert [method for method, _ in streamer.of(row)].count("end_row") == 1
            assert streamer.of(row)[-1][0] == "end_row"
            assert all(value for method, value in streamer.of(row) if method != "end_row")
            steps = streamer.names()[: streamer.calls.index(("end_row", row, None))].count("end_step") + 1
            assert steps == output.num_forwards[row]
            lengths.add(len(final))
    assert len(lengths) > 1


@pytest.mark.every(3)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_a_draft_of_a_row_ends_with_its_stop_token_and_never_takes_back_a_decided_token(family, method):
    streamer = BatchRecorder()
    output = generate(trained_like(family), streamer=streamer, early_stop=True, **METHODS[method])
    drafts = 0
    for row, final in enumerate(final_rows(output, 7)):
        confirmed: list[int] = []
        for name, value in streamer.of(row):
            if name == "put":
                confirmed += value
            if name == "draft":
                drafts += 1
                canvas = confirmed + value
                assert len(canvas) == 13 or canvas[-1] in STOPS
                assert value[0] == MASK and not set(STOPS) & set(canvas[:-1])
                assert all(token in (MASK, decided) for token, decided in zip(canvas, final, strict=False))
    assert drafts


@pytest.mark.every(3)
@pytest.mark.parametrize("method", METHODS)
def test_streaming_a_batch_does_not_change_its_answers(method):
    model = trained_like("llada")
    without = generate(model, **METHODS[method])
    for streamer in (BatchRecorder(), Plain()):
        streamed = generate(model, streamer=streamer, **METHODS[method])
        assert torch.equal(streamed.sequences, without.sequences)
        assert torch.equal(streamed.step_map, without.step_map)
        assert torch.equal(streamed.num_forwards, without.num_forwards)


def test_a_streamer_with_put_and_end_alone_follows_a_batch():
    streamer = Plain()
    output = generate(trained_like("llada"), streamer=streamer)
    assert [streamer.rows[row] for row in range(3)] == final_rows(output, 7)
    assert streamer.ends == 1


def test_one_row_is_a_batch_for_a_streamer_that_takes_batches():
    streamer = BatchRecorder()
    output = answer(trained_like("llada"), [1, 2, 3], streamer=streamer)
    puts = [token for method, value in streamer.of(0) if method == "put" for token in value]
    assert puts == final_text(output, [1, 2, 3])[3:]


def test_samples_of_one_prompt_are_rows_of_their_own():
    streamer = BatchRecorder()
    output = generate(
        trained_like("llada"), BATCH[:1], streamer=streamer, do_sample=True, num_return_sequences=3, seed=1
    )
    assert len(streamer.calls[0][2]) == 3
    puts = [[t for method, value in streamer.of(row) if method == "put" for t in value] for row in range(3)]
    assert puts == final_rows(output, 2)


def test_what_a_streamer_keeps_is_not_changed_by_later_steps():
    class Keeper(Plain):
        def put_draft(self, value, row):
            self.kept.append((value, value.clone()))

    streamer = Keeper()
    streamer.kept = []
    generate(trained_like("llada"), streamer=streamer)
    assert streamer.kept and all(torch.equal(value, copy) for value, copy in streamer.kept)


def test_a_row_that_a_criterion_stops_is_streamed_up_to_there():
    class ThreeTokens(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            done = torch.zeros(len(input_ids), dtype=torch.bool)
            done[1] = input_ids.shape[1] >= 7 + 3
            return done

    streamer = BatchRecorder()
    chosen = {"eos_token_id": None, "decoding_method": "dparallel", "block_length": 4, "entropy_threshold": 2.5}
    model = trained_like("llada")
    output = generate(model, streamer=streamer, stopping_criteria=StoppingCriteriaList([ThreeTokens()]), **chosen)
    rows = output.sequences[:, 7:].tolist()
    puts = [[t for method, value in streamer.of(row) if method == "put" for t in value] for row in range(3)]
    assert puts == [rows[0], rows[1][:3], rows[2]]
    assert [method for method, _ in streamer.of(1)][-2:] == ["put", "end_row"]


# ---- failures ------------------------------------------------------------------------------------------------------


@pytest.mark.every(3)
@pytest.mark.parametrize("fail_in", ["prompts", "put", "draft", "end_row", "end_step"])
def test_an_exception_of_a_batch_streamer_passes_through_and_the_next_call_works(fail_in):
    model = trained_like("llada")
    expected, before = generate(model).sequences, attributes(model)
    streamer = BatchRecorder(fail_in)
    with pytest.raises(RuntimeError, match="the reader is gone") as raised:
        generate(model, streamer=streamer)
    assert streamer.names().count(fail_in) == 1  # nothing is decided after it
    assert streamer.calls[-2:] == [("fail", None, raised.value), ("end", None, None)]
    assert same_attributes(before, attributes(model))
    assert torch.equal(generate(model).sequences, expected)


@pytest.mark.parametrize("fail_in", ["fail", "end"])
def test_a_streamer_that_fails_at_the_end_does_not_hide_what_went_wrong_before(fail_in):
    streamer = BatchRecorder(fail_in)
    with pytest.raises(ValueError, match="block_lenght"):
        generate(trained_like("llada"), streamer=streamer, block_lenght=4)
    assert streamer.names() == ["fail", "end"]


def test_an_exception_in_end_is_raised_where_nothing_else_went_wrong():
    streamer = BatchRecorder("end")
    with pytest.raises(RuntimeError, match="the reader is gone"):
        generate(trained_like("llada"), streamer=streamer)
    assert streamer.names().count("end") == 1


REFUSED = {
    "an unknown argument": {"block_lenght": 4},
    "a wrong value": {"entropy_threshold": "low"},
    "too long": {"max_new_tokens": 10**6},
    "beams": {"num_beams": 2},
    "no such parameter": {"inputs": torch.tensor([[1]]), "input_ids": torch.tensor([[1]])},
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_streamer_is_ended_once_and_told_the_error_when_arguments_are_refused(case):
    model = tiny_model("llada")
    for streamer in (BatchRecorder(), Recorder()):
        arguments = {"inputs": torch.tensor([[1, 2]]), "max_new_tokens": 4} | REFUSED[case]
        with pytest.raises((ValueError, TypeError)) as raised:
            model.generate(streamer=streamer, **arguments)
        if isinstance(streamer, Recorder):
            assert streamer.ends == 1
        else:
            assert streamer.calls[-2:] == [("fail", None, raised.value), ("end", None, None)]
            assert streamer.names().count("end") == 1


def test_arguments_that_python_refuses_end_the_stream_too():
    streamer = Recorder()
    with pytest.raises(TypeError, match="multiple values"):
        tiny_model("llada").generate(torch.tensor([[1]]), inputs=torch.tensor([[1]]), streamer=streamer)
    assert streamer.ends == 1


def test_a_stream_within_a_stream_ends_with_the_outer_one():
    streamer = Recorder()
    with Stream.of(streamer) as stream:
        for _ in range(2):
            answer(trained_like("llada"), [1, 2, 3], streamer=stream)
        assert streamer.ends == 0
        assert stream.fail_at is None  # other attributes are the streamer's
    assert streamer.ends == 1


def test_a_custom_loop_that_never_heard_of_the_streamer_does_not_leave_it_open():
    def loop(model, input_ids, **kwargs):
        return input_ids

    streamer = Recorder()
    answer(trained_like("llada"), [1, 2, 3], streamer=streamer, custom_generate=loop)
    assert streamer.ends == 1


def test_decoding_without_this_generate_around_it_ends_the_stream_as_well():
    streamer = Recorder()
    chosen = {"max_new_tokens": 4, "pad_token_id": PAD}
    GenerationMixin.generate(trained_like("llada"), torch.tensor([[1, 2, 3]]), streamer=streamer, **chosen)
    assert streamer.ends == 1 and len(streamer.text) >= 4


def test_generate_keeps_the_signature_and_the_documentation_of_transformers():
    model = trained_like("llada")
    assert inspect.signature(type(model).generate) == inspect.signature(GenerationMixin.generate)
    assert model.generate.__doc__ == GenerationMixin.generate.__doc__
    assert model.can_generate()
