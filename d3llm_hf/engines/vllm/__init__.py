"""The vLLM plugin: LLaDA, Dream and their d3LLM students under vLLM's continuous batching (extra `vllm`).

vLLM calls [`register`] in each of its processes, by the entry point group `vllm.general_plugins`.
"""


def register() -> None:
    """Tells vLLM the models, their configs, and who looks at requests first."""
    from vllm import ModelRegistry

    from ...models.configuration_dream import DreamConfig
    from ...models.configuration_llada import LLaDAConfig
    from .admission import install

    # By which vLLM knows a diffusion model; how long a canvas is says `--diffusion-config`.
    for config in (LLaDAConfig, DreamConfig):
        setattr(config, "canvas_length", 0)  # noqa: B010
    for name, model in {"LLaDAModelLM": "LLaDAForVllm", "DreamModel": "DreamForVllm"}.items():
        ModelRegistry.register_model(name, f"{__name__}.model:{model}")
    install()


__all__ = ["register"]
