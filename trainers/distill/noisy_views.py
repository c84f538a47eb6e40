"""Noisy views of pseudo-trajectory distillation: which answer tokens a student sees, and which it has to predict.

A view belongs to a window of the answer. What precedes the window is clean; inside it, the tokens that the teacher had
not yet decided at some moment of its own decoding are hidden; everything behind it is hidden and has no loss. The
complementary view hides the window's other tokens instead. Hidden tokens are replaced by the mask token; all others
are those of the training text, so that only the *order* of the teacher's decoding is used.

A decoder of several blocks at once has more than one that is partly decided. So a view may belong to two consecutive
blocks, the second one noisier (as in MultiTF, https://huggingface.co/papers/2606.29215, which has bounded groups of
blocks with noise of their own).

Pure functions over one answer canvas of C tokens: the answer and the fill behind it. They follow the published d3LLM
code (`forward_process_with_trajectory`), with two corrections. An answer whose length is a multiple of the window has
no empty last window. A missing order is no reason to fall back to random masks: the trainer refuses such a data set.
"""

from dataclasses import dataclass

import torch


OBJECTIVES = ("trajectory", "random", "certainty")

# The random baseline hides with probability (1 - eps) t + eps, as the masks of LLaDA's pretraining.
_EPS = 1e-3
# dParallel hides half of a block, at any time of the training.
CERTAINTY_NOISE = 0.5


@dataclass(frozen=True)
class NoisyView:
    """Both views of one answer, each a bool tensor of shape `(C,)`.

    Args:
        masked: Positions of the window, or of both blocks, that are hidden and learnt in the primary view.
        complement: The other positions there, hidden and learnt in the complementary view.
        future: Positions behind, hidden in both and not learnt.
        noise_level (`float`): The noise level that was drawn, of two blocks the first one's.
        distances (`torch.LongTensor` of shape `(C,)`, *optional*): After how many more tokens, from its block's state
            on, the teacher decides each position there; 0 or less for what that state shows. Of `"trajectory"`.
    """

    masked: torch.Tensor
    complement: torch.Tensor
    future: torch.Tensor
    noise_level: float
    distances: torch.Tensor | None = None


