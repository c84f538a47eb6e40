"""Products of half-precision matrices on a CPU without instructions for them."""

import copy
import platform

import pytest
import torch
from tiny import EOS, PAD, left_padded, tiny_prompt, trained_like
from torch.nn.functional import linear
from transformers.generation import CompileConfig

from d3llm_hf import log_likelihood
from d3llm_hf.models import half_precision
from d3llm_hf.models.half_precision import WidenedProducts, fast_products, is_slow, widened_linear


HALF = [torch.bfloat16, torch.float16]


def random(*shape, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.fixture
def widened(monkeypatch) -> list:
    """The products that were widened."""
    found = []

    def counted(*args):
        found.append(args)
        return widened_linear(*args)

    monkeypatch.setattr(half_precision, "widened_linear", counted)
    return found


@pytest.fixture(params=[True, False], ids=["slow", "fast"])
def slow(request, monkeypatch) -> bool:
    """Whether half precision is slow on the machine that the test has."""
    monkeypatch.setattr(half_precision, "is_slow", lambda dtype: request.param and dtype in HALF)
    return request.param


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_widened_product_is_the_exact_one_rounded_once(dtype, with_bias, monkeypatch):
    monkeypatch.setattr(half_precision, "PIECE", 3 * 40)  # three of 11 outputs at a time
    states, weight = random(2, 5, 40, dtype=dtype), random(11, 40, dtype=dtype)
    bias = random(11, dtype=dtype) if with_bias else None
    found = widened_linear(states, weight, bias)
    exact = linear(states.double(), weight.double(), None if bias is None else bias.double())
    assert found.dtype == dtype and found.shape == (2, 5, 11)
    # A float32 sum may lie on the other side of a rounding border: at most one unit in the last place.
    assert (found.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()
    assert (found == exact.to(dtype)).double().mean() > 0.95


def test_only_half_precision_on_a_cpu_without_gradients_is_widened(widened):
    class Packed(torch.Tensor):
        """As quantised weights are."""

    states, weight = random(4, 8), random(6, 8)
    with torch.no_grad(), WidenedProducts():
        assert torch.equal(linear(states, weight), linear(states, weight, None))
        assert len(widened) == 2
        layer = torch.nn.Linear(8, 6, dtype=torch.bfloat16)
        layer(states)
        assert len(widened) == 3
        linear(states.float(), weight.float())
        linear(states[:3], weight)  # too few rows to gain by it
        linear(states, weight.as_subclass(Packed))
        linear(states.to("meta"), weight.to("meta"))
        linear(input=states, weight=weight)
        torch.matmul(states, weight.T)
    with WidenedProducts():
        layer(states).sum().backward()
    linear(states, weight)
    assert len(widened) == 3


@pytest.mark.parametrize(
    "machine, instructions, expected",
    [("x86_64", False, True), ("AMD64", False, True), ("x86_64", True, False), ("arm64", False, False)],
)
@pytest.mark.parametrize("dtype", HALF)
def test_it_is_asked_of_the_processor(machine, instructions, expected, dtype, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    for kind in ("bf16", "fp16"):
        monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported", lambda: instructions, raising=False)
    assert is_slow.__wrapped__(dtype) is expected
    assert is_slow.__wrapped__(torch.float32) is False


def test_a_forward_with_widened_products_is_no_farther_from_float32(widened):
    model = copy.deepcopy(trained_like("llada")).to(torch.bfloat16)
    ids = torch.tensor([tiny_prompt(0, 12), tiny_prompt(1, 12)])
    with torch.no_grad():
        plain = model(ids).logits
        with WidenedProducts():
            found = model(ids).logits
        exact = model.float()(ids).logits
    assert widened
    assert (found - exact).square().mean() <= 1.5 * (plain - exact).square().mean()


@pytest.mark.every(3)
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_generate_and_likelihoods_widen_where_that_is_faster(family, slow, widened):
    model = copy.deepcopy(trained_like(family)).to(torch.bfloat16)
    inputs = left_padded([tiny_prompt(0, 6), tiny_prompt(1, 4)])
    settings = {"max_new_tokens": 12, "block_length": 4, "eos_token_id": EOS, "pad_token_id": PAD}
    assert model.generate(**inputs, **settings).shape == (2, 18)
    assert bool(widened) is slow
    widened.clear()
    texts = torch.tensor([tiny_prompt(0, 12)])
    score = log_likelihood(model, texts, torch.arange(12)[None] >= 6, num_samples=2, seed=0)
    assert bool(widened) is slow and score.mean.isfinite().all()
    widened.clear()
    trained_like(family).generate(**inputs, **settings)
    assert not widened


@pytest.mark.full
def test_a_compiled_forward_is_left_to_its_compiler(slow, widened):
    model = copy.deepcopy(trained_like("llada")).to(torch.bfloat16)
    config = CompileConfig(backend="eager")
    model.generate(**left_padded([tiny_prompt(0, 6)]), max_new_tokens=8, eos_token_id=EOS, compile_config=config)
    assert not widened
    settings = {"compile_config": config, "disable_compile": True}
    model.generate(**left_padded([tiny_prompt(0, 6)]), max_new_tokens=8, eos_token_id=EOS, **settings)
    assert bool(widened) is slow
    widened.clear()
    with fast_products(model, compiled=True), torch.no_grad():
        linear(random(4, 8), random(6, 8))
    assert not widened
