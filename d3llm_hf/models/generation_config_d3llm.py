"""The settings of decoding: presets by method, validation, and how they become the loop's `Rules`."""

import difflib
import math
from typing import Any

from transformers.generation import GenerationConfig
from transformers.utils import logging

from .decoding import Rules


logger = logging.get_logger(__name__)

NUMBER = (int, float)

# Every field of ours: accepted types, the rule in words, and its test.
FIELDS: dict[str, tuple[tuple[type, ...], str, Any]] = {
    "decoding_method": ((str,), "one of {methods}", lambda v: v in METHODS),
    "block_length": ((int,), "a positive integer", lambda v: v > 0),
    "steps": ((int,), "a positive integer", lambda v: v > 0),
    "remasking": ((str,), "one of {remasking}", lambda v: v in REMASKING),
    "entropy_threshold": (NUMBER, "a number (nats), inf to commit everything", lambda v: not math.isnan(v)),
    "confidence_threshold": (NUMBER, "a probability in (0, 1]", lambda v: 0 < v <= 1),
    "block_add_threshold": (NUMBER, "a fraction in [0, 1]", lambda v: 0 <= v <= 1),
    "block_activation_threshold": (NUMBER, "a non-negative fraction", lambda v: v >= 0),
    "early_stop": ((bool,), "True or False", lambda v: True),
    "kv_cache": ((str,), "one of {caches}", lambda v: v in CACHES),
    "cache_delay": ((int,), "a non-negative integer (forwards)", lambda v: v >= 0),
    "cache_refresh_interval": ((int,), "a positive integer (forwards); leave it unset for never", lambda v: v > 0),
    "cfg_scale": (NUMBER, "a non-negative number", lambda v: v >= 0 and math.isfinite(v)),
    "alg_temp": (NUMBER, "a non-negative number", lambda v: v >= 0 and math.isfinite(v)),
    "seed": ((int,), "a non-negative integer", lambda v: v >= 0),
    "mask_token_id": ((int,), "a token id", lambda v: v >= 0),
}

# Name of a remasking strategy -> the score that ranks positions. LLaDA's and Dream's names for the same score.
REMASKING = {
    "entropy": "entropy",
    "low_confidence": "confidence",
    "maskgit_plus": "confidence",
    "topk_margin": "margin",
    "random": "noise",
    "origin": "noise",
}
CACHES = ("none", "delayed")

# Method -> its settings where nothing else is said; then what models with shifted logits (Dream) use instead.
METHODS: dict[str, dict[str, Any]] = {
    "d3llm": {
        "block_length": 32,
        "remasking": "entropy",
        "entropy_threshold": 0.5,
        "block_add_threshold": 0.1,
        "block_activation_threshold": 0.95,
        "early_stop": True,
        "kv_cache": "none",
        "cache_delay": 2,
        "cache_refresh_interval": None,
        "cfg_scale": 0.0,
    },
    "dparallel": {
        "block_length": 32,
        "remasking": "entropy",
        "entropy_threshold": 0.5,
        "early_stop": True,
        "cfg_scale": 0.0,
    },
    "llada": {"block_length": 32, "remasking": "low_confidence", "steps": None, "early_stop": True, "cfg_scale": 0.0},
    "dream": {
        "remasking": "entropy",
        "steps": None,
        "confidence_threshold": None,
        "alg_temp": 0.0,
        "early_stop": True,
        "cfg_scale": 0.0,
    },
}
SHIFTED_METHODS = {"d3llm": {"entropy_threshold": 0.4}, "dparallel": {"entropy_threshold": 0.45}}
ALLOWED_REMASKING = {
    "d3llm": ("entropy", "random"),
    "dparallel": ("entropy", "random"),
    "llada": ("low_confidence", "random"),
    "dream": ("entropy", "maskgit_plus", "topk_margin", "origin"),
}
COMMON_FIELDS = ("decoding_method", "seed", "mask_token_id")

# Options of `generate` that belong to autoregressive decoding. They are refused, not ignored.
REFUSED = {
    "cache_implementation": "a diffusion model's cache is chosen by `kv_cache`",
    "guidance_scale": "classifier-free guidance of a diffusion model is `cfg_scale`",
    "watermarking_config": "watermarks are defined for left-to-right sampling",
    "penalty_alpha": "contrastive search compares continuations of a prefix",
    "dola_layers": "its contrast of layers is defined for the next token",
    "constraints": "they need beam search; `prefix_allowed_tokens_fn` works left to right, with `block_length=1`",
    "force_words_ids": "it needs beam search; put the words into the prompt",
    "num_beam_groups": "there are no beams; `num_return_sequences` with `do_sample=True` gives several answers",
    "diversity_penalty": "there are no beams; `num_return_sequences` with `do_sample=True` gives several answers",
    "token_healing": "it rewrites the prompt's end left to right; heal the prompt with `tokenizer` before the call",
    "is_assistant": "a diffusion model drafts for no other model",
    "prefill_chunk_size": "there is no prefill: every forward sees the whole window",
    "output_scores": "positions are scored at different forwards; `step_map` says at which",
    "output_logits": "positions are scored at different forwards; `step_map` says at which",
    "output_attentions": "call the model's forward for them",
    "output_hidden_states": "call the model's forward for them",
}


