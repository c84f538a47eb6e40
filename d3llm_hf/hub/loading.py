"""Model and tokenizer of the commands, from the name that was typed."""

from collections.abc import Callable
from typing import Any

from ..progress import quiet_loading
from ..registration.families import FAMILIES
from ..watch.terminal import waiting
from .sources import checkpoint_source, load_tokenizer, loading


def load_model(source: str, **kwargs: Any) -> Any:
    """What `from_pretrained` makes of a checkpoint; where [`as_diffusion_lm`] saved it, it gets its decoder again.

    Args:
        source (`str`): a folder or an id on the Hub.
        kwargs: of `from_pretrained`.

    Raises:
        ValueError: for a checkpoint whose config says that it decodes by diffusion, and whose model cannot.
    """
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(source, **hub_arguments(kwargs))
    if not decodes_by_its_config(config):
        return AutoModel.from_pretrained(source, **kwargs)
    from ..adapters import as_diffusion_lm

    return as_diffusion_lm(auto_class(config).from_pretrained(source, **kwargs))


def hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Of the arguments of `from_pretrained` those that say where a checkpoint lies, for its config."""
    names = ("revision", "token", "trust_remote_code", "gguf_file")
    return {name: value for name, value in kwargs.items() if name in names}


def decodes_by_its_config(config: Any) -> bool:
    """Whether it is the config of a stock class that [`as_diffusion_lm`] gave the decoder."""
    ours = config.model_type in FAMILIES
    return not ours and hasattr(config, "logit_shift") and getattr(config, "mask_token_id", None) is not None


def auto_class(config: Any) -> Any:
    """The Auto class of masked language models where the architecture has one, else that of decoders."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    return AutoModelForMaskedLM if type(config) in AutoModelForMaskedLM._model_mapping else AutoModelForCausalLM


def load(name: str, *, device: str = "auto", dtype: str = "auto", revision: str | None = None):
    """Model and tokenizer of a folder, a Hub id or an embedded checkpoint. Never runs a checkpoint's own code.

    A terminal shows what is being loaded: torch and transformers alone take some seconds.

    Raises:
        ValueError: for an unknown device or dtype, or a model that cannot decode by diffusion.
        OSError: when there is no such checkpoint.
    """
    with waiting(f"loading {name}"):
        return _load(name, device, dtype, revision, load_model, _check_diffusion)


def load_causal(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    gguf_file: str | None = None,
):
    """Model and tokenizer of a causal checkpoint of transformers, otherwise as [`load`].

    Args:
        gguf_file: of the folder, which holds config and weights in place of those; weights are dequantised.

    Raises:
        ValueError: for an unknown device or dtype, or a checkpoint of which transformers makes no causal model.
        TypeError: for one that decodes by diffusion.
        OSError: when there is no such checkpoint.
    """
    with waiting(f"loading {name}"):
        return _load(name, device, dtype, revision, _causal_model, _check_causal, gguf_file)


def load_draft_head(name: str) -> Any:
    """The draft head of EAGLE-3 in a folder or of a Hub id, on the CPU in its own dtype.

    Raises:
        OSError, ValueError: as [`Eagle3Head.from_pretrained`].
    """
    from ..autoregressive.eagle3.head import Eagle3Head

    with waiting(f"loading {name}"):
        return Eagle3Head.from_pretrained(name)


def decodes_by_diffusion(name: str, *, revision: str | None = None) -> bool:
    """Whether a checkpoint is one of this package's families, or was given the decoder, by its config alone.

    A terminal shows what is being loaded, as in [`load`].

    Raises:
        OSError: when there is no such checkpoint.
    """
    with waiting(f"loading {name}"):
        from transformers import AutoConfig

        quiet_loading()
        with loading(name):
            config = AutoConfig.from_pretrained(checkpoint_source(name), revision=revision, trust_remote_code=False)
    return config.model_type in FAMILIES or decodes_by_its_config(config)


def _causal_model(source: str, **kwargs: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source, **kwargs)


def _check_diffusion(model: Any, name: str) -> None:
    from ..models.generation_d3llm import D3LLMGenerationMixin

    if not isinstance(model, D3LLMGenerationMixin):
        raise ValueError(
            f"`model` must be a LLaDA, Dream or d3LLM checkpoint (got {type(model).__name__} from {name!r})."
        )


def _check_causal(model: Any, name: str) -> None:
    from ..autoregressive.causal import check_causal

    check_causal(model, "ar")


def _load(
    name: str,
    device: str,
    dtype: str,
    revision: str | None,
    make: Callable[..., Any],
    check: Callable[[Any, str], None],
    gguf_file: str | None = None,
):
    import torch

    quiet_loading()
    known = getattr(torch, dtype, None)
    if dtype != "auto" and not (isinstance(known, torch.dtype) and known.is_floating_point):
        raise ValueError(f"`--dtype` must be a floating point type of torch (got {dtype!r}). Try float32 or bfloat16.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(
            f"`--device` must be a device of torch that this machine has (got {device!r}: {error}). Try cpu."
        ) from error
    source = checkpoint_source(name)
    common: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    common |= {} if gguf_file is None else {"gguf_file": gguf_file}
    with loading(name, gguf_file=gguf_file):
        model = make(source, dtype=dtype, **common)
    check(model, name)
    return model.to(target).eval(), load_tokenizer(source, name, **common)
