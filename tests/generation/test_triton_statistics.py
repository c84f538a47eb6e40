"""The kernel that scores logits in one pass gives what torch gives, and stands in only where it can."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from places import SUPPORT
from tiny import MASK, ScriptedModel, answer, changing_script, tables
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

import d3llm_hf
from d3llm_hf.models import scoring, triton_statistics
from d3llm_hf.models.scoring import _of_sums, kernel_for, statistics


HERE = Path(d3llm_hf.__file__).parent / "models" / "triton_statistics.py"
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton has no wheel for this platform")


def random_logits(rows: int, vocabulary: int, spread: float = 3.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


def tied() -> torch.Tensor:
    """Equal best logits within a block and in different ones, and rows of nothing else."""
    logits = random_logits(5, 9000)
    logits[0, [17, 18, 4000]] = 30.0
    logits[1, [8191, 8192]] = 30.0
    logits[2, [5, 6]] = 30.0  # 5 is the mask token
    logits[3] = 1.5
    logits[4, [5, 8999, 4097]] = torch.tensor([40.0, 30.0, 30.0])
    return logits


def sharp() -> torch.Tensor:
    """Rows of falling entropy, down to where the best probability has long been 1 in float32."""
    logits = torch.zeros(12, 5000)
    logits[torch.arange(12), 400 * torch.arange(12)] = torch.arange(14.0, 74.0, 5.0)
    return logits


def with_infinities() -> torch.Tensor:
    """Rows that are -inf here and there, in whole blocks, but for one token, and at the mask token."""
    logits = random_logits(4, 9000)
    logits[0, ::3] = -torch.inf
    logits[1, :8500] = -torch.inf
    logits[2, :] = -torch.inf
    logits[2, 6000] = 2.0
    logits[3, 5] = -torch.inf
    return logits


def mask_on_top() -> torch.Tensor:
    """The mask token is the most probable one by far, by little, and not at all."""
    logits = random_logits(3, 9000, 1.0)
    logits[:, 5] = torch.tensor([60.0, 5.0, -9.0])
    return logits


RISING = torch.linspace(-80, 80, 20_000).expand(2, -1).clone()  # every block has a new peak
RISING[1] = RISING[1].flip(0)
CASES = {
    "random": (random_logits(4, 10_000), 5),
    "a vocabulary of one short block": (random_logits(3, 37), 36),
    "a vocabulary of two tokens": (random_logits(3, 2), 0),
    "ties": (tied(), 5),
    "sharp": (sharp(), 4999),
    "-inf": (with_infinities(), 5),
    "the mask token on top": (mask_on_top(), 5),
    "rising and falling": (RISING, 12_345),
    "extreme": (torch.tensor([[-3e38, 3e38, 0.0, 1.0], [3e38, 3e38, -3e38, 5.0]]).repeat(1, 2000), 2),
    "bfloat16": (random_logits(4, 10_000).bfloat16(), 5),
    "float16": (random_logits(4, 10_000).half(), 5),
    "rows that are not contiguous": (random_logits(4, 9000)[:, 200:7000], 5),
}
BROKEN = random_logits(6, 9000)
BROKEN[0, 7] = BROKEN[1, 8999] = BROKEN[2, 5] = torch.nan
BROKEN[3, 4096] = torch.inf
BROKEN[4, torch.arange(9000) != 5] = -torch.inf


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """What `row_sums` gives for every case in Triton's interpreter, a process for all of them."""
    folder = tmp_path_factory.mktemp("kernel")
    torch.save(CASES | {"broken": (BROKEN, 5)}, folder / "cases.pt")
    script = SUPPORT / "interpreted_kernel.py"
    command = [sys.executable, script, HERE, folder / "cases.pt", folder / "sums.pt"]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    if "only 0-dimensional arrays can be converted to Python scalars" in done.stderr:
        pytest.skip("the interpreter of this older Triton cannot run beside numpy 2.4 and later")
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "sums.pt")


def of(sums: tuple[torch.Tensor, ...]):
    """What the kernel's sums become, as `kernel_for` does it."""
    best, top, peak, others, second, spread = sums
    return _of_sums(best, top, peak, others, second, spread, (top - peak).exp())


