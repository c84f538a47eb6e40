"""`d3llm sweep`: tokens per forward against accuracy, for models, methods and thresholds, into one results file."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import check_writable, without_folders
from ..hub.loading import decodes_by_diffusion, load, load_causal, load_draft_head
from ..locks import only_writer
from .common import new_parser, tell
from .generate import name_and_value, value_of


if TYPE_CHECKING:
    from ..evaluation.sweep.grids import Curve


def add_parser(subparsers) -> None:
    parser = new_parser(subparsers, "sweep", run, "Measure accuracy against tokens per forward, resumably")
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="a checkpoint folder, an id on the Hub, or the name of an embedded checkpoint; LABEL=MODEL names it",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="results file, JSON lines; made or added to")
    group = parser.add_argument_group("grid", "A curve is a method whose natural parameter goes through some values.")
    group.add_argument(
        "--methods",
        nargs="+",
        default=["d3llm"],
        metavar="METHOD",
        help="decoding methods (d3llm; ar, ar_prompt_lookup, ... of causal models); LABEL=METHOD:NAME=VALUE,... names "
        "the curve and gives it settings of its own",
    )
    group.add_argument("--thresholds", nargs="+", type=float, metavar="X", help="of methods with a threshold or bound")
    group.add_argument(
        "--grid", action="append", default=[], metavar="NAME=X,Y", help="values of a setting; may be repeated"
    )
    group.add_argument("--no-grid", action="store_true", help="one point a method, with its settings alone")
    group.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="setting of all methods; may be repeated"
    )
    group = parser.add_argument_group("task")
    group.add_argument("--task", nargs="+", default=["word_problems"], help="word_problems, gsm8k, or lm-eval's names")
    group.add_argument("--num-samples", type=int, metavar="N", help="prompts (300 word problems, or all)")
    group.add_argument("--seed", type=int, default=4242, help="of the prompts and of what is drawn (%(default)s)")
    group.add_argument("--data", type=Path, metavar="FILE", help="of gsm8k: JSON lines or Parquet in the Hub's format")
    group.add_argument(
        "--chat", action=argparse.BooleanOptionalAction, help="use the chat template (where there is one)"
    )
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="length of an answer (the task's own)")
    group.add_argument("--include-path", type=Path, metavar="FOLDER", help="further tasks of lm-eval")
    group.add_argument("--num-fewshot", type=int, metavar="N", help="examples before the question (lm-eval)")
    group.add_argument("--metric", help="score that says what is right, 0 or 1 (lm-eval; its first)")
    group.add_argument("--filter", dest="filter_name", help="filter of the answer (lm-eval; its first)")
    group.add_argument(
        "--confirm-run-unsafe-code", action="store_true", help="run what the model writes, on this machine (lm-eval)"
    )
    group = parser.add_argument_group("model")
    group.add_argument(
        "--batch-size", type=int, default=25, metavar="N", help="prompts decoded together (%(default)s)"
    )
    group.add_argument("--device", default="auto", help="cpu, cuda, ... (default: cuda where there is one)")
    group.add_argument("--dtype", default="auto", help="float32, bfloat16, ... (default: the checkpoint's)")
    group.add_argument(
        "--assistant", metavar="MODEL", help="causal checkpoint that drafts with the method ar_assistant"
    )
    group.add_argument("--draft-head", metavar="HEAD", help="folder or id of the head that drafts with eagle3")
    group.add_argument("--gguf-file", metavar="NAME", help="GGUF file in the folders of causal models (needs gguf)")
    group.add_argument("--revision", help="branch, tag or commit of models on the Hub")
    parser.set_defaults(default_of=parser.get_default)


def run(args: argparse.Namespace) -> None:
    models = _models(args.models)
    check_writable(args.output, "--output")
    with only_writer(args.output, "--output"):  # also between models, which take turns in the file
        _sweep(args, models)


def _sweep(args: argparse.Namespace, models: dict[str, str]) -> None:
    from ..autoregressive.methods import AR_METHODS, check_drafters_used
    from ..evaluation.sweep.grids import curves_of
    from ..evaluation.sweep.sweep import check_settings, describe, sweep
    from ..evaluation.tasks.load import load_tasks

    curves = curves_of(
        [method_and_settings(text) for text in args.methods],
        settings=dict(name_and_value("--set", text) for text in args.set),
        thresholds=args.thresholds,
        grids=_grids(args.grid),
        no_grid=args.no_grid,
    )
    harness = ("include_path", "num_fewshot", "metric", "filter_name", "confirm_run_unsafe_code")
    tasks = [
        task
        for name in args.task
        for task in load_tasks(
            name,
            num_samples=args.num_samples,
            seed=args.seed,
            data=args.data if name == "gsm8k" else None,
            **({} if name in ("word_problems", "gsm8k") else {option: getattr(args, option) for option in harness}),
        )
    ]
    for task in tasks:  # before a model is loaded; with the checkpoint's own settings it is checked again
        length = task.max_new_tokens if args.max_new_tokens is None else args.max_new_tokens
        for curve in curves:
            for parameter, value, settings in curve.points(length):
                check_settings(settings, length, what=describe(curve.name, parameter, value))
    chosen = _curves_of_models(models, curves, args.revision, args.gguf_file)
    where = {"device": args.device, "dtype": args.dtype}
    if args.gguf_file is not None and not any(curve.method in AR_METHODS for curve in curves):
        raise ValueError(
            f"`--gguf-file` is of causal models (got {args.gguf_file!r} with {[curve.name for curve in curves]}). "
            "Leave it out, or name a method of theirs."
        )
    drafters = {"assistant": args.assistant, "draft_head": args.draft_head}
    check_drafters_used(drafters, [curve.method for curve in curves], dashes="--")
    assistant = None if args.assistant is None else load_causal(args.assistant, **where)
    for label, source in models.items():
        own = chosen[label]
        causal = own[0].method in AR_METHODS  # so are the others
        head = load_draft_head(args.draft_head) if causal and args.draft_head is not None else None
        more = where | {"revision": args.revision}
        model, tokenizer = load_causal(source, gguf_file=args.gguf_file, **more) if causal else load(source, **more)
        head = None if head is None else head.to(model.device, model.dtype)
        for task in tasks:
            points = sweep(
                model,
                tokenizer,
                task,
                own,
                args.output,
                label=label,
                max_new_tokens=args.max_new_tokens,
                batch_size=args.batch_size,
                chat=args.chat,
                revision=args.revision,
                assistant=assistant if causal else None,
                draft_head=head,
                command=_command(args),
            )
            for point in points:
                tell(summary(point))


# Options in the order of the help; what is as by default is no part of the command.
_OPTIONS = (
    "methods", "thresholds", "grid", "no_grid", "set", "task", "num_samples", "seed", "data", "chat", "max_new_tokens",
    "include_path", "num_fewshot", "metric", "filter_name", "confirm_run_unsafe_code", "batch_size", "device", "dtype",
    "assistant", "draft_head", "gguf_file", "revision", "output",
)  # fmt: skip
_REPEATED = ("grid", "set")


def _command(args: argparse.Namespace) -> str:
    """The command that repeats a sweep, without folders of this machine."""
    words = ["d3llm", "sweep", *map(_named, args.models)]
    for name in _OPTIONS:
        value = getattr(args, name)
        flag = "--filter" if name == "filter_name" else f"--{name.replace('_', '-')}"
        if value == args.default_of(name):
            continue
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif name in _REPEATED:
            words += [word for each in value for word in (flag, each)]
        else:
            words += [flag, *(_named(str(each)) for each in (value if isinstance(value, list) else [value]))]
    return shlex.join(words)


def _named(text: str) -> str:
    """A path from the root of a machine is known by its name alone."""
    label, mark, source = text.rpartition("=") if not Path(text).is_absolute() else ("", "", text)
    return label + mark + without_folders(source)


def _curves_of_models(
    models: dict[str, str], curves: Sequence["Curve"], revision: str | None, gguf_file: str | None
) -> dict[str, Sequence["Curve"]]:
    """Label -> the curves of its kind: where methods of both kinds are named, a model's config says which are its.

    Raises:
        ValueError: where a model has no method of its kind, or the methods of a kind have no model.
    """
    from ..autoregressive.methods import AR_METHODS

    kinds = {kind: [curve for curve in curves if (curve.method not in AR_METHODS) == kind] for kind in (True, False)}
    if not all(kinds.values()):
        return dict.fromkeys(models, curves)  # loading refuses a model of the other kind
    found = {
        label: not _is_gguf(source, gguf_file) and decodes_by_diffusion(source, revision=revision)
        for label, source in models.items()
    }
    for kind, named in kinds.items():
        if kind not in found.values():
            raise ValueError(
                f"`--methods` must fit the models (got {[curve.name for curve in named]} for "
                f"{'diffusion' if kind else 'causal'} models, and there is none among {list(models)}). Add one, or "
                "leave them out."
            )
    return {label: kinds[kind] for label, kind in found.items()}


def _is_gguf(source: str, gguf_file: str | None) -> bool:
    return gguf_file is not None and (Path(source) / gguf_file).is_file()


def summary(point: dict[str, Any]) -> str:
    """One line about a point: tokens per forward and accuracy with their intervals, and tokens per second."""
    from ..evaluation.sweep.sweep import describe

    name = describe(point["model"], point["task"], point["method"], point["parameter"], point["value"])
    (fewest, most), (low, high) = point["tpf_interval"], point["accuracy_interval"]
    drafts, drafted = point.get("draft_forwards_per_token"), point.get("draft_positions_per_token", 0)
    return (
        f"{name}: {point['tpf']:.2f} tokens per forward ({fewest:.2f} to {most:.2f}), {point['accuracy']:.1f} % "
        f"({low:.1f} to {high:.1f}), {point['tokens_per_second']:.0f} tokens/s"
        + (f", {drafts:.2f} draft forwards and {drafted:.1f} draft positions per token" if drafts else "")
    )


def _models(texts: list[str]) -> dict[str, str]:
    """Label -> folder, id or name. A path that exists is no label, whatever signs it has."""
    models: dict[str, str] = {}
    for text in texts:
        label, mark, source = text.partition("=")
        if not mark or Path(text).exists():
            label = source = text
        if not label or not source or label in models:
            raise ValueError(f"`models` must have different labels (got {texts}). Write LABEL=MODEL.")
        models[label] = source
    return models


def method_and_settings(text: str) -> tuple[str, str, dict[str, Any]]:
    """`[LABEL=]METHOD[:NAME=VALUE,...]` as label, method and settings."""
    head, _, tail = text.partition(":")
    label, mark, method = head.partition("=")
    own = dict(name_and_value("--methods", pair) for pair in tail.split(",")) if tail else {}
    return (label, method, own) if mark else (head, head, own)


def _grids(texts: list[str]) -> dict[str, list[Any]]:
    grids: dict[str, list[Any]] = {}
    for text in texts:
        name, mark, values = text.partition("=")
        name = name.replace("-", "_")
        if not mark or not values or name in grids:
            raise ValueError(f"`--grid` must be NAME=X,Y,..., each name once (got {text!r}).")
        grids[name] = [value_of("--grid", name, value) for value in values.split(",")]
    return grids
