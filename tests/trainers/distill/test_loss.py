"""Noisy views, collation and the loss of distillation, against hand-computed cases."""

import math

import pytest
import torch
from distillation import make_trainer, rows, student
from official import tiny_tokenizer
from others import DECODERS

from d3llm_hf import as_diffusion_lm
from trainers.distill import batch as distill_batch
from trainers.distill.collator import PseudoTrajectoryCollator
from trainers.distill.loss import mean_over, token_terms
from trainers.distill.noisy_views import NoisyView, decision_ranks, draw_view, make_view, window_count
from trainers.sft.masking import generator_for


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


# The views


def test_tokens_are_ranked_by_step_then_from_left_to_right():
    ranks, count = decision_ranks(torch.tensor([3, 1, -1, 3, 0, 2]))
    assert (ranks.tolist(), count) == ([3, 1, 7, 4, 0, 2], 4)


def view_of(step_map, noise_level, window_index=0, window=4, canvas_length=None, objective="trajectory", **options):
    canvas_length = len(step_map) if canvas_length is None else canvas_length
    return make_view(
        torch.tensor(step_map),
        objective=objective,
        canvas_length=canvas_length,
        window=window,
        window_index=window_index,
        num_windows=window_count(canvas_length, window),
        noise_level=noise_level,
        **options,
    )


def positions(mask):
    return mask.nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("noise_level", "masked"), [(1.0, [0, 1, 3]), (0.75, [0, 1]), (0.5, [1]), (0.25, []), (0.0, [])]
)
def test_a_window_hides_what_the_teacher_had_not_decided(noise_level, masked):
    view = view_of([3, 4, 1, 2, 8, 7, 6, 5], noise_level)
    assert positions(view.masked) == masked
    assert positions(view.complement) == [p for p in range(4) if p not in masked]
    assert positions(view.future) == [4, 5, 6, 7]


def test_the_second_window_sees_the_first_and_starts_from_its_own_states():
    view = view_of([3, 4, 1, 2, 8, 7, 6, 5], 0.5, window_index=1)
    assert positions(view.masked) == [4]  # 4 + 2 + 1 tokens are decided
    assert positions(view.complement) == [5, 6, 7] and not view.future.any()


def test_undecided_tokens_stay_hidden_and_given_ones_never_are():
    view = view_of([0, -1, 1, -1], 0.0)
    assert (positions(view.masked), positions(view.complement)) == ([1, 3], [0, 2])


def test_the_last_window_ends_with_the_canvas_not_with_the_tensor():
    view = view_of([1, 2, 3, 4, 5, 6, -1, -1], 1.0, window_index=1, canvas_length=6)
    assert positions(view.masked | view.complement) == [4, 5] and not view.future.any()


@pytest.mark.parametrize(("length", "count"), [(0, 1), (1, 1), (15, 1), (16, 1), (17, 2), (32, 2)])
def test_no_window_is_empty(length, count):
    assert window_count(length, 16) == count


def drawn(seed, objective="trajectory", **options):
    defaults = {"content_length": 20, "canvas_length": 32, "window": 8, "noise_range": (0.25, 0.75)}
    return draw_view(torch.arange(1, 33), generator_for(seed), objective=objective, **(defaults | options))


def test_windows_begin_inside_the_answer_and_the_last_one_takes_the_fill():
    windows = {tuple(positions(view.masked | view.complement)) for view in map(drawn, range(60))}
    assert windows == {tuple(range(8)), tuple(range(8, 16)), tuple(range(16, 32))}
    over_fill = {
        positions(view.masked | view.complement)[0] for view in (drawn(s, windows_over_fill=True) for s in range(60))
    }
    assert over_fill == {0, 8, 16, 24}
    assert positions((whole := drawn(0, blockwise=False)).masked | whole.complement) == list(range(32))


def test_noise_levels_are_uniform_between_their_bounds():
    levels = torch.tensor([drawn(seed).noise_level for seed in range(400)])
    assert 0.25 <= levels.min() < 0.27 and 0.73 < levels.max() <= 0.75
    assert levels.mean().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    ("objective", "noise", "share"), [("random", (0.2, 0.2), 0.2008), ("certainty", (0.2, 0.2), 0.5)]
)
def test_the_random_objectives_hide_their_share(objective, noise, share):
    views = [drawn(seed, objective, noise_range=noise) for seed in range(800)]
    window = sum(int((view.masked | view.complement).sum()) for view in views)
    assert sum(int(view.masked.sum()) for view in views) / window == pytest.approx(share, abs=0.02)


