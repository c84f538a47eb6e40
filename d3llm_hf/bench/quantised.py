"""Accuracy and speed of a checkpoint with int8 weights on a CPU: `d3llm bench quantised`.

Rows that a machine cannot measure say why: the library is not installed, or what it raised.
"""

import importlib.metadata
import logging
from collections.abc import Callable
from typing import Any

import torch

from ..evaluation.measure import Tally
from ..evaluation.provenance import on_device
from ..evaluation.tasks.word_problems import exact_match, generate_problems
from ..progress import progress_bar
from .memory import threads
from .shapes import SEED, DecodingBench


SCHEMA = 1
SUITE = "bench_quantised"
NOT_INSTALLED = "not installed"
DOES_NOT_RUN = "does not run on"
BASELINE = "float32"


def _torchao(bench: DecodingBench) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = _loaded(bench, "float32")
    quantize_(model, Int8WeightOnlyConfig())
    return model


def _bitsandbytes(bench: DecodingBench) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from ..hub.sources import checkpoint_source

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says in every product that it casts to float16
    return AutoModelForCausalLM.from_pretrained(
        checkpoint_source(bench.model),
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        device_map=bench.device,
    ).eval()


def _loaded(bench: DecodingBench, dtype: str) -> Any:
    from ..hub.loading import load

    return load(bench.model, device=bench.device, dtype=dtype)[0]


# Row -> the library that it needs, and the model.
VARIANTS: dict[str, tuple[str | None, Callable[[DecodingBench], Any]]] = {
    BASELINE: (None, lambda bench: _loaded(bench, "float32")),
    "bfloat16": (None, lambda bench: _loaded(bench, "bfloat16")),
    "int8 weights, torchao": ("torchao", _torchao),
    "int8 weights, bitsandbytes": ("bitsandbytes", _bitsandbytes),
}


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes that parameters and buffers hold, a shared one once, those within quantised tensors included."""
    held: dict[int, int] = {}

    def add(tensor: torch.Tensor) -> None:
        if hasattr(tensor, "__tensor_flatten__"):
            for name in tensor.__tensor_flatten__()[0]:
                add(getattr(tensor, name))
        else:
            held[tensor.data_ptr()] = tensor.numel() * tensor.element_size()

    for tensor in (*model.parameters(), *model.buffers()):
        add(tensor)
        for name in ("CB", "SCB"):  # where bitsandbytes keeps the int8 values and their scales
            if isinstance(getattr(tensor, name, None), torch.Tensor):
                add(getattr(tensor, name))
    return sum(held.values())


def _prepared(bench: DecodingBench, inputs: dict[str, torch.Tensor]) -> tuple[dict[str, Any], dict[str, str]]:
    """The models that run, each having made a forward, and for the others why they do not."""
    models, reasons = {}, {}
    for name, (library, make) in VARIANTS.items():
        try:
            if library is not None:
                importlib.metadata.version(library)
            model = make(bench)
            Tally().generate(model, inputs, bench.settings, max_new_tokens=1)
            models[name] = model
        except importlib.metadata.PackageNotFoundError:
            reasons[name] = NOT_INSTALLED
        except Exception as error:  # whatever a library says of a device that it does not serve
            if library is None:
                raise
            said = " ".join(str(error).split())[:200]
            reasons[name] = f"{DOES_NOT_RUN} {bench.device.upper()}: {type(error).__name__}: {said}"
    return models, reasons


@torch.no_grad()
def measure_quantised(bench: DecodingBench) -> dict[str, Any]:
    """Decodes word problems with every variant, which take turns batch by batch.

    Args:
        bench: of a checkpoint; its dtype and shape do not count.

    Returns:
        the results: a row for each variant with `accuracy`, `tpf`, `tokens_per_second`, `speedup` (tokens a second
        over float32's), `cpu_speedup`, `equal_tokens` with float32 in percent and `weight_bytes`, or a `reason`.

    Raises:
        ValueError: Without a checkpoint.
    """
    from ..hub.sources import checkpoint_source, load_tokenizer, loading
    from ..text import encode_chats

    if not bench.model:
        raise ValueError("`model` must name a checkpoint whose answers can be scored (got none). Try d3llm-llada.")
    with loading(bench.model):
        tokenizer = load_tokenizer(checkpoint_source(bench.model), bench.model)
    problems = generate_problems(bench.count, split="test", seed=SEED)
    with threads(bench.threads), progress_bar(len(problems) * len(VARIANTS), "answer", "quantised") as bar:
        tallies: dict[str, Tally] = {}
        models: dict[str, Any] = {}
        reasons: dict[str, str] = {}
        for start in range(0, len(problems), bench.batch_size):
            batch = problems[start : start + bench.batch_size]
            chats = [[{"role": "user", "content": problem.question}] for problem in batch]
            inputs = encode_chats(tokenizer, chats).to(bench.device)
            if not models:
                models, reasons = _prepared(bench, inputs)
                tallies = {name: Tally() for name in models}
                bar.total = len(problems) * len(models)
            for name, model in models.items():
                answers = tallies[name].generate(model, inputs, bench.settings, max_new_tokens=bench.new_tokens)
                texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
                right = sum(exact_match(text, each.answer) for text, each in zip(texts, batch, strict=True))
                tallies[name].correct += right
                bar.update(len(batch))
    rows = [_row(name, models, tallies, reasons) for name in VARIANTS]
    return {
        "schema": SCHEMA,
        "suite": SUITE,
        "model": bench.model,
        "problems": bench.count,
        "batch_size": bench.batch_size,
        "new_tokens": bench.new_tokens,
        "settings": bench.settings,
        "seed": SEED,
        "libraries": {library: _version(library) for library, _ in VARIANTS.values() if library},
        "provenance": on_device(bench.device, bench.threads),
        "rows": rows,
    }


def _row(name: str, models: dict[str, Any], tallies: dict[str, Tally], reasons: dict[str, str]) -> dict[str, Any]:
    if name in reasons:
        return {"name": name, "reason": reasons[name]}
    tally, base = tallies[name], tallies[BASELINE]
    found = tally.figures(base)

    def speed(one: Tally, clock: str) -> float:
        return one.tokens / max(getattr(one, clock), 1e-9)

    return {
        "name": name,
        "accuracy": found["accuracy"],
        "tpf": found["tpf"],
        "equal_tokens": found["equal_tokens"],
        "tokens_per_second": round(speed(tally, "seconds"), 2),
        "speedup": round(speed(tally, "seconds") / speed(base, "seconds"), 3),
        "cpu_speedup": round(speed(tally, "cpu_seconds") / speed(base, "cpu_seconds"), 3),
        "weight_bytes": weight_bytes(models[name]),
    }


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None
