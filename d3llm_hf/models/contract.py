"""What the decoder asks of a model: a few attributes, and the one method through which it calls the forward."""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils.generic import is_flash_attention_requested

from .cache import SlotCache
from .cache_name import CACHE, CACHE_NAMES
from .locality import limited_reach
from .modeling_common import dense_mask
from .probes import evaluating, reads_padding
from .text_config import text_config, text_setting
from .topology import Traits
from .wrappers import marked_logits, wrapper_of


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
        supports_slot_cache (`bool`): `forward` takes a `cache` (or `past_key_values`) and attends to all that
            its `update` returns.
        supports_padding (`bool`, *optional*): `forward` attends to nothing where `attention_mask` is 0. Where a class
            does not say, short forwards find out when a batch is padded.
        block_alignment (`str`, *optional*): where the blocks of a block-causal model begin, as in [`Topology`]; their
            length is `config.block_length`. Where a class does not say, every position sees all others.
        default_method (`str`, *optional*): the decoding method where neither a call nor a checkpoint names one.
        counts_positions (`bool`): without `position_ids`, `forward` counts positions from the first slot that its
            `attention_mask` leaves in; used where a wrapper drops them.
    """

    logit_shift = 0
    counts_positions = False
    supports_position_mask = False
    supports_position_index = False
    supports_slot_cache = False
    supports_padding: bool | None = None
    block_alignment: str | None = None
    default_method: str | None = None
    config: Any
    device: torch.device
    dtype: torch.dtype

    @property
    def traits(self) -> Traits:
        """What the settings of decoding have to know of the model."""
        return Traits.of(self, self.config)

    @property
    def max_positions(self) -> int | None:
        """Tokens that a text may have, `None` where nothing limits them (as XLNet's config says by -1)."""
        longest = text_setting(self.config, "max_position_embeddings")
        return None if longest is None or longest < 1 else longest - self.position_offset

    @property
    def position_offset(self) -> int:
        """Position id of a text's first token: 0, or the one behind the padding row of the table of positions.

        (RoBERTa and its kin count from `padding_idx + 1`.) A class may set a plain number instead.
        """
        for name, module in self.named_modules():
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
                return int(module.padding_idx) + 1
        return 0

    @property
    def cache_name(self) -> str | None:
        """By which name `forward` takes a cache: the first that it has a parameter for, or none."""
        names, takes_any = self._takes()
        return next((name for name in CACHE_NAMES if name in names), CACHE if takes_any else None)

    def canvas_logits(
        self, inputs: dict[str, Any], wanted: torch.Tensor, cache: SlotCache | None = None, **model_kwargs
    ) -> torch.Tensor:
        """Runs `forward` over Q slots of a batch of canvases and returns the logits of the wanted ones.

        The decoder reaches a model in no other way, so a class that overrides this needs no `forward` of a given form.
        B rows, L slots a canvas (prompt and answer; with `suffix_length` the first L of it, as many as the furthest
        row sees), Q slots of this forward (L without a cache), V tokens:

        * every slot attends to every slot of its row that `attention_mask` leaves in, later ones included;
          with block-causal attention L is what the row's open blocks reach, and a mask for each slot says what it
          sees where not all see the same; with `"wino"` Q and L count the slots of a shadow block as well, which lie
          behind the canvas, have positions of slots of the canvas, and are seen by one another alone;
        * an undecided slot holds the mask token, `config.mask_token_id` unless the call names another one;
        * the logits are finite, and row i is about slot i + `logit_shift`;
        * nothing is kept between calls but what lies in `cache`.

        Args:
            inputs: `input_ids` `(B, Q)` or `inputs_embeds` `(B, Q, D)`; `position_ids` `(B, Q)`, counted from the
                first unpadded slot on, `position_offset` being the first; `attention_mask` `(B, L)` bool, or `(B, 1,
                Q, L)` of block-causal attention and shadow blocks, `None` where nothing is to be left out (padding,
                what a row does not see yet, later blocks); `token_type_ids` `(B, Q)` where the caller passed them.
                What the signature of `forward` does not take is left out.
            wanted (`(B, Q)` bool): the n slots whose logits are wanted.
            cache: holds a key and a value of all L slots: those of the Q slots are overwritten by this forward, and
                the attention is over all of them. `None` without a cache.
            model_kwargs: what the caller of `generate` passed beyond the decoder's own arguments.

        Returns:
            `(n, V)` logits, in the order of `wanted.nonzero()`.
        """
        inputs = inputs | model_kwargs | {"use_cache": cache is not None}
        wrapper = wrapper_of(self)
        if wrapper is not None:  # a learnt prompt, which its forward puts in front; it has inputs of its own
            own = {"task_ids": inputs["task_ids"][:1]} if "task_ids" in inputs else {}  # one for all: `check_wrapping`
            return marked_logits(wrapper, self.accepted(inputs) | own, wanted)
        mask = inputs.get("attention_mask")
        if mask is not None and mask.ndim == 4:
            inputs["attention_mask"] = dense_mask(mask, self.dtype, text_config(self.config)._attn_implementation)
        elif mask is not None:  # numbers, as tokenizers make them: some forwards compute with it
            inputs["attention_mask"] = mask.long()
        if cache is not None:
            inputs[self.cache_name or CACHE] = cache
        return marked_logits(self, self.accepted(inputs), wanted)

    def text_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """What decoding scores in place of `(n, V)` logits, which it may overwrite, guidance included.

        A class whose vocabulary holds more than text sets the rest to -inf here.
        """
        return logits

    def accepted(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The entries of `inputs` that `forward` has a parameter for, all of them where it takes any keyword."""
        names, takes_any = self._takes()
        return {name: value for name, value in inputs.items() if takes_any or name in names}

    def _takes(self) -> tuple[frozenset[str], bool]:
        """Names of the parameters of `forward`, and whether it takes any others."""
        replaced = vars(self).get("forward")  # on the instance, as hooks of accelerate are; the cache would keep it
        return _parameters(type(self).forward) if replaced is None else _parameters.__wrapped__(replaced)

    def check_contract(
        self,
        attention_mask: torch.Tensor | None,
        cached: bool,
        ragged: str | None = None,
        in_blocks: bool = False,
        shadowed: bool = False,
    ) -> None:
        """What can be known of the contract without a forward, before the first one.

        Args:
            attention_mask (`(B, L)` bool, *optional*): of the canvases.
            cached: whether the decoder wants to keep keys and values.
            ragged: the setting for which rows or drafts of one forward may see different numbers of slots, as a mask
                has to say; `None` where they do not.
            in_blocks: whether a mask has to say what each slot sees.
            shadowed: whether slots of a shadow block lie behind the canvas.

        Raises:
            ValueError: for causal attention, for a cache that the model cannot use, for padded rows where `forward`
                takes no `position_ids`, does not read the mask, or flash-attention would read them together with a
                cache, and for ragged ones, blocks or shadow blocks where a mask cannot say so.
        """
        name = type(self).__name__
        implementation = text_config(self.config)._attn_implementation
        if in_blocks and implementation not in ("sdpa", "eager"):
            raise ValueError(
                f"Block-causal attention needs a mask for each position (got attention implementation "
                f'{implementation!r}). Load the model with `attn_implementation="sdpa"` or "eager".'
            )
        if in_blocks and not self.accepted({"attention_mask": None}):
            raise ValueError(
                f"Block-causal attention needs an `attention_mask` (got {name}, whose forward takes none). Decode "
                "with a model that takes one."
            )
        if self._is_causal():
            raise ValueError(
                f"Attention must not be causal: every position of a canvas sees all others (got {name}, whose config "
                "describes a decoder). Set `model.config.is_causal = False`, and train the model so."
            )
        if shadowed:
            self._check_shadowed(name, implementation)
        limit = limited_reach(self) if cached and type(self).canvas_logits is CanvasContract.canvas_logits else None
        if limit is not None:
            raise ValueError(
                f'`kv_cache` must be "none" for {name} (got a cache): {limit} says that some layer does not attend to '
                "all positions, and windows are counted from where a cache ends. Leave it unset."
            )
        if cached and not (self.supports_slot_cache and self.cache_name is not None):
            raise ValueError(
                f'`kv_cache` must be "none" for {name} (got a cache): its forward is not known to attend to the keys '
                "of earlier forwards. Leave it unset, or set `supports_slot_cache = True` on a class whose forward "
                "hands its cache to every attention layer."
            )
        reads_windows = not (cached and is_flash_attention_requested(text_config(self.config)))
        takes_positions = self.accepted({"position_ids": None})
        takes_mask = self.accepted({"attention_mask": None})
        if ragged and not takes_mask:
            raise ValueError(
                f"`{ragged}` needs an `attention_mask` where rows see different numbers of positions (got {name},"
                " whose forward takes none). Generate prompts one by one, or leave it unset."
            )
        if ragged and not reads_windows:
            raise ValueError(
                f"`{ragged}` of a batch with a cache needs another attention implementation (got "
                f"{self.config._attn_implementation!r}, which masks only what lies before a row's text). Load the "
                'model with `attn_implementation="sdpa"`, pass `kv_cache="none"`, or generate prompts one by one.'
            )
        padded = attention_mask is not None and not attention_mask.all()
        if not padded and not ragged:
            return
        if takes_mask and takes_positions and not self._reads_padding():
            hiding = "attention_mask" if padded else ragged
            raise ValueError(
                f"`{hiding}` must not hide positions from {name}: its forward sees them, or places a text otherwise "
                f"behind them. Generate prompts of one length together, without `{ragged or 'suffix_length'}`, or set "
                "`supports_padding = True` on the class if that is not so."
            )
        if not padded or (reads_windows and takes_positions and takes_mask):
            return
        if not reads_windows:  # of a window's rows it would leave out those that the last slots' padding names
            raise ValueError(
                '`kv_cache` must be "none" where flash-attention decodes a padded batch (got attention implementation '
                f"{self.config._attn_implementation!r} and zeros in `attention_mask`). Load the model with "
                '`attn_implementation="sdpa"`, or generate prompts of one length together.'
            )
        lacks = "`position_ids`, so padding would move the text"
        if takes_positions:
            lacks = "`attention_mask`, so padding would be text"
        raise ValueError(
            f"`attention_mask` must not hold zeros for {name}: its forward takes no {lacks}. Generate prompts of one "
            "length together."
        )

    def _check_shadowed(self, name: str, implementation: str) -> None:
        """Slots that lie elsewhere than in their places need positions, and a mask for each slot."""
        if implementation not in ("sdpa", "eager"):
            raise ValueError(
                "A shadow block needs a mask for each position (got attention implementation "
                f'{implementation!r}). Load the model with `attn_implementation="sdpa"` or "eager".'
            )
        lacking = [taken for taken in ("position_ids", "attention_mask") if not self.accepted({taken: None})]
        if lacking:
            raise ValueError(
                f"A shadow block needs `position_ids` and an `attention_mask` (got {name}, whose forward takes no "
                f'`{lacking[0]}`). Choose another `decoding_method` than "wino".'
            )
        limit = limited_reach(self) if type(self).canvas_logits is CanvasContract.canvas_logits else None
        if limit is not None:
            raise ValueError(
                f"A shadow block needs layers that attend to all positions (got {name}, of whose layers {limit} says "
                'that some do not). Choose another `decoding_method` than "wino".'
            )

    def _reads_padding(self) -> bool:
        """What the class says, or a probe finds; granted where other processes would wait for its forward."""
        if self.supports_padding is not None:
            return self.supports_padding
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            return True
        with evaluating(self):
            return reads_padding(self, text_setting(self.config, "mask_token_id"))

    def _is_causal(self) -> bool:
        """Whether config or modules say that a position does not see later ones.

        `config.is_causal=False` overrides the modules: transformers hands it to masks and attention functions.
        """
        config = text_config(self.config)
        if getattr(config, "is_causal", None) is False:
            return False
        if getattr(config, "is_decoder", False):
            return True
        return any(getattr(module, "is_causal", False) is True for module in self.modules())


__all__ = ["CanvasContract"]
