"""The suites of measurements: settings that decode, figures that can be checked by hand, files that repeat."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from awaited import AWAITED
from foreign_locks import foreign_lock
from places import REPOSITORY
from recorded_blocks import OF_BLOCKS
from thin import some_of

from d3llm_hf.autoregressive.methods import complete_settings, is_autoregressive
from d3llm_hf.evaluation import measure as module
from d3llm_hf.evaluation.measure import Tally, main, measure, measure_larger
from d3llm_hf.evaluation.provenance import write_json
from d3llm_hf.evaluation.suites import CACHES, FIGURES, LOSSLESS, METHODS, SUITES, WINDOWS, Suite, with_variants
from d3llm_hf.evaluation.sweep.causal import split_settings
from d3llm_hf.evaluation.tables.fill import COLUMNS, table
from d3llm_hf.evaluation.tasks.word_problems import generate_problems
from d3llm_hf.hub.sources import embedded_checkpoints
from d3llm_hf.models.generation_config_d3llm import CACHES as KINDS
from d3llm_hf.models.generation_config_d3llm import METHODS as KNOWN
from d3llm_hf.models.generation_config_d3llm import D3LLMGenerationConfig


ALL = {**SUITES, "larger": CACHES.larger}
SIZES = {"batch_sizes": (1, 2), "prompt_tokens": 8, "new_tokens": 20, "width": 16, "layers": 1}


def loaded(name):
    """Model and tokenizer of an embedded checkpoint."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = embedded_checkpoints()[name]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def checkpoint():
    return loaded("d3llm-llada")


