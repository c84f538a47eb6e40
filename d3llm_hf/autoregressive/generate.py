"""One function for every autoregressive method: checked input, counted forwards, tokens cut where plain decoding ends.

output = generate(model, **tokenizer("1 + 1 =", return_tensors="pt"), method="ar_prompt_lookup", max_new_tokens=32)
print(output.tokens_per_forward)
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .causal import check_causal
from .drafters import DRAFTERS
from .methods import AR_METHODS, complete_settings, methods_with
from .output import ARGenerationOutput
from .request import Continued, Request


@torch.no_grad()
def generate(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    method: str = "ar",
    settings: Mapping[str, Any] | None = None,
    max_new_tokens: int = 256,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    stopping_criteria: Sequence[Any] = (),
    seed: int | Sequence[int] | None = None,
    assistant_model: Any = None,
    tokenizer: Any = None,
    assistant_tokenizer: Any = None,
    draft_head: Any = None,
) -> ARGenerationOutput:
    """Continues prompts from left to right, and says what it took.

    1. Refuse what the method, the model or transformers cannot do, or would take silently without effect.
    2. Decode: all rows together, or one after the other without its padding, where the method takes one row or a row
       draws tokens by its own seed.
    3. Cut each row at its first stop token, or where a criterion first ended it, and count.

    Greedy tokens are those of plain greedy decoding with every method, but for ties within the precision of a forward.

    Args:
        model: a causal model of transformers, as it is.
        input_ids (`(B, P)` long): prompts, padded on the left.
        attention_mask (`(B, P)`, *optional*): 0 at the padding; without one there is none.
        method: a key of `AR_METHODS`.
        settings: of the method, see `AR_METHODS`, and `do_sample`, `temperature`, `top_p`, `top_k`.
        max_new_tokens: most tokens of an answer, with its stop token.
        eos_token_id: stop tokens; the checkpoint's where nothing is given, none where empty.
        pad_token_id: fills up rows; the checkpoint's, or else a stop token or 0.
        stopping_criteria: of transformers.
        seed: of what is drawn (`do_sample=True`), for all rows or one for each; without one torch's generator is
            used as it is.
        assistant_model: what drafts with `"ar_assistant"`.
        tokenizer, assistant_tokenizer: of model and assistant, where their vocabularies differ in size.
        draft_head: an `Eagle3Head`, which drafts with `"eagle3"`.

    Raises:
        TypeError: for what is no causal model of transformers; for one that decodes by diffusion.
        ValueError: for an unknown method or setting, or a value outside its rule; input of another shape, padded on
            the right; an assistant or draft head that the method does not take, or does not get.
    """
    # 1. Refuse what cannot be done
    complete = complete_settings(method, settings)
    check_model(model, method, settings)
    mask = _checked(input_ids, attention_mask, max_new_tokens)
    given = {
        "assistant_model": assistant_model, "tokenizer": tokenizer, "assistant_tokenizer": assistant_tokenizer,
        "draft_head": draft_head,
    }  # fmt: skip
    check_drafter(model, method, settings, **given)
    if seed is not None and not complete["do_sample"]:
        raise ValueError(f"`seed` needs sampling (got {seed!r} with do_sample=False). Leave it out.")
    if isinstance(seed, Sequence) and len(seed) != len(input_ids):
        raise ValueError(f"`seed` must be one for each of {len(input_ids)} rows (got {len(seed)}). Pass as many.")
    eos = _ids(model.generation_config.eos_token_id if eos_token_id is None else eos_token_id)
    pads = (pad_token_id, model.generation_config.pad_token_id, *eos, 0)
    pad = next(token for token in pads if token is not None)

    # 2. Decode, together or one after the other
    def request(ids: torch.Tensor, seen: torch.Tensor) -> Request:
        return Request(
            model, ids, seen, complete, max_new_tokens, eos, pad, stopping_criteria, **given,
        )  # fmt: skip

    row, count = AR_METHODS[method], len(input_ids)
    parts: list[tuple[Continued, int]] = []
    apart = row.one_row or isinstance(seed, Sequence)
    if not apart or (count == 1 and bool(mask.all())):
        with _drawn_by(seed[0] if isinstance(seed, Sequence) else seed, input_ids.device):
            together = row.decode(request(input_ids, mask))
        parts = [(together, number) for number in range(count)]
    else:
        if stopping_criteria:
            raise ValueError(
                f"`stopping_criteria` know rows and slots by their place, but {method} decodes rows one by one and "
                f"without padding (got {count} rows). Pass one row a call, without padding."
            )
        for number in range(count):
            own = seed[number] if isinstance(seed, Sequence) else None if seed is None else seed + number
            width = int(mask[number].sum())
            with _drawn_by(own, input_ids.device):
                alone = request(input_ids[number : number + 1, -width:], mask[number : number + 1, -width:])
                parts.append((row.decode(alone), 0))

    # 3. Cut and count
    return _output(input_ids, parts, eos, pad)


def check_model(model: Any, method: str, settings: Mapping[str, Any] | None = None) -> None:
    """Refuses a model that the method cannot decode.

    Raises:
        TypeError, ValueError: see [`generate`].
    """
    complete = complete_settings(method, settings)
    check_causal(model, method)
    AR_METHODS[method].check(model, complete)


def check_drafter(model: Any, method: str, settings: Mapping[str, Any] | None = None, **given: Any) -> None:
    """Refuses what a method does not take to draft, does not get, or what cannot draft for the model.

    Args:
        given: the arguments of [`generate`] about what drafts; those that are left out are `None`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    row, needs = AR_METHODS[method], AR_METHODS[method].needs
    for other in DRAFTERS:
        for name in other.arguments:
            # the target's own tokenizer is no drafter, and may be there for others
            if other is not needs and name != "tokenizer" and given.get(name) is not None:
                raise ValueError(
                    f"`{name}` has no effect with {method!r} (got {type(given[name]).__name__}). Leave it out, or "
                    f"choose {' or '.join(map(repr, methods_with(other)))}."
                )
    if needs is None:
        return
    if given.get(needs.arguments[0]) is None:
        raise ValueError(f"`{needs.arguments[0]}` must be given for {method!r} (got None). {needs.way_out}")
    row.check_drafter(model, given, complete_settings(method, settings))


