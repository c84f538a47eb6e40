"""The processes of `accelerate launch` among which an evaluation divides its requests."""

import os
from datetime import timedelta
from typing import Any

import torch


class Processes:
    """This process among the others; alone unless it was launched with several.

    Attributes:
        rank, count: index of this process, and how many there are.
        device (`torch.device`, *optional*): the one of this process; `None` when it is alone.
    """

    def __init__(self):
        self.rank, self.count, self.device = 0, 1, None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import Accelerator, InitProcessGroupKwargs

            # The first process may be busy with metrics for hours while the others wait. On a CPU accelerate counts
            # the processes of a launcher only when told that this is meant.
            self.accelerator = Accelerator(
                cpu=not torch.accelerator.is_available(),
                kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(weeks=52))],
            )
            self.rank, self.count = self.accelerator.process_index, self.accelerator.num_processes
            self.device = self.accelerator.device

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all processes, joined along their first axis."""
        return tensor if self.count == 1 else self.accelerator.gather(tensor)

    def gather_object(self, thing: Any, rank: int = 0) -> list | None:
        """A list of every process's object on the process `rank`, `None` on the others."""
        if self.count == 1:
            return [thing]
        things = [None] * self.count if self.rank == rank else None
        torch.distributed.gather_object(thing, things, dst=rank)
        return things

    def barrier(self) -> None:
        """Waits for the others."""
        if self.count > 1:
            self.accelerator.wait_for_everyone()