def assert_same(found, wanted) -> None:
    (stats, best, finite), (expected, best_wanted, finite_wanted) = found, wanted
    assert finite.tolist() == finite_wanted.tolist() == [True] * len(best)
    assert best.tolist() == best_wanted.tolist()
    for name in ("top", "peak"):
        assert torch.equal(getattr(stats, name), getattr(expected, name)), name
    for name in ("log_z", "others", "second", "entropy"):
        torch.testing.assert_close(getattr(stats, name), getattr(expected, name), rtol=2e-5, atol=0.0, msg=name)


@pytest.mark.full
@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_gives_what_torch_gives(case, interpreted):
    logits, mask_token_id = CASES[case]
    assert_same(of(interpreted[case]), statistics(logits.float().clone(), mask_token_id))


@pytest.mark.full
@needs_triton
def test_entropies_of_sure_rows_keep_their_order_where_their_probability_is_1(interpreted):
    stats, _, _ = of(interpreted["sharp"])
    assert (torch.exp(-stats.log_z)[-8:] == 1).all()
    assert (stats.entropy.diff() < 0).all() and (stats.entropy > 0).all()
    exact = torch.distributions.Categorical(logits=sharp()[:4].double()).entropy()  # sums to 1 - 1e-13: only the first
    torch.testing.assert_close(stats.entropy[:4].double(), exact, rtol=1e-5, atol=0.0)


@pytest.mark.full
@needs_triton
def test_rows_with_nan_with_inf_or_with_nothing_but_the_mask_token_are_not_finite(interpreted):
    (_, best, finite), (_, _, wanted) = of(interpreted["broken"]), statistics(BROKEN.clone(), 5)
    assert finite.tolist() == wanted.tolist() == [False] * 5 + [True]
    assert ((best >= 0) & (best < 9000)).all()


@pytest.mark.full
@needs_triton
def test_the_kernel_compiles_for_a_cuda_device_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # its default, which it warns about
    triton = pytest.importorskip("triton", minversion="3.4", reason="older ones take types in another form")
    from triton.backends.compiler import GPUTarget

    numbers = dict.fromkeys(("row_stride", "vocabulary", "mask_token_id", "count"), "i32")
    types = {"logits": "*bf16", "best_at": "*i64", "sums_at": "*fp32", "BLOCK": "constexpr"} | numbers
    source = triton.compiler.ASTSource(triton_statistics._kernel, types, {"BLOCK": triton_statistics.BLOCK})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    assert compiled.asm["cubin"]


def test_the_kernels_file_travels_in_checkpoints_and_asks_for_no_triton():
    assert str(HERE) in get_relative_import_files(HERE.parent / "modeling_llada.py")
    assert "triton" not in get_imports(HERE)


# ---- where it stands in ---------------------------------------------------------------------------------------------


def by_torch(logits, mask_token_id):
    """A stand-in that leaves the logits as they are, as the kernel does."""
    return statistics(logits.float().clone(), mask_token_id)


METHODS = {
    "entropy": {"decoding_method": "dparallel", "entropy_threshold": 0.9},
    "confidence": {"decoding_method": "fast_dllm", "confidence_threshold": 0.6},
    "margin": {"decoding_method": "llada", "remasking": "topk_margin"},
    "random": {"decoding_method": "llada", "remasking": "random", "seed": 0},
    "alg_temp": {"decoding_method": "dream", "remasking": "maskgit_plus", "alg_temp": 0.4, "seed": 0},
}


def scripted() -> ScriptedModel:
    return ScriptedModel(changing_script(tables(5, 20), MASK))


@pytest.mark.every(3)
@pytest.mark.parametrize("method", METHODS)
def test_decoding_with_a_kernel_gives_the_tokens_of_decoding_without(method, monkeypatch):
    chosen = {"block_length": 4, "early_stop": False} | METHODS[method]
    expected, calls = answer(scripted(), [1, 2, 3], **chosen), []
    monkeypatch.setattr(scoring, "kernel_for", lambda logits: lambda *given: calls.append(1) or by_torch(*given))
    found = answer(scripted(), [1, 2, 3], **chosen)
    assert torch.equal(found.sequences, expected.sequences) and torch.equal(found.step_map, expected.step_map)
    assert len(calls) == int(found.num_forwards)


