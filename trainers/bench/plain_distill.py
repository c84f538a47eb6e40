"""The distillation loss written down plainly, over logits of the whole sequence: what ours is measured against.

It follows the published d3LLM code's order of work: a forward for each view, the head at every position of prompt and
answer, logits widened to float32. Slow and large on purpose; nothing trains with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from ..distill.batch import COMPLEMENT, SFT
from ..distill.loss import mean_over
from ..distill.trainer import PseudoTrajectoryDistillTrainer


class FullLogitsTrainer(PseudoTrajectoryDistillTrainer):
    """[`PseudoTrajectoryDistillTrainer`] with the same draws and the same loss, computed over full logits.

    Attributes:
        whole_sequence (`bool`): Whether cross-entropy and entropy are computed at every position, and those without a
            loss dropped afterwards. With `False` the rows with a loss are taken out of the full logits first.
    """

    whole_sequence = True

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The loss of a batch of B samples of L tokens, R of which are the answer's."""
        args, ids = self.args, inputs["input_ids"]
        prompt_length = ids.shape[1] - inputs["labels"].shape[1]
        views = self._draw(inputs, model.training)
        loss = torch.zeros((), dtype=torch.float32, device=ids.device)
        outputs = None
        for kind, hidden, learnt, weights in zip(views.kinds, views.hidden, views.learnt, views.weights, strict=True):
            # 1. The view's own forward, with logits at all positions, in float32
            hidden, learnt, weights = (F.pad(each, (prompt_length, 0)) for each in (hidden, learnt, weights))  # (B, L)
            canvas = ids.masked_fill(hidden, self.mask_token_id)
            outputs = model(**self._model_inputs(canvas, inputs["attention_mask"], 0))
            logits = outputs.logits[:, -ids.shape[1] :].float()  # (B, L, V), without the rows of a learnt prompt
            shift = self.label_shift
            logits, targets = logits[:, : logits.shape[1] - shift], ids[:, shift:]
            learnt, weights = learnt[:, shift:], weights[:, shift:]

            # 2. Cross-entropy and entropy over the vocabulary
            rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(targets)  # sample of each position
            if self.whole_sequence:
                flat = [each.flatten(0, 1) for each in (logits, targets, learnt, weights, rows)]
            else:
                flat = [each[learnt] for each in (logits, targets, learnt, weights, rows)]
            logits, targets, learnt, weights, rows = flat
            cross_entropy = F.cross_entropy(logits, targets, reduction="none")
            if kind == SFT:
                loss = loss + args.sft_weight * (cross_entropy * weights).sum() / len(ids)
                continue
            mean = mean_over(cross_entropy, learnt.float(), rows, len(ids), args.loss_reduction)
            loss = loss + args.loss_scale * mean
            if kind == COMPLEMENT and not self.entropy_on_complement:
                continue
            probabilities = (logits / args.entropy_temperature).softmax(-1)
            entropy = -(probabilities * (probabilities + 1e-12).log()).sum(-1)
            right = learnt & logits.argmax(-1).eq(targets)
            mean = mean_over(entropy, right.float(), rows, len(ids), args.loss_reduction)
            loss = loss + args.loss_scale * args.entropy_weight * mean
        return (loss, outputs) if return_outputs else loss


class FullLogitsLearntRowsTrainer(FullLogitsTrainer):
    """[`FullLogitsTrainer`] whose probabilities are computed at the rows with a loss only."""

    whole_sequence = False
