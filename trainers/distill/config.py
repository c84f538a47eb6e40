"""Arguments of pseudo-trajectory distillation."""

import math
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, ClassVar

from ..common.argument_checks import check_ranges
from ..common.arguments import CarefulArguments
from .noisy_views import OBJECTIVES
from .switches import check_switches


_GROWING_WINDOWS = (16, 16, 24, 24, 32, 32)
_DEFAULT_LOSS_SCALES = {"trajectory": 0.25, "random": 0.25, "certainty": 1.0, "rollout": 0.5}
_CHOICES = {
    "objective": (*OBJECTIVES, "rollout"),
    "state_region": ("window", "blocks"),
    "target": ("token", "teacher", "self"),
    "far_target": (None, "token", "teacher", "self", "none"),
    "loss_reduction": ("token", "sample"),
}
_DECODED = ("tpf", "exact_match", "eval_tpf", "eval_exact_match")
_RANGES = {
    "max_prompt_length": (1, math.inf),
    "response_length": (1, math.inf),
    "loss_chunk_size": (1, math.inf),
    "sft_suffix_window": (1, math.inf),
    "eval_generate_samples": (0, math.inf),
    "entropy_weight": (0, math.inf),
    "loss_scale": (0, math.inf),
    "sft_weight": (0, math.inf),
    "sft_min_mask_ratio": (0, 1),
    "sft_suffix_mask_fraction": (0, 1),
    "noise_start": (0, 1),
    "rollout_block_length": (1, math.inf),
    "rollout_max_forwards": (1, math.inf),
    "rollout_states": (1, math.inf),
    "rollout_every": (1, math.inf),
    "near_steps": (1, math.inf),
    "entropy_below": (0, 1),
    "wrong_entropy_weight": (0, math.inf),
    "wrong_confidence": (0, 1),
    "rank_weight": (0, math.inf),
    "rank_margin": (0, math.inf),
}