def _checked(input_ids: Any, attention_mask: Any, max_new_tokens: Any) -> torch.Tensor:
    """The attention mask, `(B, P)`."""
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or not input_ids.numel():
        shape = tuple(getattr(input_ids, "shape", ()))
        raise ValueError(f"`input_ids` must be a tensor of shape (B, P) (got {shape}). Pass at least one token a row.")
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` must be a positive integer (got {max_new_tokens!r}). Pass for example 64.")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask.shape != input_ids.shape:
        raise ValueError(
            f"`attention_mask` must have the shape of `input_ids` (got {tuple(mask.shape)} and "
            f"{tuple(input_ids.shape)}). Pass the tokenizer's own."
        )
    if not bool(mask[:, -1].all()) or bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise ValueError(
            "`attention_mask` must have its padding on the left (got a row with padding behind text). Set "
            "`tokenizer.padding_side = 'left'`."
        )
    return mask


def _ids(tokens: Any) -> list[int]:
    return [] if tokens is None else [tokens] if isinstance(tokens, int) else [int(token) for token in tokens]


@contextmanager
def _drawn_by(seed: int | None, device: torch.device) -> Iterator[None]:
    """Inside, torch's generators begin at the seed; afterwards they are what they were."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _output(
    input_ids: torch.Tensor, parts: Sequence[tuple[Continued, int]], eos: Sequence[int], pad: int
) -> ARGenerationOutput:
    """Rows cut at their ends; of a row that ends before others only the forwards until then count."""
    answers: list[list[int]] = []
    tokens, forwards, drafts, positions, drafted = [], [], [], [], []
    for part, place in parts:
        answer = part.answers[place].tolist()
        stop = next((number for number, token in enumerate(answer, 1) if token in eos), len(answer))
        stop = min(stop, part.ends.get(place, stop))
        answers.append(answer[:stop])
        # a row of several takes one token from each forward until it ends; alone it takes part in all
        took = part.target[:stop] if len(part.answers) > 1 else part.target
        tokens.append(stop - (answer[stop - 1] in eos))
        forwards.append(len(took))
        positions.append(sum(took))
        drafts.append(len(part.drafts))
        drafted.append(sum(part.drafts))
    longest = max(map(len, answers))
    filled = torch.tensor([answer + [pad] * (longest - len(answer)) for answer in answers]).to(input_ids)
    return ARGenerationOutput(
        sequences=torch.cat([input_ids, filled], dim=1),
        num_forwards=torch.tensor(forwards),
        num_draft_forwards=torch.tensor(drafts),
        tokens_per_forward=torch.tensor(tokens, dtype=torch.float64) / torch.tensor(forwards),
        positions_computed=torch.tensor(positions),
        draft_positions_computed=torch.tensor(drafted),
    )
