"""Rollouts: the states that the student's own decoding visits, and what a trainer does with them."""

import itertools

import pytest
import torch
from distillation import make_trainer, rows, student, trajectories
from official import tiny_tokenizer
from thin import covering

from d3llm_hf.models.probes import evaluating
from trainers.distill.config import PseudoTrajectoryDistillConfig
from trainers.distill.rollout import Rollout, entropies, roll_out


END = 1  # the token that ends an answer, in answers that are written down


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def shown(table):
    """A table of states as text, one row of one state: `.` is hidden."""
    return ["".join("." if hidden else "x" for hidden in state) for state in table.tolist()]


# The states


def scripted(script):
    """Entropies of a model whose logits over two tokens are `(s, 0)`, s being an integer of the script.

    Args:
        script: for each forward and row, one digit a position: the higher, the surer.
    """
    forwards = iter(script)

    def entropy_at(hidden, among):
        assert not (among & ~hidden).any()
        sureness = torch.tensor([[int(digit) for digit in row] for row in next(forwards)])
        logits = torch.stack([sureness, torch.zeros_like(sureness)], -1)
        return entropies(logits[among], chunk_size=3)

    return entropy_at


def entropy_of(sureness):
    return entropies(torch.tensor([[float(sureness), 0.0]]), 1).item()


def test_a_decode_that_is_written_down_visits_the_states_worked_out_by_hand():
    """Blocks of four over ten positions: the third block has two. Row 1 ends at position 2, fill behind it."""
    labels = torch.tensor([[5, 5, 5, 5, 5, 5, 5, 5, 5, 5], [7, 7, END, END, END, END, END, END, END, END]])
    script = [
        # Row 0: position 2 is sure enough; row 1: nothing is, and position 1 is the surest.
        ["1090099999", "2300099999"],
        # A quarter of the first block is decided: the second is open. Row 0: 5 and 6 are sure; row 1: the end, and 6.
        ["1000099099"[:4] + "099099", "1090009000"],
        # Row 0: the third block is open, the surest of all is 9. Row 1: behind the end all is decided; 0 is left.
        ["1200300104", "1000000000"],
        # Row 1 has no content left. Row 0: everything is sure.
        ["9999999999", "0000000000"],
    ]
    found = roll_out(
        labels,
        torch.tensor([10, 3]),
        torch.tensor([entropy_of(5), entropy_of(5)]),
        scripted(script),
        block_length=4,
        max_forwards=8,
        stop_token_id=END,
    )
    assert shown(found.hidden[:, 0]) == ["..........", "..x.......", "..x..xx...", "..x..xx..x", "xxxxxxxxxx"]
    assert shown(found.hidden[:, 1]) == ["..........", ".x........", ".xxxxxxxxx", "xxxxxxxxxx", "xxxxxxxxxx"]
    # The open blocks and the next one: the second and third blocks open one a forward, where the last got far enough.
    assert [int(region.sum()) for region in found.region[:, 0]] == [8, 10, 10, 10, 10]
    assert [int(region.sum()) for region in found.region[:, 1]] == [8, 10, 10, 10, 10]
    assert found.counts.tolist() == [4, 3] and found.forwards.tolist() == [4, 3]


def test_a_block_opens_only_where_the_last_one_got_far_enough():
    """Of a block of eleven a tenth is two positions, as 1/11 is less."""
    found = roll_out(
        torch.full((1, 33), 5),
        torch.tensor([33]),
        torch.tensor([0.0]),
        scripted([["1" * 33]] * 3),
        block_length=11,
        max_forwards=3,
        stop_token_id=END,
    )
    assert [int(region.sum()) for region in found.region[:, 0]] == [22, 22, 33, 33]
    assert shown(found.hidden[-1]) == ["xxx" + "." * 30]
    assert found.counts.tolist() == [4] and found.forwards.tolist() == [3]


