"""Supervised fine-tuning of masked diffusion language models."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, IterableDataset
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from d3llm_hf.models.topology import Topology

from ..common.canvas_trainer import EVAL, TRAIN, CanvasTrainer, fill_tokens
from ..common.muon import MuonWithAdamW, split_parameters
from ..common.rows import Canvas, canvas_of, columns_of, keep_fitting
from .block_collator import BlockSFTCollator, pack
from .block_masking import draw_block_mask
from .block_settings import block_objective, block_topology
from .block_views import DoubledCanvas
from .causal import CausalSFTCollator, check_causal_objective, kept_columns, next_token_loss
from .collator import MaskedDiffusionSFTCollator, tokenize_conversations
from .config import CAUSAL, MaskedDiffusionSFTConfig
from .d2f import answer_blocks, block_causal_mask, draw_block_noise
from .masking import AnswerMask, draw_answer_mask, generator_for
from .slots import draw_slots, in_slots, slot_losses


if TYPE_CHECKING:
    from peft import PeftConfig


class MaskedDiffusionSFTTrainer(CanvasTrainer):
    r"""Trainer of the masked-diffusion SFT objective of LLaDA (https://huggingface.co/papers/2502.09992, Algorithm 2).

    The prompt is never masked. The answer, filled to a canvas of `response_length` tokens, is masked at random; the
    loss is `sum(CE / p) / length` over its masked tokens, averaged over rows. Part of each batch can have suffix masks
    instead, see [`MaskedDiffusionSFTConfig`].

    A block-causal model (SDAR, LLaDA2, Fast-dLLM v2, or one that `as_diffusion_lm` made so) sees each text twice in
    one forward, noisy and clean, and all of its blocks are learnt at once. `block_views` has what sees what, and
    `block_masking` the loss, a mean over the learnt tokens of the batch. With `objective="d2f"` the adapter of a
    bidirectional model learns to see blocks, see `d2f`.

    ReFusion is trained with its own objective (`slots`): whole slots are masked, the others are shuffled, and the mean
    loss of next tokens in these is added.

    With `objective="causal"` a causal model of transformers learns next tokens of the same rows (`causal`): what a
    diffusion model is compared with.

    Masks are drawn in `compute_loss` from a generator seeded by `(seed, optimizer step, micro-step, rank)`: a resumed
    run repeats those of an unbroken one, whatever the number of data workers.

    Args:
        model ([`~transformers.PreTrainedModel`]): Any masked diffusion LM whose forward takes `input_ids` and a 2-D
            `attention_mask`, and which has no causal attention unless by blocks, or a causal model for that objective.
            Where it takes `logits_to_keep`, the head runs on the answer only; one with [`D3LLMGenerationMixin`] gets
            the positions that decoding gives it.
        args ([`MaskedDiffusionSFTConfig`], *optional*): Training arguments.
        train_dataset, eval_dataset ([`~datasets.Dataset`]): Columns `prompt` and `completion` (text or turns), or
            `messages`, or ready `prompt_ids` and `response_ids`. A turn has a `role` and a `content`, which is text or
            a list of parts of the type "text". Rows are checked here; those of a stream when they are drawn.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer.
        peft_config ([`~peft.PeftConfig`], *optional*): Train an adapter of this kind instead of all weights.
        kwargs: Further arguments of [`~transformers.Trainer`]; those that would have no effect are refused.

    Raises:
        ValueError: If tokenizer and model disagree on the mask token, no example fits the canvas, the canvas goes
            beyond the model's positions, or a setting has no effect on the model's attention; as a `RowError`, which
            names row and column, for one that cannot be learnt.
        TypeError: For data that are no data set.
        FloatingPointError: While training, as soon as a loss is not finite.

    Example:

    ```python
    from d3llm_hf import LLaDAModelLM
    from datasets import load_dataset
    from trainers import MaskedDiffusionSFTConfig, MaskedDiffusionSFTTrainer
    from transformers import AutoTokenizer

    model = LLaDAModelLM.from_pretrained("GSAI-ML/LLaDA-8B-Base")
    trainer = MaskedDiffusionSFTTrainer(
        model=model,
        args=MaskedDiffusionSFTConfig("llada-sft", response_length=256),
        train_dataset=load_dataset("json", data_files="train.jsonl", split="train"),
        processing_class=AutoTokenizer.from_pretrained("GSAI-ML/LLaDA-8B-Base"),
    )
    trainer.train()
    ```
    """

    metric_names = frozenset({"uniform_loss", "suffix_loss", "masked_fraction"})
    trains_slots = True

    def __init__(
        self,
        model: PreTrainedModel,
        args: MaskedDiffusionSFTConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ):
        if args is None:
            args = MaskedDiffusionSFTConfig("masked-diffusion-sft")
        self._check(args, MaskedDiffusionSFTConfig, model, kwargs)
        if processing_class is None:
            raise ValueError(
                "`processing_class` must be a tokenizer (got None): prompts and answers are tokenised here. "
                "Pass the tokenizer of the model."
            )
        causal = args.objective == CAUSAL
        if causal:
            check_causal_objective(model, args)
        model = self._adopt(model, processing_class, 1 if causal else args.label_shift, peft_config, masks=not causal)
        if self._in_slots:
            self._check_slots(args)

        self.topology = None if causal else block_topology(model, args)
        packer: BlockSFTCollator | None = None
        made: MaskedDiffusionSFTCollator | BlockSFTCollator | CausalSFTCollator
        made = _canvas_collator(processing_class, args)
        if self.topology is not None:
            self.metric_names = frozenset({"masked_fraction"})
        self._loss = self._slot_loss if self._in_slots else self._canvas_loss
        if causal:
            self.metric_names, self.card_tags, self._loss = frozenset(), (), self._causal_loss
            made = CausalSFTCollator(fill_tokens(processing_class)["pad_token_id"], _static_length(args))
        elif self.topology is not None and args.objective == "masked_diffusion":
            self._loss = self._block_loss
            self.block_objective = block_objective(model, args)
            made = packer = _block_collator(processing_class, args, self.topology)
        elif self.topology is not None:
            self._loss = self._d2f_loss
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            prepare=partial(
                _prepare_dataset,
                tokenizer=processing_class,
                args=args,
                canvas=canvas_of(model, args),
                packer=packer if args.packing else None,
            ),
            data_collator=kwargs.pop("data_collator", None) or made,
            processing_class=processing_class,
            **kwargs,
        )
        self._draw_key: tuple[int, int] | None = None
        self._draws = 0

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Mask the answers of a batch and return its loss; see the class for the formulas."""
        loss, outputs = self._loss(model, inputs)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss must be finite (got {loss.item()} at step {self.state.global_step}). Lower "
                "`learning_rate`, set `max_grad_norm`, or resume from an earlier checkpoint."
            )
        return (loss, outputs) if return_outputs else loss

    def _canvas_loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any]:
        """The mean of the rows' losses, of a model that sees the whole canvas."""
        labels = inputs["labels"]  # (B, R)
        response_length = labels.shape[1]
        self._check_prompts(inputs["input_ids"], response_length)
        mask = draw_answer_mask(
            labels.ne(-100).cpu(),
            inputs["content_lengths"].cpu(),
            self._next_generator(model.training),
            min_mask_ratio=self.args.min_mask_ratio,
            eps=self.args.mask_ratio_eps,
            stratified=self.args.stratified_mask_ratio,
            suffix_fraction=self.args.suffix_mask_fraction,
            suffix_window=self.args.suffix_window,
        )
        hidden, weights = mask.hidden.to(labels.device), mask.weights.to(labels.device)
        input_ids = inputs["input_ids"].clone()
        input_ids[:, -response_length:].masked_fill_(hidden, self.mask_token_id)

        kept = response_length + self.label_shift
        outputs = model(**self._model_inputs(input_ids, inputs["attention_mask"], kept))
        counted = weights > 0
        logits = outputs.logits[:, -kept:][:, :response_length][counted].float()  # (N, V)
        token_loss = F.cross_entropy(logits, labels[counted], reduction="none") * weights[counted]
        row_loss = torch.zeros_like(weights).masked_scatter(counted, token_loss).sum(1)  # (B,)
        self._record(model.training, row_loss.detach(), mask, labels)
        return row_loss.mean(), outputs

    def _check_slots(self, args: MaskedDiffusionSFTConfig) -> None:
        """Refuse what the objective of slots does not have."""
        neutral = {"min_mask_ratio": 0.0, "stratified_mask_ratio": False, "suffix_mask_fraction": 0.0}
        neutral |= {"label_shift": None, "supervise_eos_fill": False}
        for name, value in neutral.items():
            if getattr(args, name) != value:
                raise ValueError(
                    f"`{name}` must be {value} for a model that decides slots (got {getattr(args, name)!r}): its "
                    "objective masks whole slots of an answer, which ends with its stop token. Set it so."
                )
        if "position_ids" not in self._forward_takes:
            raise ValueError(
                "`peft_config` must leave `position_ids` to a model that decides slots, whose tokens are fed in "
                "another order than the text's (got a learnt prompt). Train a LoRA adapter."
            )

    def _slot_loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any]:
        """ReFusion's objective; see `slots`. What is recorded is the part of masked slots."""
        labels, lengths = inputs["labels"], inputs["content_lengths"].tolist()
        generator = self._next_generator(model.training)
        draws = [draw_slots(length, generator, self.args.mask_ratio_eps) for length in lengths]
        ids, kept = inputs["input_ids"], labels.shape[1]
        rows = in_slots(ids.cpu(), [ids.shape[1] - kept] * len(ids), lengths, draws, self.mask_token_id)
        fed = self._model_inputs(rows.input_ids.to(ids.device), inputs["attention_mask"], kept)
        fed["position_ids"] = fed["position_ids"].gather(1, rows.order.to(ids.device))
        outputs = model(**fed)
        following, row_loss = slot_losses(outputs.logits[:, -kept:], rows)
        weights = rows.weights[:, -kept:]
        mask = AnswerMask(weights > 0, weights, torch.zeros(len(ids), dtype=torch.bool, device="cpu"))
        self._record(model.training, row_loss.detach(), mask, labels)
        return following + row_loss.mean(), outputs

    def _block_loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any]:
        """The mean over the learnt tokens of a batch, of a block-causal model."""
        # 1. The masks: a text's first token has no row that predicts it under a shift
        labels = inputs["labels"]  # (B, L)
        learnt = labels.ne(-100) & inputs["position_ids"].ge(self.label_shift)
        mask = draw_block_mask(
            learnt.cpu(),
            inputs["documents"].cpu(),
            inputs["blocks"].cpu(),
            self._next_generator(model.training),
            self.block_objective,
            min_mask_ratio=self.args.min_mask_ratio,
            eps=self.args.mask_ratio_eps,
            stratified=self.args.stratified_mask_ratio,
        )
        hidden = mask.hidden.to(labels.device)  # (V, B, L)
        self._add(model.training, torch.stack([hidden.sum(), learnt.sum() * len(hidden)]))

        # 2. The logits of the noisy halves, where something is hidden
        outputs, logits = self._doubled_logits(model, inputs, hidden)  # (N, V)

        # 3. The loss
        targets = labels.expand_as(hidden)[hidden]
        token_loss = F.cross_entropy(logits.float(), targets, reduction="none")
        return (token_loss * mask.weights.to(labels.device)[hidden]).sum(), outputs

    def _doubled_logits(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], hidden: torch.Tensor
    ) -> tuple[Any, torch.Tensor]:
        """The model's output, and its logits `(N, V)` that predict what is hidden in `(V, B, L)` views, in order."""
        clean, length = inputs["input_ids"], hidden.shape[-1]
        canvas = DoubledCanvas.of(
            torch.where(hidden, self.mask_token_id, clean),
            clean,
            inputs["position_ids"],
            inputs["documents"],
            inputs["blocks"],
        )
        taken: dict[str, Any] = {
            "input_ids": canvas.input_ids,
            "position_ids": canvas.position_ids + (self._position_offset or 0),
            "attention_mask": self._as_taken(canvas.attention_mask),
        }
        wanted = F.pad(hidden.flatten(0, 1)[:, self.label_shift :], (0, self.label_shift))  # (V B, L)
        if self._keeps_marked_positions:
            outputs = model(**taken, logits_to_keep=F.pad(wanted, (0, length)))
            return outputs, outputs.logits
        if "logits_to_keep" in self._forward_takes:
            taken["logits_to_keep"] = torch.arange(length, device=clean.device)
        outputs = model(**taken)
        return outputs, outputs.logits[:, :length][wanted]

    def _d2f_loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any]:
        """The mean over the hidden tokens of a batch, of a bidirectional model that learns to see blocks."""
        # 1. The masks, and what the student sees
        labels, seen = inputs["labels"], inputs["attention_mask"]  # (B, R), (B, L)
        learnt, block_length = labels.ne(-100), self.topology.block_length
        noise = draw_block_noise(learnt.cpu(), block_length, self._next_generator(model.training))
        hidden, weights = noise.hidden.to(labels.device), noise.weights.to(labels.device)
        self._add(model.training, torch.stack([hidden.sum(), learnt.sum()]))
        input_ids = inputs["input_ids"].clone()
        input_ids[:, -labels.shape[1] :].masked_fill_(hidden, self.mask_token_id)
        sees = self._as_taken(block_causal_mask(seen, answer_blocks(learnt, block_length)))

        # 2. The targets: what the model without its adapter says of the same canvas, or the text
        targets = labels[hidden]
        if self.args.objective == "d2f":
            with torch.no_grad(), self.model.disable_adapter():
                targets = self._learnt_logits(model, input_ids, seen, hidden)[1].float().softmax(-1)

        # 3. The loss
        outputs, logits = self._learnt_logits(model, input_ids, seen, hidden, sees)  # (N, V)
        token_loss = F.cross_entropy(logits.float(), targets, reduction="none")
        return (token_loss * weights[hidden]).sum(), outputs

    def _causal_loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any]:
        """The mean over the answer tokens of a batch, of a causal model; nothing is drawn, and nothing recorded."""
        labels = inputs["labels"]  # (B, L)
        kept = labels.shape[1] if self.args.pad_prompt_to_max else kept_columns(labels)
        outputs = model(**self._model_inputs(inputs["input_ids"], inputs["attention_mask"], kept))
        return next_token_loss(outputs.logits[:, -kept:], labels), outputs

    def _next_generator(self, training: bool) -> torch.Generator:
        """The generator of this forward: counts micro-steps within an optimizer step, batches within an evaluation."""
        key = (TRAIN, self.state.global_step) if training else (EVAL, 0)
        if key != self._draw_key:
            self._draw_key, self._draws = key, 0
        self._draws += 1
        return generator_for(self.args.seed, *key, self._draws, self.args.process_index)

    def _record(self, training: bool, row_loss: torch.Tensor, mask: Any, labels: torch.Tensor) -> None:
        is_suffix = mask.is_suffix.to(row_loss)
        sums = torch.stack(
            [
                (row_loss * (1 - is_suffix)).sum(),
                (1 - is_suffix).sum(),
                (row_loss * is_suffix).sum(),
                is_suffix.sum(),
                mask.hidden.sum().to(row_loss),
                labels.ne(-100).sum().to(row_loss),
            ]
        )
        self._add(training, sums)

    def _add(self, training: bool, sums: torch.Tensor) -> None:
        mode = TRAIN if training else EVAL
        self._metric_sums[mode] = self._metric_sums[mode] + sums if mode in self._metric_sums else sums

    def _averages(self, sums: torch.Tensor | None) -> dict[str, float]:
        """The uniform-mask loss, the suffix-mask loss and the masked fraction apart; in blocks, the last one."""
        if sums is None:
            return {}
        if self.topology is not None:
            masked, learnt = self.accelerator.gather(sums[None]).sum(0).tolist()
            return {"masked_fraction": round(masked / max(learnt, 1), 6)}
        uniform, uniform_rows, suffix, suffix_rows, masked, learnt = (
            self.accelerator.gather(sums[None]).sum(0).tolist()
        )
        found = {"masked_fraction": round(masked / max(learnt, 1.0), 6)}
        if uniform_rows:
            found["uniform_loss"] = round(uniform / uniform_rows, 6)
        if suffix_rows:
            found["suffix_loss"] = round(suffix / suffix_rows, 6)
        return found

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; every evaluation draws the same masks, so that losses can be compared over time."""
        self._draw_key = None
        return super().evaluation_loop(*args, **kwargs)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Muon for hidden matrices and AdamW for the rest with `use_muon`; the Trainer's own choice otherwise."""
        if not self.args.use_muon or self.optimizer is not None:
            return super().create_optimizer(model)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "`use_muon` must be False with FSDP or DeepSpeed (got True): Muon orthogonalises whole matrices, and "
                "these hold shards. Unset it, or train with plain data parallelism."
            )
        hidden, others = split_parameters(self.model if model is None else model)
        self.optimizer = MuonWithAdamW(
            [
                {
                    "params": hidden,
                    "use_muon": True,
                    "lr": self.args.muon_learning_rate,
                    "weight_decay": self.args.muon_weight_decay,
                },
                {"params": others, "weight_decay": self.args.weight_decay},
            ],
            lr=self.args.learning_rate,
            momentum=self.args.muon_momentum,
            betas=(self.args.adam_beta1, self.args.adam_beta2),
            eps=self.args.adam_epsilon,
        )
        return self.optimizer