class D3LLMGenerationConfig(GenerationConfig):
    r"""`GenerationConfig` of masked diffusion decoding; saved in `generation_config.json` as any other.

    A field that is left unset takes the value of its method (`METHODS`). Precedence: arguments of `generate`, then the
    config passed to it, then the checkpoint's (only where it describes the same `decoding_method`), then the method's.

    Args:
        decoding_method (`str`): `"d3llm"` (several blocks at once, by entropy; d3LLM), `"dparallel"` (block by
            block, by entropy; dParallel), `"llada"` (fixed quota; LLaDA) or `"dream"` (schedule over the answer).
        block_length (`int`): positions of a block.
        steps (`int`): forwards that a quota or schedule spreads the answer over; one a token when unset.
        remasking (`str`): what ranks positions: `"low_confidence"`, `"random"` (LLaDA), `"entropy"`, `"maskgit_plus"`,
            `"topk_margin"`, `"origin"` (Dream).
        entropy_threshold (`float`): nats under which a position is committed.
        confidence_threshold (`float`): probability from which a position is committed.
        block_add_threshold (`float`): decided fraction of the last open block at which the next one opens.
        block_activation_threshold (`float`): decided fraction of a block at which its successor must advance in every
            step (the reference's `decoded_token_threshold`).
        early_stop (`bool`): end a row once everything up to its first stop token is decided. With `"d3llm"` also fill
            what follows a stop token at once.
        kv_cache (`str`): `"none"`, or `"delayed"`: keep keys and values of finished blocks, with `"d3llm"`.
        cache_delay (`int`): forwards between the end of a block and its caching.
        cache_refresh_interval (`int`): recompute everything every so many forwards; never when unset.
        cfg_scale (`float`): classifier-free guidance, 0 is off.
        alg_temp (`float`): temperature of Dream's choice of positions, 0 takes the highest ranked.
        seed (`int`): makes sampling a function of this call alone; drawn from torch's global generator when unset.
        mask_token_id (`int`): the model config's when unset.

    Raises:
        ValueError, TypeError: for an unknown field (with the nearest known name), a value outside its rule, or a field
            that the decoding method does not use.
    """

    def __init__(self, **kwargs):
        own = {name: kwargs.pop(name, None) for name in FIELDS}
        for name in kwargs:
            if name not in _INHERITED and not name.startswith("_"):
                raise ValueError(unknown_field(name))
        for name, value in own.items():
            setattr(self, name, value)
        super().__init__(**kwargs)

    @classmethod
    def coerce(cls, config: GenerationConfig) -> "D3LLMGenerationConfig":
        """The same settings as this class; entries of a file that nothing here knows are left out, with a warning."""
        values = config.to_dict()
        if values.pop("_from_model_config", None):  # (kept, it would make the constructor drop every field of ours)
            values["use_cache"] = None  # of a model's config: never meant for this cache
        unknown = [n for n in values if n not in FIELDS and n not in _INHERITED and not n.startswith("_")]
        for name in unknown:
            logger.warning_once(f"{unknown_field(name)} It is ignored; delete it from generation_config.json.")
            del values[name]
        return cls.from_dict({name: value for name, value in values.items() if not name.startswith("_")})

    @classmethod
    def from_model_config(cls, model_config) -> "D3LLMGenerationConfig":
        """As transformers', for a config class with fields of its own."""
        config = cls.coerce(GenerationConfig.from_model_config(model_config))
        config._original_object_hash = hash(config)  # transformers compares it to detect changes made by the user
        return config

    def to_diff_dict(self) -> dict[str, Any]:
        """Leaves out fields of ours that are unset."""
        return {n: v for n, v in super().to_diff_dict().items() if v is not None or n not in FIELDS}

    def validate(self, *args, **kwargs):
        """Checks every field that is set, alone; `rules` checks them together."""
        for name, (types, rule, holds) in FIELDS.items():
            value = getattr(self, name, None)
            if value is None:
                continue
            if not isinstance(value, types) or (isinstance(value, bool) and bool not in types) or not holds(value):
                rule = rule.format(methods=list(METHODS), remasking=list(REMASKING), caches=list(CACHES))
                kind = ValueError if isinstance(value, types) else TypeError
                raise kind(
                    f"`{name}` must be {rule} (got {value!r}). Set it in `D3LLMGenerationConfig` or pass it to "
                    "`generate`."
                )
        super().validate(*args, **kwargs)

    def refuse_unfitting(self) -> None:
        """Raises a ValueError for an option that has no meaning here (`REFUSED`), with the reason."""
        for name, reason in REFUSED.items():
            value = getattr(self, name, None)
            if value and not (name == "num_beam_groups" and value == 1):
                raise ValueError(
                    f"`{name}` does not apply to diffusion decoding: {reason} (got {value!r}). Leave it unset."
                )

    def rules(self, length: int, logit_shift: int) -> Rules:
        """The loop's rules for an answer of `length` positions, with the method's values where a field is unset.

        Raises:
            ValueError: for a field that the method does not use, or fields that exclude each other.
        """
        method = self.decoding_method or "d3llm"
        known = METHODS[method]
        values = known | (SHIFTED_METHODS.get(method, {}) if logit_shift else {})
        for name in FIELDS:
            value = getattr(self, name)
            if value is None or name in COMMON_FIELDS:
                continue
            if name not in known and not (name == "kv_cache" and value == "none"):
                raise ValueError(
                    f'`{name}` is not used by decoding_method="{method}" (got {value!r}). Leave it unset, or choose '
                    f"another method; this one knows {sorted(known)}."
                )
            values = values | {name: value}
        if values["remasking"] not in ALLOWED_REMASKING[method]:
            raise ValueError(
                f'`remasking` must be one of {list(ALLOWED_REMASKING[method])} with decoding_method="{method}" '
                f"(got {values['remasking']!r})."
            )
        delayed = values.get("kv_cache") == "delayed" and self.use_cache is not False
        if delayed and values["cfg_scale"]:
            raise ValueError(
                f'`cfg_scale` needs kv_cache="none" (got cfg_scale={values["cfg_scale"]}, kv_cache="delayed"): the '
                "guiding canvas has no cache. Unset one of them."
            )
        return _BUILDERS[method](values, length, logit_shift, delayed)


