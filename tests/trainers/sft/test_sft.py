"""Masked-diffusion fine-tuning: the tokenizer, the canvas, the masks, the loss, and the script."""

import json
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer

from d3llm_hf import LLaDAConfig, LLaDAModelLM
from d3llm_hf.conversion import SHIFTS
from d3llm_hf.evaluation.tasks.word_problems import generate_problems
from trainers import run_sft
from trainers.common import build_tokenizer as tokenizer_script
from trainers.common.muon import MuonWithAdamW, orthogonalize
from trainers.common.script_utils import parse_args_with_config
from trainers.sft.collator import MaskedDiffusionSFTCollator, to_messages, tokenize_conversations
from trainers.sft.config import MaskedDiffusionSFTConfig
from trainers.sft.masking import AnswerMask, draw_answer_mask, generator_for
from trainers.sft.trainer import MaskedDiffusionSFTTrainer


build_tokenizer = tokenizer_script.build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(num_problems=2000)


def tiny_model(tokenizer, **config):
    torch.manual_seed(0)
    return LLaDAModelLM(
        LLaDAConfig(
            vocab_size=len(tokenizer),
            d_model=16,
            n_layers=1,
            n_heads=2,
            mlp_hidden_size=24,
            max_sequence_length=128,
            weight_tying=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **({"mask_token_id": tokenizer.mask_token_id} | config),
        )
    )


def problem_rows(count, seed=0):
    return Dataset.from_list(
        [{"prompt": problem.question, "completion": problem.answer} for problem in generate_problems(count, seed=seed)]
    )


def make_trainer(tmp_path, tokenizer, model=None, dataset=None, trainer_kwargs=None, **arguments):
    defaults = {
        "max_prompt_length": 64,
        "response_length": 64,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return MaskedDiffusionSFTTrainer(
        model=tiny_model(tokenizer) if model is None else model,
        args=MaskedDiffusionSFTConfig(str(tmp_path), **(defaults | arguments)),
        train_dataset=problem_rows(24) if dataset is None else dataset,
        processing_class=tokenizer,
        **(trainer_kwargs or {}),
    )


# The tokenizer


@pytest.mark.parametrize("form", ["{}", "buys {} more", "= {}\n", "({})"])
def test_every_integer_to_199_is_the_same_single_token_wherever_it_stands(tokenizer, form):
    for value in range(200):
        (token,) = tokenizer(str(value), add_special_tokens=False)["input_ids"]
        assert tokenizer(form.format(value), add_special_tokens=False)["input_ids"].count(token) == 1


@pytest.mark.parametrize(
    "text", ["", " two  spaces ", "17 + 5 = 22\n#### 22", "2000 or 12,345", "naïve 東京 🙂\t\r\n", "a17b  18c\n\n\n19"]
)
def test_any_text_survives_the_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_problems_survive_the_round_trip_and_fit_the_canvas(tokenizer):
    problems = generate_problems(200, seed=8)
    batch = {"prompt": [p.question for p in problems], "completion": [p.answer for p in problems]}
    tokens = tokenize_conversations(batch, tokenizer)
    assert max(map(len, tokens["prompt_ids"])) <= 64
    assert max(map(len, tokens["response_ids"])) <= 64
    assert tokenizer.batch_decode(tokens["response_ids"]) == [problem.answer + "<|eot_id|>" for problem in problems]


def test_the_chat_template_is_lladas_and_adds_the_assistant_header_on_request_only(tokenizer):
    messages = [{"role": "user", "content": " 1 + 2? "}]
    turn = "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n1 + 2?<|eot_id|>"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == turn
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        turn + "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_the_tokenizer_build_is_deterministic_and_loads_from_its_folder(tmp_path, tokenizer):
    tokenizer_script.main(["--output_dir", str(tmp_path), "--num_problems", "2000"])
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.padding_side == "left" and loaded.mask_token == "<|mdm_mask|>"
    assert loaded.chat_template == tokenizer.chat_template
    assert len(tokenizer) <= 768


@pytest.mark.parametrize(("argument", "value"), [("vocab_size", 400), ("num_problems", 0)])
def test_a_tokenizer_without_room_or_text_is_refused(argument, value):
    with pytest.raises(ValueError, match=f"`{argument}` must be at least"):
        build_tokenizer(**{argument: value})


# The canvas


def test_answers_end_at_the_same_column_and_prompts_are_never_learnt():
    collate = MaskedDiffusionSFTCollator(pad_token_id=0, eos_token_id=1, response_length=4, prompt_length=3)
    batch = collate(
        [{"prompt_ids": [5, 6], "response_ids": [7, 8]}, {"prompt_ids": [5, 6, 4], "response_ids": [9, 3, 2, 1]}]
    )
    assert batch["input_ids"].tolist() == [[0, 5, 6, 7, 8, 1, 1], [5, 6, 4, 9, 3, 2, 1]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1, 1, 1, 1, 1], [1] * 7]
    assert batch["labels"].tolist() == [[7, 8, 1, 1], [9, 3, 2, 1]]
    assert batch["content_lengths"].tolist() == [2, 4]


