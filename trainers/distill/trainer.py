"""Pseudo-trajectory distillation: teach a masked diffusion model to decide more tokens in each forward."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from d3llm_hf.models.probes import evaluating

from ..common.block_masks import block_mask_of
from ..common.canvas_trainer import EVAL, TRAIN, CanvasTrainer, fill_tokens
from ..common.loading import load_checkpoint, with_end_of_text
from ..common.rows import canvas_of
from .batch import SFT, BatchViews, draw_batch, draw_rollouts
from .blocks import blocks_to_distil, topology_of_model
from .callbacks import NoiseCurriculumCallback, WindowCurriculumCallback
from .card import render_distill_card
from .collator import PseudoTrajectoryCollator
from .config import PseudoTrajectoryDistillConfig
from .evaluation import DECODING_METRICS, check_decoding, decode_and_score
from .loss import TokenTerms, divergences, token_terms
from .metrics import METRICS, SOFT_METRICS, averages, sums_of
from .objective import distillation_loss, positions_by_kind
from .rollout import entropies
from .rows import prepare_trajectories
from .targets import asked, teacher_of


if TYPE_CHECKING:
    from peft import PeftConfig


class PseudoTrajectoryDistillTrainer(CanvasTrainer):
    r"""Trainer of pseudo-trajectory distillation (d3LLM), and of its random-mask and certainty-forcing baselines.

    A sample is a prompt, an answer and the step at which a teacher decided each of its tokens. Of a window of the
    answer, what the teacher had not decided at some moment is hidden, and learnt; see [`noisy_views`]. With CE the
    mean cross-entropy at those positions, CE' that of the complementary view, and H the mean entropy, at a
    temperature, of the positions that are predicted right:

        loss = loss_scale (CE + CE' + entropy_weight H) + sft_weight SFT

    Other targets than the text, and further terms, are what [`PseudoTrajectoryDistillConfig`] has them for; see
    [`objective`] for the whole formula.

    Noise level and window follow curricula, set by [`NoiseCurriculumCallback`] and [`WindowCurriculumCallback`] as
    `noise_floor` and `window` before each step. An evaluation draws from the whole range of noise levels and the last
    window, the same at any time, so that its losses can be compared.

    With `objective="rollout"` the student decodes each batch first, without gradient, and learns states that it came
    through; see [`rollout`]. There is no complementary view then: CE and H are means over the hidden positions of the
    open blocks and the next one, in all `rollout_states` of a sample. An evaluation takes the windows of
    `"trajectory"`, so that its cross-entropies compare with those of other runs.

    A block-causal model whose row i predicts token i sees in each state what it sees when it decodes: its block and
    all earlier ones. A teacher sees what it was trained to see, so that one that sees the whole canvas can teach a
    block-causal student (D2F).

    All views of a batch go through the model in one forward. (Keys of the prompt cannot be shared between them: in a
    bidirectional model they depend on the answer.) The head runs at the hidden positions of the window alone, each of
    which is learnt in one of the two views; a forward that takes no position mask runs it on the whole answer.

    Every draw comes from a generator seeded by `(seed, epoch, sample)`: workers, batch layout, order of the samples
    and resumption change no mask. Of a rollout these are its threshold and which of its states are learnt; the states
    depend on the weights as well, so that a resumed run is still equal to an unbroken one, bit for bit, but another
    layout of batches, whose weights differ by rounding, may decide a position at another forward.

    Other than the published d3LLM code, whose losses and gradients are matched for the same draws: the noise level is
    drawn per sample, not per batch; prompts are taken as the teacher saw them, so no chat template can shift the order
    against the text; a sample without a step map is refused instead of masked at random; no window is empty. Its
    constant factor of 1/4 is `loss_scale`.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The student, usually a copy of the
            teacher; a string is loaded with `model_init_kwargs`. Models as in [`MaskedDiffusionSFTTrainer`].
        args ([`PseudoTrajectoryDistillConfig`], *optional*): Training arguments.
        train_dataset, eval_dataset ([`~datasets.Dataset`]): Columns `prompt_ids`, `response_ids` and `step_map` (from
            1, the step that decided each token of the response; -1 where none did, 0 where it was given); with
            `use_target_ids` also `target_ids`, with `only_correct` also `correct`. A `sample_id` identifies a sample
            in draws and messages; the row number does when there is none.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*): The tokenizer; the model's if unset.
        peft_config ([`~peft.PeftConfig`], *optional*): Train an adapter of this kind instead of all weights; see
            [`lora_target_modules`].
        teacher ([`~transformers.PreTrainedModel`], *optional*): Whose distributions are learnt where `target` or
            `far_target` says so; of the student's class. Frozen, and in no checkpoint.
        kwargs: Further arguments of [`~transformers.Trainer`]; those that would have no effect are refused.

    Raises:
        ValueError: If a data set lacks a column or no example fits the canvas, the canvas goes beyond the model's
            positions, or tokenizer and model disagree on the mask token; as a `RowError`, which names row and column,
            for a row that cannot be learnt.
        TypeError: For data that are no data set.
        FloatingPointError: While training, as soon as a loss or gradient is not finite; no step is taken with it.

    Example:

    ```python
    from d3llm_hf import LLaDAModelLM
    from datasets import load_dataset
    from peft import LoraConfig
    from trainers import PseudoTrajectoryDistillConfig, PseudoTrajectoryDistillTrainer, lora_target_modules
    from transformers import AutoTokenizer

    model = LLaDAModelLM.from_pretrained("GSAI-ML/LLaDA-8B-Instruct", dtype="bfloat16")
    trainer = PseudoTrajectoryDistillTrainer(
        model=model,
        args=PseudoTrajectoryDistillConfig("llada-distilled", num_train_epochs=6, bf16=True),
        train_dataset=load_dataset("parquet", data_files="trajectories/*.parquet", split="train"),
        processing_class=AutoTokenizer.from_pretrained("GSAI-ML/LLaDA-8B-Instruct"),
        peft_config=LoraConfig(r=256, lora_alpha=256, target_modules=lora_target_modules(model)),
    )
    trainer.train()
    ```
    """

    _tag_names: ClassVar[list[str]] = ["d3llm", "distillation", "diffusion", "diffusion-language-model"]

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: PseudoTrajectoryDistillConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        teacher: PreTrainedModel | None = None,
        **kwargs: Any,
    ):
        if args is None:
            name = Path(model).name if isinstance(model, str) else type(model).__name__
            args = PseudoTrajectoryDistillConfig(f"{name}-distilled")
        self._check(args, PseudoTrajectoryDistillConfig, model, kwargs)
        set_seed(args.seed)  # before an adapter is made: its initial weights are part of the run
        model, processing_class = _load(model, processing_class, args)
        model = self._adopt(model, processing_class, args.label_shift, peft_config)
        self.topology = blocks_to_distil(model, args, self.label_shift)
        self.teacher = teacher_of(model, teacher, processing_class, args)
        self.teacher_topology = None if self.teacher is None else topology_of_model(self.teacher)
        model.add_model_tags(self._tag_names)
        self.adapter_configs = list(getattr(model, "peft_config", {}).values())  # for the card, also once merged
        self.entropy_on_complement = (
            args.objective == "certainty" or self.label_shift == 1
            if args.entropy_on_complement is None
            else args.entropy_on_complement
        )
        collator = kwargs.pop("data_collator", None) or PseudoTrajectoryCollator(
            **fill_tokens(processing_class),
            response_length=args.response_length,
            supervise_eos_fill=args.supervise_eos_fill,
            use_target_ids=args.use_target_ids,
        )
        self.metric_names = METRICS | (SOFT_METRICS if args.soft_targets else frozenset())
        if args.eval_generate_samples:
            self.metric_names |= DECODING_METRICS
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            prepare=partial(prepare_trajectories, args=args, canvas=canvas_of(model, args)),
            data_collator=collator,
            processing_class=processing_class,
            **kwargs,
        )
        if args.eval_generate_samples:
            self._check_shards()
            check_decoding(model, self.eval_dataset, args)
        self.noise_floor, self.window = args.noise_start, args.window_sizes[0]
        self.resumed_max_steps: int | None = None
        self.add_callback(NoiseCurriculumCallback(self))
        self.add_callback(WindowCurriculumCallback(self))

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Hide tokens of a batch of B samples and return their loss; see the class for the formula."""
        labels = inputs["labels"]  # (B, R)
        # 1. Draw the K views of each sample
        views = self._draw(inputs, model.training)  # of shape (K, B, R)

        # 2. All views in one forward, the head at the learnt positions
        canvases = inputs["input_ids"].repeat(len(views.kinds), 1)  # (K B, L)
        canvases[:, -labels.shape[1] :].masked_fill_(views.hidden.flatten(0, 1), self.mask_token_id)
        attention_mask = inputs["attention_mask"].repeat(len(views.kinds), 1)
        outputs, logits = self._seen_logits(model, canvases, attention_mask, views.learnt.flatten(0, 1))  # (N, V)

        # 3. The terms of each learnt position, then the loss
        targets = labels.expand_as(views.learnt)[views.learnt]
        terms = token_terms(logits, targets, self.args.entropy_temperature, self.args.loss_chunk_size)
        cost, divergence = terms.cross_entropy, terms.cross_entropy[:0]
        if self.args.soft_targets:
            cost, divergence = self._softened(inputs, views, logits, cost)
        loss = self._reduce(terms, cost, divergence, views, inputs["step_map"], model.training)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss must be finite (got {loss.item()} at step {self.state.global_step}, samples "
                f"{inputs['sample_ids'].tolist()}). Lower `learning_rate`, set `max_grad_norm`, or resume from an "
                "earlier checkpoint."
            )
        return (loss, outputs) if return_outputs else loss

    def _seen_logits(
        self, model: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, learnt: torch.Tensor
    ) -> tuple[Any, torch.Tensor]:
        """As `_learnt_logits`, each position seeing what the model was trained to see."""
        topology = self.teacher_topology if model is self.teacher else self.topology
        if topology is None:
            return self._learnt_logits(model, input_ids, attention_mask, learnt)
        sees = self._as_taken(block_mask_of(attention_mask, learnt.shape[1], topology))
        return self._learnt_logits(model, input_ids, attention_mask, learnt, sees)

    def _draw(self, inputs: dict[str, torch.Tensor], training: bool) -> BatchViews:
        args = self.args
        if training and args.objective == "rollout" and self.state.global_step % args.rollout_every == 0:
            return self._roll_out(inputs)
        if training:
            identity, window, floor = (TRAIN, int(self.state.epoch or 0)), self.window, self.noise_floor
        else:
            identity, window, floor = (EVAL, 0), args.window_sizes[-1], args.noise_start
        return draw_batch(inputs, args, (args.seed, *identity), window, (floor, args.noise_end))

    def _roll_out(self, inputs: dict[str, torch.Tensor]) -> BatchViews:
        """States of the student's own decoding, by forwards of rows that are not done yet."""
        args, attention_mask = self.args, inputs["attention_mask"]
        length = inputs["labels"].shape[1]

        def entropy_at(hidden: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
            rows = among.any(1)
            rows[0] |= not rows.any()  # one that others wait for
            canvas = inputs["input_ids"][rows]
            canvas[:, -length:].masked_fill_(hidden[rows], self.mask_token_id)
            _, logits = self._seen_logits(self.model, canvas, attention_mask[rows], among[rows])
            return entropies(logits, args.loss_chunk_size)

        def anyone(left: torch.Tensor) -> bool:
            # With shards of the model all processes take part in each forward. A whole copy needs nobody.
            if self.holds_shards:
                left = self.accelerator.gather(left.any()[None])
            return bool(left.any())

        with evaluating(self.model):
            return draw_rollouts(
                inputs,
                args,
                (args.seed, TRAIN, int(self.state.epoch or 0)),
                entropy_at,
                fill_tokens(self.processing_class)["eos_token_id"],
                anyone,
            )

    def _softened(
        self, inputs: dict[str, torch.Tensor], views: BatchViews, logits: torch.Tensor, cost: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The cost of each learnt position where some learn a distribution, and the divergences of these `(M,)`."""
        args, (kind,) = self.args, self.args.soft_targets
        # 1. The positions, and what the target's states hide; what these show is learnt as a token
        soft = torch.tensor([each != SFT for each in views.kinds], device=cost.device)[:, None, None] & views.learnt
        if args.far_target is not None:
            far = views.distances > args.near_steps
            soft = soft & (far if args.target == "token" else ~far)
        soft = soft & ~views.revealed
        count = sum(each != SFT for each in views.kinds)
        hidden, wanted = (views.hidden & ~views.revealed)[:count], soft[:count]
        # 2. One forward for all of them
        canvases = inputs["input_ids"].repeat(count, 1)
        canvases[:, -wanted.shape[2] :].masked_fill_(hidden.flatten(0, 1), self.mask_token_id)
        attention_mask = inputs["attention_mask"].repeat(count, 1)
        with asked(self.model, self.teacher, kind) as model:
            _, targets = self._seen_logits(model, canvases, attention_mask, wanted.flatten(0, 1))
        # 3. The divergences take the place of the cross-entropies
        chosen = soft[views.learnt].nonzero()[:, 0]
        divergence = divergences(logits[chosen], targets, args.loss_chunk_size)
        return cost.index_put((chosen,), divergence), divergence

    def _reduce(
        self,
        terms: TokenTerms,
        cost: torch.Tensor,
        divergence: torch.Tensor,
        views: BatchViews,
        steps: torch.Tensor,
        training: bool,
    ) -> torch.Tensor:
        """The loss of all learnt positions; keeps what the log is made of."""
        of_kind = positions_by_kind(views, terms.cross_entropy)
        loss, sft_sum = distillation_loss(
            terms,
            cost,
            views,
            of_kind,
            self.args,
            entropy_on_complement=self.entropy_on_complement,
            steps=steps,
        )
        mode = TRAIN if training else EVAL
        found = sums_of(terms, of_kind, views, sft_sum, divergence.detach())
        kept = self._metric_sums.get(mode, {})
        self._metric_sums[mode] = {name: value + kept.get(name, 0.0) for name, value in found.items()}
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with each term of the loss apart and the curricula."""
        if "loss" in logs and self.args.draws_windows:
            logs |= {"noise_floor": round(self.noise_floor, 6), "window": self.window}
        super().log(logs, start_time)

    def _averages(self, sums: dict[str, torch.Tensor] | None) -> dict[str, float]:
        return averages(sums, self.accelerator)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As the Trainer's, with the terms of the loss apart and, where it is due, what `generate` gives."""
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        every = self.args.eval_generate_steps
        if self.args.eval_generate_samples and (every is None or self.state.global_step % every == 0):
            self._check_shards()
            found = decode_and_score(
                self.accelerator.unwrap_model(self.model),
                self.processing_class,
                dataloader.dataset,
                self.args,
                self.accelerator,
            )
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return output

    def _check_shards(self) -> None:
        if self.holds_shards:
            raise ValueError(
                "`eval_generate_samples` must be 0 with FSDP or ZeRO-3 (got "
                f"{self.args.eval_generate_samples}): each process decodes prompts of its own, and here it holds "
                "a shard of the model. Unset it, and decode the saved checkpoint."
            )

    def _load_callback_state(self) -> None:
        # The one moment of a resumed run at which the state is the checkpoint's and not yet the new run's.
        self.resumed_max_steps = self.state.max_steps
        super()._load_callback_state()

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self.create_model_card()
        super()._save_checkpoint(model, trial)

    def create_model_card(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        dataset: str | list[str] | None = None,
    ) -> None:
        """Write `README.md` of the output folder: recipe, curriculum and the last results.

        Args:
            language, license, tags, dataset: Metadata for the Hub; `tags` are added to the trainer's.
            model_name (`str`, *optional*): Name of the model; the Hub's or the output folder's if unset.
            finetuned_from (`str`, *optional*): Hub id of the base model; where the student was loaded from if unset.
        """
        if not self.is_world_process_zero():
            return
        extra_tags = [tags] if isinstance(tags, str) else list(tags or ())
        metadata = {"language": language, "license": license, "datasets": dataset}
        card = render_distill_card(
            self,
            name=model_name or (self.hub_model_id or Path(self.args.output_dir).resolve().name),
            base_model=finetuned_from,
            tags=list(dict.fromkeys([*self._tag_names, *extra_tags])),
            metadata={key: value for key, value in metadata.items() if value is not None},
        )
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text(card, encoding="utf-8")


def _load(
    model: str | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, args: PseudoTrajectoryDistillConfig
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load what is given by name; the tokenizer, if there is none, from where the model comes from."""
    name = model if isinstance(model, str) else model.config._name_or_path
    if tokenizer is None:
        if not name:
            raise ValueError(
                "`processing_class` must be given for a model that was not loaded from a checkpoint (got None). "
                "Pass its tokenizer."
            )
        tokenizer = with_end_of_text(AutoTokenizer.from_pretrained(name))
    if isinstance(model, str):
        # float32 whatever the checkpoint's: an optimizer's small steps are lost in bfloat16 weights.
        model = load_checkpoint(model, tokenizer, **({"dtype": torch.float32} | (args.model_init_kwargs or {})))
    elif args.model_init_kwargs:
        raise ValueError(
            f"`model_init_kwargs` must be unset where `model` is an object (got {args.model_init_kwargs}). Pass them "
            "to `from_pretrained`, or the model by its name."
        )
    return model, tokenizer