@pytest.fixture
def one_thread():
    """`main` chooses the number of threads for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def output_of(rows: list[list[int]], lengths: list[int], forwards: int) -> SimpleNamespace:
    """What `generate` returns for answers behind a prompt of one token."""
    counts = torch.full((len(rows),), forwards)
    return SimpleNamespace(
        sequences=torch.tensor([[9, *row] for row in rows]),
        num_tokens=torch.tensor(lengths),
        num_forwards=counts,
        num_forwards_reference=counts + 1,
        positions_computed=counts * 10,
    )


def tally_of(*args) -> Tally:
    tally = Tally()
    model = SimpleNamespace(generate=lambda **kwargs: output_of(*args))
    tally.generate(model, {"input_ids": torch.tensor([[9]] * len(args[0]))}, {})
    return tally


@pytest.mark.parametrize("name", ALL)
def test_every_setting_of_a_suite_is_accepted(name):
    for row, settings in ALL[name].rows.items():
        if is_autoregressive(settings):
            method, own = split_settings(settings)
            assert complete_settings(method, own)
        else:
            assert D3LLMGenerationConfig(**settings).rules(64).block_length in (16, 64), row
        assert json.loads(json.dumps(settings)) == settings


@pytest.mark.parametrize("name", ALL)
def test_every_column_of_a_suite_can_be_shown_and_every_comparison_is_with_an_earlier_row(name):
    suite = ALL[name]
    assert set(suite.columns) <= set(COLUMNS)
    order = list(suite.rows)
    for row, base in suite.against.items():
        assert order.index(base) <= order.index(row)
        assert suite.against[base] == base
    assert not suite.against or set(suite.against) == set(order)


EXACT_CACHES = {"exact", "exact_dual"}  # of blocks


def test_the_suites_leave_no_method_and_no_cache_out():
    assert {settings["decoding_method"] for settings in METHODS.rows.values()} == set(KNOWN) - OF_BLOCKS
    for suite in (CACHES, CACHES.larger):
        assert {settings.get("kv_cache", "none") for settings in suite.rows.values()} == set(KINDS) - {
            "exact",
            "exact_dual",
            "sliding",
        }
    assert "sliding" in {settings.get("kv_cache") for settings in WINDOWS.rows.values()}
    assert {s.get("draft_length") for s in LOSSLESS.rows.values()} == {None, 1, 2, 4, 8}


def test_a_row_and_its_variants_are_compared_with_the_row():
    rows, against = with_variants("a", {"steps": 4}, {"b": {"kv_cache": "dual"}})
    assert rows == {"a": {"steps": 4}, "a, b": {"steps": 4, "kv_cache": "dual"}}
    assert against == {"a": "a", "a, b": "a"}


def test_figures_equal_those_counted_by_hand():
    base = tally_of([[1, 2, 3, 0], [4, 5, 0, 0]], [3, 2], 8)
    ours = tally_of([[1, 7, 3, 6], [4, 5, 0, 0]], [4, 2], 4)  # of 4 + 2 positions two differ
    base.cpu_seconds, ours.cpu_seconds, ours.seconds, ours.correct = 2.0, 0.5, 1.26, 1
    assert ours.figures(base) == {
        "accuracy": 50.0,
        "tpf": 0.75,
        "tpf_reference": 0.6,
        "positions_per_token": 13.3,
        "tokens": 6,
        "forwards": 8,
        "positions": 80,
        "seconds": 1.3,
        "cpu_seconds": 0.5,
        "equal_tokens": 66.67,
        "differing_answers": 1,
        "forwards_saved": 50.0,
        "relative_cpu": 0.25,
    }
    alike = base.figures(base)
    assert (alike["equal_tokens"], alike["differing_answers"], alike["relative_cpu"]) == (100.0, 0, 1.0)


def test_an_answer_that_differs_only_behind_its_stop_token_counts_as_different():
    base, ours = tally_of([[1, 2, 0]], [1], 1), tally_of([[1, 3, 0]], [1], 1)
    figures = ours.figures(base)
    assert (figures["equal_tokens"], figures["differing_answers"]) == (100.0, 1)


def test_time_is_that_of_generate_alone(monkeypatch):
    clock = {"wall": iter((10.0, 10.5)), "cpu": iter((3.0, 3.25))}
    fake = SimpleNamespace(perf_counter=lambda: next(clock["wall"]), process_time=lambda: next(clock["cpu"]))
    monkeypatch.setattr(module, "time", fake)
    tally = tally_of([[1]], [1], 1)
    assert (tally.seconds, tally.cpu_seconds) == (0.5, 0.25)


@pytest.mark.every(6)
@pytest.mark.parametrize("name", some_of(SUITES, every=2))
def test_four_problems_give_every_column_of_a_suite(checkpoint, name):
    suite = SUITES[name]
    some = dict(list(suite.rows.items())[::4])
    some |= {suite.against[row]: suite.rows[suite.against[row]] for row in some if row in suite.against}
    some = {row: settings for row, settings in suite.rows.items() if row in some}
    against = {row: base for row, base in suite.against.items() if row in some}
    problems = generate_problems(4, split="test", seed=1)
    model = loaded("d3llm-causal") if name == "causal" else checkpoint
    rows = measure(*model, problems, Suite(some, suite.columns, against), max_new_tokens=16, batch_size=3)
    assert [row["name"] for row in rows] == list(some)
    for row in rows:
        expected = {"name", "settings", *FIGURES, *suite.columns} - {"added"}
        assert set(row) == expected | ({"against"} if against else set())
        for column in suite.columns:
            assert COLUMNS[column][2](row, {r["name"]: r for r in rows})
    if name == "lossless":
        assert all(row["differing_answers"] == 0 for row in rows)
        assert all(row["forwards_saved"] > 20 for row in rows if row["name"] != row["against"])


def test_settings_take_turns_batch_by_batch(checkpoint, monkeypatch):
    model, tokenizer = checkpoint
    seen = []
    generate = Tally.generate

    def watched(self, model, inputs, settings, **more):
        seen.append((len(inputs["input_ids"]), settings["entropy_threshold"], more["max_new_tokens"]))
        return generate(self, model, inputs, settings, **more)

    monkeypatch.setattr(Tally, "generate", watched)
    rows = {str(n): {"decoding_method": "dparallel", "entropy_threshold": n} for n in (1.0, 2.0)}
    problems = generate_problems(3, split="test", seed=1)
    measure(model, tokenizer, problems, Suite(rows, ()), max_new_tokens=2, batch_size=2)
    warm = [(2, 1.0, 1), (2, 2.0, 1)]
    assert seen == [*warm, (2, 1.0, 2), (2, 2.0, 2), (1, 1.0, 2), (1, 2.0, 2)]


@pytest.mark.full
def test_the_larger_model_counts_what_each_cache_saves_and_leaves_the_random_numbers_alone():
    state = torch.random.get_rng_state()
    found = measure_larger(CACHES.larger, rounds=1, **SIZES)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [row["batch"] for row in found["rows"]] == [1] * len(CACHES.larger.rows) + [2] * len(CACHES.larger.rows)
    for row in found["rows"]:
        assert row["tokens"] == row["forwards"] == 20 * row["batch"]
        assert "accuracy" not in row
    full = {row["name"]: row["positions_per_token"] for row in found["rows"]}
    assert full["one token a forward"] == 28
    assert full["one token a forward, dual"] < full["one token a forward, prefix"] < 28
    assert (found["prompt_tokens"], found["new_tokens"], found["rounds"]) == (8, 20, 1)


def test_of_the_rounds_the_fastest_counts(monkeypatch):
    seconds = iter([9.0, 5.0, 3.0, 4.0])  # of the warm-up, then of three rounds

    def generate(self, *args, **kwargs):
        self.answers, self.tokens, self.forwards, self.reference = [([1], 1)], 1, 1, 1
        self.seconds = self.cpu_seconds = next(seconds)

    monkeypatch.setattr(Tally, "generate", generate)
    suite = Suite({"a": {}}, ("seconds", "cpu_seconds"))
    row = measure_larger(suite, rounds=3, **(SIZES | {"batch_sizes": (1,)}))["rows"][0]
    assert (row["seconds"], row["cpu_seconds"]) == (3.0, 3.0)


def test_a_results_file_holds_what_repeats_it_and_no_folder_of_the_machine(tmp_path, monkeypatch, one_thread):
    monkeypatch.setitem(
        SUITES, "methods", Suite({"a": METHODS.rows["dParallel"]}, METHODS.columns, larger=CACHES.larger)
    )
    monkeypatch.setattr(module, "measure_larger", lambda suite, rounds: {"rounds": rounds, "rows": []})
    path = tmp_path / "new" / "methods.json"
    argv = [
        "d3llm-llada",
        "--suite",
        "methods",
        "--num-problems",
        "2",
        "--seed",
        "7",
        "--rounds",
        "1",
        "-o",
        str(path),
    ]
    main(argv)
    results = json.loads(path.read_text())
    assert results["command"] == (
        "python -m d3llm_hf.evaluation.measure d3llm-llada --suite methods --num-problems 2 --seed 7 --rounds 1 "
        "-o methods.json"
    )
    assert (results["suite"], results["problems"], results["seed"]) == ("methods", 2, 7)
    assert results["larger"] == {"rounds": 1, "rows": []}
    made = {"d3llm_hf", "torch", "transformers", "python", "device", "threads", "weights_sha256", "date"}
    assert set(results["provenance"]) == made
    assert results["provenance"]["threads"] == 1
    assert str(tmp_path) not in path.read_text() and str(Path.cwd()) not in path.read_text()
    assert list(path.parent.iterdir()) == [path]


def test_the_file_of_the_model_card_keeps_its_form(tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SUITES, "card", Suite({"multi-block": SUITES["card"].rows["multi-block"]}, (), problems=2))
    main(["d3llm-llada", "-o", "results.json"])
    results = json.loads((tmp_path / "results.json").read_text())
    keys = ["schema", "task", "problems", "seed", "command", "parameters", "provenance", "rows"]
    assert list(results) == keys
    assert results["command"] == "python -m d3llm_hf.evaluation.measure d3llm-llada -o results.json"
    assert list(results["rows"][0]) == ["name", "settings", *FIGURES]
    committed = json.loads((embedded_checkpoints()["d3llm-llada"] / "results.json").read_text())
    assert list(committed) == keys and list(committed["rows"][0]) == ["name", "settings", *FIGURES]


def test_a_results_file_is_complete_or_as_it_was(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_rename_leaves_no_partial_file(tmp_path, monkeypatch):
    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space"):
        write_json(tmp_path / "results.json", {"a": 1})
    assert list(tmp_path.iterdir()) == []


def test_the_card_of_a_causal_model_has_its_own_rows(tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)
    rows = dict(list(SUITES["causal"].rows.items())[:2])
    monkeypatch.setitem(SUITES, "causal", Suite(rows, SUITES["causal"].columns, problems=2))
    main(["d3llm-causal", "-o", "results.json"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["command"] == "python -m d3llm_hf.evaluation.measure d3llm-causal -o results.json"
    plain, lookup = results["rows"]
    assert plain["tokens"] == lookup["tokens"] and lookup["forwards"] < plain["forwards"]
    assert plain["forwards"] == plain["tokens"] + 2  # and one for the end of each answer
    committed = json.loads((embedded_checkpoints()["d3llm-causal"] / "results.json").read_text())
    assert list(committed) == list(results) and committed["suite"] == results["suite"] == "causal"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["d3llm-causal", "--suite", "card"], r"--suite must be causal for a causal model.*got card for d3llm-causal"),
        (["d3llm-llada", "--suite", "causal"], r"--suite must be causal for a causal model.*got causal for d3llm-lla"),
        (["d3llm-llada", "--suite", "speed"], "invalid choice: 'speed'"),
        (["d3llm-llada", "--num-problems", "0"], r"--num-problems must be at least 1 \(got 0\)"),
        (["d3llm-llada", "--rounds", "-1"], r"--rounds must be at least 1 \(got -1\)"),
        (["no-such-folder"], r"MODEL must be a folder with model.safetensors.*\(got 'no-such-folder'\)"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_loaded(argv, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*argv, "-o", str(tmp_path / "results.json")])
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_another_process_measures_is_left_to_it(tmp_path):
    with (
        foreign_lock(tmp_path / "results.json"),
        pytest.raises(SystemExit, match=r"error: `--output` must be written by one process .*process 1 on elsewhere"),
    ):
        main(["d3llm-llada", "-o", str(tmp_path / "results.json")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["methods", "caches", "lossless"])
def test_the_results_in_the_repository_are_of_the_suites_as_they_are(name):
    results = json.loads((Path(module.__file__).parent / "results" / f"{name}.json").read_text())
    rows = {row: chosen for row, chosen in SUITES[name].rows.items() if chosen["decoding_method"] not in AWAITED}
    assert {row["name"]: row["settings"] for row in results["rows"]} == rows
    if SUITES[name].larger is not None:
        settings = {row["name"]: row["settings"] for row in results["larger"]["rows"]}
        assert settings == SUITES[name].larger.rows
    assert results["suite"] == name
    assert table(results).count("Regenerate: `python -m d3llm_hf.evaluation.measure") == 1


def test_lossless_rows_in_the_repository_differ_nowhere():
    results = json.loads((Path(module.__file__).parent / "results" / "lossless.json").read_text())
    assert {row["differing_answers"] for row in results["rows"]} == {0}


def test_the_page_of_the_methods_has_every_method_and_cache_with_its_settings_and_defaults():
    text = (REPOSITORY / "docs" / "methods.md").read_text(encoding="utf-8")
    of_methods, of_caches = text.split("\n## Caches\n")
    for known, part in ((KNOWN, of_methods), (KINDS, of_caches)):
        for name, settings in known.items():
            (row,) = [line for line in part.splitlines() if line.startswith(f'| `"{name}"` |')]
            for setting, value in settings.items():
                if setting == "kv_cache":
                    shown = f'`"{value}"`'
                elif value is None:
                    shown = f"`{setting}`"
                else:
                    text = f"{value:g}" if type(value) is float else json.dumps(value).capitalize()
                    shown = f"`{setting}={json.dumps(value) if isinstance(value, str) else text}`"
                assert shown in row, (name, setting)