def test_without_fill_supervision_the_fill_is_neither_learnt_nor_seen():
    collate = MaskedDiffusionSFTCollator(0, 1, response_length=4, supervise_eos_fill=False)
    batch = collate([{"prompt_ids": [5], "response_ids": [7, 8]}])
    assert batch["labels"].tolist() == [[7, 8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0]]


def test_an_example_longer_than_the_canvas_is_refused_by_the_collator():
    collate = MaskedDiffusionSFTCollator(0, 1, response_length=1)
    with pytest.raises(ValueError, match=r"must fit a prompt of 1 and an answer of 1 tokens .got 1 and 2"):
        collate([{"prompt_ids": [5], "response_ids": [7, 8]}])


def test_conversations_may_be_text_or_turns_or_messages():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert to_messages({"prompt": "q", "completion": "a"}) == turns
    assert to_messages({"prompt": turns[:1], "completion": turns[1:]}) == turns
    assert to_messages({"messages": turns}) == turns


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"text": "a"}, "must have the columns `prompt` and `completion`, or `messages` .got .'text'"),
        (
            {"messages": [{"role": "user", "content": "q"}]},
            "must have at least two turns and end with one of the role",
        ),
    ],
)
def test_a_data_set_of_another_form_is_refused(example, message):
    with pytest.raises(ValueError, match=message):
        to_messages(example)


def test_without_a_chat_template_the_answer_ends_with_the_end_of_text(tokenizer):
    plain = build_tokenizer(num_problems=100)
    plain.chat_template = None
    tokens = tokenize_conversations({"prompt": ["1 + 2?"], "completion": ["3"]}, plain)
    assert plain.decode(tokens["prompt_ids"][0]) == "<|startoftext|>1 + 2?\n"
    assert plain.decode(tokens["response_ids"][0]) == "3<|endoftext|>"


def test_a_template_that_does_not_begin_an_answer_with_its_prompt_is_refused():
    odd = build_tokenizer(num_problems=100)
    odd.chat_template = "{{ messages | length }}"
    with pytest.raises(ValueError, match=r"must render a conversation as its prompt"):
        tokenize_conversations({"prompt": ["q"], "completion": ["a"]}, odd)


# The masks


def test_uniform_masks_keep_to_the_learnt_tokens_and_weigh_one_over_p_over_length():
    learnt = torch.tensor([[True] * 50 + [False] * 14] * 4000)
    mask = draw_answer_mask(learnt, torch.full((4000,), 40), generator_for(0), min_mask_ratio=0.05)
    assert not (mask.hidden & ~learnt).any() and not mask.is_suffix.any()
    p = 1 / (mask.weights.amax(1)[mask.hidden.any(1)] * 50)
    assert p.min() >= 0.05 and p.max() <= 1
    # E[sum of weights] is 1 per row, E[t] = 1/2 (a little more with the clamp).
    assert mask.weights.sum(1).mean().item() == pytest.approx(1, abs=0.03)
    assert (mask.hidden.sum() / learnt.sum()).item() == pytest.approx(0.501, abs=0.02)


def test_stratified_ratios_spread_over_a_batch():
    learnt = torch.ones(8, 20000, dtype=torch.bool)
    mask = draw_answer_mask(learnt, torch.full((8,), 20000), generator_for(1), stratified=True)
    share = mask.hidden.float().mean(1).sort().values
    assert all(i / 8 - 0.02 <= value <= (i + 1) / 8 + 0.02 for i, value in enumerate(share.tolist()))


