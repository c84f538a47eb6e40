"""Diffusion language models (d3LLM, LLaDA, Dream) on today's Hugging Face transformers.

    import d3llm_hf
    from transformers import AutoModel

    model = AutoModel.from_pretrained("d3LLM/d3LLM_LLaDA")  # loads through this package, without remote code

Importing the package loads neither torch nor transformers and touches no network: the model families are registered
with the Auto classes when transformers loads these, and the names below are imported when they are first used. Where
`evaluate` is installed, the metric "aup" is copied to where `evaluate.load` finds it (see `metrics.registration`).
"""

import importlib
from typing import TYPE_CHECKING

from .metrics.registration import register_metric
from .registration.families import register_families


__version__ = "0.1.0"

_MODULE_OF = {
    "BatchTextStreamer": "watch.streamers",
    "CanvasIterator": "watch.streamers",
    "CanvasUpdate": "watch.streamers",
    "Chat": "watch.chat",
    "D3LLMGenerationConfig": "models.generation_config_d3llm",
    "D3LLMGenerationMixin": "models.generation_d3llm",
    "D3LLMGenerationOutput": "models.generation_d3llm",
    "DreamConfig": "models.configuration_dream",
    "DreamModel": "models.modeling_dream",
    "Eagle3Head": "autoregressive.eagle3.head",
    "Fast_dLLM_QwenConfig": "models.configuration_fast_dllm_v2",
    "Fast_dLLM_QwenForCausalLM": "models.modeling_fast_dllm_v2",
    "Form": "forms.form",
    "LLaDA2MoeConfig": "models.configuration_llada2",
    "LLaDA2MoeModelLM": "models.modeling_llada2",
    "LLaDAConfig": "models.configuration_llada",
    "LLaDAModel": "models.modeling_llada",
    "LLaDAModelLM": "models.modeling_llada",
    "LogLikelihood": "likelihood",
    "MMadaConfig": "models.configuration_mmada",
    "MMadaModelLM": "models.modeling_mmada",
    "ReFusionConfig": "models.configuration_refusion",
    "ReFusionForCausalLM": "models.modeling_refusion",
    "SDARConfig": "models.configuration_sdar",
    "SDARForCausalLM": "models.modeling_sdar",
    "SDARMoeConfig": "models.configuration_sdar_moe",
    "SDARMoeForCausalLM": "models.modeling_sdar_moe",
    "SlotCache": "models.cache",
    "as_diffusion_lm": "adapters",
    "aup_score": "metrics.aup.curve",
    "block_causal_lm": "conversion",
    "bootstrap_aup": "metrics.aup.curve",
    "choose": "forms.choosing",
    "eagle3_generate": "autoregressive.eagle3.generate",
    "encode_chat": "text",
    "encode_infill": "text",
    "encode_text": "text",
    "export_checkpoint": "hub.checkpoints",
    "fill": "forms.filling",
    "fill_batch": "forms.filling",
    "form_of_schema": "forms.schema",
    "init_checkpoint": "hub.checkpoints",
    "is_greedy": "likelihood",
    "log_likelihood": "likelihood",
    "push_folder": "hub.push",
    "stream_generate": "watch.streamers",
}

__all__ = [
    "BatchTextStreamer",
    "CanvasIterator",
    "CanvasUpdate",
    "Chat",
    "D3LLMGenerationConfig",
    "D3LLMGenerationMixin",
    "D3LLMGenerationOutput",
    "DreamConfig",
    "DreamModel",
    "Eagle3Head",
    "Fast_dLLM_QwenConfig",
    "Fast_dLLM_QwenForCausalLM",
    "Form",
    "LLaDA2MoeConfig",
    "LLaDA2MoeModelLM",
    "LLaDAConfig",
    "LLaDAModel",
    "LLaDAModelLM",
    "LogLikelihood",
    "MMadaConfig",
    "MMadaModelLM",
    "ReFusionConfig",
    "ReFusionForCausalLM",
    "SDARConfig",
    "SDARForCausalLM",
    "SDARMoeConfig",
    "SDARMoeForCausalLM",
    "SlotCache",
    "__version__",
    "as_diffusion_lm",
    "aup_score",
    "block_causal_lm",
    "bootstrap_aup",
    "choose",
    "eagle3_generate",
    "encode_chat",
    "encode_infill",
    "encode_text",
    "export_checkpoint",
    "fill",
    "fill_batch",
    "form_of_schema",
    "init_checkpoint",
    "is_greedy",
    "log_likelihood",
    "push_folder",
    "stream_generate",
]

register_families()
register_metric()


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if TYPE_CHECKING:
    from .adapters import as_diffusion_lm
    from .autoregressive.eagle3.generate import eagle3_generate
    from .autoregressive.eagle3.head import Eagle3Head
    from .conversion import block_causal_lm
    from .forms.choosing import choose
    from .forms.filling import fill, fill_batch
    from .forms.form import Form
    from .forms.schema import form_of_schema
    from .hub.checkpoints import export_checkpoint, init_checkpoint
    from .hub.push import push_folder
    from .likelihood import LogLikelihood, is_greedy, log_likelihood
    from .metrics.aup.curve import aup_score, bootstrap_aup
    from .models.cache import SlotCache
    from .models.configuration_dream import DreamConfig
    from .models.configuration_fast_dllm_v2 import Fast_dLLM_QwenConfig
    from .models.configuration_llada import LLaDAConfig
    from .models.configuration_llada2 import LLaDA2MoeConfig
    from .models.configuration_mmada import MMadaConfig
    from .models.configuration_refusion import ReFusionConfig
    from .models.configuration_sdar import SDARConfig
    from .models.configuration_sdar_moe import SDARMoeConfig
    from .models.generation_config_d3llm import D3LLMGenerationConfig
    from .models.generation_d3llm import D3LLMGenerationMixin, D3LLMGenerationOutput
    from .models.modeling_dream import DreamModel
    from .models.modeling_fast_dllm_v2 import Fast_dLLM_QwenForCausalLM
    from .models.modeling_llada import LLaDAModel, LLaDAModelLM
    from .models.modeling_llada2 import LLaDA2MoeModelLM
    from .models.modeling_mmada import MMadaModelLM
    from .models.modeling_refusion import ReFusionForCausalLM
    from .models.modeling_sdar import SDARForCausalLM
    from .models.modeling_sdar_moe import SDARMoeForCausalLM
    from .text import encode_chat, encode_infill, encode_text
    from .watch.chat import Chat
    from .watch.streamers import BatchTextStreamer, CanvasIterator, CanvasUpdate, stream_generate
