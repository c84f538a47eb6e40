"""Training what PEFT puts in front of a text: the right logits are learnt from, and nothing else learns."""

import pytest
import torch
from datasets import Dataset
from distillation import make_trainer, student
from official import tiny_tokenizer
from others import ENCODERS
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from thin import covering

from d3llm_hf import as_diffusion_lm
from trainers.bench.plain_distill import FullLogitsTrainer
from trainers.sft.config import MaskedDiffusionSFTConfig
from trainers.sft.trainer import MaskedDiffusionSFTTrainer


TOKENIZER = tiny_tokenizer()
KINDS = (PromptTuningConfig, PrefixTuningConfig)
ARGUMENTS = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "max_prompt_length": 40,
    "response_length": 8,
    "learning_rate": 1e-1,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
}


def learnt(kind, task_type="CAUSAL_LM"):
    return kind(task_type=task_type, num_virtual_tokens=3)


def sft(folder, model, **more):
    rows = Dataset.from_list([{"prompt": "ab" * (1 + index), "completion": "xyz"} for index in range(4)])
    arguments = MaskedDiffusionSFTConfig(str(folder), **ARGUMENTS)
    return MaskedDiffusionSFTTrainer(model, arguments, train_dataset=rows, processing_class=TOKENIZER, **more)


@pytest.mark.every(2)
@pytest.mark.parametrize("family, kind", covering(["llada", "dream"], KINDS, strength=1))
def test_a_learnt_prompt_is_trained_and_the_model_stays(kind, family, tmp_path):
    trainer = sft(tmp_path, student(TOKENIZER, family), peft_config=learnt(kind))
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    assert trainer.train().training_loss > 0
    moved = {name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved and all("prompt_encoder" in name for name in moved)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trainer", [None, FullLogitsTrainer])
def test_distillation_learns_from_the_logits_of_the_text(kind, trainer, tmp_path):
    more = {} if trainer is None else {"kind": trainer}
    distill = make_trainer(tmp_path, model=get_peft_model(student(TOKENIZER), learnt(kind)), max_steps=1, **more)
    batch = next(iter(distill.get_train_dataloader()))
    distill.model.eval()
    with torch.no_grad():
        loss = distill.compute_loss(distill.model, batch)
        distill._keeps_marked_positions = False
        again = distill.compute_loss(distill.model, batch)
    torch.testing.assert_close(loss, again)


def test_a_prompt_for_another_task_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r'`task_type` of the PROMPT_TUNING adapter must be "CAUSAL_LM".*got None'):
        sft(tmp_path, student(TOKENIZER), peft_config=learnt(PromptTuningConfig, task_type=None))


def test_embeddings_in_front_of_a_stock_model_are_refused_since_padding_would_move_the_text(tmp_path):
    bert = as_diffusion_lm(ENCODERS[0].tiny(vocab_size=len(TOKENIZER)), mask_token_id=TOKENIZER.mask_token_id)
    with pytest.raises(ValueError, match=r"`peft_config` must not put embeddings in front .*BertForMaskedLM"):
        sft(tmp_path, bert, peft_config=learnt(PromptTuningConfig))
