"""What the trainers of masked diffusion models share: how a canvas reaches the model, and whole checkpoints."""

from __future__ import annotations

import inspect
import logging
import math
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from d3llm_hf.hub.model_card import TAGS, complete_card
from d3llm_hf.locks import only_writer
from d3llm_hf.models.methods import IN_SLOTS
from d3llm_hf.models.modeling_common import dense_mask, positions_of
from d3llm_hf.models.text_config import text_config, text_setting
from d3llm_hf.models.token_ids import check_inside, vocabulary_of
from d3llm_hf.models.wrappers import base_of, lengthened_by, moves_padded, unfit_task

from .argument_checks import check_parameters
from .best_metric import check_best_metric
from .prepared_data import PreparedDataTrainer
from .resumed_arguments import compare_arguments, set_again, settings_of, write_arguments
from .shards import whole_weights, zero_stage
from .weights import load_converted_weights
from .whole_checkpoints import begin_checkpoint, checkpoint_to_resume, finish_checkpoint


if TYPE_CHECKING:
    from peft import PeftConfig

logger = logging.getLogger(__name__)

TRAIN, EVAL = 0, 1  # whose draws, and whose sums of metrics


class CanvasTrainer(PreparedDataTrainer):
    """A Trainer over canvases: prompts padded on the left, answers of `response_length` tokens on the right.

    Its checkpoints list their files with checksums (see `whole_checkpoints`). `train(resume_from_checkpoint=...)`
    takes `True` for the last whole checkpoint of the output folder, `"last"` for the same or a new run where no
    checkpoint was ever finished, or a folder; one that is damaged raises a `CheckpointError`. A run that has all of
    its steps takes no more, and in one that goes on the arguments given now hold (see `resumed_arguments`).

    Data sets are prepared wherever they come from: the constructor, an attribute, `evaluate` or `predict`.

    Attributes:
        mask_token_id (`int`): Token of a hidden position.
        label_shift (`int`): 0 if logits row i predicts token i, 1 if row i - 1 does.
    """

    # Each micro-batch's loss is a mean, so the Trainer has to divide by the accumulation steps. Before transformers
    # 5.19 it asks `model_accepts_loss_kwargs` for that.
    loss_is_scaled_for_ga = False
    # Whether there is an objective for models that decide whole slots (ReFusion).
    trains_slots = False

    # What the Hub shows of the model.
    card_tags: tuple[str, ...] = TAGS
    # What an evaluation reports beside the loss.
    metric_names: frozenset[str] = frozenset()

    def __init__(self, *, args: Any, **kwargs: Any):
        self._metric_sums: dict[int, Any] = {}
        self._finished: torch.dtype | None = None  # with DeepSpeed: in which type the model is saved from now on
        super().__init__(args=args, **kwargs)
        self.model_accepts_loss_kwargs = False
        check_best_metric(args, self.eval_dataset, self.metric_names)

    def _check(self, args: Any, config_class: type, model: Any, kwargs: dict[str, Any]) -> None:
        """Refuse what a trainer cannot take; called before anything is made of its arguments."""
        check_parameters(args, config_class, kwargs)
        if model is None:
            raise ValueError("`model` must be a masked diffusion language model (got None). Load one, and pass it.")

    def _adopt(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        label_shift: int | None,
        peft_config: PeftConfig | None,
        masks: bool = True,
    ) -> PreTrainedModel:
        """Read off the model what the canvases need, and give it its adapter; called before the Trainer is set up.

        Where nothing is masked (`masks=False`), no mask token is asked for.
        """
        if masks:
            self.mask_token_id = mask_token_id(model, tokenizer)
        check_tokens(model, fill_tokens(tokenizer))
        self.label_shift = getattr(model, "logit_shift", 0) if label_shift is None else label_shift
        base = base_of(model)
        self._in_slots = getattr(base, "default_method", None) in IN_SLOTS
        if self._in_slots and not self.trains_slots:
            raise ValueError(
                f"`model` must see the whole canvas (got {type(base).__name__}, whose tokens see those that were "
                "decided before them): there is no such objective for them here. Fine-tune it with "
                "`MaskedDiffusionSFTTrainer`, or distil LLaDA or Dream."
            )
        self._forward_takes = frozenset(inspect.signature(type(base).forward).parameters)
        self._position_offset = getattr(base, "position_offset", None)
        self._ignores_padding = getattr(base, "supports_padding", None) is False
        if peft_config is not None:
            from peft import get_peft_model

            if peft_config.is_prompt_learning and peft_config.task_type != "CAUSAL_LM":
                raise unfit_task(peft_config)
            model = get_peft_model(model, peft_config)
        lengthened = lengthened_by(model) > 0
        self._keeps_marked_positions = getattr(base, "supports_position_mask", False) and not lengthened
        if moves_padded(model):
            raise ValueError(
                f"`peft_config` must not put embeddings in front of the prompts of {type(base).__name__} (got "
                f"{model.active_peft_config.peft_type.value}): PEFT then passes no `position_ids`, and padding would "
                "move the text. Train a prefix (`PrefixTuningConfig`) or a LoRA adapter."
            )
        if lengthened:  # PEFT drops them, with a warning at each step
            self._forward_takes -= {"position_ids"}
        return model

    def _model_inputs(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, kept: int | torch.Tensor
    ) -> dict[str, Any]:
        """What the forward gets: padding moves no text, and where the forward can, only `kept` logits are made.

        Raises:
            ValueError: For padding that the forward would read as text.
        """
        if self._ignores_padding and not attention_mask.all():
            raise ValueError(
                "`model` must leave out what `attention_mask` names, for rows are padded to one length (got a model "
                "whose forward does not read it). Train with `per_device_train_batch_size=1`, or another model."
            )
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if "logits_to_keep" in self._forward_takes:
            inputs["logits_to_keep"] = kept
        if "position_ids" in self._forward_takes and self._position_offset is not None:
            inputs["position_ids"] = positions_of(attention_mask) + self._position_offset
        return inputs

    def _check_prompts(self, input_ids: torch.Tensor, length: int) -> None:
        """Whether every answer of `length` tokens has a row before it, where that one predicts its first token.

        Raises:
            ValueError: For a batch in which no text has a prompt.
        """
        if input_ids.shape[1] < length + self.label_shift:
            raise ValueError(
                f"`train_dataset` must have prompts with `label_shift={self.label_shift}` (got a batch without any): "
                "the token before an answer predicts its first one. Begin each prompt with a token, such as the one "
                "that texts of the tokenizer begin with."
            )

    def _learnt_logits(
        self,
        model: torch.nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        learnt: torch.Tensor,
        sees: torch.Tensor | None = None,
    ) -> tuple[Any, torch.Tensor]:
        """The model's output, and its logits `(N, V)` that predict the learnt positions `(B, R)`, row by row.

        Args:
            model: called as it is.
            input_ids, attention_mask (`(B, L)`): the canvases, and 0 on padding.
            learnt (`(B, R)` bool): positions of the answers.
            sees (`(B, 1, L, L)`, *optional*): a mask for each position, in place of the one on padding.
        """
        length = learnt.shape[1]
        self._check_prompts(input_ids, length)
        kept: int | torch.Tensor = length + self.label_shift
        if self._keeps_marked_positions:
            last = input_ids.shape[1] - self.label_shift
            kept = torch.zeros_like(input_ids, dtype=torch.bool)
            kept[:, last - length : last] = learnt
        inputs = self._model_inputs(input_ids, attention_mask, kept)
        outputs = model(**inputs if sees is None else inputs | {"attention_mask": sees})
        if isinstance(kept, int):
            return outputs, outputs.logits[:, -kept:][:, :length][learnt]
        return outputs, outputs.logits

    @property
    def holds_shards(self) -> bool:
        """Whether a process has a part of the weights (FSDP, ZeRO-3), so that all take part in each forward."""
        return self.is_fsdp_enabled or zero_stage(self.accelerator) == 3

    def _as_taken(self, sees: torch.Tensor) -> torch.Tensor:
        """A bool mask for each position as the model's attention takes it."""
        base = base_of(self.model)
        return dense_mask(sees, base.dtype, text_config(base.config)._attn_implementation)

    def create_model_card(self, *args, **kwargs) -> None:
        """As transformers', with what the Hub shows of a text generation model in the card's metadata."""
        super().create_model_card(*args, **kwargs)
        card = Path(self.args.output_dir) / "README.md"
        if self.is_world_process_zero():
            name = kwargs.get("model_name") or Path(self.args.output_dir).resolve().name
            card.write_text(
                complete_card(card.read_text(encoding="utf-8"), name, tags=self.card_tags), encoding="utf-8"
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers'; before a push the pickled arguments are taken away again."""
        if self._finished:  # the engine of DeepSpeed has the weights as they were trained, by the names of then
            with whole_weights(self.model):
                self.model.to(self._finished)
                self._save(output_dir, state_dict=self.model.state_dict())
        else:
            super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir is None and self.args.should_save:  # `push_to_hub` calls it like that
            (Path(self.args.output_dir) / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def finish(self, *, merge_adapter: bool = False, dtype: torch.dtype | None = None) -> None:
        """Make of the trained model what `save_model` is to save; no step of training can follow.

        Args:
            merge_adapter (`bool`, defaults to `False`): Merge the adapter into the weights.
            dtype (`torch.dtype`, *optional*): Of the weights; as they were trained if unset.
        """
        if merge_adapter:
            model = self.accelerator.unwrap_model(self.model)
            with whole_weights(model):
                self.model = model.merge_and_unload()
        if self.is_deepspeed_enabled and (merge_adapter or dtype is not None):
            self._finished = dtype or self.model.dtype
        elif dtype is not None:
            self.model.to(dtype)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Evaluate the loss alone: logits under a random mask are of no use to a metric."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As the Trainer's, with the parts of the loss apart under the evaluation's own prefix."""
        self._metric_sums.pop(EVAL, None)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        found = self._averages(self._metric_sums.pop(EVAL, None))
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the parts of a training loss apart, averaged over all ranks since the last log."""
        if "loss" in logs:
            logs.update(self._averages(self._metric_sums.pop(TRAIN, None)))
        super().log(logs, start_time)

    def _averages(self, sums: Any) -> dict[str, float]:
        """Metrics of all ranks together from what `compute_loss` kept; none where it kept nothing."""
        raise NotImplementedError

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """As the Trainer's, called before each optimizer step: one that would spoil the weights is not taken.

        DeepSpeed takes its step with the backward pass. In float32 it skips one whose gradient is not finite, in
        bfloat16 the run ends behind it; the checkpoints are of before in either case.
        """
        grad_norm = super()._get_grad_norm(model, grad_norm)
        # A loss scaler (float16) skips such steps itself, on purpose. DeepSpeed may be told to compute no norm.
        if self.accelerator.scaler is None and grad_norm is not None and not math.isfinite(grad_norm):
            raise FloatingPointError(
                f"The gradient must be finite (its norm is {float(grad_norm)} at step {self.state.global_step}). "
                "Lower `learning_rate`, train in bfloat16 or float32, or resume from an earlier checkpoint."
            )
        return grad_norm

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, as the Trainer does, from a checkpoint that is whole; see the class for what may be named.

        Raises:
            CheckpointError: If the checkpoint is damaged, or there is none where one is asked for.
            InUseError: If another run is training into `output_dir`, whose checkpoints would mix with these.
            ValueError: If the run is asked for fewer steps than the checkpoint has, or for what cannot change in it.
        """
        found: list[Any] = [None]
        with ExitStack() as held:
            if self.is_world_process_zero():  # one process reads the files, and all go on from the same checkpoint
                try:
                    held.enter_context(only_writer(self.args.output_dir, "output_dir"))
                    found = [checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)]
                    if found[0] is not None:
                        compare_arguments(self.args, found[0], deepspeed=self.is_deepspeed_enabled)
                except ValueError as error:
                    found = [error]
            broadcast_object_list(found)
            if isinstance(found[0], ValueError):
                raise found[0]
            self._metric_sums.clear()
            return super().train(found[0], *args, **kwargs)

    def _init_training_state(self, max_steps: int, steps: int, epochs: int, checkpoint: str | None, *rest: Any) -> Any:
        """As the Trainer's, which trains before it asks whether it is done; a run at its end begins no epoch here."""
        begun = super()._init_training_state(max_steps, steps, epochs, checkpoint, *rest)
        self.state.compute_steps(self.args, max_steps)  # the intervals of the arguments, not the checkpoint's
        done = self.state.global_step
        if done > max_steps:
            name, value = ("max_steps", max_steps)
            if self.args.max_steps <= 0:
                name, value = ("num_train_epochs", f"{self.args.num_train_epochs}, which is {max_steps} steps")
            raise ValueError(
                f"`{name}` must reach the checkpoint's step (got {value}, and `{checkpoint}` has {done} steps). Raise "
                "it, or resume from an earlier checkpoint."
            )
        if done < max_steps:
            return begun
        logger.warning("All %d steps are done: no step is taken. Ask for more to go on.", done)
        return epochs, 0

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As the Trainer's, with the settings of the arguments; DeepSpeed restores its own."""
        settings = settings_of(self.optimizer)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and not self.is_deepspeed_enabled:
            set_again(self.optimizer, self.lr_scheduler, settings, own_schedule=not self._created_lr_scheduler)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """As the Trainer's; a run that goes on in another type than float16 has none."""
        if self.accelerator.scaler is not None:
            super()._load_scaler(checkpoint)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """As the Trainer's; the list of files comes last, before older checkpoints go."""
        folder = self._checkpoint_folder(trial)
        if self.args.should_save:
            begin_checkpoint(folder)
            write_arguments(folder, self.args)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if not self.args.push_to_hub:
            self._finish(folder)
        if self.args.should_save:
            rotate_checkpoints(str(folder.parent), limit, self.state.best_model_checkpoint, use_mtime=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._finish(Path(checkpoint_folder))
        if self.is_world_process_zero():  # what is pushed while training goes on carries the code, too
            for code in Path(checkpoint_folder).glob("*.py"):
                if not code.name.startswith("zero_to_"):  # DeepSpeed's own, for shards that are not pushed
                    shutil.copy(code, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    def _checkpoint_folder(self, trial: Any) -> Path:
        return Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

    def _finish(self, folder: Path) -> None:
        self.accelerator.wait_for_everyone()  # until all processes have written their parts
        if self.args.should_save:
            finish_checkpoint(folder, has_optimizer=not self.args.save_only_model)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if not self._load_converted(self.model if model is None else model, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._load_converted(self.model, self.state.best_model_checkpoint):
            super()._load_best_model()

    def _load_converted(self, model: torch.nn.Module, checkpoint: str) -> bool:
        # A process with a shard of the model has a file of its own, with the names that tensors have in memory.
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False
        return load_converted_weights(model, checkpoint)


def fill_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """What a collator fills canvases with: `pad_token_id` (the end of text where there is none) and `eos_token_id`."""
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    return {"pad_token_id": eos if pad is None else pad, "eos_token_id": eos}


def mask_token_id(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The mask token that model and tokenizer agree on.

    Raises:
        ValueError: If neither knows one, or they differ, or it is none of the model's.
    """
    of_model, of_tokenizer = text_setting(model.config, "mask_token_id"), tokenizer.mask_token_id
    if of_model is None and of_tokenizer is None:
        raise ValueError(
            "The mask token must be known to the model's config or the tokenizer (got none in either). "
            "Set `model.config.mask_token_id`."
        )
    if None not in (of_model, of_tokenizer) and of_model != of_tokenizer:
        raise ValueError(
            f"`mask_token_id` must be the same in config and tokenizer (got {of_model} and {of_tokenizer}). "
            "Set `model.config.mask_token_id` or `tokenizer.mask_token`."
        )
    found = of_tokenizer if of_model is None else of_model
    check_tokens(model, {"mask_token_id": found})
    return found


def check_tokens(model: PreTrainedModel, tokens: dict[str, int]) -> None:
    """Refuse tokens of a tokenizer that the model does not have.

    Raises:
        ValueError: Naming the first of them.
    """
    way_out = (
        "Call `model.resize_token_embeddings(len(tokenizer))` after adding tokens, or take the model's tokenizer."
    )
    for name, token in tokens.items():
        check_inside(f"`{name}`", token, vocabulary_of(model.config), way_out)
