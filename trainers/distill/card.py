"""The model card of a distilled checkpoint: how it was made and what it gives."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers

import d3llm_hf
from d3llm_hf.hub.model_card import EXAMPLE

from .callbacks import floor_at, window_size
from .noisy_views import CERTAINTY_NOISE


_METHODS = {
    "trajectory": "pseudo-trajectory distillation",
    "random": "random masks (the baseline of pseudo-trajectory distillation)",
    "certainty": "certainty forcing",
    "rollout": "the text on states of its own decoding (a variant of pseudo-trajectory distillation)",
}
_RESULTS = {
    "tpf": "Tokens per forward",
    "exact_match": "Exact match",
    "loss": "Loss",
    "cross_entropy": "Cross-entropy (nats per token)",
    "complementary_cross_entropy": "Cross-entropy, complementary view",
    "certainty": "Certainty (mean probability of the best token)",
}


class Trained(Protocol):
    """What the card tells of a trainer: transformers' own `args`, `state`, `model` and `accelerator`, and two more.

    Attributes:
        adapter_configs: of PEFT, empty where the whole model is trained.
        entropy_on_complement: whether the complementary view has the entropy term, too.
    """

    args: Any
    state: Any
    model: Any
    accelerator: Any
    adapter_configs: list[Any]
    entropy_on_complement: bool


def render_distill_card(
    trainer: Trained,
    *,
    name: str,
    base_model: str | None,
    tags: list[str],
    metadata: dict[str, Any],
) -> str:
    """The README.md of what `trainer` trained.

    Args:
        trainer ([`Trained`]): Recipe and results are read from its arguments and its log.
        name (`str`): Name of the checkpoint.
        base_model (`str`, *optional*): Hub id that the student's weights come from; what the config says if unset and
            no folder of this machine.
        tags (`list[str]`): For the Hub.
        metadata (`dict`): Further entries of the metadata block.

    Returns:
        `str`: Markdown with the metadata block that the Hub reads.
    """
    from huggingface_hub import ModelCardData
    from jinja2 import Environment, StrictUndefined

    model = trainer.accelerator.unwrap_model(trainer.model)
    origin = model.config._name_or_path
    if base_model is None and origin and not Path(origin).exists():
        base_model = origin
    is_adapter = hasattr(model, "get_base_model")
    if base_model is not None:
        metadata = {"base_model": base_model} | metadata
    metadata |= _model_index(trainer.state.log_history, name, metadata.get("datasets"))
    data = ModelCardData(
        **metadata,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=tags,
    )
    template = (resources.files("trainers") / "templates" / "distilled_model_card.md").read_text(encoding="utf-8")
    state, args = trainer.state, trainer.args
    return (
        Environment(undefined=StrictUndefined, keep_trailing_newline=True)
        .from_string(template)
        .render(
            metadata=data.to_yaml(),
            name=name,
            base_model=base_model,
            is_adapter=is_adapter,
            example=EXAMPLE,
            method=_METHODS[args.objective],
            objective=args.objective,
            response_length=args.response_length,
            step=state.global_step,
            max_steps=max(state.max_steps, state.global_step),
            results=_results(state.log_history),
            recipe=_recipe(trainer),
            curriculum=_curriculum(args),
            versions={
                "d3llm_hf": d3llm_hf.__version__,
                "transformers": transformers.__version__,
                "torch": torch.__version__,
            },
        )
    )


def _results(log_history: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    """The newest value of each metric of a held-out split."""
    newest: dict[str, Any] = {}
    for entry in log_history:
        newest |= entry
    return [(label, f"{newest[f'eval_{key}']:.4g}") for key, label in _RESULTS.items() if f"eval_{key}" in newest]


def _model_index(log_history: list[dict[str, Any]], name: str, dataset: str | list[str] | None) -> dict[str, Any]:
    """The newest held-out decoding, as arguments of `ModelCardData`."""
    from huggingface_hub import EvalResult

    newest: dict[str, Any] = {}
    for entry in log_history:
        newest |= entry
    dataset = dataset if isinstance(dataset, str) else (dataset or ["held-out"])[0]
    found = [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=f"held-out split of {dataset}"
            if dataset != "held-out"
            else "held-out split of the training data",
            metric_type=kind,
            metric_name=_RESULTS[key],
            metric_value=round(newest[f"eval_{key}"], 4),
        )
        for key, kind in (("exact_match", "exact_match"), ("tpf", "tokens_per_forward"))
        if f"eval_{key}" in newest
    ]
    return {"model_name": name, "eval_results": found} if found else {}


def _recipe(trainer: Trained) -> list[tuple[str, Any]]:
    args = trainer.args
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    entropy = f"weight {args.entropy_weight}, temperature {args.entropy_temperature}"
    in_both = trainer.entropy_on_complement and args.draws_windows
    rows = [
        ("Objective", f"`{args.objective}`"),
        ("Text to learn", "the data set's answers" if args.use_target_ids else "the teacher's answers"),
        ("Complementary view", "yes" if args.complementary and args.draws_windows else "no"),
        ("Entropy of right predictions", entropy + (", in both views" if in_both else "")),
        ("Scale of the loss", args.loss_scale),
        ("Weight of the fine-tuning loss", args.sft_weight),
        ("Answer canvas", f"{args.response_length} tokens"),
        ("Samples per optimizer step", batch),
        ("Optimizer steps", trainer.state.global_step),
        ("Learning rate", f"{args.learning_rate:g}, {args.lr_scheduler_type.value}, {args.optim.value}"),
        ("Weight decay, gradient clipping", f"{args.weight_decay:g}, {args.max_grad_norm:g}"),
        ("Seed", args.seed),
    ]
    if args.state_region == "blocks":
        rows.append(("Open at once", "two blocks with a noise level each"))
    if args.objective == "rollout":
        low, high = args.rollout_threshold
        forwards, length, states = args.rollout_max_forwards, args.rollout_block_length, args.rollout_states
        rows += [
            ("Rollout", f"{forwards} forwards at most, blocks of {length}, entropy up to {low:g} to {high:g} nats"),
            ("States learnt of each rollout", states),
            ("Steps with a rollout", "all" if args.rollout_every == 1 else f"one of {args.rollout_every}"),
        ]
    rows += _switches(args)
    for adapter in trainer.adapter_configs:
        rows.append((f"{adapter.peft_type.value} adapter", _described(adapter)))
    return rows


def _switches(args: Any) -> list[tuple[str, Any]]:
    """What is learnt besides the text and how it counts, as far as it was asked for."""
    said = {
        "token": "the text's token",
        "teacher": "a teacher's distribution",
        "self": "the model's own distribution",
        "none": "nothing",
    }
    rows = []
    if args.soft_targets or args.far_target is not None:
        rows.append(("Target", said[args.target]))
    if args.far_target is not None:
        rows.append((f"Target of what is decided more than {args.near_steps} tokens later", said[args.far_target]))
    if args.teacher_reveal is not None:
        rows.append(("Tokens that the target's state shows besides", f"{args.teacher_reveal:.0%}"))
    if args.entropy_below is not None:
        rows.append(("Entropy of right predictions below a probability of", args.entropy_below))
    if args.wrong_entropy_weight:
        gate = f"weight {args.wrong_entropy_weight}, above a probability of {args.wrong_confidence}"
        rows.append(("Minus the entropy of wrong predictions", gate))
    if args.distance_weight:
        rows.append(("Fall of the weights with the distance in the trajectory", args.distance_weight))
    if args.rank_weight:
        rows.append(("Entropies in the teacher's order", f"weight {args.rank_weight}, margin {args.rank_margin}"))
    return rows


def _described(adapter: Any) -> str:
    """Size and place of an adapter, by what the config of its kind has."""
    said = {"r": "r={}", "lora_alpha": "alpha={}", "num_virtual_tokens": "{} virtual tokens"}
    parts = [form.format(getattr(adapter, name)) for name, form in said.items() if hasattr(adapter, name)]
    targets = getattr(adapter, "target_modules", None)
    if targets:
        parts.append("on " + (targets if isinstance(targets, str) else ", ".join(sorted(targets))))
    return ", ".join(parts)


def _curriculum(args: Any) -> list[dict[str, Any]]:
    if not args.draws_windows:
        return []
    epochs = len(args.window_sizes) if args.max_steps > 0 else args.num_train_epochs
    rows = []
    for progress in (0, 25, 50, 75, 100):
        floor = floor_at(progress, 100, args)
        noise = CERTAINTY_NOISE if args.objective == "certainty" else f"{floor:.2f} to {args.noise_end:.2f}"
        rows.append(
            {"progress": progress, "noise": noise, "window": window_size(progress / 100 * epochs, args.window_sizes)}
        )
    return rows
