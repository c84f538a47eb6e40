"""Block-causal fine-tuning in two processes: the losses of one, whole copies or shards, and these resumed."""

import json
import sys

import joined_runs
import pytest
import torch
from datasets import Dataset
from distillation import ARGUMENTS
from official import write_official
from places import REPOSITORY
from safetensors.torch import load_file


FSDP = REPOSITORY / "trainers" / "accelerate_configs" / "fsdp.yaml"


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Everything is hidden, for each process draws masks of its own, and every text has two blocks to learn."""
    folder = tmp_path_factory.mktemp("joined")
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(5, 20, (16, 12), generator=generator).tolist()
    rows = [{"prompt_ids": text[:4], "response_ids": text[4:]} for text in texts]
    Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
    shared = {name: value for name, value in ARGUMENTS.items() if name != "window_sizes"}
    shared |= {"model_name_or_path": write_official("sdar", folder / "sdar"), "dataset_name": folder / "rows.parquet"}
    shared |= {"min_mask_ratio": 1.0, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}

    def run(name, processes, **more):
        values = shared | {"per_device_train_batch_size": 4 // processes, "output_dir": folder / name}
        resumed = {"resume_from_checkpoint": folder / "sharded" / "checkpoint-2"} if name == "resumed" else {}
        arguments = [part for key, value in (values | resumed).items() for part in (f"--{key}", str(value))]
        return {
            "script": "sft",
            "processes": processes,
            "arguments": arguments,
            "told": str(folder / f"{name}.json"),
            **more,
        }

    sharding = {"environment": joined_runs.environment_of(FSDP) | {"ACCELERATE_MIXED_PRECISION": "no"}}
    runs = [run("one", 1), run("two", 2), run("sharded", 2, **sharding), run("resumed", 2, **sharding)]
    joined_runs.run_in_process(runs)
    names = ("one", "two", "sharded", "resumed")
    return {name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in names} | {
        "weights": {name: load_file(folder / name / "model.safetensors") for name in names}
    }


@pytest.mark.full  # of one launch of four runs
@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_two_processes_have_the_losses_of_one_and_shards_resume_to_the_same_weights(told):
    losses = {name: [entry["loss"] for entry in told[name]["log"] if "loss" in entry] for name in told["weights"]}
    assert len(losses["one"]) == 4
    for name in ("two", "sharded"):
        assert told[name]["processes"] == 2 and losses[name] == pytest.approx(losses["one"], rel=1e-4)
    assert told["sharded"]["sharded"] and losses["resumed"] == losses["sharded"]
    whole, resumed = told["weights"]["sharded"], told["weights"]["resumed"]
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
