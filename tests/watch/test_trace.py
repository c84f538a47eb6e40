"""Traces: what they keep is what happened, and the page of them holds it, escaped and complete."""

import re
from html.parser import HTMLParser

import pytest
import torch
from every_setting import METHODS
from official import tiny_tokenizer
from recorded import checkpoint
from tiny import ScriptedModel

from d3llm_hf import cli, stream_generate
from d3llm_hf.watch.trace import Piece, Recording, Trace, record, text_pieces
from d3llm_hf.watch.trace_html import SCALE, canvas_html, colour, statistics_html, trace_html
from d3llm_hf.watch.trace_page import page


TOKENIZER = tiny_tokenizer()  # one token a byte
END = 510
NASTY = "<script>alert(1)</script> & \"quotes' </p> https://example.org/x"


class Rounds(ScriptedModel):
    """Decides `tokens` of the answer in the given order, `order[i]` positions at a time, then has nothing to say."""

    def __init__(self, text: str, rounds: list[list[int]], length: int):
        answer = [*TOKENIZER(text)["input_ids"], END]
        answer += [33] * (length - len(answer))
        self.rounds = rounds

        def script(ids: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros(len(ids), ids.shape[1], 512)
            for position in self.rounds[self.calls - 1]:
                logits[:, position + 1, answer[position]] = 50.0
            return logits

        super().__init__(script, vocab_size=512)


@pytest.fixture(scope="module")
def hand_made() -> Trace:
    """ "né<b" over a canvas of 8: é is two bytes that are decided apart, and position 7 before the stop token."""
    model = Rounds("né<b", [[0, 2, 7], [4], [1, 3], [5]], 8)
    settings = {"max_new_tokens": 8, "decoding_method": "dparallel", "block_length": 8, "entropy_threshold": 0.5}
    ids = torch.tensor([[7]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return record(model, TOKENIZER, NASTY, inputs, name="scripted", **settings, eos_token_id=END, pad_token_id=END)


def test_the_trace_of_a_scripted_model_is_the_one_worked_out_by_hand(hand_made):
    n, first, second, less, b = TOKENIZER("né<b")["input_ids"]
    assert hand_made.step_map == [1, 3, 1, 3, 2, 4, -1, 1]
    assert hand_made.tokens == [n, first, second, less, b, END, -1, 33]
    assert hand_made.lengths == [8, 8, 8, 6]
    assert hand_made.canvas(0) == [-1] * 8
    assert hand_made.canvas(2) == [n, -1, second, -1, b, -1, -1, 33]
    assert hand_made.canvas(4) == [n, first, second, less, b, END]
    assert [(piece.tokens, piece.text, piece.special) for piece in hand_made.pieces] == [
        (1, "n", False),
        (2, "é", False),
        (1, "<", False),
        (1, "b", False),
        (1, "<|end|>", True),
        (1, "", False),
        (1, TOKENIZER.decode([33]), False),
    ]
    assert hand_made.text == "né<b"
    assert (hand_made.answer_tokens, hand_made.forwards, hand_made.tokens_per_forward) == (5, 4, 1.25)
    assert hand_made.positions_computed == 4 * 9
    assert hand_made.seconds == sorted(hand_made.seconds)
    assert hand_made.settings["decoding_method"] == "dparallel"


@pytest.mark.every(9)
@pytest.mark.parametrize(
    ("name", "early_stop"),
    [
        ("d3llm", True),
        ("d3llm", False),
        ("llada", False),
        ("dream", True),
        ("fast_dllm, factor", True),
        ("dinfer, credit", True),
    ],
)
def test_the_step_map_is_that_of_generate_and_every_canvas_the_one_that_was_streamed(name, early_stop):
    model, tokenizer, inputs = checkpoint("llada-tiny-a"), TOKENIZER, TOKENIZER("one two", return_tensors="pt")
    settings = METHODS[name] | {"max_new_tokens": 24, "early_stop": early_stop, "seed": 1}
    seen, prefix = [], []
    with stream_generate(model, tokenizer, **inputs, **settings) as updates:
        for update in updates:
            prefix += update.tokens
            seen.append(prefix + (update.draft_tokens or []))
    output = updates.output
    trace = record(model, tokenizer, "words", inputs, **settings)
    assert trace.forwards == len(trace.seconds) == int(output.num_forwards[0])
    canvases = [trace.canvas(k + 1) for k in range(trace.forwards)]
    mask = model.config.mask_token_id
    seen += [seen[-1]] * (trace.forwards - len(seen))
    assert canvases == [[-1 if token == mask else token for token in canvas] for canvas in seen]
    end = trace.lengths[-1]
    start = inputs["input_ids"].shape[1]
    assert trace.step_map[:end] == output.step_map[0, :end].tolist()
    assert trace.canvas(trace.forwards) == output.sequences[0, start : start + end].tolist()
    assert trace.text == tokenizer.decode(output.sequences[0, start:], skip_special_tokens=True)
    assert trace.tokens_per_forward == pytest.approx(float(output.tokens_per_forward[0]))
    assert trace.positions_computed == int(output.positions_computed[0])


def test_a_recording_that_is_left_stops_the_generation_and_has_the_trace_so_far():
    model = checkpoint("llada-tiny-a")
    settings = {"max_new_tokens": 32, "decoding_method": "llada", "eos_token_id": 300, "pad_token_id": 300}
    with Recording(model, TOKENIZER, "one two", **settings) as recording:
        assert recording.trace().forwards == 0
        assert [next(recording) for _ in range(3)] == [1, 2, 3]
        trace = recording.trace()
    assert (trace.forwards, trace.answer_tokens, trace.positions_computed) == (3, 3, None)
    assert sorted(step for step in trace.step_map if step > 0) == [1, 2, 3]
    assert list(recording) == []
    assert "stopped" in statistics_html(trace)
    assert "deciding" in trace_html(trace, forwards=8, status="deciding")
    assert canvas_html(recording.trace()).count("<i></i>") == 29


def test_settings_that_json_does_not_know_are_kept_as_text_and_a_trace_survives_json(hand_made):
    assert Trace.from_json(hand_made.to_json()) == hand_made
    model = checkpoint("llada-tiny-a")
    settings = {"max_new_tokens": 4, "entropy_threshold": float("inf"), "stopping_criteria": []}
    config = type(model.generation_config)(decoding_method="dparallel")
    trace = record(model, TOKENIZER, "one two", generation_config=config, **settings)
    assert (trace.settings["decoding_method"], trace.settings["entropy_threshold"]) == ("dparallel", "inf")
    assert trace.model == model.config._name_or_path
    for text in ("", "[]", "{}", hand_made.to_json().replace('"format": 1', '"format": 2')):
        with pytest.raises(ValueError, match=r"`text` must be what `Trace\.to_json` wrote"):
            Trace.from_json(text)


def test_what_a_trace_cannot_show_is_refused():
    model, row = checkpoint("llada-tiny-a"), torch.tensor([[5, 6]])
    with pytest.raises(ValueError, match=r"`inputs` must be one row \(got 2\)"):
        record(model, TOKENIZER, "x", {"input_ids": row.repeat(2, 1)})
    for gaps in ({"infill": True}, {"infill_mask": row > 5}):
        with pytest.raises(ValueError, match="`inputs` must have no gaps"):
            record(model, TOKENIZER, "x", {"input_ids": row}, **gaps)
    with pytest.raises(ValueError, match=r"`num_return_sequences` must be 1 in a trace \(got 2\)"):
        record(model, TOKENIZER, "x", max_new_tokens=4, num_return_sequences=2, do_sample=True)
    with pytest.raises(ValueError, match="`block_length` must be a positive integer"):
        record(model, TOKENIZER, "x", max_new_tokens=4, block_length=0)


def test_pieces_are_whole_characters_that_join_to_the_text():
    text = "né 中文 👩\u200d💻\na  b"
    ids = TOKENIZER(text)["input_ids"]
    pieces = text_pieces(TOKENIZER, [-1, *ids, END, *TOKENIZER("中")["input_ids"][:2]])
    assert pieces[0] == Piece(1, "")
    assert "".join(piece.text for piece in pieces[1:-2]) == text
    assert [piece.tokens for piece in pieces[1:5]] == [1, 2, 1, 3]
    assert pieces[-2:] == [Piece(1, "<|end|>", True), Piece(2, "\ufffd")]
    assert sum(piece.tokens for piece in pieces) == 1 + len(ids) + 1 + 2


def test_words_of_a_tokenizer_that_drops_the_first_space_keep_theirs():
    class Words:
        all_special_ids = ()

        def decode(self, ids, **kwargs):
            return " ".join(["one", "two", "three"][index] for index in ids)

    assert [piece.text for piece in text_pieces(Words(), [0, 1, 2, -1, 1])] == ["one", " two", " three", "", "two"]


# ---- the page ------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Reads the page: tags with attributes, what lies in the canvases, and scripts."""

    VOID = ("meta", "input")

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.open, self.pieces, self.scripts, self.text = [], [], [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if "data-at" in dict(attrs):
            self.pieces.append([dict(attrs), ""])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
        elif self.open[-2:] == ["p", "span"]:
            self.pieces[-1][1] += data
        self.text += data


def test_the_page_holds_the_steps_and_the_text_and_every_tag_is_closed(hand_made):
    read = Page(page([hand_made]))
    assert read.open == []
    steps = [int(step) for attrs, _ in read.pieces for step in attrs["data-steps"].split()]
    assert steps == hand_made.step_map
    assert [text for _, text in read.pieces][:5] == ["n", "é", "<", "b", "<|end|>"]
    assert ["hidden" in attrs for attrs, _ in read.pieces] == [False] * 5 + [True] * 2
    [canvas] = [attrs for tag, attrs in read.tags if attrs.get("class") == "d3-canvas"]
    assert canvas["data-lengths"] == "8 8 8 8 6"
    for shown in ("1.25", "tokens per forward", "max_new_tokens=8", "scripted"):
        assert shown in read.text


def test_what_a_user_or_a_model_wrote_is_escaped_and_nothing_is_fetched(hand_made):
    model = Rounds("<b>", [[0, 1, 2, 3]], 4)
    ids = torch.tensor([[7]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    other = record(
        model,
        TOKENIZER,
        NASTY,
        inputs,
        name="<i>name",
        max_new_tokens=4,
        eos_token_id=END,
        stop_strings=["<img src=x>"],
    )
    read = Page(page([hand_made, other]))
    assert NASTY in read.text
    assert len(read.scripts) == 1 and "alert" not in read.scripts[0] and "http" not in read.scripts[0]
    assert not {"img", "b", "link", "iframe"} & {tag for tag, _ in read.tags}
    assert [text for _, text in read.pieces if "<" in text] == ["<", "<|end|>", "<", "<|end|>"]
    for _, attrs in read.tags:
        assert not {"src", "href", "action", "onclick", "srcset"} & set(attrs)
    assert not re.search(r"@import|url\(", page([hand_made]))
    assert "default-src 'none'" in page([hand_made])


def test_the_canvas_of_a_forward_shows_what_was_decided_by_then(hand_made):
    drawn = Page(canvas_html(hand_made, 2))
    classes = [attrs["class"] for attrs, _ in drawn.pieces]
    assert classes == ["", "", "", "d3-draft d3-new", "", "", "d3-draft"]
    assert [text for _, text in drawn.pieces] == ["n", "", "", "b", "", "", TOKENIZER.decode([33])]
    boxes = [attrs.get("class") for tag, attrs in drawn.tags if tag == "i"]
    assert boxes == [None, "d3-part", None, None, None]  # half of é is there
    for wrong in (-1, 5):
        with pytest.raises(ValueError, match=rf"`forward` must be in 0...4 \(got {wrong}\)"):
            canvas_html(hand_made, wrong)


def test_colours_go_along_the_scale_and_their_text_is_readable():
    assert [colour(step, 10)[0] for step in range(1, 11)] == list(SCALE)
    assert colour(1, 1) == (SCALE[0], "#fff")
    for step in range(1, 101):
        paper, ink = colour(step, 100)
        light = [sum(w * linear(int(c[i : i + 2], 16)) for w, i in WEIGHTS) for c in (paper, ink + ink[1:])]
        assert (max(light) + 0.05) / (min(light) + 0.05) > 4.4


WEIGHTS = ((0.2126, 1), (0.7152, 3), (0.0722, 5))


def linear(byte: int) -> float:
    return byte / 255 / 12.92 if byte <= 10 else ((byte / 255 + 0.055) / 1.055) ** 2.4


def test_a_page_has_one_or_two_traces_of_one_prompt(hand_made):
    with pytest.raises(ValueError, match=r"`traces` must be one or two \(got 3\)"):
        page([hand_made] * 3)
    values = Trace.from_json(hand_made.to_json())
    with pytest.raises(ValueError, match="`traces` must be of one prompt"):
        page([hand_made, type(values)(**(vars(values) | {"prompt": "other"}))])
    with pytest.raises(ValueError, match="at least one forward"):
        page([type(values)(**(vars(values) | {"lengths": [], "seconds": []}))])


# ---- the command ---------------------------------------------------------------------------------------------------


def test_the_command_writes_the_page_and_says_what_it_took(official, tmp_path, capsys):
    file = tmp_path / "out.html"
    file.write_text("old")
    options = ["--max-new-tokens", "8", "--decoding-method", "dparallel", "--seed", "1", "--chat"]
    compare = ["--compare", "llada:steps=4,block-length=8"]
    assert cli.main(["trace", str(official["llada"]), "<one>", "-o", str(file), *options, *compare]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(r"^dparallel: \d+ tokens in \d+ forwards \(\d+\.\d\d tokens per forward\), [\d.]+ s$", err, re.M)
    assert re.search(r"^llada: \d+ tokens in \d+ forwards", err, re.M)
    assert err.endswith(f"wrote {file}\n")
    read = Page(file.read_text())
    assert "<one>" in read.text
    assert "max_new_tokens=8, seed=1, steps=4, block_length=8" in read.text
    assert [file.name for file in tmp_path.iterdir()] == ["out.html"]


def test_bad_options_of_the_command_leave_the_file_alone(official, tmp_path, capsys):
    file = tmp_path / "out.html"
    file.write_text("old")
    cases = {
        ("-o", str(tmp_path / "no" / "out.html")): "`--output` must be a file in a folder that exists",
        ("-o", str(tmp_path)): "`--output` must be a file",
        ("-o", str(file), "--compare", "llada:steps"): "`--compare` must have the form NAME=VALUE",
        ("-o", str(file), "--compare", "llada:steps=x"): "`--compare` must give steps a value of type int",
        ("-o", str(file), "--compare", "beam", "--max-new-tokens", "4"): "`decoding_method` must be one of",
        ("-o", str(file), "--block-length", "0"): "`block_length` must be a positive integer",
    }
    for argv, message in cases.items():
        assert cli.main(["trace", str(official["llada"]), "one", *argv]) == 2, argv
        assert message in capsys.readouterr().err
    assert file.read_text() == "old"
