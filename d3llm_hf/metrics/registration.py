"""Makes `evaluate.load("aup")` find the metric from every working directory, without a network.

`evaluate` has no entry points. It looks for a metric in the working directory, then on the Hub, then among the modules
that it keeps of earlier loads from the Hub, in

    $HF_MODULES_CACHE/evaluate_modules/metrics/evaluate-metric--aup/<64 hex digits>/aup.py

So the metric's two modules are copied there, into a folder of their own. This is written without importing `evaluate`,
since it happens whenever the package is imported; if the copies are there already it costs the reading of four files.
"""

import importlib.util
import os


OPT_OUT = "D3LLM_HF_NO_METRIC"
METRIC_FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "aup")
FILES = ("curve.py", "aup.py")  # in this order: what is imported is there before what imports it
# Any 64 characters do. One name for all versions, since `evaluate` takes the newest of several folders, and which
# version is installed says more than which was written last. It is the sha256 of "d3llm_hf".
SLOT_NAME = "7fd6708137452144cf35a047d606e3995aff778051cd912e57e0d87c6584d483"


def register_metric() -> None:
    """Copies the metric to where `evaluate` looks, unless it is there, cannot be written or is not wanted.

    Never raises: a package must be importable where the home is read-only. Does nothing where `evaluate` is not
    installed, or where the environment variable `D3LLM_HF_NO_METRIC` is set to anything but 0.
    """
    if os.environ.get(OPT_OUT, "0") not in ("", "0"):
        return
    try:
        if not is_installed() and importlib.util.find_spec("evaluate") is not None:
            install_metric()
    except (OSError, ImportError, ValueError):  # the last two: from an `evaluate` that is broken or half imported
        return


def slot() -> str:
    """The folder of the copies. Follows `HF_MODULES_CACHE`, `HF_HOME` and `XDG_CACHE_HOME` as `evaluate` does."""
    home = os.environ.get("HF_HOME", os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
    modules = os.environ.get("HF_MODULES_CACHE", os.path.join(os.path.expanduser(home), "modules"))
    return os.path.join(modules, "evaluate_modules", "metrics", "evaluate-metric--aup", SLOT_NAME)


def is_installed() -> bool:
    """Whether the copies are there and those of this version.

    Raises:
        OSError: when they cannot be read though they exist.
    """
    try:
        return all(_read(os.path.join(slot(), name)) == _read(os.path.join(METRIC_FOLDER, name)) for name in FILES)
    except (FileNotFoundError, NotADirectoryError):
        return False


def install_metric() -> str:
    """Copies the metric to where `evaluate` looks, and returns that folder. Several processes may do so at once.

    Raises:
        OSError: when it cannot be written.
    """
    folder = slot()
    os.makedirs(folder, exist_ok=True)
    package = folder
    for _ in range(5):  # up to and with the modules folder itself, as `evaluate` has it
        if not os.path.exists(os.path.join(package, "__init__.py")):
            _write(os.path.join(package, "__init__.py"), b"")
        package = os.path.dirname(package)
    for name in FILES:
        _write(os.path.join(folder, name), _read(os.path.join(METRIC_FOLDER, name)))
    return folder


def uninstall_metric() -> bool:
    """Removes the copies, and what `evaluate` keeps with them; returns whether there were any.

    Raises:
        OSError: when they cannot be removed.
    """
    import shutil

    if not os.path.isdir(slot()):
        return False
    shutil.rmtree(slot())
    return True


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _write(path: str, content: bytes) -> None:
    """Whole or not at all: a process that reads at this moment finds the old file or the new one."""
    temporary = f"{path}.{os.urandom(8).hex()}.tmp"
    try:
        with open(temporary, "xb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
