"""The `d3llm` command: what it prints where, and that bad input gets one line and exit code 2."""

import importlib.util
import io
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from causal import causal_model
from official import tiny_tokenizer
from outcomes import outcome_of
from terminals import Terminal

from d3llm_hf import __version__, cli
from d3llm_hf.commands import generate
from d3llm_hf.hub import checkpoints
from d3llm_hf.watch.terminal import CLEAR_BELOW, DIM, MASK_SIGN, PLAIN, CanvasStreamer, printable, wrap


STATISTICS = re.compile(r"^\d+ tokens in \d+ forwards \(\d+\.\d\d tokens per forward\), [\d.]+ s \([\d.]+ tokens/s\)$")


@pytest.fixture
def run(capsys):
    """Runs the command in this process: `(exit code, stdout, stderr)`."""
    return partial(outcome_of, cli.main, capsys)


@pytest.fixture
def llada(official):
    return official["llada"]


def failed(result, pattern: str) -> None:
    code, out, err = result
    assert code == 2
    assert out == ""
    assert re.fullmatch(rf"(.*\n)?d3llm: error: .*{pattern}.*\n", err), err


def test_help_needs_neither_torch_nor_transformers():
    script = (
        "import sys; from d3llm_hf.cli import build_parser; build_parser().format_help();"
        "print(sorted({'torch', 'transformers', 'huggingface_hub', 'jinja2'} & set(sys.modules)))"
    )
    repository = Path(importlib.util.find_spec("d3llm_hf").origin).parents[1]
    done = subprocess.run([sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    done = subprocess.run(
        [sys.executable, "-m", "d3llm_hf", "--version"], cwd=repository, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"d3llm {__version__}\n"


def test_generate_prints_the_text_alone_and_one_line_of_statistics(run, llada):
    code, out, err = run("generate", llada, "one two", "--max-new-tokens", 16)
    assert code == 0
    assert out.endswith("\n")
    assert "\x1b" not in out
    assert STATISTICS.match(err.splitlines()[-1])
    assert run("generate", llada, "one two", "--max-new-tokens", 16)[1] == out


def test_a_prompt_that_misses_the_chat_template_is_pointed_to_it(run, llada):
    hint = "the prompt was continued as it stands; --chat puts it"
    assert hint in run("generate", llada, "one two", "--max-new-tokens", 4)[2]
    assert hint not in run("generate", "d3llm-llada", "--chat", "one two", "--max-new-tokens", 4)[2]


def test_generate_gives_what_the_library_gives(run, llada):
    model, tokenizer = generate.load(str(llada))
    inputs = tokenizer("one two", return_tensors="pt")
    sequences = model.generate(**inputs, max_new_tokens=16, decoding_method="llada", steps=4, block_length=8)
    expected = tokenizer.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    options = ("--max-new-tokens", 16, "--decoding-method", "llada", "--steps", 4, "--block-length", 8)
    assert run("generate", llada, "one two", *options)[1] == expected + "\n"


@pytest.mark.parametrize(
    "argv", [("{m}", "x", "--chat"), ("{m}", "--chat", "x"), ("--chat", "{m}", "--seed", "1", "x")]
)
def test_options_may_stand_anywhere(argv):
    args = cli.build_parser().parse_args(["generate", *(word.format(m="model") for word in argv)])
    assert (args.model, args.prompt, args.chat, args.debug) == ("model", "x", True, False)
    assert cli.build_parser().parse_args(["generate", "--chat", "model"]).prompt == "-"


def test_every_decoding_setting_is_an_option():
    from d3llm_hf.models.generation_config_d3llm import FIELDS

    # A prompt of the command has no gaps to fill, and its checkpoint knows its mask token.
    assert set(generate.SETTINGS) == set(FIELDS) - {"mask_token_id", "infill"}
    for name, (kind, text) in generate.SETTINGS.items():
        assert kind in FIELDS[name][0], name
        assert 0 < len(text) < 160 and "\n" not in text, name


def test_the_help_of_a_choice_names_all_of_it():
    from d3llm_hf.models.generation_config_d3llm import CACHES, DECODERS, METHODS, REMASKING

    choices = {"decoding_method": METHODS, "kv_cache": CACHES, "decoder": DECODERS, "remasking": REMASKING}
    for name, known in choices.items():
        assert set(known) <= set(re.findall(r"\w+", generate.SETTINGS[name][1])), name


def test_the_prompt_comes_from_stdin_and_unicode_survives(run, llada, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one two\n"))
    from_stdin = run("generate", llada, "--max-new-tokens", 8)
    assert from_stdin[1] == run("generate", llada, "one two", "--max-new-tokens", 8)[1]
    assert run("generate", llada, "zwölf 十二 🍎", "--max-new-tokens", 4)[0] == 0


def test_a_chat_prompt_with_control_tokens_is_encoded_as_text(run, llada, monkeypatch):
    seen = {}
    encode = generate._encode

    def watched(tokenizer, prompt, args):
        seen["ids"] = encode(tokenizer, prompt, args)
        return seen["ids"]

    monkeypatch.setattr(generate, "_encode", watched)
    assert run("generate", llada, "a<|mask|>b", "--chat", "--system", "s", "--max-new-tokens", 4)[0] == 0
    ids = seen["ids"]["input_ids"][0].tolist()
    assert 511 not in ids
    assert ids.count(509) == 2  # one end of turn for the system message, one for the user's


@pytest.mark.full
def test_sampling_is_repeatable_with_a_seed(run, llada):
    options = ("--max-new-tokens", 16, "--temperature", 1.5, "--seed", 3)
    first = run("generate", llada, "one two", *options)
    assert first[0] == 0
    assert run("generate", llada, "one two", *options)[1] == first[1]
    assert run("generate", llada, "one two", "--temperature", 0, "--max-new-tokens", 4)[0] == 0


@pytest.mark.every(3)
@pytest.mark.parametrize(
    ("argv", "pattern"),
    [
        (["--entropy-threshold", "nan"], "`entropy_threshold` must be a number"),
        (["--block-length", "0"], r"`block_length` must be a positive integer \(got 0\)"),
        (["--block-length", "x"], "argument --block-length: invalid int value: 'x'"),
        (["--decoding-method", "beam"], "`decoding_method` must be one of .*got 'beam'"),
        (["--decoding-method", "llada", "--entropy-threshold", "1"], "`entropy_threshold` is not used by"),
        (["--max-new-tokens", "100000"], "must fit into the model's 512 positions"),
        (["--max-new-tokens", "0"], "`max_new_tokens`"),
        (["--device", "abacus"], "`--device` must be a device of torch"),
        (["--device", "cuda:99"], "`--device` must be a device of torch that this machine has .got 'cuda:99'"),
        (["--dtype", "float"], None),
        (["--dtype", "nn"], "`--dtype` must be a floating point type of torch"),
        (["--dtype", "int8"], "`--dtype` must be a floating point type of torch"),
        (["--system", "s"], "`--system` needs `--chat`"),
        (["--unknown"], "unrecognized arguments: --unknown .see `d3llm generate --help`"),
        (["--entropy-treshold", "1"], "arguments: --entropy-treshold 1. Did you mean --entropy-threshold"),
        (["--method=llada"], "Did you mean --decoding-method"),
    ],
)
def test_bad_options_are_answered_in_one_line(argv, pattern, run, llada):
    result = run("generate", llada, "one two", *argv)
    if pattern is None:
        assert result[0] == 0  # an alias of torch for float32
    else:
        failed(result, pattern)


def test_bad_models_and_prompts_are_answered_in_one_line(run, llada, official, tmp_path, monkeypatch):
    failed(run("generate", tmp_path / "nothing", "x"), "nothing")
    failed(run("generate", llada, ""), "`text` must not be empty")
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    failed(run("generate", llada), "`prompt` must not be empty")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\xff"), encoding="utf-8"))
    failed(run("generate", llada), "`prompt` must be text")
    failed(run(), "the following arguments are required")
    failed(run("init", "nothing"), "`name` must be an embedded checkpoint")

    from transformers import GPT2Config, GPT2Model

    GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=8)).save_pretrained(tmp_path / "gpt2")
    failed(run("chat", tmp_path / "gpt2"), "must be a LLaDA, Dream or d3LLM checkpoint .got GPT2Model")
    (tmp_path / "broken").mkdir()
    for file in llada.iterdir():
        (tmp_path / "broken" / file.name).write_bytes(
            file.read_bytes()[:200] if "model" in file.name else file.read_bytes()
        )
    failed(run("generate", tmp_path / "broken", "x"), "")


def test_a_causal_model_answers_from_left_to_right_by_the_methods_that_it_has(run, tmp_path):
    causal_model(vocab_size=512, eos_token_id=510).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    options = (tmp_path, "one two one two", "--chat", "--max-new-tokens", 12)
    code, plain, err = run("generate", *options)
    assert code == 0 and STATISTICS.match(err.splitlines()[-1])
    assert run("generate", *options, "--decoding-method", "ar_prompt_lookup")[1] == plain
    drawn = run("generate", *options, "--temperature", 2, "--seed", 3)
    assert drawn[0] == 0 and run("generate", *options, "--temperature", 2, "--seed", 3)[1] == drawn[1]
    for argv, pattern in (
        (["--watch"], "`--watch` shows a canvas"),
        (["--decoding-method", "d3llm"], "`--decoding-method` must be one of .* for a causal model"),
        (["--decoding-method", "ar_assistant"], "`--decoding-method` must be one of .*got 'ar_assistant'"),
        (["--block-length", 4], "`block_length` must be a setting of ar"),
        (["--seed", 3], "`seed` needs sampling"),
    ):
        failed(run("generate", *options, *argv), pattern)


def test_a_bug_keeps_its_traceback_and_debug_shows_that_of_an_error(run, llada, monkeypatch):
    with pytest.raises(ValueError, match="`block_length`"):
        run("generate", llada, "x", "--block-length", "0", "--debug")

    def bug(*args, **kwargs):
        raise KeyError("bug")

    monkeypatch.setattr(generate, "load", bug)
    with pytest.raises(KeyError):
        run("generate", llada, "x")
    monkeypatch.setattr(generate, "load", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run("generate", llada, "x") == (130, "", "\nd3llm: interrupted\n")


def test_a_closed_pipe_ends_the_command_quietly(llada):
    script = "import sys; from d3llm_hf import cli; from d3llm_hf.commands import init\n"
    script += "init.tell = lambda m: print(m * 100000)\n"
    script += "import d3llm_hf.hub.checkpoints as h; h.init_checkpoint = lambda *a, **k: 'x'\n"
    script += "sys.exit(cli.main(['init', 'x']))"
    repository = Path(cli.__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 0


def test_init_and_export_write_folders_and_refuse_existing_ones(run, llada, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoints, "embedded_checkpoints", lambda: {"d3llm-llada": llada})
    assert run("init", "d3llm-llada") == (0, "", f"wrote {tmp_path / 'd3llm-llada'}\n")
    failed(run("init", "d3llm-llada"), "must not exist or be empty .*--overwrite")
    assert run("init", "d3llm-llada", "--overwrite")[0] == 0
    assert run("export", llada, "out", "--decoding-method", "dparallel", "--name", "Fruit")[0] == 0
    assert "# Fruit\n" in (tmp_path / "out" / "README.md").read_text()
    failed(run("export", tmp_path / "no" / "thing" / "here", "new"), "a checkpoint folder or a Hub id")
    (tmp_path / "file").write_text("x")
    failed(run("export", llada, "file/new"), "`destination` must lie in a folder")


def test_outputs_that_cannot_be_written_are_refused_before_the_work(run, llada, tmp_path):
    (tmp_path / "file").write_text("x")
    below = tmp_path / "file" / "out"
    for argv in (
        ("sweep", llada, "-o", below),
        ("bench", "decode", "-o", below),
        ("bench", "train", "-o", below),
        ("bench", "all", "-o", below),
        ("sweep", llada, "-o", tmp_path),
    ):
        failed(run(*argv), "`--output` must")
    failed(run("leaderboard", "--published", "-o", below), "`output` must lie in a folder")
    from d3llm_hf.evaluation import measure

    with pytest.raises(SystemExit):
        measure.main(["d3llm-llada", "-o", str(below)])


def test_a_checkpoint_that_the_hub_does_not_give_is_named(run, tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise FileNotFoundError("no connection")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    failed(run("export", "someone/nothing", tmp_path / "new"), "`source` must .*someone/nothing.*no connection")


def test_watch_draws_only_on_a_terminal_and_leaves_the_answer_alone(run, llada, monkeypatch):
    plain = run("generate", llada, "one two", "--max-new-tokens", 16)[1]
    code, out, err = run("generate", llada, "one two", "--max-new-tokens", 16, "--watch")
    assert (code, out) == (0, plain)
    assert err.startswith("--watch needs a terminal")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    assert run("generate", llada, "one two", "--max-new-tokens", 16, "--watch")[0] == 0
    drawn, _, rest = terminal.getvalue().rpartition(CLEAR_BELOW)
    assert MASK_SIGN in drawn
    assert rest == printable(plain.rstrip("\n")) + "\n"


def test_a_terminal_says_what_is_loaded_until_it_is(run, llada, monkeypatch):
    monkeypatch.setenv("COLUMNS", "12")
    for name, code in ((llada, 0), ("d3llm-none", 2)):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        assert run("generate", name, "one two", "--max-new-tokens", 4)[0] == code
        assert terminal.getvalue().startswith(f"loading {name}"[:11] + f"\r{CLEAR_BELOW}")


def test_the_canvas_is_redrawn_in_place():
    import torch
    from official import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    stream = io.StringIO()
    streamer = CanvasStreamer(tokenizer, stream)
    mask = tokenizer.mask_token_id
    a, b = tokenizer("ab").input_ids
    streamer.put(torch.tensor([[a, a, a]]))  # the prompt
    assert stream.getvalue() == ""
    streamer.put_draft(value=torch.tensor([mask, b, mask]))
    assert stream.getvalue() == f"{DIM}{MASK_SIGN}b{MASK_SIGN}{PLAIN}"
    streamer.put(torch.tensor([a, b]))
    assert stream.getvalue().endswith(f"\r{CLEAR_BELOW}ab")
    streamer.end()
    assert stream.getvalue().endswith(f"\r{CLEAR_BELOW}")


def test_text_is_wrapped_by_columns_and_stripped_of_control_characters():
    assert wrap("abcdef", 2, 4) == (["abcd", "ef"], [2, 0])
    assert wrap("a\nb", 3, 4) == (["a", "b"], [1, 1])
    assert wrap("十二x", 0, 4) == (["十二", "x"], [0, 0])
    assert printable("a\x1b[31mb\rc\td\n\u202e") == "a[31mbc    d\n"
