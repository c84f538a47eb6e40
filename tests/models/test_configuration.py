"""The configurations read the official config.json files, and refuse what the modelling code does not implement."""

import json

import pytest
import torch
from families import DREAM, LLADA
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoConfig


# The sizes of the published checkpoints: the keys are those of the small recorded config.json, which are the official
# ones; the parameter counts are those that the authors (LLaDA: 8.02B) and Qwen2.5-7B (whose shape Dream has) publish.
PUBLISHED = {
    "llada": {
        "d_model": 4096,
        "mlp_hidden_size": 12288,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 32,
        "vocab_size": 126464,
        "embedding_size": 126464,
        "max_sequence_length": 4096,
        "mask_token_id": 126336,
        "eos_token_id": 126081,
        "pad_token_id": 126081,
    },
    "dream": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 131072,
        "mask_token_id": 151666,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "pad_token_id": 151643,
    },
}
PARAMETERS = {"llada": 8_015_581_184, "dream": 7_615_616_512}


def official_keys(family) -> dict:
    return json.loads((family.checkpoint / "config.json").read_text())


def test_published_sizes_build_a_model_of_the_published_parameter_count(family, tmp_path):
    keys = official_keys(family) | PUBLISHED[family.name]
    (tmp_path / "config.json").write_text(json.dumps(keys))
    config = family.config_class.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = family.model_class(config)
    assert model.num_parameters() == PARAMETERS[family.name]
    assert all(getattr(config, key) == value for key, value in PUBLISHED[family.name].items())


def test_the_defaults_of_dream_are_those_of_the_published_checkpoint():
    config = DREAM.config_class()
    assert all(getattr(config, key) == value for key, value in PUBLISHED["dream"].items())
    assert config.rope_parameters["rope_theta"] == 1_000_000


def test_every_official_key_survives_a_round_trip(family, tmp_path):
    before = official_keys(family)
    family.config_class.from_pretrained(family.checkpoint).save_pretrained(tmp_path)
    after = json.loads((tmp_path / "config.json").read_text())
    # transformers 5 writes `dtype` for `torch_dtype` and `rope_parameters` for `rope_scaling`.
    renamed = {"torch_dtype", "rope_scaling", "transformers_version"}
    assert {key: value for key, value in before.items() if key not in renamed} == {
        key: after.get(key, "lost") for key in before if key not in renamed
    }
    assert after.get("dtype") == before.get("torch_dtype")
    assert after["rope_parameters"] == {"rope_type": "default", "rope_theta": before["rope_theta"]}


def test_an_unknown_key_survives_a_round_trip(family, tmp_path):
    family.config(made_up_key={"a": 1}).save_pretrained(tmp_path)
    assert family.config_class.from_pretrained(tmp_path).made_up_key == {"a": 1}


def test_a_config_made_in_code_spells_out_what_the_official_code_would_default_differently(tmp_path):
    """The official LLaDA class defaults to dropout, biases, tied weights and no rotation, Dream's to base 10000."""
    LLADA.config().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {
        "activation_type": "silu",
        "attention_dropout": 0.0,
        "block_type": "llama",
        "embedding_dropout": 0.0,
        "include_bias": False,
        "layer_norm_type": "rms",
        "residual_dropout": 0.0,
        "rope": True,
        "rope_theta": 500000.0,
        "weight_tying": False,
    }.items() <= saved.items()
    DREAM.config().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["rope_theta"] == 1_000_000


def test_transformers_usual_names_reach_the_official_keys_of_llada():
    config = LLADA.config(include_qkv_bias=True)
    aliases = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "num_hidden_layers": "n_layers",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "tie_word_embeddings": "weight_tying",
        "initializer_range": "init_std",
    }
    for usual, official in aliases.items():
        assert getattr(config, usual) == getattr(config, official)
    config.hidden_size = 48
    assert config.d_model == 48 and config.head_dim == 12
    assert "hidden_size" not in config.to_dict()


def test_sizes_that_are_not_given_follow_from_the_others():
    config = LLADA.config_class(d_model=32, n_heads=4, mlp_ratio=3, vocab_size=100, embedding_size=128)
    assert (config.n_kv_heads, config.mlp_hidden_size, config.vocab_size) == (4, 96, 128)
    assert DREAM.config(num_key_value_heads=None).num_key_value_heads == 4


TINY = {"vocab_size": 100, "mask_token_id": 99, "eos_token_id": 98, "pad_token_id": 98}


