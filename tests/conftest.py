"""Shared fixtures: no test reads from the network, and tiny checkpoint folders in the official format."""

import gc
import os
from pathlib import Path


if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["D3LLM_HF_NO_METRIC"] = "1"  # importing the package writes nothing into the home of who runs the tests

import drawn  # noqa: F401 (registers the profile `full`)
import pytest
from thin import thin_out


if os.environ.get("D3LLM_TEST_SEED"):
    import base_seed

    base_seed.shift(int(os.environ["D3LLM_TEST_SEED"]))


@pytest.hookimpl(tryfirst=True)  # before the markers are selected
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    thin_out(items)


def pytest_collection_finish() -> None:
    """What is there by now stays: looking through millions of objects took longest in each collection of garbage."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session")
def official(tmp_path_factory) -> dict[str, Path]:
    """A tiny checkpoint of each family as it is published, with a tokenizer: `{"llada": folder, "Dream": folder}`."""
    from official import write_official

    root = tmp_path_factory.mktemp("official")
    return {model_type: write_official(model_type, root / model_type) for model_type in ("llada", "Dream")}


@pytest.fixture(scope="session")
def exported(official, tmp_path_factory) -> dict[str, Path]:
    """The same checkpoints as `export_checkpoint` writes them."""
    from d3llm_hf import export_checkpoint

    root = tmp_path_factory.mktemp("exported")
    return {family: export_checkpoint(folder, root / f"tiny-{family.lower()}") for family, folder in official.items()}
