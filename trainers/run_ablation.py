# /// script
# requires-python = ">=3.10"
# dependencies = ["d3llm-hf", "accelerate", "datasets", "peft", "pyyaml"]
# ///
"""What each part of pseudo-trajectory distillation gives: students of several arms and seeds, beside their teacher.

    OMP_NUM_THREADS=1 python trainers/run_ablation.py --config trainers/recipes/ablation_llada_tiny.yaml \
        --output_dir ablation --results d3llm_hf/evaluation/results/ablation.json

Every arm is the base recipe with some arguments of its own; every student is trained by `run_distill.py` and decoded
over a grid of thresholds. What is there is not done again, so the command may be stopped at any moment and started
again; `--part 0/2` and `--part 1/2`, in two processes, share the students out between them.
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any


logger = logging.getLogger(__name__)
TEACHER = "teacher"


@dataclass(frozen=True)
class Plan:
    """What to compare.

    Args:
        recipe: of the students, a YAML file of `run_distill.py`; a path from this plan's folder.
        teacher: checkpoint, decoded with the same grids.
        common: arguments of all students, over the recipe's; a null takes the recipe's away.
        arms: name -> arguments of the arm, over the common ones.
        twin: the arm that others are compared with.
        seeds: of the training.
        one_token: arguments of `generate` for one token a forward.
        decodings: name -> arguments of `generate`.
        thresholds: values of `entropy_threshold`, from careful to bold.
        num_problems, problem_seed: held-out word problems.
        batch_size: prompts that are decoded together.
        slack: points of accuracy that a student may lose against its teacher.
    """

    recipe: str
    teacher: str
    arms: dict[str, dict[str, Any]]
    twin: str
    decodings: dict[str, dict[str, Any]]
    one_token: dict[str, Any]
    thresholds: list[float]
    common: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    num_problems: int = 1000
    problem_seed: int = 4242
    batch_size: int = 25
    slack: float = 1.0

    def __post_init__(self):
        if self.twin not in self.arms:
            raise ValueError(f"`twin` must be one of the arms {list(self.arms)} (got {self.twin!r}). Correct it.")
        if TEACHER in self.arms:
            raise ValueError(f"`arms` must not hold {TEACHER!r}, the name of the teacher's rows. Rename the arm.")

    def students(self) -> Iterator[tuple[str, int]]:
        """`(arm, seed)` of every student, all arms of a seed before the next one."""
        return ((arm, seed) for seed in self.seeds for arm in self.arms)


def read_plan(path: str | Path) -> Plan:
    """The plan of a YAML file.

    Raises:
        ValueError: for an unknown or a missing key.
    """
    import yaml

    path = Path(path)
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    known = {each.name for each in fields(Plan)}
    needed = {"recipe", "teacher", "arms", "twin", "decodings", "one_token", "thresholds"}
    if not isinstance(values, dict) or not needed <= set(values) <= known:
        raise ValueError(
            f"`--config` must map {sorted(needed)}, and at most {sorted(known - needed)} besides (got "
            f"{sorted(values) if isinstance(values, dict) else values!r} in {path}). Correct the file."
        )
    return Plan(**values | {"recipe": str(path.parent / values["recipe"])})


def main(argv: Sequence[str] | None = None) -> None:
    """Train and decode what is missing, and write the summary once everything is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file of the plan")
    parser.add_argument("--output_dir", required=True, help="folder of the students and their points")
    parser.add_argument("--results", help="file of the summary; OUTPUT_DIR/ablation.json if unset")
    parser.add_argument("--part", default="0/1", help="I/N: train and decode every N-th student from the I-th on")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    plan, folder = read_plan(args.config), Path(args.output_dir)
    index, count = read_part(args.part)

    for number, (arm, seed) in enumerate(plan.students()):
        if number % count == index:
            train(plan, arm, seed, student_folder(folder, arm, seed))
            decode(plan, str(student_folder(folder, arm, seed)), points_file(folder, arm, seed))
    if index == 0:
        decode(plan, plan.teacher, points_file(folder, TEACHER, None), one_token=True)
    missing = [name for name in expected_files(plan, folder) if not name.exists()]
    if missing:
        logger.info("%d of the points files are not there yet, %s first: no summary.", len(missing), missing[0])
        return
    results = Path(args.results) if args.results else folder / "ablation.json"
    command = f"python trainers/run_ablation.py --config {_relative(args.config)} --output_dir {folder.name}"
    write_summary(plan, folder, results, command + (f" --results {_relative(args.results)}" if args.results else ""))
    logger.info("The summary is in %s.", results)


