"""What all tests of the trainers share."""

import pytest
from torch.utils.data import _utils


@pytest.fixture(autouse=True)
def loaders_end_at_once(monkeypatch):
    """A loader that is collected waits five seconds for each of its workers, which look for their end as seldom."""
    for module in (_utils, _utils.worker):
        monkeypatch.setattr(module, "MP_STATUS_CHECK_INTERVAL", 0.2, raising=False)
