"""Each test that takes `family` runs for LLaDA and for Dream."""

import pytest
from families import DREAM, LLADA


@pytest.fixture(params=[LLADA, DREAM], ids=lambda family: family.name)
def family(request):
    return request.param


@pytest.fixture
def tiny(family):
    """A random model of the family; a fresh one for each test."""
    return family.tiny()


@pytest.fixture(scope="session", params=["eager", "sdpa"])
def backend(request) -> str:
    """The attention implementations that run on every machine."""
    return request.param