def test_a_suffix_mask_hides_everything_from_a_cut_in_the_content_and_learns_the_window():
    learnt = torch.ones(64, 20, dtype=torch.bool)
    content = torch.full((64,), 10)
    mask = draw_answer_mask(learnt, content, generator_for(2), suffix_fraction=1.0, suffix_window=4)
    cuts = mask.hidden.float().argmax(1)
    assert mask.is_suffix.all()
    assert set(cuts.tolist()) == set(range(10))
    for row, cut in enumerate(cuts.tolist()):
        assert mask.hidden[row].tolist() == [False] * cut + [True] * (20 - cut)
        assert mask.weights[row].tolist() == [0.0] * cut + [0.25] * 4 + [0.0] * (16 - cut)


@pytest.mark.full
def test_the_suffix_fraction_holds_on_average_even_for_a_batch_of_one():
    learnt, content = torch.ones(1, 4, dtype=torch.bool), torch.tensor([4])
    drawn = [draw_answer_mask(learnt, content, generator_for(i), suffix_fraction=0.3).is_suffix for i in range(2500)]
    assert torch.cat(drawn).float().mean().item() == pytest.approx(0.3, abs=0.05)


def test_generators_repeat_for_the_same_identity_and_differ_for_any_other():
    def draw(*identity):
        return torch.rand(4, generator=generator_for(*identity)).tolist()

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({tuple(draw(*i)) for i in [(1, 2, 3), (1, 3, 2), (2, 1, 3), (1, 2, 4), (1, 2), (-1, 2, 3)]}) == 6


# The loss


def two_by_six(tokenizer):
    """Two rows of two prompt and four answer tokens; the second answer has two tokens of fill."""
    return {
        "input_ids": torch.tensor([[20, 21, 22, 23, 24, 25], [30, 31, 32, 33, 1, 1]]),
        "attention_mask": torch.ones(2, 6, dtype=torch.long),
        "labels": torch.tensor([[22, 23, 24, 25], [32, 33, 1, 1]]),
        "content_lengths": torch.tensor([4, 2]),
    }


@pytest.mark.parametrize("shift", [0, 1])
def test_the_loss_of_a_written_down_mask_is_the_weighted_cross_entropy(tmp_path, tokenizer, monkeypatch, shift):
    trainer = make_trainer(tmp_path, tokenizer, label_shift=shift)
    hidden = torch.tensor([[True, False, True, False], [False, True, True, True]])
    p = torch.tensor([[0.5], [0.8]])
    mask = AnswerMask(hidden, hidden / p / 4, torch.tensor([False, True]))
    monkeypatch.setattr("trainers.sft.trainer.draw_answer_mask", lambda *args, **kwargs: mask)
    seen = []
    trainer.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    inputs = two_by_six(tokenizer)
    before = inputs["input_ids"].clone()
    loss, outputs = trainer.compute_loss(trainer.model, inputs, return_outputs=True)

    m = tokenizer.mask_token_id
    assert seen[0].tolist() == [[20, 21, m, 23, m, 25], [30, 31, 32, m, m, m]]
    assert torch.equal(inputs["input_ids"], before)
    logits = trainer.model(input_ids=seen[0]).logits.log_softmax(-1)
    expected = 0.0
    for row, column, label in [(0, 2, 22), (0, 4, 24), (1, 3, 33), (1, 4, 1), (1, 5, 1)]:
        expected -= logits[row, column - shift, label].item() / p[row].item() / 4 / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert outputs.logits.shape[1] == 4 + shift


def test_a_batch_without_prompts_is_refused_where_the_token_before_an_answer_predicts_it(tmp_path, tokenizer):
    inputs = two_by_six(tokenizer)
    inputs |= {name: inputs[name][:, 2:] for name in ("input_ids", "attention_mask")}
    make_trainer(tmp_path, tokenizer, label_shift=0).compute_loss(tiny_model(tokenizer), dict(inputs))
    trainer = make_trainer(tmp_path, tokenizer, label_shift=1)
    with pytest.raises(
        ValueError, match=r"`train_dataset` must have prompts with `label_shift=1` .got a batch without any"
    ):
        trainer.compute_loss(trainer.model, inputs)


