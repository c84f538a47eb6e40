"""Arguments of the extraction of trajectories."""

import json
from dataclasses import dataclass, field

from .answers import SCORERS


@dataclass
class TrajectoryConfig:
    r"""How trajectories are decoded, judged and stored. All of it is part of the manifest.

    > Parameters that control the decoding:

        max_new_tokens (`int`, defaults to 256): Length N of the canvas.
        block_length (`int`, defaults to 32): Positions of a block.
        decoding_method (`str`, defaults to `"llada"`): One token a forward, unless `steps` says fewer forwards.
        remasking (`str`, *optional*): What ranks positions; the teacher's family decides when unset, as in d3LLM:
            `"low_confidence"`, or `"entropy"` for models with shifted logits (Dream). Methods without it get none.
        steps (`int`, *optional*): Forwards of the answer; one for each position when unset.
        decoding_settings (`dict` or JSON `str`, *optional*): Further settings of `generate`.
        early_stop (`bool`, defaults to `False`): End a row at its stop token. By default the teacher also decides
            what follows, as in d3LLM: training supervises the fill behind an answer, and so every position has its
            place in the order. With it extraction is faster, and the step map says -1 there.

    > Parameters that control the attempts:

        scorer (`str`, defaults to `"none"`): `"number"` compares the integer after `####`, `"boxed"` the contents of
            the last `\boxed{}`, `"none"` nothing.
        temperatures (`list[float]`, defaults to `[0.0, 0.1, 0.2, 0.3, 0.4]`): One attempt at each in turn, until the
            answer is right. Where none is, the first attempt is kept. Without a reference there is one attempt.
        only_correct (`bool`, defaults to `False`): Leave out answers that are wrong.
        seed (`int`, defaults to 0): With the sample's index and the attempt it determines what is drawn.

    > Parameters that control the data:

        prompt_column, response_column, answer_column (`str`, *optional*): See [`Prompts`].
        max_prompt_length (`int`, *optional*): Leave out prompts with more tokens. Those that do not fit into the
            teacher's positions together with the canvas are left out in any case.
        control_tokens_in_text (`bool`, defaults to `False`): See [`MaskedDiffusionSFTConfig`].
        batch_size (`int`, defaults to 8): Rows that are decoded together.
        shard_size (`int`, defaults to 256): Samples of a shard, the unit of work: a killed run loses at most the one
            that each process was at.

    Raises:
        ValueError: If a value is outside its range.
    """

    max_new_tokens: int = field(default=256, metadata={"help": "Length of the canvas in tokens."})
    block_length: int = field(default=32, metadata={"help": "Positions of a block."})
    decoding_method: str = field(default="llada", metadata={"help": "The teacher's decoding method."})
    remasking: str | None = field(
        default=None, metadata={"help": "What ranks positions; low_confidence, or entropy for Dream, when unset."}
    )
    steps: int | None = field(
        default=None, metadata={"help": "Forwards of an answer; one for each position if unset."}
    )
    decoding_settings: str | None = field(  # a mapping when it comes from a recipe
        default=None, metadata={"help": "Further settings of `generate`, as JSON or as a section of the recipe."}
    )
    early_stop: bool = field(default=False, metadata={"help": "Decide nothing behind the stop token."})

    scorer: str = field(default="none", metadata={"help": f"How answers are judged: one of {sorted(SCORERS)}."})
    temperatures: list[float] = field(
        default_factory=lambda: [0.0, 0.1, 0.2, 0.3, 0.4],
        metadata={"help": "Temperatures of the attempts at an answer, in turn until it is right."},
    )
    only_correct: bool = field(default=False, metadata={"help": "Leave out answers that are wrong."})
    seed: int = field(default=0, metadata={"help": "Determines, with sample and attempt, what is drawn."})

    prompt_column: str | None = field(
        default=None, metadata={"help": "Prompt, text or turns; `messages` or `prompt` when unset."}
    )
    response_column: str | None = field(
        default=None, metadata={"help": "The data's own response, kept as `target_ids`; `completion` when unset."}
    )
    answer_column: str | None = field(
        default=None, metadata={"help": "Reference answer for the scorer; the response when unset."}
    )
    max_prompt_length: int | None = field(default=None, metadata={"help": "Leave out prompts with more tokens."})
    control_tokens_in_text: bool = field(
        default=False, metadata={"help": "Take text in the data that spells a special token as that token."}
    )
    batch_size: int = field(default=8, metadata={"help": "Rows that are decoded together."})
    shard_size: int = field(default=256, metadata={"help": "Samples of a shard; a killed run loses the open ones."})

    def __post_init__(self):
        for name in ("max_new_tokens", "block_length", "batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1 (got {getattr(self, name)}). Raise it.")
        if self.scorer not in SCORERS:
            raise ValueError(f"`scorer` must be one of {sorted(SCORERS)} (got {self.scorer!r}). Pass one of them.")
        if not self.temperatures or min(self.temperatures) < 0:
            raise ValueError(
                f"`temperatures` must hold at least one, none below 0 (got {self.temperatures}). Pass 0.0 for the "
                "most probable tokens."
            )
        if self.only_correct and self.scorer == "none":
            raise ValueError(
                "`only_correct` needs a `scorer` (got 'none'): without one no answer is known to be right. Pass "
                f"one of {sorted(set(SCORERS) - {'none'})}."
            )
        if isinstance(self.decoding_settings, str):
            self.decoding_settings = json.loads(self.decoding_settings)
        if not isinstance(self.decoding_settings, dict | None):
            raise ValueError(
                f"`decoding_settings` must map names to values (got {self.decoding_settings!r}). Write for example "
                "'{\"cfg_scale\": 0.5}'."
            )
