"""Fine-tuning of the small block-causal models of `tests/golden`, and its loss computed a block at a time."""

import torch
from distillation import ARGUMENTS, trajectories
from official import tiny_tokenizer
from places import GOLDEN
from transformers import AutoModelForCausalLM

from trainers.sft.block_masking import BlockMask
from trainers.sft.config import MaskedDiffusionSFTConfig
from trainers.sft.trainer import MaskedDiffusionSFTTrainer


MODELS = ("sdar-tiny-a", "llada2-tiny-a", "fdv2-tiny-a")
TOKENIZER = tiny_tokenizer()
TOKENS = {"mask_token_id": TOKENIZER.mask_token_id, "eos_token_id": TOKENIZER.eos_token_id}


def block_model(name: str, **config):
    """One of the models, loaded anew; their files name other tokens than the tokenizer, or none."""
    return AutoModelForCausalLM.from_pretrained(GOLDEN / name, **(TOKENS | config))


def block_trainer(folder, model=None, *, dataset=None, given=None, **arguments):
    """A trainer over rows of unequal lengths; `given` are parameters of its constructor."""
    shared = {name: value for name, value in ARGUMENTS.items() if name != "window_sizes"}
    return MaskedDiffusionSFTTrainer(
        model=block_model("sdar-tiny-a") if model is None else model,
        args=MaskedDiffusionSFTConfig(str(folder), **(shared | arguments)),
        train_dataset=trajectories(16) if dataset is None else dataset,
        processing_class=TOKENIZER,
        **(given or {}),
    )


def block_losses(model, inputs: dict[str, torch.Tensor], mask: BlockMask, mask_token_id: int) -> torch.Tensor:
    """The weighted cross-entropy `(V, B, L)` of each hidden token, by a forward for each block of each text.

    A forward is over the clean blocks before and the noisy one; what a row predicts that lies in the block before is
    read off that block's own forward.
    """
    shift = model.logit_shift
    found = torch.zeros(mask.hidden.shape)
    views, rows = mask.hidden.shape[:2]
    for view, row in ((view, row) for view in range(views) for row in range(rows)):
        documents = inputs["documents"][row]
        for document in documents.unique().tolist():
            slots = (documents == document).nonzero()[:, 0]
            clean, hidden = inputs["input_ids"][row, slots], mask.hidden[view, row, slots]
            blocks = inputs["blocks"][row, slots]
            noisy = clean.masked_fill(hidden, mask_token_id)
            logits = []
            for block in blocks.unique().tolist():
                ids = torch.where(blocks == block, noisy, clean)[blocks <= block]
                own = blocks[blocks <= block]
                sees = (own[:, None] >= own)[None, None]
                logits.append(model(ids[None], attention_mask=sees).logits[0, own == block])
            token_loss = torch.nn.functional.cross_entropy(
                torch.cat(logits)[: len(clean) - shift], clean[shift:], reduction="none"
            )
            token_loss = torch.nn.functional.pad(token_loss, (shift, 0)) * mask.weights[view, row, slots]
            found = found.index_put((torch.tensor(view), torch.tensor(row), slots), token_loss * hidden)
    return found