def decision_ranks(step_map: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Rank of each token in the order in which the teacher decided them.

    Args:
        step_map (`torch.LongTensor` of shape `(C,)`): Step, from 1, that decided each token; -1 where none did, 0 for
            a token that was there from the start.

    Returns:
        `(ranks, count)`: ranks from 1, of tokens of the same step from left to right; 0 for given tokens and C + 1 for
        undecided ones. `count` tokens were decided.
    """
    ranks = torch.full_like(step_map, len(step_map) + 1).masked_fill(step_map == 0, 0)
    decided = (step_map > 0).nonzero()[:, 0]
    ranks[decided[step_map[decided].argsort(stable=True)]] = torch.arange(1, len(decided) + 1, device=ranks.device)
    return ranks, len(decided)


def state_index(noise_level: float, start: int, end: int, count: int) -> int:
    """Index of the teacher's state for a window `[start, end)`; in state i, i + 1 of its `count` tokens are decided.

    As in the reference, whose state holds one token more than the noise level asks for: at noise 0 the window of a
    teacher that decodes window by window has nothing left to predict, at noise 1 one token of it is known.
    """
    return min(start + int((1.0 - noise_level) * (end - start)), count - 1)


def window_count(length: int, window: int) -> int:
    """Number of windows that begin inside the first `length` tokens."""
    return max((length - 1) // window + 1, 1)


def make_view(
    step_map: torch.Tensor,
    *,
    objective: str,
    canvas_length: int,
    window: int,
    window_index: int,
    num_windows: int,
    noise_level: float,
    uniforms: torch.Tensor | None = None,
    next_noise_level: float | None = None,
) -> NoisyView:
    """The views of one window, or of two blocks of its size, from draws that are made already.

    Args:
        step_map (`torch.LongTensor` of shape `(C,)`): See [`decision_ranks`].
        objective (`str`): `"trajectory"` hides what the teacher had not decided, `"random"` each token of the window
            with probability t (t being the noise level), `"certainty"` with probability 1/2.
        canvas_length (`int`): Number of positions that exist, at most C; the last window ends there.
        window (`int`): Length of a window.
        window_index, num_windows (`int`): Which window, of how many. The last one reaches to the canvas' end.
        noise_level (`float`): t, between 0 and 1.
        uniforms (`torch.FloatTensor` of shape `(C,)`, *optional*): What the random objectives compare with.
        next_noise_level (`float`, *optional*): t of the window behind, where there is one; it is hidden and learnt,
            too. At 1 nothing of it is decided: it has just been opened.
    """
    position = torch.arange(len(step_map), device=step_map.device)
    masked, inside = torch.zeros_like(position, dtype=torch.bool), torch.zeros_like(position, dtype=torch.bool)
    distances, end = None, canvas_length
    levels = [noise_level] if next_noise_level is None else [noise_level, next_noise_level]
    for index, level in enumerate(levels[: num_windows - window_index], window_index):
        start = index * window
        end = canvas_length if index == num_windows - 1 else start + window
        block = (position >= start) & (position < end)
        if objective == "trajectory":
            ranks, count = decision_ranks(step_map)
            from_state = ranks - (state_index(level, start, end, count) + 1)
            hidden = from_state > 0
            distances = from_state if distances is None else torch.where(block, from_state, distances)
            if index > window_index and level == 1:
                hidden = torch.ones_like(block)
        elif objective == "random":
            hidden = uniforms < (1 - _EPS) * level + _EPS
        else:
            hidden = uniforms < level
        masked, inside = masked | (block & hidden), inside | block
    return NoisyView(masked, inside & ~masked, (position >= end) & (position < canvas_length), noise_level, distances)


def draw_view(
    step_map: torch.Tensor,
    generator: torch.Generator,
    *,
    objective: str,
    content_length: int,
    canvas_length: int,
    window: int,
    noise_range: tuple[float, float],
    blockwise: bool = True,
    windows_over_fill: bool = False,
    several_blocks: bool = False,
) -> NoisyView:
    """Draw the noise level, the window and, for the random objectives, the mask of one answer.

    Args:
        step_map, objective, canvas_length, window: See [`make_view`].
        generator (`torch.Generator`): The only source of chance, on the CPU.
        content_length (`int`): Length of the answer without its fill; windows begin inside it.
        noise_range (`tuple[float, float]`): The noise level is uniform between these. `"certainty"` ignores it.
        blockwise (`bool`, defaults to `True`): With `False` the whole canvas is one window.
        windows_over_fill (`bool`, defaults to `False`): Let windows begin in the fill as well.
        several_blocks (`bool`, defaults to `False`): Whether the window behind the drawn one is open as well. Its
            noise level is 1 half of the time, and else uniform between the first one's and 1.
    """
    low, high = noise_range
    noise_level = low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64, device="cpu").item()
    num_windows = window_count(canvas_length if windows_over_fill else content_length, window) if blockwise else 1
    window_index = int(torch.randint(num_windows, (), generator=generator, device="cpu"))
    uniforms = None
    if objective != "trajectory":
        uniforms = torch.rand(len(step_map), generator=generator, dtype=torch.float32, device="cpu")
    next_noise_level = None
    if several_blocks:
        fresh, share = torch.rand(2, generator=generator, dtype=torch.float64, device="cpu").tolist()
        next_noise_level = 1.0 if fresh < 0.5 else noise_level + (1 - noise_level) * share
    return make_view(
        step_map,
        objective=objective,
        canvas_length=canvas_length,
        window=window,
        window_index=window_index,
        num_windows=num_windows,
        noise_level=CERTAINTY_NOISE if objective == "certainty" else noise_level,
        uniforms=uniforms,
        next_noise_level=next_noise_level,
    )
