"""Model families as subjects of transformers' common model tests; see [`run_common_tests.py`](run_common_tests.py).

This file is not run from here: it is copied to `tests/models/` of transformers' source distribution.
"""

import unittest
import unittest.mock
from typing import ClassVar

from transformers.models.auto import modeling_auto
from transformers.testing_utils import require_torch, torch_device

from d3llm_hf import DreamConfig, DreamModel, LLaDAConfig, LLaDAModel, LLaDAModelLM
from d3llm_hf.models.modeling_dream import DreamBaseModel
from d3llm_hf.models.modeling_fast_dllm_v2 import Fast_dLLM_QwenConfig, Fast_dLLM_QwenForCausalLM, Fast_dLLM_QwenModel
from d3llm_hf.models.modeling_llada2 import LLaDA2MoeConfig, LLaDA2MoeModel, LLaDA2MoeModelLM
from d3llm_hf.models.modeling_sdar import SDARConfig, SDARForCausalLM, SDARModel
from d3llm_hf.models.modeling_sdar_moe import SDARMoeConfig, SDARMoeForCausalLM, SDARMoeModel

from ..test_configuration_common import ConfigTester
from ..test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask


# The mixin looks class names up here to tell backbones (no loss) from models with a head (labels as in masked LMs).
modeling_auto.MODEL_MAPPING_NAMES.update(
    {
        "llada": "LLaDAModel",
        "Dream": "DreamBaseModel",
        "sdar": "SDARModel",
        "sdar_moe": "SDARMoeModel",
        "llada2_moe": "LLaDA2MoeModel",
        "Fast_dLLM_Qwen": "Fast_dLLM_QwenModel",
    }
)
modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.update(
    {
        "llada": "LLaDAModelLM",
        "Dream": "DreamModel",
        "sdar": "SDARForCausalLM",
        "sdar_moe": "SDARMoeForCausalLM",
        "llada2_moe": "LLaDA2MoeModelLM",
        "Fast_dLLM_Qwen": "Fast_dLLM_QwenForCausalLM",
    }
)


class FamilyTester:
    """A tiny configuration of a family, and inputs for it."""

    batch_size = 3
    seq_length = 7
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    vocab_size = 99
    is_training = True

    def __init__(self, parent, config_class, **sizes):
        self.parent = parent
        self.config_class = config_class
        self.sizes = sizes | {
            "vocab_size": self.vocab_size,
            "mask_token_id": self.vocab_size - 1,
            "eos_token_id": 1,
            "pad_token_id": 0,
        }

    def get_config(self):
        return self.config_class(**self.sizes)

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.seq_length]
        return self.get_config(), {
            "input_ids": ids_tensor(shape, self.vocab_size).to(torch_device),
            "attention_mask": random_attention_mask(shape).to(torch_device),
        }


class FamilyTestMixin(ModelTesterMixin):
    # The generation tests of transformers are about beams, assisted decoding and autoregressive caches.
    all_generative_model_classes = ()
    test_can_init_all_missing_weights_before_2023 = True  # that is: run the test, although our files bear no year

    def setUp(self):
        self.model_tester = FamilyTester(self, self.config_class, **self.sizes)
        self.config_tester = ConfigTester(self, config_class=self.config_class, **self.sizes)

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_reverse_loading_mapping(self):
        # It sets keys of mixtures of experts on every config, which ours refuse when they are saved or read.
        checks = dict.fromkeys(("validate", "validate_architecture"), lambda config: None)
        with unittest.mock.patch.multiple(self.config_class, **checks):
            super().test_reverse_loading_mapping()

    def test_model_weights_reload_no_missing_tied_weights(self):
        # It loads a file with one tensor that has no place. Nothing here runs with the weights that it lacks.
        with self.assertRaisesRegex(ValueError, "must hold the tensors"):
            super().test_model_weights_reload_no_missing_tied_weights()

    def test_bc_cache_name_forward(self):
        self.skipTest("a cache is taken by either name, without a warning")


@require_torch
class LLaDAModelTest(FamilyTestMixin, unittest.TestCase):
    config_class = LLaDAConfig
    all_model_classes = (LLaDAModel, LLaDAModelLM)
    sizes: ClassVar = {
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "mlp_hidden_size": 48,
        "max_sequence_length": 64,
    }

    def test_reverse_loading_mapping(self):
        self.all_model_classes = (LLaDAModelLM,)  # the head is among the renamed tensors, and a backbone has none
        super().test_reverse_loading_mapping()


@require_torch
class DreamModelTest(FamilyTestMixin, unittest.TestCase):
    config_class = DreamConfig
    all_model_classes = (DreamBaseModel, DreamModel)
    sizes: ClassVar = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
    }


@require_torch
class SDARModelTest(FamilyTestMixin, unittest.TestCase):
    config_class = SDARConfig
    all_model_classes = (SDARModel, SDARForCausalLM)
    sizes: ClassVar = DreamModelTest.sizes | {"head_dim": 8}


@require_torch
class SDARMoeModelTest(FamilyTestMixin, unittest.TestCase):
    config_class = SDARMoeConfig
    all_model_classes = (SDARMoeModel, SDARMoeForCausalLM)
    sizes: ClassVar = SDARModelTest.sizes | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@require_torch
class LLaDA2MoeModelTest(FamilyTestMixin, unittest.TestCase):
    config_class = LLaDA2MoeConfig
    all_model_classes = (LLaDA2MoeModel, LLaDA2MoeModelLM)
    sizes: ClassVar = SDARMoeModelTest.sizes | {"n_group": 2, "topk_group": 2, "num_shared_experts": 1}


@require_torch
class FastDLLMQwenModelTest(FamilyTestMixin, unittest.TestCase):
    config_class = Fast_dLLM_QwenConfig
    all_model_classes = (Fast_dLLM_QwenModel, Fast_dLLM_QwenForCausalLM)
    sizes: ClassVar = DreamModelTest.sizes
