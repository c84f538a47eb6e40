"""Settings of `generate` for tests that run over every decoding method and every cache.

`METHODS` and `CACHES` hold one setting each; `drawn_method` and `drawn_cache` draw others at random.
"""

from random import Random


# Short blocks, and thresholds that the random models of the tests reach now and then.
METHODS = {
    "d3llm": {"decoding_method": "d3llm", "block_length": 4, "entropy_threshold": 0.9, "block_add_threshold": 0.5},
    "dparallel": {"decoding_method": "dparallel", "block_length": 5, "entropy_threshold": 1.2},
    "llada": {"decoding_method": "llada", "block_length": 5, "steps": 11},
    "llada, one token a forward": {"decoding_method": "llada", "block_length": 4, "remasking": "entropy"},
    "llada, random": {"decoding_method": "llada", "block_length": 5, "steps": 9, "remasking": "random"},
    "dream": {"decoding_method": "dream", "steps": 9, "remasking": "topk_margin"},
    "dream, blocks": {"decoding_method": "dream", "block_length": 5, "steps": 10, "remasking": "maskgit_plus"},
    "fast_dllm": {"decoding_method": "fast_dllm", "block_length": 5, "confidence_threshold": 0.5},
    "fast_dllm, factor": {"decoding_method": "fast_dllm", "block_length": 5, "factor": 1.5},
    "dinfer, threshold": {
        "decoding_method": "dinfer",
        "decoder": "threshold",
        "block_length": 5,
        "confidence_threshold": 0.6,
    },
    "dinfer, hierarchy": {
        "decoding_method": "dinfer",
        "decoder": "hierarchy",
        "block_length": 6,
        "confidence_threshold": 0.7,
        "low_threshold": 0.4,
    },
    "dinfer, credit": {
        "decoding_method": "dinfer",
        "decoder": "credit",
        "block_length": 5,
        "confidence_threshold": 0.6,
    },
    "entropy_bound": {"decoding_method": "entropy_bound", "block_length": 5, "entropy_bound": 1.5},
    "dkv": {"decoding_method": "dkv", "block_length": 5, "steps": 9, "kv_cache": "none"},
    "dkv, random": {
        "decoding_method": "dkv",
        "block_length": 5,
        "steps": 9,
        "remasking": "random",
        "kv_cache": "none",
    },
    "local_leap": {
        "decoding_method": "local_leap",
        "block_length": 6,
        "confidence_threshold": 0.7,
        "relaxed_threshold": 0.3,
        "leap_radius": 2,
    },
    "klass": {
        "decoding_method": "klass",
        "block_length": 5,
        "confidence_threshold": 0.4,
        "kl_threshold": 0.3,
        "kl_history": 2,
    },
}
CACHES = {
    "none": {"kv_cache": "none"},
    "delayed": {"kv_cache": "delayed", "cache_delay": 1, "cache_refresh_interval": 5},
    "prefix": {"kv_cache": "prefix"},
    "dual": {"kv_cache": "dual", "cache_refresh_interval": 3},
    "vicinity": {"kv_cache": "vicinity", "cache_warmup": 2, "cache_window": 2},
    "sliding": {"kv_cache": "sliding", "cache_window": 2},
    "dkv": {"kv_cache": "dkv", "cache_delay": 1, "cache_refresh_interval": 4},
    "dkv_greedy": {"kv_cache": "dkv_greedy", "cache_delay": 2, "cache_refresh_interval": 3, "cache_window": 3},
}
NEVER = 10**6


def go_together(method: dict, cache: str) -> bool:
    """Whether the cache can be used: the greedy one must know beforehand what will be committed."""
    quota = method["decoding_method"] in ("llada", "dkv")
    return cache != "dkv_greedy" or (quota and method.get("remasking") == "random")


PAIRS = [(method, cache) for method in METHODS for cache in CACHES if go_together(METHODS[method], cache)]


def drawn_method(rng: Random, method: str) -> dict:
    """Other settings of the same method as one of `METHODS`."""
    given, draw = METHODS[method], rng.choice
    drawn = {
        "block_length": rng.randint(1, 9),
        "steps": draw([None, rng.randint(1, 30)]),
        "entropy_threshold": draw([0.0, 0.3, 0.6, 0.9, 1.3, 1.8, 2.5]),
        "confidence_threshold": draw([0.1, 0.25, 0.4, 0.55, 0.7, 0.9, 1.0]),
        "low_threshold": draw([0.05, 0.2, 0.35, 0.5]),
        "factor": draw([0.2, 0.5, 0.9, 1.3, 1.7, 2.2, 3.0]),
        "entropy_bound": draw([0.0, 0.1, 0.7, 1.5, 3.0, 6.0]),
        "relaxed_threshold": draw([0.05, 0.1, 0.2, 0.4]),
        "leap_radius": rng.randint(0, 5),
        "block_add_threshold": draw([0.0, 0.1, 0.25, 0.5, 0.8, 0.95, 1.0]),
    }
    chosen = {name: drawn.get(name, value) for name, value in given.items()}
    if method == "dinfer, credit":
        chosen |= {"credit_decay": draw([0.3, 0.8, 1.0]), "credit_exponent": draw([0.0, 0.2, 1.0])}
        chosen |= {"credit_weight": draw([0.0, 0.7, 2.0])}
    if method == "klass":
        chosen |= {"kl_threshold": draw([0.01, 0.1, 0.3, 1.0, 3.0]), "kl_history": rng.randint(1, 3)}
    if method == "d3llm":
        chosen["block_activation_threshold"] = draw([0.0, 0.1, 0.25, 0.5, 0.8, 0.95, 1.0])
    if method in ("llada", "dkv"):
        chosen["remasking"] = draw(["low_confidence", "maskgit_plus", "entropy", "topk_margin", "random"])
    if method.startswith("dream"):
        chosen["remasking"] = draw(["low_confidence", "maskgit_plus", "entropy", "topk_margin", "random", "origin"])
    return {name: value for name, value in chosen.items() if value is not None}


def drawn_cache(rng: Random, cache: str) -> dict:
    """Other settings of one of `CACHES`."""
    interval = rng.choice([NEVER, NEVER, 1, 2, 3, 5])
    drawn = {
        "cache_delay": rng.randint(0, 4),
        "cache_refresh_interval": interval,
        "cache_warmup": rng.randint(0, 5),
        "cache_window": rng.randint(0, 6),
    }
    return {name: drawn.get(name, value) for name, value in CACHES[cache].items()} | (
        {"cache_refresh_interval": interval}
        if cache in ("prefix", "vicinity", "sliding") and interval != NEVER
        else {}
    )