@dataclass
class PseudoTrajectoryDistillConfig(CarefulArguments):
    r"""Configuration of the [`PseudoTrajectoryDistillTrainer`].

    All of [`~transformers.TrainingArguments`] applies; below is what this class adds or changes. The defaults are
    those of d3LLM-LLaDA.

    > [!NOTE]
    > Changed defaults: `remove_unused_columns=False`, because the collator reads columns that no model accepts,
    > `logging_steps=10` and `learning_rate=2e-5`.

    > Parameters that control the model:

        model_init_kwargs (`dict` or `str`, *optional*): Arguments of `from_pretrained` where `model` is given as a
            string. Its `dtype` is float32 when unset, whatever the checkpoint's.

    > Parameters that control the data:

        max_prompt_length (`int`, defaults to 512): Longest prompt in tokens; longer examples are left out.
        response_length (`int`, defaults to 256): Length of the answer canvas in tokens. Examples with a longer answer
            are left out.
        supervise_eos_fill (`bool`, defaults to `True`): Whether the answer is filled up to the canvas with the
            end-of-text token and the fill is learnt, as in d3LLM. With `False` it is neither hidden nor attended to.
        use_target_ids (`bool`, defaults to `False`): Learn the text of `target_ids` (the data set's own answers) in
            the teacher's order, instead of the teacher's answers. d3LLM does so ("pseudo" trajectories).
        only_correct (`bool`, defaults to `False`): Leave out samples whose `correct` is not true.

    > Parameters that control the noisy views:

        objective (`str`, defaults to `"trajectory"`): `"trajectory"` hides what the teacher had not decided yet
            (d3LLM), `"random"` hides tokens at random (the naive baseline), `"certainty"` hides half of a block at
            random (dParallel's certainty forcing), `"rollout"` hides what the student itself has not decided yet at
            some forward of its own multi-block threshold decode; see [`rollout`]. The arguments below that are about
            views, windows and noise then hold for the windows of evaluations, which are those of `"trajectory"`, and
            for steps between rollouts.
        state_region (`str`, defaults to `"window"`): What a state has partly decided: one window, or (`"blocks"`) two
            consecutive blocks of the window's size with a noise level each, as a decoder of several blocks at once
            has. The second one's is 1 half of the time, when all of it is hidden, and else between the first one's
            and 1 (as in MultiTF). What is before them is clean, what is behind them hidden.
        complementary (`bool`, defaults to `True`): Learn from the complementary view as well.
        blockwise (`bool`, defaults to `True`): Draw a window of the answer; with `False` the whole canvas is one.
        windows_over_fill (`bool`, defaults to `False`): Whether windows may begin in the fill (d3LLM-Dream), or in the
            answer only (d3LLM-LLaDA). The last window reaches to the end of the canvas in either case.
        noise_start, noise_end (`float`, default to 0.0 and 0.8): The noise level is uniform between a floor and
            `noise_end`. Not used by `"certainty"`.
        noise_curriculum (`bool`, defaults to `True`): Let the floor go from `noise_start` to `noise_end` over the run;
            with `False` it stays at `noise_start`.
        window_sizes (`list[int]`, *optional*): Window per epoch, interpolated within it (with `max_steps`, spread over
            the run). `[16, 16, 24, 24, 32, 32]` when unset, `[32]` for `"certainty"` and where each step is a rollout.

    > Parameters that control rollouts:

        rollout_threshold (`list[float]`, defaults to `[0.2, 0.8]`): Entropy in nats up to which a rollout decides,
            drawn uniformly between these two for each sample.
        rollout_block_length (`int`, defaults to 16): Length of its blocks.
        rollout_max_forwards (`int`, defaults to 8): Forwards that it has at most, without gradient.
        rollout_states (`int`, defaults to 2): States of a sample to learn, drawn with replacement among those with
            content left.
        rollout_every (`int`, defaults to 1): Every how many optimizer steps the states are those of a rollout; the
            steps between learn windows as with `"trajectory"`.

    > Parameters that control the target:

        target (`str`, defaults to `"token"`): What a hidden position learns: the text's token, by cross-entropy, or
            the distribution of a frozen teacher (`"teacher"`, D2F) or of the student itself, as it is at that step
            (`"self"`), by KL(target || student). `cross_entropy` is logged in any case, the other as `divergence`.
        teacher_model_name_or_path (`str`, *optional*): The teacher, where it is not given to the trainer: a folder, a
            Hub id or an embedded checkpoint. With neither, an adapter's base teaches it. Each process holds a whole
            teacher, in the student's data type.
        teacher_reveal (`float`, *optional*): Share of the tokens to learn that the target's state shows (CD4LM). What
            it shows is learnt as a token. The student's own state when unset, which `"self"` cannot do with.
        far_target (`str`, *optional*): Another target for what the teacher decides more than `near_steps` tokens after
            the state: `"teacher"` (TAD), `"self"`, `"token"`, or `"none"`, to not learn it. Near and far positions
            are a mean each, and the two are added.
        near_steps (`int`, *optional*): Where far begins, in tokens that the teacher decides; 8 in TAD's code.

    > Parameters that control the loss:

        entropy_weight (`float`, defaults to 2.0): Weight of the entropy of tokens that are predicted right.
        entropy_temperature (`float`, defaults to 0.5): Temperature of that entropy.
        entropy_on_complement (`bool`, *optional*): Whether the complementary view has an entropy term too. When unset,
            with `"certainty"` and for models with a label shift, as in the published codes.
        entropy_below (`float`, *optional*): Give a right token that entropy term only where its probability is below
            this (0.9 in WINO+).
        wrong_entropy_weight (`float`, defaults to 0.0): Weight of minus the entropy of tokens that are predicted wrong
            with a probability above `wrong_confidence` (1.0 in WINO+), at the same temperature and in the same views.
        wrong_confidence (`float`, defaults to 0.6): See there.
        distance_weight (`float`, defaults to 0.0): a in the factor exp(-a d / `response_length`) of a position that
            the teacher decides d tokens after the state. Below 0 what is decided late counts more.
        rank_weight (`float`, defaults to 0.0): Weight of TABOM's hinge max(0, H - H' + `rank_margin`), a mean over the
            pairs of learnt positions of a primary view of which the teacher decided the first, with entropy H, in an
            earlier step than the second, with entropy H'.
        rank_margin (`float`, defaults to 0.1): See there.
        loss_scale (`float`, *optional*): Factor of the whole distillation loss. 0.25 when unset, as in d3LLM's code,
            for which its learning rate and gradient clipping were chosen; 1 for `"certainty"`, as in dParallel's. A
            rollout has one mean cross-entropy where the two views of a window have two that are added, so that the
            same size of the loss takes twice the factor: 0.5 when unset, and 2 beside a trajectory's 1.
        loss_reduction (`str`, defaults to `"token"`): Average each term over the tokens of a micro-batch, as the
            published codes do, or (`"sample"`) over those of each sample and then over samples. Only with `"sample"`
            is the gradient the same however a batch is split into micro-batches.
        label_shift (`int`, *optional*): 0 if logits row i predicts token i (LLaDA), 1 if row i - 1 does (Dream).
            Read from the model's `logit_shift` when unset.
        loss_chunk_size (`int`, defaults to 128): Positions whose float32 probabilities exist at the same time.

    > Parameters that control the supervised mixture:

        sft_weight (`float`, defaults to 0.0): Weight of LLaDA's fine-tuning loss on the same answers, added to the
            scaled distillation loss. It can keep a small model from forgetting, costs half as much again, and hides
            in an order of its own, so that the teacher's order counts for less.
        sft_min_mask_ratio, sft_suffix_mask_fraction, sft_suffix_window: As `min_mask_ratio`, `suffix_mask_fraction`
            and `suffix_window` of [`MaskedDiffusionSFTConfig`].

    > Parameters that control the evaluation:

        eval_generate_samples (`int`, defaults to 0): Decode this many held-out prompts with `generate` and report
            tokens per forward and, where there are reference answers, exact match.
        eval_generate_steps (`int`, *optional*): Do so only in evaluations at multiples of this step. At each if unset.
        eval_generate_kwargs (`dict` or `str`): Arguments of `generate`; `{"decoding_method": "d3llm"}` if empty.
        eval_answer_column (`str`, defaults to `"answer"`): Column of the reference answers.

    Raises:
        TypeError: If a value is of another kind than its field.
        ValueError: If a value is outside its range, or an argument would have no effect.
    """

    _FREE: ClassVar[frozenset[str]] = frozenset(
        {
            "loss_chunk_size",
            "eval_generate_samples",
            "eval_generate_steps",
            "eval_generate_kwargs",
            "eval_answer_column",
        }
    )
    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *CarefulArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "eval_generate_kwargs",
    ]

    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Whether to drop columns the model does not accept. Must stay False."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Log every so many optimizer steps."})
    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate."})

    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of from_pretrained (JSON) where the model is given as a string."}
    )

    max_prompt_length: int = field(default=512, metadata={"help": "Longest prompt in tokens; longer are left out."})
    response_length: int = field(default=256, metadata={"help": "Length of the answer canvas in tokens."})
    supervise_eos_fill: bool = field(
        default=True, metadata={"help": "Fill the canvas after the answer with end-of-text tokens and learn them."}
    )
    use_target_ids: bool = field(
        default=False, metadata={"help": "Learn the text of `target_ids` in the teacher's order."}
    )
    only_correct: bool = field(default=False, metadata={"help": "Leave out samples whose `correct` is not true."})

    objective: str = field(
        default="trajectory",
        metadata={
            "help": "What is hidden: trajectory (d3LLM), random (baseline), certainty (dParallel), or rollout (what "
            "the student's own decoding has not decided)."
        },
    )
    state_region: str = field(
        default="window",
        metadata={"help": "What is partly decided: one window, or (blocks) two with a noise level each."},
    )
    complementary: bool = field(default=True, metadata={"help": "Learn from the complementary view as well."})
    blockwise: bool = field(default=True, metadata={"help": "Draw a window; otherwise the whole canvas is one."})
    windows_over_fill: bool = field(default=False, metadata={"help": "Let windows begin in the end-of-text fill."})
    noise_start: float = field(default=0.0, metadata={"help": "Smallest noise level at the beginning."})
    noise_end: float = field(default=0.8, metadata={"help": "Largest noise level; the smallest one at the end."})
    noise_curriculum: bool = field(
        default=True, metadata={"help": "Raise the smallest noise level to noise_end over the run."}
    )
    window_sizes: list[int] | None = field(
        default=None, metadata={"help": "Window per epoch. 16 16 24 24 32 32 if unset; 32 for certainty or rollout."}
    )

    rollout_threshold: list[float] = field(
        default_factory=lambda: [0.2, 0.8],
        metadata={"help": "Entropy up to which a rollout decides, uniform between these two for each sample."},
    )
    rollout_block_length: int = field(default=16, metadata={"help": "Length of a rollout's blocks."})
    rollout_max_forwards: int = field(default=8, metadata={"help": "Most forwards of a rollout, without gradient."})
    rollout_states: int = field(default=2, metadata={"help": "States of each sample's rollout to learn."})
    rollout_every: int = field(
        default=1, metadata={"help": "Every how many steps to roll out; those between learn windows of trajectories."}
    )

    target: str = field(
        default="token",
        metadata={
            "help": "What is learnt: token (the text), or the distribution of the teacher or of the model itself."
        },
    )
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "That teacher. What an adapter adapts if unset."}
    )
    teacher_reveal: float | None = field(
        default=None, metadata={"help": "Share of the tokens to learn that the target's state shows. None if unset."}
    )
    far_target: str | None = field(
        default=None, metadata={"help": "Target of what is decided late: token, teacher, self or none. If set."}
    )
    near_steps: int | None = field(
        default=None, metadata={"help": "Tokens that the teacher decides before that begins."}
    )

    entropy_weight: float = field(default=2.0, metadata={"help": "Weight of the entropy of right predictions."})
    entropy_temperature: float = field(default=0.5, metadata={"help": "Temperature of that entropy."})
    entropy_on_complement: bool | None = field(
        default=None,
        metadata={"help": "Entropy term in the complementary view too. With certainty or a label shift if unset."},
    )
    entropy_below: float | None = field(
        default=None, metadata={"help": "Give right tokens that term only where their probability is below this."}
    )
    wrong_entropy_weight: float = field(
        default=0.0, metadata={"help": "Weight of minus the entropy of wrong predictions that the model is sure of."}
    )
    wrong_confidence: float = field(default=0.6, metadata={"help": "Probability above which it is sure of them."})
    distance_weight: float = field(
        default=0.0, metadata={"help": "How much less (below 0: more) tokens count that the teacher decides later."}
    )
    rank_weight: float = field(
        default=0.0, metadata={"help": "Weight of a hinge over pairs of entropies in the teacher's order."}
    )
    rank_margin: float = field(default=0.1, metadata={"help": "By how much the later one should be more uncertain."})
    loss_scale: float | None = field(
        default=None,
        metadata={"help": "Factor of the distillation loss. 0.25 if unset; 1 for certainty, 0.5 for rollout."},
    )
    loss_reduction: str = field(
        default="token", metadata={"help": "Average over the tokens of a micro-batch (token) or per sample (sample)."}
    )
    label_shift: int | None = field(
        default=None,
        metadata={"help": "0: logits row i predicts token i; 1: row i - 1 does. From the model when unset."},
    )
    loss_chunk_size: int = field(
        default=128, metadata={"help": "Positions whose float32 probabilities exist at the same time."}
    )

    sft_weight: float = field(default=0.0, metadata={"help": "Weight of LLaDA's fine-tuning loss."})
    sft_min_mask_ratio: float = field(default=0.0, metadata={"help": "Smallest mask ratio of that loss."})
    sft_suffix_mask_fraction: float = field(
        default=0.0, metadata={"help": "Fraction of its answers that are masked from a random place on."}
    )
    sft_suffix_window: int = field(default=8, metadata={"help": "Tokens after such a place that have a loss."})

    eval_generate_samples: int = field(default=0, metadata={"help": "Held-out prompts to decode in an evaluation."})
    eval_generate_steps: int | None = field(
        default=None, metadata={"help": "Decode at multiples of this step only. In every evaluation if unset."}
    )
    eval_generate_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of generate (JSON). d3LLM's decoding if unset."}
    )
    eval_answer_column: str = field(default="answer", metadata={"help": "Column of the reference answers."})

    def __post_init__(self):
        super().__post_init__()
        self._check_choices()
        if self.window_sizes is None:
            grow = self.draws_windows and self.objective != "certainty"
            self.window_sizes = list(_GROWING_WINDOWS if grow else _GROWING_WINDOWS[-1:])
        if self.loss_scale is None:
            self.loss_scale = _DEFAULT_LOSS_SCALES[self.objective]
        if self.eval_generate_kwargs is None:
            self.eval_generate_kwargs = {"decoding_method": "d3llm"}
        self._check_ranges()
        check_switches(self)

    @property
    def draws_windows(self) -> bool:
        """Whether any step of the training learns windows, and not a rollout."""
        return self.objective != "rollout" or self.rollout_every > 1

    @property
    def soft_targets(self) -> frozenset[str]:
        """Models whose distributions are learnt: of `"teacher"` and `"self"`, none or one."""
        return frozenset({self.target, self.far_target} & {"teacher", "self"})

    def _check_choices(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"`{name}` must be one of {list(choices)} (got {getattr(self, name)!r}). "
                    "Set it in `PseudoTrajectoryDistillConfig`."
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

    def _check_ranges(self) -> None:
        check_ranges(self, _RANGES | {"noise_end": (self.noise_start, 1)})
        if self.entropy_temperature <= 0:
            raise ValueError(
                f"`entropy_temperature` must be positive (got {self.entropy_temperature}). The default is 0.5."
            )
        ends = self.rollout_threshold if isinstance(self.rollout_threshold, list | tuple) else ()
        if len(ends) != 2 or not all(map(_is_entropy, ends)) or ends[0] > ends[1]:
            raise ValueError(
                f"`rollout_threshold` must hold the smallest and the largest entropy, in nats from 0 (got "
                f"{self.rollout_threshold}). "
                "Write for example [0.2, 0.8], or the same number twice."
            )
        if self.eval_generate_steps is not None and self.eval_generate_steps < 1:
            raise ValueError(
                f"`eval_generate_steps` must be at least 1 (got {self.eval_generate_steps}). "
                "Leave it unset to decode in every evaluation."
            )
        if self.eval_generate_steps is not None and self.metric_for_best_model in _DECODED:
            raise ValueError(
                "`eval_generate_steps` must be unset where every evaluation is compared by what it decodes (got "
                f"{self.eval_generate_steps} and {self.metric_for_best_model!r}). Unset it, or choose another "
                "`metric_for_best_model`."
            )
        sizes = self.window_sizes if isinstance(self.window_sizes, list | tuple) else ()
        if not sizes or not all(map(_is_length, sizes)):
            raise ValueError(
                f"`window_sizes` must hold positive window lengths (got {self.window_sizes}). "
                "Leave it unset for [16, 16, 24, 24, 32, 32]."
            )


def _is_length(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= 1


def _is_entropy(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= value < math.inf
