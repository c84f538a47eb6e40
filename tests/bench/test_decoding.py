"""`d3llm bench decode`, `growth`, `quantised` and `all` on the smallest shapes; no figure of theirs is judged here."""

import dataclasses
import importlib.metadata
import json
import re
import sys
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from foreign_locks import foreign_lock
from outcomes import outcome_of
from tiny import tiny_prompt, trained_like

from d3llm_hf import cli
from d3llm_hf.bench import decoding, growth, memory, quantised, split
from d3llm_hf.bench.decoding import BASELINE, OURS
from d3llm_hf.bench.plain_decoding import entropies, plain_generate
from d3llm_hf.bench.shapes import SHAPES, DecodingBench, half_decided, prepared
from d3llm_hf.commands import bench_decoding
from d3llm_hf.evaluation import provenance
from d3llm_hf.evaluation.tables import fill as tables
from d3llm_hf.models import at_work, caching


TINY = SHAPES["tiny"]
CHECKPOINT = ["--model", "d3llm-llada", "--max-new-tokens", 16, "--device", "cpu"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """What would be done in other processes is done in this one, and matmuls are not measured for long."""
    monkeypatch.setattr(decoding, "in_fresh_process", lambda function, *args: function(*args))
    monkeypatch.setattr(split, "_SECONDS_OF_MATMUL", 1e-4)


@pytest.fixture
def run(capsys):
    """Runs the command in this process: `(exit code, stdout, stderr)`."""
    return partial(outcome_of, cli.main, capsys, "bench")


# Shapes


def test_the_head_of_the_8b_like_shape_has_the_share_of_weights_that_lladas_has():
    shape = SHAPES["8b-like"]
    layer = 4 * shape.d_model**2 + 3 * shape.d_model * 3 * shape.d_model
    share = shape.vocab_size * shape.d_model / (shape.layers * layer)
    assert share == pytest.approx(126464 * 4096 / (32 * (4 * 4096**2 + 3 * 4096 * 12288)), rel=1e-3)
    assert SHAPES["wide-vocab"].vocab_size == 126464 and SHAPES["wide-vocab"].d_model == 512


@pytest.mark.parametrize("seed", range(5))
def test_a_random_model_is_sure_of_the_wanted_share_of_masks(seed):
    settings = {"entropy_threshold": 0.4}
    shape = replace(TINY, vocab_size=256, new_tokens=64, sure=0.25, settings=settings, seed=seed)
    with prepared(shape) as (work, scale):
        canvas, wanted = half_decided(shape, work)
        found = entropies(work.model(input_ids=canvas).logits[wanted])
    # Whatever weights are drawn: the share is right to the nearest mask, or to the next one if two are equally unsure.
    assert abs((found <= 0.4).sum() - 0.25 * len(found)) <= 1.5 and scale != 1.0
    assert len(found) == wanted[:, 8 : 8 + 4 * 8].sum() > 0
    with prepared(shape, scale) as (again, same):
        assert torch.equal(again.model.lm_head.weight, work.model.lm_head.weight) and same == scale


def test_a_schedule_decides_so_many_tokens_in_every_forward():
    with prepared(replace(TINY, schedule=4)) as (work, _):
        for contestant in decoding.contestants(replace(TINY, schedule=4)).values():
            assert decoding.decode(contestant, work).forwards == 4


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"layers": 0}, r"`layers` must be at least 1 \(got 0\)"),
        ({"vocab_size": 15}, r"`vocab_size` must be at least 16 \(got 15\)"),
        ({"d_model": 100}, r"`d_model` must be even, and above 64 a multiple of it \(got 100\)"),
        ({"sure": 1.0}, r"`sure` must be between 0 and 1 \(got 1.0\)"),
        ({"dtype": "int8"}, r"`dtype` must be one of .*got 'int8'"),
        ({"device": "abacus"}, r"`device` must be one of .*got 'abacus'"),
        ({"schedule": 2, "settings": {"steps": 3}}, "`schedule` decides by LLaDA's quota"),
        ({"settings": {"decoding_method": "dream"}}, "`decoding_method` must be one of"),
    ],
)
def test_a_bench_refuses_what_it_cannot_measure(chosen, message):
    with pytest.raises(ValueError, match=message):
        DecodingBench(**chosen)


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="`device` must be one that torch finds"):
        replace(TINY, device="cuda")


