"""Configs of block-causal families: what they refuse, and which keys they keep."""

import json

import pytest
from places import GOLDEN

from d3llm_hf import Fast_dLLM_QwenConfig, SDARConfig


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"is_causal": True}, "`is_causal` must be False .*its block and all earlier ones"),
        ({"use_sliding_window": True}, "`use_sliding_window` must be False"),
        ({"mlp_bias": True}, "`mlp_bias` must be False .*no such biases"),
        ({"block_size": 0}, r"`block_size` must be a positive integer \(got 0\)"),
        ({"block_length": 8, "block_size": 16}, "`block_length` is another name of `block_size`"),
        ({"num_experts": 8}, "`num_experts` describes a mixture of experts"),
    ],
)
def test_what_sdar_does_not_have_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        SDARConfig(**keys)


def test_official_keys_survive_a_round_trip(tmp_path):
    official = json.loads((GOLDEN / "sdar-tiny-a" / "config.json").read_text())
    SDARConfig.from_pretrained(GOLDEN / "sdar-tiny-a").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    # What speaks of the official code's training or of a default is not kept.
    own = {"attn_implementation", "auto_map", "torch_dtype", "transformers_version", "architectures", "rope_scaling"}
    assert {name: saved[name] for name in official if name not in own} == {
        name: value for name, value in official.items() if name not in own
    }


def test_the_block_has_two_names():
    assert SDARConfig(block_size=16).block_length == SDARConfig(block_length=16).block_size == 16


@pytest.mark.parametrize("config_class", [SDARConfig, Fast_dLLM_QwenConfig])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_norms_of_queries_and_keys_are_in_the_tensor_parallel_plan_of_a_model_that_has_them(
    config_class, qk_norm, tmp_path
):
    config_class(qk_norm=qk_norm).save_pretrained(tmp_path)
    config = config_class.from_pretrained(tmp_path)
    norms = {name.rpartition(".")[2] for name in config.base_model_tp_plan if name.endswith("norm")}
    assert config.qk_norm is qk_norm and norms == ({"q_norm", "k_norm"} if qk_norm else set())
    assert "base_model_tp_plan" not in config.to_dict()
    usual = config_class is SDARConfig
    assert ("layers.*.self_attn.q_norm" in config_class.base_model_tp_plan) is usual
