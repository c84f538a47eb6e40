"""The canvas of a batch (left-padded text with positions to decide) and how the model is run over it."""

from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from .asides import Aside
from .cache import SlotCache
from .cache_name import CACHE_NAMES
from .decoding import Rules, State
from .layers import packed
from .modeling_common import positions_of
from .prompt_checks import check_tokens
from .text_config import text_setting
from .token_ids import vocabulary_of
from .topology import Topology


# Arguments of `generate` that reach the model through the canvas, or not at all; all others go to its forward.
OWN = frozenset(
    {
        "attention_mask",
        "position_ids",
        "inputs_embeds",
        *CACHE_NAMES,
        "use_cache",
        "logits_to_keep",
        "infill_mask",
    }
)


NOBODYS = 1 << 40
"""The block of a slot that belongs to no row: beyond all others."""


AnyCanvas = TypeVar("AnyCanvas", bound="Canvas")


@dataclass
class Canvas:
    """What stays the same while the answer is decoded. B rows, L slots, N positions to decide in the longest row.

    Attributes:
        base (`(B, L)` long): token ids; the mask token where a position is to be decided, or came as an embedding.
        slots (`(B, N)` long): the slot of each position to decide, ascending; L behind a row's last one.
        prompt_length: P, slots before the new tokens, padding included.
        mask (`(B, L)` bool, *optional*): False on padding; `None` where there is none, which keeps fast kernels.
        positions (`(B, L)` long): position of each slot, counted from the first unpadded one.
        first (`(B,)` long): first unpadded slot.
        mask_token_id, fill_token_id: of an undecided position, and of what follows a stop token.
        prompt_embeds (`(B, P, D)`, *optional*): embeddings of the prompt.
        token_types (`(B, L)` long, *optional*): the prompt's token types; the answer continues the last one.
        blocks (`(B, L)` long, *optional*): the block of each slot, which sees those of no later one; beyond all others
            on padding. `None` where every slot sees all.
        offset (`(B,)` long, *optional*): tokens of the prompt in the first block of the answer.
        new_length: tokens that were asked for; the last block may go beyond.
        is_infilling: whether the call asked for positions of the prompt to be decided.
        model_kwargs: further arguments of the model's forward.
        ends (`(B,)` long, *optional*): the slot behind each row's last one; `None` where that is L for all of them.
    """

    base: torch.Tensor
    slots: torch.Tensor
    prompt_length: int
    mask: torch.Tensor | None
    positions: torch.Tensor
    first: torch.Tensor
    mask_token_id: int
    fill_token_id: int | None
    prompt_embeds: torch.Tensor | None = None
    token_types: torch.Tensor | None = None
    is_infilling: bool = False
    blocks: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    new_length: int = 0
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    ends: torch.Tensor | None = None

    @property
    def batch(self) -> int:
        """Rows still being decoded."""
        return self.base.shape[0]

    @property
    def length(self) -> int:
        """L."""
        return self.base.shape[1]

    @classmethod
    def of_prompt(
        cls,
        model,
        input_ids: torch.Tensor,
        generation_config,
        model_kwargs: dict[str, Any],
        topology: Topology | None = None,
    ) -> "Canvas":
        """The canvas of what `GenerationMixin.generate` prepared.

        Args:
            topology: of a block-causal call, whose canvas goes to the end of a block.

        Raises:
            ValueError: without a mask token, for a right-padded prompt, beyond the model's positions, for an
                `infill_mask` that does not fit the prompt, or for infilling with a `suffix_length`, an adaptive
                `length` or a `topology`.
        """
        # 1. Text and length
        mask_token_id = generation_config.mask_token_id
        if mask_token_id is None:
            mask_token_id = text_setting(model.config, "mask_token_id")
        if mask_token_id is None:
            raise ValueError(
                "`mask_token_id` must name the token of an undecided position (got None). Set it in the config "
                "or pass it to `generate`; a model without a mask token cannot be decoded this way."
            )
        extra = {name: value for name, value in model_kwargs.items() if name not in OWN and value is not None}
        token_types = extra.pop("token_type_ids", None)

        new_length = generation_config.max_length - input_ids.shape[1]
        prompt, embeds = input_ids, model_kwargs.get("inputs_embeds")
        if embeds is not None:
            prompt = torch.full(embeds.shape[:2], mask_token_id, dtype=torch.long, device=embeds.device)
        length = prompt.shape[1] + new_length
        check_tokens(prompt, vocabulary_of(model.config))

        # 2. Padding
        mask = model_kwargs.get("attention_mask")
        seen = torch.ones_like(prompt) if mask is None else mask.to(prompt.device)
        if mask is not None and prompt.shape[1] and ((seen[:, -1] == 0) & seen.any(1)).any():
            raise ValueError(
                "`attention_mask` must be left-padded: the answer continues the last column (got zeros at the end of "
                'a row that has a prompt). Tokenize with `padding_side="left"`.'
            )
        if mask is not None and bool(seen.all()):  # a host sync, for a mask would cost one in every forward
            mask = None
        holes = holes_of(input_ids, seen, mask_token_id, generation_config, model_kwargs)
        if holes is not None and generation_config.suffix_length is not None:
            raise ValueError(
                "`suffix_length` cannot be combined with infilling: a hole is filled by the text behind it, which it "
                f"would hide (got {generation_config.suffix_length}). Leave it unset."
            )
        if holes is not None and generation_config.length == "adaptive":
            raise ValueError(
                '`length="adaptive"` cannot be combined with infilling: a hole is as long as it was made (got both). '
                "Leave `length` unset."
            )
        if holes is not None and topology is not None:
            raise ValueError(
                "`infill_mask` and `infill` need a model that sees the text behind a hole (got block-causal attention "
                f"with blocks of {topology.block_length}). Infill with LLaDA or Dream, and a method without blocks of "
                "its own."
            )
        given, asked = seen.sum(1), new_length
        if topology is not None:
            whole = topology.whole(given, new_length)
            new_length = int(whole.max())  # a host sync
            length = prompt.shape[1] + new_length
        longest = model.max_positions
        if longest is not None and length > longest:
            rounded = "" if new_length == asked else f", {asked} to the end of a block,"
            raise ValueError(
                f"Prompt and `max_new_tokens` must fit into the model's {longest} positions (got {prompt.shape[1]} + "
                f"{new_length} = {length}{rounded}). Shorten one of them."
            )
        seen = torch.cat([seen, seen.new_ones(prompt.shape[0], new_length)], dim=1)
        if token_types is not None:
            following = token_types[:, -1:] if token_types.shape[1] else token_types.new_zeros(len(prompt), 1)
            token_types = torch.cat([token_types, following.expand(-1, new_length)], dim=1)

        # 3. Positions to decide
        base = torch.cat([prompt, prompt.new_full((prompt.shape[0], new_length), mask_token_id)], dim=1)
        if holes is None:
            slots = torch.arange(prompt.shape[1], length, device=prompt.device).expand(prompt.shape[0], -1)
            if topology is not None:  # rows end where their last block does
                slots = slots.masked_fill(slots - prompt.shape[1] >= whole[:, None], length)
        else:
            base = base.index_put((torch.nn.functional.pad(holes, (0, new_length)),), base.new_tensor(mask_token_id))
            wanted = torch.nn.functional.pad(holes, (0, new_length), value=True)
            count = wanted.sum(1)
            slots = wanted.long().argsort(dim=1, descending=True, stable=True)[:, : int(count.max())]
            column = torch.arange(slots.shape[1], device=slots.device)
            slots = slots.masked_fill(column >= count[:, None], length)
        fill = generation_config._pad_token_tensor
        positions, blocks = positions_of(seen), None
        if topology is not None:
            blocks = topology.blocks(positions, given).masked_fill(seen == 0, length)
        return cls(
            base=base,
            slots=slots,
            prompt_length=prompt.shape[1],
            mask=None if mask is None else seen.bool(),
            positions=positions + model.position_offset,
            first=seen.bool().long().argmax(1),
            mask_token_id=mask_token_id,
            fill_token_id=None if fill is None else int(fill),
            prompt_embeds=embeds,
            token_types=token_types,
            is_infilling=holes is not None,
            blocks=blocks,
            offset=None if topology is None else topology.offset(given),
            new_length=asked,
            model_kwargs=extra,
        )

    def start(self, rules: Rules) -> State:
        """The state before the first forward: every position to decide is undecided."""
        tokens = torch.full_like(self.slots, self.mask_token_id)
        return State.start(tokens, self.slots < self.length, rules, self.slots, self.offset)

    @property
    def has_earlier_blocks(self) -> torch.Tensor:
        """Rows `(B,)` of a block-causal call whose prompt fills blocks before the first one of the answer."""
        return self.blocks.gather(1, self.slots[:, :1])[:, 0] > 0 if self.blocks is not None else self.first < 0

    def only_stores(self, state: State) -> torch.Tensor:
        """Rows `(B,)` whose forward decides only the token behind what it stores; none where nothing is before it."""
        return state.alone & ((self.first < self.prompt_length) | (state.open_count > 1))

    @property
    def may_stop(self) -> torch.Tensor:
        """Positions `(B, N)` at which a stop token ends the row: new tokens, not those between given text."""
        return (self.slots >= self.prompt_length) & (self.slots < self.length)

    def fill(self, tokens: torch.Tensor) -> torch.Tensor:
        """The whole text `(B, L)` with `(B, N)` tokens at the positions to decide."""
        if not self.is_infilling:
            return torch.cat([self.base[:, : self.prompt_length], tokens], dim=1)
        return torch.nn.functional.pad(self.base, (0, 1)).scatter(1, self.slots, tokens)[:, :-1]

    def select(self: AnyCanvas, index: torch.Tensor) -> AnyCanvas:
        """The canvas of the rows with the `(B',)` indices `index`; a row may be taken several times."""
        names = (
            "base", "slots", "mask", "positions", "first", "prompt_embeds", "token_types", "blocks", "offset", "ends",
        )  # fmt: skip
        taken = {name: value[index] for name in names if (value := getattr(self, name)) is not None}
        return replace(self, **taken)

    @property
    def widths(self) -> tuple[int, int]:
        """Slots of the longest prompt, padding left out, and positions to decide of the longest answer."""
        answers = (self.slots < self.length).sum(1)
        given = (self.prompt_length - self.first).clamp_min(0)
        prompt, answer = torch.stack([given.amax(), answers.amax()]).tolist()  # a host sync
        return prompt, answer

    def moved(self, prompt_length: int, columns: int) -> "Canvas":
        """The same texts in a canvas for prompts and answers of other lengths, with another padding.

        Not of infilling, embeddings or token types.

        Args:
            prompt_length: slots before the answers, at least as many as any row's prompt.
            columns: positions to decide, at least as many as any row's.
        """
        left, right = prompt_length - self.prompt_length, columns - self.slots.shape[1]
        length, pad = prompt_length + columns, torch.nn.functional.pad
        seen = torch.ones_like(self.base, dtype=torch.bool) if self.mask is None else self.mask
        ends = torch.full_like(self.first, self.length) if self.ends is None else self.ends
        slots = torch.where(self.slots < self.length, self.slots + left, length)
        return replace(
            self,
            base=pad(self.base, (left, right), value=self.mask_token_id),
            slots=pad(slots, (0, right), value=length),
            prompt_length=prompt_length,
            mask=pad(seen, (left, right), value=False),
            positions=pad(self.positions, (left, right)),
            first=self.first + left,
            blocks=None if self.blocks is None else pad(self.blocks, (left, right), value=NOBODYS),
            ends=ends + left,
        )

    def beside(self, other: "Canvas") -> "Canvas":
        """The rows of two canvases of the same lengths, both of them moved."""
        joined: dict[str, Any] = {}
        for name in ("base", "slots", "mask", "positions", "first", "blocks", "offset", "ends"):
            tables = getattr(self, name), getattr(other, name)
            joined[name] = None if tables[0] is None else torch.cat(tables)
        if bool(joined["mask"].all()):  # a host sync, for a mask would cost one in every forward
            joined["mask"] = None
        return replace(self, **joined)

    def idle_inputs(self) -> dict[str, Any]:
        """Inputs of a forward whose result nobody needs, for a process that only keeps collectives going."""
        ids = torch.full((1, 1), self.mask_token_id, dtype=torch.long, device=self.positions.device)
        return {"input_ids": ids, "use_cache": False}

    def forward(
        self,
        model,
        state: State,
        rules: Rules,
        cache: SlotCache | None,
        recompute: torch.Tensor | None,
        where: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the model once and returns the logits of the candidates.

        Args:
            cache: the keys of the slots that are not recomputed; without one the whole canvas is.
            recompute (`(B, L)` bool, *optional*): slots whose keys and values are computed anew.
            where: rows and columns `(n,)` of the candidates, and of decided positions that are asked about.

        Returns:
            `(n, V)` logits, those of the slot that predicts each candidate (with a shadow block those of decided
            positions come from there), and `(B,)` positions computed.
        """
        # 1. The slot that predicts a candidate.
        row, column = where
        slot = self.predicting(row, column, rules)

        # 2. The window, and how far the forward sees.
        end, seen, mask = self._seen(state, rules)
        slots: slice | torch.Tensor
        if cache is None or recompute is None:
            slots, index, width = slice(0, seen), slot, seen
            computed = (end - self.first) * (2 if rules.cfg_scale else 1)
        else:
            recompute = self.needed(recompute, row, slot, end[:, None])
            slots, index, width = window_of(recompute, row, slot)
            computed = recompute.sum(1)
            cache.at(slots, seen)

        # 3. The shadow block, which answers for what is decided.
        aside = None
        if rules.shadow_block:
            aside = Aside.of_open_block(state, rules, seen)
            index = torch.where(state.unsettled[row, column], width + aside.index(column, row), index)
            width, computed = width + aside.size, computed + aside.real.sum(1) * (2 if rules.cfg_scale else 1)

        # 4. The forward, and the head only where a candidate is decided.
        mask = self._not_of_later_blocks(mask, slots, end, seen)
        wanted = torch.zeros(self.batch, width, dtype=torch.bool, device=slot.device)
        wanted[row, index] = True
        inputs = self._inputs(model, state, slots) | {"attention_mask": mask}
        if rules.cfg_scale:
            inputs, wanted = self._with_unprompted(model, state, inputs), torch.cat([wanted, wanted])
        if aside is not None:
            embed = model.get_input_embeddings()
            inputs = aside.joined(inputs, self.positions, self.token_types, self.mask_token_id, embed)
        logits = model.canvas_logits(inputs, wanted, cache, **self.model_kwargs)
        if rules.cfg_scale:
            prompted, unprompted = logits.chunk(2)
            logits = unprompted + (rules.cfg_scale + 1) * (prompted - unprompted)

        # 5. Two candidates may share a slot: the first two of an empty prompt under a shift. A shadow block is last.
        if logits.shape[0] != row.shape[0] or aside is not None:
            wanted = wanted[: self.batch]
            logits = logits[wanted.flatten().cumsum(0)[row * wanted.shape[1] + index] - 1]
        return logits, computed

    def predicting(self, row: torch.Tensor, column: torch.Tensor, rules: Rules) -> torch.Tensor:
        """The slot `(n,)` that predicts each candidate; where nothing precedes it, its own."""
        return torch.maximum(self.slots[row, column] - rules.shift, self.first[row])

    def needed(
        self, recompute: torch.Tensor, row: torch.Tensor, slot: torch.Tensor, end: torch.Tensor | int
    ) -> torch.Tensor:
        """The marked slots `(B, L)`, never padding nor those from `end` on, always those that predict a candidate."""
        place = torch.arange(self.length, device=slot.device)
        recompute = recompute & (place >= self.first[:, None]) & (place < end)
        return recompute.index_put((row, slot), recompute.new_tensor(True))

    def _seen(self, state: State, rules: Rules) -> tuple[torch.Tensor, int, torch.Tensor | None]:
        """What a forward sees of the canvas: everything, or so many positions behind a row's last open block.

        Where a row's length finds itself, as much as it has now. Of a block-causal canvas none, since nothing looks at
        them; nor a position that is decided alone, which the one before it predicts, unless none is before it.

        Returns:
            the slots `(B,)` behind what each row sees; S, the largest of them; and the attention mask `(B, S)`, `None`
            where every row sees all S slots.
        """
        limit = torch.full_like(self.first, self.length) if self.ends is None else self.ends
        if rules.length_rule is not None:
            end = self.prompt_length + state.length + state.tail
        elif rules.suffix_length is None and self.blocks is None:
            return limit, self.length, self.mask
        else:
            further = min(rules.suffix_length or 0, self.length)
            end = torch.minimum(self.prompt_length + state.reach(rules) - state.alone.long() + further, limit)
        end = torch.maximum(end, self.first + 1)
        least, seen = torch.stack(end.aminmax()).tolist()  # a host sync
        mask = None if self.mask is None else self.mask[:, :seen]
        if least < seen:
            inside = torch.arange(seen, device=end.device) < end[:, None]
            mask = inside if mask is None else inside & mask
        return end, seen, mask

    def _not_of_later_blocks(
        self, mask: torch.Tensor | None, slots: slice | torch.Tensor, end: torch.Tensor, seen: int
    ) -> torch.Tensor | None:
        """A mask `(B, S)` of keys with what each of Q queries must not see, `(B, 1, Q, S)`.

        As it is where the forward is over the last block that each row sees, which keeps fast kernels.
        """
        if self.blocks is None:
            return mask
        asking = self.blocks[:, slots] if isinstance(slots, slice) else self.blocks.gather(1, slots)
        last = self.blocks.gather(1, end[:, None] - 1)
        if bool((asking >= last).all()):  # a host sync
            return mask
        sees = asking[:, :, None] >= self.blocks[:, None, :seen]
        return (sees if mask is None else sees & mask[:, None])[:, None]

    def _inputs(self, model, state: State, slots: slice | torch.Tensor) -> dict[str, Any]:
        """Tokens (or embeddings) and positions of a forward over `slots`."""

        def pick(table: torch.Tensor) -> torch.Tensor:
            if isinstance(slots, slice):
                return table[:, slots]
            return table.take_along_dim(slots if table.ndim == 2 else slots[..., None], dim=1)

        inputs = {"position_ids": pick(self.positions)}
        if self.token_types is not None:
            inputs["token_type_ids"] = pick(self.token_types)
        ids = self.fill(state.tokens)
        if self.prompt_embeds is None:
            return inputs | {"input_ids": pick(ids)}
        embeds = model.get_input_embeddings()(ids)
        embeds = torch.cat([self.prompt_embeds.to(embeds.dtype), embeds[:, self.prompt_length :]], dim=1)
        return inputs | {"inputs_embeds": pick(embeds)}

    def _with_unprompted(self, model, state: State, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch twice: as it is, and with everything that was given masked (classifier-free guidance, LLaDA)."""
        blank = replace(self, base=torch.full_like(self.base, self.mask_token_id))
        hidden = blank.fill(state.tokens)[:, : inputs["position_ids"].shape[1]]
        both = {name: None if value is None else torch.cat([value, value]) for name, value in inputs.items()}
        if self.prompt_embeds is None:
            both["input_ids"] = torch.cat([inputs["input_ids"], hidden])
        else:
            both["inputs_embeds"] = torch.cat([inputs["inputs_embeds"], model.get_input_embeddings()(hidden)])
        return both


def holes_of(
    input_ids: torch.Tensor,
    seen: torch.Tensor,
    mask_token_id: int,
    generation_config,
    model_kwargs: dict[str, Any],
) -> torch.Tensor | None:
    """Positions `(B, P)` of the prompt that are to be decided, `None` where nobody asked for infilling.

    Raises:
        ValueError, TypeError: for an `infill_mask` of another shape or type, on padding, or that leaves nothing to do.
    """
    holes = model_kwargs.get("infill_mask")
    if holes is None and not generation_config.infill:
        return None
    if model_kwargs.get("inputs_embeds") is not None:
        raise ValueError(
            "`infill_mask` and `infill` need `input_ids` (got `inputs_embeds`). Pass token ids to fill holes in them."
        )
    if holes is None:
        holes = (input_ids == mask_token_id) & seen.bool()
        way_out = f"Put the mask token ({mask_token_id}) where text is missing, or pass `infill_mask`."
    else:
        way_out = "Mark the tokens to be replaced with True."
        if not isinstance(holes, torch.Tensor) or holes.is_floating_point():
            raise TypeError(f"`infill_mask` must be a bool tensor (got {_kind(holes)}). {way_out}")
        holes = holes.to(input_ids.device).bool()
        if holes.shape != input_ids.shape:
            raise ValueError(
                f"`infill_mask` must have the shape of `input_ids`, {tuple(input_ids.shape)} (got "
                f"{tuple(holes.shape)}). {way_out}"
            )
        if (holes & ~seen.bool()).any():
            raise ValueError(f"`infill_mask` must not mark padding (got marks where `attention_mask` is 0). {way_out}")
    if generation_config.max_length == input_ids.shape[1] and not holes.any(1).all():
        raise ValueError(
            f"Every row must have something to decide (got row {int((~holes.any(1)).long().argmax())} without a hole "
            f"and no `max_new_tokens`). {way_out}"
        )
    return holes


def _kind(value: Any) -> str:
    return f"dtype {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__


def window_of(
    recompute: torch.Tensor, row: torch.Tensor, slot: torch.Tensor
) -> tuple[slice | torch.Tensor, torch.Tensor, int]:
    """The tokens of a forward over the marked slots `(B, L)`.

    Returns:
        the slots, a slice where all rows share one, else `(B, Q)`; the places `(n,)` of `slot` among them; and Q.
    """
    length = recompute.shape[1]
    low, count = recompute.long().argmax(1), recompute.sum(1)
    high = length - recompute.flip(1).long().argmax(1)
    rows = torch.stack([low, high, count], dim=1).tolist()  # a host sync: a slice keeps views and fast kernels
    start, end, width = rows[0]
    if end - start == width and all(entry == rows[0] for entry in rows):
        return slice(start, end), slot - start, width
    width = max(entry[2] for entry in rows)
    return packed(recompute, width), (recompute.long().cumsum(1) - 1)[row, slot], width