# Two open blocks


@pytest.mark.parametrize(
    ("levels", "masked"),
    [
        ((0.5, 0.5), [1, 4]),  # 3 and 7 tokens are decided
        ((0.5, 0.75), [1, 4, 5]),
        ((0.75, 1.0), [0, 1, 4, 5, 6, 7]),  # of the second block none is, other than in a window of its own
        ((0.0, 0.25), []),
    ],
)
def test_two_blocks_hide_what_the_teacher_had_not_decided_at_a_moment_each(levels, masked):
    view = view_of([3, 4, 1, 2, 8, 7, 6, 5, 9, 10], levels[0], next_noise_level=levels[1])
    assert positions(view.masked) == masked and view.noise_level == levels[0]
    assert positions(view.complement) == [place for place in range(8) if place not in masked]
    assert positions(view.future) == [8, 9]


def test_the_second_block_may_reach_to_the_end_and_the_last_block_has_none_behind_it():
    steps = [3, 4, 1, 2, 8, 7, 6, 5, 9, 10]
    second = view_of(steps, 0.5, window_index=1, next_noise_level=1.0)
    assert positions(second.masked) == [4, 8, 9] and not second.future.any()
    last = view_of(steps, 1.0, window_index=2, next_noise_level=1.0)
    assert positions(last.masked) == positions(view_of(steps, 1.0, window_index=2).masked) == [9]


def test_random_masks_have_a_probability_of_their_own_in_each_of_two_blocks():
    uniforms = torch.tensor([0.3, 0.6, 0.7, 0.9] * 2)
    view = view_of([1] * 8, 0.5, objective="random", uniforms=uniforms, next_noise_level=0.8)
    assert positions(view.masked) == [0, 4, 5, 6]


def test_the_second_block_is_noisier_and_all_hidden_half_of_the_time():
    views = [drawn(seed, several_blocks=True, content_length=9, window=8) for seed in range(300)]
    single = [drawn(seed, content_length=9, window=8) for seed in range(300)]
    assert [view.noise_level for view in views] == [view.noise_level for view in single]
    first = [view for view in views if (view.masked | view.complement)[0]]
    shares = [(view.masked[:8].sum().item() / 8, view.masked[8:].sum().item() / 24) for view in first]
    assert len(first) > 100 and all((view.masked | view.complement).all() for view in first)
    assert sum(second == 1 for _, second in shares) / len(first) == pytest.approx(0.5, abs=0.12)
    # A state shows one token more than its noise asks for.
    assert all(second >= min(one, 1 - 1 / 24) - 1 / 8 for one, second in shares)


def test_two_blocks_reach_the_loss_through_the_trainer(tmp_path, tokenizer):
    learnt = []
    for region in ("window", "blocks"):
        trainer = make_trainer(tmp_path, tokenizer, state_region=region, complementary=False, noise_start=0.8)
        batch = trainer.data_collator([row | {"sample_id": index} for index, row in enumerate(rows(6))])
        learnt.append(trainer._draw(batch, training=True).learnt)
    assert learnt[1].sum() > learnt[0].sum() and not (learnt[0] & ~learnt[1]).any()
    trainer.create_model_card()
    assert "| Open at once | two blocks with a noise level each |" in (tmp_path / "README.md").read_text()


# The collator


def collate(examples, **options):
    settings = {"pad_token_id": 0, "eos_token_id": 1, "response_length": 4} | options
    return PseudoTrajectoryCollator(**settings)(examples)


def test_the_collator_pads_step_maps_and_keeps_the_samples_names():
    batch = collate(
        [
            {"prompt_ids": [5, 6], "response_ids": [7, 8], "step_map": [2, 1], "sample_id": 40},
            {"prompt_ids": [5], "response_ids": [7, 8, 9], "step_map": [1, 1, -1], "sample_id": 2},
        ]
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 1, 1], [0, 5, 7, 8, 9, 1]]
    assert batch["step_map"].tolist() == [[2, 1, -1, -1], [1, 1, -1, -1]]
    assert batch["sample_ids"].tolist() == [40, 2]


