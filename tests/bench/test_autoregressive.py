"""`d3llm bench autoregressive`: the figures of causal models, plain and by drafts, and what is refused."""

import json
from functools import partial

import pytest
from causal import chain_model
from eagle3 import HEAD, recorded_pair
from official import tiny_tokenizer
from outcomes import outcome_of

from d3llm_hf import cli
from d3llm_hf.bench import autoregressive as module
from d3llm_hf.bench.autoregressive import ARBench, measure_autoregressive
from d3llm_hf.evaluation.tables.fill import table


TINY = {"vocab_size": 64, "d_model": 16, "layers": 2, "prompt_length": 6, "new_tokens": 8, "prompts": 2, "repeats": 1}
DRAFTS = {"num_assistant_tokens": 3, "assistant_confidence_threshold": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A causal checkpoint that writes one letter, then another one, then a stop token, then ends."""
    found, tokenizer = tmp_path_factory.mktemp("causal"), tiny_tokenizer()
    following = [7] * 512
    following[7], following[8] = 8, tokenizer.eos_token_id
    model = chain_model(following)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(found)
    tokenizer.save_pretrained(found)
    return found


def test_methods_take_turns_on_a_random_model_and_give_the_same_tokens():
    methods = (("ar_prompt_lookup", "ar_prompt_lookup", {}), ("a", "ar_assistant", DRAFTS))
    methods += (("drawn", "ar", {"do_sample": True}), ("ar", "ar", {}))
    results = measure_autoregressive(ARBench(**TINY, methods=methods))
    plain, *others = results["rows"]
    assert [row["name"] for row in results["rows"]] == ["ar", "ar_prompt_lookup", "a", "drawn"]
    assert (plain["tokens"], plain["forwards"], plain["draft_forwards"], plain["tpf"]) == (16, 16, 0, 1.0)
    assert (plain["speedup"], plain["cpu_speedup"]) == (1.0, 1.0)
    assert [row["equal_answers"] for row in others] == [100.0, 100.0, None]
    assert others[1]["draft_forwards"] > 0
    text = table(results | {"command": "x"})
    assert "draft forwards" in text and "A random Llama" in text


@pytest.mark.full
def test_a_checkpoint_answers_word_problems(folder, capsys, tmp_path):
    run, output = partial(outcome_of, cli.main, capsys, "bench", "autoregressive"), tmp_path / "results.json"
    words = ["--model", folder, "--assistant", folder, "--prompts", 2, "--max-new-tokens", 6, "--repeats", 1]
    words += ["--methods", "ar_assistant", "early=ar_early_exit:assistant_early_exit=1", "--dtype", "float32"]
    code, out, err = run(*words, "-o", output)
    assert code == 0, err
    results = json.loads(output.read_text())
    assert [row["name"] for row in results["rows"]] == ["ar", "ar_assistant", "early"]
    assert all(row["tokens"] == 4 and row["accuracy"] == 0.0 for row in results["rows"])  # two letters each
    assert [row["forwards"] for row in results["rows"]] == [6, 2, 2]
    assert out == table(results) and "word problems" in out
    assert results["command"].startswith(f"d3llm bench autoregressive --model {folder.name} ")


def test_a_random_head_drafts_for_a_random_model():
    sizes = TINY | {"layers": 7, "prompts": 1}
    results = measure_autoregressive(
        ARBench(**sizes, methods=(("eagle3", "eagle3", {"total_tokens": 9, "depth": 1}),))
    )
    plain, drafted = results["rows"]
    assert drafted["tokens"] == plain["tokens"] and drafted["equal_answers"] == 100.0
    assert drafted["draft_forwards"] == 2 * (drafted["forwards"] - 1)
    assert drafted["draft_positions_per_token"] > 0 == plain["draft_positions_per_token"]
    assert "draft positions per token" in table(results | {"command": "x"})


@pytest.mark.full
def test_a_published_head_drafts_for_a_checkpoint(tmp_path):
    recorded_pair()[0].save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    methods = (("tree", "eagle3", {"total_tokens": 9, "depth": 1, "draft_top_k": 3}),)
    sizes = {"prompts": 1, "new_tokens": 8, "repeats": 1, "methods": methods}
    results = measure_autoregressive(ARBench(model=str(tmp_path), draft_head=str(HEAD), **sizes))
    assert results["rows"][1]["equal_answers"] == 100.0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model", "x", "--layers", 2], "`--model` has sizes of its own"),
        (["--methods", "llada"], "`method` must be one of ['ar',"),
        (["--methods", "x=ar", "x=ar_prompt_lookup"], "`methods` must have different labels"),
        (["--assistant", "x"], "`assistant` drafts for a `model` with 'ar_assistant'"),
        (["--model", "x", "--methods", "ar_assistant"], "`assistant` must be given with `model`"),
        (["--draft-head", "x"], "`draft_head` drafts for a `model` with 'eagle3'"),
        (["--model", "x", "--methods", "eagle3"], "`draft_head` must be given with `model`"),
        (["--repeats", 0], "`repeats` must be at least 1"),
        (["--model", "d3llm-llada"], "got LLaDAModelLM, which decodes by diffusion"),
    ],
)
def test_what_cannot_be_measured_is_refused(words, expected, capsys):
    code, _, err = outcome_of(cli.main, capsys, "bench", "autoregressive", *words)
    assert code == 2 and expected in err


@pytest.mark.full
def test_an_assistant_of_another_vocabulary_drafts_by_way_of_text(folder, monkeypatch):
    from d3llm_hf.hub import loading

    load, calls = loading.load_causal, []

    def two(name, **where):
        calls.append(name)
        return load(name, **where) if len(calls) == 1 else (chain_model([7] * 520), tiny_tokenizer())

    monkeypatch.setattr(loading, "load_causal", two)
    methods = (("a", "ar_assistant", DRAFTS),)
    sizes = {"prompts": 1, "new_tokens": 4, "repeats": 1}
    results = measure_autoregressive(ARBench(model=str(folder), assistant="other", methods=methods, **sizes))
    assert results["rows"][1]["equal_answers"] == 100.0 and results["rows"][1]["draft_forwards"] > 0


def test_other_tokens_are_an_error(monkeypatch):
    generate = module.generate

    def wrong(*args, **kwargs):
        output = generate(*args, **kwargs)
        if kwargs["method"] == "ar_prompt_lookup":
            output.sequences[:, -1] = 0 if output.sequences[0, -1] else 1
        return output

    monkeypatch.setattr(module, "generate", wrong)
    with pytest.raises(ArithmeticError, match="ar_prompt_lookup must give the tokens of plain greedy decoding"):
        measure_autoregressive(ARBench(**TINY))
