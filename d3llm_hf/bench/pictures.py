"""How the pictures of results files look, and how they become bytes that are the same wherever they are drawn."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def drawing(command: str, width: float, height: float) -> Iterator["Figure"]:
    """Inside, a figure of so many inches can be drawn and [`saved`]; the reader's own matplotlibrc changes nothing.

    Args:
        command: that draws, for the error.

    Raises:
        ImportError: Without matplotlib.
    """
    try:
        import matplotlib.style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"The picture of `{command}` needs matplotlib. Run `pip install 'd3llm-hf[eval]'`."
        ) from error
    hashed = {"svg.hashsalt": "d3llm-hf", "axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    with matplotlib.style.context(["default", hashed]):
        yield Figure(figsize=(width, height), layout="constrained")


def saved(figure: "Figure", kind: str) -> bytes:
    """The figure as `"png"` or `"svg"`, without dates and versions."""
    buffer = io.BytesIO()
    metadata = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    figure.savefig(buffer, format=kind, dpi=200, metadata=metadata, facecolor="white")
    return buffer.getvalue()
