"""LLaDA as a block-causal model: its config says where blocks lie, and everything goes by that."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tiny import left_padded, tiny_model, tiny_prompt
from transformers import AutoModel, AutoTokenizer

from d3llm_hf import (
    LLaDAConfig,
    LLaDAModelLM,
    as_diffusion_lm,
    encode_chat,
    export_checkpoint,
    init_checkpoint,
    log_likelihood,
)
from d3llm_hf.hub.sources import embedded_checkpoints
from d3llm_hf.models.topology import Topology, Traits


def in_blocks(block_length=4, alignment="prompt", seed=0):
    """A tiny LLaDA with blocks, of the weights of `tiny_model`."""
    plain = tiny_model("llada", seed)
    keys = plain.config.to_dict() | {"block_length": block_length, "block_alignment": alignment}
    model = LLaDAModelLM(LLaDAConfig.from_dict(keys)).eval()
    model.load_state_dict(plain.state_dict())
    return model


def prompts():
    return left_padded([tiny_prompt(1, 7), tiny_prompt(2, 5)])


def decode(model, **settings):
    return model.generate(**prompts(), max_new_tokens=11, return_dict_in_generate=True, **settings)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"block_length": 16}, r"must be given together \(got 16 and None\)"),
        ({"block_alignment": "text"}, r"must be given together \(got None and 'text'\)"),
        ({"block_length": 16, "block_alignment": "answer"}, r"must be one of \['text', 'prompt'\] \(got 'answer'\)"),
        ({"block_length": 0, "block_alignment": "text"}, r"`block_length` must be a positive integer \(got 0\)"),
    ],
)
def test_blocks_that_lie_nowhere_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        LLaDAConfig(**keys)


def test_a_config_without_blocks_sees_everything():
    assert Traits.of(LLaDAModelLM, LLaDAConfig()).topology is None and tiny_model("llada").block_alignment is None
    config = LLaDAConfig(block_length=8, block_alignment="prompt")
    assert Traits.of(LLaDAModelLM, config).topology == Topology(8, "prompt")


@pytest.mark.every(3)
@pytest.mark.parametrize("method", ["d3llm", "dparallel", "d2f", "llada", "entropy_bound"])
@pytest.mark.parametrize("alignment", ["prompt", "text"])
def test_kept_blocks_are_exact(alignment, method):
    if (method, alignment) == ("d2f", "text"):
        with pytest.raises(ValueError, match='must not be "d2f" for a model whose blocks begin with the text'):
            decode(in_blocks(alignment=alignment), decoding_method=method)
        return
    model = in_blocks(alignment=alignment)
    kept = decode(model, decoding_method=method)
    anew = decode(model, decoding_method=method, kv_cache="none")
    assert torch.equal(kept.sequences, anew.sequences) and torch.equal(kept.step_map, anew.step_map)
    assert (kept.positions_computed < anew.positions_computed).all()


def test_d2f_decodes_it_as_it_decodes_full_weights_in_blocks():
    blocks, plain = (
        decode(model, decoding_method="d2f", block_length=4) for model in (in_blocks(), tiny_model("llada"))
    )
    assert torch.equal(blocks.sequences, plain.sequences) and torch.equal(blocks.step_map, plain.step_map)


@pytest.mark.full
def test_one_block_for_everything_is_full_attention_of_the_answer_over_the_prompt():
    """A position of the answer sees all; one of the prompt sees the prompt, and is computed once."""
    model = in_blocks(block_length=11)
    text = {"input_ids": torch.tensor([tiny_prompt(1, 7)])}
    found = model.generate(**text, max_new_tokens=11, decoding_method="llada", steps=1, return_dict_in_generate=True)
    ids = torch.cat([text["input_ids"], torch.full((1, 11), model.config.mask_token_id)], 1)
    sees = torch.ones(1, 1, 18, 18, dtype=torch.bool)
    sees[:, :, :7, 7:] = False
    logits = model(ids, attention_mask=sees).logits[0, 7:]
    logits[:, model.config.mask_token_id] = -torch.inf
    assert torch.equal(found.sequences[0, 7:], logits.argmax(-1))


def test_blocks_travel_with_a_saved_folder(tmp_path):
    model = in_blocks()
    model.save_pretrained(tmp_path / "saved")
    again = AutoModel.from_pretrained(tmp_path / "saved")
    assert again.traits.topology == Topology(4, "prompt")
    assert torch.equal(decode(again).sequences, decode(model).sequences)
    exported = export_checkpoint(tmp_path / "saved", tmp_path / "exported")
    config = json.loads((exported / "config.json").read_text())
    assert (config["block_length"], config["block_alignment"]) == (4, "prompt")
    with pytest.raises(ValueError, match=r"`engine` must decode in blocks .*got 'sglang'"):
        export_checkpoint(tmp_path / "saved", tmp_path / "engine", engine="sglang")


@pytest.mark.full
def test_blocks_of_a_bidirectional_llada_are_found_again_by_auto_model(tmp_path):
    model = as_diffusion_lm(tiny_model("llada"), block_length=4)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert again.traits.topology == Topology(4, "text")
    assert torch.equal(decode(again).sequences, decode(model).sequences)


@pytest.mark.full
def test_its_likelihood_is_not_that_of_a_text_seen_as_a_whole():
    ids = torch.tensor([tiny_prompt(1, 7)])
    with pytest.raises(ValueError, match="`model` must see the whole text"):
        log_likelihood(in_blocks(), ids, torch.ones_like(ids, dtype=torch.bool))


# The embedded checkpoint

QUESTION = "Tom has 8 apples. He buys 7 more. He gives 4 to a friend. How many apples does Tom have now?"
WITHOUT_THE_PACKAGE = """
import sys
for name in ("d3llm_hf", "trainers"):
    sys.modules[name] = None
import torch
from transformers import AutoModel, AutoTokenizer
model = AutoModel.from_pretrained("d3llm-block", trust_remote_code=True, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained("d3llm-block", trust_remote_code=True)
ids = tokenizer.apply_chat_template(
    [{"role": "user", "content": sys.argv[1]}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
print(model.traits.topology)
print(model.generate(**ids, max_new_tokens=64).tolist())
"""


@pytest.fixture(scope="module")
def embedded():
    folder = embedded_checkpoints()["d3llm-block"]
    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)


def answered(embedded, **settings):
    model, tokenizer = embedded
    inputs = encode_chat(tokenizer, [{"role": "user", "content": QUESTION}])
    return inputs, model.generate(**inputs, max_new_tokens=64, return_dict_in_generate=True, **settings)


def test_the_embedded_model_is_right_and_keeps_its_blocks(embedded):
    inputs, kept = answered(embedded)
    answer = kept.sequences[0, inputs["input_ids"].shape[1] :]
    assert embedded[1].decode(answer, skip_special_tokens=True).endswith("#### 11")
    _, anew = answered(embedded, kv_cache="none")
    assert torch.equal(kept.sequences, anew.sequences) and torch.equal(kept.step_map, anew.step_map)
    assert kept.positions_computed < anew.positions_computed and kept.tokens_per_forward > 2


@pytest.mark.slow
def test_the_embedded_folder_loads_where_this_package_is_not(embedded, tmp_path):
    init_checkpoint("d3llm-block", tmp_path / "d3llm-block")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_THE_PACKAGE, QUESTION],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    topology, tokens = done.stdout.splitlines()[-2:]
    assert topology == "Topology(block_length=16, alignment='prompt')"
    assert json.loads(tokens) == answered(embedded)[1].sequences.tolist()
