"""Softer targets than the text, and the further terms of the loss, against cases worked out by hand."""

import math

import pytest
import torch
from distillation import make_trainer, rows, student, trajectories
from official import tiny_tokenizer
from peft import LoraConfig
from thin import some_of

from trainers.common.lora import lora_target_modules
from trainers.distill.batch import COMPLEMENT, PRIMARY, BatchViews
from trainers.distill.config import PseudoTrajectoryDistillConfig
from trainers.distill.loss import TokenTerms, divergences, order_hinge
from trainers.distill.noisy_views import make_view
from trainers.distill.objective import distillation_loss, positions_by_kind


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def config(folder, **arguments):
    return PseudoTrajectoryDistillConfig(str(folder), use_cpu=True, report_to="none", **arguments)


# Terms


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_a_divergence_is_that_of_the_target_from_the_prediction(chunk):
    half, quarter = math.log(0.5), math.log(0.25)
    logits = torch.tensor([[half, quarter, quarter], [0.0, 0.0, 0.0], [1.0, 2.0, 3.0]], requires_grad=True)
    targets = torch.tensor(
        [[quarter, quarter, half], [0.0, -math.inf, -math.inf], [1.0, 2.0, 3.0]], requires_grad=True
    )
    found = divergences(logits, targets, chunk)
    # 1/4 ln(1/2) + 1/4 ln 1 + 1/2 ln 2; then the cross-entropy to a token; then nothing
    assert found.tolist() == pytest.approx([0.25 * math.log(2), math.log(3), 0.0], abs=1e-6)
    found.sum().backward()
    assert targets.grad is None
    torch.testing.assert_close(logits.grad, logits.detach().softmax(-1) - targets.detach().softmax(-1))


def test_pairs_are_compared_within_a_group_in_the_order_of_their_steps():
    entropy = torch.tensor([1.0, 0.2, 0.9, 0.5, 3.0, 0.0], requires_grad=True)
    steps = torch.tensor([2, 1, -1, 2, 1, 2])
    group = torch.tensor([0, 0, 0, 0, -1, 4])
    found, groups = order_hinge(entropy, steps, group, margin=0.25)
    # Step 1 before both of step 2 and the undecided: relu(.2 - 1 + .25), relu(.2 - .9 + .25), relu(.2 - .5 + .25);
    # both of step 2 before the undecided: relu(1 - .9 + .25), relu(.5 - .9 + .25)
    assert sorted(found.tolist()) == pytest.approx([0, 0, 0, 0, 0.35], abs=1e-6) and groups.tolist() == [0] * 5
    found.sum().backward()
    assert entropy.grad.tolist() == [1, 0, -1, 0, 0, 0]
    assert [len(each) for each in order_hinge(entropy, steps, group.clamp(max=-1), 0.25)] == [0, 0]


def views_of(learnt, distances=None, kinds=(PRIMARY, COMPLEMENT)):
    """Views `(K, B, R)` as lists."""
    learnt = torch.tensor(learnt, dtype=torch.bool)
    none = torch.zeros(0)
    return BatchViews(
        kinds=list(kinds),
        hidden=learnt,
        learnt=learnt,
        weights=torch.zeros(learnt.shape),
        noise_levels=none,
        window_tokens=none,
        forwards=none,
        distances=torch.zeros_like(learnt, dtype=torch.long) if distances is None else torch.tensor(distances),
        revealed=torch.zeros_like(learnt),
    )


