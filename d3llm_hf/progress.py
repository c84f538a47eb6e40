"""Progress bars for whatever may take longer than two seconds."""

import sys

from tqdm.auto import tqdm


SECONDS = 2.0
"""Work that is over by then shows no bar."""


def progress_bar(total: int | None, unit: str, label: str, *, shown: bool | None = None, **more) -> tqdm:
    """A bar on stderr, once the work has gone on for [`SECONDS`].

    Args:
        total (`int`, *optional*): of the units; where it is not known, what is done is shown.
        unit (`str`): what is counted.
        label (`str`): stands before the bar.
        shown (`bool`, *optional*): show it from the start, or never; if stderr is a terminal when unset.
        more: of tqdm.
    """
    hidden = None if shown is None else not shown  # None: tqdm looks for a terminal
    options = {"total": total, "unit": unit, "desc": label, "disable": hidden, "delay": 0 if shown else SECONDS}
    return tqdm(**options | more)


class DecidedTokens:
    """A streamer for `generate` with one row: a bar of the tokens that are decided, which `end` removes.

    Args:
        length (`int`, *optional*): of the canvas, in tokens.
        mask_token_id (`int`): marks undecided positions.
        more: of [`progress_bar`].
    """

    def __init__(self, length: int | None, mask_token_id: int | None, **more):
        self.mask_token_id = mask_token_id
        self.final: int | None = None  # decided tokens that no undecided one precedes; None before the prompt
        self.bar = progress_bar(length, "token", "decided", leave=False, **more)

    def put(self, value) -> None:
        """Takes decided tokens; the first call brings the prompt, which does not count."""
        self.final = 0 if self.final is None else self.final + value.numel()
        self._show(self.final)

    def put_draft(self, value, **kwargs) -> None:
        """Takes the tokens of the canvas behind the decided prefix."""
        self._show((self.final or 0) + int((value != self.mask_token_id).sum()))

    def end(self) -> None:
        """Removes the bar."""
        self.bar.close()

    def _show(self, decided: int) -> None:
        self.bar.update(max(0, decided - self.bar.n))


def quiet_loading() -> None:
    """Bars of transformers and the Hub on terminals alone, those of transformers for what takes its time."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
        return
    logging.set_tqdm_hook(lambda make, args, kwargs: make(*args, **{"delay": SECONDS, "leave": False} | kwargs))