def test_the_prompt_is_never_masked_whatever_the_draw(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, suffix_mask_fraction=0.5)
    seen = []
    trainer.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    for _ in range(20):
        trainer.compute_loss(trainer.model, two_by_six(tokenizer))
    assert all(torch.equal(ids[:, :2], two_by_six(tokenizer)["input_ids"][:, :2]) for ids in seen)
    assert any((ids == tokenizer.mask_token_id).any() for ids in seen)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, tokenizer):
    model = tiny_model(tokenizer)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"The loss must be finite .got nan at step 0"):
        make_trainer(tmp_path, tokenizer, model=model).train()


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_spoils_weights_or_a_checkpoint(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, save_strategy="steps", save_steps=1)
    weight = trainer.model.model.norm.weight
    before = weight.detach().clone()
    weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(FloatingPointError, match=r"The gradient must be finite .its norm is nan at step 0"):
        trainer.train()
    assert torch.equal(weight, before)
    assert not list(tmp_path.glob("checkpoint-*")) and not any("loss" in log for log in trainer.state.log_history)


def test_gradients_do_not_depend_on_how_a_batch_is_accumulated(tmp_path, tokenizer, monkeypatch):
    def everything_hidden(learnt, *args, **kwargs):
        return AnswerMask(learnt, learnt / learnt.sum(1, keepdim=True), torch.zeros(len(learnt), dtype=torch.bool))

    monkeypatch.setattr("trainers.sft.trainer.draw_answer_mask", everything_hidden)
    norms = []
    for size, accumulation in [(4, 1), (2, 2)]:
        trainer = make_trainer(
            tmp_path,
            tokenizer,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
        )
        trainer.train()
        norms.append(trainer.state.log_history[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


# The trainer


@pytest.mark.full
@pytest.mark.parametrize("use_muon", [True, False])
def test_a_resumed_run_is_equal_to_an_unbroken_one_for_any_number_of_workers(tmp_path, tokenizer, use_muon):
    shared = {"suffix_mask_fraction": 0.5, "use_muon": use_muon, "save_steps": 2, "gradient_accumulation_steps": 2}
    unbroken = make_trainer(tmp_path / "a", tokenizer, save_strategy="steps", **shared)
    unbroken.train()
    resumed = make_trainer(tmp_path / "b", tokenizer, dataloader_num_workers=1, **shared)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    before = tiny_model(tokenizer).state_dict()
    for name, weight in unbroken.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
        assert not torch.equal(weight, before[name]), name


@pytest.mark.full
def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path, tokenizer):
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        learning_rate=1.0,
        max_steps=2,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=1,
        eval_steps=1,
        load_best_model_at_end=True,
        trainer_kwargs={"eval_dataset": problem_rows(8, seed=4)},
    )
    trainer.train()
    best = LLaDAModelLM.from_pretrained(trainer.state.best_model_checkpoint).state_dict()
    assert all(torch.equal(weight, best[name]) for name, weight in trainer.model.state_dict().items())


def test_training_lowers_the_loss_and_logs_its_parts(tmp_path, tokenizer):
    trainer = make_trainer(
        tmp_path, tokenizer, max_steps=30, use_muon=True, suffix_mask_fraction=0.5, stratified_mask_ratio=True
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "uniform_loss" in entry]
    assert len(logs) == 30
    assert logs[-1]["loss"] < 0.8 * logs[0]["loss"]
    assert logs[0]["loss"] == pytest.approx((logs[0]["uniform_loss"] + logs[0]["suffix_loss"]) / 2, abs=1e-3)
    assert all(0 < entry["masked_fraction"] < 1 for entry in logs)


def test_evaluations_of_the_same_model_draw_the_same_masks(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, trainer_kwargs={"eval_dataset": {"held": problem_rows(8, seed=4)}})
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_held_loss"] == second["eval_held_loss"]
    assert "eval_held_uniform_loss" in trainer.state.log_history[-1]


def test_examples_that_do_not_fit_are_left_out_with_a_warning(tmp_path, tokenizer, caplog):
    dataset = Dataset.from_list([{"prompt": "1?", "completion": "1"}, {"prompt": "2?", "completion": "2 " * 90}])
    trainer = make_trainer(tmp_path, tokenizer, dataset=dataset)
    assert len(trainer.train_dataset) == 1
    assert "1 of 2 examples do not fit" in caplog.text


def test_when_no_example_fits_the_canvas_the_trainer_says_so(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"At least one example must fit `max_prompt_length` and `response_length`"):
        make_trainer(tmp_path, tokenizer, response_length=2)


