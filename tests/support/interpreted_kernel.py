"""Runs the Triton kernel in Triton's interpreter, which has to be chosen before Triton is imported.

    TRITON_INTERPRET=1 python interpreted_kernel.py TRITON_STATISTICS.PY CASES.PT SUMS.PT

The cases are a dictionary of (logits, mask token); the sums one of what `row_sums` gives. The file is loaded by its
path, so that nothing else of the package is imported.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location

import torch


def main(code: str, cases: str, sums: str) -> None:
    spec = spec_from_file_location("triton_statistics", code)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.save({name: module.row_sums(*case) for name, case in torch.load(cases).items()}, sums)


if __name__ == "__main__":
    main(*sys.argv[1:])
