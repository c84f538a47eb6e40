"""The plain form of the distillation loss, what ours keeps in memory beside it, and `d3llm bench train`."""

import json
import re
import sys
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from distillation import make_trainer, rows, student
from official import tiny_tokenizer
from outcomes import outcome_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from d3llm_hf import cli
from d3llm_hf.bench import memory
from d3llm_hf.commands import bench as bench_command
from d3llm_hf.evaluation import provenance
from d3llm_hf.evaluation.tables import fill as tables
from trainers.bench import training as bench_train
from trainers.bench.plain_distill import FullLogitsLearntRowsTrainer, FullLogitsTrainer
from trainers.bench.training import BASELINE, OURS, ROLLOUT, SHAPES, VARIANTS, TrainBench
from trainers.distill.trainer import PseudoTrajectoryDistillTrainer


ALL = [PseudoTrajectoryDistillTrainer, FullLogitsTrainer, FullLogitsLearntRowsTrainer]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


# The plain loss


@torch.no_grad()
def make_right(trainer, batch):
    """Put what the model predicts in the first view at every second place that is learnt there: so much is right."""
    length = batch["labels"].shape[1]
    views = trainer._draw(batch, training=True)
    canvas = batch["input_ids"].clone()
    canvas[:, -length:][views.hidden[0]] = trainer.mask_token_id
    last = canvas.shape[1] - trainer.label_shift
    logits = trainer.model(input_ids=canvas, attention_mask=batch["attention_mask"]).logits[:, last - length : last]
    rows, columns = (places[::2] for places in views.learnt[0].nonzero(as_tuple=True))
    for name in ("input_ids", "labels"):
        batch[name][:, -length:][rows, columns] = logits.argmax(-1)[rows, columns]
    return batch


def loss_and_gradients(trainer, batch):
    trainer.model.train().zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), {name: weight.grad for name, weight in trainer.model.named_parameters()}


@pytest.mark.every(9)
@pytest.mark.parametrize(("family", "shift"), [("llada", 0), ("Dream", 1)])
@pytest.mark.parametrize("complementary", [True, False])
@pytest.mark.parametrize(
    ("objective", "options"),
    [
        ("trajectory", {}),
        ("random", {"loss_reduction": "sample"}),
        ("certainty", {"supervise_eos_fill": False}),
        ("trajectory", {"sft_weight": 0.5, "blockwise": False}),
    ],
    ids=["trajectory", "random", "certainty", "with sft"],
)
def test_the_plain_loss_and_its_gradients_are_ours(
    tmp_path, tokenizer, family, shift, complementary, objective, options
):
    model = student(tokenizer, family)
    options = {"objective": objective, "complementary": complementary, "noise_start": 0.6, **options}
    trainers = [make_trainer(tmp_path, tokenizer, model=model, kind=kind, **options) for kind in ALL]
    batch = trainers[0].data_collator([row | {"sample_id": index} for index, row in enumerate(rows(3))])
    make_right(trainers[0], batch)
    loss, gradients = loss_and_gradients(trainers[0], batch)
    assert trainers[0].label_shift == shift and trainers[0]._metric_sums[0]["right"] > 0
    for plain in trainers[1:]:
        other, others = loss_and_gradients(plain, batch)
        assert other == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(others, gradients, rtol=1e-4, atol=1e-7)
    assert plain.compute_loss(model, batch, return_outputs=True)[0].item() == other