# Contestants


def test_with_a_cache_the_plain_loop_has_it_as_far_as_the_reference_does():
    def names(**settings):
        chosen = decoding.contestants(replace(TINY, settings=settings))
        return {name: contestant.against for name, contestant in chosen.items()}

    assert names() == {BASELINE: None, OURS: BASELINE}
    delayed = {"plain, delayed cache": None, "generate, delayed cache": "plain, delayed cache"}
    assert names(kv_cache="delayed", cache_delay=1) == {BASELINE: None, OURS: BASELINE} | delayed
    assert names(kv_cache="dual") == {BASELINE: None, OURS: BASELINE, "generate, dual cache": None}


def test_contestants_of_different_tokens_are_no_measurement():
    turns = {BASELINE: decoding.Turn([[1, 2], [3]]), OURS: decoding.Turn([[1, 2, 3], [3]])}
    chosen = decoding.contestants(TINY)
    assert decoding.equal_tokens(turns[BASELINE], turns[OURS]) == 3 / 4
    with pytest.raises(ArithmeticError, match=r"`generate` must give the tokens of `plain` .*got 75.00 %"):
        decoding.check(TINY, turns, chosen)
    decoding.check(replace(TINY, dtype="bfloat16"), turns, chosen)


# Where the time goes


def test_nested_parts_are_booked_once(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    watch = split.Stopwatch("cpu")
    with watch.part("backbone"):
        with watch.part("cache"):
            pass
        with watch.part("cache"):
            pass
    assert watch.seconds == dict.fromkeys(split.PARTS, 0) | {"backbone": 1 + 3 + 5, "cache": 2 + 4}


def test_the_parts_of_both_loops_are_found_and_everything_is_put_back(monkeypatch):
    model = trained_like("llada")
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    before = (dict(caching.PLANS), dict(vars(at_work)), dict(vars(model.model)), dict(vars(model.lm_head)))
    prompt = {"input_ids": torch.tensor([tiny_prompt(0, 6)]), "max_new_tokens": 16}
    settings = {"decoding_method": "d3llm", "block_length": 4, "kv_cache": "delayed", "cache_delay": 0}
    for decode in (model.generate, lambda **given: plain_generate(model, **given)):
        with split.taken_apart(model, "cpu") as watch:
            decode(**prompt, **settings)
        used = {part for part, seconds in watch.seconds.items() if seconds > 0}
        assert used >= {"backbone", "head", "score", "decide", "rest"}
        assert ("cache" in used) == (decode == model.generate)
    assert before == (caching.PLANS, vars(at_work), vars(model.model), vars(model.lm_head))


def test_the_operations_of_the_backbone_are_counted_by_hand(monkeypatch):
    model = trained_like("llada")  # one layer of width 16, MLP 32
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    wide, narrow = 2 * 16 * 16, 2 * 16 * 16 + 3 * 16 * 32  # keys and values; queries, output and MLP
    for settings, widths in (
        ({"kv_cache": "none"}, [(10, 10, 2), (10, 10, 1)] * 2),
        ({"kv_cache": "dual"}, [(10, 10, 2), (2, 10, 1)] * 2),
    ):
        with split.widths_seen(model) as forwards:
            model.generate(
                torch.tensor([tiny_prompt(0, 6)]),
                max_new_tokens=4,
                block_length=2,
                decoding_method="llada",
                **settings,
            )
        assert [(each.positions, each.keys, each.last) for each in forwards] == widths
        assert split.backbone_flops(model, forwards) == sum(
            2 * (positions * wide + last * narrow) + 4 * 16 * keys * last for positions, keys, last in widths
        )
    with split.widths_seen(model) as forwards:
        plain_generate(
            model,
            torch.tensor([tiny_prompt(0, 6)]),
            max_new_tokens=4,
            block_length=2,
            kv_cache="delayed",
            cache_delay=0,
        )
    assert forwards[0] == split.Width(10, 10, 10) and {each.keys for each in forwards} == {10}
    assert min(each.positions for each in forwards) < 5
    assert split.matmul_rate(model, 10) > 0


def test_a_step_lasts_from_one_forward_to_the_next(monkeypatch):
    model = trained_like("llada")
    now = iter(range(100))
    monkeypatch.setattr(split.time, "perf_counter", lambda: float(next(now)) ** 2)
    with split.steps_timed(model, "cpu") as seconds:
        for _ in range(3):
            model(torch.tensor([tiny_prompt(0, 6)]))
        assert seconds == []
    assert seconds == [1.0, 3.0]
    model(torch.tensor([tiny_prompt(0, 6)]))
    assert len(seconds) == 2


# The commands


@pytest.mark.every(2)
@pytest.mark.parametrize("options", [[], ["--dtype", "bfloat16", "--batch-size", "2", "--kv-cache", "delayed"]])
def test_the_bench_of_decoding_writes_its_results_and_prints_their_table(run, tmp_path, options):
    path = tmp_path / "made" / "results.json"
    code, out, err = run("decode", "--shape", "tiny", *options, "-o", path, "--device", "cpu")
    assert (code, err.splitlines()[-1]) == (0, f"wrote {path}"), err
    results = json.loads(path.read_text())
    assert out == tables.table(results) and "| on CUDA | never measured |" in out
    assert results["provenance"]["instructions"] == provenance.instructions()
    rows = {row["name"]: row for row in results["rows"]}
    assert len(rows) == (4 if options else 2)
    assert (rows[BASELINE]["speedup"], rows[BASELINE]["equal_tokens"], rows[BASELINE]["positions_ratio"]) == (
        1,
        100,
        1,
    )
    if not options:
        assert rows[OURS]["same_as"] == BASELINE and rows[OURS]["equal_tokens"] == 100
    for row in rows.values():
        assert row["tokens"] == 16 * results["shape"]["batch_size"] and row["tpf"] >= 1
        assert row["tokens_per_second"] > 0 and set(row["split"]) == set(split.PARTS)
        assert row["peak_bytes"] >= row["work_bytes"] >= 0 and row["matmul_fraction"] > 0
    words = results["command"].split()
    assert words[:3] == ["d3llm", "bench", "decode"] and set(words) >= {*options, "--shape", "tiny", "results.json"}


@pytest.mark.parametrize("suite", ["decode", "growth", "quantised", "train"])
def test_a_results_file_that_another_process_measures_is_left_to_it(run, tmp_path, suite):
    path = tmp_path / "results.json"
    with foreign_lock(path):
        shape = [] if suite == "quantised" else ["--shape", "tiny"]
        code, _, err = run(suite, *shape, "-o", path, "--device", "cpu")
    assert code == 2 and "`--output` must be written by one process at a time" in err
    assert not path.exists()


@pytest.mark.full
def test_a_checkpoint_answers_word_problems(run, tmp_path):
    path = tmp_path / "results.json"
    options = ["--prompts", 2, "--batch-size", 2, "--repeats", 1, "--dtype", "float32", "--kv-cache", "dual"]
    code, out, err = run("decode", *CHECKPOINT, *options, "-o", path, "--no-early-stop", "--method", "d3llm")
    assert code == 0, err
    assert out.startswith("| decoding | accuracy |") and "`d3llm-llada` on word problems, 2 of them" in out
    results = json.loads(path.read_text())
    assert {"accuracy", "positions_ratio"} <= set(results["rows"][-1])
    names = ["plain", "plain, one token a forward", "generate", "generate, dual cache"]
    assert [row["name"] for row in results["rows"]] == names
    settings = results["rows"][1]["settings"]
    assert (settings["decoding_method"], settings["early_stop"], settings["kv_cache"]) == ("llada", False, "none")
    assert results["rows"][1]["tpf"] <= 1 and results["rows"][1]["same_as"] is None
    assert "--no-early-stop" in results["command"] and "--decoding-method d3llm" in results["command"]


@pytest.mark.full
def test_growth_follows_each_axis_and_draws_it(run, tmp_path, monkeypatch):
    path = tmp_path / "growth.json"
    options = ["--prompt-lengths", 8, 16, "--batch-sizes", 2, "--repeats", 1, "--device", "cpu", "-o", path]
    code, out, err = run("growth", "--shape", "tiny", *options)
    assert code == 0 and err.splitlines() == [f"wrote {path}", f"wrote {path.with_suffix('.svg')}"], err
    results = json.loads(path.read_text())
    assert out == tables.table(results) and "| prompt 16, generate, dual cache |" in out
    assert results["provenance"]["instructions"] == provenance.instructions()
    points = [("prompt_length", 8), ("prompt_length", 16), ("batch_size", 2)]
    assert [(row["axis"], row["value"]) for row in results["rows"]] == [p for p in points for _ in range(3)]
    assert {row["tpf"] for row in results["rows"]} == {4.0}
    assert "--prompt-lengths 8 16" in results["command"]
    assert path.with_suffix(".svg").read_bytes() == growth.draw(results, "svg")
    assert growth.draw(results, "png").startswith(b"\x89PNG")

    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    with pytest.raises(ImportError, match="needs matplotlib"):
        growth.draw(results, "png")
    monkeypatch.setattr(growth, "measure_growth", lambda *args: results)
    code, _, err = run("growth", "--shape", "tiny", "-o", path)
    assert code == 0 and "needs matplotlib" in err
    path.with_suffix(".svg").unlink()
    assert run("growth", "--shape", "tiny", "--no-picture", "-o", path)[2] == f"wrote {path}\n"
    assert json.loads(path.read_text())["command"].endswith("--no-picture -o growth.json")
    assert run("growth", "--shape", "tiny")[::2] == (0, "")


def test_a_method_of_ones_own_grows_without_a_schedule():
    chosen = growth.growth_bench(replace(TINY, settings={"decoding_method": "d3llm", "kv_cache": "none"}))
    assert chosen.schedule == 0 and chosen.cache == "none"


def test_variants_that_cannot_run_say_why(run, tmp_path, monkeypatch):
    def installed(name):
        if name == "torchao":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    def refuse(bench):
        raise RuntimeError("needs\nanother device")

    monkeypatch.setattr(importlib.metadata, "version", installed)
    monkeypatch.setitem(quantised.VARIANTS, "int8 weights, bitsandbytes", ("bitsandbytes", refuse))
    path = tmp_path / "results.json"
    code, out, err = run("quantised", *CHECKPOINT, "--prompts", 3, "--batch-size", 2, "-o", path)
    assert code == 0, err
    results = json.loads(path.read_text())
    assert results["provenance"]["instructions"] == provenance.instructions()
    rows = {row["name"]: row for row in results["rows"]}
    assert rows["int8 weights, torchao"]["reason"] == "not installed"
    reason = "does not run on CPU: RuntimeError: needs another device"
    assert rows["int8 weights, bitsandbytes"]["reason"] == reason
    assert rows["float32"]["equal_tokens"] == 100 and rows["float32"]["speedup"] == 1
    assert rows["float32"]["weight_bytes"] == pytest.approx(2 * rows["bfloat16"]["weight_bytes"], rel=0.01)
    assert f"| int8 weights, bitsandbytes | {reason} |" in out and "bitsandbytes 1.0. CPU" in out
    assert out.splitlines()[2].startswith("| float32 | ")

    monkeypatch.setitem(quantised.VARIANTS, "float32", (None, refuse))
    with pytest.raises(RuntimeError, match="another device"):
        quantised.measure_quantised(DecodingBench(model="d3llm-llada"))


def test_weights_are_counted_within_quantised_tensors_and_once():
    class Packed:
        def __init__(self):
            self.values, self.scale = torch.zeros(8, dtype=torch.int8), torch.zeros(2)

        def __tensor_flatten__(self):
            return ["values", "scale"], None

    eight_bit = torch.nn.Parameter(torch.zeros(4))
    eight_bit.CB, eight_bit.SCB = torch.zeros(8, dtype=torch.int8), None
    shared = torch.zeros(3)
    held = SimpleNamespace(parameters=lambda: [Packed(), eight_bit, shared, shared], buffers=lambda: [])
    assert quantised.weight_bytes(held) == (8 + 8) + (16 + 8) + 12


def test_all_runs_every_bench_for_a_device_and_names_what_failed(run, tmp_path, monkeypatch):
    commands = []

    def process(words):
        commands.append(words)
        return SimpleNamespace(returncode=int({"decode", "wide-vocab"} <= set(words)))

    monkeypatch.setattr(bench_decoding, "_run", process)
    code, _, err = run("all", "-o", tmp_path)
    assert code == 2 and re.search(
        r"Some benches failed \(got errors from \['bench_decode_wide_vocab', '.*_bf16'\]", err
    )
    assert len(commands) == len(bench_decoding.COMMITTED)
    for words in commands:
        assert words[:4] == [sys.executable, "-m", "d3llm_hf", "bench"] and words[-4:-2] == ["--device", "cuda"]
        assert words[-1].endswith("-cuda.json")
        cli.build_parser().parse_args(words[3:])  # every committed command is one that exists

    commands.clear()
    assert run("all", "-o", tmp_path, "--device", "cpu", "--only", "bench_growth")[0] == 0
    assert commands[0][-1] == str(tmp_path / "bench_growth.json") and len(commands) == 1


def test_every_field_of_the_bench_is_an_option():
    fields = {
        option[0] for option in (bench_decoding._SIZES | bench_decoding._RUNS | bench_decoding._SCHEDULE).values()
    }
    assert fields | {"model", "settings", "device"} == {field.name for field in dataclasses.fields(DecodingBench)}


@pytest.mark.parametrize(
    ("argv", "pattern"),
    [
        (
            ["decode", "--shape", "huge"],
            r"`--shape` must be one of \['8b-like', 'wide-vocab', 'tiny'\] \(got 'huge'\)",
        ),
        (["decode", "--model", "d3llm-llada", "--layers", "2"], r"`--model` has sizes of its own \(got 'd3llm-llada'"),
        (["decode", "--entropy-bound", "0.1"], "`entropy_bound` is not a setting of a plain d3llm"),
        (["growth", "--shape", "tiny"], "`axes` must give values to one of"),
        (["quantised", "--model", ""], "`model` must name a checkpoint"),
        (["all"], "the following arguments are required: -o/--output"),
        (["all", "-o", "x", "--only", "bench"], r"`--only` must name some of .*got \['bench'\]"),
    ],
)
def test_bad_options_are_answered_in_one_line(run, argv, pattern):
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"d3llm: error: .*{pattern}.*\n", err), err