def test_what_is_nobodys_is_in_no_state_and_an_answer_without_end_is_decided_to_its_own():
    """Row 0 has no fill; row 1 has some, and is done before any of it is decided."""
    labels = torch.tensor([[5, 5, 5, -100, -100, -100], [5, 5, 5, END, END, END]])
    found = roll_out(
        labels,
        torch.tensor([3, 3]),
        torch.tensor([entropy_of(5)] * 2),
        scripted([["999999", "999000"]]),
        block_length=6,
        max_forwards=4,
        stop_token_id=END,
    )
    assert shown(found.hidden[:, 0]) == ["...xxx", "xxxxxx"] and shown(found.region[:, 0]) == ["...xxx"] * 2
    assert shown(found.hidden[:, 1]) == ["......", "xxx..."]
    assert found.counts.tolist() == [1, 1] and found.forwards.tolist() == [1, 1]


def test_an_answer_without_content_has_its_first_state_and_no_forward():
    found = roll_out(
        torch.tensor([[END, END]]),
        torch.tensor([0]),
        torch.tensor([1.0]),
        scripted([]),
        block_length=2,
        max_forwards=4,
        stop_token_id=END,
    )
    assert shown(found.hidden[:, 0]) == [".."] and found.counts.tolist() == [1] and found.forwards.tolist() == [0]


def test_states_are_drawn_evenly_from_those_with_content_left():
    hidden = torch.eye(4, dtype=torch.bool)[:, None].repeat(1, 2, 1)  # state s hides position s
    rollout = Rollout(hidden, hidden, counts=torch.tensor([4, 2]), forwards=torch.tensor([4, 2]))
    picked, region = rollout.select(torch.tensor([[0.0, 0.0], [0.3, 0.49], [0.74, 0.5], [0.99, 0.99]]))
    assert picked.long().argmax(-1).tolist() == [[0, 0], [1, 0], [2, 1], [3, 1]]
    assert torch.equal(picked, region)


def slow_states(model, prompt, answer, content, threshold, block, max_forwards, tokens):
    """The states of one row without padding, and the positions to learn in each, plainly: lists, one canvas a forward.

    Args:
        tokens: the mask token and the one that ends an answer.
    """
    mask, end = tokens
    shift = getattr(model, "logit_shift", 0)
    decided, opened, found = set(), 1, []
    blocks = [range(start, min(start + block, len(answer))) for start in range(0, len(answer), block)]
    for number in itertools.count():
        ended = any(answer[place] == end for place in decided)
        last = blocks[opened - 1]
        done = sum(place in decided for place in last)
        if not ended and opened < len(blocks) and done / len(last) >= 0.1:
            opened += 1
        hidden = [place for place in range(len(answer)) if place not in decided]
        reached = blocks[min(opened, len(blocks) - 1)].stop
        left = any(place < content for place in hidden)
        if left or not found:
            found.append((hidden, [place for place in hidden if place < reached]))
        if not left or number == max_forwards:
            return found
        canvas = prompt + [mask if place in hidden else token for place, token in enumerate(answer)]
        logits = model(input_ids=torch.tensor([canvas])).logits[0].double()
        entropy = {}
        for place in [place for place in hidden if place < blocks[opened - 1].stop]:
            p = logits[len(prompt) + place - shift].softmax(-1)
            entropy[place] = -(p * p.log()).sum().item()
        surest = min(entropy, key=entropy.get)
        decided |= {place for place, value in entropy.items() if value <= threshold} | {surest}
        ends = [place for place in decided if answer[place] == end]
        if ends:
            decided |= set(range(min(ends), len(answer)))


