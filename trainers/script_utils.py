"""What the `run_*.py` scripts share: `--config recipe.yaml` with command-line overrides."""

import argparse
import difflib
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


def parse_args_with_config(dataclass_types: tuple[type, ...], argv: list[str]) -> tuple[Any, ...]:
    """Parse `argv` into the dataclasses; `--config file.yaml` sets defaults that other arguments override.

    Args:
        dataclass_types (`tuple[type, ...]`): What to fill, in order.
        argv (`list[str]`): The arguments, without the program's name.

    Returns:
        One instance of each type.

    Raises:
        ValueError: If the file is not a mapping, or has a key that no dataclass knows.
    """
    parser = HfArgumentParser(dataclass_types)
    parser.add_argument("--config", help="YAML file of defaults; arguments given here take precedence.")
    recipe = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # what is required may be in the file
    recipe.add_argument("--config")
    path = recipe.parse_known_args(argv)[0].config
    if path is not None:
        parser.set_defaults(**_read_config(path, parser))
        for action in parser._actions:
            if action.dest in parser._defaults:
                action.required = False
    return parser.parse_args_into_dataclasses(args=argv)[: len(dataclass_types)]


def _read_config(path: str, parser: HfArgumentParser) -> dict[str, Any]:
    values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(
            f"`--config` must name a YAML mapping (got {type(values).__name__} in {path}). "
            "Write one `argument: value` a line."
        )
    known = {action.dest for action in parser._actions}
    for name in values:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean `{nearest[0]}`?" if nearest else " See --help for all names."
            raise ValueError(f"`{name}` in {path} must be a known argument (got an unknown name).{hint}")
    return values