def test_growth_is_measured_on_random_models_only():
    with pytest.raises(ValueError, match=r"`model` must be left out: .*got 'd3llm-llada'"):
        growth.measure_growth(DecodingBench(model="d3llm-llada"), {"batch_size": [1]})


# What the processor is


@pytest.mark.parametrize(
    ("system", "has", "expected"),
    [
        ("x86_64", {}, []),
        ("AMD64", {"_is_avx512_bf16_supported"}, ["AVX512_BF16"]),
        ("x86_64", {"_is_avx512_bf16_supported", "_is_amx_tile_supported"}, ["AVX512_BF16", "AMX"]),
        ("aarch64", {}, None),
    ],
)
@pytest.mark.parametrize("widened", [True, False])
def test_results_say_which_instructions_the_processor_has(monkeypatch, system, has, expected, widened):
    monkeypatch.setattr(provenance.platform, "machine", lambda: system)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(provenance, "is_slow", lambda dtype: widened and dtype == torch.bfloat16)
    for question in provenance._BFLOAT16.values():
        monkeypatch.setattr(torch.cpu, question, lambda question=question: question in has, raising=False)
    assert provenance.instructions() == {"torch": "AVX2", "bfloat16": expected, "widened": widened}
    assert provenance.on_device("cpu", 2)["instructions"] == provenance.instructions()


