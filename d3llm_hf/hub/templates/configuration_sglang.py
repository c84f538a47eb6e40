"""The configuration of this checkpoint for engines whose transformers may be older than its own code needs."""

try:
    from .configuration_llada import LLaDAConfig
except Exception:  # under transformers 4 its import fails in ways that differ from version to version
    from transformers import PretrainedConfig

    class LLaDAConfig(PretrainedConfig):  # type: ignore[no-redef]  # in its place
        """The keys of config.json as attributes, also under transformers' usual names."""

        model_type = "llada"
        attribute_map = {}  # noqa: RUF012


__all__ = ["LLaDAConfig"]