@pytest.mark.full
def test_a_stream_of_examples_trains(tmp_path, tokenizer):
    rows = [{"prompt": problem.question, "completion": problem.answer} for problem in generate_problems(16, seed=0)]
    trainer = make_trainer(
        tmp_path, tokenizer, dataset=IterableDataset.from_generator(lambda: iter(rows)), max_steps=2
    )
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_lora_adapter_trains_and_the_base_stays(tmp_path, tokenizer):
    from peft import LoraConfig

    model = tiny_model(tokenizer)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trainer = make_trainer(
        tmp_path, tokenizer, model=model, trainer_kwargs={"peft_config": LoraConfig(r=2, target_modules="all-linear")}
    )
    trainer.train()
    after = trainer.model.state_dict()
    adapters = [weight for name, weight in after.items() if "lora_B" in name]
    assert adapters and all(weight.abs().sum() > 0 for weight in adapters)
    assert torch.equal(trainer.model.get_base_model().model.embed_tokens.weight, before["model.embed_tokens.weight"])


def test_default_arguments_name_an_output_folder(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = MaskedDiffusionSFTTrainer(tiny_model(tokenizer), processing_class=tokenizer)
    assert trainer.args.output_dir == "masked-diffusion-sft"
    assert trainer.label_shift == 0


def test_a_trainer_without_a_tokenizer_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"`processing_class` must be a tokenizer"):
        MaskedDiffusionSFTTrainer(tiny_model(tokenizer), MaskedDiffusionSFTConfig(str(tmp_path), use_cpu=True))


def test_model_and_tokenizer_must_agree_on_the_mask_token(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"`mask_token_id` must be the same in config and tokenizer"):
        make_trainer(tmp_path, tokenizer, model=tiny_model(tokenizer, mask_token_id=7))
    bare = build_tokenizer(num_problems=100)
    bare.mask_token = None
    with pytest.raises(ValueError, match=r"The mask token must be known"):
        make_trainer(tmp_path, bare, model=tiny_model(bare, mask_token_id=None))


def test_tokens_that_the_model_does_not_know_are_refused_before_training(tmp_path, tokenizer):
    size = tokenizer.mask_token_id
    model = tiny_model(tokenizer)
    model.resize_token_embeddings(size)
    wanted = (
        rf"`mask_token_id` must lie inside the vocabulary of {size} tokens \(got {size}\).*resize_token_embeddings"
    )
    with pytest.raises(ValueError, match=wanted):
        make_trainer(tmp_path, tokenizer, model=model)
    other = build_tokenizer(num_problems=100)
    model = tiny_model(other, mask_token_id=3)
    other.mask_token = None
    model.resize_token_embeddings(other.eos_token_id)
    with pytest.raises(ValueError, match=r"`(pad|eos)_token_id` must lie inside the vocabulary"):
        make_trainer(tmp_path, other, model=model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_prompt_length": 0}, "`max_prompt_length` must be at least 1 .got 0"),
        ({"response_length": 0}, "`response_length` must be at least 1"),
        ({"suffix_window": 0}, "`suffix_window` must be at least 1"),
        ({"min_mask_ratio": 1.5}, "`min_mask_ratio` must be between 0 and 1 .got 1.5"),
        ({"mask_ratio_eps": -0.1}, "`mask_ratio_eps` must be between 0 and 1"),
        ({"suffix_mask_fraction": 2.0}, "`suffix_mask_fraction` must be between 0 and 1"),
        ({"mask_ratio_eps": 0.0}, "must not both be 0"),
        ({"label_shift": 2}, "`label_shift` must be 0 or 1 .got 2"),
        ({"remove_unused_columns": True}, "`remove_unused_columns` must be False"),
    ],
)
def test_a_bad_training_argument_is_refused_by_name(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        MaskedDiffusionSFTConfig(str(tmp_path), use_cpu=True, **arguments)


# Muon


@pytest.mark.parametrize("shape", [(2, 8, 16), (1, 16, 8)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrices))
    assert values.min() > 0.5 and values.max() < 1.3


def test_the_adamw_half_is_adamw():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.arange(4.0)) for _ in range(2))
    settings = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": 0.1}
    optimizers = MuonWithAdamW([{"params": [ours]}], **settings), torch.optim.AdamW([theirs], **settings)
    for _ in range(5):
        for optimizer, parameter in zip(optimizers, (ours, theirs), strict=True):
            optimizer.zero_grad()
            optimizer.step(lambda parameter=parameter: ((parameter**3).sum().backward(), 0.0)[1])
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_muon_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match=r"must hold matrices only .got the shapes"):
        MuonWithAdamW([{"params": [torch.nn.Parameter(torch.zeros(3))], "use_muon": True}])


