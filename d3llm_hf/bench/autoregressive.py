"""Speed of causal models, plain and by drafts, in the same run: `d3llm bench autoregressive`.

The methods share a model and prompts and take turns. Each decodes one prompt at a time, as those that draft have to.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ..autoregressive.agreement import agrees
from ..autoregressive.drafters import DRAFTERS, drafter_arguments
from ..autoregressive.generate import check_drafter, check_model, generate
from ..autoregressive.methods import AR_METHODS, complete_settings, methods_with
from ..evaluation.tasks.word_problems import exact_match, generate_problems
from ..progress import progress_bar
from .decoding import results, timed
from .memory import threads
from .shapes import DTYPES, HEAD_WIDTH, SEED, check_shape


SUITE = "bench_autoregressive"
_LEAST = {"vocab_size": 16, "seed": 0}


@dataclass(frozen=True)
class ARBench:
    """What is measured.

    Args:
        model (`str`): a causal checkpoint, which answers word problems; without one a random Llama has random prompts.
        assistant (`str`): a causal checkpoint that drafts with `"ar_assistant"`; beside a random model a random one of
            one layer does.
        draft_head (`str`): a draft head that drafts with `"eagle3"`; beside a random model a random one does.
        methods: `(label, method, settings)` of each; plain decoding is measured in any case.
        vocab_size, d_model, layers, prompt_length (`int`): of the random model and its prompts; heads are 64 wide.
        new_tokens (`int`): most tokens of an answer; random models have no stop token.
        prompts (`int`): prompts of a turn.
        dtype, device, threads, repeats, seed: as of [`~.shapes.DecodingBench`].

    Raises:
        ValueError: for a value outside its range, an unknown method or setting, labels that are not unique, and an
            assistant or draft head that no method takes, or that is missing.
    """

    model: str = ""
    assistant: str = ""
    draft_head: str = ""
    methods: tuple[tuple[str, str, dict[str, Any]], ...] = (("ar_prompt_lookup", "ar_prompt_lookup", {}),)
    vocab_size: int = 7904
    d_model: int = 512
    layers: int = 8
    prompt_length: int = 128
    new_tokens: int = 128
    prompts: int = 4
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    repeats: int = 3
    seed: int = 0

    def __post_init__(self):
        check_shape(self, _LEAST, {"dtype": DTYPES, "device": ("cpu", "cuda")})
        for _, method, settings in self.methods:
            complete_settings(method, settings)
        labels = [label for label, _, _ in self.rows]
        if len(set(labels)) < len(labels):
            raise ValueError(f"`methods` must have different labels (got {labels}). Write LABEL=METHOD.")
        needed = {AR_METHODS[method].needs for _, method, _ in self.methods}
        for drafter in DRAFTERS:
            option, given = drafter.option, getattr(self, drafter.option)
            takers = " or ".join(map(repr, methods_with(drafter)))
            if given and not (drafter in needed and self.model):
                raise ValueError(
                    f"`{option}` drafts for a `model` with {takers} (got {given!r}, {self.model!r} and {labels}). "
                    "Leave it out, or name both."
                )
            if self.model and drafter in needed and not given:
                raise ValueError(
                    f"`{option}` must be given with `model` and {takers} (got none with {self.model!r}). Name one."
                )

    @property
    def rows(self) -> list[tuple[str, str, dict[str, Any]]]:
        """Plain decoding, and the methods."""
        return [("ar", "ar", {}), *(each for each in self.methods if each != ("ar", "ar", {}))]


@dataclass
class Turn:
    """What a method gave for all prompts: answers before their stop tokens, and counts summed over them."""

    answers: list[list[int]] = field(default_factory=list)
    forwards: int = 0
    drafts: int = 0
    positions: int = 0
    draft_positions: int = 0


@dataclass
class CausalWork:
    """A model and its prompts.

    Attributes:
        prompts: `(1, P)` each.
        more: arguments of `generate` about all that could draft.
        problems, tokenizer: of a checkpoint.
    """

    model: Any
    prompts: list[torch.Tensor]
    more: dict[str, Any] = field(default_factory=dict)
    problems: list[Any] = field(default_factory=list)
    tokenizer: Any = None


def measure_autoregressive(bench: ARBench) -> dict[str, Any]:
    """Measures the methods, which take turns, and compares their tokens.

    Returns:
        the results: shape, versions and machine, and a row for each method: `name`, `settings`; `tokens`, `forwards`,
        `draft_forwards` of all prompts; `tpf`; `positions_per_token` and `draft_positions_per_token`; `seconds` and
        `cpu_seconds` of a turn (medians), `tokens_per_second`; `speedup` and `cpu_speedup`, medians over the turns of
        the ratio to plain decoding; `equal_answers` to those of plain greedy decoding, in percent (`None` where a
        method samples); with a checkpoint `accuracy`.

    Raises:
        ArithmeticError: where a method that drafts gives other tokens than plain greedy decoding.
    """
    with threads(bench.threads), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(bench.seed)
        work = _checkpoint(bench) if bench.model else _random(bench)
        for _, method, settings in bench.rows:
            check_model(work.model, method, settings)
            check_drafter(work.model, method, settings, **_drafter(work, method))
        with progress_bar(len(bench.rows) * (bench.repeats + 1), "turn", "bench") as bar:
            turns = {}
            for label, method, settings in bench.rows:  # not timed: it also sets up what the first forward does
                turns[label] = decode(bench, work, method, settings)
                bar.update()
            taken = _times(bench, work, bar.update)
        rows = [_row(bench, work, row, turns, taken) for row in bench.rows]
        parameters = work.model.num_parameters()
    return results(SUITE, bench, rows=rows, parameters=parameters)


def decode(bench: ARBench, work: CausalWork, method: str, settings: dict[str, Any]) -> Turn:
    """Decodes the prompts of a turn one by one."""
    turn = Turn()
    for ids in work.prompts:
        output = generate(
            work.model,
            ids,
            method=method,
            settings=settings,
            max_new_tokens=bench.new_tokens,
            **_drafter(work, method),
        )
        tokens = int(output.num_tokens)
        turn.answers.append(output.sequences[0, ids.shape[1] :][:tokens].tolist())
        turn.forwards += int(output.num_forwards)
        turn.drafts += int(output.num_draft_forwards)
        turn.positions += int(output.positions_computed)
        turn.draft_positions += int(output.draft_positions_computed)
    return turn


def _drafter(work: CausalWork, method: str) -> dict[str, Any]:
    return AR_METHODS[method].drafter_of(work.more)


def _times(bench: ARBench, work: CausalWork, advance: Callable[[], Any]) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {label: [] for label, _, _ in bench.rows}
    for _ in range(bench.repeats):
        for label, method, settings in bench.rows:
            found[label].append(timed(partial(decode, bench, work, method, settings), bench.device))
            advance()
    return found


def _row(
    bench: ARBench,
    work: CausalWork,
    row: tuple[str, str, dict[str, Any]],
    turns: dict[str, Turn],
    taken: dict[str, list[tuple[float, float]]],
) -> dict[str, Any]:
    label, method, settings = row
    turn, base = turns[label], turns["ar"]
    tokens = sum(map(len, turn.answers))
    share = tokens / max(1, sum(map(len, base.answers)))
    seconds = [statistics.median(each[which] for each in taken[label]) for which in (0, 1)]
    pairs = list(zip(taken["ar"], taken[label], strict=True))
    ratios = [statistics.median(b[which] / max(t[which], 1e-9) for b, t in pairs) * share for which in (0, 1)]
    equal = None
    if not complete_settings(method, settings)["do_sample"]:
        found = [
            agrees(work.model, ids[0].tolist(), ours, plain, method)
            for ids, ours, plain in zip(work.prompts, turn.answers, base.answers, strict=True)
        ]
        equal = round(100 * sum(found) / len(found), 2)
    figures = {
        "name": label,
        "settings": {"decoding_method": method} | settings,
        "tokens": tokens,
        "forwards": turn.forwards,
        "draft_forwards": turn.drafts,
        "tpf": round(tokens / turn.forwards, 3),
        "positions_per_token": round(turn.positions / max(1, tokens), 1),
        "draft_positions_per_token": round(turn.draft_positions / max(1, tokens), 1),
        "seconds": round(seconds[0], 4),
        "cpu_seconds": round(seconds[1], 4),
        "tokens_per_second": round(tokens / seconds[0], 3),
        "speedup": round(ratios[0], 3),
        "cpu_speedup": round(ratios[1], 3),
        "equal_answers": equal,
    }
    if work.problems:
        texts = work.tokenizer.batch_decode(turn.answers, skip_special_tokens=True)
        right = sum(exact_match(text, each.answer) for text, each in zip(texts, work.problems, strict=True))
        figures["accuracy"] = round(100 * right / len(work.problems), 2)
    return figures


def _checkpoint(bench: ARBench) -> CausalWork:
    from ..hub.loading import load_causal, load_draft_head
    from ..text import encode_chat, encode_text

    where = {"device": bench.device, "dtype": bench.dtype}
    model, tokenizer = load_causal(bench.model, **where)
    problems = generate_problems(bench.prompts, split="test", seed=SEED)
    encoded = [
        encode_chat(tokenizer, [{"role": "user", "content": each.question}])
        if tokenizer.chat_template
        else encode_text(tokenizer, each.question)
        for each in problems
    ]
    assistant = load_causal(bench.assistant, **where) if bench.assistant else None
    head = load_draft_head(bench.draft_head).to(model.device, model.dtype) if bench.draft_head else None
    more = drafter_arguments(model, tokenizer, assistant, head)
    return CausalWork(model, [row["input_ids"].to(model.device) for row in encoded], more, problems, tokenizer)


def _random(bench: ARBench) -> CausalWork:
    model = _llama(bench, bench.layers)
    prompts = torch.randint(bench.vocab_size, (bench.prompts, bench.prompt_length)).to(bench.device)
    more = {"assistant_model": _llama(bench, 1), "draft_head": _head(model)}
    return CausalWork(model, list(prompts.split(1)), more)


def _head(model: Any) -> Any:
    """A random draft head of a random model's sizes, which can draft all of its tokens."""
    from ..autoregressive.eagle3.checkpoint import HeadConfig
    from ..autoregressive.eagle3.head import Eagle3Head

    sizes = model.config.to_dict() | {"draft_vocab_size": model.config.vocab_size, "num_hidden_layers": 1}
    head = Eagle3Head(HeadConfig.from_dict(sizes)).requires_grad_(False).eval()
    return head.to(model.device, model.dtype)


def _llama(bench: ARBench, layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(1, bench.d_model // HEAD_WIDTH)
    config = LlamaConfig(
        vocab_size=bench.vocab_size,
        hidden_size=bench.d_model,
        intermediate_size=3 * bench.d_model,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=bench.prompt_length + bench.new_tokens,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval().to(getattr(torch, bench.dtype)).to(bench.device)
