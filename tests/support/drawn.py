"""Examples that hypothesis draws: an eighth of them by default, all under its profile `full`.

python -m pytest -m drawn --hypothesis-profile=full
"""

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, settings


WHOLE = 800  # `max_examples` of the profile `full`; hypothesis' own default is 100
settings.register_profile("full", max_examples=WHOLE)


def examples(count: int) -> Callable:
    """The same examples in every run, so that near-ties cannot make a test fail now and then.

    Args:
        count: of examples, all of them.
    """
    share = max(10, count * settings().max_examples // WHOLE)
    drawn = settings(
        max_examples=min(count, share),
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    return lambda function: pytest.mark.drawn(drawn(function))