def test_muon_refuses_sharded_matrices(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, use_muon=True)
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match=r"`use_muon` must be False with FSDP or DeepSpeed"):
        trainer.create_optimizer()


# The script


SHAPE = {
    "model_type": "llada",
    "d_model": 16,
    "n_layers": 1,
    "n_heads": 2,
    "mlp_hidden_size": 24,
    "weight_tying": True,
}


def recipe(tmp_path, **values):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    return ["--config", str(path)]


QUICK = {
    "num_problems": 8,
    "max_steps": 2,
    "max_prompt_length": 64,
    "response_length": 64,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


def test_the_script_trains_a_new_model_and_the_checkpoint_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_script, "build_tokenizer", lambda: build_tokenizer(num_problems=500))
    output = tmp_path / "out"
    arguments = recipe(tmp_path, model_config=SHAPE, save_dtype="bfloat16", save_steps=1, **QUICK)
    run_sft.main([*arguments, "--output_dir", str(output), "--num_eval_problems", "4", "--eval_strategy", "steps"])
    model = LLaDAModelLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert model.dtype == torch.bfloat16 and model.config.vocab_size == len(tokenizer)
    assert model.config.mask_token_id == tokenizer.mask_token_id

    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "1 + 2?", "completion": "3"}) + "\n", encoding="utf-8")
    for extra in (["--resume_from_checkpoint", "last"], ["--use_peft", "--output_dir", str(tmp_path / "lora")]):
        again = recipe(tmp_path, model_name_or_path=str(output), dataset_name=str(rows), **QUICK)
        run_sft.main([*again, "--output_dir", str(output), *extra])
    assert (tmp_path / "lora" / "adapter_config.json").is_file()


def test_processes_that_would_train_apart_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    run_sft.check_processes(2)
    with pytest.raises(ValueError, match=r"`use_cpu` must be set to train in several processes without a GPU"):
        run_sft.check_processes(1)