@pytest.mark.parametrize(("fill", "content"), [([], 2), ([1], 3), ([1, 1], 3)])
def test_the_fill_that_a_teacher_decided_keeps_its_steps_and_is_no_content(fill, content):
    response = [7, 8, *fill]
    steps = list(range(1, len(response) + 1))
    batch = collate([{"prompt_ids": [5], "response_ids": response, "step_map": steps, "sample_id": 0}])
    assert batch["labels"].tolist() == [[7, 8, 1, 1]] and batch["content_lengths"].tolist() == [content]
    assert batch["step_map"].tolist() == [(steps + [-1] * 4)[:4]]


@pytest.mark.parametrize("target", [[9], [9, 9, 9, 9]])
def test_the_data_sets_answer_takes_the_teachers_order_as_far_as_it_goes(target):
    example = {"prompt_ids": [5], "response_ids": [7, 8], "step_map": [2, 1], "sample_id": 0, "target_ids": target}
    batch = collate([example], use_target_ids=True)
    assert batch["labels"].tolist() == [(target + [1] * 4)[:4]]
    assert batch["step_map"].tolist() == [[2, 1, -1, -1]] and batch["content_lengths"].tolist() == [len(target)]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt_ids": []}, "`prompt_ids` must hold at least one token .got none in sample 3"),
        ({"step_map": [1]}, "`step_map` must have one entry per token of `response_ids` .got 1 and 2 in sample 3"),
    ],
)
def test_a_sample_that_cannot_be_used_is_refused_by_its_name(changed, message):
    example = {"prompt_ids": [5], "response_ids": [7, 8], "step_map": [2, 1], "sample_id": 3}
    with pytest.raises(ValueError, match=message):
        collate([example | changed])


# The loss


def written_view(masked, complement, future=()):
    def mask(chosen):
        return torch.tensor([position in chosen for position in range(4)])

    return NoisyView(mask(masked), mask(complement), mask(future), 0.5)


def two_by_six():
    """Two rows of two prompt and four answer tokens."""
    return {
        "input_ids": torch.tensor([[20, 21, 22, 23, 24, 25], [30, 31, 32, 33, 34, 35]]),
        "attention_mask": torch.ones(2, 6, dtype=torch.long),
        "labels": torch.tensor([[22, 23, 24, 25], [32, 33, 34, 35]]),
        "content_lengths": torch.tensor([4, 4]),
        "step_map": torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]]),
        "sample_ids": torch.tensor([0, 1]),
    }


VIEWS = [written_view([0, 1], [2], [3]), written_view([3], [1, 2])]


def use_views(monkeypatch, views):
    queue = iter(views)
    monkeypatch.setattr(distill_batch, "draw_view", lambda *args, **kwargs: next(queue))


LEARNT = {"primary": [[(2, 22), (3, 23)], [(5, 35)]], "complement": [[(4, 24)], [(3, 33), (4, 34)]]}  # column, token


def canvases(mask):
    """What `VIEWS` show of `two_by_six`."""
    return {
        "primary": torch.tensor([[20, 21, mask, mask, 24, mask], [30, 31, 32, 33, 34, mask]]),
        "complement": torch.tensor([[20, 21, 22, 23, mask, mask], [30, 31, 32, mask, mask, 35]]),
    }


@torch.no_grad()
def make_some_right(trainer, shift):
    """Turn the head towards one token of each view, so that the entropy term has something to count."""
    for name, canvas in canvases(trainer.mask_token_id).items():
        column, token = LEARNT[name][0][0]
        state = trainer.model.model(input_ids=canvas).last_hidden_state[0, column - shift]
        trainer.model.lm_head.weight[token] = 3 * state / state.norm()


