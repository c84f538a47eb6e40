"""`d3llm chat` and the conversation behind it: history, settings, commands, and what is shown where."""

import io
import json
import os
import re
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from official import tiny_tokenizer
from places import REPOSITORY
from terminals import Terminal
from tiny import ScriptedModel

from d3llm_hf import Chat, cli, encode_chat
from d3llm_hf.commands import chat as command
from d3llm_hf.commands import generate
from d3llm_hf.watch import chat as chats
from d3llm_hf.watch.terminal import BORDER, CLEAR_BELOW, DIM, MASK_SIGN, PLAIN


TOKENIZER = tiny_tokenizer()
A = TOKENIZER("a").input_ids[0]
STATISTICS = re.compile(r"^(\d+) tokens in (\d+) forwards \(\d+\.\d\d tokens per forward\), [\d.]+ s \(.*\)$", re.M)


def always_a(ids: torch.Tensor) -> torch.Tensor:
    """The letter everywhere, more surely the further to the right: blocks are decided from their end."""
    logits = torch.zeros(*ids.shape, 512)
    logits[..., A] = 10 + torch.arange(ids.shape[1]) / 100
    return logits


@pytest.fixture
def model():
    """128 positions; without other settings it writes eight letters, one a forward, in blocks of two."""
    model = ScriptedModel(always_a, vocab_size=512, max_sequence_length=128)
    own = {"decoding_method": "llada", "block_length": 2, "max_new_tokens": 8, "eos_token_id": 510}
    model.generation_config.update(**own, allow_custom_entries=True)
    return model


@pytest.fixture
def chat(model):
    return Chat(model, TOKENIZER)


@pytest.fixture
def prompts(monkeypatch):
    """The prompts of all turns, as lists of token ids."""
    seen = []

    def recorded(model, tokenizer, **arguments):
        seen.append(arguments["input_ids"][0].tolist())
        return stream(model, tokenizer, **arguments)

    stream = chats.stream_generate
    monkeypatch.setattr(chats, "stream_generate", recorded)
    return seen


def read(turn) -> str:
    for _ in turn:
        pass
    return turn.text


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def ids(*messages: dict) -> list[int]:
    return encode_chat(TOKENIZER, messages)["input_ids"][0].tolist()


# ---- the conversation ----------------------------------------------------------------------------------------------


def test_a_turn_gives_what_generate_gives_and_every_forward_on_the_way(chat, model):
    inputs = encode_chat(TOKENIZER, [user("hi")])
    expected = model.generate(**inputs, return_dict_in_generate=True)
    turn = chat.ask("hi")
    assert turn.output is None
    shown = [(turn.text, update.draft) for update in turn]
    assert shown[:3] == [
        ("", f"{MASK_SIGN}a" + 6 * MASK_SIGN),
        ("aa", 6 * MASK_SIGN),
        ("aa", f"{MASK_SIGN}a" + 4 * MASK_SIGN),
    ]
    assert shown[-1] == ("a" * 8, None)
    assert len(shown) == expected.num_forwards == turn.output.num_forwards == 8
    assert torch.equal(turn.output.sequences, expected.sequences)
    assert (turn.tokens, turn.stopped, turn.left_out) == (8, False, 0)
    assert turn.seconds > 0
    turn.stop()
    assert not turn.stopped


def test_the_history_and_the_system_message_are_sent_with_each_message(model, prompts):
    chat = Chat(model, TOKENIZER, system="be brief", max_new_tokens=2)
    system = {"role": "system", "content": "be brief"}
    read(chat.ask("hi"))
    read(chat.ask("so"))
    assert prompts == [ids(system, user("hi")), ids(system, user("hi"), assistant("aa"), user("so"))]
    assert chat.conversation() == [system, user("hi"), assistant("aa"), user("so"), assistant("aa")]
    chat.undo()
    chat.set_system(None)
    read(chat.ask("no"))
    assert prompts[-1] == ids(user("hi"), assistant("aa"), user("no"))
    chat.reset()
    assert chat.conversation() == []
    with pytest.raises(ValueError, match="`undo` needs a turn to take back"):
        chat.undo()


def test_special_tokens_that_a_user_writes_are_ordinary_text(chat, prompts):
    read(chat.ask("a<|turn|><|mask|>b"))
    read(chat.ask("c"))
    plain = ids(user("a"), assistant("a"), user("c"))
    control = [token for token in prompts[1] if token >= 506]
    assert control == [token for token in plain if token >= 506]
    assert "<|mask|>" in TOKENIZER.decode(prompts[1])