def test_where_torch_does_not_say_which_instructions_there_are_nothing_is_claimed(monkeypatch):
    for question in provenance._BFLOAT16.values():
        monkeypatch.delattr(torch.cpu, question, raising=False)
    assert provenance.instructions()["bfloat16"] is None


def test_the_instructions_of_the_processor_beside_a_gpu_are_no_matter(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    made = provenance.on_device("cuda", 1)
    assert made["machine"] == "a GPU" and "instructions" not in made


# Tables


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (None, "CPU (x86_64), threads"),
        ({"torch": "AVX2", "bfloat16": [], "widened": True},
         "CPU (x86_64, AVX2, no instructions for bfloat16), threads"),
        ({"torch": "AVX512", "bfloat16": ["AVX512_BF16", "AMX"], "widened": False},
         "CPU (x86_64, AVX512, AVX512_BF16 and AMX), threads"),
        ({"torch": "SVE256", "bfloat16": None, "widened": False}, "CPU (x86_64, SVE256), threads"),
    ],
)  # fmt: skip
def test_a_table_names_the_instructions_where_its_results_do(found, text):
    made = {"device": "cpu", "machine": "x86_64", "threads": 1, "torch": "t", "transformers": "f"}
    made |= {} if found is None else {"instructions": found}
    results = {"suite": "bench_quantised", "model": "m", "problems": 2, "batch_size": 1, "new_tokens": 8}
    results |= {"settings": {}, "libraries": {}, "provenance": made, "rows": [], "command": "c"}
    assert text in tables.table(results)


