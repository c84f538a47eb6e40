"""The `d3llm` command. Each subcommand is a module of `d3llm_hf.commands`; heavy imports happen when one runs."""

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from . import __version__
from .commands import (
    bench,
    chat,
    demo,
    env,
    export,
    generate,
    init,
    leaderboard,
    metric,
    push,
    serve,
    sweep,
    trace,
)


COMMANDS = (init, export, push, generate, trace, chat, demo, serve, sweep, leaderboard, metric, bench, env)


class _Parser(argparse.ArgumentParser):
    """Errors in one line, in the form of all other errors of the command; options may stand between the arguments."""

    _in_pass = False

    def parse_known_args(self, args=None, namespace=None):
        # argparse takes an optional argument for absent at the first option, so that `generate MODEL --chat PROMPT`
        # fails. Its own cure calls this method again, and does not cover the parser that holds the subcommands.
        if self._in_pass or self._subparsers is not None:
            return super().parse_known_args(args, namespace)
        self._in_pass = True
        try:
            found, unknown = self.parse_known_intermixed_args(args, namespace)
        finally:
            self._in_pass = False
        if unknown:  # known to no parser above this one either
            options = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(unknown[0].partition("=")[0], options, n=1)
            hint = f". Did you mean {near[0]}?" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"d3llm: error: {message} (see `{self.prog} --help`)\n")
        raise SystemExit(2)


def build_parser() -> argparse.ArgumentParser:
    """The parser with every subcommand; `args.run(args)` carries one out."""
    parser = _Parser(prog="d3llm", description="Diffusion language models on Hugging Face transformers.")
    parser.add_argument("--version", action="version", version=f"d3llm {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code: 0, 2 for bad input, 130 when interrupted."""
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (`| head`) has gone. Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.stderr.write("\nd3llm: interrupted\n")
        return 130
    except Exception as error:
        if args.debug or not _is_bad_input(error):
            raise
        sys.stderr.write(f"d3llm: error: {' '.join(str(error).split()) or type(error).__name__}\n")
        return 2
    return 0


def _is_bad_input(error: Exception) -> bool:
    """Whether an error is what libraries raise for wrong input. All else is a bug, whose traceback is wanted."""
    if isinstance(error, (ValueError, TypeError, OSError, ImportError)):
        return True
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    return isinstance(error, (StrictDataclassError, SafetensorError))


if __name__ == "__main__":
    raise SystemExit(main())