def test_the_oldest_turns_are_left_out_where_they_no_longer_fit(chat, prompts):
    for text in ("one", "two", "three"):
        read(chat.ask(text))
    turns = [(user(text), assistant("a" * 8)) for text in ("one", "two", "three")]
    everything = ids(*turns[0], *turns[1], *turns[2], user("four"))
    assert len(everything) + 8 > 128
    turn = chat.ask("four")
    read(turn)
    assert turn.left_out == 1
    assert prompts[-1] == ids(*turns[1], *turns[2], user("four"))
    assert chat.messages[0] == user("one")  # nothing is forgotten
    chat.history = 1
    turn = chat.ask("five")
    assert (prompts[-1], turn.left_out) == (ids(user("four"), assistant("a" * 8), user("five")), 0)
    chat.history = 0
    chat.ask("six").stop()
    assert prompts[-1] == ids(user("six"))
    with pytest.raises(
        ValueError, match=r"`message` must leave room for the answer in the model's 128 positions \(got 2"
    ):
        chat.ask("a" * 200)
    chat.set_system("b" * 150)
    with pytest.raises(ValueError, match="with template and system message, and `max_new_tokens` 8"):
        chat.ask("a")


def test_a_stopped_answer_is_kept_as_far_as_it_is_decided(chat):
    turn = chat.ask("hi")
    next(turn)
    next(turn)
    turn.stop()
    assert (turn.stopped, turn.output, turn.text, turn.tokens) == (True, None, "aa", 2)
    assert chat.messages == [user("hi"), assistant("aa")]
    turn = chat.ask("so")
    next(turn)
    assert read(chat.ask("no")) == "a" * 8  # asking again stops what is on its way; it had decided nothing
    assert turn.stopped
    assert [message["content"] for message in chat.messages] == ["hi", "aa", "no", "a" * 8]
    assert list(turn) == []


def test_a_turn_that_fails_is_not_remembered(chat, model):
    def script(ids):
        raise RuntimeError("broken")

    model.script = script
    turn = chat.ask("hi")
    with pytest.raises(RuntimeError, match="broken"):
        next(turn)
    turn.stop()
    assert (chat.messages, turn.stopped) == ([], False)


def test_settings_hold_for_the_answers_to_come(chat):
    chat.set(decoding_method="d3llm", entropy_threshold=0.5, max_new_tokens=4)
    turn = chat.ask("hi")
    assert read(turn) == "aaaa"
    assert turn.output.num_forwards < 4
    effective = chat.effective()
    assert (effective["entropy_threshold"], effective["block_add_threshold"], effective["do_sample"]) == (
        0.5,
        0.1,
        False,
    )
    chat.set(do_sample=True, temperature=0.5, early_stop=False)
    assert chat.use_method("llada") == {"entropy_threshold": 0.5}
    assert chat.settings == {
        "decoding_method": "llada", "max_new_tokens": 4, "do_sample": True, "temperature": 0.5, "early_stop": False
    }  # fmt: skip
    assert chat.effective()["temperature"] == 0.5
    chat.set(**dict.fromkeys(chat.settings))
    assert chat.settings == {}
    assert (chat.effective()["max_new_tokens"], chat.effective()["block_length"]) == (8, 2)


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({"entropy_threshold": 1.0}, "`entropy_threshold` is not used by decoding_method="),
        ({"steps": 0}, r"`steps` must be a positive integer \(got 0\)"),
        ({"kv_cache": "llada"}, "`kv_cache` must be one of"),
        ({"block_lenght": 4}, "Did you mean `block_length`"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be a positive integer less than the model's 128 positions"),
        ({"max_new_tokens": 128}, r"less than the model's 128 positions \(got 128\)"),
        ({"max_length": 20}, "`max_length` has no meaning in a chat: the prompt grows"),
        ({"num_return_sequences": 2}, "`num_return_sequences` has no meaning in a chat"),
        ({"do_sample": True, "top_p": -1.0}, "top_p"),
        ({"guidance_scale": 2.0}, "`guidance_scale` does not apply"),
    ],
)
def test_settings_that_generate_refuses_change_nothing(settings, pattern, chat, model):
    chat.set(steps=4)
    with pytest.raises(ValueError, match=pattern):
        chat.set(block_length=4, **settings)
    assert chat.settings == {"steps": 4}
    with pytest.raises(ValueError, match="`decoding_method` must be one of"):
        chat.use_method("beam")
    assert chat.settings == {"steps": 4}
    with pytest.raises(ValueError, match=pattern):
        Chat(model, TOKENIZER, **settings)


