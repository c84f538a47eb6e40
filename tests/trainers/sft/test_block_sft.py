"""Fine-tuning of block-causal models: the doubled text, its masks, packing, and the services of the trainer."""

import json

import pytest
import torch
from block_tuning import MODELS, TOKENIZER, block_losses, block_model, block_trainer
from datasets import Dataset, IterableDataset
from distillation import rows, student, trajectories
from families import equal_up_to_rounding, flat, gradients
from official import write_official
from peft import LoraConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from d3llm_hf import SDARForCausalLM, as_diffusion_lm
from d3llm_hf.models.topology import Topology
from trainers import run_sft
from trainers.sft.block_collator import BlockSFTCollator, pack
from trainers.sft.block_masking import BlockObjective, block_mask, draw_block_mask
from trainers.sft.block_views import DoubledCanvas, doubled_mask
from trainers.sft.config import MaskedDiffusionSFTConfig
from trainers.sft.masking import generator_for


MASK, EOS = TOKENIZER.mask_token_id, TOKENIZER.eos_token_id


def collator(block_length=4, **options):
    return BlockSFTCollator(EOS, EOS, Topology(block_length), **({"response_length": 12} | options))


def packed(*examples):
    return {"samples": list(examples)}


def three_texts(seed=0):
    return rows(3, seed)


# The doubled text


