"""What a request of an engine asks for: settings of `generate` that it can carry out, or a refusal that says why."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..models.decoding import Rules
from ..models.generation_config_d3llm import FIELDS, D3LLMGenerationConfig, unknown_field
from ..models.token_ids import vocabulary_of
from ..models.topology import Traits
from ..settings import SETTINGS


# Rule -> its value where an engine can follow it, and what the other values would need. An engine runs one canvas of
# a request in each forward, sees all of it, and keeps nothing between forwards but what is decided.
_ONE_WHOLE_CANVAS: dict[str, tuple[Any, str, str]] = {
    "kv_cache": ("none", "kv_cache", "each forward recomputes the whole canvas"),
    "draft_length": (0, "lossless", "a request has one canvas in a forward"),
    "lookahead": (0, "lookahead", "a request has one canvas in a forward"),
    "cfg_scale": (0.0, "cfg_scale", "a request has one canvas in a forward"),
    "suffix_length": (None, "suffix_length", "each forward sees the whole canvas"),
    "shadow_block": (False, "decoding_method", "a canvas has no shadow block beside it"),
    "kl_threshold": (None, "decoding_method", "no distributions are kept from one forward to the next"),
    "slot_size": (0, "decoding_method", "positions are decided, not slots"),
    "edit_threshold": (None, "edit_threshold", "what is decided stays"),
}
# What an engine does itself, or a request has no use for.
_NOT_OURS = ("infill", "mask_token_id")
# transformers' options that change logits; of the best token alone nothing is left to choose.
_PROCESSING = (
    "bad_words_ids", "begin_suppress_tokens", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty",
    "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "guidance_scale", "min_length",
    "min_new_tokens", "no_repeat_ngram_size", "remove_invalid_values", "repetition_penalty", "sequence_bias",
    "suppress_tokens", "watermarking_config",
)  # fmt: skip


@dataclass(frozen=True)
class Served:
    """The model that an engine serves, as far as requests are checked against it.

    Attributes:
        own: the checkpoint's generation config.
        traits: of the model.
        mask_token_id: of an undecided position.
        vocab_size: tokens that the model knows.
        canvas_length: positions of a request, prompt and answer, at most.
    """

    own: D3LLMGenerationConfig
    traits: Traits
    mask_token_id: int
    vocab_size: int | None
    canvas_length: int

    @classmethod
    def of(cls, config: Any, own: D3LLMGenerationConfig, logit_shift: int, canvas_length: int) -> "Served":
        """Of a model's config.

        Raises:
            ValueError: for a model that no plugin runs, or a canvas that it has no positions for.
        """
        if getattr(config, "block_alignment", None) is not None:
            raise ValueError(
                "The engine runs models in which every position sees all others (got "
                f"block_alignment={config.block_alignment!r}, whose blocks see no later ones). Serve it with "
                "`d3llm serve`."
            )
        longest = config.max_position_embeddings
        if not 1 < canvas_length <= longest:
            raise ValueError(
                f"`canvas_length` must be from 2 to the model's {longest} positions (got {canvas_length}): a canvas "
                "holds a prompt and its answer. Pass another one to `d3llm serve --canvas-length`, or in "
                "`--diffusion-config`."
            )
        mask = own.mask_token_id if own.mask_token_id is not None else config.mask_token_id
        if mask is None:
            raise ValueError(
                "`mask_token_id` must name the token of an undecided position (got None). Set it in config.json."
            )
        return cls(own, Traits(logit_shift), mask, vocabulary_of(config), canvas_length)


@dataclass(frozen=True)
class Decoding:
    """How a request is decoded. Requests that are equal in all but the seed are decoded as one batch.

    Attributes:
        rules: of the method, for an answer of the request's length.
        stop_ids: tokens that end the answer.
        fill_token_id: of what follows a stop token, `None` where nothing is filled.
    """

    rules: Rules
    stop_ids: tuple[int, ...]
    fill_token_id: int | None


def decoding_of(
    served: Served,
    asked: Mapping[str, Any],
    length: int,
    *,
    stop_ids: tuple[int, ...] = (),
    ignore_eos: bool = False,
) -> Decoding:
    """What a request's settings mean, over those of the checkpoint.

    Args:
        served: the model.
        asked: settings of decoding by their names in `D3LLMGenerationConfig`; bools may come as 0 and 1.
        length: positions to decide.
        stop_ids: further tokens that end the answer.
        ignore_eos: whether the checkpoint's stop tokens do not.

    Raises:
        ValueError, TypeError: for a setting that does not exist, that `generate` would refuse, or that an engine
            cannot carry out.
    """
    # 1. Names, and numbers that stand for truth values
    for name in asked:
        if name not in FIELDS:
            raise ValueError(unknown_field(name))
        if name in _NOT_OURS:
            raise ValueError(f"`{name}` does not apply to requests of an engine (got {asked[name]!r}). Leave it out.")
    chosen = {name: _as_setting(name, value) for name, value in asked.items() if value is not None}

    if isinstance(chosen.get("seed"), list | tuple):
        raise ValueError(f"`seed` must be one integer for a request (got {chosen['seed']!r}). Pass one.")

    # 2. As `generate` reads them
    config = D3LLMGenerationConfig()
    config.inherit(served.own, chosen, served.traits)
    config.refuse_unfitting()
    config.validate()
    config.check_against(served.vocab_size, served.mask_token_id)
    if config.topology(served.traits) is not None:
        raise ValueError(
            f'`decoding_method` must be one for canvases of which every position sees all (got "'
            f'{config.method_of(served.traits)}"). Leave it out, or choose "d3llm".'
        )
    rules = config.rules(length, served.traits)

    # 3. What one whole canvas a forward cannot carry out
    for rule, (value, setting, reason) in _ONE_WHOLE_CANVAS.items():
        if getattr(rules, rule) != value:
            got = config.method_of(served.traits) if setting == "decoding_method" else getattr(config, setting)
            raise ValueError(
                f"{config.named(setting)[0]} cannot be carried out in a serving engine: {reason} (got {got!r}). "
                "Leave it out, or use `generate` or `d3llm serve`."
            )
    if config.do_sample:
        raise ValueError(
            f"{config.named('do_sample')[0]} cannot be carried out in a serving engine, which decides the best tokens "
            "(got True). Use `generate` or `d3llm serve`."
        )
    neutral = config._get_default_generation_params()
    for name in _PROCESSING:
        value = getattr(config, name, None)
        if value not in (None, [], 0, False, neutral.get(name)):
            raise ValueError(
                f"{config.named(name)[0]} cannot be carried out in a serving engine (got {value!r}). Unset it, or use "
                "`generate` or `d3llm serve`."
            )

    # 4. Stop tokens
    stops = [*(() if ignore_eos else stops_of(served)), *stop_ids]
    fill = config.pad_token_id
    if fill is None and stops:
        fill = stops[0]  # as transformers chooses it
    return Decoding(rules, tuple(dict.fromkeys(stops)), fill)


def generation_config_of(source: str, revision: str | None, config: Any) -> D3LLMGenerationConfig:
    """The generation config of a checkpoint, or what its config says where it has none.

    Args:
        source: a folder, or an id on the Hub.
        revision: of the Hub's.
        config: of the model.
    """
    try:
        own = D3LLMGenerationConfig.from_pretrained(source, revision=revision or "main")
    except OSError:
        own = D3LLMGenerationConfig.from_model_config(config)
    return own  # type: ignore[return-value]  # of this class, whatever transformers annotates


def overridden(own: D3LLMGenerationConfig, chosen: Mapping[str, Any], logit_shift: int) -> D3LLMGenerationConfig:
    """A checkpoint's generation config in which a server's settings of decoding take the place of its own."""
    config = D3LLMGenerationConfig()
    ours = {name: _as_setting(name, value) for name, value in chosen.items() if name in FIELDS and value is not None}
    config.inherit(own, ours, Traits(logit_shift))
    return config


def stops_of(served: Served) -> tuple[int, ...]:
    """The checkpoint's stop tokens."""
    own = served.own.eos_token_id
    return tuple(own) if isinstance(own, list | tuple) else (() if own is None else (own,))


def draws(rules: Rules) -> bool:
    """Whether decoding by these rules needs random numbers, and so a seed."""
    return rules.score == "noise" or bool(rules.alg_temp)


def _as_setting(name: str, value: Any) -> Any:
    """JSON's truth values reach an engine as 0 and 1."""
    kind = SETTINGS[name][0] if name in SETTINGS else None
    return bool(value) if kind is bool and value in (0, 1) else value


__all__ = ["Decoding", "Served", "decoding_of", "draws", "generation_config_of", "overridden", "stops_of"]
