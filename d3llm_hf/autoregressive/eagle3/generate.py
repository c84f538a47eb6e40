"""Decoding with EAGLE-3: draft a tree, verify it, keep what the target would have chosen."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...models.probes import evaluating
from ...stops import FirstEnd
from .arguments import check_tree, checked_choice, checked_count, checked_prompt, checked_stops
from .draft import Drafter
from .head import Eagle3Head
from .target import Target, check_head, check_target
from .verify import accepted_path


@dataclass(frozen=True)
class Eagle3Output:
    """What one call decoded.

    Attributes:
        sequences (`(1, L)` long): `input_ids` as they were given, and the new tokens behind them.
        num_forwards (`(1,)` long): of the target: one over the prompt, and one for each verified tree.
        num_draft_forwards (`(1,)` long): of the head, one for each level of each tree.
        tokens_per_forward (`(1,)` float): new tokens before the first stop token, over the target's forwards, as of
            all decoding here. Plain decoding has 1, or a little less where it ends with a stop token.
        accept_lengths (list of `int`): of each verified tree, how many of its tokens the target chose as well. One
            more was decided by that forward, the target's choice behind them. Those that a stop token or
            `max_new_tokens` then cut off are counted.
    """

    sequences: torch.Tensor
    num_forwards: torch.Tensor
    num_draft_forwards: torch.Tensor
    tokens_per_forward: torch.Tensor
    accept_lengths: list[int]


def eagle3_generate(
    model: Any,
    head: Eagle3Head,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None = None,
    stopping_criteria: Sequence[Any] = (),
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    total_tokens: int = 60,
    depth: int = 7,
    draft_top_k: int = 10,
) -> Eagle3Output:
    """Decodes one prompt with a stock model, in fewer forwards than tokens, by EAGLE-3 (arXiv:2503.01840).

    The tokens are those of the target alone: its argmax, or draws from its distribution. They can differ from plain
    decoding only where two logits are equal up to rounding, since a forward over a tree rounds otherwise than one over
    a token. No token follows a stop token or what a criterion ends, and there are never more than `max_new_tokens`.

    1. The target reads the prompt and chooses a token, the root of the first tree.
    2. The head drafts a tree behind the root from the target's hidden states.
    3. The target verifies the tree in one forward; it is followed while it holds the target's choices.
    4. What was chosen is written, the cache keeps its entries alone, and the last choice is the next root.
    5. At a stop token, a criterion or the length the rest is cut, and everything is counted.

    Args:
        model: a causal Llama, Qwen2 or Qwen3 without windows, with `attn_implementation` "sdpa" or "eager". Of its
            generation config only the stop tokens are read.
        head ([`Eagle3Head`]): made for this target, on the same device.
        input_ids (`(1, P)` long): the prompt.
        attention_mask (`(1, P)`, *optional*): ones for tokens, zeros for padding on the left.
        max_new_tokens (`int`): at most so many.
        eos_token_id (`int` or list, *optional*): stop tokens; those of the model's generation config when unset, `[]`
            for none.
        stopping_criteria: of transformers; they are asked about each prefix of the answer.
        do_sample (`bool`): draw from the target's distribution.
        temperature, top_p, top_k: of sampling, as in transformers, but off when unset.
        seed (`int`, *optional*): of sampling; drawn from torch's global generator when unset. A text's draws depend on
            it and on their positions alone, not on the head or its tree.
        total_tokens (`int`): nodes of a tree, the root among them.
        depth (`int`): levels of a tree below its first one; the published evaluation has 5.
        draft_top_k (`int`): drafts behind each node, and nodes that a level goes on from.

    Returns:
        [`Eagle3Output`].

    Raises:
        TypeError, ValueError: for a target or a head that do not fit, another batch than one, settings of sampling
            without it, a tree that the head cannot fill, and logits that are not finite.

    Example:

    ```python
    from d3llm_hf import Eagle3Head, eagle3_generate

    head = Eagle3Head.from_pretrained("yuhuili/EAGLE3-LLaMA3.1-Instruct-8B").to(model.device, model.dtype)
    output = eagle3_generate(model, head, **tokenizer("Paris is", return_tensors="pt"), max_new_tokens=64)
    ```
    """
    check_target(model)
    check_head(model, head)
    max_new_tokens = checked_count("max_new_tokens", max_new_tokens)
    prompt = checked_prompt(model, input_ids, attention_mask, max_new_tokens)
    stops = checked_stops(model, eos_token_id)
    choose = checked_choice(do_sample, temperature, top_p, top_k, seed)
    total_tokens = checked_count("total_tokens", total_tokens, least=2)
    depth, draft_top_k = checked_count("depth", depth), checked_count("draft_top_k", draft_top_k)
    check_tree(head, total_tokens, depth, draft_top_k)
    ends = FirstEnd(stopping_criteria, input_ids.shape[1])
    embedding = head.embed_tokens if head.embed_tokens is not None else model.get_input_embeddings()

    def embed(tokens: torch.Tensor) -> torch.Tensor:
        return embedding(tokens.to(embedding.weight.device)).to(head.device, head.dtype)

    target, drafter = Target(model), Drafter(head, embed, total_tokens, depth, draft_top_k)
    with evaluating(model), evaluating(head):
        # 1. The target reads the prompt and chooses a token
        logits, features = target.read(prompt)
        chosen = choose(logits, torch.tensor([len(prompt)], device=logits.device))
        new, accept_lengths = chosen.tolist(), []
        behind = torch.cat([prompt[1:], chosen.to(prompt.device)])  # each position's next token

        while not (end := _end(input_ids, new, max_new_tokens, stops, ends)):
            # 2. The head drafts a tree behind the root
            tree = drafter.draft(features.to(head.device, head.dtype), behind.to(head.device))

            # 3. The target verifies it
            logits, features = target.verify(tree)
            before = len(prompt) + len(new)  # where a child of the root would stand
            positions = torch.tensor(tree.depths(), device=logits.device) + before
            choices = choose(logits, positions).tolist()
            path = accepted_path(tree.tokens.tolist(), tree.parents, choices)

            # 4. What was chosen is written
            decided = [choices[node] for node in path]
            new += decided
            accept_lengths.append(len(path) - 1)
            target.keep(path, len(tree.parents))
            features = features[torch.tensor(path, device=features.device)]
            behind = torch.tensor(decided, device=prompt.device)

    # 5. The rest is cut, and everything is counted
    answer = torch.tensor(new[:end], device=input_ids.device)
    tokens = end - (new[end - 1] in stops)
    num_forwards = torch.tensor([target.num_forwards])
    return Eagle3Output(
        sequences=torch.cat([input_ids[0].long(), answer])[None],
        num_forwards=num_forwards,
        num_draft_forwards=torch.tensor([drafter.num_forwards]),
        tokens_per_forward=torch.tensor([float(tokens)]) / num_forwards,
        accept_lengths=accept_lengths,
    )


def _end(input_ids: torch.Tensor, new: list[int], max_new_tokens: int, stops: frozenset[int], ends: FirstEnd) -> int:
    """How many of the new tokens are an answer that is complete; 0 while it is not."""
    places = [place for place, token in enumerate(new, 1) if token in stops][:1]
    places += [max_new_tokens] if len(new) >= max_new_tokens else []
    if ends.criteria:
        text: Any = torch.cat([input_ids[0].long(), torch.tensor(new, device=input_ids.device)])
        ends(text[None])
        places += ends.ends.values()
    return min(places, default=0)


__all__ = ["Eagle3Output", "eagle3_generate"]