def test_every_slot_sees_what_the_rule_says():
    documents = torch.tensor([[0] * 5 + [1] * 4 + [-1] * 2, [0] * 11])
    blocks = torch.tensor([[0, 0, 1, 1, 2, 0, 0, 1, 1, 0, 0], [i // 3 for i in range(11)]])
    found = doubled_mask(documents, blocks)
    assert found.shape == (2, 1, 22, 22)
    for row in range(2):
        for query in range(22):
            for key in range(22):
                same = documents[row, query % 11] == documents[row, key % 11]
                asking, asked = blocks[row, query % 11], blocks[row, key % 11]
                of_noisy = asking == asked if key < 11 else asking > asked
                of_clean = key >= 11 and asking >= asked
                assert found[row, 0, query, key] == bool(same and (of_noisy if query < 11 else of_clean))


def test_views_come_one_kind_after_the_other_each_before_its_clean_text():
    clean = torch.tensor([[5, 6], [7, 8]])
    noisy = torch.stack([clean.masked_fill(clean == 5, MASK), clean.masked_fill(clean == 6, MASK)])
    zeros = torch.zeros_like(clean)
    canvas = DoubledCanvas.of(noisy, clean, torch.tensor([[0, 1], [0, 0]]), zeros, zeros)
    assert canvas.input_ids.tolist() == [[MASK, 6, 5, 6], [7, 8, 7, 8], [5, MASK, 5, 6], [7, 8, 7, 8]]
    assert canvas.position_ids.tolist() == [[0, 1, 0, 1], [0, 0, 0, 0]] * 2
    assert torch.equal(canvas.attention_mask[:2], canvas.attention_mask[2:])


# The masks


def test_one_view_weighs_one_over_p_over_the_learnt_tokens_and_two_weigh_all_alike():
    learnt = torch.tensor([[False, True, True, True, True]])
    p = torch.tensor([[1.0, 0.5, 0.5, 0.25, 0.25]])
    uniform = torch.tensor([[0.0, 0.1, 0.7, 0.2, 0.3]])
    one = block_mask(learnt, p, uniform, complementary=False)
    assert one.hidden.tolist() == [[[False, True, False, True, False]]]
    assert one.weights.tolist() == [[[0.0, 0.5, 0.0, 1.0, 0.0]]]
    two = block_mask(learnt, p, uniform, complementary=True)
    assert torch.equal(two.hidden.sum(0), learnt.long())
    assert torch.equal(two.weights, two.hidden / 4)


@pytest.mark.parametrize("per_block", [False, True])
def test_ratios_are_spread_over_texts_or_over_their_blocks(per_block):
    """So many tokens that the hidden share of each tells its ratio, and ratios that are spread evenly."""
    length = 20_000
    documents = torch.arange(2).repeat_interleave(2 * length)[None]
    blocks = torch.arange(2).repeat_interleave(length).repeat(2)[None]
    learnt = torch.ones_like(documents, dtype=torch.bool)
    mask = draw_block_mask(
        learnt, documents, blocks, generator_for(0), BlockObjective(per_block=per_block), stratified=True
    )
    share = mask.hidden[0, 0].view(4 if per_block else 2, -1).float().mean(1).sort().values.tolist()
    assert all(i / len(share) - 0.02 <= value <= (i + 1) / len(share) + 0.02 for i, value in enumerate(share))
    assert mask.weights.sum().item() == pytest.approx(1, abs=0.1)


def test_ratios_keep_to_their_floor_and_a_batch_without_anything_to_learn_has_no_masks():
    learnt = torch.ones(1, 64, dtype=torch.bool)
    zeros = torch.zeros(1, 64, dtype=torch.long)
    floored = draw_block_mask(learnt, zeros, zeros, generator_for(1), BlockObjective(), min_mask_ratio=1.0)
    assert floored.hidden.all()
    empty = draw_block_mask(~learnt, zeros, zeros, generator_for(1), BlockObjective(), stratified=True)
    assert not empty.hidden.any() and not empty.weights.any()


# The rows


def test_answers_are_filled_to_the_end_of_their_block_and_rows_behind_their_text():
    batch = collator()([{"prompt_ids": [5, 6, 7], "response_ids": [8, 9]}, {"prompt_ids": [5], "response_ids": [8]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, EOS, EOS, EOS], [5, 8, EOS, EOS, *[EOS] * 4]]
    assert batch["labels"].tolist() == [[-100] * 3 + [8, 9, EOS, EOS, EOS], [-100, 8, EOS, EOS] + [-100] * 4]
    assert batch["documents"].tolist() == [[0] * 8, [0] * 4 + [-1] * 4]
    assert batch["position_ids"].tolist() == [list(range(8)), [0, 1, 2, 3, 0, 0, 0, 0]]
    assert batch["blocks"].tolist() == [[0] * 4 + [1] * 4, [0] * 8]


@pytest.mark.parametrize(("options", "size"), [({"supervise_eos_fill": False}, 5), ({"response_length": 3}, 6)])
def test_the_fill_can_be_left_out_and_ends_with_the_longest_answer(options, size):
    example = {"prompt_ids": [5, 6, 7], "response_ids": [8, 9]}
    assert collator(**options).size(example) == size
    assert collator(**options)([example])["input_ids"].shape == (1, size)


def test_blocks_that_begin_with_the_answer_are_counted_from_there():
    collate = BlockSFTCollator(EOS, EOS, Topology(4, "prompt"), response_length=8)
    batch = collate([{"prompt_ids": [5, 6], "response_ids": [7, 8, 9, 10, 11]}])
    assert batch["blocks"].tolist() == [[0, 0, 1, 1, 1, 1, 2, 2, 2, 2]]


def test_texts_of_a_packed_row_are_documents_that_count_for_themselves():
    batch = collator(row_length=40)([packed(*three_texts())])
    alone = [collator()([text]) for text in three_texts()]
    assert batch["input_ids"].shape == (1, 40)
    for name, padding in {"input_ids": EOS, "labels": -100, "position_ids": 0, "blocks": 0}.items():
        joined = [value for text in alone for value in text[name][0].tolist()]
        assert batch[name][0].tolist() == joined + [padding] * (40 - len(joined))
    assert batch["documents"].unique().tolist()[-3:] == [0, 1, 2]


def test_a_text_longer_than_its_row_is_refused():
    with pytest.raises(ValueError, match=r"An example must fit a row of 4 tokens .got 5.. Raise `max_prompt_length`"):
        collator(row_length=4, supervise_eos_fill=False)([{"prompt_ids": [5, 6, 7], "response_ids": [8, 9]}])


def test_packing_loses_no_text_and_opens_a_row_only_where_none_has_room():
    examples = rows(40)
    batch = {name: [example[name] for example in examples] for name in ("prompt_ids", "response_ids")}
    collate = collator()
    found = pack(batch, collate, 20)["samples"]
    assert sorted(str(example) for row in found for example in row) == sorted(
        str({n: e[n] for n in batch}) for e in examples
    )
    sizes = [sum(map(collate.size, row)) for row in found]
    assert max(sizes) <= 20 and len(found) < 40
    firsts = [collate.size(row[0]) for row in found]
    assert all(sizes[earlier] + firsts[row] > 20 for row in range(len(found)) for earlier in range(row))


# The loss


def drawn(trainer, inputs, seed=0):
    learnt = inputs["labels"].ne(-100) & inputs["position_ids"].ge(trainer.label_shift)
    return draw_block_mask(learnt, inputs["documents"], inputs["blocks"], generator_for(seed), trainer.block_objective)


def loss_of(trainer, inputs, mask, monkeypatch):
    monkeypatch.setattr("trainers.sft.trainer.draw_block_mask", lambda *args, **kwargs: mask)
    return trainer.compute_loss(trainer.model, inputs)


@pytest.mark.every(3)
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_of_a_forward_for_each_block(name, tmp_path, monkeypatch):
    trainer = block_trainer(tmp_path, block_model(name), block_length=4)
    inputs = trainer.data_collator([packed(*rows(2, 1)), rows(1, 2)[0]])
    mask = drawn(trainer, inputs)
    assert mask.hidden.sum() > 4
    found, expected = [], []

    def ours():
        found.append(loss_of(trainer, inputs, mask, monkeypatch))
        return found[0]

    def slow():
        expected.append(block_losses(trainer.model, inputs, mask, MASK).sum())
        return expected[0]

    gradient = flat(gradients(trainer.model, ours))
    assert equal_up_to_rounding(gradient, flat(gradients(trainer.model, slow)))
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_text_learns_the_same_whatever_it_is_packed_with(name, tmp_path, monkeypatch):
    """The first and the last text of a row learn; the one between them changes, and is then left out."""
    trainer = block_trainer(tmp_path, block_model(name), block_length=4)
    texts = three_texts()
    changed = [texts[0], {key: [token + 20 for token in texts[1][key]] for key in texts[1]}, texts[2]]
    inputs, others, apart = (
        trainer.data_collator(examples)
        for examples in ([packed(*texts)], [packed(*changed)], [packed(texts[0]), packed(texts[2])])
    )
    for batch in (inputs, others):
        batch["labels"][batch["documents"] == 1] = -100
    assert not torch.equal(inputs["input_ids"], others["input_ids"])
    mask = drawn(trainer, inputs)
    assert mask.hidden.sum() > 4

    def gradient(batch, mask):
        return flat(gradients(trainer.model, lambda: loss_of(trainer, batch, mask, monkeypatch)))

    before, after = gradient(inputs, mask), gradient(others, mask)
    assert (before - after).abs().max() <= 1e-6 * before.abs().max()

    # Each in a row of its own, with the masks that it had
    kept = [mask.hidden.new_zeros(len(mask.hidden), 2, apart["labels"].shape[1]) for _ in range(2)]
    held = [part.to(value.dtype) for part, value in zip(kept, (mask.hidden, mask.weights), strict=True)]
    for row, document in ((0, 0), (1, 2)):
        of = inputs["documents"][0] == document
        for part, value in zip(held, (mask.hidden, mask.weights), strict=True):
            part[:, row, : int(of.sum())] = value[:, 0, of]
    assert equal_up_to_rounding(gradient(apart, type(mask)(*held)), before)


def test_the_first_token_of_a_text_is_not_learnt_where_no_row_predicts_it(tmp_path):
    example = {"prompt_ids": [], "response_ids": [7, 8, 9, 10]}
    for name, learnt in (("sdar-tiny-a", 4), ("fdv2-tiny-a", 3)):
        model = block_model(name)
        trainer = block_trainer(tmp_path, model, block_length=4, min_mask_ratio=1.0, complementary_masks=False)
        seen = []
        model.register_forward_pre_hook(lambda _, args, kwargs, seen=seen: seen.append(kwargs), with_kwargs=True)
        trainer.compute_loss(model, trainer.data_collator([packed(example, example)]))
        assert seen[0]["input_ids"][0, :8].eq(MASK).sum() == 2 * learnt


def test_a_stock_decoder_of_blocks_trains_and_decodes(tmp_path, monkeypatch):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    stock = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(TOKENIZER), **sizes, **heads))
    model = as_diffusion_lm(stock, mask_token_id=MASK, block_length=4)
    trainer = block_trainer(tmp_path, model, packing=True, complementary_masks=True, max_prompt_length=20)
    inputs = trainer.data_collator([packed(*rows(2, 5))])
    mask = drawn(trainer, inputs)
    assert trainer.label_shift == 1
    expected = block_losses(model, inputs, mask, MASK).sum().item()
    with monkeypatch.context() as patched:
        assert loss_of(trainer, inputs, mask, patched).item() == pytest.approx(expected, rel=1e-5)
    trainer.train()
    ids = torch.tensor([[5, 6, 7]])
    assert model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8).shape == (1, 11)


# The trainer


def weights(trainer):
    return {name: weight.clone() for name, weight in trainer.model.state_dict().items()}


@pytest.mark.full
def test_a_resumed_run_is_equal_to_an_unbroken_one(tmp_path):
    shared = {"packing": True, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    unbroken = block_trainer(tmp_path / "a", per_device_train_batch_size=1, **shared)
    before = weights(unbroken)
    unbroken.train()
    resumed = block_trainer(tmp_path / "b", per_device_train_batch_size=1, **shared)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    found = weights(resumed)
    for name, weight in weights(unbroken).items():
        assert torch.equal(weight, found[name]), name
        assert not torch.equal(weight, before[name]), name


def test_evaluations_draw_the_same_masks_and_the_log_has_the_masked_fraction(tmp_path):
    trainer = block_trainer(tmp_path, given={"eval_dataset": trajectories(8, 3)}, stratified_mask_ratio=True)
    assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(0 < entry["masked_fraction"] < 1 for entry in logs) and "uniform_loss" not in logs[0]
    with pytest.raises(ValueError, match="metric_for_best_model"):
        block_trainer(
            tmp_path,
            given={"eval_dataset": trajectories(8, 3)},
            load_best_model_at_end=True,
            eval_strategy="steps",
            save_strategy="steps",
            metric_for_best_model="eval_uniform_loss",
        )


def test_a_lora_adapter_trains_and_the_base_stays(tmp_path):
    trainer = block_trainer(tmp_path, given={"peft_config": LoraConfig(r=2, target_modules="all-linear")})
    before = weights(trainer)
    trainer.train()
    moved = {name for name, weight in weights(trainer).items() if not torch.equal(weight, before[name])}
    assert moved and all("lora_" in name for name in moved)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_it_trains_in_bfloat16_with_checkpointed_layers_and_static_rows(tmp_path, implementation):
    model = block_model("sdar-tiny-a", attn_implementation=implementation)
    trainer = block_trainer(
        tmp_path, model, bf16=True, gradient_checkpointing=True, pad_prompt_to_max=True, max_steps=1
    )
    assert trainer.data_collator(rows(1))["input_ids"].shape == (1, 20)
    assert 0 < trainer.train().training_loss < 20


def test_a_stream_is_packed_as_it_is_drawn(tmp_path):
    examples = rows(12)
    stream = IterableDataset.from_generator(lambda: iter(examples))
    trainer = block_trainer(tmp_path, dataset=stream, packing=True, max_steps=1)
    assert sum(len(row["samples"]) for row in trainer.train_dataset) == 12
    trainer.train()
    assert trainer.state.global_step == 1


def test_another_block_length_is_trained_with_and_kept_in_the_config(tmp_path):
    model = block_model("sdar-tiny-a")
    trainer = block_trainer(tmp_path, model, block_length=8)
    assert trainer.data_collator.topology.block_length == 8 and model.config.block_size == 8
    assert trainer.data_collator(rows(1))["blocks"].max() == 1
    trainer.save_model()
    assert SDARForCausalLM.from_pretrained(tmp_path).config.block_size == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"block_length": 8},
            r"`block_length` has no effect on LLaDAModelLM with full attention \(got 8\): every position sees",
        ),
        ({"packing": True}, r"`packing` has no effect on LLaDAModelLM with full attention \(got True\)"),
        (
            {"complementary_masks": False},
            r"`complementary_masks` has no effect on LLaDAModelLM with full attention \(got False\)",
        ),
        (
            {"mask_ratio_per_block": True},
            r"`mask_ratio_per_block` has no effect on LLaDAModelLM with full attention \(got True\)",
        ),
    ],
)
def test_settings_of_blocks_are_refused_for_a_model_that_sees_everything(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        block_trainer(tmp_path, student(TOKENIZER), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"suffix_mask_fraction": 0.5},
            r"`suffix_mask_fraction` has no effect on SDARForCausalLM with block-causal attention \(got 0.5\)",
        ),
        (
            {"suffix_window": 4},
            r"`suffix_window` has no effect on SDARForCausalLM with block-causal attention \(got 4\): there are no",
        ),
        ({"objective": "d2f"}, r"`objective` has no effect on SDARForCausalLM .* makes a bidirectional model"),
    ],
)
def test_settings_of_canvases_are_refused_for_a_model_of_blocks(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        block_trainer(tmp_path, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_length": 0}, "`block_length` must be at least 1 .got 0"),
        (
            {"objective": "sft"},
            "`objective` must be one of .'masked_diffusion', 'd2f', 'd2f_labels', 'causal'. .got 'sft'",
        ),
        (
            {"packing": True, "train_sampling_strategy": "group_by_length"},
            "`train_sampling_strategy` must not order by length with `packing` .got 'group_by_length'",
        ),
        ({"packing": True, "pad_prompt_to_max": True}, "`pad_prompt_to_max` must be False with `packing` .got True"),
    ],
)
def test_a_bad_training_argument_is_refused_by_name(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        MaskedDiffusionSFTConfig(str(tmp_path), use_cpu=True, **arguments)


def test_a_prompt_in_front_of_the_text_and_a_model_without_positions_are_refused(tmp_path):
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match=r"`peft_config` must put nothing in front of texts .* \(got PROMPT_TUNING\)"):
        block_trainer(tmp_path, given={"peft_config": prompt})

    class WithoutPositions(SDARForCausalLM):
        def forward(self, input_ids, attention_mask=None, **kwargs):
            raise NotImplementedError

    model = WithoutPositions(block_model("sdar-tiny-a").config)
    with pytest.raises(ValueError, match=r"`model` must take `position_ids` .* \(got WithoutPositions"):
        block_trainer(tmp_path, model)