@pytest.mark.parametrize(
    "make",
    [
        LLADA.config_class,
        lambda **sizes: AutoConfig.for_model("llada", **sizes),
        LLADA.config_class.from_dict,
        lambda **sizes: LLADA.config_class.from_dict(sizes),
    ],
    ids=["constructor", "for_model", "arguments of from_dict", "from_dict"],
)
def test_sizes_follow_from_usual_names_as_from_official_ones(make):
    if make == LLADA.config_class.from_dict:
        usual = make(TINY, hidden_size=64, num_attention_heads=4)
    else:
        usual = make(hidden_size=64, num_attention_heads=4, **TINY)
    official = LLADA.config_class(d_model=64, n_heads=4, **TINY)
    assert (usual.n_kv_heads, usual.mlp_hidden_size) == (4, 256)
    assert usual.to_dict() == official.to_dict()


def test_a_usual_name_set_to_none_is_derived():
    config = LLADA.config(num_key_value_heads=None, intermediate_size=None, n_kv_heads=None, mlp_hidden_size=None)
    assert (config.n_kv_heads, config.mlp_hidden_size) == (4, 128)


def test_two_values_for_one_size_are_refused():
    with pytest.raises(ValueError, match=r"`hidden_size` is another name of `d_model` \(got 64 and 32\)"):
        LLADA.config_class(d_model=32, hidden_size=64, **TINY)
    assert LLADA.config_class(d_model=64, hidden_size=64, n_heads=4, **TINY).hidden_size == 64


def test_arguments_over_a_folder_take_part_in_what_is_derived(family, tmp_path):
    family.config().save_pretrained(tmp_path)
    keys = json.loads((tmp_path / "config.json").read_text())
    for derived in ("n_kv_heads", "mlp_hidden_size", "num_key_value_heads"):
        keys.pop(derived, None)
    (tmp_path / "config.json").write_text(json.dumps(keys))
    config, unused = AutoConfig.from_pretrained(
        tmp_path,
        num_attention_heads=8,
        num_hidden_layers=3,
        num_key_value_heads=None,
        rope_theta=7.0,
        vocab_size=70,
        return_unused_kwargs=True,
        made_up_argument=1,
    )
    assert config.num_key_value_heads == config.num_attention_heads == 8
    assert config.rope_theta == config.rope_parameters["rope_theta"] == 7.0
    assert (config.num_hidden_layers, config.vocab_size, unused) == (3, 70, {"made_up_argument": 1})
    if family is DREAM:
        assert len(config.layer_types) == 3
    else:
        assert config.mlp_hidden_size == 4 * config.d_model
    assert json.loads((tmp_path / "config.json").read_text()) == keys


def test_the_rotary_base_may_come_under_either_name(family):
    assert family.config(rope_theta=123.0).rope_parameters["rope_theta"] == 123.0
    assert family.config(rope_parameters={"rope_type": "default", "rope_theta": 77.0}).rope_theta == 77.0


def refusal(make) -> str:
    with pytest.raises(StrictDataclassClassValidationError) as caught:
        make()
    assert isinstance(caught.value.__cause__, ValueError)
    return str(caught.value.__cause__)


@pytest.mark.parametrize(
    ("key", "value", "implemented"),
    [
        ("activation_type", "swiglu", "'silu'"),
        ("alibi", True, "False"),
        ("attention_layer_norm", True, "False"),
        ("block_group_size", 2, "1"),
        ("block_type", "sequential", "'llama'"),
        ("embedding_dropout", 0.1, "0.0"),
        ("include_bias", True, "False"),
        ("input_emb_norm", True, "False"),
        ("is_causal", True, "False"),
        ("layer_norm_type", "default", "'rms'"),
        ("multi_query_attention", True, "False"),
        ("residual_dropout", 0.1, "0.0"),
        ("rope", False, "True"),
        ("scale_logits", True, "False"),
    ],
)
def test_a_variant_that_no_released_llada_uses_is_refused_by_name(key, value, implemented):
    message = refusal(lambda: LLADA.config(**{key: value}))
    assert message == (
        f"`{key}` must be {implemented} (got {value!r}): no released LLaDA uses another value, and it is not "
        "implemented. Remove the key from config.json if the checkpoint does not need it."
    )


@pytest.mark.parametrize("sizes", [{"d_model": 34}, {"n_kv_heads": 3}])
def test_llada_sizes_that_do_not_divide_are_refused_with_their_values(sizes):
    sizes = {"d_model": 32, "n_heads": 4, "n_kv_heads": 2} | sizes
    assert refusal(lambda: LLADA.config(**sizes)) == (
        "`d_model` must be a multiple of `n_heads`, and `n_heads` of `n_kv_heads` (got d_model={d_model}, "
        "n_heads={n_heads}, n_kv_heads={n_kv_heads}). Correct config.json.".format(**sizes)
    )


@pytest.mark.parametrize("key", ["is_causal", "use_sliding_window"])
def test_a_dream_that_does_not_see_everything_is_refused(key):
    assert refusal(lambda: DREAM.config(**{key: True})) == (
        f"`{key}` must be False (got True): every token of Dream sees all others. Correct config.json."
    )
