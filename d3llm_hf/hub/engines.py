"""What serving engines need of a checkpoint folder besides what transformers needs; `docs/engines.md` says what works.

No engine is imported or run here. What is written follows the public code of SGLang's pull request 20615
(`python/sglang/srt/dllm/config.py`, `dllm/algorithm/full_attn_multi_block.py` and `entropy_threshold.py` at commit
26eb1bf, `models/d3llm_llada.py` at 7804f31 of sgl-project/sglang), which was closed without being merged.
"""

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

from .model_card import tensor_headers


ENGINES = ("sglang",)

# Method of ours -> the algorithm of that pull request, and its name for each of our settings.
SGLANG_ALGORITHMS: dict[str, tuple[str, dict[str, str]]] = {
    "d3llm": (
        "FullAttnMultiBlock",
        {
            "block_length": "block_size",
            "entropy_threshold": "threshold",
            "block_add_threshold": "block_add_threshold",
            "block_activation_threshold": "decoded_token_threshold",
        },
    ),
    "dparallel": ("EntropyThreshold", {"block_length": "block_size", "entropy_threshold": "threshold"}),
}
SGLANG_MASK_TOKENS = {"llada": 126336, "Dream": 151666}
"""Mask tokens that the engine's code has fixed for each family (`DllmConfig.from_server_args`)."""

# Tensor names that its loaders rename or take as they are; all others they skip without a word.
_SGLANG_TENSORS = {
    "llada": re.compile(
        r"model\.transformer\.((wte|ln_f|ff_out)|blocks\.\d+\.(q_proj|k_proj|v_proj|attn_out|attn_norm|ff_proj|up_proj"
        r"|ff_norm|ff_out))\.weight"
    ),
    "Dream": re.compile(
        r"lm_head\.weight|model\.(embed_tokens\.weight|norm\.weight|layers\.\d+\.(self_attn\.(q|k|v|o)_proj\.(weight"
        r"|bias)|mlp\.(gate|up|down)_proj\.weight|(input|post_attention)_layernorm\.weight))"
    ),
}
_LLADA_HEAD = "model.transformer.ff_out.weight"
_CONFIGURATION = {"llada": ("configuration_llada", "LLaDAConfig"), "Dream": ("configuration_dream", "DreamConfig")}


def check_for_engine(engine: str, family: str, folder: Path) -> None:
    """Refuses what the engine's loader would take without a word and load wrongly, before anything is copied.

    Args:
        engine (`str`): one of `ENGINES`.
        family (`str`): `model_type` of the checkpoint.
        folder (`Path`): its weights.

    Raises:
        ValueError: for an engine that is not known, for block-causal attention, and for tensors that it does not have.
    """
    if engine not in ENGINES:
        raise ValueError(
            f"`engine` must be one of {list(ENGINES)} (got {engine!r}). docs/engines.md says which engines load a "
            "plain export."
        )
    if family not in _SGLANG_TENSORS:
        raise ValueError(
            f"`engine` must have code for the family (got {engine!r} for model_type {family!r}); its pull request has "
            f"{list(_SGLANG_TENSORS)}. Export without `engine`; docs/engines.md says what loads which family."
        )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("block_alignment") is not None:
        raise ValueError(
            f"`engine` must decode in blocks for a block-causal checkpoint (got {engine!r}, whose code lets every "
            "position see all others). Export without `engine`."
        )
    _check_tensors(family, folder)


