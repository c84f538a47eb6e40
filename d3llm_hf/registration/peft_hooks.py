"""What PEFT has to know of the models of this package; put in place when PEFT is imported (see `families`)."""

import functools
from typing import Any

from ..models.contract import CanvasContract
from ..models.wrappers import base_of, learnt_prompt, refuse_homeless, unfit_task


_SOURCE = "_d3llm_source"  # attribute of a config; no field of it, so it is never saved


def patch_configs(module: Any) -> None:
    """`peft.config`: a config remembers the folder or id that it was read from."""
    mixin = module.PeftConfigMixin
    read = mixin.from_pretrained.__func__

    @functools.wraps(read)
    def from_pretrained(cls, name, *args, **kwargs):
        config = read(cls, name, *args, **kwargs)
        setattr(config, _SOURCE, (name, args, kwargs))
        return config

    mixin.from_pretrained = classmethod(from_pretrained)


def patch_tuners(module: Any) -> None:
    """`peft.tuners.tuners_utils`: an adapter that names LLaDA's official modules finds ours, and PEFT our sizes."""
    inject, sizes = module.BaseTuner.inject_adapter, module.BaseTuner.get_model_config

    @functools.wraps(inject)
    def inject_adapter(self, model, adapter_name, *args, **kwargs):
        if _usual_names(getattr(model, "config", None)):
            from .adapter_names import translate

            config = self.peft_config[adapter_name]
            translate(config, model, functools.partial(_tensor_names, config))
        return inject(self, model, adapter_name, *args, **kwargs)

    @functools.wraps(sizes)
    def get_model_config(model):
        return sizes(model) | _usual_names(getattr(model, "config", None))

    module.BaseTuner.inject_adapter = inject_adapter
    module.BaseTuner.get_model_config = staticmethod(get_model_config)


def patch_models(module: Any) -> None:
    """`peft.peft_model`: no tensor is left out, no learnt prompt by `generate`, and PEFT finds our sizes."""
    load, generate = module.PeftModel.load_adapter, module.PeftModel.generate

    @functools.wraps(load)
    def load_adapter(self, model_id, adapter_name, *args, **kwargs):
        config = getattr(self, "active_peft_config", None)  # none where kinds of adapters are mixed
        base = self.base_model.model if config is None else base_of(self)
        if not isinstance(base, CanvasContract) or (config is not None and config.is_prompt_learning):
            return load(self, model_id, adapter_name, *args, **kwargs)
        from .adapter_names import TENSOR_NAMES

        if base.config.model_type == "llada":
            kwargs["key_mapping"] = kwargs.get("key_mapping") or TENSOR_NAMES
        result = load(self, model_id, adapter_name, *args, **kwargs)
        refuse_homeless(result.unexpected_keys, str(model_id), base)
        return result

    @functools.wraps(generate)
    def checked(self, *args, **kwargs):
        config = learnt_prompt(self)
        if config is not None and isinstance(base_of(self), CanvasContract):
            raise unfit_task(config)
        return generate(self, *args, **kwargs)

    module.PeftModel.load_adapter, module.PeftModel.generate = load_adapter, checked
    prepare = getattr(module, "_prepare_prompt_learning_config", None)
    if prepare is not None:  # otherwise the sizes of a learnt prompt have to be given by hand

        def prepare_sizes(peft_config, model_config):
            usual = _usual_names(model_config)
            return prepare(peft_config, (model_config.to_dict() | usual) if usual else model_config)

        module._prepare_prompt_learning_config = prepare_sizes


def patch_auto_classes(module: Any) -> None:
    """`peft.auto`: adapters of our classes load with the Auto classes, which import only what they know."""
    known = getattr(module, "get_default_import_allowlist", None)
    if known is None:  # before PEFT had such a list, it imported what a config names
        return

    @functools.wraps(known)
    def get_default_import_allowlist():
        return [*known(), __package__.partition(".")[0]]

    module.get_default_import_allowlist = get_default_import_allowlist


def _usual_names(config: Any) -> dict[str, Any]:
    """What LLaDA's config knows by transformers' usual names, which its dictionary, as it is saved, leaves out."""
    if getattr(config, "model_type", None) != "llada":
        return {}
    return {name: getattr(config, name) for name in config.attribute_map}


def _tensor_names(config: Any) -> list[str]:
    """Names of the tensors of an adapter whose config came from a file."""
    from peft.utils.save_and_load import load_peft_weights

    source = getattr(config, _SOURCE, None)
    if source is None:
        return []
    name, args, kwargs = source
    hub = {key: kwargs[key] for key in ("revision", "cache_dir", "token", "subfolder") if kwargs.get(key) is not None}
    if args:
        hub["subfolder"] = args[0]
    try:
        return list(load_peft_weights(name, device="cpu", **hub))
    except (OSError, ValueError):  # a config alone: of a new adapter
        return []