def test_rows_of_another_machine_stand_behind_those_of_a_cpu(tmp_path):
    made = {"device": "cpu", "machine": "x", "threads": 1, "torch": "t", "transformers": "f"}
    row = {"accuracy": 90.0, "equal_tokens": 100.0, "tpf": 2.0, "tokens_per_second": 3.0, "speedup": 1.0}
    row |= {"name": "float32", "cpu_speedup": 1.0, "weight_bytes": 2_000_000}
    results = {"suite": "bench_quantised", "model": "m", "problems": 2, "batch_size": 1, "new_tokens": 8}
    results |= {"settings": {}, "libraries": {}, "provenance": made, "rows": [row], "command": "c"}
    (tmp_path / "r.json").write_text(json.dumps(results))
    document = tmp_path / "README.md"
    document.write_text("<!-- results:begin r.json -->\n<!-- results:end -->\n")
    assert "| on CUDA | never measured |" in tables.fill(document)

    other = results | {"provenance": made | {"device": "cuda", "machine": "a GPU"}}
    (tmp_path / "r-cuda.json").write_text(json.dumps(other))
    text = tables.fill(document)
    assert "| float32, on CUDA | 90.0 % |" in text and "never measured" not in text and "CUDA (a GPU), torch t" in text
    assert "never measured" not in tables.table(other)


