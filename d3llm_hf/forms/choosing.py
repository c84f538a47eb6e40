"""One of several answers, with the probabilities that the model gives them at their place in a text.

The probability of an option is the chain rule's over its tokens from left to right: each one's on the canvas on which
those before it stand and those behind it are masked. All canvases are one batch of `log_likelihood`, whose value of a
single token is exact. An option of one token so costs one canvas, and its log-probability is its log-likelihood.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..likelihood import log_likelihood
from .filling import Prompt, encoded_prompt, mask_of
from .form import tokens_of_text
from .holes import check_options


@dataclass(frozen=True)
class Chosen:
    """What was chosen.

    Attributes:
        best: the most probable option, the first of equals.
        probabilities: option -> its probability among the options; they sum to one.
        log_probabilities: option -> nats, among all texts of as many tokens.
    """

    best: str
    probabilities: dict[str, float]
    log_probabilities: dict[str, float]

    @property
    def expected(self) -> float:
        """The mean of options that are numbers, such as a score on a scale.

        Raises:
            ValueError: for an option that is no number.
        """
        try:
            return sum(float(option) * share for option, share in self.probabilities.items())
        except ValueError:
            raise ValueError(
                f"`options` must be numbers to have a mean (got {list(self.probabilities)}). Read `probabilities`."
            ) from None


def choose(
    model,
    tokenizer,
    options: Sequence[str],
    *,
    prompt: Prompt = None,
    before: str = "",
    after: str = "",
    batch_size: int = 32,
    mask_token_id: int | None = None,
    cfg_scale: float = 0.0,
) -> Chosen:
    """Chooses between texts at a place that is seen from both sides.

    Every option stands on a canvas of its own length, so options of equal numbers of tokens are compared fairly; among
    others a shorter one has fewer tokens to be improbable in.

    Args:
        model: a masked diffusion LM of this package that sees the whole text.
        tokenizer: its tokenizer.
        options: different texts, such as `["yes", "no"]` or `["1", "2", "3", "4", "5"]`.
        prompt: text before all, a conversation whose next turn begins, or token ids; as in `fill`.
        before, after (`str`): given text around the place.
        batch_size (`int`): canvases of a forward.
        mask_token_id (`int`, *optional*): the model's own when unset.
        cfg_scale (`float`): guidance against the same canvas without its condition, see `log_likelihood`.

    Returns:
        [`Chosen`].

    Raises:
        TypeError, ValueError: for options that are no list of different texts, and what `log_likelihood` raises.
    """
    # 1. A canvas for each token of each option: it alone is asked for, what is behind it is masked
    check_options(options)
    mask = mask_of(model, mask_token_id)
    left = encoded_prompt(tokenizer, prompt)
    left += tokens_of_text(tokenizer, before, mask, right=options[0]) if before else []
    right = tokens_of_text(tokenizer, after, mask, left=options[0]) if after else []
    rows: dict[tuple[tuple[int, ...], int], int] = {}  # tokens up to the one that is asked for, length -> its canvas
    asked = {}
    for option in options:
        tokens = tuple(tokens_of_text(tokenizer, option, mask))
        keys = [(tokens[: place + 1], len(tokens)) for place in range(len(tokens))]
        asked[option] = [rows.setdefault(key, len(rows)) for key in keys]
    texts = [[*left, *begun, *[mask] * (length - len(begun)), *right] for begun, length in rows]

    # 2. Their log-probabilities, in as few forwards as there are batches
    width = max(map(len, texts))
    ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
    seen = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    completion = torch.zeros_like(ids, dtype=torch.bool)
    for row, (begun, _) in enumerate(rows):
        completion[row, len(left) + len(begun) - 1] = True
    found = log_likelihood(
        model, ids, completion, attention_mask=seen, num_samples=1, batch_size=batch_size, cfg_scale=cfg_scale,
        mask_token_id=mask,
    )  # fmt: skip

    # 3. The chain rule, and the share of each option
    sums = torch.stack([found.mean[rows_of].sum() for rows_of in asked.values()])
    shares = sums.softmax(0).tolist()
    return Chosen(
        best=list(asked)[int(sums.argmax())],
        probabilities=dict(zip(asked, shares, strict=True)),
        log_probabilities=dict(zip(asked, sums.tolist(), strict=True)),
    )
