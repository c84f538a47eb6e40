"""What the `run_*.py` scripts share: `--config recipe.yaml` with command-line overrides."""

import argparse
import difflib
import json
import logging
from collections.abc import Iterable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser


logger = logging.getLogger(__name__)


class _Parser(HfArgumentParser):
    """Errors in one line: the usage, with the Trainer's arguments, fills screens."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def parse_args_with_config(dataclass_types: tuple[type, ...], argv: list[str]) -> tuple[Any, ...]:
    """Parse `argv` into the dataclasses; `--config file.yaml` sets defaults that other arguments override.

    A value of `null` in the file leaves an argument unset.

    Args:
        dataclass_types (`tuple[type, ...]`): What to fill, in order.
        argv (`list[str]`): The arguments, without the program's name.

    Returns:
        One instance of each type.

    Raises:
        ValueError: If the file cannot be read, is not a mapping, or has a key that no dataclass knows.
    """
    parser = _Parser(dataclass_types)
    parser.add_argument("--config", help="YAML file of defaults; arguments given here take precedence.")
    recipe = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # what is required may be in the file
    recipe.add_argument("--config")
    path = recipe.parse_known_args(argv)[0].config
    if path is not None:
        parser.set_defaults(**_read_config(path, parser))
        for action in parser._actions:
            if action.dest in parser._defaults:
                action.required = False
    *found, _, unknown = parser.parse_args_into_dataclasses(args=argv, return_remaining_strings=True)
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings]
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{_hint(unknown[0], options)}")
    return tuple(found)


def _read_config(path: str, parser: HfArgumentParser) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"`--config` must name a YAML file that can be read (got {path}: {error}). The recipes are in "
            "trainers/recipes."
        ) from error
    if not isinstance(values, dict):
        raise ValueError(
            f"`--config` must name a YAML mapping (got {type(values).__name__} in {path}). "
            "Write one `argument: value` a line."
        )
    known = {action.dest for action in parser._actions}
    for name in values:
        if name not in known:
            raise ValueError(
                f"`{name}` in {path} must be a known argument (got an unknown name).{_hint(str(name), known)}"
            )
    return {name: value for name, value in values.items() if value is not None}


def _hint(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean `{nearest[0]}`?" if nearest else " See --help for all names."


def json_value(name: str, value: Any) -> Any:
    """The value of an argument that is JSON on a command line and may be anything in a recipe.

    Raises:
        ValueError: If a text is no JSON; `name` is the argument.
    """
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        example = '{"key": 1}'
        raise ValueError(
            f"`{name}` must be JSON (got {value[:80]!r}: {error}). Write for example {example}, or a section of "
            "the recipe."
        ) from error


def warn_of_idle(script_args: Any, idle: Iterable[str], because: str) -> None:
    """Says which arguments were set and have no effect. A recipe may set them for its other uses: no error.

    Args:
        script_args: a dataclass of arguments.
        idle: names of its fields that have no effect in this run.
        because: what makes them so, and the way out.
    """
    defaults = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(script_args)
    }
    named = [f"`{name}`" for name in idle if getattr(script_args, name) != defaults[name]]
    if named:
        logger.warning("%s without effect: %s", f"{', '.join(named)} {'is' if len(named) == 1 else 'are'}", because)
