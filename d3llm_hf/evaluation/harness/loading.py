"""Model and tokenizer of an evaluation, from a name or as they are."""

import logging
from typing import Any

import torch

from ...autoregressive.causal import check_causal
from ...hub.loading import load_model
from ...hub.sources import checkpoint_source, load_tokenizer, loading


logger = logging.getLogger(__name__)


def load_checkpoint(
    pretrained: Any,
    tokenizer: Any = None,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    peft: str | None = None,
    device: str | torch.device | None = None,
    causal: bool = False,
) -> tuple[Any, Any]:
    """Loads what is named, puts the model on its device, in evaluation mode.

    Args:
        pretrained (`str` or model): folder, id on the Hub or name of an embedded checkpoint; a model stays where it is
            unless there is a `device`.
        tokenizer (`str` or tokenizer, *optional*): that of `pretrained` when unset.
        revision, dtype, trust_remote_code, attn_implementation: as in `from_pretrained`.
        peft (`str`, *optional*): folder or id of an adapter, merged into the weights where it can be.
        device (*optional*): where there is a GPU that one, when unset. lm-eval asks for `cuda:0` by default; where
            there is none, the CPU takes its place.
        causal (`bool`): load a causal model of transformers, as it is, in place of one that decodes by diffusion.

    Returns:
        model and tokenizer.

    Raises:
        ValueError: for a data type or device that torch does not know.
        TypeError: for a model of the other kind, or one without a tokenizer.
        OSError: when there is no such checkpoint.
    """
    from transformers import AutoModelForCausalLM

    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"`dtype` must be a data type of torch (got {dtype!r}). Try float32 or bfloat16.")
    target = _device(device, isinstance(pretrained, str))
    common = {"revision": revision, "trust_remote_code": trust_remote_code}
    if isinstance(pretrained, str):
        source = checkpoint_source(pretrained)
        more = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        with loading(pretrained, "pretrained"):
            make: Any = AutoModelForCausalLM.from_pretrained if causal else load_model
            model = make(source, dtype=dtype, **common, **more)
        tokenizer = source if tokenizer is None else tokenizer
    else:
        model = pretrained
    if peft is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, peft)
        if not model.active_peft_config.is_prompt_learning:  # a learnt prompt has no weights to be merged into
            model = model.merge_and_unload()
    if causal:
        check_causal(model, "ar")
    elif getattr(model, "logit_shift", None) is None:
        raise TypeError(
            f"`pretrained` must be a LLaDA, Dream or d3LLM checkpoint, or a model that decodes by diffusion (got "
            f"{type(model).__name__}). For stock models see `d3llm_hf.as_diffusion_lm`; causal ones are evaluated as "
            "they are with `--model d3llm-ar`."
        )
    if tokenizer is None:
        raise TypeError("`tokenizer` must be given with a loaded model (got None). Pass its name or the tokenizer.")
    if isinstance(tokenizer, str):
        tokenizer = load_tokenizer(checkpoint_source(tokenizer), tokenizer, "tokenizer", **common)
    if target is not None:
        model = model.to(target)
    return model.eval(), tokenizer


def _device(device: str | torch.device | None, choose: bool) -> torch.device | None:
    """The device to use; `None` leaves a loaded model where it is."""
    gpu = torch.cuda.is_available()
    if device is None:
        return torch.device("cuda" if gpu else "cpu") if choose else None
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"`device` must be a device of torch (got {device!r}). Try cpu or cuda.") from error
    if target.type == "cuda" and not gpu:
        logger.warning("There is no GPU for `device=%s`; the CPU is used.", device)
        return torch.device("cpu")
    return target
