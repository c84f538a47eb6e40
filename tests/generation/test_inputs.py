"""What `generate` takes beside token ids: embeddings, no prompt, stopping criteria, logits processors."""

import pytest
import torch
from official import tiny_tokenizer
from tiny import (
    EOS,
    MASK,
    PAD,
    ScriptedModel,
    answer,
    constant_script,
    left_padded,
    tables,
    tiny_prompt,
    trained_like,
)
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation import LogitsProcessor, LogitsProcessorList


FAMILIES = ("llada", "dream")
METHODS = {
    "d3llm": {"decoding_method": "d3llm", "block_length": 5, "entropy_threshold": 0.8},
    "d3llm, delayed cache": {"decoding_method": "d3llm", "block_length": 4, "kv_cache": "delayed", "cache_delay": 1},
    "dparallel": {"decoding_method": "dparallel", "block_length": 5},
    "llada, guided": {"decoding_method": "llada", "block_length": 5, "steps": 8, "cfg_scale": 0.5},
    "dream": {"decoding_method": "dream", "steps": 8},
}


@pytest.mark.every(3)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_of_a_prompt_give_the_answer_of_its_token_ids(family, method):
    model = trained_like(family)
    inputs = left_padded([tiny_prompt(0, 3), tiny_prompt(1, 6)])
    chosen = {"max_new_tokens": 12, "return_dict_in_generate": True, "eos_token_id": EOS, "pad_token_id": PAD}
    by_ids = model.generate(**inputs, **chosen, **METHODS[method])
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    by_embeds = model.generate(
        inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **chosen, **METHODS[method]
    )
    assert torch.equal(by_embeds.sequences, by_ids.sequences[:, 6:])
    assert torch.equal(by_embeds.step_map, by_ids.step_map)


@pytest.mark.every(3)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_without_a_prompt_is_answered_alone_and_beside_others(family, method):
    model, chosen = trained_like(family), {"max_new_tokens": 9, "early_stop": False, **METHODS[method]}
    alone = model.generate(
        torch.zeros(1, 0, dtype=torch.long),
        attention_mask=torch.zeros(1, 0, dtype=torch.long),
        eos_token_id=EOS,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        **chosen,
    )
    assert alone.sequences.shape == (1, 9) and (alone.step_map > 0).all()
    together = model.generate(**left_padded([[1, 2, 3], []]), eos_token_id=EOS, pad_token_id=PAD, **chosen)
    assert not (together == MASK).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_under_a_shift_the_first_position_of_an_empty_prompt_is_predicted_by_its_own_row(family):
    shift = int(family == "dream")
    table = tables(1, 8).expand(1, -1, -1)
    model = ScriptedModel(lambda ids: table[:, : ids.shape[1]], shift=shift)
    chosen = {"decoding_method": "dparallel", "entropy_threshold": float("inf"), "early_stop": False}
    output = model.generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=8, eos_token_id=EOS, **chosen)
    allowed = table[0].clone()
    allowed[:, MASK] = -float("inf")
    best = allowed.argmax(-1).tolist()
    assert output[0].tolist() == (best if not shift else [best[0], *best[:-1]])


class StopsAfter(StoppingCriteria):
    """Ends a row whose text holds a token; keeps what it was asked."""

    def __init__(self, token: int):
        self.token, self.asked = token, []

    def __call__(self, input_ids, scores, **kwargs):
        self.asked.append(input_ids.clone())
        return (input_ids == self.token).any(1)


@pytest.mark.parametrize("decoding_method", ["d3llm", "dparallel", "llada", "dream"])
def test_a_stopping_criterion_ends_its_row_where_it_holds_as_if_written_from_left_to_right(decoding_method):
    answers = [[10, 11, 12, 13, 14, 15, 16, 17], [10, 11, 10, 11, 9, 9, 12, 12], [9] * 8]

    def script(ids: torch.Tensor) -> torch.Tensor:
        return torch.cat([constant_script(answers[row], 1)(ids[:1]) for row in ids[:, 0].tolist()])

    criterion = StopsAfter(12)
    output = ScriptedModel(script).generate(
        torch.tensor([[0], [1], [2]]),
        stopping_criteria=StoppingCriteriaList([criterion]),
        decoding_method=decoding_method,
        max_new_tokens=8,
        eos_token_id=EOS,
        pad_token_id=PAD,
        return_dict_in_generate=True,
    )
    assert output.sequences[:, 1:].tolist() == [[10, 11, 12, *[PAD] * 5], [10, 11, 10, 11, 9, 9, 12, PAD], [9] * 8]
    kept = torch.tensor([3.0, 7.0, 8.0])
    assert torch.equal(output.tokens_per_forward, kept / output.num_forwards)
    lengths = [asked.shape[1] for asked in criterion.asked]
    assert lengths == sorted(lengths)  # the text only grows


