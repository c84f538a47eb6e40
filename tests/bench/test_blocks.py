"""`d3llm bench blocks`: what it measures, writes and refuses."""

import json
from functools import partial

import pytest
from outcomes import outcome_of

from d3llm_hf import cli
from d3llm_hf.bench import blocks


SHAPE = ["blocks", "--shape", "tiny", "--prompt-length", "32", "--repeats", "1", "--device", "cpu"]


@pytest.fixture
def run(capsys):
    return partial(outcome_of, cli.main, capsys, "bench")


def test_every_way_is_measured_and_kept_blocks_behind_other_prompts_too(run, tmp_path):
    file = tmp_path / "blocks.json"
    code, out, _ = run(*SHAPE, "--prompt-lengths", "8", "64", "-o", file)
    assert code in (0, None)
    results = json.loads(file.read_text())
    points = [(row["name"], row["prompt_length"]) for row in results["rows"]]
    assert points == [(name, 32) for name in blocks.CACHES] + [(blocks.KEPT, 8), (blocks.KEPT, 64)]
    assert all(row["tokens"] == 16 and row["forwards"] == 4 for row in results["rows"])
    anew, full, kept = (row["positions_per_token"] for row in results["rows"][:3])
    # 32 of the prompt once and two blocks of 8 in two forwards each, of which the second stores the first.
    assert kept == (32 + 4 * 8 + 8) / 16 and anew == (2 * 40 + 2 * 48) / 16 and kept < full < anew
    assert "| prompt 64, blocks, kept |" in out and results["command"].startswith("d3llm bench blocks --shape tiny")


@pytest.mark.parametrize("option", [["--kv-cache", "dual"], ["--decoding-method", "d3llm"]])
def test_settings_of_decoding_are_the_benchs_own(run, option):
    code, _, err = run(*SHAPE, *option)
    assert code == 2
    assert "with caches of its own" in err


def test_kept_blocks_that_change_a_token_are_no_measurement(run, monkeypatch):
    def wrong(contestant, work, batches=slice(None)):
        turn = right(contestant, work, batches)
        if contestant.settings["kv_cache"] == "exact":
            turn.answers[0][0] += 1
        return turn

    right = blocks.decode
    monkeypatch.setattr(blocks, "decode", wrong)
    with pytest.raises(ArithmeticError, match=r"Kept blocks must give the tokens .* \(got 93.75 %"):
        run(*SHAPE)
