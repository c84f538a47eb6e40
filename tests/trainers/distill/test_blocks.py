"""Distillation of students that see nothing of later blocks."""

import pytest
import torch
from block_tuning import block_model
from distillation import RESPONSE, make_trainer, student, trajectories
from official import tiny_tokenizer
from peft import PrefixTuningConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

from d3llm_hf import SDARForCausalLM, as_diffusion_lm
from d3llm_hf.models.topology import Topology
from trainers.common.block_masks import block_mask_of


BLOCKS = {"block_length": 4, "block_alignment": "prompt"}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def batch_of(trainer):
    return next(iter(trainer.get_train_dataloader()))


def test_what_a_slot_sees_is_worked_out_by_hand():
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    behind = block_mask_of(mask, 4, Topology(2, "prompt"))[:, 0].int()
    assert behind[0].tolist() == [
        [0, 1, 1, 1, 1, 1],  # padding, which nothing sees
        [0, 1, 0, 0, 0, 0],  # the prompt
        *[[0, 1, 1, 1, 0, 0]] * 2,
        *[[0, 1, 1, 1, 1, 1]] * 2,
    ]
    assert behind[1].tolist() == [[1, 1, 0, 0, 0, 0]] * 2 + [[1, 1, 1, 1, 0, 0]] * 2 + [[1, 1, 1, 1, 1, 0]] * 2
    text = block_mask_of(mask, 4, Topology(3, "text"))[0, 0].int()
    assert text.tolist() == [[0, 1, 1, 1, 1, 1]] + [[0, 1, 1, 1, 0, 0]] * 3 + [[0, 1, 1, 1, 1, 1]] * 2


@pytest.mark.every(2)
@pytest.mark.parametrize("kind", ["llada", "sdar"])
def test_what_is_learnt_does_not_depend_on_later_blocks(kind, tokenizer, tmp_path):
    model = student(tokenizer, **BLOCKS) if kind == "llada" else block_model("sdar-tiny-a")
    trainer = make_trainer(tmp_path, tokenizer, model.eval())
    inputs = batch_of(trainer)
    canvas, seen = inputs["input_ids"], inputs["attention_mask"]
    rows, width = canvas.shape
    blocks = trainer.topology.blocks(seen.cumsum(1) - 1, seen[:, :-RESPONSE].sum(1))
    learnt = torch.ones(rows, RESPONSE, dtype=torch.bool)
    found = trainer._seen_logits(trainer.model, canvas, seen, learnt)[1].view(rows, RESPONSE, -1)
    for row in range(rows):
        cut = int(blocks[row, -1])  # the last block of the row
        other = canvas.clone()
        other[row, blocks[row] == cut] = 7
        changed = trainer._seen_logits(trainer.model, other, seen, learnt)[1].view(rows, RESPONSE, -1)
        earlier = blocks[row, width - RESPONSE :] < cut
        assert torch.equal(changed[row, earlier], found[row, earlier])
        assert not torch.equal(changed[row], found[row])


@pytest.mark.full
@pytest.mark.parametrize("arguments", [{}, {"objective": "rollout", "rollout_block_length": 4}, {"sft_weight": 0.5}])
def test_a_run_decodes_in_blocks_what_it_learns_in_blocks(arguments, tokenizer, tmp_path):
    data = trajectories(16)
    decoded = {"eval_strategy": "steps", "eval_steps": 2, "eval_generate_samples": 4}
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        student(tokenizer, **BLOCKS),
        data,
        {"eval_dataset": data},
        eval_generate_kwargs={"decoding_method": "d3llm", "max_new_tokens": 8},
        **decoded,
        **arguments,
    )
    masks = []
    trainer.model.register_forward_pre_hook(
        lambda _, a, given: masks.append(given["attention_mask"]), with_kwargs=True
    )
    trainer.train()
    assert all(mask.ndim == 4 for mask in masks if mask is not None and mask.shape[0] == 8)
    assert "eval_tpf" in trainer.state.log_history[-2] and trainer.model.traits.topology == Topology(4, "prompt")


@pytest.mark.full
def test_a_teacher_that_sees_the_whole_canvas_teaches_a_student_that_does_not(tokenizer, tmp_path):
    teacher = student(tokenizer)
    trainer = make_trainer(
        tmp_path, tokenizer, student(tokenizer, **BLOCKS), trainer_kwargs={"teacher": teacher}, target="teacher"
    )
    seen = {"teacher": [], "student": []}
    for name, model in (("teacher", trainer.teacher), ("student", trainer.model)):
        model.register_forward_pre_hook(
            lambda _, a, given, name=name: seen[name].append(given["attention_mask"].ndim), with_kwargs=True
        )
    trainer.compute_loss(trainer.model, batch_of(trainer))
    assert seen == {"teacher": [2], "student": [4]}


def test_states_of_another_decoding_are_refused(tokenizer, tmp_path):
    with pytest.raises(
        ValueError, match=r"`rollout_block_length` must be the tokens of a block .*got 16 for blocks of 4"
    ):
        make_trainer(tmp_path, tokenizer, student(tokenizer, **BLOCKS), objective="rollout")


@pytest.mark.full
def test_students_that_cannot_be_shown_blocks_are_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"must predict token i in row i, .*got Fast_dLLM_QwenForCausalLM"):
        make_trainer(tmp_path, tokenizer, block_model("fdv2-tiny-a"))

    class Placeless(Qwen3ForCausalLM):
        """Has no name for the positions."""

        def forward(self, input_ids=None, attention_mask=None, **kwargs):
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    stock = Placeless(Qwen3Config(vocab_size=len(tokenizer), head_dim=8, num_key_value_heads=2, **sizes))
    model = as_diffusion_lm(stock, mask_token_id=tokenizer.mask_token_id, block_length=4, logit_shift=0)
    with pytest.raises(ValueError, match="`model` must take `position_ids` to be distilled in blocks"):
        make_trainer(tmp_path, tokenizer, model)

    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, num_layers=1, token_dim=16,
                                num_attention_heads=2, num_transformer_submodules=1)  # fmt: skip
    assert isinstance(block_model("sdar-tiny-a"), SDARForCausalLM)
    with pytest.raises(ValueError, match="`peft_config` must put nothing in front of texts that are seen in blocks"):
        make_trainer(tmp_path, tokenizer, get_peft_model(student(tokenizer, **BLOCKS), prefix))
