"""Runs transformers' own common model tests (`ModelTesterMixin`, `ConfigTester`) on the model families.

    python tests/common/run_common_tests.py                  # or: make common-tests
    python tests/common/run_common_tests.py -k resize        # further arguments go to pytest
    python tests/common/run_common_tests.py --sdist transformers-5.23.0.tar.gz

Those tests are not part of transformers' wheel, and they change with every release. So the source distribution of the
very version that is installed is fetched with pip (needs network, and `setuptools` in the environment, since pip asks
the distribution for its name) or taken from `--sdist`, its `tests/` are unpacked into a temporary folder, what the
distribution lacks is stubbed there, and [`family_cases.py`](family_cases.py) is put beside them. Nothing of it stays.

Passes when no test fails. Each skipped test is listed with its reason; they concern other backends (CUDA, DeepSpeed,
kernels), other modalities, and ways to decode that masked diffusion does not have.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path


HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]

# What the test files import and the source distribution does not hold. `generate` has its own tests in this package:
# transformers' mixin for it checks beams, assisted decoding and the cache shapes of autoregressive models.
COMMON_KEYS = {
    "architectures": ["SomeModel"],
    "chunk_size_feed_forward": 5,
    "dtype": "float16",
    "id2label": {0: "a", 1: "b", 2: "c"},
    "label2id": {"a": 0, "b": 1, "c": 2},
    "is_encoder_decoder": False,  # another one is refused
    "output_hidden_states": True,
    "problem_type": "regression",
}
STUBS = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": f"config_common_kwargs = {COMMON_KEYS!r}\n",
}
SETTINGS = "[pytest]\nfilterwarnings = ignore::pytest.PytestUnknownMarkWarning\n"


def fetch_sdist(release: str, folder: Path) -> Path:
    """The source distribution of a transformers release, from the package index that pip is set up for."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*pip, "--no-build-isolation", "--dest", str(folder), f"transformers=={release}"], check=True)
    return next(folder.glob("transformers-*.tar.gz"))


def unpack_tests(sdist: Path, folder: Path) -> Path:
    """Unpacks the distribution's `tests/`, adds the stubs and our cases, and returns the folder that holds them."""
    with tarfile.open(sdist) as archive:
        members = [member for member in archive.getmembers() if Path(member.name).parts[1:2] == ("tests",)]
        archive.extractall(folder, members=members, filter="data")
    root = folder / Path(members[0].name).parts[0]
    for name, text in STUBS.items():
        stub = root / "tests" / name
        stub.parent.mkdir(exist_ok=True)
        if not stub.exists():
            stub.write_text(text, encoding="utf-8")
    cases = root / "tests" / "models" / "test_families.py"
    cases.parent.mkdir(exist_ok=True)
    cases.write_bytes((HERE / "family_cases.py").read_bytes())
    for package in (root / "tests", *(path for path in (root / "tests").iterdir() if path.is_dir())):
        (package / "__init__.py").touch()
    (root / "pytest.ini").write_text(SETTINGS, encoding="utf-8")
    return root


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sdist", type=Path, help="an already downloaded transformers-<version>.tar.gz")
    arguments, pytest_arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        sdist = arguments.sdist or fetch_sdist(version("transformers"), Path(folder))
        root = unpack_tests(sdist, Path(folder))
        paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-rs",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/models/test_families.py",
        ]
        return subprocess.run([*command, *pytest_arguments], cwd=root, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