@pytest.mark.parametrize(("family", "fill"), covering(["llada", "Dream"], [True, False], strength=1, every=2))
def test_views_of_a_batch_are_states_of_slow_rollouts_of_each_row(tmp_path, tokenizer, family, fill):
    model = student(tokenizer, family)
    with torch.no_grad():  # sure of some tokens and not of others, by far more than rounding
        for weight in model.parameters():
            weight.normal_(std=0.7, generator=torch.Generator().manual_seed(weight.numel()))
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        model=model,
        objective="rollout",
        rollout_threshold=[1.5, 1.5],
        rollout_block_length=4,
        rollout_max_forwards=5,
        rollout_states=200,  # so many that each state is among them
        supervise_eos_fill=fill,
    )
    samples = rows(6)
    for row in samples[::2]:
        row["response_ids"].append(tokenizer.eos_token_id)
        row["step_map"].append(len(row["step_map"]) + 1)
    batch = trainer.data_collator([row | {"sample_id": index} for index, row in enumerate(samples)])
    views = trainer._draw(batch, training=True)
    tokens = trainer.mask_token_id, tokenizer.eos_token_id
    most = 0
    for row, sample in enumerate(samples):
        length = int(batch["labels"][row].ne(-100).sum())
        answer = batch["labels"][row, :length].tolist()
        drawn = {
            (tuple(hidden.nonzero()[:, 0].tolist()), tuple(learnt.nonzero()[:, 0].tolist()))
            for hidden, learnt in zip(views.hidden[:, row], views.learnt[:, row], strict=True)
        }
        with torch.no_grad():
            content = int(batch["content_lengths"][row])
            states = slow_states(model, sample["prompt_ids"], answer, content, 1.5, 4, 5, tokens)
        assert drawn == {(tuple(hidden), tuple(learnt)) for hidden, learnt in states}
        most = max(most, len(drawn))
    assert most > 2


# The trainer

ROLLOUT = {"objective": "rollout", "rollout_block_length": 4, "rollout_max_forwards": 3}


@pytest.mark.full
@pytest.mark.parametrize("family", ["llada", "Dream"])
def test_training_on_rollouts_lowers_the_loss_of_both_families(tmp_path, tokenizer, family):
    trainer = make_trainer(
        tmp_path, tokenizer, model=student(tokenizer, family), max_steps=30, sft_weight=0.5, **ROLLOUT
    )
    assert trainer.args.loss_scale == 0.5 and trainer.args.window_sizes == [4, 6]
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[-1]["cross_entropy"] < 0.8 * logs[0]["cross_entropy"]
    assert all(1 <= entry["rollout_forwards"] <= 3 and 0 < entry["masked_fraction"] <= 1 for entry in logs)
    none = {"noise_level", "noise_floor", "window", "complementary_cross_entropy", "complementary_entropy"}
    assert not any(none & set(entry) for entry in logs)
    loss = 0.5 * (logs[0]["cross_entropy"] + 2 * logs[0].get("entropy", 0.0))
    assert logs[0]["loss"] == pytest.approx(loss + 0.5 * logs[0]["sft_loss"], abs=1e-3)


@pytest.mark.parametrize("reduction", ["token", "sample"])
def test_the_loss_is_a_mean_over_the_hidden_positions_of_all_states(tmp_path, tokenizer, reduction):
    trainer = make_trainer(tmp_path, tokenizer, loss_reduction=reduction, entropy_weight=0.0, **ROLLOUT)
    batch = trainer.data_collator([row | {"sample_id": index} for index, row in enumerate(rows(3))])
    views = trainer._draw(batch, training=True)
    assert views.kinds == ["primary"] * 2 and not (views.learnt & ~views.hidden).any()
    length, sums, counts = batch["labels"].shape[1], [0.0] * 3, [0] * 3
    for hidden, learnt in zip(views.hidden, views.learnt, strict=True):
        canvas = batch["input_ids"].clone()
        canvas[:, -length:][hidden] = trainer.mask_token_id
        logits = trainer.model(input_ids=canvas, attention_mask=batch["attention_mask"]).logits[:, -length:].double()
        costs = -logits.log_softmax(-1).gather(-1, batch["labels"][..., None])[..., 0]
        for row in range(3):
            sums[row] += costs[row][learnt[row]].sum().item()
            counts[row] += int(learnt[row].sum())
    expected = sum(sums) / sum(counts)
    if reduction == "sample":
        expected = sum(each / count for each, count in zip(sums, counts, strict=True)) / 3
    trainer.model.train()
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(0.5 * expected, rel=1e-5)


