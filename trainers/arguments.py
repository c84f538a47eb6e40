"""What the arguments of all trainers here share."""

from typing import Any

from transformers import TrainingArguments


class CarefulArguments(TrainingArguments):
    """`TrainingArguments` whose pickles hold no token of the Hub.

    The Trainer pickles its arguments into every checkpoint (`training_args.bin`) and uploads that file.
    """

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"hub_token": None}
