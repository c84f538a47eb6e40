"""Another base seed for everything that a test draws, so that no truth hangs on one draw: see `portability.py`.

`D3LLM_TEST_SEED=N python -m pytest` adds N to every seed that torch gets, whoever sets it, and to those that the tests
themselves give `random` and numpy; what is never seeded starts from N. The package's own seeds of `random` and numpy
stay, since they name data: the word problems of a results file.
"""

import os
import random
import sys
from pathlib import Path

import numpy as np
import torch


VARIABLE = "D3LLM_TEST_SEED"
_TESTS = str(Path(__file__).parents[1])


def of_a_recording(seed: int) -> int:
    """A seed that names recorded draws: whatever base is added to it, the draws are those of the recording."""
    return seed - int(os.environ.get(VARIABLE) or 0)


def shift(base: int) -> None:
    """Adds `base` to seeds from now on."""
    _shift_hypothesis(base)
    _shift_torch(base)
    _shift_random_and_numpy(base)
    torch.manual_seed(0)


def _shift_hypothesis(base: int) -> None:
    try:
        import hypothesis.core
    except ImportError:
        return
    hypothesis.settings.register_profile("shifted", derandomize=False)  # else names of tests are the seeds
    hypothesis.settings.load_profile("shifted")
    hypothesis.core.global_force_seed = base


def _shift_torch(base: int) -> None:
    seed_all = torch.manual_seed

    def manual_seed(seed):
        return seed_all(int(seed) + base)

    class Generator(torch.Generator):
        def manual_seed(self, seed):
            return super().manual_seed(int(seed) + base)

    torch.manual_seed = torch.random.manual_seed = manual_seed
    torch.Generator = Generator


def _shift_random_and_numpy(base: int) -> None:
    default_rng = np.random.default_rng

    def shifted(seed, caller):
        by_a_test = caller.f_code.co_filename.startswith(_TESTS)
        return seed + base if by_a_test and isinstance(seed, int) else seed

    class Random(random.Random):
        def __init__(self, seed=None):
            super().__init__(shifted(seed, sys._getframe(1)))

    random.Random = Random
    np.random.default_rng = lambda seed=None: default_rng(shifted(seed, sys._getframe(1)))
    random.seed(base)
    np.random.seed(base % 2**32)