def _canvas_collator(tokenizer: PreTrainedTokenizerBase, args: MaskedDiffusionSFTConfig) -> MaskedDiffusionSFTCollator:
    return MaskedDiffusionSFTCollator(
        **fill_tokens(tokenizer),
        response_length=args.response_length,
        supervise_eos_fill=args.supervise_eos_fill,
        prompt_length=args.max_prompt_length if args.pad_prompt_to_max else None,
    )


def _block_collator(
    tokenizer: PreTrainedTokenizerBase, args: MaskedDiffusionSFTConfig, topology: Topology
) -> BlockSFTCollator:
    return BlockSFTCollator(
        **fill_tokens(tokenizer),
        topology=topology,
        response_length=args.response_length,
        supervise_eos_fill=args.supervise_eos_fill,
        row_length=_static_length(args),
    )


def _static_length(args: MaskedDiffusionSFTConfig) -> int | None:
    """Length of every row where the arguments ask for one."""
    return args.max_prompt_length + args.response_length if args.packing or args.pad_prompt_to_max else None


def _prepare_dataset(
    dataset,
    tokenizer: PreTrainedTokenizerBase,
    args: MaskedDiffusionSFTConfig,
    canvas: Canvas,
    packer: BlockSFTCollator | None,
) -> Dataset | IterableDataset:
    """Tokenise unless that is done, leave out what does not fit the canvas, and pack what does if asked to."""
    columns = columns_of(dataset)
    if not {"prompt_ids", "response_ids"} <= set(columns):
        used = [name for name in columns if name != args.length_column_name]
        dataset = dataset.map(
            _tokenize,
            batched=True,
            with_indices=True,
            fn_kwargs={"tokenizer": tokenizer, "control_tokens_in_text": args.control_tokens_in_text},
            remove_columns=used,
        ).with_format(None)  # a transform has made text of the columns, and is not for ids
    fitting = keep_fitting(dataset, canvas)
    if packer is None:
        return fitting
    return fitting.map(
        pack,
        batched=True,
        fn_kwargs={"collator": packer, "length": canvas.prompt_length + canvas.response_length},
        remove_columns=columns_of(fitting),
    )


def _tokenize(batch: dict[str, list[Any]], numbers: list[int], **kwargs: Any) -> dict[str, list[list[int]]]:
    return tokenize_conversations(batch, numbers=numbers, **kwargs)
