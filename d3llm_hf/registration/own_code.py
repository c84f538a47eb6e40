"""A checkpoint that calls itself one of ours, and is not, is run by its own code where the caller trusts that.

transformers takes a registered class before the code of a checkpoint, whatever `trust_remote_code` says. So where ours
refuses the config, the code that the checkpoint brings gets its turn.
"""

import functools
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any


_CLASSES = re.compile(r"^class (\w+)", re.MULTILINE)


def let_refused_checkpoints_bring_their_code(auto_config: Any, model_types: Collection[str]) -> None:
    """Makes `AutoConfig.from_pretrained` load a config that ours refuses by the checkpoint's own code, if trusted.

    Args:
        model_types: of our families.
    """
    ours = auto_config.from_pretrained.__func__

    @functools.wraps(ours)
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        try:
            return ours(cls, pretrained_model_name_or_path, **kwargs)
        except Exception as error:
            from huggingface_hub.errors import StrictDataclassError

            refused = isinstance(error, StrictDataclassError) and kwargs.get("trust_remote_code")
            found = _own_config(pretrained_model_name_or_path, kwargs, model_types) if refused else None
            if found is None:
                raise
            return found

    auto_config.from_pretrained = classmethod(from_pretrained)


def _own_config(name: str, kwargs: dict[str, Any], model_types: Collection[str]) -> Any:
    """What the checkpoint's config class makes of its config.json; `None` where it brings no code of its own."""
    from transformers import PreTrainedConfig
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    from ..models.architecture import brings_own_code

    code_revision = kwargs.get("code_revision")
    taken = ("trust_remote_code", "code_revision")
    kwargs = {key: value for key, value in kwargs.items() if key not in taken}
    kwargs |= {"_from_auto": True, "name_or_path": name}
    keys, _ = PreTrainedConfig.get_config_dict(name, **kwargs)
    if keys.get("model_type") not in model_types or not brings_own_code(keys):
        return None
    auto_map = keys["auto_map"]
    where: dict[str, Any] = {key: kwargs[key] for key in ("cache_dir", "token", "local_files_only") if key in kwargs}
    where["code_revision"] = kwargs.get("revision") if code_revision is None else code_revision
    for reference in {value for key, value in auto_map.items() if key.startswith("AutoModel")}:
        _keep_tensor_names(reference, name, **where)
    config_class: Any = get_class_from_dynamic_module(
        auto_map["AutoConfig"], name, code_revision=code_revision, **kwargs
    )
    config_class.register_for_auto_class()
    return config_class.from_pretrained(name, **kwargs)


def _keep_tensor_names(reference: str, name: str, code_revision: str | None, **where: Any) -> None:
    """Takes the classes of a file out of the renaming of tensors, which goes by `model_type` and so would meet them.

    Args:
        reference (`str`): entry of `auto_map`.
    """
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.dynamic_module_utils import get_cached_module_file
    from transformers.utils import HF_MODULES_CACHE

    from ..models.architecture import OUR_CLASSES

    repository, _, entry = reference.rpartition("--")
    file = f"{entry.split('.')[0]}.py"
    elsewhere = repository not in ("", str(name))
    copy = get_cached_module_file(repository or name, file, revision=None if elsewhere else code_revision, **where)
    code = (Path(HF_MODULES_CACHE) / copy).read_text(encoding="utf-8")
    for class_name in _CLASSES.findall(code):
        if class_name not in OUR_CLASSES:
            register_checkpoint_conversion_mapping(class_name, [], overwrite=True)
