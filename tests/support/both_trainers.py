"""Both trainers with the same tiny model, data and arguments, for what they share."""

from distillation import ARGUMENTS, student, trajectories
from official import tiny_tokenizer

from trainers.distill.config import PseudoTrajectoryDistillConfig
from trainers.distill.trainer import PseudoTrajectoryDistillTrainer
from trainers.sft.config import MaskedDiffusionSFTConfig
from trainers.sft.trainer import MaskedDiffusionSFTTrainer


KINDS = {
    "sft": (MaskedDiffusionSFTConfig, MaskedDiffusionSFTTrainer),
    "distillation": (PseudoTrajectoryDistillConfig, PseudoTrajectoryDistillTrainer),
}


def make_args(kind, folder, **arguments):
    shared = {name: value for name, value in ARGUMENTS.items() if kind == "distillation" or name != "window_sizes"}
    return KINDS[kind][0](str(folder), **(shared | arguments))


def make(kind, folder, *, args=None, train=None, held_out=None, given=None, **arguments):
    """A trainer of that kind; `given` are parameters of its constructor."""
    tokenizer = tiny_tokenizer()
    return KINDS[kind][1](
        **{
            "model": student(tokenizer),
            "args": make_args(kind, folder, **arguments) if args is None else args,
            "train_dataset": trajectories(16) if train is None else train,
            "eval_dataset": held_out,
            "processing_class": tokenizer,
        }
        | (given or {})
    )


def weights(trainer):
    return {name: weight.clone() for name, weight in trainer.model.state_dict().items()}


def same(weights, trainer):
    return all(weight.equal(weights[name]) for name, weight in trainer.model.state_dict().items())
