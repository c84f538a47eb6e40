"""transformers' logits processors, for positions that are decided in any order."""

import torch
from transformers.generation import LogitsProcessorList
from transformers.generation import logits_process as lp


# These look at one row of logits alone, so all candidates pass through at once.
ROW_WISE = (
    lp.TemperatureLogitsWarper,
    lp.TopKLogitsWarper,
    lp.TopPLogitsWarper,
    lp.MinPLogitsWarper,
    lp.TypicalLogitsWarper,
    lp.EpsilonLogitsWarper,
    lp.EtaLogitsWarper,
    lp.SuppressTokensLogitsProcessor,
    lp.InfNanRemoveLogitsProcessor,
    lp.LogitNormalization,
)


class Processors:
    """Applies processors to candidates; those that read the text see the canvas before the candidate.

    A processor that reads text expects `(B, length)` ids and `(B, V)` scores of the batch that `generate` was given,
    so it is called once for each column that has a candidate. Undecided positions before it hold the mask token.

    Args:
        processors: as `generate` prepared them.
        prompt (`(B, P)` long): of the whole batch.
        tokens (`(B, N)` long): the answers of the whole batch, which the decoding loop keeps up to date.
    """

    def __init__(self, processors: LogitsProcessorList, prompt: torch.Tensor, tokens: torch.Tensor):
        self.processors, self.prompt, self.tokens = processors, prompt, tokens

    def __bool__(self) -> bool:
        return len(self.processors) > 0

    def __call__(self, scores: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """`(m, V)` scores of candidates at `(m,)` rows and columns of the whole batch; returns them processed."""
        for processor in self.processors:
            if isinstance(processor, ROW_WISE):
                scores = processor(self.prompt, scores)
                continue
            for column in columns.unique().tolist():
                here = columns == column
                batch = scores.new_zeros(self.prompt.shape[0], scores.shape[1])
                batch[rows[here]] = scores[here]
                text = torch.cat([self.prompt, self.tokens[:, :column]], dim=1)
                scores[here] = processor(text, batch)[rows[here]]
        return scores
