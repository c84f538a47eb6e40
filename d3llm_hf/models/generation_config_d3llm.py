"""The settings of decoding: what a call, a config and a checkpoint say of them, and what of it is refused."""

import difflib
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from transformers.generation import GenerationConfig
from transformers.utils import logging

from .decoding import Rules
from .foreign_settings import RENAMED, translated
from .methods import (
    ALIGNMENT_OF,
    ALLOWED_REMASKING,
    CACHE_FIELDS,
    CACHE_OF_SHADOWS,
    CACHES,
    COMMON,
    DECODERS,
    DEFAULT_LENGTH_RULE,
    DEFAULT_METHOD,
    IN_SHADOWS,
    IN_SLOTS,
    INSIDE_BLOCKS,
    LENGTH_FIELDS,
    LENGTHS,
    METHODS,
    OPENING,
    REMASKING,
    SCHEDULES,
    WINDOWS,
    caches_of,
    casts_shadows,
    decides_slots,
    defaults_of,
    methods_of,
    rules_of,
    topology_of,
)
from .plain_values import plain
from .stock_settings import FLOATS, IDLE, MOST, NUMBER, REFUSED, check_numbers
from .token_ids import BANNING, NAMING_TOKENS, check_inside, check_kind
from .topology import PLAIN, Topology, Traits


logger = logging.get_logger(__name__)

# Every field of ours: accepted types, the rule in words, and its test.
FIELDS: dict[str, tuple[tuple[type, ...], str, Any]] = {
    "decoding_method": ((str,), "one of {methods}", lambda v: v in METHODS),
    "block_length": ((int,), "a positive integer", lambda v: v > 0),
    "sub_block_length": ((int,), "a positive integer (positions)", lambda v: v > 0),
    "window": ((str,), "one of {windows}", lambda v: v in WINDOWS),
    "window_span": ((int,), "a positive integer (positions)", lambda v: v > 0),
    "steps": ((int,), "a positive integer", lambda v: v > 0),
    "min_commits": ((int,), "a positive integer (positions)", lambda v: v > 0),
    "remasking": ((str,), "one of {remasking}", lambda v: v in REMASKING),
    "entropy_threshold": (NUMBER, "a number (nats), inf to commit everything", lambda v: not math.isnan(v)),
    "entropy_bound": (NUMBER, "a non-negative number (nats)", lambda v: v >= 0),
    "confidence_threshold": (NUMBER, "a probability in (0, 1]", lambda v: 0 < v <= 1),
    "threshold_relaxation": (NUMBER, "a fraction in [0, 1]", lambda v: 0 <= v <= 1),
    "edit_threshold": (NUMBER, "a probability in [0, 1]", lambda v: 0 <= v <= 1),
    "threshold_back": (NUMBER, "a probability in [0, 1]", lambda v: 0 <= v <= 1),
    "kl_threshold": (NUMBER, "a positive number (nats)", lambda v: v > 0),
    "kl_history": ((int,), "a positive integer (forwards)", lambda v: v > 0),
    "max_post_steps": ((int,), "a non-negative integer (forwards)", lambda v: v >= 0),
    "relaxed_threshold": (NUMBER, "a probability in (0, 1]", lambda v: 0 < v <= 1),
    "low_threshold": (NUMBER, "a probability in (0, 1]", lambda v: 0 < v <= 1),
    "leap_radius": ((int,), "a non-negative integer (positions)", lambda v: v >= 0),
    "factor": (NUMBER, "a positive number", lambda v: 0 < v < math.inf),
    "decoder": ((str,), "one of {decoders}", lambda v: v in DECODERS),
    "credit_decay": (NUMBER, "a fraction in [0, 1]", lambda v: 0 <= v <= 1),
    "credit_exponent": (NUMBER, f"a non-negative number of at most {MOST:g}", lambda v: 0 <= v <= MOST),
    "credit_weight": (NUMBER, f"a non-negative number of at most {MOST:g}", lambda v: 0 <= v <= MOST),
    "block_add_threshold": (NUMBER, "a fraction in [0, 1]", lambda v: 0 <= v <= 1),
    "block_activation_threshold": (NUMBER, "a non-negative fraction", lambda v: v >= 0),
    "slot_size": ((int,), "a positive integer (positions)", lambda v: v > 0),
    "serial_num_blocks": ((int,), "a positive integer", lambda v: v > 0),
    "slot_threshold": (NUMBER, "a probability in [0, 1]", lambda v: 0 <= v <= 1),
    "token_threshold": (NUMBER, "a probability in [0, 1]", lambda v: 0 <= v <= 1),
    "early_stop": ((bool,), "True or False", lambda v: True),
    "kv_cache": ((str,), "one of {caches}", lambda v: v in CACHES),
    "cache_delay": ((int,), "a non-negative integer (forwards)", lambda v: v >= 0),
    "cache_refresh_interval": ((int,), "a positive integer (forwards); leave it unset for never", lambda v: v > 0),
    "cache_window": ((int,), "a non-negative integer (positions)", lambda v: v >= 0),
    "cache_warmup": ((int,), "a non-negative integer (forwards)", lambda v: v >= 0),
    "suffix_length": ((int,), "a non-negative integer (positions); leave it unset for all", lambda v: v >= 0),
    "cfg_scale": (NUMBER, f"a non-negative number of at most {MOST:g}", lambda v: 0 <= v <= MOST),
    "alg_temp": (NUMBER, "a non-negative number", lambda v: v >= 0 and math.isfinite(v)),
    "lossless": ((bool,), "True or False", lambda v: True),
    "draft_length": ((int,), "a positive integer (canvases)", lambda v: v > 0),
    "lookahead": ((int,), "a non-negative integer (canvases)", lambda v: v >= 0),
    "lookahead_threshold": (NUMBER, "a probability in (0, 1]", lambda v: 0 < v <= 1),
    "length": ((str,), '"fixed" or "adaptive"', lambda v: v in ("fixed", "adaptive")),
    "initial_length": ((int,), "a positive integer (positions)", lambda v: v > 0),
    "length_rule": ((str,), "one of {lengths}", lambda v: v in LENGTHS),
    "length_low": (NUMBER, "a fraction in [0, 1]", lambda v: 0 <= v <= 1),
    "length_high": (NUMBER, "a fraction in [0, 1]", lambda v: 0 <= v <= 1),
    "length_step": ((int,), "a positive integer (positions)", lambda v: v > 0),
    "length_schedule": ((str,), "one of {schedules}", lambda v: v in SCHEDULES),
    "length_window": ((int,), "a positive integer (positions)", lambda v: v > 0),
    "infill": ((bool,), "True or False", lambda v: True),
    "seed": ((int, list, tuple), "a non-negative integer, or a list of one for each row", lambda v: _are_seeds(v)),
    "mask_token_id": ((int,), "a token id", lambda v: v >= 0),
}


