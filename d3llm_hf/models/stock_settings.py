"""transformers' own settings: what each means to diffusion decoding, and the values with which it stays defined.

`HONOURED`, `REFUSED` and `IDLE` together name every field of a `GenerationConfig`.
"""

import math
from typing import Any


# Logits are multiplied and divided by such numbers in float32, and stay finite for any logit of up to 1e8.
LEAST, MOST = 1e-30, 1e30

NUMBER = (int, float)


def _fraction(rule: str, holds: Any) -> tuple[tuple[type, ...], str, Any]:
    return NUMBER, rule, holds


_SCALE = (NUMBER, f"a number between {LEAST:g} and {MOST:g}", lambda v: LEAST <= v <= MOST)
_TAIL = _fraction("a probability in [0, 1]", lambda v: 0 <= v <= 1)

# Honoured settings with a rule of their own: accepted types, the rule in words, and its test. Other rules are
# transformers' (lengths, beams), or those of `token_ids` and `constraints`.
NUMBERS: dict[str, tuple[tuple[type, ...], str, Any]] = {
    "repetition_penalty": _SCALE,
    "encoder_repetition_penalty": _SCALE,
    "no_repeat_ngram_size": ((int,), "a non-negative integer, 0 is off", lambda v: v >= 0),
    "encoder_no_repeat_ngram_size": ((int,), "a non-negative integer, 0 is off", lambda v: v >= 0),
    "min_length": ((int,), "a non-negative integer", lambda v: v >= 0),
    "min_new_tokens": ((int,), "a non-negative integer", lambda v: v >= 0),
    "max_length": ((int,), "a positive integer", lambda v: v > 0),
    "max_new_tokens": ((int,), "a positive integer", lambda v: v > 0),
    "num_return_sequences": ((int,), "a positive integer", lambda v: v > 0),
    "max_time": (NUMBER, "a number of seconds, at least 0", lambda v: v >= 0),
}

# The same of settings that are read where `do_sample=True` alone; 1 is neutral for most of the fractions.
SAMPLING: dict[str, tuple[tuple[type, ...], str, Any]] = {
    "temperature": _SCALE,
    "top_k": ((int,), "a non-negative integer, 0 is off", lambda v: v >= 0),
    "top_p": _TAIL,
    "min_p": _TAIL,
    "top_h": _fraction("a fraction in (0, 1]", lambda v: 0 < v <= 1),
    "typical_p": _fraction("a fraction in (0, 1]", lambda v: 0 < v <= 1),
    "epsilon_cutoff": _fraction("a fraction in [0, 1), 0 is off", lambda v: 0 <= v < 1),
    "eta_cutoff": _fraction("a fraction in [0, 1), 0 is off", lambda v: 0 <= v < 1),
}

FLOATS = frozenset({"repetition_penalty", "encoder_repetition_penalty", *SAMPLING} - {"top_k"})
"""Settings of which transformers takes no integer, though 2 is a fine temperature."""

HONOURED = frozenset(
    {
        *NUMBERS, *SAMPLING, "do_sample", "use_cache", "stop_strings", "bad_words_ids", "sequence_bias",
        "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id",
        "renormalize_logits", "remove_invalid_values", "exponential_decay_length_penalty",
        "return_dict_in_generate", "pad_token_id", "bos_token_id", "eos_token_id", "compile_config",
        "disable_compile", "transformers_version",
    }
)  # fmt: skip

