"""For tests of the vLLM plugin on a CPU: lets vLLM use its second model runner, which asks for a Triton for CPUs.

No registry has one. On the path of a vLLM process this makes Triton list a CPU among its backends, and run kernels in
its interpreter. Nothing but those tests may have it on the path.
"""

import importlib.abc
import importlib.util
import os
import sys
from types import SimpleNamespace


os.environ["TRITON_INTERPRET"] = "1"


class _WithACpu(importlib.abc.MetaPathFinder):
    """Adds a backend to `triton.backends` once that has loaded."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "triton.backends":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            module.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _WithACpu())