# Two samples of three positions. Primary: positions 0 and 1 of the first, 2 of the second; complement: 2; 0 and 1.
LEARNT = [[[1, 1, 0], [0, 0, 1]], [[0, 0, 1], [1, 1, 0]]]
DISTANCES = [[[1, 3, 0], [0, 0, 2]], [[0, 0, -1], [-1, 0, 0]]]
COST = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
TERMS = TokenTerms(
    cross_entropy=COST,
    entropy=torch.tensor([0.5, 0.25, 1.0, 2.0, 3.0, 4.0]),
    correct=torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0]),
    certainty=torch.tensor([0.95, 0.5, 0.7, 0.8, 0.9, 0.1]),
)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        # Means of the primary (1 + 2 + 4) / 3 and of the complement 56 / 3, and twice that of 0.5 and 0.25
        ({}, 7 / 3 + 56 / 3 + 2 * 0.375),
        # Certainty of right ones that are below 0.9 alone
        ({"entropy_below": 0.9}, 7 / 3 + 56 / 3 + 2 * 0.25),
        # One wrong prediction of the primary view is surer than 0.6; none is surer than 0.7
        ({"wrong_entropy_weight": 3.0}, 7 / 3 + 56 / 3 + 2 * 0.375 - 3 * 1.0),
        ({"wrong_entropy_weight": 3.0, "wrong_confidence": 0.75}, 7 / 3 + 56 / 3 + 2 * 0.375),
        # With the complement's entropies: 2 is right; 3 is wrong and sure
        ({"entropy_on_complement": True}, 7 / 3 + 56 / 3 + 2 * 0.375 + 2 * 2),
        (
            {"entropy_on_complement": True, "wrong_entropy_weight": 1.0},
            7 / 3 + 56 / 3 + 2 * 0.375 - 1 + 2 * 2 - 3,
        ),
        # More than two tokens away is far: position 1 of the first sample; each part is a mean of its own
        ({"far_target": "teacher", "near_steps": 2}, (1 + 4) / 2 + 2 + 56 / 3 + 2 * 0.375),
        ({"far_target": "teacher", "near_steps": 3}, 7 / 3 + 56 / 3 + 2 * 0.375),
        # Half as much for each three tokens; what the state shows is no distance away
        (
            {"distance_weight": math.log(2)},
            (2 ** (-1 / 3) + 2 * 0.5 + 4 * 2 ** (-2 / 3)) / 3 + 56 / 3 + 2 * (0.5 * 2 ** (-1 / 3) + 0.25 * 0.5) / 2,
        ),
        # One pair of the primary view, in the first sample: 0.5 before 0.25
        ({"rank_weight": 10.0, "rank_margin": 0.5}, 7 / 3 + 56 / 3 + 2 * 0.375 + 10 * 0.75),
        (
            {"rank_weight": 10.0, "rank_margin": 0.5, "loss_reduction": "sample"},
            (1.5 + 4) / 2 + (8 + 24) / 2 + 2 * 0.375 / 2 + 10 * 0.75 / 2,
        ),
    ],
)
def test_each_term_is_what_it_is_by_hand(tmp_path, arguments, expected):
    args = config(tmp_path, loss_scale=0.5, **arguments)
    views = views_of(LEARNT, DISTANCES)
    steps = torch.tensor([[1, 2, 3], [3, 2, 1]])
    loss, sft = distillation_loss(
        TERMS,
        COST,
        views,
        positions_by_kind(views, COST),
        args,
        entropy_on_complement=bool(args.entropy_on_complement),
        steps=steps,
    )
    assert loss.item() == pytest.approx(0.5 * expected, rel=1e-6) and sft.item() == 0


def test_distances_count_the_tokens_from_the_state_on():
    steps = torch.tensor([3, 4, 1, 2, 8, 7, 6, 5, 9, -1])
    options = {"objective": "trajectory", "canvas_length": 10, "window": 4, "window_index": 0, "num_windows": 3}
    view = make_view(steps, noise_level=0.5, **options)  # three tokens are decided
    assert view.distances.tolist()[:4] == [0, 1, -2, -1]
    two = make_view(steps, noise_level=0.5, next_noise_level=0.75, **options)  # in the second block six
    assert two.distances.tolist()[:8] == [0, 1, -2, -1, 2, 1, 0, -1]
    assert (
        make_view(steps, noise_level=0.5, **{**options, "objective": "certainty"}, uniforms=torch.rand(10)).distances
        is None
    )


# Targets


def batch_of(trainer, count=3):
    return trainer.data_collator([row | {"sample_id": index} for index, row in enumerate(rows(count))])


def spread(model, seed):
    """Weights with which predictions differ."""
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):
            weight.normal_(std=0.5, generator=torch.Generator().manual_seed(100 * seed + number))
    return model


