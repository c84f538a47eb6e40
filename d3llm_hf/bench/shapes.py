"""What `d3llm bench decode` runs: models of named shapes, or a checkpoint, with the prompts that they answer.

A model with random weights is as unsure of one position as of any other, so that a threshold would decide either one
token in each forward or all at once. The random models here are made *decisive*, the same way for all contestants:

* weight matrices have a standard deviation of `1.5 / sqrt(inputs)` and embeddings one of 1, so that attention is
  peaked and masks at different places have different hidden states;
* the head is scaled until a share `sure` of the masks has an entropy under the method's threshold while half of the
  answer is decided, at random ([`decisive_scale`]).

How many tokens a forward then decides is for the decoding to show; the results have it. `schedule` fixes it instead.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..evaluation.tasks.word_problems import WordProblem, generate_problems
from ..models.methods import CACHES, COMMON, METHODS
from .memory import threads
from .plain_decoding import FIXED, METHODS_AND_CACHES, plain_settings


HEAD_WIDTH = 64
_FIRST_BLOCKS = 4  # whose masks a random model's head is scaled by
_LEAST = {"vocab_size": 16, "prompts": 0, "schedule": 0, "seed": 0}
DTYPES = ("float32", "bfloat16", "float16")
SEED = 4242  # of the embedded checkpoint's problems, as in its results


def check_numbers(bench: Any, least: dict[str, int]) -> None:
    """Refuses integers of a dataclass that are too small.

    Args:
        least: the smallest values of integers that may not begin at 1.

    Raises:
        ValueError: naming the field.
    """
    for each in dataclasses.fields(bench):
        value, low = getattr(bench, each.name), least.get(each.name, 1)
        if each.type in (int, "int") and value < low:
            raise ValueError(f"`{each.name}` must be at least {low} (got {value}). Pass a larger number.")


def check_shape(bench: Any, least: dict[str, int], choices: dict[str, Sequence[str]]) -> None:
    """Refuses what no bench can measure: of decoding, or of training.

    Args:
        bench: a dataclass with a `d_model` and a `device`.
        least: the smallest values of integers that may not begin at 1.
        choices: name -> values that a field may have.

    Raises:
        ValueError: naming the field.
    """
    check_numbers(bench, least)
    if bench.d_model % min(bench.d_model, HEAD_WIDTH) or bench.d_model % 2:
        raise ValueError(
            f"`d_model` must be even, and above {HEAD_WIDTH} a multiple of it (got {bench.d_model}). Try 512."
        )
    for name, known in choices.items():
        value = getattr(bench, name)
        if value not in known:
            raise ValueError(f"`{name}` must be one of {list(known)} (got {value!r}). Pass one of them.")
    if bench.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("`device` must be one that torch finds (got 'cuda', and it finds none). Pass 'cpu'.")


@dataclass(frozen=True)
class DecodingBench:
    """What is measured.

    Args:
        model (`str`): A checkpoint folder, an id on the Hub or an embedded checkpoint, which answers word problems in
            its chat template; its sizes and the prompts' lengths are its own. Without one the model is random.
        vocab_size, d_model, layers (`int`): Size of the random model. Heads are 64 wide, the MLP is three times as
            wide as the model.
        prompt_length, new_tokens, block_length, batch_size (`int`): Of the canvas. Random models have no stop token.
        prompts (`int`): Prompts that a turn decodes, in batches; 0 is a batch of them.
        settings (`dict`): Of the decoding, as `generate` takes them. The method is one that the reference has
            (`plain_decoding.METHODS_AND_CACHES`), the cache any.
        schedule (`int`): Tokens that every forward decides, by LLaDA's quota; 0 leaves that to the method.
        sure (`float`): Share of the masks that a random model is sure of when half of the answer is decided.
        dtype (`str`): Of weights and activations.
        device (`str`): `"cpu"` or `"cuda"`.
        threads (`int`): Threads of a CPU.
        repeats (`int`): Turns of each contestant.
        seed (`int`): Of random weights and prompts.

    Raises:
        ValueError: If a value is outside its range.
    """

    model: str = ""
    vocab_size: int = 7904
    d_model: int = 1024
    layers: int = 8
    prompt_length: int = 128
    new_tokens: int = 256
    block_length: int = 32
    batch_size: int = 1
    prompts: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    schedule: int = 0
    sure: float = 0.2
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    repeats: int = 3
    seed: int = 0

    def __post_init__(self):
        check_shape(self, _LEAST, {"dtype": DTYPES, "device": ("cpu", "cuda")})
        if not 0 < self.sure < 1:
            raise ValueError(f"`sure` must be between 0 and 1 (got {self.sure}). The default is 0.2.")
        if self.schedule and {"decoding_method", "steps"} & set(self.settings):
            raise ValueError(
                "`schedule` decides by LLaDA's quota, so no method or steps can be chosen beside it (got "
                f"{self.settings}). Leave out one of them."
            )
        if self.settings.get("kv_cache", "none") not in CACHES:
            raise ValueError(
                f"`kv_cache` must be one of {list(CACHES)} (got {self.settings['kv_cache']!r}). Pass one of them."
            )
        plain_settings(self.uncached)

    @property
    def count(self) -> int:
        """Prompts of a turn."""
        return self.prompts or self.batch_size

    @property
    def decoding(self) -> dict[str, Any]:
        """The arguments of `generate` that say how to decode: all of them, so that a checkpoint's own do not count."""
        chosen = {"block_length": self.block_length} | self.settings
        if self.schedule:
            chosen |= {"decoding_method": "llada", "steps": -(-self.new_tokens // self.schedule)}
        complete = plain_settings({name: chosen[name] for name in chosen if "cache" not in name})
        complete |= CACHES[chosen.get("kv_cache", "none")] | chosen
        return {name: value for name, value in complete.items() if value is not None and name not in FIXED}

    @property
    def uncached(self) -> dict[str, Any]:
        """The same without a cache."""
        chosen = {name: value for name, value in self.decoding.items() if "cache" not in name}
        return chosen | {"kv_cache": "none"}

    @property
    def one_token(self) -> dict[str, Any]:
        """The arguments of LLaDA's loop that decides one token a forward, without a cache."""
        common = {name: value for name, value in self.settings.items() if name in COMMON}
        return replace(self, schedule=0, settings=common | {"decoding_method": "llada"}).uncached

    @property
    def cache(self) -> str:
        """The kind of cache."""
        return self.decoding["kv_cache"]

    @property
    def reference_has_cache(self) -> bool:
        """Whether the plain loop of the method has the cache, too."""
        return self.cache in METHODS_AND_CACHES[self.decoding["decoding_method"]]


# LLaDA-8B has 32 layers of width 4,096 and 126,464 tokens: its head holds 7.4 % as many weights as its layers. So does
# that of the first shape.
SHAPES: dict[str, DecodingBench] = {
    "8b-like": DecodingBench(),
    "wide-vocab": DecodingBench(vocab_size=126464, d_model=512),
    "tiny": DecodingBench(
        vocab_size=64, d_model=16, layers=1, prompt_length=8, new_tokens=16, block_length=8, repeats=2
    ),
}


@dataclass
class Work:
    """A model and what a turn decodes.

    Attributes:
        batches: `input_ids` and `attention_mask` `(B, P)` of each batch.
        limits: length and stop tokens, as arguments of `generate`.
        problems: whose questions the prompts are, none for random ones.
        tokenizer: of a checkpoint.
    """

    model: Any
    batches: list[dict[str, torch.Tensor]]
    limits: dict[str, Any]
    problems: list[WordProblem] = field(default_factory=list)
    tokenizer: Any = None

    @property
    def stops(self) -> list[int]:
        """The stop tokens."""
        stops = self.limits.get("eos_token_id")
        return stops if isinstance(stops, list) else [] if stops is None else [stops]


@contextmanager
def prepared(bench: DecodingBench, scale: float | None = None) -> Iterator[tuple[Work, float]]:
    """The model, its prompts, and the scale of its head.

    Args:
        scale: of a random model's head; found by [`decisive_scale`] where none is given.
    """
    with threads(bench.threads), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(bench.seed)
        if bench.model:
            yield _checkpoint(bench), 1.0
        else:
            work = _random(bench)
            if scale is None:
                scale = decisive_scale(bench, work)
            work.model.lm_head.weight.mul_(scale)
            yield work, scale


def _checkpoint(bench: DecodingBench) -> Work:
    from ..hub.loading import load
    from ..text import encode_chats

    model, tokenizer = load(bench.model, device=bench.device, dtype=bench.dtype)
    problems = generate_problems(bench.count, split="test", seed=SEED)
    chats = [[{"role": "user", "content": problem.question}] for problem in problems]
    groups = [chats[start : start + bench.batch_size] for start in range(0, len(chats), bench.batch_size)]
    batches = [dict(encode_chats(tokenizer, group).to(model.device)) for group in groups]
    stop = model.generation_config.eos_token_id
    limits = {"max_new_tokens": bench.new_tokens, "eos_token_id": stop}
    if tokenizer.pad_token_id is not None:
        limits["pad_token_id"] = tokenizer.pad_token_id
    return Work(model, batches, limits, problems, tokenizer)


def _random(bench: DecodingBench) -> Work:
    from ..models.configuration_llada import LLaDAConfig
    from ..models.modeling_llada import LLaDAModelLM

    last = bench.vocab_size - 1
    config = LLaDAConfig(
        vocab_size=bench.vocab_size,
        d_model=bench.d_model,
        n_layers=bench.layers,
        n_heads=max(1, bench.d_model // HEAD_WIDTH),
        mlp_hidden_size=3 * bench.d_model,
        max_sequence_length=bench.prompt_length + bench.new_tokens,
        mask_token_id=last,
        pad_token_id=last - 1,
        eos_token_id=None,
    )
    return random_work(LLaDAModelLM(config), bench)


def random_work(model: Any, bench: DecodingBench) -> Work:
    """A model with the weights that the module's docstring tells of, and random prompts for it.

    Args:
        model: of the shape; its last two tokens, mask and pad, are in no prompt.
    """
    last = bench.vocab_size - 1
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            weight.normal_(std=1.0 if "embed_tokens" in name else 1.5 * weight.shape[1] ** -0.5)
    model = model.eval().to(getattr(torch, bench.dtype)).to(bench.device)
    prompts = torch.randint(last - 1, (bench.count, bench.prompt_length)).to(bench.device)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in prompts.split(bench.batch_size)]
    return Work(model, batches, {"max_new_tokens": bench.new_tokens, "pad_token_id": last - 1})


def half_decided(bench: DecodingBench, work: Work) -> tuple[torch.Tensor, torch.Tensor]:
    """The first batch with every other position of the answer decided at random, on average.

    Returns:
        the canvases and which of their positions are masks within the first blocks, `(B, L)` each.
    """
    generator = torch.Generator().manual_seed(bench.seed)
    mask, prompt = work.model.config.mask_token_id, work.batches[0]["input_ids"].cpu()
    shape = (len(prompt), bench.new_tokens)
    answer = torch.randint(mask - 1, shape, generator=generator)
    hidden = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") < 0.5
    canvas = torch.cat([prompt, answer.masked_fill(hidden, mask)], dim=1)
    wanted = canvas == mask
    wanted[:, prompt.shape[1] + _FIRST_BLOCKS * bench.block_length :] = False
    return canvas.to(work.model.device), wanted.to(work.model.device)


def decisive_scale(bench: DecodingBench, work: Work) -> float:
    """The factor of the head's weights with which a share `sure` of the masks, rounded, lies under the threshold."""
    threshold = bench.decoding.get("entropy_threshold", METHODS["d3llm"]["entropy_threshold"])
    canvas, wanted = half_decided(bench, work)
    logits = work.model(input_ids=canvas, logits_to_keep=wanted, use_cache=False).logits.float()  # (n, V)
    if len(logits) < 2:  # there is nothing between masks
        return 1.0
    sure = min(max(1, round(bench.sure * len(logits))), len(logits) - 1)

    def level(scale: float) -> float:
        """Between the entropies of the last mask that shall be under the threshold and of the next one."""
        scaled = (logits * scale).log_softmax(-1)
        return (-(scaled.exp() * scaled).sum(-1)).sort().values[sure - 1 : sure + 1].mean().item()

    low, high = 1e-3, 1e3
    for _ in range(24):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if level(middle) > threshold else (low, middle)
    return high
