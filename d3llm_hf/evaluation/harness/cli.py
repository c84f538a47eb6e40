"""The `d3llm-eval` command: lm-eval's own, with our models registered, and recipes of published evaluations.

    d3llm-eval --pretrained d3llm-llada --tasks word_problems --apply_chat_template --limit 50
    d3llm-eval --recipe gsm8k_cot --pretrained d3LLM/d3LLM_LLaDA --stats outputs/gsm8k_cot.jsonl --batch_size 8
    d3llm-eval --recipe gsm8k_cot --settings d3llm-dream --show
    d3llm-eval --model d3llm-ar --pretrained gpt2 --tasks gsm8k --model_args decoding_method=ar_prompt_lookup
    accelerate launch -m d3llm_hf.evaluation.harness.cli --recipe gsm8k_cot --settings d3llm-llada

All other arguments are lm-eval's: `d3llm-eval run --help` lists them, `d3llm-eval ls tasks` the tasks.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace

from .recipe_plans import Plan, plan, read_recipe, recipe_names


SUBCOMMANDS = ("ls", "validate")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs lm-eval with the arguments of a recipe and the user's own; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and (words[0] in SUBCOMMANDS or words[:2] in (["run", "--help"], ["run", "-h"])):
        return _run_lm_eval(words)
    parser = _parser()
    if not words:
        parser.print_help()
        return 0
    args, others = parser.parse_known_args(words[1:] if words[0] == "run" else words)
    try:
        chosen = _chosen(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if args.show:
        sys.stdout.write(chosen.command(others) + "\n")
        return 0
    try:
        return _run_lm_eval(chosen.arguments(others))
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("LMEVAL_LOG_LEVEL", "").upper() == "DEBUG":
            raise
        hint = ". `d3llm-eval ls tasks` lists those there are." if "Tasks not found" in str(error) else ""
        parser.error(f"{' '.join(str(error).split())}{hint} (LMEVAL_LOG_LEVEL=DEBUG shows where.)")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="d3llm-eval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", metavar="NAME", help=f"one of {', '.join(recipe_names())}, or a YAML file")
    parser.add_argument("--settings", metavar="MODEL", help="whose settings of the recipe (default: the checkpoint's)")
    parser.add_argument("--cached", action="store_true", help="with the cache of the published speeds")
    parser.add_argument("--pretrained", metavar="CHECKPOINT", help="folder, Hub id, or name of an embedded checkpoint")
    parser.add_argument("--stats", metavar="FILE", help="write a JSON line about each generated answer")
    parser.add_argument("--show", action="store_true", help="print lm-eval's command line and do nothing")
    return parser


def _chosen(args: argparse.Namespace) -> Plan:
    if args.recipe is None:
        for name in ("settings", "cached"):
            if getattr(args, name):
                raise ValueError(f"`--{name}` belongs to a recipe (got it without `--recipe`). Name one.")
        chosen = Plan(model_args={} if args.pretrained is None else {"pretrained": args.pretrained})
    else:
        recipe = read_recipe(args.recipe)
        chosen = plan(recipe, pretrained=args.pretrained, settings=args.settings, cached=args.cached)
    if args.stats is not None:
        chosen = replace(chosen, model_args=chosen.model_args | {"stats_path": args.stats})
    return chosen


def _run_lm_eval(words: list[str]) -> int:
    """lm-eval's command reads `sys.argv`."""
    from lm_eval.__main__ import cli_evaluate

    from . import causal, model  # noqa: F401  (they register the models)

    before = sys.argv
    sys.argv = ["d3llm-eval", *words]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
