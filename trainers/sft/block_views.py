"""A text twice in one forward, noisy and clean: how every block of a block-causal model is trained at once.

What decides a block sees it with masks, and all earlier blocks without. A forward over the noisy text alone would show
masks in the earlier ones, too; so the clean text follows the noisy one, at the same positions (Block Diffusion,
https://huggingface.co/papers/2503.09573; SDAR's and Fast-dLLM v2's training):

* a noisy block sees itself, and the clean blocks before it;
* a clean block sees the clean blocks up to itself, and nothing noisy;
* nothing sees another document of its row, and padding is a document that nothing is learnt of.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DoubledCanvas:
    """The inputs of one forward over noisy and clean texts of L slots; B rows.

    Attributes:
        input_ids (`(B, 2L)` long): the noisy text, then the clean one.
        position_ids (`(B, 2L)` long): of each token in its document, from 0; the same in both halves.
        attention_mask (`(B, 1, 2L, 2L)` bool): True where the query of a row sees the key of a column.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor

    @classmethod
    def of(
        cls,
        noisy: torch.Tensor,
        clean: torch.Tensor,
        positions: torch.Tensor,
        documents: torch.Tensor,
        blocks: torch.Tensor,
    ) -> "DoubledCanvas":
        """Several noisy views of the same rows, all views of the first kind first.

        Args:
            noisy (`(V, B, L)` long): the views, in which some tokens are masks.
            clean (`(B, L)` long): the text.
            positions, documents, blocks (`(B, L)` long): of each slot its position in its document, the document's
                number in the row, and the block's in the document.

        Returns:
            `V B` rows.
        """
        views = len(noisy)
        return cls(
            input_ids=torch.cat([noisy.flatten(0, 1), clean.repeat(views, 1)], dim=1),
            position_ids=positions.repeat(views, 2),
            attention_mask=doubled_mask(documents, blocks).repeat(views, 1, 1, 1),
        )


def doubled_mask(documents: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Which slots of the doubled sequence see which, `(B, 1, 2L, 2L)` bool; every slot sees itself at least.

    Args:
        documents (`(B, L)` long): the document of each slot.
        blocks (`(B, L)` long): the block of each slot in its document.
    """
    same = documents[:, :, None] == documents[:, None]  # (B, L, L), query by key
    asking, asked = blocks[:, :, None], blocks[:, None]
    of_noisy = torch.cat([same & (asking == asked), same & (asking > asked)], dim=2)
    of_clean = torch.cat([torch.zeros_like(same), same & (asking >= asked)], dim=2)
    return torch.cat([of_noisy, of_clean], dim=1)[:, None]
