"""What the arguments of all trainers here share."""

import dataclasses
from typing import Any, ClassVar

from transformers import TrainingArguments

from .argument_checks import check_inherited, check_kinds


_INHERITED = frozenset(field.name for field in dataclasses.fields(TrainingArguments))


class CarefulArguments(TrainingArguments):
    """`TrainingArguments` that are checked when they are made, and whose pickles hold no token of the Hub.

    The Trainer pickles its arguments into every checkpoint (`training_args.bin`) and uploads that file.
    """

    # Own arguments that change nothing of what is learnt; see `argument_table` for the inherited ones.
    _FREE: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self):
        check_kinds(self, _INHERITED)  # before transformers compares and converts them
        super().__post_init__()
        check_inherited(self)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"hub_token": None}

    def own_names(self) -> list[str]:
        """The arguments that transformers does not have."""
        return [field.name for field in dataclasses.fields(self) if field.name not in _INHERITED]
