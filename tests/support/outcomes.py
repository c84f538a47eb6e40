"""What a command answers when it is called in this process."""

from collections.abc import Callable
from typing import Any

import pytest


def outcome_of(main: Callable, capsys: pytest.CaptureFixture, *words: Any) -> tuple[Any, str, str]:
    """Exit code, stdout and stderr of a command with these words."""
    try:
        code = main([str(word) for word in words])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err
