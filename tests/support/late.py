"""Modules that take seconds to import, for the tests of one file: every worker collects all files."""

import importlib
from typing import Any


class Late:
    """A module that is imported when something of it is first asked for."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)