def test_what_cannot_be_a_conversation_is_refused(chat, model):
    with pytest.raises(ValueError, match=r"`history` must be a number of turns \(got -1\)"):
        Chat(model, TOKENIZER, history=-1)
    with pytest.raises(ValueError, match="`message` must not be empty"):
        chat.ask(" \n")
    with pytest.raises(TypeError, match="`content` must be a string"):
        chat.ask(3)
    with pytest.raises(ValueError, match="`content` must be valid Unicode"):
        chat.ask("a\udcff")
    strict = tiny_tokenizer()
    strict.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system!') }}{% endif %}x"
    with pytest.raises(ValueError, match=r"`messages` must be what the chat template takes .*No system!"):
        Chat(model, strict, system="a")
    plain = tiny_tokenizer()
    plain.chat_template = None
    with pytest.raises(ValueError, match="`tokenizer` must have a chat template"):
        Chat(model, plain)
    assert chat.messages == []


def test_a_length_that_nobody_says_is_that_of_the_command(model):
    model.generation_config.max_new_tokens = None
    model.config.max_position_embeddings = None  # no limit is known
    assert Chat(model, TOKENIZER).effective()["max_new_tokens"] == generate.DEFAULT_NEW_TOKENS
    with pytest.raises(ValueError, match=r"`max_new_tokens` must be a positive integer \(got True\)"):
        Chat(model, TOKENIZER, max_new_tokens=True)


def test_the_commands_of_the_documentation_exist():
    page = (REPOSITORY / "docs" / "serving.md").read_text(encoding="utf-8")
    section = page.split("\n## Chat\n")[1].split("\n## ")[0]
    named = set(re.findall(r"`/(\w+)", section))
    assert named and named <= set(command.COMMANDS)


# ---- the command ---------------------------------------------------------------------------------------------------


class NumberedTerminal(Terminal):
    def fileno(self):
        return 1


@pytest.fixture
def talk(model, monkeypatch):
    """Holds a conversation in this process: `talk(lines, *options)` gives its exit code, stdout and stderr.

    A line may be an exception, which then happens at the prompt. Without `terminal=True` all three are pipes.
    """
    monkeypatch.setattr(command, "load", lambda *args, **kwargs: (model, TOKENIZER))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)

    def held(lines, *options, terminal=False, out_terminal=None):
        out = NumberedTerminal() if (terminal if out_terminal is None else out_terminal) else io.StringIO()
        err = io.StringIO()
        rest = iter(lines)

        def typed(prompt=""):
            out.write(prompt)
            line = next(rest, EOFError)
            if isinstance(line, str):
                return line
            raise line

        with monkeypatch.context() as patch:
            patch.setattr("builtins.input", typed)
            patch.setattr(sys, "stdin", NumberedTerminal() if terminal else io.StringIO())
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            code = cli.main(["chat", "fruit", *map(str, options)])
        return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())

    return held


def test_over_pipes_stdout_holds_the_answers_alone(talk):
    done = talk(["hi", "", "so"], "--max-new-tokens", 4)
    assert (done.code, done.out) == (0, "aaaa\naaaa\n")
    assert [found.groups() for found in STATISTICS.finditer(done.err)] == [("4", "4"), ("4", "4")]
    assert len(done.err.splitlines()) == 2


def test_stdin_is_read_as_it_comes(model, monkeypatch, capsys, prompts):
    monkeypatch.setattr(command, "load", lambda *args, **kwargs: (model, TOKENIZER))
    monkeypatch.setattr(sys, "stdin", io.StringIO("one \\\ntwo\n//three\nfour\\"))
    assert cli.main(["chat", "fruit", "--history", "0"]) == 0
    assert prompts == [ids(user("one \ntwo")), ids(user("/three")), ids(user("four"))]
    assert capsys.readouterr().out == "aaaaaaaa\n" * 3
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), encoding="utf-8"))
    assert cli.main(["chat", "fruit"]) == 2
    assert "A message must be text" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", None)
    assert cli.main(["chat", "fruit"]) == 0


def test_options_are_those_of_generate_and_are_checked_before_the_first_message(talk, prompts):
    done = talk(
        ["hi"], "--decoding-method", "d3llm", "--entropy-threshold", 0.4, "--system", "s", "--temperature", 0.5
    )
    assert done.code == 0
    assert prompts == [ids({"role": "system", "content": "s"}, user("hi"))]
    done = talk(["hi"], "--entropy-threshold", 0.4)
    assert (done.code, done.out) == (2, "")
    assert re.fullmatch(r"d3llm: error: `entropy_threshold` is not used by .*\n", done.err)