@pytest.mark.slow
def test_each_contestants_memory_is_measured_in_a_process_of_its_own():
    before, peak = memory.in_fresh_process(decoding.memory, TINY, OURS, 2.0)
    assert 0 < before <= peak


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"kv_cache": "delayed"}, {"decoding_method": "llada", "kv_cache": "dual"}])
def test_decoding_on_a_gpu_gives_the_tokens_of_a_cpu(settings):
    with prepared(replace(TINY, new_tokens=32)) as (work, _):
        batch = work.batches[0] | work.limits | {"block_length": 8} | settings
        expected = work.model.generate(**batch, return_dict_in_generate=True)
        there = {name: value.cuda() if torch.is_tensor(value) else value for name, value in batch.items()}
        found = work.model.cuda().generate(**there, return_dict_in_generate=True)
    assert found.sequences.device.type == "cuda"
    assert torch.equal(found.sequences.cpu(), expected.sequences)
    assert torch.equal(found.step_map.cpu(), expected.step_map)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["none", "dual"])
def test_flash_attention_decodes_as_sdpa_does_on_a_gpu(kind):
    pytest.importorskip("flash_attn")
    shape = replace(TINY, d_model=64, dtype="bfloat16", schedule=4, settings={"kv_cache": kind}, device="cuda")
    found = {}
    for implementation in ("sdpa", "flash_attention_2"):
        with prepared(shape) as (work, _):
            work.model.set_attn_implementation(implementation)
            found[implementation] = decoding.decode(decoding.contestants(shape)[OURS], work)
    assert found["sdpa"].forwards == found["flash_attention_2"].forwards
    assert decoding.equal_tokens(*found.values()) > 0.5  # bfloat16 rounds otherwise in another kernel


@pytest.mark.gpu
def test_the_bench_of_decoding_runs_on_a_gpu(run, tmp_path):
    path = tmp_path / "results.json"
    assert run("decode", "--shape", "tiny", "--device", "cuda", "-o", path)[0] == 0
    results = json.loads(path.read_text())
    assert results["rows"][-1]["peak_bytes"] > 0 and "never measured" not in tables.table(results)