@pytest.mark.parametrize(
    "chosen",
    [
        {"do_sample": True, "seed": 0},
        {"repetition_penalty": 1.3},
        {"decoding_method": "dinfer", "decoder": "credit"},
    ],
    ids=["sampling", "processors", "credit"],
)
def test_what_needs_the_logits_themselves_is_scored_without_a_kernel(chosen, monkeypatch):
    monkeypatch.setattr(scoring, "kernel_for", lambda logits: pytest.fail("asked for a kernel"))
    assert answer(scripted(), [1, 2, 3], block_length=4, **chosen).sequences.shape == (1, 19)


def test_logits_with_nan_are_refused_with_a_kernel_as_without(monkeypatch):
    monkeypatch.setattr(scoring, "kernel_for", lambda logits: by_torch)
    model = ScriptedModel(lambda ids: torch.full((*ids.shape, 32), torch.nan))
    with pytest.raises(ValueError, match="must be finite"):
        answer(model, [1, 2, 3])


def test_logits_on_a_cpu_have_no_kernel():
    assert kernel_for(torch.zeros(2, 8)) is None


@pytest.fixture
def forgotten():
    """No device has been tried before, nor is this one remembered."""
    scoring._kernel_on.cache_clear()
    yield
    scoring._kernel_on.cache_clear()


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(scoring.logger, "warning_once", said.append)
    return said


def test_a_device_without_triton_has_no_kernel_and_nobody_is_told(forgotten, warnings, monkeypatch):
    monkeypatch.setattr(scoring, "find_spec", lambda name: None)
    assert scoring._kernel_on(torch.device("cpu")) is None and not warnings


def sums_by_torch(logits, mask_token_id):
    """What `row_sums` returns, by torch in float64."""
    masked = logits.double().clone()
    masked[:, mask_token_id] = -torch.inf
    top, best = masked.max(-1)
    peak = logits.double().amax(-1)
    gap = peak[:, None] - logits.double().scatter(1, best[:, None], -torch.inf)
    weight = (-gap).exp()
    spread = (weight * gap.masked_fill(weight == 0, 0.0)).sum(-1)
    return best, *(x.float() for x in (top, peak, weight.sum(-1), weight.amax(-1), spread))


def test_a_kernel_that_is_right_on_the_device_is_taken(forgotten, warnings, monkeypatch):
    monkeypatch.setattr(scoring, "find_spec", lambda name: "found")
    monkeypatch.setattr(triton_statistics, "row_sums", sums_by_torch)
    logits = random_logits(4, 50)
    assert_same(scoring._kernel_on(torch.device("cpu"))(logits, 7), statistics(logits.clone(), 7))
    assert not warnings


def wrong_sums(logits, mask_token_id):
    best, top, peak, others, second, spread = sums_by_torch(logits, mask_token_id)
    return best, top, peak, others, second, 2 * spread


def no_compiler(logits, mask_token_id):
    raise RuntimeError("Failed to find C compiler")


@pytest.mark.parametrize("row_sums, said", [(wrong_sums, "entropies are wrong"), (no_compiler, "C compiler")])
def test_a_kernel_that_fails_or_is_wrong_on_the_device_is_left_out_with_a_warning(
    row_sums, said, forgotten, warnings, monkeypatch
):
    monkeypatch.setattr(scoring, "find_spec", lambda name: "found")
    monkeypatch.setattr(triton_statistics, "row_sums", row_sums)
    assert scoring._kernel_on(torch.device("cpu")) is None
    assert len(warnings) == 1 and said in warnings[0]


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_gives_what_torch_gives_on_a_gpu(case):
    logits, mask_token_id = CASES[case]
    kernel = kernel_for(logits.cuda())
    assert kernel is not None
    assert_same(kernel(logits.cuda(), mask_token_id), statistics(logits.cuda().float(), mask_token_id))


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_gives_what_torch_gives_for_a_published_vocabulary_on_a_gpu(dtype):
    logits = random_logits(64, 126_464).to("cuda", dtype)
    assert_same(kernel_for(logits)(logits, 126_336), statistics(logits.float(), 126_336))