def test_a_rollout_looks_at_the_model_without_dropout_or_gradient_and_leaves_it_as_it_was(tmp_path, tokenizer):
    model = student(tokenizer)
    trainer = make_trainer(tmp_path, tokenizer, model=model, **ROLLOUT)
    batch = trainer.data_collator([row | {"sample_id": index} for index, row in enumerate(rows(3))])
    model.train()
    model.model.norm.eval()  # a module that is kept still
    before, seen = [module.training for module in model.modules()], []
    model.model.register_forward_hook(lambda *args: seen.append((model.training, torch.is_grad_enabled())))
    trainer.compute_loss(model, batch).backward()
    assert seen[-1] == (True, True) and len(seen) > 1 and set(seen[:-1]) == {(False, False)}
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert before == [module.training for module in model.modules()] and torch.is_grad_enabled()


def test_rows_that_are_done_are_in_no_forward(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, rollout_threshold=[9.0, 9.0], **ROLLOUT)
    samples = [row | {"sample_id": index} for index, row in enumerate(rows(2))]
    for row, length in zip(samples, (2, 12), strict=True):
        row["response_ids"], row["step_map"] = [7] * length, list(range(1, length + 1))
    batch, sizes = trainer.data_collator(samples), []
    trainer.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    views = trainer._draw(batch, training=True)  # any entropy will do: one block a forward
    assert sizes == [2, 1, 1] and views.forwards.tolist() == [1, 3]


def test_evaluations_take_the_windows_of_trajectories(tmp_path, tokenizer):
    found = {}
    for objective in ("trajectory", "rollout"):
        trainer = make_trainer(
            tmp_path, tokenizer, objective=objective, trainer_kwargs={"eval_dataset": trajectories(6, seed=5)}
        )
        found[objective] = {
            name: value
            for name, value in trainer.evaluate().items()
            if not name.endswith(("loss", "runtime", "second", "time"))
        }
    assert found["trajectory"] == found["rollout"] and "eval_complementary_cross_entropy" in found["rollout"]


def test_rollouts_take_turns_with_windows(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, rollout_every=3, max_steps=6, **ROLLOUT)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert ["rollout_forwards" in entry for entry in logs] == [True, False, False] * 2
    assert ["complementary_cross_entropy" in entry for entry in logs] == [False, True, True] * 2
    assert ["noise_level" in entry for entry in logs] == [False, True, True] * 2 and logs[0]["window"] == 4


def test_thresholds_and_states_are_drawn_for_each_sample_and_epoch(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, rollout_states=6, **ROLLOUT)
    examples = [row | {"sample_id": index} for index, row in enumerate(rows(6))]

    def drawn(order, epoch=0.0):
        trainer.state.epoch = epoch
        learnt = trainer._draw(trainer.data_collator([examples[index] for index in order]), training=True).learnt
        return {index: learnt[:, row].tolist() for row, index in enumerate(order)}

    together = drawn(range(6))
    assert together == drawn([5, 2, 0, 1, 4, 3]) == drawn(range(6), epoch=0.9)
    assert together != drawn(range(6), epoch=1.0)


@pytest.mark.full
@pytest.mark.parametrize("every", [1, 2])
def test_a_resumed_run_of_rollouts_is_equal_to_an_unbroken_one(tmp_path, tokenizer, every):
    def run(folder, **changed):
        return make_trainer(
            tmp_path / folder,
            tokenizer,
            dataset=trajectories(20),
            max_steps=6,
            rollout_every=every,
            **ROLLOUT,
            **changed,
        )

    unbroken = run("a", save_strategy="steps", save_steps=3)
    unbroken.train()
    resumed = run("b", dataloader_num_workers=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    after = resumed.model.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in unbroken.model.state_dict().items())
    histories = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (unbroken, resumed)]
    assert histories[0] == histories[1] and len(histories[0]) == 6


