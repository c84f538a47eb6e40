"""Whether the tensors of a checkpoint are those of its model: none that is missing, none that has no place."""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:  # what it is mixed into
    import torch
    from transformers.modeling_utils import PreTrainedModel
else:
    PreTrainedModel = object

HEAD = "lm_head.weight"


class WholeCheckpointMixin(PreTrainedModel):
    """`from_pretrained` that refuses what would run with random weights, or without some of the checkpoint's."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """As transformers', which only logs what is missing or has no place.

        A head may be missing where the checkpoint is of the backbone alone; tensors given as `state_dict` are the
        caller's own choice.

        Raises:
            ValueError: naming some of the tensors.
        """
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        if kwargs.get("state_dict") is None:
            missing, unplaced = set(info["missing_keys"]), set(info["unexpected_keys"])
            if cls.__name__ not in (model.config.architectures or ()):
                missing.discard(HEAD)
            if not hasattr(model, "lm_head"):  # the backbone of a whole model
                unplaced.discard(HEAD)
            if missing or unplaced:
                raise ValueError(
                    f"The checkpoint must hold the tensors of {cls.__name__} and no others (got "
                    f"{str(pretrained_model_name_or_path)!r} {described(missing, unplaced)}). It is damaged, or of "
                    "another architecture; fetch it again, or correct config.json."
                )
        return (model, info) if output_loading_info else model

    @staticmethod
    def own_tensor_name(name: str) -> str:
        """The name in [`stored_tensors`] of what has this name in a checkpoint."""
        return name

    def stored_tensors(self) -> "dict[str, torch.Tensor]":
        """The tensors as a checkpoint has them: those in memory, unless a family splits or joins them."""
        return self.state_dict()


def described(missing: Collection[str], unplaced: Collection[str]) -> str:
    """Names of tensors that are missing, and of those without a place."""
    parts = [f"without {_some(sorted(missing))}"] if missing else []
    parts += [f"with {_some(sorted(unplaced))}, which has no place"] if unplaced else []
    return " and ".join(parts)


def _some(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
