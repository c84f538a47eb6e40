"""Recipes of evaluations: tasks of lm-eval, with settings for the models whose figures on them are published."""

import difflib
import json
import shlex
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml


FOLDER = Path(str(resources.files(__package__))) / "recipes"
TASKS = Path(str(resources.files(__package__))) / "lm_eval_tasks"
"""Tasks of our own, for lm-eval's `--include_path`."""

RECIPE_KEYS = {"description", "tasks", "num_fewshot", "models"}
MODEL_KEYS = {"pretrained", "apply_chat_template", "model_args", "gen_kwargs", "cached"}


@dataclass(frozen=True)
class Plan:
    """Arguments of lm-eval that a recipe gives for one model."""

    tasks: list[str] = field(default_factory=list)
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    model_args: dict[str, Any] = field(default_factory=dict)
    gen_kwargs: dict[str, Any] = field(default_factory=dict)

    def arguments(self, others: list[str]) -> list[str]:
        """The whole command line of lm-eval; `others` are the user's own arguments and take precedence."""

        def given(*flags: str) -> bool:
            return any(word in flags or word.startswith(tuple(f"{flag}=" for flag in flags)) for word in others)

        words = ["run"]
        words += ["--model", "d3llm"] * (not given("--model", "-M"))
        words += ["--include_path", str(TASKS)] * (not given("--include_path"))
        words += ["--tasks", *self.tasks] * bool(self.tasks and not given("--tasks", "-t"))
        words += [] if self.num_fewshot is None else ["--num_fewshot", str(self.num_fewshot)]
        if self.apply_chat_template:
            words += ["--apply_chat_template", "--fewshot_as_multiturn", "false"]
        words += ["--model_args", json.dumps(self.model_args)] * bool(self.model_args)
        words += ["--gen_kwargs", json.dumps(self.gen_kwargs)] * bool(self.gen_kwargs)
        return words + others

    def command(self, others: list[str]) -> str:
        """The same as a line for the shell."""
        return shlex.join(["d3llm-eval", *self.arguments(others)])


def recipe_names() -> list[str]:
    """The recipes of this package."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def read_recipe(name: str) -> dict[str, Any]:
    """A recipe of this package by its name, or one of your own by its path.

    Raises:
        ValueError: for a name that does not exist, or a file that is no recipe.
    """
    file = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not file.is_file():
        near = difflib.get_close_matches(name, recipe_names(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"`recipe` must be one of {recipe_names()} or a YAML file (got {name!r}).{hint}")
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"`recipe` must be YAML (got {error} in {str(file)!r}). Correct the file.") from error
    wrong = None
    if not isinstance(recipe, dict) or not {"tasks", "models"} <= set(recipe) <= RECIPE_KEYS:
        wrong = f"the keys {sorted(RECIPE_KEYS)}"
    elif not isinstance(recipe["models"], dict) or not all(
        isinstance(model, dict) and "pretrained" in model and set(model) <= MODEL_KEYS
        for model in recipe["models"].values()
    ):
        wrong = f"under `models` a name for each model, with the keys {sorted(MODEL_KEYS)}"
    if wrong is not None:
        raise ValueError(f"`recipe` must have {wrong} (got others in {str(file)!r}). Start from {str(FOLDER)!r}.")
    return recipe


def plan(
    recipe: dict[str, Any], *, pretrained: str | None = None, settings: str | None = None, cached: bool = False
) -> Plan:
    """Chooses the settings of a recipe for a model.

    Args:
        recipe: as [`read_recipe`] gives it.
        pretrained (`str`, *optional*): checkpoint to evaluate; that of the settings when unset.
        settings (`str`, *optional*): whose settings; when unset those of `pretrained`, if the recipe has them.
        cached (`bool`): with the cache that the published speeds were measured with.

    Raises:
        ValueError: for settings that the recipe does not have, or when it cannot tell whose are wanted.
    """
    models = recipe["models"]
    if settings is None:
        settings = next((n for n, model in models.items() if pretrained in (n, model["pretrained"])), None)
    if settings not in models:
        raise ValueError(f"`settings` must say whose settings to use, one of {list(models)} (got {settings!r}).")
    model = models[settings]
    model_args = {"pretrained": pretrained or model["pretrained"], **model.get("model_args", {})}
    gen_kwargs = dict(model.get("gen_kwargs", {}))
    if cached:
        model_args |= model.get("cached", {}).get("model_args", {})
        gen_kwargs |= model.get("cached", {}).get("gen_kwargs", {})
    return Plan(
        tasks=list(recipe["tasks"]),
        num_fewshot=recipe.get("num_fewshot"),
        apply_chat_template=bool(model.get("apply_chat_template")),
        model_args=model_args,
        gen_kwargs=gen_kwargs,
    )
