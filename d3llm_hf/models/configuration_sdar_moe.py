"""Configuration of SDAR with experts, under the keys of the official checkpoints."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_sdar import SDARConfig


@strict
class SDARMoeConfig(SDARConfig):
    r"""Configuration of a [`SDARMoeForCausalLM`]: the keys of `JetLM/SDAR-30B-A3B-Chat`, which are Qwen3-MoE's.

    Args:
        num_experts (`int`): experts of a layer that has some.
        num_experts_per_tok (`int`): of them a token goes through.
        moe_intermediate_size (`int`): width of an expert.
        decoder_sparse_step (`int`): every how many layers one has experts; the others have one MLP.
        mlp_only_layers (`list[int]`, *optional*): further layers without experts.
        norm_topk_prob (`bool`): kept, and not read: the weights of a token's experts always sum to 1.

    For all others see [`SDARConfig`].

    Raises:
        ArchitectureError: (a `ValueError`) as [`SDARConfig`], or for sizes that do not fit together.
    """

    model_type = "sdar_moe"
    attribute_map: ClassVar[dict[str, str]] = {"block_length": "block_size", "num_local_experts": "num_experts"}
    base_model_tp_plan: ClassVar[dict[str, str]] = SDARConfig.base_model_tp_plan | {
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
    }
    own_keys: ClassVar[frozenset[str]] = SDARConfig.own_keys | {
        "num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step", "mlp_only_layers",
        "output_router_logits", "router_aux_loss_coef",
    }  # fmt: skip

    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_hidden_layers: int = 48
    num_key_value_heads: int | None = 4
    num_experts: int = 128
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 768
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] | None = None
    norm_topk_prob: bool = True

    def has_experts(self, layer_idx: int) -> bool:
        """Whether a layer has experts."""
        sparse = self.num_experts > 0 and (layer_idx + 1) % self.decoder_sparse_step == 0
        return sparse and layer_idx not in (self.mlp_only_layers or ())

    def validate_architecture(self):
        """As [`SDARConfig`]'s, and whether a token finds as many experts as it goes through."""
        super().validate_architecture()
        if self.decoder_sparse_step < 1 or (self.num_experts and not 0 < self.num_experts_per_tok <= self.num_experts):
            raise ValueError(
                "`num_experts_per_tok` must be from 1 to `num_experts`, and `decoder_sparse_step` positive (got "
                f"{self.num_experts_per_tok}, {self.num_experts} and {self.decoder_sparse_step}). Correct config.json."
            )


__all__ = ["SDARMoeConfig"]
