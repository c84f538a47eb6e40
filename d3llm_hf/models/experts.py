"""Experts as two tables of weights, run by whichever of transformers' implementations the config names."""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.integrations.moe import use_experts_implementation


@use_experts_implementation
class Experts(nn.Module):
    """E gated MLPs; `experts_implementation` of `from_pretrained` says how they run, "eager" is the loop here.

    Args:
        config: with `num_experts`, `hidden_size`, `moe_intermediate_size` and `hidden_act`.
    """

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.num_experts
        width, inner = config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, width, inner))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Weighted sums `(T, D)` of the outputs of each token's experts, summed in float32.

        Args:
            hidden_states (`(T, D)`): of T tokens.
            chosen (`(T, K)` long), weights (`(T, K)` float32): the experts of each.
        """
        total = torch.zeros_like(hidden_states, dtype=torch.float32)
        for expert in chosen.unique().tolist():
            token, place = (chosen == expert).nonzero(as_tuple=True)
            gate, up = nn.functional.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            output = nn.functional.linear(self.act_fn(gate) * up, self.down_proj[expert])
            total = total.index_add(0, token, output * weights[token, place, None].float())
        return total.to(hidden_states.dtype)


def merged_experts() -> list[WeightConverter]:
    """How transformers makes the tables of `mlp.experts.{j}.gate_proj.weight` and the like, and undoes it."""
    return [
        WeightConverter(
            source_patterns=["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            target_patterns="mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns="mlp.experts.*.down_proj.weight",
            target_patterns="mlp.experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ]


__all__ = ["Experts", "merged_experts"]
