"""Streamed text is the final text, piece by piece, whatever order the tokens were decided in."""

import threading

import pytest
import torch
from official import tiny_tokenizer
from recorded import checkpoint, recorded_cases
from tiny import MASK, ScriptedModel, answer, attributes, same_attributes, tables, tiny_prompt, trained_like
from transformers import TextIteratorStreamer, TextStreamer
from transformers.generation.streamers import BaseStreamer, TextDiffusionStreamer


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


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llada", "dream"])
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
    with pytest.raises(ValueError, match="one row"):
        model.generate(torch.tensor([[1], [2], [3]]), streamer=streamer, max_new_tokens=4)
    assert model.calls == 0


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
