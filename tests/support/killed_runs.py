"""Training runs that are killed, as by a lost machine, and resumed until they end.

[`kill_and_resume`] is meant for a process of its own: it imports everything once and forks a child for each run, which
needs that nothing here has trained before (torch refuses to train in a fork of a process that has).
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import torch
from distillation import make_trainer, trajectories
from official import tiny_tokenizer
from safetensors.torch import load_file

from trainers.common import canvas_trainer
from trainers.common.whole_checkpoints import check_checkpoint, last_whole_checkpoint


STEPS = 12
SETTINGS = {
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 1,  # a kill while the only older one goes must leave the new one
    "gradient_accumulation_steps": 2,
    "sft_weight": 0.1,
}
# Owner, name and calls of what a checkpoint is written with: model, the four files of the Trainer, list and rotation.
MOMENTS = {
    "weights": (torch.nn.Module, "state_dict", STEPS),
    "states": (torch, "save", 2 * STEPS),
    "list begun": (canvas_trainer, "begin_checkpoint", STEPS // 2),
    "list": (canvas_trainer, "finish_checkpoint", STEPS // 2),
    "list moved": (os, "replace", STEPS),
    "disk": (os, "fsync", 10 * STEPS),
    "rotation": (shutil, "rmtree", STEPS // 2 - 1),
}


def killing(function, call: int):
    """Kills its own process, as a lost machine would, at the n-th call of a function."""
    calls = iter(range(1, call + 1))

    def replacement(*args, **kwargs):
        if next(calls, None) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return replacement


def _run(folder: Path, moment: tuple[str, int] | None) -> None:
    torch.set_num_threads(1)
    if moment is not None:
        owner, name, _ = MOMENTS[moment[0]]
        setattr(owner, name, killing(getattr(owner, name), moment[1]))
    trainer = make_trainer(folder, tiny_tokenizer(), dataset=trajectories(20), **SETTINGS)
    trainer.train(resume_from_checkpoint="last")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trainer.save_model(folder / "final")
    (folder / "losses.json").write_text(json.dumps(losses), encoding="utf-8")


def _start(folder: Path, moment: tuple[str, int] | None = None):
    child = multiprocessing.get_context("fork").Process(target=_run, args=(folder, moment))
    child.start()
    return child


def kill_and_resume(folder: Path, moments: list[tuple[str, int]] | int, results: Path) -> None:
    """Kills runs at the given moments, or at so many random ones, and writes what came of it to a JSON file.

    A run that is killed is resumed and killed again, until it ends; then another one is started. `results` has the
    number of `kills`, of runs that `finished`, of those whose weights and losses `equal` the unbroken one's, the
    `failed` exit codes, the steps `resumed` from and the `seconds`.
    """
    begun = time.monotonic()
    unbroken = folder / "unbroken"
    child = _start(unbroken)
    child.join()
    length = time.monotonic() - begun
    draw = random.Random(0)
    if isinstance(moments, int):
        wanted = [_drawn(draw, length) if index % 2 else draw.uniform(0, length) for index in range(moments)]
    else:
        wanted = list(moments)
    found = {
        "kills": 0,
        "finished": 0,
        "equal": 0,
        "failed": [child.exitcode] if child.exitcode else [],
        "resumed": [],
    }
    runs = 0
    run = folder / "0"
    while True:
        moment = wanted.pop(0) if wanted else None
        child = _start(run, moment if isinstance(moment, tuple) else None)
        child.join(moment if isinstance(moment, float) else None)
        if child.is_alive():
            child.kill()
            child.join()
        if child.exitcode == 0:
            found["finished"] += 1
            found["equal"] += _same(run, unbroken)
            runs += 1
            run = folder / str(runs)
            if moment is None:
                break
            wanted.append(moment / 2 if isinstance(moment, float) else moment)  # it came too late
        elif child.exitcode == -signal.SIGKILL:
            found["kills"] += 1
            whole = last_whole_checkpoint(run)
            found["resumed"].append(0 if whole is None else int(whole.rpartition("-")[2]))
        else:
            found["failed"].append(child.exitcode)
            break
    found["seconds"] = round(time.monotonic() - begun, 1)
    results.write_text(json.dumps(found), encoding="utf-8")


def _drawn(draw: random.Random, length: float) -> tuple[str, int]:
    name = draw.choice(sorted(MOMENTS))
    return name, draw.randint(1, MOMENTS[name][2])


def _same(run: Path, unbroken: Path) -> bool:
    (left,) = run.glob("checkpoint-*")
    check_checkpoint(left)
    weights, expected = (load_file(folder / "final" / "model.safetensors") for folder in (run, unbroken))
    losses, expected_losses = ((folder / "losses.json").read_text(encoding="utf-8") for folder in (run, unbroken))
    same = weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in weights)
    return same and losses == expected_losses