def by_hand(trainer, shift, entropy_on_complement, reduction):
    """The loss of `VIEWS`, one logits row at a time."""
    temperature = trainer.args.entropy_temperature
    found, right = {}, 0
    for name, canvas in canvases(trainer.mask_token_id).items():
        logits = trainer.model(input_ids=canvas).logits.double()
        crosses, entropies = [[], []], [[], []]
        for row, tokens in enumerate(LEARNT[name]):
            for column, token in tokens:
                values = logits[row, column - shift]
                crosses[row].append(-(values[token] - values.exp().sum().log()).item())
                if values.argmax() == token:
                    p = (values / temperature).exp() / (values / temperature).exp().sum()
                    entropies[row].append(-sum(x * math.log(x) for x in p.tolist() if x))
                    right += 1
        for kind, values in (("cross", crosses), ("entropy", entropies)):
            if reduction == "token":
                values = [values[0] + values[1]]
            found[name, kind] = sum(sum(v) / max(len(v), 1) for v in values) / len(values)
    assert 2 <= right < 6
    entropy = found["primary", "entropy"] + entropy_on_complement * found["complement", "entropy"]
    return (found["primary", "cross"] + found["complement", "cross"] + 2.0 * entropy) / 4


@pytest.mark.parametrize("reduction", ["token", "sample"])
@pytest.mark.parametrize(("family", "shift"), [("llada", 0), ("Dream", 1)])
def test_the_loss_of_written_down_views_is_the_one_computed_by_hand(
    tmp_path, tokenizer, monkeypatch, family, shift, reduction
):
    model = student(tokenizer, family)
    trainer = make_trainer(tmp_path, tokenizer, model=model, loss_reduction=reduction)
    assert trainer.label_shift == shift and trainer.entropy_on_complement == (shift == 1)
    make_some_right(trainer, shift)
    use_views(monkeypatch, VIEWS)
    inputs, head_rows, forwards = two_by_six(), [], []
    model.lm_head.register_forward_hook(lambda module, args, output: head_rows.append(args[0].shape[:-1].numel()))
    model.model.register_forward_hook(lambda *args: forwards.append(1))
    loss, outputs = trainer.compute_loss(model, inputs, return_outputs=True)
    # One forward for both views, its head at the learnt positions: each position of a window is learnt in one view.
    assert (len(forwards), head_rows, len(outputs.logits)) == (1, [6], 6)
    assert loss.item() == pytest.approx(by_hand(trainer, shift, shift == 1, reduction), rel=1e-5)
    assert torch.equal(inputs["input_ids"], two_by_six()["input_ids"])


