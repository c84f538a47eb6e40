"""Synthetic grade-school word problems with worked answers, in the form of GSM8K chain of thought.

A problem is a short story of `min_steps` to `max_steps` arithmetic steps (`+`, `-`, `*2`, `*3`, `/2`) over one running
value. Its answer works the steps out line by line and ends in `#### <integer>`, as GSM8K answers do.

Train and test problems differ in form *and* in numbers. The *skeleton* of a problem (the combination of all its clause
wordings) and its *number key* (the sequence of operations with their numbers) are each held out for one crc32 bucket
in ten: a training problem uses neither a held-out skeleton nor a held-out number key, a test problem needs both held
out. Single facts such as `22 + 9 = 31` do occur on both sides, inside different problems.

Nothing here depends on the global random state or on Python's hash seed: a seed names a data set.
"""

import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass


MIN_VALUE, MAX_VALUE = 2, 99
"""Every running value stays in this range (2 and up, so that plural nouns are right)."""
MAX_START = 60
MAX_OPERAND = 12
"""Largest number added or taken away in one step."""

_HELD_OUT_ONE_IN = 10

_PEOPLE = {
    "He": ("Tom", "Ben", "Sam", "Max", "Leo", "Dan", "Jack", "Paul", "Omar", "Ravi", "Hugo", "Noah"),
    "She": ("Anna", "Mia", "Eva", "Lily", "Sara", "Nina", "Rosa", "Emma", "Zoe", "Ida", "Maya", "Lucy"),
}
_OBJECTS = (
    "apples", "books", "coins", "cards", "shells", "pens", "stamps", "eggs",
    "marbles", "pears", "balls", "rings", "cups", "plums", "beads", "stones",
)  # fmt: skip

_STARTS = (
    "{name} has {value} {objects}.",
    "{name} starts with {value} {objects}.",
    "At first {name} has {value} {objects}.",
)
_CLAUSES = {
    "+": (
        "{pronoun} buys {n} more.",
        "{pronoun} finds {n} more.",
        "{pronoun} gets {n} from a friend.",
        "{pronoun} wins {n} more.",
        "{pronoun} is given {n} more.",
    ),
    "-": (
        "{pronoun} loses {n}.",
        "{pronoun} sells {n}.",
        "{pronoun} gives {n} to a friend.",
        "{pronoun} gives away {n}.",
        "{pronoun} throws away {n}.",
    ),
    "*2": (
        "The number then doubles.",
        "{pronoun} then doubles that number.",
        "{pronoun} then gets as many again.",
    ),
    "*3": (
        "The number then triples.",
        "{pronoun} then triples that number.",
        "Soon {name} has three times as many.",
    ),
    "/2": (
        "{pronoun} loses half of them.",
        "{pronoun} sells half of them.",
        "{pronoun} gives away half of them.",
    ),
}
_QUESTIONS = (
    "How many {objects} does {name} have now?",
    "How many {objects} does {name} have in the end?",
    "What is the number of {objects} now?",
)
# One phrasing is drawn per problem, never per line: a model that has read the first line knows the rest of the form.
_ANSWERS = (
    ("Start with {value}.", "{left} {sign} {right} = {value}", "So there are {value} {objects}."),
    ("{name} has {value} {objects}.", "Now {left} {sign} {right} = {value} {objects}.", None),
    (None, "{name} now has {left} {sign} {right} = {value} {objects}.", None),
)

_STEP_WEIGHTS = {"+": 8, "-": 8, "*2": 3, "*3": 2, "/2": 4}


@dataclass(frozen=True)
class WordProblem:
    """One problem with its worked answer.

    Args:
        question (`str`): The story and its question, one paragraph.
        answer (`str`): Worked steps, one a line, then `#### <result>`.
        result (`int`): The final number.
        skeleton (`str`): The clause wordings used, as one key. Two problems with the same skeleton differ only in
            names, objects and numbers.
        numbers (`str`): The starting value and every operation in order, such as `"17+5*2"`.
    """

    question: str
    answer: str
    result: int
    skeleton: str
    numbers: str


def generate_problems(
    n: int, *, split: str = "train", seed: int, min_steps: int = 2, max_steps: int = 5
) -> list[WordProblem]:
    """Generate `n` problems of one split; the same arguments always give the same list.

    Args:
        n (`int`): How many problems, at least 0.
        split (`str`, defaults to `"train"`): `"train"` or `"test"`; see the module docstring for what is held out.
        seed (`int`): Names the data set.
        min_steps, max_steps (`int`): Fewest and most arithmetic steps of a problem; drawn uniformly in between.

    Returns:
        `list[WordProblem]` of length `n`.

    Raises:
        ValueError: If an argument is outside its range.

    Example:

    ```python
    >>> from d3llm_hf.evaluation.tasks.word_problems import generate_problems
    >>> problem = generate_problems(1, split="test", seed=0)[0]
    >>> problem.answer.endswith(f"#### {problem.result}")
    True
    ```
    """
    _check_int("n", n, 0)
    _check_int("min_steps", min_steps, 1)
    _check_int("max_steps", max_steps, 1)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"`seed` must be an integer (got {seed!r}). Pass for example `seed=0`.")
    if split not in ("train", "test"):
        raise ValueError(f'`split` must be "train" or "test" (got {split!r}). Pass one of the two.')
    if max_steps < min_steps:
        raise ValueError(
            f"`max_steps` must be at least `min_steps` (got max_steps={max_steps}, min_steps={min_steps}). "
            "Raise `max_steps` or lower `min_steps`."
        )
    stream = _problem_stream(random.Random(seed), split == "test", min_steps, max_steps)
    return [next(stream) for _ in range(n)]