def read_part(text: str) -> tuple[int, int]:
    """`I/N` as numbers.

    Raises:
        ValueError: if it is not of that form, or I is not below N.
    """
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(f"`--part` must be I/N with I below N (got {text!r}). Pass 0/2 and 1/2 for two processes.")
    return int(index), int(count)


def student_folder(folder: Path, arm: str, seed: int) -> Path:
    """Where a student is."""
    return folder / f"{'-'.join(arm.replace('+', 'with').replace(',', '').split())}-{seed}"


def points_file(folder: Path, arm: str, seed: int | None) -> Path:
    """Where a model's points are."""
    name = arm if seed is None else student_folder(folder, arm, seed).name
    return folder / f"{name}.jsonl"


def expected_files(plan: Plan, folder: Path) -> list[Path]:
    """All points files of a finished ablation."""
    return [points_file(folder, TEACHER, None), *(points_file(folder, arm, seed) for arm, seed in plan.students())]


def train(plan: Plan, arm: str, seed: int, folder: Path) -> None:
    """Train a student, unless it is there; one that was broken off is resumed from its last checkpoint.

    Its whole recipe stands beside it as `recipe.yaml`.
    """
    import yaml

    from d3llm_hf.files import replace_file
    from trainers.run_distill import main as distill

    if (folder / "model.safetensors").exists():
        return
    recipe = yaml.safe_load(Path(plan.recipe).read_text(encoding="utf-8"))
    given = recipe | plan.common | plan.arms[arm] | {"seed": seed, "output_dir": str(folder)}
    kept = {name: value for name, value in given.items() if value is not None}
    merged = folder / "recipe.yaml"
    replace_file(merged, yaml.safe_dump(kept, allow_unicode=True).encode())
    logger.info("Training %s, seed %d", arm, seed)
    distill(["--config", str(merged), "--resume_from_checkpoint", "last"])


def decode(plan: Plan, checkpoint: str, output: Path, one_token: bool = False) -> None:
    """Measure a model's points that are not in its file yet, with a teacher's at one token a forward."""
    from d3llm_hf.evaluation.sweep.grids import Curve
    from d3llm_hf.evaluation.sweep.sweep import sweep
    from d3llm_hf.evaluation.tasks.load import word_problems
    from trainers.common.loading import load_named

    model, tokenizer = load_named(checkpoint, None, torch_dtype="float32", attn_implementation="eager")
    curves = [
        Curve(label=name, values=plan.thresholds, parameter="entropy_threshold", **_method(settings))
        for name, settings in plan.decodings.items()
    ]
    if one_token:
        curves.append(Curve(label="one token a forward", values=(), **_method(plan.one_token)))
    sweep(
        model.eval(),
        tokenizer,
        word_problems(plan.num_problems, plan.problem_seed),
        curves,
        output,
        label=output.stem,
        batch_size=plan.batch_size,
    )


def _method(settings: dict[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in settings.items() if name != "decoding_method"}
    return {"method": settings["decoding_method"], "settings": rest}


def _relative(path: str) -> str:
    """A path as seen from the working folder, in so far as it lies there: results name no folder of a machine."""
    path = Path(path).resolve()
    return path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else path.name


def write_summary(plan: Plan, folder: Path, results: Path, command: str) -> None:
    """The figures of a finished ablation, with what is needed to repeat them."""
    from dataclasses import asdict

    from d3llm_hf.evaluation.provenance import write_json
    from d3llm_hf.evaluation.sweep.points import read_points
    from trainers.distill.ablation import summarise

    def by_decoding(arm: str, seed: int | None) -> dict[str, list]:
        points = read_points(points_file(folder, arm, seed))
        return {name: [p for p in points if p["method"] == name] for name in [*plan.decodings, "one token a forward"]}

    teacher = by_decoding(TEACHER, None)
    [one_token] = teacher.pop("one token a forward")
    found = {(arm, seed): by_decoding(arm, seed) for arm, seed in plan.students()}
    rows = summarise(
        {arm: {name: [found[arm, seed][name] for seed in plan.seeds] for name in plan.decodings} for arm in plan.arms},
        teacher,
        one_token,
        twin=plan.twin,
        slack=plan.slack,
    )
    content = {
        "schema": 1,
        "suite": "ablation",
        "command": command,
        "plan": asdict(plan) | {"recipe": Path(plan.recipe).name},
        "provenance": one_token["provenance"],
        "one_token": {name: one_token[name] for name in ("accuracy", "accuracy_interval", "tpf", "num_samples")},
        "rows": rows,
    }
    write_json(results, content)


if __name__ == "__main__":
    main()