# The script


def test_the_script_trains_an_official_checkpoint_that_then_decodes(tmp_path):
    folder = write_official("sdar", tmp_path / "sdar")
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "1 + 2?", "completion": "3"}) + "\n", encoding="utf-8")
    values = {"model_name_or_path": folder, "dataset_name": file, "output_dir": tmp_path / "out", "max_steps": 2}
    values |= {"max_prompt_length": 64, "response_length": 16, "report_to": "none"}
    run_sft.main([part for name, value in values.items() for part in (f"--{name}", str(value))] + [
        "--packing", "--use_cpu", "--disable_tqdm", "True", "--dataloader_pin_memory", "False",
    ])  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, SDARForCausalLM) and not torch.equal(model.lm_head.weight, before.lm_head.weight)
    ids = torch.tensor([[5, 6, 7]])
    assert model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5).shape[1] <= 8


def test_the_texts_of_a_packed_data_set_may_come_as_conversations(tmp_path):
    data = Dataset.from_list([{"prompt": "a", "completion": "b"}] * 4)
    trainer = block_trainer(tmp_path, dataset=data, packing=True, max_prompt_length=60, max_steps=1)
    assert sum(len(row["samples"]) for row in trainer.train_dataset) == 4
    assert trainer.train_dataset.column_names == ["samples"]
