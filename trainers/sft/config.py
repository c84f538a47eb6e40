"""Arguments of masked-diffusion supervised fine-tuning."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

from ..common.argument_checks import check_muon_arguments, check_ranges
from ..common.arguments import CarefulArguments


CAUSAL = "causal"
OBJECTIVES = ("masked_diffusion", "d2f", "d2f_labels", CAUSAL)

_RANGES = {
    "max_prompt_length": (1, math.inf),
    "response_length": (1, math.inf),
    "suffix_window": (1, math.inf),
    "block_length": (1, math.inf),
    "min_mask_ratio": (0, 1),
    "mask_ratio_eps": (0, 1),
    "suffix_mask_fraction": (0, 1),
    "muon_learning_rate": (0, math.inf),
    "muon_momentum": (0, 1),
    "muon_weight_decay": (0, math.inf),
}


@dataclass
class MaskedDiffusionSFTConfig(CarefulArguments):
    r"""Configuration of the [`MaskedDiffusionSFTTrainer`].

    All of [`~transformers.TrainingArguments`] applies; below is what this class adds or changes.

    > [!NOTE]
    > Changed defaults: `remove_unused_columns=False`, because the collator reads columns that no model accepts, and
    > `logging_steps=10`.

    > Parameters that control the objective:

        objective (`str`, defaults to `"masked_diffusion"`): What a bidirectional model learns. `"d2f"`: to see blocks,
            with its adapter, as it sees the whole canvas without; answers are then decoded with
            `decoding_method="d2f"`. `"d2f_labels"`: the same with the text as targets, where no adapter is needed.
            `"causal"`: of a causal model of transformers, the next token, for an autoregressive model to compare with.

    > Parameters that control the data:

        max_prompt_length (`int`, defaults to 512): Longest prompt in tokens; longer examples are left out.
        response_length (`int`, defaults to 256): Length of the answer canvas in tokens. Examples with a longer answer
            (its end-of-turn token included) are left out.
        supervise_eos_fill (`bool`, defaults to `True`): Whether the answer is filled up to the canvas with the
            end-of-text token *and the fill is learnt*, as in LLaDA. With `False` the fill is neither masked nor
            attended to, and the model does not learn where to stop early in a longer canvas. A block-causal model
            decides whole blocks, so its fill ends with the answer's last block. A causal model has no canvas: it takes
            `False` alone.
        pad_prompt_to_max (`bool`, defaults to `False`): Pad every prompt to `max_prompt_length` instead of the
            longest one of its batch, which keeps shapes static for `torch_compile`. Rows of a block-causal or causal
            model then have `max_prompt_length + response_length` tokens.
        packing (`bool`, defaults to `False`): Of a block-causal model, put several texts into one row of
            `max_prompt_length + response_length` tokens, as documents that see nothing of each other.
        control_tokens_in_text (`bool`, defaults to `False`): Take text in the data that spells a special token, such
            as the mask, as that token. By default it is the characters it is written with, as in inference
            ([`~d3llm_hf.encode_chat`]); the chat template's own control tokens are tokens in either case.

    > Parameters that control the masks:

        min_mask_ratio (`float`, defaults to 0.0): Smallest mask ratio t; draws below it are raised to it, which
            bounds the loss weight 1/t.
        mask_ratio_eps (`float`, defaults to 1e-3): The eps of the masking probability p = (1 - eps) t + eps.
        stratified_mask_ratio (`bool`, defaults to `False`): Spread the ratios of one batch evenly over (0, 1)
            instead of drawing them independently; each is still uniform, the gradient has less variance.
        suffix_mask_fraction (`float`, defaults to 0.0): Fraction of each batch that gets a *suffix mask* instead:
            everything from a random place of the answer on is masked. These are the states that decoding block by
            block visits, and the only ones in which a computed value cannot be copied from further on.
        suffix_window (`int`, defaults to 8): Number of tokens after the cut of a suffix mask that have a loss.
        block_length (`int`, *optional*): Of a block-causal model, tokens of a block. The config's when unset; another
            one goes into the config, so that the model decodes as it was trained. With D2F's objectives 16 when unset.
        mask_ratio_per_block (`bool`, *optional*): Of a block-causal model, draw a mask ratio for each block and not
            for each text. When unset as its family was trained: `True` for Fast-dLLM v2, `False` for others.
        complementary_masks (`bool`, *optional*): Of a block-causal model, take each text in two views, the second of
            which hides what the first one leaves; every token is then learnt once and weighs the same, in place of
            1/p. When unset as its family was trained: `True` for Fast-dLLM v2, `False` for others.
        label_shift (`int`, *optional*): 0 if logits row i predicts token i (LLaDA), 1 if row i - 1 does (Dream).
            Read from the model's `logit_shift` when unset.

    > Parameters that control the optimizer:

        use_muon (`bool`, defaults to `False`): Train the matrices of the hidden layers with Muon, and all else with
            AdamW at `learning_rate`.
        muon_learning_rate (`float`, defaults to 0.005): Learning rate of the Muon matrices, in the scale of AdamW
            (updates are matched to its root mean square).
        muon_momentum (`float`, defaults to 0.95): Nesterov momentum of Muon.
        muon_weight_decay (`float`, defaults to 0.01): Decoupled weight decay of the Muon matrices.

    Raises:
        TypeError: If a value is of another kind than its field.
        ValueError: If a value is outside its range, or an argument would have no effect.
    """

    _FREE: ClassVar[frozenset[str]] = frozenset({"pad_prompt_to_max"})

    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Whether to drop columns the model does not accept. Must stay False."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Log every so many optimizer steps."})

    objective: str = field(
        default="masked_diffusion",
        metadata={
            "help": "masked_diffusion; d2f (see blocks as the model without its adapter sees all), d2f_labels; causal "
            "(the next token, of a causal model)."
        },
    )
    max_prompt_length: int = field(default=512, metadata={"help": "Longest prompt in tokens; longer are left out."})
    response_length: int = field(default=256, metadata={"help": "Length of the answer canvas in tokens."})
    supervise_eos_fill: bool = field(
        default=True, metadata={"help": "Fill the canvas after the answer with end-of-text tokens and learn them."}
    )
    pad_prompt_to_max: bool = field(
        default=False, metadata={"help": "Pad prompts to max_prompt_length (static shapes) instead of the longest."}
    )
    packing: bool = field(
        default=False, metadata={"help": "Several texts in a row, unseen by each other (block-causal models)."}
    )
    control_tokens_in_text: bool = field(
        default=False, metadata={"help": "Take text in the data that spells a special token as that token."}
    )

    min_mask_ratio: float = field(default=0.0, metadata={"help": "Smallest mask ratio t; bounds the weight 1/t."})
    mask_ratio_eps: float = field(default=1e-3, metadata={"help": "eps of the masking probability (1 - eps) t + eps."})
    stratified_mask_ratio: bool = field(
        default=False, metadata={"help": "Spread the mask ratios of a batch evenly over (0, 1)."}
    )
    suffix_mask_fraction: float = field(
        default=0.0, metadata={"help": "Fraction of each batch whose answer is masked from a random place on."}
    )
    suffix_window: int = field(default=8, metadata={"help": "Tokens after the cut of a suffix mask that have a loss."})
    block_length: int | None = field(
        default=None, metadata={"help": "Tokens of a block (block-causal models). From the model when unset."}
    )
    mask_ratio_per_block: bool | None = field(
        default=None, metadata={"help": "A mask ratio for each block, not each text. By the family when unset."}
    )
    complementary_masks: bool | None = field(
        default=None, metadata={"help": "A second view that hides what the first leaves. By the family when unset."}
    )
    label_shift: int | None = field(
        default=None,
        metadata={"help": "0: logits row i predicts token i; 1: row i - 1 does. From the model when unset."},
    )

    use_muon: bool = field(default=False, metadata={"help": "Muon for hidden matrices, AdamW for everything else."})
    muon_learning_rate: float = field(default=5e-3, metadata={"help": "Learning rate of the Muon matrices."})
    muon_momentum: float = field(default=0.95, metadata={"help": "Nesterov momentum of Muon."})
    muon_weight_decay: float = field(default=0.01, metadata={"help": "Decoupled weight decay of the Muon matrices."})

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, _RANGES)
        check_muon_arguments(self)
        if self.min_mask_ratio == 0.0 and self.mask_ratio_eps == 0.0:
            raise ValueError(
                "`min_mask_ratio` and `mask_ratio_eps` must not both be 0 (got 0 and 0): the weight 1/p is unbounded. "
                "Set `mask_ratio_eps=1e-3`, the default."
            )
        if self.objective not in OBJECTIVES:
            raise ValueError(
                f"`objective` must be one of {list(OBJECTIVES)} (got {self.objective!r}). Correct it, or leave it "
                "unset for the first."
            )
        if self.packing and self.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
            raise ValueError(
                "`train_sampling_strategy` must not order by length with `packing` (got "
                f"{self.train_sampling_strategy!r}): packed rows have one length. Unset one of them."
            )
        if self.packing and self.pad_prompt_to_max:
            raise ValueError(
                "`pad_prompt_to_max` must be False with `packing` (got True): packed rows have one length anyway. "
                "Unset one of them."
            )
        if self.label_shift not in (None, 0, 1):
            raise ValueError(
                f"`label_shift` must be 0 or 1 (got {self.label_shift}). Leave it unset to read it from the model."
            )
        if self.remove_unused_columns:
            raise ValueError(
                "`remove_unused_columns` must be False (got True): the collator reads columns that no model accepts. "
                "Leave it unset."
            )
