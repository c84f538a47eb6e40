"""Module names of the official LLaDA code in the config of a PEFT adapter, in the names that modules have here.

Tensors are translated as a checkpoint's are, but a config names modules in many places, in as many ways: as the end of
a name, as a regular expression, as the key of a pattern. All are asked of the official name of every module. Dream's
official names are those of its modules.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ..models.modeling_llada import OFFICIAL_BLOCK, LLaDAPreTrainedModel


Matcher = Callable[[str, str], bool]
"""Whether what a config says means the module of a name."""

_OFFICIAL = {ours: theirs for theirs, ours in OFFICIAL_BLOCK.items()}
_HEAD, _OFFICIAL_HEAD = "lm_head", "model.transformer.ff_out"
_NAMES = ("target_modules", "feedforward_modules", "exclude_modules")

# As `key_mapping` of PEFT: official beginning of a tensor's name, without PEFT's prefix -> ours.
TENSOR_NAMES = {
    r"^model\.transformer\.ff_out\.": "lm_head.",
    r"transformer\.wte\.": "embed_tokens.",
    r"transformer\.ln_f\.": "norm.",
} | {rf"transformer\.blocks\.(\d+)\.{theirs}\.": rf"layers.\1.{ours}." for ours, theirs in _OFFICIAL.items()}


def translate(config: Any, model: nn.Module, saved: Callable[[], Iterable[str]] = tuple) -> None:
    """Puts our names into every field of an adapter's config that names modules, in place; ours stay as they are.

    `ff_out` is the official name of two things: the last projection of each block, and the head. It means the blocks,
    and the head where it cannot mean them, or where the adapter has tensors of the head.

    Args:
        config ([`~peft.PeftConfig`]): of an adapter that is to be put into `model`.
        model: the model, with or without other adapters.
        saved: gives the names of the adapter's tensors, where it comes from a file.
    """
    if not isinstance(model, LLaDAPreTrainedModel):
        return
    names = _Names(model, saved)
    for field in _NAMES:
        said = getattr(config, field, None)
        if said:
            setattr(config, field, names.listed(said, head=field == "exclude_modules"))
    if getattr(config, "modules_to_save", None):
        config.modules_to_save = list(names.translated(config.modules_to_save, _ends, head=True))
    if isinstance(getattr(config, "trainable_token_indices", None), dict):
        tokens = config.trainable_token_indices
        config.trainable_token_indices = {
            ours: tokens[said] for said in tokens for ours in names.translated([said], _ends, head=False)
        }
    if getattr(config, "target_parameters", None):
        config.target_parameters = names.parameters(config.target_parameters)
    if getattr(config, "layers_pattern", None):
        config.layers_pattern = _containers(config.layers_pattern)
    for field, said in vars(config).items():
        if field.endswith("_pattern") and isinstance(said, dict):
            setattr(config, field, names.pattern(said))


class _Names:
    """The modules of a model by their names here and in the official code."""

    def __init__(self, model: nn.Module, saved: Callable[[], Iterable[str]]):
        self.official = {name: official for name, _ in model.named_modules() if (official := official_name(name))}
        self._containers = {
            name for name in self.official if any(other.startswith(f"{name}.") for other in self.official)
        }
        self._saved = saved

    def translated(self, said: Iterable[str], matches: Matcher, *, head: bool) -> list[str]:
        """What means here the modules that `said` means there; entries that mean modules here are among it."""
        found: list[str] = []
        for entry in said:
            meant = {name for name, official in self.official.items() if matches(entry, official)}
            own = {name for name in self.official if matches(entry, name)}
            others = meant - own
            if _HEAD in others and len(others) > 1 and not head and not self._head_is_saved():
                others.discard(_HEAD)
            if own or not others:
                found.append(entry)
            found += self._expressed(others, matches)
        return list(dict.fromkeys(found))

    def listed(self, said: Any, *, head: bool) -> Any:
        """Names as a config has them: several, each the end of a name, or one regular expression."""
        if not isinstance(said, str):
            return set(self.translated(said, _is_end, head=head))
        ours = self.translated([said], _fits, head=head)
        if ours == [said]:  # "all-linear", too
            return said
        names = {name for name in self.official if any(_fits(entry, name) for entry in ours)}
        return set(self._expressed(names, _is_end))

    def parameters(self, said: Iterable[str]) -> list[str]:
        """Parameters of modules, as the ends of their names."""
        found: list[str] = []
        for entry in said:
            module, _, parameter = entry.rpartition(".")
            found += [f"{ours}.{parameter}" for ours in self.translated([module], _is_end, head=False)]
        return found

    def pattern(self, said: dict[str, Any]) -> dict[str, Any]:
        """Values by regular expressions of the ends of names; of AdaLoRA by the names of tensors."""
        found: dict[str, Any] = {}
        for entry, value in said.items():
            for ours in self.translated([entry], _fits_end, head=False):
                found.setdefault(self._tensor(ours), value)
        return found

    def _tensor(self, said: str) -> str:
        """Our name of a tensor with an official name; anything else as it is."""
        for name, official in self.official.items():
            if name not in self._containers and said.startswith(f"{official}."):
                return name + said[len(official) :]
        return said

    def _expressed(self, names: set[str], matches: Matcher) -> list[str]:
        """Last parts of names as far as they mean nothing else, the whole names otherwise."""
        found: list[str] = []
        for last in sorted({name.rpartition(".")[2] for name in names}):
            alike = {name for name in names if name.rpartition(".")[2] == last}
            means = {name for name in self.official if matches(last, name)}
            found += [last] if means == alike else sorted(alike)
        return found

    def _head_is_saved(self) -> bool:
        return any(f"{_OFFICIAL_HEAD}." in name or f".{_HEAD}." in name for name in self._saved())


def official_name(name: str) -> str:
    """The official name of a module of LLaDA, empty where it has none."""
    if name == _HEAD:
        return _OFFICIAL_HEAD
    prefix, _, rest = name.partition("model.") if name.startswith("model.") else ("", "", name)
    start = "model." if rest != name else prefix
    if rest in ("embed_tokens", "norm"):
        return f"{start}transformer.{'wte' if rest == 'embed_tokens' else 'ln_f'}"
    place = re.fullmatch(r"layers(\.\d+)?(?:\.(.+))?", rest)
    if place is None or (place[2] is not None and place[2] not in _OFFICIAL):
        return ""
    return f"{start}transformer.blocks{place[1] or ''}" + (f".{_OFFICIAL[place[2]]}" if place[2] else "")


def _containers(said: str | list[str]) -> Any:
    """`layers_pattern`: what holds the numbered blocks."""
    if isinstance(said, str):
        return re.sub(r"(transformer(\\?\.))?\bblocks\b", "layers", said)
    return [_containers(each) for each in said]


def _is_end(said: str, name: str) -> bool:
    return name == said or name.endswith(f".{said}")


def _ends(said: str, name: str) -> bool:
    return name.endswith(said)


def _fits(said: str, name: str) -> bool:
    return re.fullmatch(said, name) is not None


def _fits_end(said: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({said})$", name) is not None
