"""From trajectories to padded batches; nothing is masked here."""

from dataclasses import dataclass
from typing import Any

import torch

from ..sft.collator import MaskedDiffusionSFTCollator


@dataclass
class PseudoTrajectoryCollator(MaskedDiffusionSFTCollator):
    """Pads prompts and answers as [`MaskedDiffusionSFTCollator`] does, and carries the teacher's step maps.

    A teacher's answer may hold the fill that it decided itself: the end-of-text tokens behind the first one at its end
    count as fill, but keep their steps. Masking is left to the trainer: batches are collated ahead of the step that
    uses them, so a collator cannot know the noise level of that step.

    Args:
        use_target_ids (`bool`, defaults to `False`): Take the text from `target_ids`, of the teacher only the order.

    Returns (when called on a list of examples with `prompt_ids`, `response_ids`, `step_map` and `sample_id`):
        What [`MaskedDiffusionSFTCollator`] returns, with `step_map` of shape `(B, R)`, -1 where the teacher decided
        nothing, and `sample_ids` of shape `(B,)`.

    Raises:
        ValueError: If an example does not fit, has an empty prompt, or a step map of another length than its response.

    Example:

    ```python
    >>> from trainers.distill.collator import PseudoTrajectoryCollator
    >>> collate = PseudoTrajectoryCollator(pad_token_id=0, eos_token_id=0, response_length=3)
    >>> example = {"prompt_ids": [5, 6], "response_ids": [7, 8], "step_map": [2, 1], "sample_id": 0}
    >>> collate([example])["step_map"]
    tensor([[ 2,  1, -1]])
    ```
    """

    use_target_ids: bool = False

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        for example in examples:
            if not example["prompt_ids"]:
                raise ValueError(
                    f"`prompt_ids` must hold at least one token (got none in sample {example['sample_id']}). "
                    "Leave such rows out."
                )
            if len(example["step_map"]) != len(example["response_ids"]):
                raise ValueError(
                    "`step_map` must have one entry per token of `response_ids` (got "
                    f"{len(example['step_map'])} and {len(example['response_ids'])} in sample "
                    f"{example['sample_id']}). Extract the trajectories again."
                )
        text = "target_ids" if self.use_target_ids else "response_ids"
        batch = super().__call__(
            [
                {"prompt_ids": example["prompt_ids"], "response_ids": self._without_fill(example[text])}
                for example in examples
            ]
        )
        step_map = torch.full_like(batch["labels"], -1)
        for row, example in enumerate(examples):
            steps = torch.tensor(example["step_map"][: self.response_length], dtype=torch.long)
            step_map[row, : len(steps)] = steps
        return batch | {
            "step_map": step_map,
            "sample_ids": torch.tensor([example["sample_id"] for example in examples], dtype=torch.long),
        }

    def _without_fill(self, response: list[int]) -> list[int]:
        length = len(response)
        while length > 1 and response[length - 2 : length] == [self.eos_token_id] * 2:
            length -= 1
        return response[:length]