def extract_answer(text: str) -> str | None:
    """Return the integer after the last `####` of `text` as a string, or `None` where there is none."""
    marker = text.rfind("####")
    if marker < 0:
        return None
    match = re.match(r"####\s*(-?\d[\d,]*)", text[marker:])
    return None if match is None else str(int(match.group(1).replace(",", "")))


def exact_match(prediction: str, reference: str) -> bool:
    """Whether both texts end in the same integer; `False` where either has none."""
    answer = extract_answer(prediction)
    return answer is not None and answer == extract_answer(reference)


def _check_int(name: str, value: int, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(
            f"`{name}` must be an integer of at least {minimum} (got {value!r}). "
            f"Pass `{name}={minimum}` or more to `generate_problems`."
        )


def _is_held_out(key: str) -> bool:
    return zlib.crc32(key.encode()) % _HELD_OUT_ONE_IN == 0


def _problem_stream(rng: random.Random, held_out: bool, min_steps: int, max_steps: int) -> Iterator[WordProblem]:
    while True:
        start, steps = _draw_numbers(rng, rng.randint(min_steps, max_steps))
        numbers = str(start) + "".join(sign + str(operand) for sign, operand, _ in steps)
        if _is_held_out(numbers) != held_out:
            continue
        wording = _draw_wording(rng, steps, held_out)
        if wording is not None:
            yield _render(rng, start, steps, numbers, wording)


def _draw_numbers(rng: random.Random, num_steps: int) -> tuple[int, list[tuple[str, int, int]]]:
    """A starting value and `(sign, operand, value after)` for every step, all values within range."""
    start = value = rng.randint(MIN_VALUE, MAX_START)
    steps = []
    for _ in range(num_steps):
        choices = _possible_steps(value)
        kind = rng.choices(choices, [_STEP_WEIGHTS[choice] for choice in choices])[0]
        operand = int(kind[1]) if len(kind) > 1 else _draw_operand(rng, kind, value)
        sign = kind[0]
        value = {"+": value + operand, "-": value - operand, "*": value * operand, "/": value // operand}[sign]
        steps.append((sign, operand, value))
    return start, steps


def _possible_steps(value: int) -> list[str]:
    possible = {
        "+": value < MAX_VALUE,
        "-": value > MIN_VALUE,
        "*2": value * 2 <= MAX_VALUE,
        "*3": value * 3 <= MAX_VALUE,
        "/2": value % 2 == 0 and value // 2 >= MIN_VALUE,
    }
    return [kind for kind, allowed in possible.items() if allowed]


def _draw_operand(rng: random.Random, sign: str, value: int) -> int:
    room = MAX_VALUE - value if sign == "+" else value - MIN_VALUE
    return rng.randint(1, min(MAX_OPERAND, room))


def _draw_wording(rng: random.Random, steps: list[tuple[str, int, int]], held_out: bool) -> list[int] | None:
    """Indices of the start, of every clause and of the question; `None` if no draw fell into the split."""
    choices = [len(_STARTS), *(len(_CLAUSES[_kind(step)]) for step in steps), len(_QUESTIONS)]
    for _ in range(100):
        wording = [rng.randrange(size) for size in choices]
        if _is_held_out(_skeleton(steps, wording)) == held_out:
            return wording
    return None


def _kind(step: tuple[str, int, int]) -> str:
    return step[0] + str(step[1]) if step[0] in "*/" else step[0]


def _skeleton(steps: list[tuple[str, int, int]], wording: list[int]) -> str:
    clauses = [_kind(step) + "." + str(index) for step, index in zip(steps, wording[1:-1], strict=True)]
    return "|".join([f"start.{wording[0]}", *clauses, f"ask.{wording[-1]}"])


def _render(
    rng: random.Random, start: int, steps: list[tuple[str, int, int]], numbers: str, wording: list[int]
) -> WordProblem:
    pronoun = rng.choice(sorted(_PEOPLE))
    words = {"name": rng.choice(_PEOPLE[pronoun]), "objects": rng.choice(_OBJECTS), "pronoun": pronoun}
    intro, line, outro = rng.choice(_ANSWERS)

    story = [_STARTS[wording[0]].format(value=start, **words)]
    worked = [] if intro is None else [intro.format(value=start, **words)]
    left = start
    for step, index in zip(steps, wording[1:-1], strict=True):
        sign, operand, value = step
        story.append(_CLAUSES[_kind(step)][index].format(n=operand, **words))
        worked.append(line.format(left=left, sign=sign, right=operand, value=value, **words))
        left = value
    story.append(_QUESTIONS[wording[-1]].format(**words))
    if outro is not None:
        worked.append(outro.format(value=left, **words))
    return WordProblem(
        question=" ".join(story),
        answer="\n".join([*worked, f"#### {left}"]),
        result=left,
        skeleton=_skeleton(steps, wording),
        numbers=numbers,
    )
