"""The random numbers of the reference implementations, drawn in their order, for the decoding loop to replay."""

from typing import ClassVar

import torch
from base_seed import of_a_recording
from recorded import Recorded

from d3llm_hf.models.scoring import Sampler


class LLaDADraws(Sampler):
    """LLaDA's draws: Gumbel noise for the tokens of the whole canvas, or one uniform number per position."""

    def __init__(self, case: Recorded):
        super().__init__(case.torch_seed)
        self.case, self.step = case, -1
        self.generator = torch.Generator().manual_seed(of_a_recording(case.torch_seed))

    def draw(self, steps: torch.Tensor, *shape: int, dtype=torch.float32) -> torch.Tensor:
        """The numbers of a forward, drawn once."""
        step = int(steps[0])
        if step != self.step:
            self.step, self.drawn = step, torch.rand(shape, generator=self.generator, dtype=dtype)
        return self.drawn

    def uniform(self, rows, step, columns, stream):
        drawn = self.draw(step, len(self.case.sequence))[len(self.case.prompt) + columns].double()
        # As a confidence the highest goes first, as an entropy the lowest.
        return 1 - drawn if self.case.settings["decoding_method"] == "llada" else drawn

    def tokens(self, logits, rows, step, columns):
        uniform = self.draw(step, len(self.case.sequence), logits.shape[1], dtype=torch.float64)
        gumbel = -torch.log(-torch.log(uniform))
        return (logits.double() + gumbel[len(self.case.prompt) + columns]).argmax(-1)


class DreamDraws(LLaDADraws):
    """Dream's draws: `torch.multinomial` over the forwarded positions (d3LLM), or over those that may be decided."""

    # Positions that each recorded forward was given where that is not the canvas.
    FORWARDED: ClassVar = {"DR002": (84, 64, 64, 64, 64, 84)}

    def exponential(self, *shape: int) -> torch.Tensor:
        """The numbers behind `torch.multinomial`, whose result is the largest of p / q."""
        return torch.empty(shape).exponential_(generator=self.generator)

    def uniform(self, rows, step, columns, stream):
        return torch.rand(len(columns), generator=self.generator).double()

    def tokens(self, logits, rows, step, columns):
        if self.case.settings["decoding_method"] != "d3llm":
            index, width = torch.arange(len(columns)), len(columns)
        else:
            width = self.FORWARDED.get(self.case.id, [len(self.case.sequence)] * (int(step[0]) + 1))[int(step[0])]
            index = columns - (self.case.settings["max_new_tokens"] - width)
        return (logits.softmax(-1) / self.exponential(width, logits.shape[1])[index]).argmax(-1)

    def positions(self, cost, temperature, rows, step, columns):
        steps, length, step = self.case.settings["steps"], len(self.case.sequence), int(step[0])
        times = torch.linspace(1, 1e-3, steps + 1)
        if step < steps - 1 and int(len(cost) * (1 - times[step + 1] / times[step])) == 0:
            return cost
        return cost / temperature + self.exponential(length)[len(self.case.prompt) + columns].log()