class WideTensors(TorchDispatchMode):
    """Rows of the largest float32 tensor over a vocabulary that any operation makes, forward and backward."""

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size, self.rows = vocab_size, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for each in tree_leaves(output):
            if (
                isinstance(each, torch.Tensor)
                and each.dtype == torch.float32
                and each.shape[-1:] == (self.vocab_size,)
            ):
                self.rows = max(self.rows, each.numel() // self.vocab_size)
        return output


def test_nothing_of_the_sequence_times_the_vocabulary_is_made_in_float32(tmp_path, tokenizer):
    model = student(tokenizer).bfloat16()
    found = {}
    for kind in ALL:
        trainer = make_trainer(tmp_path, tokenizer, model=model, kind=kind, loss_chunk_size=3)
        batch = trainer.data_collator([row | {"sample_id": index} for index, row in enumerate(rows(4))])
        with WideTensors(len(tokenizer)) as wide:
            loss_and_gradients(trainer, batch)
        found[kind] = wide.rows
    assert found[PseudoTrajectoryDistillTrainer] == 3  # a chunk of the loss
    assert found[FullLogitsTrainer] == found[FullLogitsLearntRowsTrainer] == batch["input_ids"].numel()


def test_what_is_kept_for_the_backward_pass_is_the_learnt_rows_at_most(tmp_path, tokenizer):
    model = student(tokenizer)
    most = {}
    for kind in ALL[:2]:
        trainer = make_trainer(tmp_path, tokenizer, model=model, kind=kind)
        batch = trainer.data_collator([row | {"sample_id": index} for index, row in enumerate(rows(4))])
        kept = {}

        def keep(tensor, kept=kept):
            if tensor.shape[-1:] == (len(tokenizer),) and tensor.data_ptr() != model.lm_head.weight.data_ptr():
                kept[tensor.data_ptr()] = tensor.numel() // len(tokenizer)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            trainer.compute_loss(model, batch)
        most[kind] = sum(kept.values())
    assert most[PseudoTrajectoryDistillTrainer] <= int(trainer._draw(batch, training=True).learnt.sum())
    assert most[FullLogitsTrainer] >= 2 * batch["input_ids"].numel()


# Memory


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is that of the process")
def test_peak_memory_is_that_of_the_work_alone():
    def use(megabytes):
        return lambda: torch.ones(megabytes << 18).sum()

    before, peak = memory.peak_memory(use(200), torch.device("cpu"))
    assert 190 << 20 < peak - before < 300 << 20
    before, peak = memory.peak_memory(use(50), torch.device("cpu"))
    assert 40 << 20 < peak - before < 120 << 20


def test_without_proc_the_peak_is_that_of_the_process(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_PROC", tmp_path)
    before, peak = memory.peak_memory(lambda: None, torch.device("cpu"))
    assert 50 << 20 < before <= peak


# The bench


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs the command in this process, and what it would do in others as well: `(exit code, stdout, stderr)`."""
    monkeypatch.setattr(bench_train, "in_fresh_process", lambda function, *args: function(*args))

    return partial(outcome_of, cli.main, capsys)


@pytest.mark.every(2)
@pytest.mark.parametrize("options", [[], ["--dtype", "bfloat16", "--sft-weight", "0.5", "--no-complementary"]])
def test_the_bench_writes_its_results_and_prints_their_table(run, tmp_path, options):
    path = tmp_path / "made" / "results.json"
    code, out, err = run("bench", "train", "--shape", "tiny", "--repeats", 3, *options, "-o", path, "--device", "cpu")
    assert (code, err.splitlines()[-1]) == (0, f"wrote {path}")
    results = json.loads(path.read_text())
    assert out == tables.table(results)
    assert results["provenance"]["instructions"] == provenance.instructions()
    assert [row["name"] for row in results["rows"]] == list(VARIANTS)
    first, *_, last = results["rows"]
    assert (first["name"], first["speedup"], first["cpu_speedup"], first["peak_ratio"]) == (BASELINE, 1.0, 1.0, 1.0)
    assert last["name"] == OURS and last["seconds"] > 0 and last["peak_bytes"] > last["step_bytes"] >= 0
    assert results["shape"]["repeats"] == 3 and results["shape"]["vocab_size"] == 512
    assert results["positions"]["all"] > results["positions"]["learnt"] > results["positions"]["right"] > 0
    assert results["command"].startswith("d3llm bench train --shape tiny ")
    assert set(results["command"].split()) >= {*options, "--repeats", "-o", "results.json"}


def test_a_step_with_a_rollout_is_measured_beside_the_others(run, tmp_path):
    path = tmp_path / "results.json"
    code, out, _ = run(
        "bench", "train", "--shape", "tiny", "--rollouts", "--repeats", 1, "--device", "cpu", "-o", path
    )
    results = json.loads(path.read_text())
    assert code == 0 and [row["name"] for row in results["rows"]] == [*VARIANTS, ROLLOUT]
    assert results["rows"][-1]["seconds"] > 0 and results["rows"][-1]["step_bytes"] >= 0
    assert "| states of a rollout |" in out and "the third is `PseudoTrajectoryDistillTrainer`. A step of" in out
    assert "--rollouts" in results["command"]


def test_a_table_of_another_device_says_what_its_memory_is():
    results = {
        "shape": vars(TrainBench()),
        "parameters": 1,
        "positions": {"all": 3, "learnt": 2, "right": 1},
        "agreement": {"loss": 0.0, "gradient": 0.0},
        "provenance": {"device": "cuda", "machine": "a GPU", "torch": "t", "transformers": "f"},
        "command": "x",
        "rows": [],
        "suite": "bench_train",
    }
    text = tables.table(results)
    assert "Peak: what torch's allocator has handed out" in text and "CUDA (a GPU), torch t" in text
    assert "never measured" not in text

    on_cpu = results | {"provenance": results["provenance"] | {"device": "cpu", "threads": 1}}
    assert "| on CUDA | never measured |" in tables.table(on_cpu)
    text = tables.table(on_cpu | {"cuda": results})
    assert "never measured" not in text and "(on CUDA what torch's allocator" in text and "CUDA (a GPU)" in text


def test_every_size_of_the_bench_is_an_option():
    assert {*bench_command._TRAIN, *bench_command._SWITCHES, "device"} == {field.name for field in fields(TrainBench)}
    options = ["--window", "4", "--steps", "2", "--no-complementary"]
    args = cli.build_parser().parse_args(["bench", "train", *options])
    assert (args.window, args.steps, args.complementary, args.shape) == (4, 2, False, "wide-vocab")


def test_help_explains_the_bench(run):
    code, out, _ = run("bench", "--help")
    assert code == 0 and "distillation step" in out
    code, out, _ = run("bench", "train", "--help")
    assert code == 0 and "--vocab-size INT" in out


@pytest.mark.parametrize(
    ("argv", "pattern"),
    [
        ([], "the following arguments are required: BENCHMARK"),
        (["encode"], "invalid choice: 'encode'"),
        (["train", "--shape", "huge"], r"`--shape` must be one of \['wide-vocab', 'tiny'\] \(got 'huge'\)"),
        (["train", "--layers", "x"], "argument --layers: invalid int value: 'x'"),
        (["train", "--layers", "0"], r"`layers` must be at least 1 \(got 0\)"),
        (["train", "--vocab-size", "3"], r"`vocab_size` must be at least 16 \(got 3\)"),
        (["train", "--d-model", "100"], r"`d_model` must be even, and above 64 a multiple of it \(got 100\)"),
        (["train", "--dtype", "float16"], r"`dtype` must be one of .*got 'float16'"),
        (["train", "--objective", "speed"], r"`objective` must be one of .*got 'speed'"),
        (["train", "--device", "abacus"], r"`device` must be one of .*got 'abacus'"),
        (["train", "--sft-weight", "-1"], r"`sft_weight` must be at least 0 \(got -1.0\)"),
        (["train", "unknown"], "unrecognized arguments: unknown"),
    ],
)
def test_bad_options_of_the_bench_are_answered_in_one_line(run, argv, pattern):
    code, out, err = run("bench", *argv)
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"d3llm: error: .*{pattern}.*\n", err), err


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="`device` must be one that torch finds"):
        replace(SHAPES["tiny"], device="cuda")


def test_a_missing_dependency_is_named_with_the_way_to_install_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "trainers.bench.training", None)
    code, _, err = run("bench", "train")
    assert code == 2 and "`d3llm bench train` needs what the trainers need" in err and "d3llm-hf[train]" in err


def test_variants_that_disagree_are_no_measurement(monkeypatch):
    monkeypatch.setitem(bench_train.TOLERANCES, "float32", (-1.0, 1.0))
    bench = SHAPES["tiny"]
    with (
        bench_train.prepared(bench) as (model, trainers, batches),
        pytest.raises(ArithmeticError, match="must have the loss and gradients of `full logits`"),
    ):
        bench_train.agreement(bench, model, trainers, batches[0])


@pytest.mark.slow
def test_each_variants_memory_is_measured_in_a_process_of_its_own():
    assert bench_train.in_fresh_process(Path.cwd) == Path.cwd()
    before, peak = bench_train.in_fresh_process(bench_train.memory, SHAPES["tiny"], OURS)
    assert 0 < before < peak


@pytest.mark.gpu
def test_the_bench_runs_on_a_gpu(run, tmp_path):
    assert run("bench", "train", "--shape", "tiny", "--device", "cuda", "-o", tmp_path / "results.json")[0] == 0
    ours = json.loads((tmp_path / "results.json").read_text())["rows"][-1]
    assert ours["peak_bytes"] > ours["step_bytes"] > 0
