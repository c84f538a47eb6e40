"""Progress bars: who sees them, and what they count."""

import io
import re
import sys

import pytest
import torch
from terminals import Terminal
from transformers.utils import logging

from d3llm_hf import cli, progress
from d3llm_hf.commands import generate
from d3llm_hf.progress import DecidedTokens, progress_bar, quiet_loading


@pytest.fixture
def at_terminal(monkeypatch):
    """Puts a terminal in the place of stderr, on which bars show at once."""

    def begin():
        monkeypatch.setattr(sys, "stderr", Terminal())
        monkeypatch.setattr(progress, "SECONDS", 0)
        return sys.stderr

    yield begin
    logging.set_tqdm_hook(None)


def test_a_bar_is_shown_on_a_terminal_once_the_work_has_gone_on_for_a_while(monkeypatch, at_terminal):
    terminal = at_terminal()
    with progress_bar(3, "row", "rows") as bar:
        bar.update(3)
    assert "rows: 100%" in terminal.getvalue() and "3/3" in terminal.getvalue()
    for more in ({}, {"shown": False}):
        monkeypatch.setattr(sys, "stderr", Terminal())
        monkeypatch.setattr(progress, "SECONDS", 1000)
        with progress_bar(3, "row", "rows", **more) as bar:
            bar.update(3)
        assert sys.stderr.getvalue() == ""
    with progress_bar(3, "row", "rows", shown=True) as bar:
        bar.update(3)
    assert "3/3" in sys.stderr.getvalue()


def test_no_bar_is_written_to_a_pipe(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 0)
    with progress_bar(3, "row", "rows") as bar:
        bar.update(3)
    assert bar.disable and capsys.readouterr().err == ""


def test_decided_tokens_are_counted_wherever_they_stand(at_terminal):
    terminal = at_terminal()
    counter, mask = DecidedTokens(6, 9), 9
    counter.put(torch.tensor([[1, 2, 3]]))  # the prompt
    assert counter.bar.n == 0
    counter.put_draft(value=torch.tensor([mask, 4, mask, mask, 5, mask]))
    assert counter.bar.n == 2
    counter.put(torch.tensor([7, 4]))
    counter.put_draft(value=torch.tensor([mask, mask, 5, mask]))
    assert counter.bar.n == 3
    counter.put_draft(value=torch.tensor([mask]))  # what lies behind a stop token goes away
    assert counter.bar.n == 3
    counter.end()
    assert terminal.getvalue().rpartition("\r")[2] == ""  # the bar is wiped off


@pytest.mark.full
def test_a_terminal_sees_the_tokens_being_decided_and_the_answer_is_the_same(
    official, at_terminal, capsys, monkeypatch, tmp_path
):
    terminal = at_terminal()
    argv = ["generate", str(official["llada"]), "one two", "--max-new-tokens", "16"]
    assert cli.main(argv) == 0
    shown = capsys.readouterr().out
    assert re.search(r"decided: +\d+%.*/16 ", terminal.getvalue())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert cli.main(argv) == 0
    assert capsys.readouterr().out == shown
    assert "decided:" not in sys.stderr.getvalue()

    monkeypatch.setattr(sys, "stderr", terminal)
    assert cli.main(["trace", *argv[1:], "--decoding-method", "llada", "-o", str(tmp_path / "out.html")]) == 0
    assert re.search(r"llada: +\d+%.*/16 ", terminal.getvalue())


def test_measurements_count_answers(at_terminal):
    from d3llm_hf.evaluation.measure import measure
    from d3llm_hf.evaluation.suites import Suite
    from d3llm_hf.evaluation.tasks.word_problems import generate_problems

    model, tokenizer = generate.load("d3llm-llada", dtype="float32")
    suite = Suite({"a": {}, "b": {"entropy_threshold": 9.0}}, ())
    terminal = at_terminal()
    measure(model, tokenizer, generate_problems(3, split="test", seed=0), suite, max_new_tokens=4, batch_size=2)
    assert "measuring: 100%" in terminal.getvalue() and "6/6" in terminal.getvalue()


def test_loading_shows_nothing_in_a_pipe_and_on_a_terminal_what_takes_its_time(monkeypatch, at_terminal):
    terminal = at_terminal()
    logging.enable_progress_bar()
    monkeypatch.setattr(progress, "SECONDS", 1000)
    quiet_loading()
    for _ in logging.tqdm(range(3), desc="Loading weights"):
        pass
    assert terminal.getvalue() == ""
    monkeypatch.setattr(progress, "SECONDS", 0)
    for _ in logging.tqdm(range(3), desc="Loading weights"):
        pass
    assert "Loading weights" in terminal.getvalue()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    quiet_loading()
    assert not logging.is_progress_bar_enabled()
