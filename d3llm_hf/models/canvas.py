"""The canvas of a batch (left-padded prompts, then the answer region) and how the model is run over it."""

from dataclasses import dataclass, field
from typing import Any

import torch

from .cache import SlotCache
from .decoding import Rules, State
from .modeling_common import positions_of


@dataclass
class Canvas:
    """What stays the same while the answer is decoded. B rows, P prompt slots, N new tokens, L = P + N slots.

    Attributes:
        prompt (`(B, P)` long): token ids; mask tokens stand in where the prompt came as embeddings.
        prompt_embeds (`(B, P, D)`, *optional*): embeddings of the prompt.
        token_types (`(B, L)` long, *optional*): the prompt's token types; the answer continues the last one.
        new_length: N.
        mask (`(B, L)` bool, *optional*): False on padding; `None` where there is none, which keeps fast kernels.
        positions (`(B, L)` long): position of each slot, counted from the first unpadded one.
        first (`(B,)` long): first unpadded slot.
        mask_token_id, fill_token_id: of an undecided position, and of what follows a stop token.
        model_kwargs: further arguments of the model's forward.
        computed (`(B,)` long): positions pushed through the model so far.
    """

    prompt: torch.Tensor
    new_length: int
    mask: torch.Tensor | None
    positions: torch.Tensor
    first: torch.Tensor
    mask_token_id: int
    fill_token_id: int | None
    computed: torch.Tensor
    prompt_embeds: torch.Tensor | None = None
    token_types: torch.Tensor | None = None
    model_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        """Rows still being decoded."""
        return self.prompt.shape[0]

    @property
    def prompt_length(self) -> int:
        """P, padding included."""
        return self.prompt.shape[1]

    @property
    def length(self) -> int:
        """L = P + N."""
        return self.prompt_length + self.new_length

    @classmethod
    def of_prompt(cls, model, input_ids: torch.Tensor, generation_config, model_kwargs: dict[str, Any]) -> "Canvas":
        """The canvas of what `GenerationMixin.generate` prepared.

        Raises:
            ValueError: without a mask token, for a right-padded prompt, or beyond the model's positions.
        """
        mask_token_id = generation_config.mask_token_id
        if mask_token_id is None:
            mask_token_id = getattr(model.config, "mask_token_id", None)
        if mask_token_id is None:
            raise ValueError(
                "`mask_token_id` must name the token of an undecided position (got None). Set it in the config "
                "or pass it to `generate`; a model without a mask token cannot be decoded this way."
            )
        known = {"attention_mask", "position_ids", "inputs_embeds", "past_key_values", "use_cache", "logits_to_keep"}
        extra = {name: value for name, value in model_kwargs.items() if name not in known and value is not None}
        token_types = extra.pop("token_type_ids", None)

        new_length = generation_config.max_length - input_ids.shape[1]
        prompt, embeds = input_ids, model_kwargs.get("inputs_embeds")
        if embeds is not None:
            prompt = torch.full(embeds.shape[:2], mask_token_id, dtype=torch.long, device=embeds.device)
        length = prompt.shape[1] + new_length
        offset, longest = model.position_offset, getattr(model.config, "max_position_embeddings", None)
        longest = None if longest is None else longest - offset
        if longest is not None and length > longest:
            raise ValueError(
                f"Prompt and `max_new_tokens` must fit into the model's {longest} positions (got {prompt.shape[1]} + "
                f"{new_length} = {length}). Shorten one of them."
            )

        mask = model_kwargs.get("attention_mask")
        seen = torch.ones_like(prompt) if mask is None else mask.to(prompt.device)
        if mask is not None and prompt.shape[1] and ((seen[:, -1] == 0) & seen.any(1)).any():
            raise ValueError(
                "`attention_mask` must be left-padded: the answer continues the last column (got zeros at the end of "
                'a row that has a prompt). Tokenize with `padding_side="left"`.'
            )
        seen = torch.cat([seen, seen.new_ones(prompt.shape[0], new_length)], dim=1)
        if token_types is not None:
            following = token_types[:, -1:] if token_types.shape[1] else token_types.new_zeros(len(prompt), 1)
            token_types = torch.cat([token_types, following.expand(-1, new_length)], dim=1)
        fill = generation_config._pad_token_tensor
        return cls(
            prompt=prompt,
            new_length=new_length,
            mask=None if mask is None else seen.bool(),
            positions=positions_of(seen) + offset,
            first=seen.bool().long().argmax(1),
            mask_token_id=mask_token_id,
            fill_token_id=None if fill is None else int(fill),
            computed=torch.zeros_like(prompt[:, :1].sum(1)),
            prompt_embeds=embeds,
            token_types=token_types,
            model_kwargs=extra,
        )

    def select(self, keep: torch.Tensor) -> None:
        """Keeps the rows with the `(B',)` indices `keep`."""
        for name in ("prompt", "mask", "positions", "first", "computed", "prompt_embeds", "token_types"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value[keep])

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
        start: torch.Tensor,
        where: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Runs the model once and returns the logits of the candidates.

        Args:
            cache: the keys of the slots that are not recomputed; without one the whole canvas is.
            start (`(B,)`): first slot of each row's window; a window ends with the canvas.
            where: rows and columns `(n,)` of the candidates.

        Returns:
            `(n, V)` logits, those of the slot that predicts each candidate.
        """
        row, column = where
        # 1. The slot that predicts a candidate; where nothing precedes it, its own.
        slot = torch.maximum(self.prompt_length + column - rules.shift, self.first[row])

        # 2. The window: one slot earlier under a shift, never padding. Rows with a shorter window repeat its first
        #    slot: the same token at the same position gives the same key, and the window stays the canvas's end.
        low, slots = 0, slice(None)
        if cache is not None:
            start = torch.maximum(start - rules.shift, self.first)
            low, high = (int(edge) for edge in torch.stack(start.aminmax()).tolist())
            slots = slice(low, self.length)
            if low != high:
                slots = torch.arange(low, self.length, device=start.device).maximum(start[:, None])
            cache.at(slots)
            self.computed += self.length - start
        else:
            self.computed += (self.length - self.first) * (2 if rules.cfg_scale else 1)

        # 3. The forward, and the head only where a candidate is decided.
        wanted = torch.zeros(self.batch, self.length - low, dtype=torch.bool, device=slot.device)
        wanted[row, slot - low] = True
        inputs = self._inputs(model, state, slots)
        if rules.cfg_scale:
            inputs, wanted = self._with_unprompted(model, state, inputs), torch.cat([wanted, wanted])
        logits = model.canvas_logits(inputs, wanted, cache, **self.model_kwargs)
        if rules.cfg_scale:
            prompted, unprompted = logits.chunk(2)
            logits = unprompted + (rules.cfg_scale + 1) * (prompted - unprompted)

        # 4. Two candidates may share a slot: the first two of an empty prompt under a shift.
        if logits.shape[0] != row.shape[0]:
            wanted = wanted[: self.batch]
            logits = logits[wanted.flatten().cumsum(0)[row * wanted.shape[1] + slot - low] - 1]
        return logits

    def _inputs(self, model, state: State, slots: slice | torch.Tensor) -> dict[str, Any]:
        """Tokens (or embeddings), positions and mask of a forward over `slots`."""

        def pick(table: torch.Tensor) -> torch.Tensor:
            if isinstance(slots, slice):
                return table[:, slots]
            return table.take_along_dim(slots if table.ndim == 2 else slots[..., None], dim=1)

        inputs = {"position_ids": pick(self.positions), "attention_mask": self.mask}
        if self.token_types is not None:
            inputs["token_type_ids"] = pick(self.token_types)
        ids = torch.cat([self.prompt, state.tokens], dim=1)
        if self.prompt_embeds is None:
            return inputs | {"input_ids": pick(ids)}
        embeds = model.get_input_embeddings()(ids)
        embeds = torch.cat([self.prompt_embeds.to(embeds.dtype), embeds[:, self.prompt_length :]], dim=1)
        return inputs | {"inputs_embeds": pick(embeds)}

    def _with_unprompted(self, model, state: State, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch twice: as it is, and with every prompt token masked (classifier-free guidance, LLaDA)."""
        hidden = torch.cat([torch.full_like(self.prompt, self.mask_token_id), state.tokens], dim=1)
        both = {name: None if value is None else torch.cat([value, value]) for name, value in inputs.items()}
        if self.prompt_embeds is None:
            both["input_ids"] = torch.cat([inputs["input_ids"], hidden])
        else:
            both["inputs_embeds"] = torch.cat([inputs["inputs_embeds"], model.get_input_embeddings()(hidden)])
        return both