def test_over_pipes_the_first_error_ends_the_conversation(talk):
    done = talk(["hi", "/unod", "so"])
    assert (done.code, done.out) == (2, "a" * 8 + "\n")
    assert re.search(r"error: `/unod` is no command. Did you mean /undo\? .*//", done.err)
    assert talk([KeyboardInterrupt]).code == 130


def test_commands_change_the_conversation(talk, tmp_path, model):
    file = tmp_path / "new" / "conversation.json"
    lines = [
        "/set max-new-tokens=2 steps=2",
        "hi",
        "/system be brief",
        "so",
        "/undo",
        f"/save {file}",
        "no",
        f"/save {file}",
    ]
    done = talk([*lines, "/reset", "/system", "/set steps=", "/method fast_dllm", "/quit", "never"])
    assert done.code == 0
    assert done.out == "aa\n" * 3
    saved = json.loads(file.read_text())
    system = {"role": "system", "content": "be brief"}
    assert saved["messages"] == [system, user("hi"), assistant("aa"), user("no"), assistant("aa")]
    assert (saved["model"], saved["settings"]["steps"], saved["settings"]["block_length"]) == ("fruit", 2, 2)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    said = STATISTICS.sub("-", done.err).splitlines()
    assert said == [
        "decoding_method=llada max_new_tokens=2 steps=2", "-", "The system message is set.", "-",
        "The last turn is taken back, 1 left.", f"wrote {file}", "-", f"wrote {file}", "The history is empty.",
        "There is no system message.", "decoding_method=llada max_new_tokens=2",
        "decoding_method=fast_dllm max_new_tokens=2",
    ]  # fmt: skip
    done = talk([f"/save {file}"])
    assert (done.code, json.loads(file.read_text())) == (2, saved)
    assert "`/save` does not replace a file" in done.err


def test_help_and_settings_name_everything(talk):
    done = talk(
        [
            "/help",
            "/set temperature=0.5 steps=4",
            "/settings",
            "/set temperature=0",
            "/set temperature=",
            "/method d3llm",
        ]
    )
    assert done.code == 0
    assert done.out == ""
    for name in command.COMMANDS:
        assert re.search(rf"^/{name} ", done.err, re.M)
    for line in (
        "decoding_method=llada",
        "block_length=2",
        "steps=4 (set)",
        "temperature=0.5 (set)",
        "do_sample=True (set)",
    ):
        assert f"{line}\n" in done.err
    summaries = [line for line in done.err.splitlines() if line.startswith("decoding_method=llada max_new_tokens=8")]
    assert [line.split("tokens=8 ")[1] for line in summaries] == [
        "do_sample=True temperature=0.5 steps=4", "do_sample=False steps=4", "steps=4"
    ] or [sorted(line.split("tokens=8 ")[1].split()) for line in summaries] == [
        ["do_sample=True", "steps=4", "temperature=0.5"], ["do_sample=False", "steps=4"], ["steps=4"]
    ]  # fmt: skip
    assert "forgotten with the method before it: steps=4\n" in done.err


def test_at_a_terminal_errors_are_shown_and_the_conversation_goes_on(talk, model):
    lines = [
        "/nothing",
        "/set",
        "/set steps",
        "/set steps=x",
        "/set do_sample=maybe",
        "/method",
        "/save",
        "/undo",
        "a" * 300,
    ]
    done = talk([*lines, "hi"], terminal=True)
    assert done.code == 0
    said = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(said) == len(lines)
    patterns = (
        "is no command. /help lists them", "needs settings", "the form NAME=VALUE", "steps a value of type int",
        "do_sample a value of type bool", "needs one of d3llm, dpara", "needs a file", "needs a turn", "leave room",
    )  # fmt: skip
    for line, pattern in zip(said, patterns, strict=True):
        assert pattern in line
    assert done.out.endswith("a" * 8 + "\n> ")
    assert STATISTICS.search(done.err)
    assert done.err.startswith("fruit, decoding_method=llada max_new_tokens=8. /help lists the commands")

    def script(ids):
        raise torch.OutOfMemoryError("too much")

    model.script = script
    done = talk(["hi", "/quit"], terminal=True)
    assert (done.code, "error: too much Try /reset or a lower max_new_tokens." in done.err) == (0, True)
    with pytest.raises(torch.OutOfMemoryError):
        talk(["hi"], "--debug", terminal=True)