def test_with_shards_of_a_model_all_processes_make_the_same_number_of_forwards(tmp_path, tokenizer):
    """Another process says that it has rows left: a forward is made for it, of one row and no position."""
    trainer = make_trainer(tmp_path, tokenizer, rollout_threshold=[9.0, 9.0], **ROLLOUT)
    trainer.is_fsdp_enabled = True
    asked = []

    def gather(left):
        asked.append(bool(left))
        return torch.cat([left, torch.tensor([len(asked) < 3])])

    trainer.accelerator.gather, sizes = gather, []
    sample = {"prompt_ids": [6], "response_ids": [7, 7], "step_map": [1, 2], "sample_id": 0}
    batch = trainer.data_collator([sample])
    trainer.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    views = trainer._draw(batch, training=True)
    assert asked == [True, False, False] and sizes == [1, 1] and views.forwards.tolist() == [1]


def test_the_card_tells_of_rollouts_and_of_no_curriculum_that_there_is_not(tmp_path, tokenizer):
    texts = []
    for every in (1, 2):
        trainer = make_trainer(tmp_path, tokenizer, rollout_every=every, **ROLLOUT)
        trainer.create_model_card()
        texts.append((tmp_path / "README.md").read_text(encoding="utf-8"))
    for text in texts:
        assert "with the text on states of its own decoding" in text and "| Objective | `rollout` |" in text
        assert "| Rollout | 3 forwards at most, blocks of 4, entropy up to 0.2 to 0.8 nats |" in text
        assert "| States learnt of each rollout | 2 |" in text
    assert "| Complementary view | no |" in texts[0] and "## Curriculum" not in texts[0]
    assert "| Complementary view | yes |" in texts[1] and "## Curriculum" in texts[1]
    assert "| Steps with a rollout | all |" in texts[0] and "| Steps with a rollout | one of 2 |" in texts[1]


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"rollout_threshold": [0.4, 0.2]},
            r"`rollout_threshold` must hold the smallest and the largest .* .got .0.4",
        ),
        ({"rollout_threshold": [0.4]}, "`rollout_threshold` must hold the smallest"),
        ({"rollout_threshold": [-1.0, 0.2]}, "`rollout_threshold` must hold the smallest"),
        ({"rollout_threshold": ["a", "b"]}, "`rollout_threshold` must hold the smallest"),
        ({"rollout_block_length": 0}, "`rollout_block_length` must be at least 1 .got 0"),
        ({"rollout_max_forwards": 0}, "`rollout_max_forwards` must be at least 1 .got 0"),
        ({"rollout_states": 0}, "`rollout_states` must be at least 1 .got 0"),
        ({"rollout_every": 0}, "`rollout_every` must be at least 1 .got 0"),
        ({"noise_curriculum": False}, r"`noise_curriculum` needs steps that draw windows .* .got False"),
        (
            {"objective": "random", "rollout_states": 3},
            r"`rollout_states` needs `objective='rollout'` .got 3., and has no effect otherwise. .* leave it at 2",
        ),
        (
            {"objective": "certainty", "rollout_threshold": [0.1, 0.8]},
            r"`rollout_threshold` needs `objective='rollout'` .got .0.1, 0.8",
        ),
    ],
)
def test_a_bad_argument_of_rollouts_is_refused_by_name(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        PseudoTrajectoryDistillConfig(str(tmp_path), **({"use_cpu": True, "objective": "rollout"} | arguments))


def test_windows_grow_only_where_some_are_learnt(tmp_path):
    sizes = [
        PseudoTrajectoryDistillConfig(str(tmp_path), use_cpu=True, objective="rollout", rollout_every=n).window_sizes
        for n in (1, 2)
    ]
    assert sizes == [[32], [16, 16, 24, 24, 32, 32]]
