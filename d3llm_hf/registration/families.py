"""Registers the model families with transformers' Auto classes, without importing torch or transformers for it.

Registering takes the Auto classes and the families' own classes, whose import loads torch and lasts seconds. So a
finder on `sys.meta_path` waits until transformers loads `AutoConfig`, and then registers a stand-in for each config
class. (The real ones cannot be imported at that moment: transformers is still in the middle of its own imports.) When
a checkpoint of a family is met, the stand-in imports the real config class, and the import of that module, whoever
asked for it, registers the config and a stand-in for the model class; that of the model's module registers the model.
"""

import copyreg
import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from .own_code import let_refused_checkpoints_bring_their_code


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Family:
    """Where the classes of a family lie, and its names: that of transformers and that of people."""

    model_type: str
    label: str
    config_file: str
    config_class: str
    model_file: str
    model_class: str

    @property
    def config_module(self) -> str:
        return f"{_MODELS}.{self.config_file}"

    @property
    def model_module(self) -> str:
        return f"{_MODELS}.{self.model_file}"

    def config(self) -> "type[PreTrainedConfig]":
        return _load(self.config_module, self.config_class)

    def model(self) -> "type[PreTrainedModel]":
        return _load(self.model_module, self.model_class)


def _load(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


_PACKAGE = __package__.partition(".")[0]
_MODELS = f"{_PACKAGE}.models"
_ROWS = (
    Family("llada", "LLaDA", "configuration_llada", "LLaDAConfig", "modeling_llada", "LLaDAModelLM"),
    Family("mmada", "MMaDA", "configuration_mmada", "MMadaConfig", "modeling_mmada", "MMadaModelLM"),
    Family("Dream", "Dream", "configuration_dream", "DreamConfig", "modeling_dream", "DreamModel"),
    Family("llada2_moe", "LLaDA2", "configuration_llada2", "LLaDA2MoeConfig", "modeling_llada2", "LLaDA2MoeModelLM"),
    Family("sdar", "SDAR", "configuration_sdar", "SDARConfig", "modeling_sdar", "SDARForCausalLM"),
    Family("sdar_moe", "SDAR", "configuration_sdar_moe", "SDARMoeConfig", "modeling_sdar_moe", "SDARMoeForCausalLM"),
    Family(
        "Fast_dLLM_Qwen",
        "Fast-dLLM v2",
        "configuration_fast_dllm_v2",
        "Fast_dLLM_QwenConfig",
        "modeling_fast_dllm_v2",
        "Fast_dLLM_QwenForCausalLM",
    ),
    Family(
        "refusion", "ReFusion", "configuration_refusion", "ReFusionConfig", "modeling_refusion", "ReFusionForCausalLM"
    ),
)
FAMILIES = {family.model_type: family for family in _ROWS}
"""The families by the `model_type` of their config.json."""
AUTO_CLASSES = ("AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM")


class _StandIn(type):
    """Metaclass of what stands for a class until that is needed: it has its name, and forwards what is asked of it."""

    def __getattr__(cls, name: str):
        if name.startswith("__"):  # asked by the machinery of Python and by inspection: no reason to import anything
            raise AttributeError(name)
        return getattr(_load(cls.__module__, cls.__name__), name)

    def __call__(cls, *args, **kwargs):
        return _load(cls.__module__, cls.__name__)(*args, **kwargs)


copyreg.pickle(_StandIn, lambda cls: (_load, (cls.__module__, cls.__name__)))


def _register_stand_ins() -> None:
    """After transformers' `AutoConfig` has loaded."""
    from transformers.models.auto.configuration_auto import AutoConfig

    let_refused_checkpoints_bring_their_code(AutoConfig, FAMILIES)
    for family in FAMILIES.values():
        if family.config_module not in sys.modules:
            known = {"__module__": family.config_module, "model_type": family.model_type}
            AutoConfig.register(family.model_type, _StandIn(family.config_class, (), known), exist_ok=True)


def _register_tokenizer() -> None:
    """After transformers' `AutoTokenizer` has loaded: the tokenizer class that Dream's checkpoints name."""
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    dream = FAMILIES["Dream"]
    config = _StandIn(dream.config_class, (), {"__module__": dream.config_module, "model_type": dream.model_type})
    tokenizer = _StandIn("DreamTokenizer", (), {"__module__": f"{_PACKAGE}.hub.tokenization_dream"})
    AutoTokenizer.register(config, fast_tokenizer_class=tokenizer, exist_ok=True)


def _register_config(family: Family) -> None:
    """After the config class of `family` has loaded.

    `register_for_auto_class` makes transformers copy the code of a class into what it saves; without it a checkpoint
    saved from here would name code that it does not hold.
    """
    from transformers.models.auto.configuration_auto import AutoConfig

    config = family.config()
    config.register_for_auto_class("AutoConfig")
    AutoConfig.register(family.model_type, config, exist_ok=True)
    known = {"__module__": family.model_module, "config_class": config}
    _register_in_auto_models(config, _StandIn(family.model_class, (), known))


def _register_model(family: Family) -> None:
    """After the model class of `family` has loaded."""
    family.model().register_for_auto_class("AutoModel")
    _register_in_auto_models(family.config(), family.model())


def _register_in_auto_models(config: type, model: type) -> None:
    from transformers.models.auto import modeling_auto

    for name in AUTO_CLASSES:
        getattr(modeling_auto, name).register(config, model, exist_ok=True)


def _patch(module: str, name: str) -> None:
    """After `module`, one of PEFT's, has loaded."""
    _load(f"{__package__}.peft_hooks", name)(sys.modules[module])


_PEFT = {
    "peft.config": "patch_configs",
    "peft.tuners.tuners_utils": "patch_tuners",
    "peft.peft_model": "patch_models",
    "peft.auto": "patch_auto_classes",
}


def _actions() -> dict[str, Callable[[], None]]:
    """What follows the import of which module."""
    actions: dict[str, Callable[[], None]] = {"transformers.models.auto.configuration_auto": _register_stand_ins}
    actions["transformers.models.auto.tokenization_auto"] = _register_tokenizer
    actions |= {module: partial(_patch, module, name) for module, name in _PEFT.items()}
    for family in FAMILIES.values():
        actions[family.config_module] = partial(_register_config, family)
        actions[family.model_module] = partial(_register_model, family)
    return actions


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds nothing itself: lets the other finders find a module and makes its loader run the action afterwards."""

    def __init__(self, actions: dict[str, Callable[[], None]]):
        self.actions = actions
        self.finding: set[str] = set()

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in self.actions or fullname in self.finding:
            return None
        self.finding.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.finding.discard(fullname)
        if spec is None or spec.loader is None:
            return None

        # The loader itself stays in place (inspect and importlib.resources ask it); only this one call is wrapped.
        loader, execute = spec.loader, spec.loader.exec_module

        def exec_module(module):
            loader.exec_module = execute
            execute(module)
            self.actions.pop(fullname, lambda: None)()

        loader.exec_module = exec_module
        return spec


def register_families() -> None:
    """Makes the Auto classes know the families, now if they are loaded, or else as soon as they are."""
    if any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        return
    actions = _actions()
    loaded = [name for name in actions if name in sys.modules]
    pending = {name: action for name, action in actions.items() if name not in loaded}
    sys.meta_path.insert(0, _AfterImport(pending))
    for name in loaded:
        actions[name]()
