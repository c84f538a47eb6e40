"""A model that is sure of one answer, prompts of one length for it, and a sweep of the two."""

import sys
from pathlib import Path

from official import tiny_tokenizer
from tiny import ScriptedModel

from d3llm_hf.evaluation.sweep.grids import Curve
from d3llm_hf.evaluation.tasks.load import QuestionTask


ANSWER = "#### 42"  # 7 tokens of the byte-level tokenizer, then the stop token
CAREFUL = Curve("llada", settings={"block_length": 4}, values=())
BOLD = Curve("d3llm", "bold", {"block_length": 4}, values=(0.1, 0.5))


def same_text(prediction: str, reference: str) -> bool:
    return prediction == reference


def task_of(count: int = 5, scorer=same_text) -> QuestionTask:
    """Prompts of three tokens; the model's answer is right for all but every third."""
    references = ["wrong" if index % 3 == 2 else ANSWER for index in range(count)]
    return QuestionTask("letters", 7, 16, [f"q{index:02}" for index in range(count)], references, scorer)


def sure_model() -> ScriptedModel:
    """Writes [`ANSWER`] and a stop token behind prompts of three tokens, and stop tokens behind it."""
    import torch

    tokenizer = tiny_tokenizer()
    wanted = tokenizer(ANSWER, add_special_tokens=False)["input_ids"]

    def script(ids: torch.Tensor) -> torch.Tensor:
        line = ([0] * 3 + wanted + [tokenizer.eos_token_id] * ids.shape[1])[: ids.shape[1]]
        return torch.nn.functional.one_hot(torch.tensor(line), 512).float().expand(len(ids), -1, -1) * 40

    model = ScriptedModel(script, vocab_size=512, eos_token_id=tokenizer.eos_token_id, mask_token_id=511)
    for weight in model.parameters():  # unused, but the same model has the same ones
        torch.nn.init.zeros_(weight)
    return model


def without_times(point: dict) -> dict:
    """What a point says apart from when and how fast."""
    passing = ("seconds", "cpu_seconds", "tokens_per_second", "provenance")
    made = {name: value for name, value in point["provenance"].items() if name != "date"}
    return {name: value for name, value in point.items() if name not in passing} | {"provenance": made}


def main(output: str, marker: str) -> None:
    """A sweep that waits to be killed in the judge of its fourth sample."""
    import time

    from d3llm_hf.evaluation.sweep.sweep import sweep

    def same_text(prediction: str, reference: str) -> bool:
        if prediction and calls.append(reference) is None and len(calls) == 4:
            Path(marker).touch()
            time.sleep(600)
        return prediction == reference

    calls: list[str] = []
    task = task_of(scorer=same_text)
    sweep(sure_model(), tiny_tokenizer(), task, [CAREFUL, BOLD], output, label="sure", batch_size=1, chat=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
