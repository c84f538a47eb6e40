"""Documents of the task `word_problems`; lm-eval loads this file by its path."""

from datasets import Dataset

from d3llm_hf.evaluation.tasks.word_problems import generate_problems


def held_out(num_problems: int = 500, problems_seed: int = 4242, **others) -> dict[str, Dataset]:
    """The split `test`: `question` and `result` of each problem. lm-eval passes all arguments of the model as well."""
    problems = generate_problems(num_problems, split="test", seed=problems_seed)
    return {"test": Dataset.from_list([{"question": p.question, "result": p.result} for p in problems])}
