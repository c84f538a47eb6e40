"""Whether an answer agrees with the reference: by the number after `####`, or by the contents of `\\boxed{}`."""

import re
from collections.abc import Callable

from d3llm_hf.evaluation.tasks.word_problems import exact_match, extract_answer


def same_number(prediction: str, reference: str) -> bool:
    """Whether both end in the same integer after `####`; a reference without the mark is the number itself.

    Raises:
        ValueError: for a reference that holds no such number: every prediction would count as wrong.
    """
    marked = reference if "####" in reference else f"#### {reference.strip()}"
    if extract_answer(marked) is None:
        raise ValueError(
            f"`answer` must hold an integer for the scorer `number`, alone or after `####` (got {reference[-80:]!r}). "
            "Set `answer_column`, or another `scorer`."
        )
    return exact_match(prediction, marked)


def boxed(text: str) -> str | None:
    r"""The contents of the last `\boxed{...}`, up to the brace that closes it; `None` where there is none."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    return None


def same_boxed(prediction: str, reference: str) -> bool:
    r"""Whether the last `\boxed{}` of both is the same but for case, commas and spaces (d3LLM's check).

    A reference without `\boxed{` is the answer itself.
    """
    wanted = boxed(reference) if "\\boxed{" in reference else reference
    found = boxed(prediction)
    return found is not None and wanted is not None and _normal(found) == _normal(wanted)


def _normal(answer: str) -> str:
    return re.sub(r"[,\s]", "", answer).lower()


SCORERS: dict[str, Callable[[str, str], bool] | None] = {"none": None, "number": same_number, "boxed": same_boxed}
"""Name of a scorer -> whether a prediction agrees with a reference."""