def test_a_model_without_a_position_mask_has_the_same_loss(tmp_path, tokenizer, monkeypatch):
    losses = []
    for _ in range(2):
        trainer = make_trainer(tmp_path, tokenizer, model=student(tokenizer, "Dream"))
        trainer._keeps_marked_positions = not losses
        use_views(monkeypatch, VIEWS)
        losses.append(trainer.compute_loss(trainer.model, two_by_six()).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_shift_of_one_equals_moved_labels(tmp_path, tokenizer, monkeypatch):
    """Row i - 1 of the shifted model is what row i of the unshifted one would be, had its rows been moved by one."""
    model = student(tokenizer, "Dream")
    losses = []
    for shift in (0, 1):
        trainer = make_trainer(tmp_path, tokenizer, model=model, label_shift=shift, entropy_on_complement=False)
        inputs = two_by_six()
        if shift == 0:  # the canvas one position to the left, so that row i is about what was token i + 1
            forward = model.forward
            monkeypatch.setattr(
                model,
                "forward",
                lambda logits_to_keep, forward=forward, **kwargs: forward(
                    logits_to_keep=logits_to_keep.roll(-1, 1), **kwargs
                ),
            )
        use_views(monkeypatch, VIEWS)
        losses.append(trainer.compute_loss(model, inputs).item())
        monkeypatch.undo()
    assert losses[0] == losses[1]


def test_a_stock_model_is_distilled_too(tmp_path, tokenizer, monkeypatch):
    qwen2 = DECODERS[0].tiny(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    model = as_diffusion_lm(qwen2, mask_token_id=tokenizer.mask_token_id)
    trainer = make_trainer(tmp_path, tokenizer, model=model)
    use_views(monkeypatch, VIEWS)
    loss = trainer.compute_loss(model, two_by_six())
    loss.backward()
    assert loss.item() > 0 and trainer.label_shift == 1


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_terms_do_not_depend_on_the_chunks(chunk):
    torch.manual_seed(0)
    logits = (torch.randn(9, 32) * 3).requires_grad_()
    targets = logits.argmax(-1).roll(1)
    terms = token_terms(logits, targets, 0.5, chunk)
    whole = token_terms(logits, targets, 0.5, 9)
    torch.testing.assert_close(terms.cross_entropy, -logits.log_softmax(-1)[torch.arange(9), targets])
    for name in ("cross_entropy", "entropy", "correct", "certainty"):
        assert torch.equal(getattr(terms, name), getattr(whole, name))
    torch.testing.assert_close(terms.certainty, logits.softmax(-1).amax(-1))
    (terms.cross_entropy.sum() + terms.entropy.sum()).backward()
    assert logits.grad.abs().sum() > 0


def test_logits_of_half_precision_are_widened_a_chunk_at_a_time(monkeypatch):
    sizes, widen = [], torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda x: (sizes.append(len(x)), widen(x))[1])
    token_terms(torch.randn(10, 8).bfloat16(), torch.zeros(10, dtype=torch.long), 1.0, 4)
    assert sizes == [4, 4, 2]


def test_without_a_hidden_token_the_loss_is_zero_and_so_are_the_gradients(tmp_path, tokenizer, monkeypatch):
    trainer = make_trainer(tmp_path, tokenizer)
    use_views(monkeypatch, [written_view([], [], [])] * 2)
    loss = trainer.compute_loss(trainer.model, two_by_six())
    loss.backward()
    assert loss.item() == 0.0
    assert all(weight.grad is None or not weight.grad.any() for weight in trainer.model.parameters())


def test_a_mean_over_nothing_is_zero_with_a_gradient_of_zero():
    values, rows_ = torch.ones(3, requires_grad=True), torch.tensor([0, 0, 1])
    for by in ("token", "sample"):
        assert mean_over(values, torch.zeros(3), rows_, 2, by).item() == 0.0
    assert mean_over(values, torch.tensor([1.0, 0, 1]), rows_, 4, "sample").item() == 0.5
    mean_over(values, torch.zeros(3), rows_, 2, "token").backward()
    assert not values.grad.any()


def test_padding_moves_no_loss(tmp_path, tokenizer, monkeypatch):
    losses = []
    for padding in (0, 3):
        trainer = make_trainer(tmp_path, tokenizer)
        inputs = two_by_six()
        for name in ("input_ids", "attention_mask"):
            inputs[name] = torch.nn.functional.pad(inputs[name], (padding, 0))
        use_views(monkeypatch, VIEWS)
        losses.append(trainer.compute_loss(trainer.model, inputs).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_supervised_mixture_adds_lladas_loss_on_the_same_answers(tmp_path, tokenizer, monkeypatch):
    use_views(monkeypatch, VIEWS * 2)
    plain, mixed = (make_trainer(tmp_path, tokenizer, sft_weight=weight) for weight in (0.0, 0.5))
    losses = [trainer.compute_loss(trainer.model, two_by_six()).item() for trainer in (plain, mixed)]
    sums = mixed._metric_sums[0]
    assert sums["sft_rows"] == 2 and plain._metric_sums[0]["sft_rows"] == 0
    assert losses[1] == pytest.approx(losses[0] + 0.5 * sums["sft_loss"].item() / 2, rel=1e-5)


def test_draws_depend_on_the_sample_and_the_epoch_alone(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, objective="random", noise_start=0.5)
    examples = [row | {"sample_id": index} for index, row in enumerate(rows(6))]

    def drawn_masks(order, epoch=0.0):
        trainer.state.epoch = epoch
        batch = trainer.data_collator([examples[index] for index in order])
        learnt = trainer._draw(batch, training=True).learnt
        return {index: learnt[:, row].tolist() for row, index in enumerate(order)}

    together = drawn_masks(range(6))
    assert together == drawn_masks([5, 2, 0, 1, 4, 3]) == drawn_masks(range(6), epoch=0.9)
    assert together[3] == drawn_masks([3])[3]
    assert together != drawn_masks(range(6), epoch=1.0)