# How messages about a setting end; one that speaks of a file takes this off.
WAY_OUT = "Set it in `D3LLMGenerationConfig` or pass it to `generate`."
_LARGEST = 2**1023  # integers beyond have no float


def _are_seeds(value: int | list[int] | tuple[int, ...]) -> bool:
    seeds = [value] if isinstance(value, int) else value
    return len(seeds) > 0 and all(type(seed) is int and seed >= 0 for seed in seeds)


# What a call chooses, and what of a checkpoint it takes the place of.
TAKES_PLACE = (
    ("factor", "confidence_threshold"),
    ("confidence_threshold", "factor"),
    ("steps", "min_commits"),
    ("min_commits", "steps"),
    ("edit_threshold", "steps"),
    ("factor", "threshold_relaxation"),
)
CALL_FIELDS = ("decoding_method", "infill", "seed", "mask_token_id")


class D3LLMGenerationConfig(GenerationConfig):
    r"""`GenerationConfig` of masked diffusion decoding; saved in `generation_config.json` as any other.

    A field that is left unset takes the value of its method (`METHODS`). Precedence: arguments of `generate`, then the
    config passed to it, then the checkpoint's (only where it describes the same `decoding_method`), then the method's.

    Args:
        decoding_method (`str`): `"d3llm"` (several blocks at once, by entropy), `"dparallel"` (block by block, by
            entropy), `"fast_dllm"` (by confidence or factor), `"dinfer"` (its threshold, hierarchy and credit
            decoders), `"dkv"` (a fixed quota over a cache by token), `"entropy_bound"` (EB-Sampler), `"local_leap"`
            (LocalLeap), `"klass"` (by confidence, and by how little changes from forward to forward), `"wino"`
            (boldly, taking back what the model would not write again), `"llada"` (a fixed quota), `"dream"` (a
            schedule), `"sdar"` (a quota of each block, or what is surer), `"llada2"` (the same, with edits),
            `"fast_dllm_v2"` (by confidence, in parts of a block), `"d2f"` (several blocks at once, by confidence, none
            of which sees a later one: for LLaDA or Dream with an adapter of D2F), or `"refusion"` (whole slots in any
            order, verified from left to right). The model's own when unset: `"d3llm"`, or that of the same name for
            SDAR, LLaDA2, Fast-dLLM v2 and ReFusion, which has no other.
        block_length (`int`): positions of a block; when unset the whole answer with `"dream"`, and a block-causal
            model's own.
        sub_block_length (`int`): positions of the parts of a block that are decided one after the other
            (`"fast_dllm_v2"`); it divides `block_length`.
        window (`str`): where decided positions may lie: in `"blocks"`, which open one after the other, or in a window
            that slides with the first undecided position (DSB): `"slide"`, the leftmost undecided ones, as many as
            `block_length`; `"slide_span"`, those of them within `window_span` positions. Then a quota's `steps` are
            those of the whole answer, and what says when blocks open has no meaning.
        window_span (`int`): positions that a window reaches over with `"slide_span"`, `block_length` when unset.
        steps (`int`): forwards that a quota or schedule spreads the answer over, with `"sdar"` and `"llada2"` each
            block; one a token when unset.
        min_commits (`int`): with `"llada2"`, in place of `steps`: positions that every forward commits at least.
        remasking (`str`): what ranks positions: `"low_confidence"` (`"maskgit_plus"`), `"entropy"`, `"topk_margin"`,
            `"random"`, with `"dream"` also `"origin"`, and with `"sdar"` `"sequential"` (left to right).
            With `"d2f"` it ranks only what is committed where nothing reaches the threshold.
        entropy_threshold (`float`): nats under which a position is committed.
        entropy_bound (`float`): nats that the committed positions may sum to, the least certain one left out; with
            `"sdar"` they sum to less, and it stands in place of the quota.
        confidence_threshold (`float`): probability from which a position is committed; with `"sdar"` and `"llada2"` a
            higher one, where as many as the quota reach it, and with `"fast_dllm_v2"` and `"d2f"` a higher one.
        threshold_relaxation (`float`): fraction of the threshold that is given up as a block, or the window, fills
            (Streaming-dLLM): a probability `p` becomes `p * (1 - threshold_relaxation * decided share)`, an entropy
            `h` becomes `h * (1 + threshold_relaxation * decided share)`. 0 leaves it as it is.
        edit_threshold (`float`): of LLaDA2.1: while a block is decoded, a higher probability of another token replaces
            a decided one. Nothing is replaced when unset, as in LLaDA2.0.
        max_post_steps (`int`): with `edit_threshold`, forwards that look once more at a block that is decided, as long
            as they replace something; 0 is none.
        threshold_back (`float`): probability under which a decided token is taken back: the one that the model would
            give it, did it not see it (`"wino"`).
        kl_threshold (`float`): nats of Kullback-Leibler divergence from the forward before under which a position is
            calm (`"klass"`).
        kl_history (`int`): forwards in a row for which a position must have been calm to be committed (`"klass"`).
        factor (`float`): Fast-dLLM's factor in place of its threshold: the n surest positions are committed while the
            n-th has a probability of at least `1 - factor / (n + 1)`.
        decoder (`str`): of `"dinfer"`: `"threshold"`, `"hierarchy"` or `"credit"`.
        low_threshold (`float`): probability above which the hierarchy commits the surest of a run of neighbours.
        credit_decay, credit_exponent, credit_weight (`float`): of dInfer's credit.
        relaxed_threshold (`float`), leap_radius (`int`): probability that suffices within so many positions of one
            that reaches `confidence_threshold` (LocalLeap).
        block_add_threshold (`float`): decided fraction of the last open block at which the next one opens.
        block_activation_threshold (`float`): decided fraction of a block at which its successor must advance in every
            step (the reference's `decoded_token_threshold`).
        slot_size (`int`): with `"refusion"`, positions of a slot, which is drafted as a whole.
        serial_num_blocks (`int`): parts of the answer, of whole slots, that are decided one after the other
            (`"refusion"`); later ones have a slot more where they cannot be equal.
        slot_threshold (`float`): probability of its first token above which a slot is verified (`"refusion"`); where
            none has it, the surest is.
        token_threshold (`float`): probability above which a drafted token holds (`"refusion"`).
        early_stop (`bool`): end a row once everything up to its first stop token is decided. With `"d3llm"` also fill
            what follows a stop token at once. With `"d2f"` no block opens once a stop token is decided; False is its
            published loop, which decides all blocks that are open by then to their ends. With `"refusion"` what
            follows a stop token in its part of the answer, and all later parts, are not decided. With `"llada2"` a row
            ends with the block of its stop token if told False, and with `edit_threshold` that is what True means.
        kv_cache (`str`): which keys and values are kept between forwards: `"none"`, `"prefix"`, `"dual"` (Fast-dLLM),
            `"delayed"` (d3LLM), `"dkv"`, `"dkv_greedy"` (dKV-Cache; the latter with `remasking="random"`),
            `"vicinity"` (dInfer), `"sliding"` (DSB). Block-causal models keep finished blocks, whose keys are
            `"exact"`, unless told `"none"`; they have no other, but for `"exact_dual"` with `"fast_dllm_v2"`, which
            also keeps, as an approximation, the rest of the block while a part of it is being decided.
        cache_delay (`int`): forwards between the end of a block (`"delayed"`) or a commit (`"dkv"`) and its caching.
        cache_refresh_interval (`int`): recompute everything every so many forwards; never when unset.
        cache_window (`int`): positions around the decoded ones that are recomputed with them.
        cache_warmup (`int`): forwards at the start that recompute everything (`"vicinity"`).
        suffix_length (`int`): undecided positions behind the last open block that a forward sees (suffix dropout); the
            whole canvas when unset. Fewer cost less and change what the model sees. Not with infilling.
        cfg_scale (`float`): classifier-free guidance, 0 is off.
        alg_temp (`float`): temperature of Dream's choice of positions, 0 takes the highest ranked.
        lossless (`bool`): exactly the tokens of the method without it, in fewer forwards: drafted canvases are
            verified together. With `"llada"` (which it stands for where no method is named) and `"dream"`.
        draft_length (`int`): canvases drafted for each forward of `lossless`, which then holds up to
            `draft_length + 1` canvases a row, in memory as in computation.
        lookahead (`int`): canvases that each forward runs over beside the decided one, each with one more token, the
            surest one first (LoPA); a row goes on with the canvas that looks surest. Not lossless: fewer forwards, so
            many times the positions, and another text. 0 is none.
        lookahead_threshold (`float`): probability from which a token may be looked ahead with; when unset any where a
            window slides, and 0.6 in blocks, at whose ends only unsure tokens are left.
        length (`str`): `"fixed"`, a canvas of `max_new_tokens`; or `"adaptive"`, one that grows and shrinks with what
            the model predicts on it, where `max_new_tokens` is the limit.
        initial_length (`int`): positions of an adaptive canvas before the first forward, 64 when unset.
        length_rule (`str`): what it follows: `"rho_eos"` (rho-EOS), the share of the undecided positions that would be
            stop tokens; `"rho_eos_tail"`, how surely its end is stop tokens, as rho-EOS's code has it; `"daedal"`, the
            same before anything is decided (DAEDAL's first stage), when it only grows.
        length_low, length_high (`float`): share or probability under which it grows, and over which it shrinks.
        length_step (`int`): positions by which it changes.
        length_schedule (`str`): how many times as many where the signal is far from its threshold: `"constant"` one,
            `"linear"` one for each tenth, `"exponential"` twice as many with each tenth; 8 at most.
        length_window (`int`): predicted stop tokens that the end of the canvas is judged by.
        infill (`bool`): also decide the mask tokens between the text of `input_ids`; `infill_mask` marks positions
            instead. Nothing is appended unless `max_new_tokens` is given as well.
        seed (`int` or list of `int`): makes sampling a function of this call alone; drawn from torch's global
            generator when unset. With one for each row, a row draws what it would draw alone with its seed.
        mask_token_id (`int`): the model config's when unset.

    Raises:
        ValueError, TypeError: for an unknown field (with the nearest known name), a value outside its rule, or a field
            that the decoding method does not use.
    """

    decoding_method: str | None
    block_length: int | None
    sub_block_length: int | None
    window: str | None
    window_span: int | None
    steps: int | None
    min_commits: int | None
    remasking: str | None
    entropy_threshold: float | None
    entropy_bound: float | None
    confidence_threshold: float | None
    threshold_relaxation: float | None
    edit_threshold: float | None
    max_post_steps: int | None
    threshold_back: float | None
    kl_threshold: float | None
    kl_history: int | None
    relaxed_threshold: float | None
    low_threshold: float | None
    leap_radius: int | None
    factor: float | None
    decoder: str | None
    credit_decay: float | None
    credit_exponent: float | None
    credit_weight: float | None
    block_add_threshold: float | None
    block_activation_threshold: float | None
    slot_size: int | None
    serial_num_blocks: int | None
    slot_threshold: float | None
    token_threshold: float | None
    early_stop: bool | None
    kv_cache: str | None
    cache_delay: int | None
    cache_refresh_interval: int | None
    cache_window: int | None
    cache_warmup: int | None
    suffix_length: int | None
    cfg_scale: float | None
    alg_temp: float | None
    lossless: bool | None
    draft_length: int | None
    lookahead: int | None
    lookahead_threshold: float | None
    length: str | None
    initial_length: int | None
    length_rule: str | None
    length_low: float | None
    length_high: float | None
    length_step: int | None
    length_schedule: str | None
    length_window: int | None
    infill: bool | None
    seed: int | Sequence[int] | None
    mask_token_id: int | None

    def __init__(self, **kwargs):
        own = {name: kwargs.pop(name, None) for name in FIELDS}
        for name in kwargs:
            if name not in _INHERITED and not name.startswith("_"):
                raise ValueError(unknown_field(name))
        for name, value in own.items():
            setattr(self, name, value)
        super().__init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        """Numbers of numpy and torch are those of Python; what transformers keeps for itself stays what it is."""
        if not name.startswith("_"):
            value = plain(value)
            if name in FLOATS and type(value) is int and abs(value) < _LARGEST:
                value = float(value)
            if name in BANNING and type(value) is int:
                value = [value]
        super().__setattr__(name, value)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As transformers', also of the entries of other projects' configs (`foreign_settings`)."""
        return super().from_dict(translated(config_dict), **kwargs)

    @classmethod
    def coerce(cls, config: GenerationConfig) -> "D3LLMGenerationConfig":
        """The same settings as this class; entries of a file that nothing here knows are left out, with a warning."""
        values = translated(config.to_dict())
        if values.pop("_from_model_config", None):  # (kept, it would make the constructor drop every field of ours)
            values["use_cache"] = None  # of a model's config: never meant for this cache
        unknown = [n for n in values if n not in FIELDS and n not in _INHERITED and not n.startswith("_")]
        for name in unknown:
            logger.warning_once(f"{unknown_field(name)} It is ignored; delete it from generation_config.json.")
            del values[name]
        known = {name: value for name, value in values.items() if not name.startswith("_")}
        return cls.from_dict(known)  # type: ignore[return-value]  # of this class, whatever transformers annotates

    @classmethod
    def from_model_config(cls, model_config) -> "D3LLMGenerationConfig":
        """As transformers', for a config class with fields of its own."""
        config = cls.coerce(GenerationConfig.from_model_config(model_config))
        config._original_object_hash = hash(config)  # transformers compares it to detect changes made by the user
        return config

    def to_diff_dict(self) -> dict[str, Any]:
        """Leaves out fields of ours that are unset, and where a setting came from."""
        written = {n: v for n, v in super().to_diff_dict().items() if v is not None or n not in FIELDS}
        written.pop("_inherited", None)
        return written

    def validate(self, *args, **kwargs):
        """Checks every field that is set, alone; `rules` checks them together."""
        for name in (*NAMING_TOKENS, *BANNING):
            if name not in FIELDS and getattr(self, name, None) is not None:
                check_kind(name, getattr(self, name))
        for name, (types, rule, holds) in FIELDS.items():
            value = getattr(self, name, None)
            if value is None:
                continue
            if not isinstance(value, types) or (isinstance(value, bool) and bool not in types) or not holds(value):
                rule = rule.format(
                    methods=list(METHODS), remasking=list(REMASKING), caches=list(CACHES), decoders=list(DECODERS),
                    windows=list(WINDOWS), lengths=list(LENGTHS), schedules=list(SCHEDULES),
                )  # fmt: skip
                kind = ValueError if isinstance(value, types) else TypeError
                raise kind(f"`{name}` must be {rule} (got {value!r}). {WAY_OUT}")
        super().validate(*args, **kwargs)

    # Whether new tokens follow the prompt; infilling alone appends none.
    appends = True
    # Names of the settings that a call did not choose, but a checkpoint.
    _inherited = cast("tuple[str, ...]", ())

    def inherit(self, own: "D3LLMGenerationConfig", chosen: dict[str, Any], traits: Traits = PLAIN) -> dict[str, Any]:
        """Takes the arguments of a call, then fills what is unset from a checkpoint's config.

        The checkpoint's settings count as far as they speak of the same method and cache.

        Args:
            own: the checkpoint's.
            chosen: the arguments.
            traits: of the model.

        Returns:
            arguments that are no settings.
        """
        wanted = {n: chosen.get(n, getattr(self, n)) for n in ("decoding_method", "lossless", "kv_cache")}
        inherited = {name: value for name, value in own.to_dict().items() if not name.startswith("_")}
        own_method = own.decoding_method or ("llada" if own.lossless else traits.method or DEFAULT_METHOD)
        if own.decoding_method is None and wanted["decoding_method"] is None and own.lossless:
            self.decoding_method = own_method
        if wanted["lossless"] and wanted["decoding_method"] is None and "lossless" not in METHODS[own_method]:
            wanted["decoding_method"] = self.decoding_method = "llada"
        if (wanted["decoding_method"] or own_method) != own_method:  # its thresholds belong to its method
            theirs = {"decoding_method", *METHODS[own_method], *COMMON, *CACHE_FIELDS, *LENGTH_FIELDS}
            inherited = {n: v for n, v in inherited.items() if n not in theirs}
        elif wanted["kv_cache"] not in (None, own.kv_cache):  # and its delays to its cache
            inherited = {n: v for n, v in inherited.items() if n not in CACHE_FIELDS}
        for one, other in TAKES_PLACE:
            if chosen.get(one, getattr(self, one)) is not None:
                inherited.pop(other, None)
        for name in self._displaced(own, chosen):
            inherited.pop(name, None)
        inherited.pop("use_cache", None)  # official configs say False of a cache that is not ours; a call may say so
        asked = next((v for v in (chosen.get("infill"), self.infill, own.infill) if v is not None), False)
        infills = asked or chosen.get("infill_mask") is not None
        if infills and plain(chosen.get("max_new_tokens")) == 0:  # nothing behind the text, as without it
            chosen = {n: v for n, v in chosen.items() if n != "max_new_tokens"}
        # (by name: `update` would assign to methods as well)
        unused = {n: v for n, v in chosen.items() if (n not in FIELDS and n not in _INHERITED) or n.startswith("_")}
        self.update(**{n: v for n, v in chosen.items() if n not in unused})
        if infills and self.max_length is None and self.max_new_tokens is None:
            self.appends = False
        if self.max_length is not None or infills:  # the caller's length, in whichever form, beats the checkpoint's
            inherited.pop("max_new_tokens", None)
        self._inherited = tuple(n for n, v in inherited.items() if v is not None and getattr(self, n, None) is None)
        self.update(**inherited, defaults_only=True, allow_custom_entries=True)
        if self.eos_token_id in ([], ()):  # no token stops, whatever the checkpoint says
            self.eos_token_id = None
        return unused

    def _displaced(self, own: "D3LLMGenerationConfig", chosen: dict[str, Any]) -> list[str]:
        """Settings of a checkpoint's config `own` that speak of another window or length, or of no lookahead."""
        window, lookahead = (plain(chosen.get(name, getattr(self, name))) for name in ("window", "lookahead"))
        displaced = ["window_span"] if window not in (None, own.window) else []
        displaced += OPENING if window not in (None, "blocks") else []
        length, rule = (plain(chosen.get(name, getattr(self, name))) for name in ("length", "length_rule"))
        displaced += LENGTH_FIELDS if length not in (None, own.length) else []
        if rule not in (None, own.length_rule or DEFAULT_LENGTH_RULE):
            displaced += [name for name in LENGTH_FIELDS if name != "initial_length"]
        return displaced + (["lookahead_threshold"] if lookahead == 0 else [])

    def named(self, name: str) -> tuple[str, str]:
        """What a message calls a setting, and the way out of a wrong value, by where it came from."""
        if name in self._inherited:
            return f"`{name}` of the model's generation config", "Correct generation_config.json, or pass it."
        return f"`{name}`", WAY_OUT

    def refuse_unfitting(self) -> None:
        """Raises a ValueError for an option that has no meaning here (`REFUSED`, `IDLE`), with the reason."""
        neutral = self._get_default_generation_params()
        for name, reason in (REFUSED | IDLE).items():
            value = getattr(self, name, None)
            if not value or (name in IDLE and name in self._inherited):
                continue
            if (name in IDLE or name.startswith("num_beam")) and value == neutral.get(name):
                continue
            raise ValueError(
                f"{self.named(name)[0]} does not apply to diffusion decoding: {reason} (got {value!r}). Leave it "
                "unset."
            )

    def check_against(self, vocab_size: int | None, mask_token_id: int | None) -> None:
        """Checks what needs the model: its vocabulary.

        Args:
            vocab_size: tokens that the model knows; `None` where it does not say.
            mask_token_id: that of the model's config.

        Raises:
            ValueError, TypeError: for a token outside the vocabulary, or a number that decoding could not follow.
        """
        if self.mask_token_id is None:
            way_out = "Correct config.json, set `model.config.mask_token_id`, or pass it to `generate`."
            check_inside("`mask_token_id` of the model's config", mask_token_id, vocab_size, way_out)
        for name in NAMING_TOKENS:
            title, way_out = self.named(name)
            if name not in self._inherited:
                way_out = "The model's own tokenizer knows it."
            elif name == "bos_token_id":  # of a checkpoint it is read without a prompt only
                continue
            check_inside(title, getattr(self, name), vocab_size, way_out)
        check_numbers(self, self.named)

    def rules(self, length: int, traits: Traits = PLAIN) -> Rules:
        """The loop's rules for an answer of `length` positions, with the method's values where a field is unset.

        Args:
            length: of the longest row.
            traits: of the model.

        Raises:
            ValueError: for a field that the method does not use, or fields that exclude each other.
        """
        values = self._values(traits) | {"temperature": self.temperature if self.do_sample else None}
        if (values.get("initial_length") or 0) > length:
            title, way_out = self.named("initial_length")
            raise ValueError(
                f"{title} must be at most `max_new_tokens`, the limit of an adaptive length (got "
                f"{values['initial_length']} and {length}). {way_out}"
            )
        return rules_of(self.method_of(traits), values, length, traits)

    def topology(self, traits: Traits) -> Topology | None:
        """The blocks of a call, `None` where every position sees all others."""
        if self.method_of(traits) in IN_SLOTS:  # whole slots are decided, which begin behind the prompt
            return Topology(self._values(traits)["slot_size"], "prompt")
        topology = topology_of(self.method_of(traits), traits)
        return topology and replace(topology, block_length=self._values(traits)["block_length"])

    def method_of(self, traits: Traits) -> str:
        """The decoding method, whoever named it."""
        return self.decoding_method or traits.method or DEFAULT_METHOD

    def _values(self, traits: Traits) -> dict[str, Any]:
        """The method's settings, those of its cache, and what is set in their place; checked together."""
        method = self.method_of(traits)
        topology = topology_of(method, traits)
        values = defaults_of(method, traits)
        if values["kv_cache"] == "exact" and self.cfg_scale:
            values["kv_cache"] = "none"
        cache = self.kv_cache or values["kv_cache"]
        if self.use_cache is False:
            cache = "none"
        values |= CACHES[cache]
        if self.length == "adaptive" and "length" in values:
            rule = self.length_rule or DEFAULT_LENGTH_RULE
            values |= {"initial_length": None, "length_rule": rule} | LENGTHS[rule]
        for name in FIELDS:
            value = getattr(self, name)
            if value is None or name in CALL_FIELDS:
                continue
            if name in LENGTH_FIELDS and name not in values:
                raise ValueError(
                    f"{self.named(name)[0]} is not used by {self._length_in_words()} (got {value!r}). Leave it unset, "
                    'or choose length="adaptive" and a `length_rule` that uses it.'
                )
            if name in CACHE_FIELDS and name not in CACHES[cache]:
                if self.use_cache is False:  # turned off for this call: its settings wait
                    continue
                raise ValueError(
                    f'{self.named(name)[0]} is not used by kv_cache="{cache}" (got {value!r}). Leave it unset, or '
                    f"choose one of {[kind for kind, known in CACHES.items() if name in known]}."
                )
            if name not in values:
                way_out = f"Leave it unset, or choose another method; this one knows {sorted(values)}."
                if name in self._inherited:
                    way_out = (
                        "Name in generation_config.json the `decoding_method` whose settings it holds, or pass it."
                    )
                raise ValueError(
                    f'{self.named(name)[0]} is not used by decoding_method="{method}" (got {value!r}). {way_out}'
                )
            values[name] = value
        values["kv_cache"] = cache
        self._check(method, values, topology, traits)
        return values

    def _check(self, method: str, values: dict[str, Any], topology: Topology | None, traits: Traits) -> None:
        """Fields that exclude each other."""
        cache = values["kv_cache"]
        if method in IN_SLOTS or decides_slots(traits):
            self._check_slots(method, cache, traits)
            return
        if method in IN_SHADOWS:
            self._check_shadows(method, cache, traits)
        if topology is not None:
            self._check_block_causal(method, values, topology, traits)
        elif cache in ("exact", *INSIDE_BLOCKS.values()):
            raise ValueError(
                f'{self.named("kv_cache")[0]} must not be "{cache}" where all positions see one another (got it): '
                "every kept key is an approximation then. Choose another cache, or leave it unset."
            )
        part = values.get("sub_block_length")
        if part is not None and values["block_length"] % part:
            raise ValueError(
                f"{self.named('sub_block_length')[0]} must divide `block_length` (got {part} and "
                f"{values['block_length']}). Pass a divisor, or `block_length` itself for blocks without parts."
            )
        self._check_window(values)
        self._check_lookahead(values)
        if values["length"] == "adaptive":
            self._check_length(method, values)
        remasking = values.get("remasking")
        if remasking is not None and remasking not in ALLOWED_REMASKING[method]:
            raise ValueError(
                f"{self.named('remasking')[0]} must be one of {list(ALLOWED_REMASKING[method])} with "
                f'decoding_method="{method}" (got {remasking!r}).'
            )
        if remasking == "origin" and values["alg_temp"]:
            raise ValueError(
                f'`alg_temp` is not used by remasking="origin", which ranks no positions (got {values["alg_temp"]}). '
                "Leave it unset."
            )
        if cache != "none" and values["cfg_scale"]:
            raise ValueError(
                f'`cfg_scale` needs kv_cache="none" (got cfg_scale={values["cfg_scale"]}, kv_cache="{cache}"): the '
                "guiding canvas has no cache. Unset one of them."
            )
        if cache != "none" and values.get("lossless"):
            raise ValueError(
                f'`lossless` needs kv_cache="none" (got kv_cache="{cache}"): kept keys are approximations, and drafts '
                "would share them. Unset one of them."
            )
        if cache == "dkv_greedy" and (remasking not in ("random", "origin") or "steps" not in values):
            raise ValueError(
                f'kv_cache="dkv_greedy" needs remasking="random" (got {remasking!r} with decoding_method="{method}"): '
                'it recomputes what will be decided next, which only chance can tell beforehand. Use `kv_cache="dkv"`.'
            )
        if values.get("entropy_bound") is not None and values.get("confidence_threshold") is not None:
            raise ValueError(
                f"`entropy_bound` takes the place of `confidence_threshold` (got {values['entropy_bound']} and "
                f"{values['confidence_threshold']}). Set one of them."
            )
        if remasking == "sequential" and (self.confidence_threshold, self.entropy_bound) != (None, None):
            raise ValueError(
                '`confidence_threshold` and `entropy_bound` are not used by remasking="sequential", which ranks no '
                f"positions (got {self.confidence_threshold} and {self.entropy_bound}). Leave them unset."
            )
        if method == "llada2":
            self._check_llada2(values)
        if method == "fast_dllm" and self.factor is not None and self.confidence_threshold is not None:
            raise ValueError(
                f"`factor` takes the place of `confidence_threshold` (got {self.factor} and "
                f"{self.confidence_threshold}). Set one of them."
            )

    def _check_window(self, values: dict[str, Any]) -> None:
        """What has no meaning where a window slides, or does not; and what a threshold that is not there relaxes."""
        window = values.get("window", "blocks")
        if values.get("window_span") is not None and window != "slide_span":
            raise ValueError(
                f'{self.named("window_span")[0]} is not used by window="{window}" (got {values["window_span"]}). '
                'Leave it unset, or choose window="slide_span".'
            )
        for name in OPENING:
            if window != "blocks" and getattr(self, name) is not None:
                raise ValueError(
                    f'{self.named(name)[0]} is not used by window="{window}", which opens no blocks (got '
                    f'{getattr(self, name)}). Leave it unset, or choose window="blocks".'
                )
        if window != "blocks" and values["kv_cache"] == "delayed":
            raise ValueError(
                f'{self.named("kv_cache")[0]} must not be "delayed" with window="{window}" (got it): it keeps blocks, '
                'of which a window has none. Choose kv_cache="sliding".'
            )
        if window != "blocks" and values["suffix_length"] is not None and values["kv_cache"] not in ("none", "prefix"):
            raise ValueError(
                f'{self.named("suffix_length")[0]} with window="{window}" needs kv_cache="none" or "prefix" (got '
                f'"{values["kv_cache"]}"): in every forward other positions come into sight, of which no keys are '
                "kept. Unset one of them."
            )
        if values.get("threshold_relaxation") and values.get("factor") is not None:
            raise ValueError(
                f"{self.named('threshold_relaxation')[0]} is not used with `factor`, which takes the threshold's "
                f"place (got {values['threshold_relaxation']} and {values['factor']}). Unset one of them."
            )

    def _check_lookahead(self, values: dict[str, Any]) -> None:
        """What cannot be shared by several canvases of a row, and what says something of none."""
        if values["lookahead_threshold"] is not None and not values["lookahead"]:
            raise ValueError(
                f"{self.named('lookahead_threshold')[0]} needs `lookahead`, without which no token is looked ahead "
                f"with (got {values['lookahead_threshold']}). Set both, or leave it unset."
            )
        if not values["lookahead"]:
            return
        for name, met, reason in (
            (
                "kv_cache",
                values["kv_cache"] != "none",
                "kept keys are approximations, which all would share",
            ),
            ("lossless", bool(values.get("lossless")), "what is looked ahead with changes the text"),
            ("decoder", values.get("decoder") == "credit", "credit is of what one canvas predicted"),
            ("kl_threshold", "kl_threshold" in values, "a history is of what one canvas predicted"),
            ("threshold_back", "threshold_back" in values, "what is taken back was not looked ahead with"),
        ):
            if met:
                raise ValueError(
                    f"`lookahead` does not go together with {name}={values[name]!r} (got {values['lookahead']}): "
                    f"{reason}. Unset one of them."
                )

    def _length_in_words(self) -> str:
        if self.length != "adaptive":
            return f'length="{self.length or "fixed"}"'
        return f'length_rule="{self.length_rule or DEFAULT_LENGTH_RULE}"'

    def _check_length(self, method: str, values: dict[str, Any]) -> None:
        """What needs to know how long the answer becomes, or hides what says so."""
        low, high = values["length_low"], values.get("length_high", math.inf)
        if low > high:
            raise ValueError(
                f"{self.named('length_low')[0]} must be at most `length_high` (got {low} and {high}): a canvas cannot "
                "grow and shrink at once. Move them apart."
            )
        tail = values["length_rule"] == "rho_eos_tail"
        for name, met, reason in (
            ("decoding_method", method == "dream", "its schedule is spread over a length that is known"),
            ("steps", values.get("steps") is not None and method in ("llada", "dkv"), "they are those of the answer"),
            ("suffix_length", values["suffix_length"] is not None, "it hides the end, which says how long it becomes"),
            ("lossless", bool(values.get("lossless")), "a draft does not know what its length will be"),
            ("lookahead", bool(values["lookahead"]), "canvases of one row would have lengths of their own"),
            ("kv_cache", tail and values["kv_cache"] != "none", "its rule reads every position in every forward"),
            ("forced_eos_token_id", self.forced_eos_token_id is not None, "the last position is not known"),
        ):
            if met:
                value = values[name] if name in values else getattr(self, name) or method
                raise ValueError(
                    f'`length="adaptive"` does not go together with {name}={value!r}: {reason}. Unset one of them.'
                )

    def _check_slots(self, method: str, cache: str, traits: Traits) -> None:
        """Slots are decided by models that were trained for it, in no other way, and over what was decided."""
        known = methods_of(traits)
        if method not in known and traits is not PLAIN:  # of a model; of none, nothing is known
            raise ValueError(
                f"{self.named('decoding_method')[0]} must be one of {known} for this model (got {method!r}): whole "
                "slots are decided by ReFusion alone, and nothing else by it. Leave it unset, for the model's own."
            )
        if cache not in caches_of(method, traits):
            raise ValueError(
                f"{self.named('kv_cache')[0]} must be one of {caches_of(method, traits)} with decoding_method="
                f'"{method}" (got {cache!r}): tokens see those that were decided before them, whose keys are kept. '
                "Leave it and `use_cache` unset."
            )

    def _check_shadows(self, method: str, cache: str, traits: Traits) -> None:
        """A shadow block asks slots about their own tokens, beside the whole canvas."""
        if not casts_shadows(traits):
            kind = "shifted logits" if traits.logit_shift else "block-causal attention"
            raise ValueError(
                f'{self.named("decoding_method")[0]} must not be "{method}" for a model with {kind} (got it): its '
                "shadow block asks every slot about its own token, beside a canvas that sees all of itself. Choose "
                f"one of {[name for name in methods_of(traits) if name != method]}."
            )
        if cache != CACHE_OF_SHADOWS:
            raise ValueError(
                f'{self.named("kv_cache")[0]} must be "{CACHE_OF_SHADOWS}" with decoding_method="{method}" (got '
                f'"{cache}"): no cache has slots for its shadow block. Leave it unset.'
            )

    def _check_llada2(self, values: dict[str, Any]) -> None:
        """What of LLaDA2.0 has no meaning for LLaDA2.1, and the other way round."""
        if self.steps is not None and self.min_commits is not None:
            raise ValueError(
                f"`min_commits` takes the place of `steps` (got {self.min_commits} and {self.steps}). Set one of them."
            )
        if self.steps is not None and values["edit_threshold"] is not None:
            raise ValueError(
                f"{self.named('steps')[0]} is not used with `edit_threshold`, where a block takes the forwards that "
                f"it needs (got {self.steps} and {values['edit_threshold']}). Pass `min_commits` in its place."
            )
        if self.max_post_steps is not None and values["edit_threshold"] is None:
            raise ValueError(
                f"{self.named('max_post_steps')[0]} needs `edit_threshold`, without which nothing is looked at again "
                f"(got {self.max_post_steps}). Set both, or leave it unset."
            )

    def _check_block_causal(self, method: str, values: dict[str, Any], topology: Topology, traits: Traits) -> None:
        """What has no meaning where a position sees nothing of later blocks."""
        alignment = ALIGNMENT_OF.get(method, topology.alignment)
        if alignment != topology.alignment:
            raise ValueError(
                f'{self.named("decoding_method")[0]} must not be "{method}" for a model whose blocks begin with the '
                f"{topology.alignment} (got it): the method's begin with the end of the {alignment}. Leave it unset, "
                "for the model's own."
            )
        fitting = caches_of(method, traits)
        if values["kv_cache"] not in fitting:
            raise ValueError(
                f"{self.named('kv_cache')[0]} must be one of {fitting} for block-causal attention with "
                f'decoding_method="{method}", whose keys are final (got {values["kv_cache"]!r}). Leave it unset, with '
                "another method if that is its own."
            )
        for name, reason in (
            ("suffix_length", "no forward sees anything behind the open blocks"),
            ("lossless", "a draft of a later block would have no forward of its own"),
            ("window", "what a position sees ends with its block"),
            ("lookahead", "a canvas of a later block would have no forward of its own"),
            ("length", "an answer ends with a block, and later ones are opened as they are needed"),
        ):
            if values.get(name) not in (None, False, "blocks", "fixed"):
                raise ValueError(
                    f"{self.named(name)[0]} does not apply to block-causal attention: {reason} (got "
                    f"{values[name]!r}). Leave it unset."
                )


_INHERITED = frozenset(GenerationConfig().to_dict()) | {"generation_kwargs"}


def unknown_field(name: str) -> str:
    """The message for a field that does not exist, with the nearest one that does."""
    near = [RENAMED[name]] if name in RENAMED else difflib.get_close_matches(name, [*FIELDS, *_INHERITED], n=1)
    hint = f" Did you mean `{near[0]}`?" if near else f" Fields of diffusion decoding: {sorted(FIELDS)}."
    return f"`{name}` is not a generation setting.{hint}"


__all__ = ["D3LLMGenerationConfig"]
