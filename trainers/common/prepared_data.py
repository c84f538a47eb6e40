"""A Trainer whose data sets are prepared wherever they come from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import Trainer

from .rows import check_named, in_rows, prepare_each


class PreparedDataTrainer(Trainer):
    """Takes data in the constructor, as an attribute, in `evaluate` and in `predict` alike.

    Args:
        prepare (`Callable`): Makes of a data set what the collator reads; called once for each.
        args, train_dataset, eval_dataset, kwargs: As of [`~transformers.Trainer`].
    """

    def __init__(
        self, *, args: Any, train_dataset: Any, eval_dataset: Any, prepare: Callable[[Any], Any], **kwargs: Any
    ):
        self.args = args  # what `_ready` reads; the Trainer sets it again
        self._prepare = prepare
        self._prepared: WeakSet[Any] = WeakSet()
        train_dataset = prepare_each(train_dataset, self._ready, "train_dataset")
        eval_dataset = prepare_each(eval_dataset, self._ready)
        _check_lengths(train_dataset, args)
        super().__init__(args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)

    def _ready(self, dataset: Any) -> Any:
        """A data set as the collator takes it, prepared unless that was done here."""
        if dataset in self._prepared:
            return dataset
        with self.args.main_process_first(local=True, desc="preparing a data set"):
            prepared = self._prepare(in_rows(dataset))
        self._prepared.add(prepared)
        return prepared

    def get_train_dataloader(self) -> DataLoader:
        """As the Trainer's, also over a data set that was set after the trainer was made."""
        self.train_dataset = prepare_each(self.train_dataset, self._ready, "train_dataset")
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As the Trainer's, over data as the constructor takes them."""
        if eval_dataset is None or isinstance(eval_dataset, str):
            self.eval_dataset = prepare_each(self.eval_dataset, self._ready)
            _check_name(eval_dataset, self.eval_dataset)
            return super().get_eval_dataloader(eval_dataset)
        # With persistent workers, the Trainer keeps one loader for all sets that have no name, whatever is in them.
        kept = getattr(self, "_eval_dataloaders", {})
        of_the_trainer = kept.pop("eval", None)
        loader = super().get_eval_dataloader(prepare_each(eval_dataset, self._ready))
        kept = getattr(self, "_eval_dataloaders", {})
        kept.pop("eval", None)
        if of_the_trainer is not None:
            kept["eval"] = of_the_trainer
        return loader

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the Trainer's, which takes None in a dictionary for its own data."""
        if isinstance(eval_dataset, dict):
            check_named(eval_dataset)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As the Trainer's, over data as the constructor takes them."""
        return super().get_test_dataloader(prepare_each(test_dataset, self._ready, "test_dataset"))


def _check_name(name: str | None, datasets: Any) -> None:
    """Refuse the name of a held-out data set that the trainer does not have."""
    named = isinstance(datasets, dict)
    if name is not None and (not named or name not in datasets):
        raise ValueError(
            f"`eval_dataset` must be one of the names of the trainer's held-out data, "
            f"{sorted(datasets) if named else 'which has none'} (got {name!r}). Correct it, or pass a data set."
        )


def _check_lengths(dataset: Any, args: Any) -> None:
    """Refuse to order by lengths that are not there."""
    by_length = args.train_sampling_strategy in ("group_by_length", "batch_rebalance")
    if by_length and isinstance(dataset, Dataset) and args.length_column_name not in dataset.column_names:
        raise ValueError(
            f"`train_sampling_strategy={args.train_sampling_strategy!r}` needs a column "
            f"`{args.length_column_name}` of lengths in the training data (got {dataset.column_names}). Add it, or "
            "name another one as `length_column_name`."
        )