def test_drafts_are_redrawn_in_place_dimmed_and_the_answer_stays(talk):
    done = talk(["hi"], terminal=True)
    assert f"{DIM}{MASK_SIGN}a{6 * MASK_SIGN}{PLAIN}" in done.out
    assert f"\r{CLEAR_BELOW}aa{DIM}{6 * MASK_SIGN}{PLAIN}" in done.out
    assert done.out.rpartition(CLEAR_BELOW)[2] == "a" * 8 + "\n> "


def test_without_colour_a_line_stands_before_the_draft(talk, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    done = talk(["hi"], terminal=True)
    assert f"aa{BORDER}{6 * MASK_SIGN}" in done.out
    assert DIM not in done.out and PLAIN not in done.out
    assert done.out.rpartition(CLEAR_BELOW)[2] == "a" * 8 + "\n> "


@pytest.mark.parametrize("how", ["--no-live", "dumb", "stdout is a file"])
def test_text_that_is_not_redrawn_has_no_escapes(how, talk, monkeypatch):
    if how == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    done = talk(
        ["hi"], *(["--no-live"] if how == "--no-live" else []), terminal=True, out_terminal=how != "stdout is a file"
    )
    assert "\x1b" not in done.out + done.err and MASK_SIGN not in done.out
    assert done.out == ("a" * 8 + "\n" if how == "stdout is a file" else "> " + "a" * 8 + "\n> ")
    assert ("> " in done.err) == (how == "stdout is a file")


def test_ctrl_c_stops_the_answer_alone_and_at_the_prompt_ends_after_a_hint(talk, monkeypatch):
    draw, drawn = command.Redrawn.draw, []

    def interrupted(self, decided, draft):
        draw(self, decided, draft)
        drawn.append(decided)
        if len(drawn) in (2, 3):
            raise KeyboardInterrupt

    monkeypatch.setattr(command.Redrawn, "draw", interrupted)
    done = talk(["hi", "so", "/undo", KeyboardInterrupt, "/undo", KeyboardInterrupt, KeyboardInterrupt], terminal=True)
    assert done.code == 130
    assert "stopped after 2 tokens. What is shown is kept as the answer, /undo takes it back." in done.err
    assert "stopped after 0 tokens. The turn is dropped." in done.err
    assert "The last turn is taken back, 0 left." in done.err  # that of "hi": "so" had no answer
    assert done.err.count("Press Ctrl-C again or type /quit to end.") == 2
    assert "aa\n> " in done.out


def test_over_pipes_ctrl_c_ends_the_conversation(talk, monkeypatch):
    monkeypatch.setattr(command.Console, "_write", lambda self, text: (_ for _ in ()).throw(KeyboardInterrupt))
    assert talk(["hi", "so"]).code == 130


def test_leaving_out_old_turns_is_said_once(talk):
    done = talk(["one", "two", "three", "four", "/undo", "four", "five"])
    assert re.findall(r"oldest turns .*: (\d) left out", done.err) == ["1", "2"]


def test_a_closed_stdout_is_no_error_of_a_message(talk, monkeypatch):
    def gone(self, text):
        raise BrokenPipeError

    monkeypatch.setattr(command.Console, "_write", gone)
    monkeypatch.setattr(cli.os, "dup2", lambda *files: None)
    done = talk(["hi", "so"], terminal=True)
    assert (done.code, "error" in done.err) == (0, False)


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_on_a_real_terminal_the_last_screen_is_the_answer(model, monkeypatch, capfd):
    monkeypatch.setattr(command, "load", lambda *args, **kwargs: (model, TOKENIZER))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(command.importlib, "import_module", lambda name: None)  # readline would take the real terminal
    ours, theirs = os.openpty()
    received = []

    def drain():
        try:
            while data := os.read(ours, 4096):
                received.append(data)
        except OSError:  # the other end is closed
            pass

    reader = threading.Thread(target=drain)
    reader.start()
    os.write(ours, b"hi\n/quit\n")
    with open(theirs, "w", closefd=False) as out, open(theirs, closefd=False) as typed:
        monkeypatch.setattr(sys, "stdin", typed)
        monkeypatch.setattr(sys, "stdout", out)
        assert cli.main(["chat", "fruit"]) == 0
    os.close(theirs)
    reader.join(10)
    os.close(ours)
    shown = b"".join(received).decode()
    assert f"{DIM}{MASK_SIGN}a" in shown
    assert shown.rpartition(CLEAR_BELOW)[2] == "aaaaaaaa\r\n> "


def test_a_name_that_is_nearly_that_of_an_embedded_checkpoint_is_put_right(capsys):
    assert cli.main(["chat", "d3llm-lada"]) == 2
    assert "Did you mean 'd3llm-llada'?" in capsys.readouterr().err