@pytest.mark.parametrize("family", some_of(["llada", "Dream"], every=2))
@pytest.mark.parametrize(("kind", "reveal"), [("teacher", None), ("teacher", 0.5), ("self", 0.5)])
def test_what_a_target_hides_is_learnt_from_it_and_what_it_shows_as_a_token(tmp_path, tokenizer, family, kind, reveal):
    model, teacher = (spread(student(tokenizer, family), seed) for seed in (0, 1))
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        model=model,
        target=kind,
        teacher_reveal=reveal,
        entropy_weight=0.0,
        loss_scale=1.0,
        noise_start=0.6,
        sft_weight=0.25,
        trainer_kwargs={"teacher": teacher if kind == "teacher" else None},
    )
    batch = batch_of(trainer)
    views = trainer._draw(batch, training=True)
    labels, length, shift = batch["labels"], batch["labels"].shape[1], trainer.label_shift
    other, expected, shown, divergences_ = teacher if kind == "teacher" else model, 0.0, 0, []

    @torch.no_grad()
    def log_probabilities(network, hidden):
        canvas = batch["input_ids"].clone()
        canvas[:, -length:][hidden] = trainer.mask_token_id
        logits = network(input_ids=canvas, attention_mask=batch["attention_mask"]).logits
        return logits[:, canvas.shape[1] - length - shift : canvas.shape[1] - shift].double().log_softmax(-1)

    for index in range(2):  # the primary view, then the complementary one
        found = log_probabilities(model, views.hidden[index])
        wanted = log_probabilities(other, views.hidden[index] & ~views.revealed[index])
        costs = []
        for row, place in views.learnt[index].nonzero().tolist():
            if views.revealed[index, row, place]:
                costs.append(-found[row, place, labels[row, place]].item())
                shown += 1
            else:
                p, q = wanted[row, place], found[row, place]
                costs.append((p.exp() * (p - q)).sum().item())
                divergences_.append(costs[-1])
        expected += sum(costs) / len(costs)
    assert (shown > 0) == (reveal is not None) and len(divergences_) > 5
    model.train()
    loss = trainer.compute_loss(model, batch)
    sums = trainer._metric_sums[0]
    assert loss.item() == pytest.approx(expected + 0.25 * sums["sft_loss"].item() / 3, rel=1e-4)
    assert sums["divergence"].item() == pytest.approx(sum(divergences_), rel=1e-4)
    assert sums["soft"] == len(divergences_)
    loss.backward()
    assert model.training and all(weight.grad is not None for weight in model.parameters())
    if kind == "teacher":
        assert not teacher.training and not any(weight.requires_grad for weight in teacher.parameters())


def test_revealed_tokens_are_the_wanted_share_of_what_is_learnt_and_drawn_for_each_sample(tmp_path, tokenizer):
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        target="self",
        teacher_reveal=0.3,
        noise_start=0.8,
        sft_weight=0.1,
        dataset=trajectories(4),
    )
    whole = trainer._draw(batch_of(trainer, 100), training=True)
    assert not (whole.revealed & ~whole.learnt).any() and not whole.revealed[2].any()
    share = whole.revealed.sum() / whole.learnt[:2].sum()
    assert share.item() == pytest.approx(0.3, abs=0.06)
    part = trainer._draw(batch_of(trainer, 5), training=True)
    assert torch.equal(part.revealed, whole.revealed[:, :5])
    plain = make_trainer(tmp_path, tokenizer, noise_start=0.8, sft_weight=0.1, dataset=trajectories(4))
    same = plain._draw(batch_of(plain, 100), training=True)
    assert torch.equal(same.learnt, whole.learnt) and not same.revealed.any()


def test_an_adapter_is_taught_by_what_it_adapts_or_by_a_checkpoint(tmp_path, tokenizer):
    found = {}
    for kind in ("adapter", "model", "checkpoint"):
        model = spread(student(tokenizer), 0)
        lora = LoraConfig(r=2, lora_alpha=4, target_modules=lora_target_modules(model), init_lora_weights=False)
        more, arguments = {"peft_config": lora}, {}
        if kind == "model":
            more["teacher"] = spread(student(tokenizer), 0)
        if kind == "checkpoint":
            model.save_pretrained(tmp_path / "teacher")
            arguments["teacher_model_name_or_path"] = str(tmp_path / "teacher")
        trainer = make_trainer(
            tmp_path,
            tokenizer,
            model=model,
            target="teacher",
            trainer_kwargs=more,
            noise_start=0.6,
            seed=3,
            **arguments,
        )
        assert (trainer.teacher is None) == (kind == "adapter")
        found[kind] = trainer.compute_loss(trainer.model, batch_of(trainer)).item()
    assert found["adapter"] == found["model"] == found["checkpoint"] > 0


@pytest.mark.full
def test_a_teacher_may_be_an_embedded_checkpoint(tmp_path):
    from trainers.common.loading import load_named

    model, tokenizer = load_named("d3llm-llada-teacher", None, torch_dtype="float32")
    name = {"teacher_model_name_or_path": "d3llm-llada-teacher"}
    trainer = make_trainer(tmp_path, tokenizer, model=model, target="teacher", **name)
    taught = trainer.teacher.state_dict()
    assert all(torch.equal(weight, taught[name]) for name, weight in model.state_dict().items())