# Settings that belong to autoregressive decoding. They are refused, not ignored.
REFUSED = {
    "cache_implementation": "a diffusion model's cache is chosen by `kv_cache`",
    "guidance_scale": "classifier-free guidance of a diffusion model is `cfg_scale`",
    "watermarking_config": "watermarks are defined for left-to-right sampling",
    "penalty_alpha": "contrastive search compares continuations of a prefix",
    "dola_layers": "its contrast of layers is defined for the next token",
    "constraints": "they need beam search; `prefix_allowed_tokens_fn` works left to right, with `block_length=1`",
    "force_words_ids": "it needs beam search; put the words into the prompt",
    "num_beams": "there are no beams; `num_return_sequences` with `do_sample=True` gives several answers",
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

_NO_BEAMS = "there are no beams to end or to compare"
_NO_ASSISTANT = "no other model drafts; `lossless` drafts with the model itself"
_NO_STOCK_CACHE = "a diffusion model's cache is chosen by `kv_cache`, and has the size of the text"

# Settings of machinery that is not there. A call that sets one is told so; in a checkpoint's file, which may have been
# written for another model, they mean as little as to an autoregressive model without that machinery.
IDLE = {
    "early_stopping": f"{_NO_BEAMS}; `early_stop` ends a row at its stop token",
    "length_penalty": f"{_NO_BEAMS}; `exponential_decay_length_penalty` raises the stop token",
    "low_memory": _NO_BEAMS,
    "cache_config": _NO_STOCK_CACHE,
    "max_cache_len": _NO_STOCK_CACHE,
    "decoder_start_token_id": "there is no decoder beside an encoder; begin the prompt with it",
    "num_assistant_tokens": _NO_ASSISTANT,
    "num_assistant_tokens_schedule": _NO_ASSISTANT,
    "assistant_confidence_threshold": _NO_ASSISTANT,
    "assistant_early_exit": _NO_ASSISTANT,
    "assistant_lookbehind": _NO_ASSISTANT,
    "assistant_ensemble_weight": _NO_ASSISTANT,
    "target_lookbehind": _NO_ASSISTANT,
    "max_matching_ngram_size": _NO_ASSISTANT,
    "prompt_lookup_num_tokens": f"assisted decoding needs left-to-right decoding, and {_NO_ASSISTANT}",
    "speculation_type": _NO_ASSISTANT,
    "use_mtp": f"assisted decoding needs left-to-right decoding, and {_NO_ASSISTANT}",
    "continuous_batching_config": "paged batches decode left to right; pass a left-padded batch",
}

# Arguments of `generate` that are no settings and would reach nothing.
NO_INPUTS = {
    "negative_prompt_ids": "the unconditional canvas of `cfg_scale` has its whole prompt masked",
    "negative_prompt_attention_mask": "the unconditional canvas of `cfg_scale` has its whole prompt masked",
    "labels": "there is no loss to compute; call the model's forward for it",
    "logits_to_keep": "decoding asks for the logits that it needs",
    "return_dict": "decoding reads the forward's output by name; `return_dict_in_generate` is for the result",
    "cache_position": "decoding addresses its cache itself",
}


def check_numbers(config: Any, named: Any) -> None:
    """Checks the honoured numbers of a config that are read in this call.

    Args:
        config: a `GenerationConfig`.
        named: how a message calls a setting, and the way out for it: a function of its name.

    Raises:
        ValueError, TypeError: for a number that decoding could not follow, or that would have no effect.
    """
    read = NUMBERS | SAMPLING if config.do_sample else NUMBERS
    for name, (types, rule, holds) in read.items():
        value = getattr(config, name, None)
        if value is None:
            continue
        right = isinstance(value, types) and not isinstance(value, bool)
        if not right or not holds(value):
            hint = " Leave `do_sample` unset for greedy decoding." if name == "temperature" and value == 0 else ""
            kind = ValueError if right else TypeError
            title, way_out = named(name)
            raise kind(f"{title} must be {rule} (got {value!r}). {way_out}{hint}")
    penalty = config.exponential_decay_length_penalty
    if penalty is not None:
        right = isinstance(penalty, list | tuple) and len(penalty) == 2 and all(_is_number(each) for each in penalty)
        title, way_out = named("exponential_decay_length_penalty")
        if not right or penalty[0] < 0 or not 0 < penalty[1] <= MOST:
            raise ValueError(
                f"{title} must be (a non-negative number of tokens, a factor between 0 and {MOST:g}) (got "
                f"{penalty!r}). {way_out}"
            )
        if config.eos_token_id is None:
            raise ValueError(f"{title} needs an `eos_token_id`, which it raises (got None). Pass one.")


def _is_number(value: Any) -> bool:
    return isinstance(value, NUMBER) and not isinstance(value, bool) and math.isfinite(value)


__all__ = ["FLOATS", "HONOURED", "IDLE", "LEAST", "MOST", "NO_INPUTS", "NUMBER", "REFUSED", "check_numbers"]
