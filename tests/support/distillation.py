"""Tiny students, trajectories that are made in code, and trainers for the tests of distillation."""

import torch
from datasets import Dataset
from official import tiny_tokenizer

from d3llm_hf import DreamConfig, DreamModel, LLaDAConfig, LLaDAModelLM
from trainers.distill.config import PseudoTrajectoryDistillConfig
from trainers.distill.trainer import PseudoTrajectoryDistillTrainer


RESPONSE = 12
ARGUMENTS = {
    "max_prompt_length": 8,
    "response_length": RESPONSE,
    "window_sizes": [4, 6],
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "max_steps": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
}


def student(tokenizer, family="llada", **config):
    torch.manual_seed(0)
    tokens = {
        "vocab_size": len(tokenizer),
        "mask_token_id": tokenizer.mask_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family == "llada":
        sizes = {"d_model": 16, "n_layers": 1, "n_heads": 2, "mlp_hidden_size": 24, "max_sequence_length": 64}
        return LLaDAModelLM(LLaDAConfig(**(sizes | tokens | config)))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    return DreamModel(DreamConfig(intermediate_size=24, max_position_embeddings=64, **(sizes | tokens | config)))


def rows(count, seed=0, **more):
    """Samples of unequal lengths whose teachers decided one token a step, in a random order."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(count):
        prompt, response = (int(torch.randint(2, 8, (), generator=generator)) for _ in range(2))
        found.append(
            {
                "prompt_ids": torch.randint(5, 20, (prompt,), generator=generator).tolist(),
                "response_ids": torch.randint(5, 20, (response,), generator=generator).tolist(),
                "step_map": (torch.randperm(response, generator=generator) + 1).tolist(),
            }
            | {name: make(index) for name, make in more.items()}
        )
    return found


def trajectories(count, seed=0, **more):
    return Dataset.from_list(rows(count, seed, **more))


def make_trainer(
    folder,
    tokenizer=None,
    model=None,
    dataset=None,
    trainer_kwargs=None,
    kind=PseudoTrajectoryDistillTrainer,
    **arguments,
):
    tokenizer = tiny_tokenizer() if tokenizer is None else tokenizer
    return kind(
        model=student(tokenizer) if model is None else model,
        args=PseudoTrajectoryDistillConfig(str(folder), **(ARGUMENTS | arguments)),
        train_dataset=trajectories(16) if dataset is None else dataset,
        processing_class=tokenizer,
        **(trainer_kwargs or {}),
    )