def test_far_positions_have_the_other_target(tmp_path, tokenizer):
    """With every divergence at 0, for the teacher is a copy, only near tokens cost anything; then the other way."""
    model = spread(student(tokenizer), 0)
    copy = spread(student(tokenizer), 0)
    shared = {"model": model, "complementary": False, "entropy_weight": 0.0, "loss_scale": 1.0, "noise_start": 0.8}
    shared |= {"blockwise": False, "near_steps": 2}
    losses, counts = {}, {}
    for name, arguments in {
        "near tokens": {"far_target": "none"},
        "far teacher": {"far_target": "teacher"},
        "near teacher": {"target": "teacher", "far_target": "token"},
        "near teacher alone": {"target": "teacher", "far_target": "none"},
    }.items():
        taught = "teacher" in name
        trainer = make_trainer(
            tmp_path, tokenizer, trainer_kwargs={"teacher": copy if taught else None}, **shared, **arguments
        )
        losses[name] = trainer.compute_loss(model, batch_of(trainer)).item()
        counts[name] = trainer._metric_sums[1 - model.training]
    learnt = {name: int(sums["masked"]) for name, sums in counts.items()}
    soft = {name: int(sums["soft"]) for name, sums in counts.items()}
    assert losses["far teacher"] == pytest.approx(losses["near tokens"], rel=1e-5)
    assert losses["near teacher alone"] == pytest.approx(0, abs=1e-5) and losses["near teacher"] > 0.1
    assert learnt["near tokens"] == learnt["near teacher alone"] < learnt["far teacher"] == learnt["near teacher"]
    assert soft["far teacher"] + soft["near teacher"] == learnt["far teacher"]
    assert soft["near tokens"] == 0 and soft["near teacher alone"] == learnt["near tokens"]


@pytest.mark.parametrize("objective", some_of(["trajectory", "random", "rollout"], every=3))
def test_training_with_all_of_them_logs_the_divergence_and_resumes_to_the_same_weights(tmp_path, tokenizer, objective):
    order = {"far_target": "self", "near_steps": 2, "distance_weight": 0.5} if objective == "trajectory" else {}
    arguments = {"target": "token" if order else "self", "teacher_reveal": 0.5, "rank_weight": 0.1, **order}
    arguments |= {"entropy_below": 0.9, "wrong_entropy_weight": 0.1, "objective": objective, "max_steps": 4}
    unbroken = make_trainer(tmp_path / "a", tokenizer, save_strategy="steps", save_steps=2, **arguments)
    unbroken.train()
    logs = [entry for entry in unbroken.state.log_history if "loss" in entry]
    assert len(logs) == 4 and all(entry["divergence"] >= 0 for entry in logs)
    resumed = make_trainer(tmp_path / "b", tokenizer, **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    after = resumed.model.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in unbroken.model.state_dict().items())