def _threshold_rules(values: dict, length: int, logit_shift: int, delayed: bool) -> Rules:
    return Rules(
        block_length=min(values["block_length"], length),
        score=REMASKING[values["remasking"]],
        select="threshold",
        threshold=values["entropy_threshold"],
        # The published rules of the two families differ: LLaDA commits `H <= threshold` and always the surest
        # candidate of the row; Dream commits `H < threshold`, and only a block that must advance is helped.
        inclusive=not logit_shift,
        force_best=not logit_shift,
        greedy_force=not logit_shift,
        block_add_threshold=values.get("block_add_threshold", 1.0),
        block_activation_threshold=values.get("block_activation_threshold", 1.0),
        early_stop=values["early_stop"],
        eos_fill=values["early_stop"] and "block_add_threshold" in values,
        shift=logit_shift,
        delayed_cache=delayed,
        cache_delay=values.get("cache_delay", 0),
        cache_refresh_interval=values.get("cache_refresh_interval") or 0,
        serial_stamps=not logit_shift,
        cfg_scale=values["cfg_scale"],
    )


def _llada_rules(values: dict, length: int, logit_shift: int, delayed: bool) -> Rules:
    return Rules(
        block_length=min(values["block_length"], length),
        score=REMASKING[values["remasking"]],
        select="quota",
        steps=values["steps"] or length,
        early_stop=values["early_stop"],
        shift=logit_shift,
        cfg_scale=values["cfg_scale"],
    )


def _dream_rules(values: dict, length: int, logit_shift: int, delayed: bool) -> Rules:
    threshold = values["confidence_threshold"]
    if threshold is not None:
        score, select = "confidence", "quota_and_threshold"
    else:
        score, select = REMASKING[values["remasking"]], "coin" if values["remasking"] == "origin" else "schedule"
        if values["alg_temp"] and score == "confidence":
            score = "probability"
    return Rules(
        block_length=length,
        score=score,
        select=select,
        threshold=-math.log(threshold) if threshold is not None else float("inf"),
        steps=values["steps"] or length,
        early_stop=values["early_stop"],
        shift=logit_shift,
        cfg_scale=values["cfg_scale"],
        alg_temp=values["alg_temp"],
        score_processed=True,
    )


_BUILDERS = {"d3llm": _threshold_rules, "dparallel": _threshold_rules, "llada": _llada_rules, "dream": _dream_rules}

_INHERITED = frozenset(GenerationConfig().to_dict()) | {"generation_kwargs"}


def unknown_field(name: str) -> str:
    """The message for a field that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(name, [*FIELDS, *_INHERITED], n=1)
    hint = f" Did you mean `{near[0]}`?" if near else f" Fields of diffusion decoding: {sorted(FIELDS)}."
    return f"`{name}` is not a generation setting.{hint}"


__all__ = ["D3LLMGenerationConfig"]