@pytest.mark.parametrize("path", sorted(Path("trainers/recipes").glob("sft_*.yaml")), ids=lambda path: path.stem)
def test_the_committed_recipes_parse_and_new_models_have_two_million_parameters_at_most(tokenizer, path):
    script_args, args = parse_args_with_config(
        (run_sft.SFTScriptArguments, MaskedDiffusionSFTConfig), ["--config", str(path), "--use_cpu", "--seed", "3"]
    )
    assert args.seed == 3
    if script_args.model_config is None:  # one that is loaded
        assert args.block_length and bool(script_args.into) != bool(script_args.block_alignment)
        if script_args.into is not None:
            run_sft.check_conversion(script_args, args)
            assert script_args.into in SHIFTS
        assert args.max_prompt_length % args.block_length == args.response_length % args.block_length == 0
        return
    if args.objective == "causal":  # of the size of its twin
        twin = ["--config", str(path).replace("llama", "llada"), "--use_cpu"]
        masked, _ = parse_args_with_config((run_sft.SFTScriptArguments, MaskedDiffusionSFTConfig), twin)
        causal = run_sft.load_causal_model(script_args, tokenizer)
        assert causal.num_parameters() == run_sft.load_model(masked, tokenizer).num_parameters()
        return
    model = run_sft.load_model(script_args, tokenizer)
    assert model.num_parameters() <= 2_000_000
    assert args.packing == (model.block_alignment is not None)
    assert (args.suffix_mask_fraction > 0) == (model.block_alignment is None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"suffix_mask_fracton": 0.5}, "`suffix_mask_fracton` .* Did you mean `suffix_mask_fraction`"),
        ({"zzzz": 0.5}, "`zzzz` .* See --help"),
    ],
)
def test_an_unknown_key_of_a_recipe_is_refused_with_the_nearest_name(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        parse_args_with_config((run_sft.SFTScriptArguments, MaskedDiffusionSFTConfig), recipe(tmp_path, **values))


def test_a_model_shape_may_be_given_on_the_command_line(tmp_path, tokenizer):
    arguments = ["--model_config", json.dumps(SHAPE), "--output_dir", str(tmp_path), "--use_cpu"]
    script_args, _ = parse_args_with_config((run_sft.SFTScriptArguments, MaskedDiffusionSFTConfig), arguments)
    assert run_sft.load_model(script_args, tokenizer).config.d_model == 16


def test_the_package_names_its_classes_and_refuses_others():
    import trainers

    assert trainers.MaskedDiffusionSFTTrainer is MaskedDiffusionSFTTrainer
    with pytest.raises(AttributeError, match="no attribute 'SFTTrainer'"):
        trainers.SFTTrainer  # noqa: B018


def test_a_recipe_that_is_no_mapping_is_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("- a\n- b\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"`--config` must name a YAML mapping .got list"):
        parse_args_with_config((run_sft.SFTScriptArguments,), ["--config", str(path)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Exactly one of `model_name_or_path` and `model_config`"),
        ({"model_name_or_path": "a", "model_config": SHAPE}, "Exactly one of"),
        ({"model_config": '{"d_model": 16}'}, "`model_config` must name one of the model types"),
        ({"model_config": "{d_model"}, "`model_config` must be JSON .got '{d_model'"),
        ({"model_config": "[16]"}, r"`model_config` must map names to sizes .got \[16\]"),
        ({"model_config": "nothing.json"}, "`model_config` must name a file that exists .got 'nothing.json'"),
        ({"model_name_or_path": "./nothing"}, "`model_name_or_path` must be a checkpoint folder, an id"),
        ({"model_config": SHAPE, "torch_dtype": "int8"}, "`torch_dtype` must be a floating-point type"),
        ({"model_config": SHAPE, "torch_dtype": "nope"}, "`torch_dtype` must be a floating-point type"),
    ],
)
def test_a_model_that_cannot_be_made_is_refused(tokenizer, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_sft.load_model(run_sft.SFTScriptArguments(**arguments), tokenizer)


def test_a_data_set_or_a_split_that_is_not_there_is_named(tmp_path):
    path = tmp_path / "rows.json"
    with pytest.raises(FileNotFoundError, match=r"`dataset_name` must name a file that exists, .*rows.json"):
        run_sft.load_datasets(run_sft.SFTScriptArguments(dataset_name=str(path)), evaluate=False)
    with pytest.raises(ValueError, match=r"`dataset_name` must name data that `datasets` reads"):
        run_sft.load_datasets(run_sft.SFTScriptArguments(dataset_name=str(tmp_path)), evaluate=False)
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    arguments = run_sft.SFTScriptArguments(dataset_name=str(tmp_path), dataset_split="validation")
    with pytest.raises(ValueError, match=r"`dataset_split` must be a split .* \['train'\] .got 'validation'"):
        run_sft.load_datasets(arguments, evaluate=False)


@pytest.mark.parametrize("bad", [b'{"prompt": "a"', b'{"prompt": "\xff", "\xff": 1}', b"\x00"])
def test_a_line_of_a_file_that_cannot_be_read_is_named(tmp_path, bad):
    good = b'{"prompt": "a", "completion": "b"}\n'
    (tmp_path / "rows.jsonl").write_bytes(good + b"\n" + bad + b"\n" + good)
    with pytest.raises(ValueError, match=r"`dataset_name` must name data .*rows.jsonl': .*, line 3.. Correct"):
        run_sft.load_datasets(run_sft.SFTScriptArguments(dataset_name=str(tmp_path / "rows.jsonl")), evaluate=False)


def test_the_embedded_checkpoint_can_be_trained_on(tokenizer):
    arguments = run_sft.SFTScriptArguments(model_name_or_path="d3llm-llada")
    own = run_sft.load_tokenizer(arguments)
    assert run_sft.load_model(arguments, own).config.vocab_size >= len(own)


def test_a_model_shape_may_come_from_a_json_file_and_the_family_may_be_dream(tmp_path, tokenizer):
    path = tmp_path / "shape.json"
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    path.write_text(json.dumps({"model_type": "Dream", "intermediate_size": 24, **shape}), encoding="utf-8")
    model = run_sft.load_model(run_sft.SFTScriptArguments(model_config=str(path)), tokenizer)
    trainer = make_trainer(tmp_path, tokenizer, model=model, max_steps=1)
    assert trainer.label_shift == 1
    trainer.train()


def test_evaluation_without_a_test_split_is_refused(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "1 + 2?", "completion": "3"}) + "\n", encoding="utf-8")
    arguments = run_sft.SFTScriptArguments(dataset_name=str(rows))
    with pytest.raises(ValueError, match=r"`eval_strategy` must be `no` for a data set without a `test` split"):
        run_sft.load_datasets(arguments, evaluate=True)
