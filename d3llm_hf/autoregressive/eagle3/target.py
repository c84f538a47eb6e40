"""The model that verifies: a stock decoder with a cache, whose forward takes a tree as well as a text."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from ...models.cache_name import CACHE
from ...models.generation_d3llm import D3LLMGenerationMixin
from ...models.locality import limited_reach
from ...models.text_config import text_config
from .head import Eagle3Head
from .tree import Tree


FAMILIES = ("llama", "qwen2", "qwen3")
KERNELS = ("eager", "sdpa")  # others take no mask of each pair of positions
PLAIN_ROTATIONS = (None, "default", "linear", "llama3", "yarn")  # those that do not change as a text grows


def feature_layers(num_layers: int) -> tuple[int, int, int]:
    """The layers of a target whose inputs are the head's features: near its first, its middle and its last."""
    return 2, num_layers // 2, num_layers - 3


@dataclass
class Target:
    """A target at work on one text.

    Attributes:
        model: checked by [`check_target`].
        cache: keys and values of the text so far.
        num_forwards: of the model so far.
    """

    model: Any
    cache: DynamicCache = field(default_factory=DynamicCache)
    num_forwards: int = 0

    def read(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The prompt's `(n,)` tokens: logits `(1, V)` behind the last one, and features `(n, 3 * D)`."""
        return self._forward(tokens, logits_to_keep=1)

    def verify(self, tree: Tree) -> tuple[torch.Tensor, torch.Tensor]:
        """A tree of T nodes behind the text: logits `(T, V)` behind each node, and features `(T, 3 * D)`.

        Its entries stay in the cache until [`keep`] is called.
        """
        before, device, dtype = self.cache.get_seq_length(), self.model.device, self.model.dtype
        visible = torch.nn.functional.pad(tree.visible(), (before, 0), value=True).to(device)
        mask = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill(~visible, torch.finfo(dtype).min)
        positions = torch.tensor(tree.depths(), device=device) + before
        return self._forward(tree.tokens.to(device), attention_mask=mask[None, None], position_ids=positions[None])

    def keep(self, path: list[int], nodes: int) -> None:
        """Of the cache's last `nodes` entries those of a path stay, in its order."""
        before, size = self.cache.get_seq_length() - nodes, len(path)
        layers: Any = self.cache.layers  # of attention alone, see `check_target`
        for layer in layers:
            for table in (layer.keys, layer.values):
                entries = torch.tensor(path, device=table.device) + before
                table[:, :, before : before + size] = table[:, :, entries]
        if size < nodes:
            self.cache.crop(size - nodes)

    def _forward(self, tokens: torch.Tensor, **inputs) -> tuple[torch.Tensor, torch.Tensor]:
        self.num_forwards += 1
        output = self.model(
            input_ids=tokens[None], use_cache=True, output_hidden_states=True, **{CACHE: self.cache}, **inputs
        )
        layers = feature_layers(len(output.hidden_states) - 1)
        device = output.logits.device
        features = torch.cat([output.hidden_states[layer][0].to(device) for layer in layers], dim=-1)
        return output.logits[0], features


def check_target(model: Any) -> None:
    """Refuses a target that cannot verify a tree exactly.

    Raises:
        TypeError: for what is no loaded decoder.
        ValueError: for another family, windows, rotations that change with the length, kernels without such a mask,
            and too few layers.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"`model` must be a model of transformers (got {type(model).__name__}). Load it with "
            "`AutoModelForCausalLM`, and merge adapters into it."
        )
    name, config = type(model).__name__, text_config(model.config)
    family = getattr(config, "model_type", None)
    if isinstance(model, D3LLMGenerationMixin) or family not in FAMILIES or not name.endswith("ForCausalLM"):
        raise ValueError(
            f"`model` must be a causal language model of {', '.join(FAMILIES)} (got {name} of {family!r}). A "
            "diffusion model decodes with `model.generate`; other families have no head of EAGLE-3 here."
        )
    limit = limited_reach(model)
    if limit is not None or not getattr(config, "is_causal", True):
        raise ValueError(
            f"`model` must attend to all earlier tokens and no later ones (got {limit or 'is_causal=False'}). Take a "
            "checkpoint without windows."
        )
    rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if rotation not in PLAIN_ROTATIONS:
        raise ValueError(
            f"`rope_type` of `model` must be one of {PLAIN_ROTATIONS[1:]} (got {rotation!r}): with others, positions "
            "turn by the length of a forward, and a tree would be another text. Take a checkpoint without it."
        )
    kernel = getattr(model.config, "_attn_implementation", None)
    if kernel not in KERNELS:
        raise ValueError(
            f"`attn_implementation` of `model` must be one of {KERNELS} (got {kernel!r}, which takes no mask of a "
            "tree). Load the model with `attn_implementation='sdpa'`."
        )
    layers = config.num_hidden_layers
    if layers < 7:  # from here on the three differ
        raise ValueError(
            f"`model` must have at least 7 layers, of which EAGLE-3 reads three (got {layers}). Take a larger target."
        )


def check_head(model: Any, head: Any) -> None:
    """Refuses a head of another target.

    Raises:
        TypeError: for what is no head.
        ValueError: for sizes that do not fit.
    """
    config = text_config(model.config)
    if not isinstance(head, Eagle3Head):
        raise TypeError(f"`head` must be an Eagle3Head (got {type(head).__name__}). Load it with `from_pretrained`.")
    for title, ours, theirs in (
        ("hidden size", head.config.target_hidden_size, config.hidden_size),
        ("vocabulary", head.config.vocab_size, config.vocab_size),
    ):
        if ours != theirs:
            raise ValueError(
                f"`head` must be made for the {title} of `model`, {theirs} (got {ours}). Take the head of this target."
            )
    if head.embed_tokens is None and head.config.hidden_size != config.hidden_size:
        raise ValueError(
            f"`head` must have an embedding of its own where it is not as wide as `model`, {config.hidden_size} (got "
            f"{head.config.hidden_size}). Build it with `own_embedding=True`."
        )


__all__ = ["FAMILIES", "KERNELS", "Target", "check_head", "check_target", "feature_layers"]
