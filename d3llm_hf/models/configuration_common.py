"""Fields of a model's config that follow from others, whichever name or way these come by."""

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar

from .architecture import refusing


if TYPE_CHECKING:  # what it is mixed into
    from transformers.configuration_utils import PreTrainedConfig
else:
    PreTrainedConfig = object


QK_NORM_PLAN = {
    "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
    "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
}
"""The part of a tensor-parallel plan for norms of queries and keys, where a model has them."""


class DerivingConfigMixin(PreTrainedConfig):
    """What the configs of all families share: plans by the names of our modules, and fields that follow from others.

    Fields are derived from what was asked for: by an alias, or by an argument of `from_pretrained` over a file.

    transformers assigns both once the config is made, when what follows from them is derived from the defaults.
    """

    attribute_map: ClassVar[dict[str, str]] = {}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan: ClassVar[dict[str, Sequence[list[str]]] | None] = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    def take_aliases(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Assigns what comes under another name, before anything is derived; returns the rest that says something.

        Raises:
            ValueError: for two values of one field.
        """
        defaults = {field.name: field.default for field in fields(self)}  # type: ignore[arg-type]  # of a @strict class
        for alias in [name for name in kwargs if name in self.attribute_map]:
            name, value = self.attribute_map[alias], kwargs.pop(alias)
            own = getattr(self, name)
            if own != defaults[name] and own != value:
                raise ValueError(f"`{alias}` is another name of `{name}` (got {value!r} and {own!r}). Leave one out.")
            setattr(self, name, value)
        if kwargs.get("rope_scaling", 0) is None:  # as official files say it; transformers warns of the very name
            del kwargs["rope_scaling"]
        return kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As transformers', with the arguments in place of the file's entries and not after them."""
        ours = [base for base in cls.__mro__ if issubclass(base, DerivingConfigMixin)]  # one may extend another
        declared = {name for base in ours for name in base.__annotations__} | {*cls.attribute_map}
        given = {cls.attribute_map.get(name, name): kwargs.pop(name) for name in [*kwargs] if name in declared}
        if "rope_theta" in given and "rope_parameters" not in given:  # a file spells out both
            own = config_dict.get("rope_parameters") or config_dict.get("rope_scaling") or {}
            if own:
                given["rope_parameters"] = own | {"rope_theta": given["rope_theta"]}
        kept = {name: value for name, value in config_dict.items() if cls.attribute_map.get(name, name) not in given}
        return super().from_dict(kept | given, **kwargs)


class QwenConfigMixin(DerivingConfigMixin):
    """What the configs of the families on Qwen's decoder share beside."""

    def __post_init__(self, **kwargs):
        kwargs = self.take_aliases(kwargs)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)
        with refusing():
            self.validate_architecture()
        self.layer_types = ["full_attention"] * self.num_hidden_layers
        self.rope_theta = self.rope_parameters["rope_theta"]  # the key that engines of the official code read


__all__ = ["QK_NORM_PLAN", "DerivingConfigMixin", "QwenConfigMixin"]
