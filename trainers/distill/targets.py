"""Who else than the text says what a hidden position should hold: a frozen teacher, or the student itself.

Both are asked at the student's own state (D2F, https://huggingface.co/papers/2508.09192), or at one that shows some of
its hidden tokens as well (CD4LM, https://huggingface.co/papers/2601.02236; SDTT, https://huggingface.co/papers/2410.21035).
Tokens that it shows are their own target. The student learns by KL(target || student), as in CD4LM and TAD.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from d3llm_hf.hub.sources import checkpoint_source
from d3llm_hf.models.probes import evaluating
from d3llm_hf.models.text_config import text_setting
from d3llm_hf.models.token_ids import vocabulary_of
from d3llm_hf.models.wrappers import base_of

from ..common.loading import load_checkpoint
from ..common.shards import loaded_whole


if TYPE_CHECKING:
    from .config import PseudoTrajectoryDistillConfig


def teacher_of(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    args: PseudoTrajectoryDistillConfig,
) -> PreTrainedModel | None:
    """The model whose distributions are learnt; `None` where that is the student itself, or what its adapter adapts.

    Args:
        student ([`~transformers.PreTrainedModel`]): With its adapter, where it has one.
        teacher ([`~transformers.PreTrainedModel`], *optional*): As given to the trainer.
        tokenizer, args: Of the trainer.

    Raises:
        ValueError: For a teacher that nothing asks, two of them, none where one is needed, one that reads another
            canvas than the student, or one that is divided over processes.
    """
    name = args.teacher_model_name_or_path
    if "teacher" not in args.soft_targets:
        if teacher is not None:
            raise ValueError(
                f"`teacher` needs `target='teacher'` or `far_target='teacher'` (got {type(teacher).__name__}, "
                f"{args.target!r} and {args.far_target!r}). Set one of them, or pass no teacher."
            )
        return None
    if teacher is None and name is None:
        if hasattr(student, "disable_adapter"):
            return None
        raise ValueError(
            f"A target of a teacher needs `teacher` or `teacher_model_name_or_path` where the student has no adapter "
            f"(got {type(student).__name__} and neither). Pass the model that the student was made of, or train an "
            "adapter, whose base then teaches it."
        )
    if teacher is not None and name is not None:
        raise ValueError(
            f"`teacher_model_name_or_path` must be unset where `teacher` is given (got {name!r} and "
            f"{type(teacher).__name__}). Pass one of them."
        )
    if teacher is None:
        with loaded_whole():
            teacher = load_checkpoint(checkpoint_source(name), tokenizer, dtype=student.dtype)
    if any(hasattr(weight, "ds_id") for weight in teacher.parameters()):
        raise ValueError(
            f"`teacher` must be whole in each process (got {type(teacher).__name__} divided by ZeRO-3). Name it by "
            "`teacher_model_name_or_path`, or load it before the training arguments are made."
        )
    _check_same_canvas(base_of(teacher), base_of(student))
    return teacher.eval().requires_grad_(False).to(args.device)


def _check_same_canvas(teacher: Any, student: Any) -> None:
    facts = {
        "class": (type(teacher).__name__, type(student).__name__),
        "vocabulary": (vocabulary_of(teacher.config), vocabulary_of(student.config)),
        "mask token": tuple(text_setting(model.config, "mask_token_id") for model in (teacher, student)),
    }
    for fact, (found, wanted) in facts.items():
        if found != wanted:
            raise ValueError(
                f"`teacher` must read the student's canvas (got {fact} {found!r}, and the student has {wanted!r}). "
                "Take the checkpoint that the student was made of."
            )


@contextmanager
def asked(student: Any, teacher: Any | None, kind: str) -> Iterator[Any]:
    """The model to ask for a target, without gradient: the student, its teacher, or itself without its adapter.

    Args:
        student, teacher: As of [`teacher_of`].
        kind (`str`): `"teacher"` or `"self"`.
    """
    model = student if kind == "self" or teacher is None else teacher
    with evaluating(model), nullcontext() if kind == "self" or teacher is not None else student.disable_adapter():
        yield model
