"""What the decoder asks of a model: a few attributes, and the one method through which it calls the forward."""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils.generic import is_flash_attention_requested

from .cache import SlotCache


@lru_cache
def _parameters(forward: Callable) -> tuple[frozenset[str], bool]:
    """Names of the parameters of a forward, and whether it takes any others."""
    parameters = inspect.signature(forward).parameters.values()
    return frozenset(p.name for p in parameters), any(p.kind is p.VAR_KEYWORD for p in parameters)


if TYPE_CHECKING:  # what it is mixed into
    from torch.nn import Module
else:
    Module = object


class CanvasContract(Module):
    """The contract between the decoder and a model; [`canvas_logits`] states it. What a class may set:

    Attributes:
        logit_shift (`int`): 0 where logits row i predicts token i, 1 where it predicts token i + 1.
        supports_position_mask (`bool`): `forward` takes `logits_to_keep` as a bool mask `(B, Q)` and returns logits
            `(n, V)` of the marked positions. Without it the head runs on every position of the forward.
        supports_position_index (`bool`): `forward` takes `logits_to_keep` as places `(B, K)` as well and returns
            `(B, K, V)`; used where forwards have static shapes (`compile_config`).
        supports_slot_cache (`bool`): `forward` takes `past_key_values` and attends to all that its `update` returns.
    """

    logit_shift = 0
    supports_position_mask = False
    supports_position_index = False
    supports_slot_cache = False
    config: Any
    device: torch.device

    @property
    def position_offset(self) -> int:
        """Position id of a text's first token: 0, or the one behind the padding row of the table of positions.

        (RoBERTa and its kin count from `padding_idx + 1`.) A class may set a plain number instead.
        """
        for name, module in self.named_modules():
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
                return int(module.padding_idx) + 1
        return 0

    def canvas_logits(
        self, inputs: dict[str, Any], wanted: torch.Tensor, cache: SlotCache | None = None, **model_kwargs
    ) -> torch.Tensor:
        """Runs `forward` over Q slots of a batch of canvases and returns the logits of the wanted ones.

        The decoder reaches a model in no other way, so a class that overrides this needs no `forward` of a given form.
        B rows, L slots a canvas (prompt and answer; with `suffix_length` the first L of it, as many as the furthest
        row sees), Q slots of this forward (L without a cache), V tokens:

        * every slot attends to every slot of its row that `attention_mask` leaves in, later ones included;
        * an undecided slot holds the mask token, `config.mask_token_id` unless the call names another one;
        * the logits are finite, and row i is about slot i + `logit_shift`;
        * nothing is kept between calls but what lies in `cache`.

        Args:
            inputs: `input_ids` `(B, Q)` or `inputs_embeds` `(B, Q, D)`; `position_ids` `(B, Q)`, counted from the
                first unpadded slot on, `position_offset` being the first; `attention_mask` `(B, L)` bool, `None` where
                nothing is to be left out (padding, and what a row does not see yet); `token_type_ids` `(B, Q)` where
                the caller passed them. What the signature of `forward` does not take is left out.
            wanted (`(B, Q)` bool): the n slots whose logits are wanted.
            cache: holds a key and a value of all L slots: those of the Q slots are overwritten by this forward, and
                the attention is over all of them. `None` without a cache.
            model_kwargs: what the caller of `generate` passed beyond the decoder's own arguments.

        Returns:
            `(n, V)` logits, in the order of `wanted.nonzero()`.
        """
        inputs = inputs | model_kwargs | {"use_cache": cache is not None}
        if inputs.get("attention_mask") is not None:  # numbers, as tokenizers make them: some forwards compute with it
            inputs["attention_mask"] = inputs["attention_mask"].long()
        if cache is not None:
            inputs["past_key_values"] = cache
        if self.supports_position_mask:
            inputs["logits_to_keep"] = wanted
        logits = self(**self.accepted(inputs)).logits
        return logits if self.supports_position_mask else logits[wanted]

    def accepted(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The entries of `inputs` that `forward` has a parameter for, all of them where it takes any keyword."""
        names, takes_any = _parameters(type(self).forward)
        return {name: value for name, value in inputs.items() if takes_any or name in names}

    def check_contract(self, attention_mask: torch.Tensor | None, cached: bool, ragged: bool = False) -> None:
        """What can be known of the contract without a forward, before the first one.

        Args:
            attention_mask (`(B, L)` bool, *optional*): of the canvases.
            cached: whether the decoder wants to keep keys and values.
            ragged: whether rows or drafts of one forward may see different numbers of slots, as a mask has to say.

        Raises:
            ValueError: for causal attention, for a cache that the model cannot use, for padded rows where `forward`
                takes no `position_ids` or flash-attention would read them together with a cache, and for ragged ones
                where a mask cannot say so.
        """
        name = type(self).__name__
        if self._is_causal():
            raise ValueError(
                f"Attention must not be causal: every position of a canvas sees all others (got {name}, whose config "
                "describes a decoder). Set `model.config.is_causal = False`, and train the model so."
            )
        if cached and not self.supports_slot_cache:
            raise ValueError(
                f'`kv_cache` must be "none" for {name} (got a cache): its forward is not known to attend to the keys '
                "of earlier forwards. Leave it unset, or set `supports_slot_cache = True` on a class whose forward "
                "hands `past_key_values` to every attention layer."
            )
        reads_windows = not (cached and is_flash_attention_requested(self.config))
        takes_positions = self.accepted({"position_ids": None})
        if ragged and not self.accepted({"attention_mask": None}):
            raise ValueError(
                f"`suffix_length` needs an `attention_mask` where rows see different numbers of positions (got {name},"
                " whose forward takes none). Generate prompts one by one, or leave it unset."
            )
        if ragged and not reads_windows:
            raise ValueError(
                "`suffix_length` of a batch with a cache needs another attention implementation (got "
                f"{self.config._attn_implementation!r}, which masks only what lies before a row's text). Load the "
                'model with `attn_implementation="sdpa"`, pass `kv_cache="none"`, or generate prompts one by one.'
            )
        if attention_mask is None or (reads_windows and takes_positions) or attention_mask.all():
            return
        if not reads_windows:  # of a window's rows it would leave out those that the last slots' padding names
            raise ValueError(
                '`kv_cache` must be "none" where flash-attention decodes a padded batch (got attention implementation '
                f"{self.config._attn_implementation!r} and zeros in `attention_mask`). Load the model with "
                '`attn_implementation="sdpa"`, or generate prompts of one length together.'
            )
        raise ValueError(
            f"`attention_mask` must not hold zeros for {name}: its forward takes no `position_ids`, so padding "
            "would move the text. Generate prompts of one length together."
        )

    def _is_causal(self) -> bool:
        """Whether config or modules say that a position does not see later ones.

        `config.is_causal=False` overrides the modules: transformers hands it to masks and attention functions.
        """
        config = self.config.get_text_config()
        if getattr(config, "is_causal", None) is False:
            return False
        if getattr(config, "is_decoder", False):
            return True
        return any(getattr(module, "is_causal", False) is True for module in self.modules())


__all__ = ["CanvasContract"]