def prepare_for_engine(engine: str, folder: Path) -> str:
    """Adds what an engine needs to an exported folder.

    1. Refuse what the engine's loader would take without a word and load wrongly.
    2. `decoding.yaml`: the folder's decoding settings under the engine's names.
    3. `configuration_sglang.py` and config.json: a configuration that transformers 4 loads too, with every size that
       the engine reads spelt out.

    Args:
        engine (`str`): one of `ENGINES`.
        folder (`Path`): as `export_checkpoint` has filled it, but for the card.

    Returns:
        `str`: a section for the card, in Markdown.

    Raises:
        ValueError: for an engine that is not known, tensors or a decoding method that it does not have.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    family = config["model_type"]

    # 1. Refuse what the engine's loader would take without a word and load wrongly
    check_for_engine(engine, family, folder)

    # 2. The decoding settings under the engine's names
    algorithm, settings = sglang_decoding(family, generation)
    lines = [
        "# For SGLang: --dllm-algorithm-config decoding.yaml",
        f"# --dllm-algorithm {algorithm} is that of its pull request 20615, which was not merged.",
        *(f"{name}: {value}" for name, value in settings.items()),
    ]
    (folder / "decoding.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")

    # 3. A configuration that transformers 4 loads too
    module, name = _CONFIGURATION[family]
    source = _template("configuration_sglang.py").replace("configuration_llada", module).replace("LLaDAConfig", name)
    aliases, values = _spelt_out(family, config)
    source = source.replace('"llada"', json.dumps(family))
    source = source.replace("{}  # noqa: RUF012", json.dumps(aliases))
    (folder / "configuration_sglang.py").write_text(source, encoding="utf-8")
    config |= values
    config["auto_map"] = config["auto_map"] | {"AutoConfig": f"configuration_sglang.{name}"}
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return _section(algorithm, config)


def sglang_decoding(family: str, generation: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The algorithm of SGLang's pull request and its settings that decode as a generation_config.json says.

    Args:
        family (`str`): `model_type` of the checkpoint.
        generation (`dict`): content of its generation_config.json; the defaults of its method fill the rest.

    Raises:
        ValueError: for a decoding method that the engine does not have.
    """
    from ..models.methods import DEFAULT_METHOD, METHODS, SHIFTED_METHODS

    method = generation.get("decoding_method") or DEFAULT_METHOD
    if method not in SGLANG_ALGORITHMS:
        raise ValueError(
            f"`decoding_method` must be one of {list(SGLANG_ALGORITHMS)} for SGLang (got {method!r}). Pass "
            "`decoding_method='d3llm'` (`--decoding-method d3llm`)."
        )
    algorithm, names = SGLANG_ALGORITHMS[method]
    values = METHODS[method] | (SHIFTED_METHODS[method] if family == "Dream" else {})
    values |= {name: generation[name] for name in names if generation.get(name) is not None}
    return algorithm, {theirs: values[ours] for ours, theirs in names.items()}


def _check_tensors(family: str, folder: Path) -> None:
    names = tensor_headers(folder)
    unknown = sorted(name for name in names if not _SGLANG_TENSORS[family].fullmatch(name))
    if unknown:
        raise ValueError(
            f"`source` must have the official tensor names for SGLang, whose loader skips all others (got "
            f"{unknown[:3]}). Load it with `AutoModel` and save it with `model.save_pretrained`."
        )
    if family == "llada" and _LLADA_HEAD not in names:
        raise ValueError(
            f"`source` must have a head of its own ({_LLADA_HEAD}) for SGLang, whose loader would leave it "
            "uninitialised (got tied weights). Set `weight_tying` to False, copy the embedding to the head, and save."
        )


def _spelt_out(family: str, config: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """transformers' names for the config's keys, and values that the engine reads but a config may leave out."""
    if family == "Dream":
        return {}, {}
    from ..models.configuration_llada import LLaDAConfig

    full = LLaDAConfig.from_dict(config)
    names = ("vocab_size", "n_kv_heads", "mlp_hidden_size", "max_sequence_length", "rope_theta", "rms_norm_eps")
    return dict(LLaDAConfig.attribute_map), {name: getattr(full, name) for name in names} | {"hidden_act": "silu"}


def _section(algorithm: str, config: dict[str, Any]) -> str:
    fixed = SGLANG_MASK_TOKENS[config["model_type"]]
    differs = ""
    if config.get("mask_token_id") != fixed:
        differs = (
            f"\nIts code has the mask token {fixed} fixed for {config['architectures'][0]}; here it is "
            f"{config.get('mask_token_id')}, so that line of its `dllm/config.py` has to be changed as well.\n"
        )
    return _template("sglang.md").replace("ALGORITHM", algorithm).replace("MASK_TOKEN\n", differs)


def _template(name: str) -> str:
    return (resources.files(__package__) / "templates" / name).read_text(encoding="utf-8")
