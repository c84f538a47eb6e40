"""MMaDA's text part on today's transformers: LLaDA's layers, and a vocabulary with codes of images."""

from typing import Any

import torch
from transformers.conversion_mapping import register_checkpoint_conversion_mapping

from .configuration_mmada import MMadaConfig
from .modeling_llada import LLaDAModel, LLaDAModelLM, official_names


register_checkpoint_conversion_mapping(MMadaConfig.model_type, official_names(), overwrite=True)


class MMadaModel(LLaDAModel):
    """The backbone, which is LLaDA's."""

    config: MMadaConfig
    config_class = MMadaConfig


class MMadaModelLM(LLaDAModelLM):
    """MMaDA (8B-Base, MixCoT), text alone: logits row i predicts token i.

    `forward` gives the logits of all tokens, as the official code does; decoding hides those that are no text unless
    `config.text_only` says otherwise. An image in a prompt is read as any other token. None is written: whatever asks
    for one is refused.
    """

    config: MMadaConfig
    config_class = MMadaConfig

    def text_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """`(n, V)` logits with those of codes and tasks at -inf."""
        if not self.config.text_only:
            return logits
        size, hidden = self.config.text_vocab_size or self.config.vocab_size, float("-inf")
        tasks = [token for token in self.config.task_token_ids if token < size]
        logits[:, size:] = hidden
        logits[:, tasks] = hidden
        return logits

    def _prepare_model_inputs(self, *args, **kwargs):
        """As any other's, but a prompt that asks for an image is refused."""
        prompt, name, model_kwargs = super()._prepare_model_inputs(*args, **kwargs)
        if name == "input_ids":
            asking = prompt[torch.isin(prompt, prompt.new_tensor(self.config.drawing_token_ids))].tolist()
            if asking:
                raise ValueError(
                    f"`input_ids` must ask for text (got the token {asking[0]}, which asks for an image or video): "
                    "generation of images is not implemented here. Take it out, or run MMaDA's own code."
                )
        return prompt, name, model_kwargs

    def t2i_generate(self, *args: Any, **kwargs: Any):
        """Refused: the official code's generation of images.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "`t2i_generate` draws images, which is not implemented here (got a call of it): this package has MMaDA's "
            "text part. Call `generate` for text, or run MMaDA's own code."
        )


__all__ = ["MMadaConfig", "MMadaModel", "MMadaModelLM"]
