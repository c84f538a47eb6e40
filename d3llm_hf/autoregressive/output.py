"""What decoding from left to right gives and took, in the fields of a diffusion model's output."""

from dataclasses import dataclass

import torch

from ..models.answer_count import AnswerCount


@dataclass(frozen=True)
class ARGenerationOutput(AnswerCount):
    """What [`~.generate.generate`] returns. B rows, P prompt slots, N tokens of the longest answer.

    Attributes:
        sequences (`(B, P + N)` long): prompt and answer; pad tokens behind the end of an answer.
        num_forwards (`(B,)` long): forwards of the target that the row took part in, until it was finished. The one
            over the prompt counts, and so does each that verifies drafts.
        num_draft_forwards (`(B,)` long): forwards of whatever drafts; 0 where nothing does or no model is asked.
        tokens_per_forward (`(B,)` float): answer tokens before the first stop token, over `num_forwards`.
        positions_computed (`(B,)` long): positions pushed through the target, summed over the row's forwards.
        draft_positions_computed (`(B,)` long): those pushed through whatever drafts.
    """

    sequences: torch.Tensor
    num_forwards: torch.Tensor
    num_draft_forwards: torch.Tensor
    tokens_per_forward: torch.Tensor
    positions_computed: torch.Tensor
    draft_positions_computed: torch.Tensor

    @property
    def num_forwards_reference(self) -> torch.Tensor:
        """`num_forwards`: for these methods the published code counts no other way."""
        return self.num_forwards


__all__ = ["ARGenerationOutput"]