def test_the_best_model_may_be_chosen_by_a_divergence_only_where_there_is_one(tmp_path, tokenizer):
    arguments = {"load_best_model_at_end": True, "metric_for_best_model": "divergence", "greater_is_better": False}
    arguments |= {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    more = {"eval_dataset": trajectories(4, seed=5)}
    trainer = make_trainer(tmp_path, tokenizer, target="self", teacher_reveal=0.5, trainer_kwargs=more, **arguments)
    trainer.train()
    assert trainer.state.best_metric is not None
    with pytest.raises(ValueError, match="`metric_for_best_model`"):
        make_trainer(tmp_path, tokenizer, trainer_kwargs=more, **arguments)


def test_the_card_tells_of_each_switch_that_was_set(tmp_path, tokenizer):
    def card(**arguments):
        make_trainer(tmp_path, tokenizer, **arguments).create_model_card()
        return (tmp_path / "README.md").read_text(encoding="utf-8")

    expected = [
        "| Target | the text's token |",
        "| Target of what is decided more than 8 tokens later | the model's own distribution |",
        "| Tokens that the target's state shows besides | 50% |",
        "| Entropy of right predictions below a probability of | 0.9 |",
        "| Minus the entropy of wrong predictions | weight 1.0, above a probability of 0.6 |",
        "| Fall of the weights with the distance in the trajectory | -1.0 |",
        "| Entropies in the teacher's order | weight 2.0, margin 0.1 |",
    ]
    plain = card()
    assert not any(row in plain for row in expected) and "| Target" not in plain
    terms = {"entropy_below": 0.9, "wrong_entropy_weight": 1.0, "distance_weight": -1.0, "rank_weight": 2.0}
    told = card(far_target="self", near_steps=8, teacher_reveal=0.5, **terms)
    assert [row for row in expected if row not in told] == []


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "text"}, "`target` must be one of .* .got 'text'"),
        ({"far_target": "text"}, "`far_target` must be one of .* .got 'text'"),
        ({"teacher_reveal": 0.5}, "`teacher_reveal` needs `target` or `far_target` of 'teacher' or 'self' .got 0.5"),
        ({"target": "self"}, "`teacher_reveal` must be set where the student is its own target .got None"),
        (
            {"target": "teacher", "teacher_reveal": 1.0},
            "`teacher_reveal` must be between 0 and 1, and neither .got 1.0",
        ),
        ({"target": "self", "teacher_reveal": 0.0}, "`teacher_reveal` must be between 0 and 1, and neither .got 0.0"),
        (
            {"target": "self", "teacher_reveal": 0.5, "teacher_model_name_or_path": "me/teacher"},
            "`teacher_model_name_or_path` needs `target` or `far_target` of 'teacher' .got 'me/teacher'",
        ),
        ({"near_steps": 4}, "`near_steps` needs `far_target` .got 4"),
        ({"far_target": "none"}, "`near_steps` must say where `far_target` begins .got None and 'none'"),
        ({"far_target": "none", "near_steps": 0}, "`near_steps` must be at least 1 .got 0"),
        ({"far_target": "token", "near_steps": 4}, "`far_target` must be another than `target` .got 'token'"),
        (
            {"target": "self", "far_target": "teacher", "near_steps": 4, "teacher_reveal": 0.5},
            "`target` and `far_target` must ask one model at most .got 'self' and 'teacher'",
        ),
        (
            {"objective": "random", "far_target": "none", "near_steps": 4},
            "`far_target` needs `objective='trajectory'` .got 'none'",
        ),
        (
            {"objective": "rollout", "distance_weight": 1.0},
            "`distance_weight` needs `objective='trajectory'` .got 1.0",
        ),
        ({"entropy_below": 1.5}, "`entropy_below` must be between 0 and 1 .got 1.5"),
        ({"entropy_below": 0.9, "entropy_weight": 0.0}, "`entropy_below` needs `entropy_weight` above 0 .got 0.9"),
        ({"wrong_entropy_weight": -1.0}, "`wrong_entropy_weight` must be at least 0 .got -1.0"),
        ({"wrong_confidence": 0.5}, "`wrong_confidence` needs `wrong_entropy_weight` above 0 .got 0.5"),
        ({"wrong_entropy_weight": 1.0, "wrong_confidence": 2.0}, "`wrong_confidence` must be between 0 and 1"),
        ({"rank_weight": -1.0}, "`rank_weight` must be at least 0"),
        ({"rank_margin": 0.5}, "`rank_margin` needs `rank_weight` above 0 .got 0.5"),
        ({"rank_weight": 1.0, "rank_margin": -0.5}, "`rank_margin` must be at least 0 .got -0.5"),
    ],
)
def test_a_switch_that_is_out_of_range_or_without_effect_is_refused_by_name(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **arguments)


def test_a_teacher_is_refused_where_nothing_asks_it_where_there_are_two_or_none_or_one_of_another_kind(
    tmp_path, tokenizer
):
    def make(teacher, family="llada", **arguments):
        model = student(tokenizer, family)
        return make_trainer(tmp_path, tokenizer, model=model, trainer_kwargs={"teacher": teacher}, **arguments)

    teacher = student(tokenizer)
    with pytest.raises(
        ValueError, match=r"`teacher` needs `target='teacher'` or .* .got LLaDAModelLM, 'token' and None"
    ):
        make(teacher)
    with pytest.raises(
        ValueError, match=r"needs `teacher` or `teacher_model_name_or_path` where .* .got LLaDAModelLM"
    ):
        make(None, target="teacher")
    with pytest.raises(ValueError, match=r"`teacher_model_name_or_path` must be unset where `teacher` is given"):
        make(teacher, target="teacher", teacher_model_name_or_path="me/teacher")
    with pytest.raises(ValueError, match=r"must read the student's canvas .got class 'LLaDAModelLM', .* 'DreamModel'"):
        make(teacher, "Dream", target="teacher")
    with pytest.raises(ValueError, match=r"must read the student's canvas .got vocabulary 600, and .* has \d+"):
        make(student(tokenizer, vocab_size=600), target="teacher")
    with pytest.raises(ValueError, match=r"must read the student's canvas .got mask token 7, and the student has"):
        make(student(tokenizer, mask_token_id=7), target="teacher")