def test_a_stopping_criterion_spares_the_forwards_after_it():
    model = ScriptedModel(constant_script([10, 11, 12, 13, *[14] * 28], 2))
    chosen = {"block_length": 4, "decoding_method": "dparallel", "max_new_tokens": 32, "early_stop": False}
    answer(model, [1, 2], stopping_criteria=StoppingCriteriaList([StopsAfter(13)]), **chosen)
    assert model.calls == 1


def test_stop_strings_end_the_answer():
    tokenizer = tiny_tokenizer()
    text = tokenizer.encode("one two three", add_special_tokens=False)
    model = ScriptedModel(constant_script(text + [1] * 3, 2, vocab_size=512), vocab_size=512)
    output = model.generate(
        torch.tensor([[1, 2]]), max_new_tokens=len(text) + 3, stop_strings=["two"], tokenizer=tokenizer
    )
    assert tokenizer.decode(output[0, 2:], skip_special_tokens=True).startswith("one two")
    assert "three" not in tokenizer.decode(output[0, 2:])


def test_suppressed_tokens_are_not_chosen():
    suppressed = list(range(0, 28, 2))
    for family in FAMILIES:
        output = answer(trained_like(family), [1, 2], suppress_tokens=suppressed, max_new_tokens=16)
        assert not set(output.sequences[0, 2:].tolist()) & set(suppressed)


@pytest.mark.every(3)
@pytest.mark.parametrize("decoding_method", ["d3llm", "llada", "dream"])
def test_sampling_from_the_best_token_alone_is_greedy(decoding_method):
    for family in FAMILIES:
        greedy = answer(trained_like(family), [1, 2], decoding_method=decoding_method)
        chosen = {"do_sample": True, "top_k": 1, "seed": 0, "decoding_method": decoding_method}
        if decoding_method == "dream":  # ranks by the logits after top-k, all of them certain
            assert answer(trained_like(family), [1, 2], **chosen).sequences.shape == greedy.sequences.shape
        else:
            assert torch.equal(answer(trained_like(family), [1, 2], **chosen).sequences, greedy.sequences)


class SeesTheText(LogitsProcessor):
    """Keeps the text that it was given."""

    def __init__(self):
        self.seen: list[torch.Tensor] = []

    def __call__(self, input_ids, scores):
        assert len(input_ids) == len(scores)
        self.seen.append(input_ids.clone())
        return scores


def test_a_processor_that_reads_the_text_gets_what_stands_before_the_position():
    processor = SeesTheText()
    prompts = torch.tensor([[1, 2], [3, 4]])
    trained_like("llada").generate(
        prompts, logits_processor=LogitsProcessorList([processor]), max_new_tokens=6, block_length=3
    )
    assert all(torch.equal(text[:, :2], prompts) for text in processor.seen)
    assert {text.shape[1] for text in processor.seen} == {2, 3, 4, 5, 6, 7}


def test_repetition_penalty_acts_on_the_decided_text():
    def script(ids):
        logits = torch.zeros(*ids.shape, 32)
        logits[..., 7], logits[..., 8] = 4.0, 3.0
        return logits

    chosen = {"decoding_method": "dparallel", "block_length": 1, "max_new_tokens": 3, "early_stop": False}
    plain = answer(ScriptedModel(script), [1], **chosen).sequences[0, 1:].tolist()
    penalised = answer(ScriptedModel(script), [1], repetition_penalty=2.0, **chosen).sequences[0, 1:].tolist()
    assert plain == [7, 7, 7] and penalised == [7, 8, 7]


def test_max_length_counts_the_prompt():
    model = trained_like("llada")
    output = model.generate(torch.tensor([[1, 2, 3]]), max_length=10)
    assert output.shape == (1, 10)


def test_the_result_is_a_plain_tensor_unless_a_dict_is_asked_for():
    model = ScriptedModel(lambda ids: tables(1, ids.shape[1]).expand(len(ids), -1, -1))
    output = model.generate(torch.tensor([[1, 2]]), max_new_tokens=5)
    assert isinstance(output, torch.Tensor) and output.dtype == torch.long and output.shape == (1, 7)


def test_paged_batches_are_refused():
    with pytest.raises(ValueError, match="left to right"):
        trained_like("llada").generate_batch([[1, 2]])
    with pytest.raises(ValueError, match="left to right"):
        trained_like("llada").init_continuous_batching()


def test_a_criterion_needs_a_pad_token():
    model = trained_like("llada")
    eos, model.config.eos_token_id = model.config.eos_token_id, None
    pad, model.config.pad_token_id = model.config.pad_token_id, None
    config, model.generation_config = model.generation_config, type(model.generation_config)()
    try:
        with pytest.raises(ValueError, match="pad_token_id"):
            model.generate(
                torch.tensor([[1, 2]]), max_new_tokens=4, stopping_criteria=StoppingCriteriaList([StopsAfter(3)])
            )
    finally:
        model.config.eos_token_id, model.config.pad_token_id, model.generation_config = eos, pad, config
