"""Trainers of both kinds over any data: rows as lists, data sets and streams."""

import distillation
import pytest
from datasets import Dataset, IterableDataset
from distillation import student
from official import tiny_tokenizer

from trainers.sft.config import MaskedDiffusionSFTConfig
from trainers.sft.trainer import MaskedDiffusionSFTTrainer


TOKENIZER = tiny_tokenizer()
GOOD = {"prompt": "1+1?", "completion": "2"}


def stream(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


def tuned(folder, train, evaluation=None, model=None, **arguments):
    """A trainer of fine-tuning; lists of rows become data sets."""
    defaults = {"max_prompt_length": 40, "response_length": 16, "max_steps": 1, "report_to": "none", "use_cpu": True}
    return MaskedDiffusionSFTTrainer(
        model=student(TOKENIZER) if model is None else model,
        args=MaskedDiffusionSFTConfig(
            str(folder), save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, **(defaults | arguments)
        ),
        train_dataset=Dataset.from_list(train) if isinstance(train, list) else train,
        eval_dataset=evaluation,
        processing_class=TOKENIZER,
    )


def distilled(folder, train, evaluation=None, **arguments):
    return distillation.make_trainer(folder, TOKENIZER, None, train, {"eval_dataset": evaluation}, **arguments)


MAKERS = pytest.mark.parametrize("make", [tuned, distilled])
